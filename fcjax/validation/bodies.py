"""Steps with bodies of their own, such as loops, against the equations that they stand for."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcjax.numbers.drawing import Draw, apart, settled, size
from fcjax.numbers.entrywise import combined
from fcjax.numbers.interpreter import Interpreter, Unevaluated
from fcjax.numbers.periodic import STEP, Numbers
from fcjax.running.program import NESTED, Nested, Program
from fcjax.tracing.trace import Value

__all__ = ["refuted_steps"]

TURNS = 3
"""How many turns of a loop are compared."""
HUGE = 1e100
"""From here on a number may be infinite, or none, in another order of products."""
CLOSE = 1e-5
"""By how much two evaluations differ that may go through functions only jax has, in float32."""


def refuted_steps(program: Program) -> dict[int, str]:
    """The numbers of equations with bodies that run otherwise than as written, and how.

    Both are traced and evaluated on random numbers, inside out: what the body computes by recipes,
    what is formed before it, and how it is run.
    """
    found = {}
    for step in program.steps:
        if isinstance(step, Nested):
            answer = _refuted(step)
            if answer is not None:
                found[program.plan.body.equations.index(step.equation)] = answer
    return found


def _refuted(step: Nested) -> str | None:
    equation = step.equation
    avals = [a.aval if isinstance(a, Value) else jax.typeof(a.val) for a in equation.inputs]
    try:
        again = jax.make_jaxpr(lambda *xs: NESTED[equation.name](step, xs))(*avals)
    except Exception as error:
        return f"it fails with {type(error).__name__}: {error}"
    for which in range(_choices(step)):
        try:
            answer = settled(functools.partial(_compared, step, again, which))
        except Unevaluated:
            return None
        if answer is not None:
            return answer
    return None


def _choices(step: Nested) -> int:
    return len(step.programs) if step.equation.name == "cond" else 1


def _compared(step: Nested, again: Any, which: int, draw: Draw) -> str | None:
    equation = step.equation
    inputs = [draw(a) if isinstance(a, Value) else a.val for a in equation.inputs]
    if equation.name == "cond":
        inputs[0] = np.asarray(which, jnp.int32)
    interpreter = Interpreter(draw.run, turns=TURNS)
    values = [interpreter.whole(x) for x in inputs]
    expected = interpreter.apply(equation.source, values)
    found = interpreter.evaluate(again, values)
    pairs = [
        (_kept(a, b), _kept(b, a))
        for a, b in zip(found, expected, strict=True)
        if isinstance(b, Numbers)  # others are keys of random numbers
    ]
    scale = _largest([*values, *(b for _, b in pairs)])
    answers = [_differ(a, b, scale) for a, b in pairs]
    return next((answer for answer in answers if answer), None)


def _kept(x: Numbers, other: Numbers) -> Numbers:
    """Numbers without those that overflow in both: loops that explode are not compared."""
    return combined(lambda a, b: np.where(_is_huge(a) & _is_huge(b), 0, a), [x, other])


def _is_huge(x: Any) -> Any:
    return ~((np.abs(np.real(x)) < HUGE) & (np.abs(np.imag(x)) < HUGE * STEP))


def _largest(values: Iterable[Any]) -> tuple[float, float]:
    """The size of the numbers that go in and out: what cancels has none of its own."""
    sizes = [size(_kept(x, x)) for x in values if isinstance(x, Numbers)]
    return tuple(map(max, zip((0.0, 0.0), *sizes, strict=True)))


def _differ(found: Numbers, expected: Numbers, scale: tuple[float, float]) -> str | None:
    value, derivative = apart(found, expected, scale)
    if value > CLOSE:
        return f"a result is off by {value:.1g} of its size"
    return f"a derivative is off by {derivative:.1g} of its size" if derivative > CLOSE else None
