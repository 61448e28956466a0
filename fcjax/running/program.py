"""A plan as a list of steps, and how they run."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax import Array, lax

from fcjax import compat
from fcjax.planning.parts import MeanSquare, Recipe
from fcjax.planning.plan import Plan
from fcjax.running.evaluate import SQUARE, evaluate, mean_squares, squares_key
from fcjax.running.weights import Formed, form, formed_leaves
from fcjax.tracing.trace import Equation, Value

__all__ = ["Program"]

Env = dict[Value, Any]


@dataclasses.dataclass(frozen=True)
class Segment:
    """A step that computes one value by a recipe."""

    value: Value
    recipe: Recipe


@dataclasses.dataclass(frozen=True)
class Nested:
    """A step whose equation has bodies that are computed by programs of their own."""

    equation: Equation
    programs: tuple["Program", ...]


Step = Equation | Segment | Nested


class Program:
    """Computes the outputs of a body as its plan says, and nothing that they do not need."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        outputs = [a for a in plan.body.outputs if isinstance(a, Value)]
        self.steps = self._steps(outputs, effects=True)
        self.squares = self._squares()

    def __call__(
        self, inputs: Sequence[Any], constants: Sequence[Any], formed: dict[Value, Formed]
    ) -> list[Any]:
        """Runs the steps.

        Args:
          inputs: one array for each input of the body.
          constants: one for each constant of the body.
          formed: what ``prologue`` returned, or nothing.
        """
        env = self._run(self.steps, inputs, constants, formed)
        return [env[a] if isinstance(a, Value) else a.val for a in self.plan.body.outputs]

    def computed(self, value: Value, env: Mapping[Value, Any], *, ahead: bool = False) -> Any:
        """One of the values with a recipe, as the steps compute it.

        Args:
          value: the value.
          env: the arrays of all other values.
          ahead: whether what is the same in every run of the body is formed before it.
        """
        recipe = self.plan.recipes[value]
        formed = {value: form(recipe, env)} if ahead else {}
        first = next((k for k, g in self.squares.items() if value in dict(g)), value)
        formed = self._with_squares(first, env, formed)
        return evaluate(recipe, env, formed.get(value, {}))

    def prologue(self, inputs: Sequence[Any], constants: Sequence[Any]) -> dict[Value, Formed]:
        """The effective weights that are the same in every run of the body."""
        segments = [step for step in self.steps if isinstance(step, Segment)]
        needed = {leaf for segment in segments for leaf in formed_leaves(segment.recipe)}
        steps = self._steps(needed, effects=False)
        env = self._run(steps, inputs, constants, {})
        return {segment.value: form(segment.recipe, env) for segment in segments}

    def _steps(self, wanted: Iterable[Any], *, effects: bool) -> tuple[Step, ...]:
        """The steps that the wanted values need, by a backward sweep."""
        needed = set(wanted)
        steps: list[Step] = []
        numbered = list(enumerate(self.plan.body.equations))
        for i, equation in reversed(numbered):
            made = [v for v in equation.outputs if v is not None and v in needed]
            if not made and not (effects and equation.source.effects):
                continue
            planned = [v for v in made if v in self.plan.recipes]
            steps += [Segment(v, self.plan.recipes[v]) for v in planned]
            for value in planned:
                needed.update(self.plan.recipes[value].expr.leaves)
            if len(planned) < len(made) or not made:
                steps.append(self._step(i, equation))
                needed.update(equation.values)
        return tuple(reversed(steps))

    def _squares(self) -> dict[Value, list[tuple[Value, int]]]:
        """Mean squares of the same rows, under the segment that comes first: one set of moments.

        Only those whose weights are made of inputs of the body, which exist from the start.
        """
        present = {*self.plan.body.inputs, *(v for v, _ in self.plan.body.constants)}
        groups: dict[Any, list[tuple[Value, int]]] = {}
        for step in (s for s in self.steps if isinstance(s, Segment)):
            for i, part in enumerate(step.recipe.parts):
                if isinstance(part, MeanSquare) and present.issuperset(
                    f.leaf.var for f in part.weight.term.factors
                ):
                    groups.setdefault(squares_key(part), []).append((step.value, i))
        return {group[0][0]: group for group in groups.values() if len(group) > 1}

    def _with_squares(
        self, value: Value, env: Mapping[Value, Any], formed: dict[Value, Formed]
    ) -> dict[Value, Formed]:
        group = self.squares.get(value, [])
        found = mean_squares([(self.plan.recipes[v], i) for v, i in group], env) if group else []
        for (v, i), square in zip(group, found, strict=True):
            formed = {**formed, v: {**formed.get(v, {}), (SQUARE, i): square}}
        return formed

    def _step(self, i: int, equation: Equation) -> Step:
        plans = self.plan.nested.get(i, ())
        if all(p.is_trivial for p in plans):
            return equation
        return Nested(equation, tuple(Program(p) for p in plans))

    def _run(
        self,
        steps: Sequence[Step],
        inputs: Sequence[Any],
        constants: Sequence[Any],
        formed: dict[Value, Formed],
    ) -> Env:
        env: Env = dict(zip(self.plan.body.inputs, inputs, strict=True))
        env |= {v: c for (v, _), c in zip(self.plan.body.constants, constants, strict=True)}
        for step in steps:
            if isinstance(step, Segment):
                formed = self._with_squares(step.value, env, formed)
                env[step.value] = evaluate(step.recipe, env, formed.get(step.value, {}))
                continue
            equation = step.equation if isinstance(step, Nested) else step
            values = [env[a] if isinstance(a, Value) else a.val for a in equation.inputs]
            if isinstance(step, Nested):
                results = NESTED[equation.name](step, values)
            else:
                results = compat.bind(equation.source, values)
            for value, result in zip(equation.outputs, results, strict=True):
                if value is not None and value not in self.plan.recipes:
                    env[value] = result
        return env


