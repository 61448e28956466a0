"""The plan of a network whose parameters are constant: what is kept of them, and what reads it."""

import dataclasses
import functools
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set

from fcjax.errors import RefutedError
from fcjax.expressions.terms import Expr, Unrepresentable
from fcjax.expressions.written import Written, written
from fcjax.merging import ahead, forming, summands
from fcjax.merging.again import planned_like
from fcjax.merging.ahead import digest
from fcjax.merging.empty import without_empty
from fcjax.merging.forming import Lowered
from fcjax.merging.held import affordable
from fcjax.merging.kept import Merging
from fcjax.merging.loops import Loop, merged_loop
from fcjax.merging.normed import with_normed
from fcjax.merging.pointwise import axes_of_space
from fcjax.merging.sweep import Network, Sweep
from fcjax.planning.plan import Plan, plan
from fcjax.planning.recipes import recipe
from fcjax.running.program import Program
from fcjax.tracing.trace import Body, Equation, Kind, Value
from fcjax.validation.plans import RAISE
from fcjax.validation.recipes import refuted

__all__ = ["merging"]

PARAM = Kind("param", trainable=False)
RAW = Kind("param", trainable=False, invariant=False)
DATA = Kind("data", trainable=False, invariant=False)


def merging(
    body: Body, names: Sequence[str], raw: Set[str] = frozenset(), copies: Sequence[int] = (),
    first: Plan | None = None,
) -> Merging:  # fmt: skip
    """Merges a network.

    Prices are those of an evaluation for which products of parameters are free. They grow with the
    number of rows alike, whichever way a segment is computed, so the choice does not depend on it.

    Args:
      body: the network; its first inputs are the parameters.
      names: the names of the parameters.
      raw: the identities of parameters and constants that are kept as they are.
      copies: how often each parameter is stored, such as once for every run of a loop; once by
        default.
      first: the plan of the same network for other sizes, whose decisions are taken again.
    """
    arguments = len(body.inputs) - len(names)
    of_params = [RAW if digest("input", name) in raw else PARAM for name in names]
    of_inputs = [*of_params, *itertools.repeat(DATA, arguments)]
    kinds = functools.partial(ahead.kinds, raw=raw)
    found = with_normed(written(without_empty(body), of_inputs, math.inf, kinds))
    found = dataclasses.replace(found, nested={})  # the bodies of loops are merged by themselves
    planned = (first and planned_like(found, first)) or plan(found)
    network = _network(found, planned, names, raw, copies or [1] * len(names))
    return _merged(network, planned, _checked(network, planned))


def _checked(network: Network, planned: Plan) -> Sweep:
    """What is left of a network, without effective weights that numbers refute."""
    sweep = affordable(network)
    lowered = {v: low for v, low in network.lowered.items() if v in sweep.planned}
    recipes = {v: low.recipe for v, low in lowered.items()}
    program = Program(dataclasses.replace(planned, recipes=recipes))
    formed = {f.value: f.compute for low in lowered.values() for f in low.formed}
    forced = network.written.forced & recipes.keys()  # no equation says what these are
    wrong = refuted(
        dataclasses.replace(planned, recipes={v: recipes[v] for v in recipes.keys() - forced}),
        formed=formed | {v: functools.partial(program.computed, v) for v in forced},
    )
    if not wrong:
        return sweep
    reason = next(iter(wrong.values()))
    if os.environ.get(RAISE):
        raise RefutedError(f"effective weights are wrong: {reason}")
    warnings.warn(
        f"a check on numbers refuted effective weights, which are left out ({reason}): a fault of "
        "fcjax, please report it with this network",
        stacklevel=2,
    )
    left_out = frozenset(wrong).union(*(g for g in network.together if not g.isdisjoint(wrong)))
    right = {v: low for v, low in network.lowered.items() if v not in left_out}
    together = tuple(group for group in network.together if group.isdisjoint(left_out))
    return _checked(dataclasses.replace(network, lowered=right, together=together), planned)


