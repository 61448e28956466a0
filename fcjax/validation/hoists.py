"""Equations moved in front of a look-up, against those that they were.

These are no polynomials, so both sides are run, with the derivative that jax takes of them: only
the transpose of a look-up shows what becomes of the cotangents of rows outside of the table.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcjax import compat
from fcjax.numbers.drawing import Draw, apart, settled
from fcjax.numbers.entrywise import combined
from fcjax.numbers.interpreter import Interpreter, Unevaluated
from fcjax.numbers.periodic import Array, Numbers
from fcjax.tracing.trace import Body, Equation, Value
from fcjax.validation.bodies import CLOSE

__all__ = ["refuted_hoists"]


def refuted_hoists(written: Body, hoisted: Body) -> str | None:
    """How values of two bodies differ that the second computes by other equations.

    Args:
      written: a body as it is written.
      hoisted: the same with functions moved in front of look-ups.

    Returns:
      None if they do not.
    """
    before, after = _makers(written), _makers(hoisted)
    same = {v for v, e in before.items() if after.get(v) is e}
    wanted = [v for v in before if v in after and v not in same and _is_float(v)]
    # rows are read of the table or looked up, and what they share before or behind its repetition
    same = {v for v in same if before[v].name not in ("gather", "broadcast_in_dim")}
    if not wanted:
        return None
    parts = [_needed(body, wanted, same) for body in (written, hoisted)]
    leaves = list(dict.fromkeys(v for part in parts for v in _read(part)))
    traced = [_with_cotangents(part, leaves, wanted) for part in parts]
    rows = {e.values[1]: e.values[0].shape[0] for e in parts[0] if e.name == "gather"}
    check = functools.partial(_compared, traced, leaves, wanted, rows)
    try:
        answers = [settled(functools.partial(check, beyond)) for beyond in (0, 2)]
    except Unevaluated:
        return None
    return next((answer for answer in answers if answer), None)


def _makers(body: Body) -> dict[Value, Equation]:
    return {v: e for e in body.equations for v in e.outputs if v is not None}


def _is_float(value: Value) -> bool:
    return bool(jnp.issubdtype(value.aval.dtype, jnp.floating))


def _needed(body: Body, wanted: Sequence[Value], given: Set[Value]) -> list[Equation]:
    """The equations that some values need, back to those that are given."""
    needed, found = set(wanted), []
    for equation in reversed(body.equations):
        if not needed.isdisjoint(equation.outputs):
            found.append(equation)
            needed.update(v for v in equation.values if v not in given)
    return found[::-1]


def _read(equations: Sequence[Equation]) -> list[Value]:
    made = {v for e in equations for v in e.outputs}
    return [v for e in equations for v in e.values if v not in made]


def _with_cotangents(
    equations: Sequence[Equation], leaves: Sequence[Value], wanted: Sequence[Value]
) -> Any:
    """The jaxpr from leaves, and cotangents of what is wanted, to values and cotangents."""
    floats = [v for v in leaves if _is_float(v)]

    def both(given: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        env = dict(zip(leaves, given, strict=True))

        def values(*moving: Any) -> list[Any]:
            env.update(zip(floats, moving, strict=True))
            for equation in equations:
                operands = [env[a] if isinstance(a, Value) else a.val for a in equation.inputs]
                made = compat.bind(equation.source, operands)
                env.update((v, x) for v, x in zip(equation.outputs, made, strict=True) if v)
            return [env[v] for v in wanted]

        made, pull = jax.vjp(values, *(env[v] for v in floats))
        return made, pull(list(cotangents))

    avals = [[jax.ShapeDtypeStruct(v.shape, v.aval.dtype) for v in vs] for vs in (leaves, wanted)]
    return jax.make_jaxpr(both)(*avals)


def _compared(
    traced: Sequence[Any], leaves: Sequence[Value], wanted: Sequence[Value],
    rows: Mapping[Value, int], beyond: int, draw: Draw,
) -> str | None:  # fmt: skip
    """How two traced programs differ where row numbers are up to ``beyond`` outside of a table."""
    drawn = [draw(v) for v in (*leaves, *wanted)]
    inputs = [combined(np.real, [x]) if isinstance(x, Numbers) else x for x in drawn]
    for i, leaf in enumerate(leaves):
        if leaf in rows:
            inputs[i] = combined(lambda a, n=rows[leaf]: _numbers(a, n, beyond), [inputs[i]])
    expected, found = (Interpreter(draw.run).evaluate(jaxpr, inputs) for jaxpr in traced)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        by, _ = apart(a, b)
        if by > CLOSE:
            what = "a value" if i < len(wanted) else "a cotangent"
            return f"{what} is off by {by:.1g} of its size"
    return None


def _numbers(like: Array, count: int, beyond: int) -> Array:
    """Numbers of rows, the first of them as far outside as any."""
    rng = np.random.default_rng(count)
    made = rng.integers(-beyond, count + beyond, like.shape)
    ends = np.asarray([count + beyond - 1, -beyond])[: made.size]
    made.reshape(-1)[: len(ends)] = ends
    return made.astype(like.dtype)