# --- steps with bodies --------------------------------------------------------------------------


def _body_constants(program: Program) -> list[Any]:
    return [array for _, array in program.plan.body.constants]


def _run_scan(step: Nested, values: Sequence[Any]) -> list[Array]:
    """A loop whose constant weights are multiplied before it starts.

    Their cotangents are then accumulated by the loop and expanded to the factors after it.
    """
    (program,) = step.programs
    params = step.equation.source.params
    num_consts, num_carry = compat.scan_layout(params)
    constants = _body_constants(program)
    consts, init = values[:num_consts], values[num_consts : num_consts + num_carry]
    xs = values[num_consts + num_carry :]
    unread = [None] * (len(init) + len(xs))  # the prologue reads nothing that changes
    formed = program.prologue([*consts, *unread], constants)

    def body(carry: Sequence[Array], x: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        outputs = program([*consts, *carry, *x], constants, formed)
        return outputs[:num_carry], outputs[num_carry:]

    carry, ys = lax.scan(
        body, list(init), list(xs), params["length"], params["reverse"], params["unroll"]
    )
    return [*carry, *ys]


def _run_remat(step: Nested, values: Sequence[Any]) -> list[Array]:
    """A rematerialised body; its effective weights are formed outside, so formed once."""
    (program,) = step.programs
    params = step.equation.source.params
    constants = _body_constants(program)
    formed = program.prologue(values, constants)
    run = functools.partial(program, constants=constants, formed=formed)
    again = jax.checkpoint(
        lambda *xs: run(xs), prevent_cse=params["prevent_cse"], policy=params["policy"]
    )
    return list(again(*values))


def _run_cond(step: Nested, values: Sequence[Any]) -> list[Array]:
    """Only the branch that is taken forms its weights."""
    branches = [
        lambda *xs, program=program: program(xs, _body_constants(program), {})
        for program in step.programs
    ]
    return list(lax.switch(values[0], branches, *values[1:]))


NESTED = {"scan": _run_scan, "remat2": _run_remat, "checkpoint": _run_remat, "cond": _run_cond}