def _network(
    found: Written, planned: Plan, names: Sequence[str], raw: Set[str], copies: Sequence[int]
) -> Network:
    """What could be known ahead of a network."""
    inputs = found.body.inputs[: len(names)]
    named = dict(zip(inputs, names, strict=True))
    identities, sources = ahead.identities(found.body, named), ahead.sources(found.body, named)
    lowered = dict(_segments(found, planned))
    changed = [frozenset(c.roots) & lowered.keys() for c in planned.changes if c.taken]
    for group in changed:
        if any(summands.are_more(v, found, planned) for v in group):
            lowered = {v: low for v, low in lowered.items() if v not in group - found.forced}
    changed = [group & lowered.keys() for group in changed]
    alone = lowered.keys() - frozenset().union(*changed)
    together = [group - found.forced for group in (*changed, *(frozenset({v}) for v in alone))]
    inner = functools.partial(_inner, raw)

    @functools.cache
    def merge(equation: Equation) -> Loop | None:
        if equation.name != "scan" or equation.source.effects:
            return None
        return merged_loop(equation, found.known, identities, sources, inner)

    return Network(
        found, inputs, {digest("input", n): c for n, c in zip(names, copies, strict=True)},
        identities, sources, lowered, tuple(filter(None, together)), merge,
    )  # fmt: skip


def _inner(
    outer: Set[str], body: Body, names: Sequence[str], raw: Set[str], copies: Sequence[int]
) -> Merging:
    """The body of a loop, merged with the same constants kept as they are as outside."""
    return merging(body, names, raw | outer, copies)


def _merged(network: Network, planned: Plan, sweep: Sweep) -> Merging:
    """The plan of what is left."""
    written, kept = network.written, network.kept(sweep)
    constants = [(v, array) for v, array in written.body.constants if v in sweep.readers]
    constants += [c for loop in sweep.loops.values() for c in loop.constants]
    arguments = written.body.inputs[len(network.inputs) :]
    inputs = (*(k.value for k in kept), *arguments)
    body = Body(inputs, tuple(constants), sweep.equations, written.body.outputs)
    merged = dataclasses.replace(
        planned,
        body=body,
        recipes={v: network.lowered[v].recipe for v in sweep.planned},
        changes=(),
        known={**written.known, **dict.fromkeys((k.value for k in kept), PARAM)},
    )
    return Merging(merged, tuple(kept), written.body, planned)


# --- which values are computed through effective weights ----------------------------------------


def _segments(found: Written, planned: Plan) -> Iterator[tuple[Value, Lowered]]:
    makers = {v: e for e in found.body.equations for v in e.outputs if v is not None}
    for value, how in planned.recipes.items():
        if not ahead.is_ahead(value, found.known):
            operations = _written_operations(value, how.expr, makers, found.known)
            yield value, forming.lowered(how, axes_of_space(operations))
    for value, expr in planned.bases.items():
        if value in planned.recipes or not expr.has_data:
            continue
        low = _cheaper(expr, _written_operations(value, expr, makers, found.known))
        if low is not None:
            yield value, low


def _cheaper(expr: Expr, written: Sequence[Equation]) -> Lowered | None:
    """A value that nothing changed, if effective weights save one of its operations on data."""
    try:
        low = forming.lowered(recipe(expr, math.inf), axes_of_space(written))
    except Unrepresentable:
        return None
    if not low.formed or any(f.centred for t in expr.terms for f in t.factors):
        return None  # nothing to form, or a mean that would be taken twice
    return low if forming.operations(low.recipe) < len(written) else None


def _written_operations(
    value: Value, expr: Expr, makers: Mapping[Value, Equation], known: Mapping[Value, Kind]
) -> list[Equation]:
    """The operations on data that lead from an expression's leaves to its value, as written."""
    seen: set[Equation] = set()
    left = [value]
    while left:
        made = left.pop()
        if made in makers and made not in expr.leaves and known[made].of == "data":
            if makers[made] not in seen:
                left += makers[made].values
            seen.add(makers[made])
    return [equation for equation in seen if not ahead.is_look(equation)]
