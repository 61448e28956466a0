"""The recipes of a body against the equations that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from fcjax.numbers.drawing import CLOSE, Draw, differ, less_mean, settled, size
from fcjax.numbers.interpreter import Interpreter
from fcjax.numbers.periodic import Numbers
from fcjax.planning.parts import Linear, Recipe
from fcjax.planning.plan import Plan
from fcjax.running.program import Program
from fcjax.tracing.trace import Equation, Value

__all__ = ["refuted"]

Scale = tuple[float, float]
Forming = Mapping[Value, Callable[[Mapping[Value, Any]], Any]]
"""For arrays that recipes read and no equation makes, how they are computed from others."""


def refuted(
    plan: Plan, *, ahead: bool = False, formed: Forming = MappingProxyType({})
) -> dict[Value, str]:
    """The values of a body whose recipes give something else than their equations.

    The equations are evaluated as jax traced them, between the boundaries, and the recipes as a
    program runs them, both on the same random numbers.

    Args:
      plan: the plan of the body; what its equations read has the shapes that they were traced with.
      ahead: whether weights that are the same in every run of the body are formed before it.
      formed: what else the recipes read.

    Returns:
      for each of them how far it is off.
    """
    if not plan.recipes:
        return {}
    program = Program(plan)
    with jax.ensure_compile_time_eval():  # numbers, also while something else is traced
        return settled(lambda draw: _refuted(program, _Equations(plan, draw, formed), ahead))


def _refuted(program: Program, equations: _Equations, ahead: bool) -> dict[Value, str]:
    found = {}
    for value, recipe in program.plan.recipes.items():
        expected = equations.meant(value)
        try:
            made = equations.whole(program.computed(value, equations, ahead=ahead))
        except Exception as error:
            found[value] = f"it fails with {type(error).__name__}: {error}"
            continue
        close = _close(recipe, equations)
        answer = differ(made, expected, equations.scale[value], close)
        if answer is not None:
            found[value] = answer
    return found


def _close(recipe: Recipe, equations: _Equations) -> float:
    """How far a recipe may be off: what jax traces first, is formed or a number, is rounded."""
    rounded = (
        any(isinstance(part, Linear) and part.apart for part in recipe.parts)
        or any(leaf in equations.formed for leaf in recipe.expr.leaves)
        or any(not term.factors for term in recipe.expr.terms)
    )
    floating = jnp.issubdtype(recipe.expr.dtype, jnp.floating)
    return (
        max(CLOSE, 4 * float(jnp.finfo(recipe.expr.dtype).eps)) if rounded and floating else CLOSE
    )


def cone(plan: Plan, value: Value) -> tuple[list[Equation], list[Value]]:
    """The equations that say what a value is, and the values that they start from."""
    needed, found = {value}, []
    for equation in reversed(plan.body.equations):
        if any(
            v is not None and _says(plan, equation, v)
            for v in needed.intersection(equation.outputs)
        ):
            found.append(equation)
            needed.update(equation.values)
    made = {v for e in found for v in e.outputs}
    return found[::-1], [v for v in needed if v not in made]


def _says(plan: Plan, maker: Equation, value: Value) -> bool:
    """Whether an equation is looked into: those that are no sums are not, but for products."""
    return maker not in plan.boundaries or value in plan.bases


class _Equations(Mapping[Value, Numbers]):
    """The values of a body on random numbers, computed by its equations when they are asked for.

    What boundaries make is drawn like the inputs of the body.

    Attributes:
      formed: how arrays are computed that no equation makes.
      scale: the size of the numbers that a value is made of, and of their derivatives.
    """

    def __init__(self, plan: Plan, draw: Draw, formed: Forming) -> None:
        self.formed = formed
        self._plan = plan
        self._draw = draw
        self._interpreter = Interpreter(draw.run)
        self._numbers: dict[Value, Numbers] = {}
        self.scale: dict[Value, Scale] = {}
        self._makers = {v: e for e in plan.body.equations for v in e.outputs if v is not None}

    def __getitem__(self, value: Value) -> Numbers:
        if value in self.formed and value not in self._numbers:
            self._numbers[value] = self.whole(self.formed[value](self))
        return self._numbers[value] if value in self.formed else self.meant(value)

    def __iter__(self) -> Iterator[Value]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def whole(self, array: Any) -> Any:
        """An array that depends on nothing as numbers of the same run."""
        return self._interpreter.whole(array)

    def meant(self, value: Value) -> Numbers:
        """What a value is in the plan: itself, or less its mean."""
        numbers = self._itself(value)
        axis = self._plan.less_mean.get(value)
        return numbers if axis is None else less_mean(numbers, axis)

    def _itself(self, wanted: Value) -> Numbers:
        """The numbers of a value, with those that it is made of; chains can be long."""
        waiting = [wanted]
        while waiting:
            value = waiting[-1]
            maker = self._maker(value)
            missing = [] if maker is None else [v for v in maker.values if v not in self._numbers]
            if value in self._numbers:
                waiting.pop()
            elif missing:
                waiting += missing
            elif maker is None:
                self._keep(value, self._draw(value), [])
            else:
                self._evaluate(maker)
        return self._numbers[wanted]

    def _maker(self, value: Value) -> Equation | None:
        """The equation that says what a value is made of; None where that is not looked at."""
        maker = self._makers.get(value)
        return maker if maker is not None and _says(self._plan, maker, value) else None

    def _evaluate(self, equation: Equation) -> None:
        made = dict(self._numbers)
        self._interpreter.compute([equation], made)
        for value in equation.outputs:
            if value is not None:
                self._keep(value, made[value], [self.scale[v] for v in equation.values])

    def _keep(self, value: Value, numbers: Numbers, read: list[Scale]) -> None:
        self._numbers[value] = numbers
        self.scale[value] = tuple(map(max, zip(size(numbers), *read, strict=True)))
