"""Plans without what numbers refute: whatever is wrong with a rule, nothing is computed by it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from fcjax import compat
from fcjax.errors import RefutedError
from fcjax.planning.plan import Plan, Refutation
from fcjax.running.program import Program
from fcjax.tracing.trace import Body, Equation, Value
from fcjax.validation.bodies import refuted_steps
from fcjax.validation.hoists import refuted_hoists
from fcjax.validation.recipes import cone, refuted

__all__ = ["RAISE", "validated"]

RAISE = "FCJAX_RAISE_REFUTED"
"""An environment variable; where it is set a refuted rewrite is an error, as it is in tests."""


def validated(written: Body, plans: Iterable[Callable[[], Plan]]) -> Plan:
    """The first plan whose values are those of the network, without the rewrites that change them.

    Args:
      written: the network as written.
      plans: how to make them, the best first. The last moves nothing and centres no stream, so
        that each of its rewrites can be left out by itself.

    Raises:
      RefutedError: instead of leaving a rewrite out, where ``RAISE`` is set in the environment.
    """
    found: list[Refutation] = []
    for make in plans:
        plan = make()
        moved = refuted_hoists(written, plan.body)
        if moved is not None:
            found.append(Refutation((), (), f"what was moved in front of a look-up: {moved}", ""))
            continue
        checked = _checked(plan, ahead=False)
        found += checked.found
        if checked.plan is not None:
            return dataclasses.replace(checked.plan, refuted=_reported(found))
    raise AssertionError("a plan whose rewrites cannot be left out")


def _reported(found: Sequence[Refutation]) -> tuple[Refutation, ...]:
    if found and os.environ.get(RAISE):
        first = found[0]
        raise RefutedError(f"a rewrite is wrong: {first.reason}\n{first.program}")
    return tuple(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A plan without what is refuted, None if that cannot be left out, and what was."""

    plan: Plan | None
    found: tuple[Refutation, ...]


def _checked(plan: Plan, *, ahead: bool) -> _Checked:
    """Checks a body, the bodies inside it first."""
    found: list[Refutation] = []
    nested: dict[int, tuple[Plan, ...]] = {}
    for i, bodies in plan.nested.items():
        again = plan.body.equations[i].name != "cond"
        inner = [_checked(body, ahead=again) for body in bodies]
        found += [one for each in inner for one in each.found]
        kept = [each.plan for each in inner if each.plan is not None]
        if len(kept) < len(bodies):
            return _Checked(None, tuple(found))
        nested[i] = tuple(kept)
    plan = dataclasses.replace(plan, nested=nested)
    wrong = refuted(plan, ahead=ahead)
    found += [_refutation(plan, value, reason) for value, reason in wrong.items()]
    given = {root for c in plan.changes if c.taken for root in c.roots}
    if wrong and (plan.less_mean or not given.issuperset(wrong)):
        return _Checked(None, tuple(found))  # what reads a centred stream relies on all of it
    plan = plan.without(wrong.keys()) if wrong else plan
    loops = refuted_steps(Program(plan))
    found += [_of_loop(plan.body.equations[i], reason) for i, reason in loops.items()]
    kept_bodies = {i: bodies for i, bodies in plan.nested.items() if i not in loops}
    return _Checked(dataclasses.replace(plan, nested=kept_bodies), tuple(found))


def _refutation(plan: Plan, value: Value, reason: str) -> Refutation:
    expr = plan.recipes[value].expr
    leaves = tuple(expr.leaves)
    return Refutation(
        (value,), leaves, f"{value.aval.str_short()}: {reason}", _program(plan, value)
    )


def _of_loop(equation: Equation, reason: str) -> Refutation:
    values = tuple(v for v in equation.outputs if v is not None)
    return Refutation(values, tuple(equation.values), f"{equation.name}: {reason}", "")


def _program(plan: Plan, value: Value) -> str:
    """What the network says a value is, from what boundaries make on."""
    equations, leaves = cone(plan, value)

    def run(*arrays: Any) -> Any:
        env = dict(zip(leaves, arrays, strict=True))
        for equation in equations:
            operands = [env[a] if isinstance(a, Value) else a.val for a in equation.inputs]
            made = compat.bind(equation.source, operands)
            env.update((v, x) for v, x in zip(equation.outputs, made, strict=True) if v)
        return env[value]

    avals = [jax.ShapeDtypeStruct(v.shape, v.aval.dtype) for v in leaves]
    return str(jax.make_jaxpr(run)(*avals))
