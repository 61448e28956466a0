"""The plan of a network for other sizes, by the decisions of one that was searched for already.

Prices grow with the rows alike, so another batch size asks for the same: what was expressed through
what is read off the recipes of the first plan.
"""

import dataclasses
import math
from collections.abc import Mapping

from fcjax.expressions import algebra
from fcjax.expressions.terms import Expr, Unrepresentable
from fcjax.expressions.written import Written
from fcjax.planning.parts import Recipe
from fcjax.planning.phases import in_phases
from fcjax.planning.plan import Change, Plan
from fcjax.planning.recipes import recipe
from fcjax.tracing.trace import Body, Value

__all__ = ["planned_like"]


def planned_like(network: Written, first: Plan) -> Plan | None:
    """The plan that computes the same values through the same others; None if it cannot be.

    Args:
      network: a network as written.
      first: the plan of the same network for other sizes.
    """
    of = _counterparts(first.body, network.body)
    if of is None or not {of[v] for v in first.recipes} <= network.computed.keys():
        return None
    try:
        recipes = {of[v]: _like(of[v], how, of, network) for v, how in first.recipes.items()}
    except Unrepresentable:
        return None
    return dataclasses.replace(
        first,
        body=network.body,
        known=network.known,
        recipes=recipes,
        changes=tuple(_moved(c, of) for c in first.changes if c.taken),
        bases=network.computed,
        boundaries=network.boundaries,
    )


def _counterparts(first: Body, second: Body) -> dict[Value, Value] | None:
    """The values of one body in another with the same equations, by their places."""
    names, values = zip(*(_listed(body) for body in (first, second)), strict=True)
    if names[0] != names[1]:
        return None
    both = zip(*values, strict=True)
    return {a: b for a, b in both if a is not None and b is not None}


def _listed(body: Body) -> tuple[list[object], list[Value | None]]:
    """What there is in a body, and the values of it, in the same order for equal equations."""
    values = [*body.inputs, *(v for v, _ in body.constants)]
    made = [v for e in body.equations for v in e.outputs]
    kinds: list[object] = [len(body.inputs), len(body.constants)]
    kinds += [(e.name, [v is None for v in e.outputs]) for e in body.equations]
    return kinds, [*values, *made]


def _like(value: Value, how: Recipe, of: Mapping[Value, Value], network: Written) -> Recipe:
    """A value through what its counterpart is computed from."""
    wanted = {of[leaf] for leaf in how.expr.leaves}
    order = {v: i for i, v in enumerate(network.computed)}
    expr: Expr = network.computed[value]
    while left := [v for v in expr.leaves if v not in wanted]:
        if not all(v in order for v in left):
            raise Unrepresentable("a value that is made of others than for the first sizes")
        last = max(left, key=order.__getitem__)
        expr = algebra.substitute(expr, last, network.computed[last])
    return in_phases(recipe(expr, math.inf), math.inf)


def _moved(change: Change, of: Mapping[Value, Value]) -> Change:
    roots, gone = (tuple(of[v] for v in values) for values in (change.roots, change.gone))
    return dataclasses.replace(change, roots=roots, gone=gone)
