"""The plan of a network whose parameters are constant: what is kept of them, and what reads it."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set

from fcjax.expressions.terms import Expr, Unrepresentable
from fcjax.expressions.written import Written, written
from fcjax.merging import ahead, forming, loops
from fcjax.merging.forming import Formed, Kernel, Lowered
from fcjax.merging.kept import Kept, Merging
from fcjax.merging.normed import with_normed
from fcjax.merging.pointwise import axes_of_space
from fcjax.planning.plan import Plan, plan
from fcjax.planning.recipes import recipe
from fcjax.tracing.trace import Body, Equation, Kind, Value

__all__ = ["merging"]

PARAM = Kind("param", trainable=False)
RAW = Kind("param", trainable=False, invariant=False)
DATA = Kind("data", trainable=False, invariant=False)


def merging(body: Body, names: Sequence[str], raw: Set[int] = frozenset()) -> Merging:
    """Merges a network.

    Prices are those of an evaluation for which products of parameters are free. They grow with the
    number of rows alike, whichever way a segment is computed, so the choice does not depend on it.

    Args:
      body: the network; its first inputs are the parameters.
      names: the names of the parameters.
      raw: the numbers of parameters that are kept as they are.
    """
    arguments = len(body.inputs) - len(names)
    of_params = [RAW if i in raw else PARAM for i in range(len(names))]
    of_inputs = [*of_params, *itertools.repeat(DATA, arguments)]
    network = with_normed(written(body, of_inputs, math.inf, ahead.kinds))
    return _Merger(network, plan(network), names).run()


class _Merger:
    """Sweeps back from the outputs and keeps what is known ahead where it meets data."""

    def __init__(self, network: Written, planned: Plan, names: Sequence[str]) -> None:
        self.body = network.body
        self.known = network.known
        self.planned = planned
        self.lowered = dict(self._segments())
        self.inputs = self.body.inputs[: len(names)]
        self.identities = ahead.identities(self.body, dict(zip(self.inputs, names, strict=True)))
        self.sources = _sources(self.body, self.inputs)
        self.loops: list[loops.Loop] = []
        while copies := self._copies():
            del self.lowered[copies[0]]

    def run(self) -> Merging:
        """The merged network."""
        equations, needed = self._needed()
        formed = {f.value: f for low in self.lowered.values() for f in low.formed}
        values = [v for v in self.inputs if v in needed]
        made = itertools.chain.from_iterable(e.outputs for e in self.body.equations)
        inside = set(itertools.chain.from_iterable(e.outputs for e in equations))
        values += [v for v in made if v in needed and v not in inside and v not in self.lowered]
        values += [v for v in formed if v in needed]
        kept = [self._kept(v, formed.get(v)) for v in values]
        kept += [k for loop in self.loops for k in loops.with_sources(loop, self.sources)]
        constants = [(v, array) for v, array in self.body.constants if v in needed]
        constants += [c for loop in self.loops for c in loop.constants]
        arguments = self.body.inputs[len(self.inputs) :]
        body = Body(
            (*(k.value for k in kept), *arguments),
            tuple(constants),
            tuple(equations),
            self.body.outputs,
        )
        merged = dataclasses.replace(
            self.planned,
            body=body,
            recipes={v: low.recipe for v, low in self.lowered.items() if v in needed},
            nested={},
            changes=(),
            known={**self.known, **dict.fromkeys((k.value for k in kept), PARAM)},
        )
        return Merging(merged, tuple(kept), self.body)

    # --- which values are computed through effective weights ---

    def _segments(self) -> Iterator[tuple[Value, Lowered]]:
        makers = {v: e for e in self.body.equations for v in e.outputs if v is not None}
        for value, how in self.planned.recipes.items():
            if not ahead.is_ahead(value, self.known):
                operations = _written_operations(value, how.expr, makers, self.known)
                yield value, forming.lowered(how, axes_of_space(operations))
        for value, expr in self.planned.bases.items():
            if value in self.planned.recipes or not expr.has_data:
                continue
            low = _cheaper(expr, _written_operations(value, expr, makers, self.known))
            if low is not None:
                yield value, low

    def _copies(self) -> list[Value]:
        """Values whose effective weights stand beside the same weights in another form.

        Of a table that is also the head, say: the gain of a norm in front of the head is not worth
        a second table. None if there are fewer weights than before all the same.
        """
        _, needed = self._needed()
        self.loops.clear()
        formed = {f.value for low in self.lowered.values() for f in low.formed}
        kept = needed & {*self.inputs, *formed}
        if sum(_size(v) for v in kept) <= sum(_size(v) for v in self.inputs):
            return []
        made = {
            value: [self._of_inputs(f) for f in low.formed if f.value in needed]
            for value, low in self.lowered.items()
        }
        raw = {i for i, value in enumerate(self.inputs) if value in needed}
        held = Counter(raw)
        for sources in made.values():
            held.update(set[int]().union(*(copied for _, copied in sources)))
        return [
            value
            for value, sources in made.items()
            if any(own <= raw or any(held[i] > 1 for i in copied) for own, copied in sources)
        ]

    def _of_inputs(self, formed: Formed | Kernel) -> tuple[set[int], set[int]]:
        """The parameters of an effective weight, and the largest of them if it is as large."""
        sources = {i for v in formed.leaves for i in self.sources.get(v, ())}
        largest = max((_size(self.inputs[i]) for i in sources), default=0)
        as_large = largest <= _size(formed.value)
        return sources, {i for i in sources if _size(self.inputs[i]) == largest and as_large}

    # --- what is needed for the outputs ---

    def _needed(self) -> tuple[list[Equation], set[Value]]:
        """The equations that stay, and all values that are read."""
        needed = {a for a in self.body.outputs if isinstance(a, Value)}
        equations = []
        for equation in reversed(self.body.equations):
            made = [v for v in equation.outputs if v is not None and v in needed]
            if not made and not equation.source.effects:
                continue
            planned = [v for v in made if v in self.lowered]
            for value in planned:
                needed.update(self.lowered[value].recipe.expr.leaves)
            left = [v for v in made if v not in self.lowered]
            if (left or not made) and not self._is_kept(equation, left):
                for step in reversed(self._steps(equation)):
                    needed.update(step.values)
                    equations.append(step)
            elif planned:
                equations.append(equation)
        return equations[::-1], needed

    def _steps(self, equation: Equation) -> Sequence[Equation]:
        """What computes the results of an equation: a loop with a merged body, or itself."""
        if equation.name != "scan" or equation.source.effects:
            return [equation]
        loop = loops.merged_loop(equation, self.known, self.identities, merging)
        if loop is None:
            return [equation]
        self.loops.append(loop)
        return loop.equations

    def _is_kept(self, equation: Equation, made: Sequence[Value]) -> bool:
        """Whether results are kept, rather than computed in every call."""
        return bool(made) and all(
            self.known[v].of == "param"
            and ahead.is_ahead(v, self.known)
            and not ahead.is_look(equation)
            for v in made
        )

    # --- what is kept ---

    def _kept(self, value: Value, formed: Formed | Kernel | None) -> Kept:
        if formed is None:
            return Kept(value, self.identities[value], self.sources.get(value, ()), None)
        sources = sorted({i for v in formed.leaves for i in self.sources.get(v, ())})
        return Kept(value, formed.identity(self.identities), tuple(sources), formed)


def _cheaper(expr: Expr, written: Sequence[Equation]) -> Lowered | None:
    """A value that nothing changed, if effective weights save one of its operations on data."""
    try:
        low = forming.lowered(recipe(expr, math.inf), axes_of_space(written))
    except Unrepresentable:
        return None
    if not low.formed or any(f.centred for t in expr.terms for f in t.factors):
        return None  # nothing to form, or a mean that would be taken twice
    return low if forming.operations(low.recipe) < len(written) else None


def _size(value: Value) -> int:
    return math.prod(value.shape)


def _sources(body: Body, inputs: Sequence[Value]) -> dict[Value, tuple[int, ...]]:
    """The parameters that each value is made of."""
    found: dict[Value, tuple[int, ...]] = {v: (i,) for i, v in enumerate(inputs)}
    for equation in body.equations:
        joined = sorted({i for v in equation.values for i in found.get(v, ())})
        found |= {v: tuple(joined) for v in equation.outputs if v is not None}
    return found


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
