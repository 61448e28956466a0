"""What a merged network could compute otherwise than written, and what its outputs then need."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence, Set

from fcjax.expressions.written import Written
from fcjax.merging import ahead
from fcjax.merging.forming import Formed, Kernel, Lowered
from fcjax.merging.kept import Kept
from fcjax.merging.loops import Loop
from fcjax.tracing.trace import Equation, Value

__all__ = ["Dropped", "Network", "Sweep"]

Dropped = Set[Value | Equation]
"""What is computed in every call as it is written, of all that need not be."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """What is left of a network.

    Attributes:
      planned: the values that are computed through effective weights.
      equations: those that run in every call, loops with merged bodies in the place of others.
      readers: for every value that is read, who reads it: the value that is computed through
        effective weights, the equation as written, or None for the caller.
      loops: the loops whose bodies are merged.
    """

    planned: frozenset[Value]
    equations: tuple[Equation, ...]
    readers: Mapping[Value, Set[Hashable]]
    loops: Mapping[Equation, Loop]


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A network, and what could be known ahead of it.

    Attributes:
      written: the network as written.
      inputs: its parameters.
      copies: how often each of them is stored.
      identities: names of the values that are no data.
      sources: the identities of the parameters and constants that each value is made of.
      lowered: values that can be computed through effective weights.
      together: those that are worth it only together.
      merge: the merged form of a loop; None if there is nothing to form.
    """

    written: Written
    inputs: tuple[Value, ...]
    copies: Mapping[str, int]
    identities: Mapping[Value, str]
    sources: Mapping[Value, frozenset[str]]
    lowered: Mapping[Value, Lowered]
    together: tuple[frozenset[Value], ...]
    merge: Callable[[Equation], Loop | None]

    @functools.cached_property
    def formed(self) -> dict[Value, Formed | Kernel]:
        """What can be formed, by what it is called."""
        return {f.value: f for low in self.lowered.values() for f in low.formed}

    @functools.cached_property
    def makers(self) -> dict[Value, Equation]:
        """The equation that makes each value."""
        return {v: e for e in self.written.body.equations for v in e.outputs if v is not None}

    # --- what is kept ---

    def kept(self, sweep: Sweep) -> list[Kept]:
        """The arrays that are read, in the order of the body; those of loops last."""
        made = {v for e in sweep.equations for v in e.outputs}
        body = self.written.body
        values = [*self.inputs, *(v for e in body.equations for v in e.outputs if v is not None)]
        read = [v for v in values if v in sweep.readers and v not in made]
        read += [v for v in self.formed if v in sweep.readers]
        of_loops = (k for loop in sweep.loops.values() for k in loop.kept)
        return [*map(self.array, read), *of_loops]

    @functools.cache  # noqa: B019 (as long as the network)
    def array(self, value: Value) -> Kept:
        """What is known ahead, as an array that is kept."""
        formed = self.formed.get(value)
        if formed is None:
            return Kept(value, self.identities[value], self.sources[value], None)
        sources = frozenset[str]().union(*(self.sources.get(v, ()) for v in formed.leaves))
        return Kept(value, formed.identity(self.identities), sources, formed)

    def size(self, kept: Kept) -> int:
        """The bytes of an array."""
        copies = max((self.copies.get(name, 1) for name in kept.sources), default=1)
        return copies * math.prod(kept.value.shape) * kept.value.aval.dtype.itemsize

    def is_kept(self, value: Value, dropped: Dropped) -> bool:
        """Whether a value is kept if it is read, rather than computed in every call."""
        maker = self.makers.get(value)
        return value in self.inputs or (
            maker is not None and self._are_kept(maker, [value], dropped)
        )

    # --- what is needed for the outputs ---

    def as_written(self) -> Sweep:
        """The network with nothing known ahead."""
        everything: set[Value | Equation] = {*self.makers, *self.written.body.equations}
        return self.sweep(everything)

    def sweep(self, dropped: Dropped) -> Sweep:
        """Sweeps back from the outputs."""
        readers: dict[Value, set[Hashable]] = {}
        through: set[Value] = set()
        steps: list[Equation] = []
        loops: dict[Equation, Loop] = {}

        def read(values: Sequence[Value], reader: Hashable) -> None:
            for value in values:
                readers.setdefault(value, set()).add(reader)

        read([a for a in self.written.body.outputs if isinstance(a, Value)], None)
        for equation in reversed(self.written.body.equations):
            made = [v for v in equation.outputs if v is not None and v in readers]
            planned = [v for v in made if self._is_planned(v, dropped)]
            through.update(planned)
            for value in planned:
                read([*self.lowered[value].recipe.expr.leaves], value)
            left = [v for v in made if v not in planned]
            runs = (
                equation.source.effects if not made else not self._are_kept(equation, left, dropped)
            )
            if not runs or (made and not left):
                steps += [equation] if planned else []
                continue
            loop = None if equation in dropped else self.merge(equation)
            inside = (equation,) if loop is None else loop.equations
            for step in inside:
                read(step.values, equation)
            steps += reversed(inside)
            loops |= {} if loop is None else {equation: loop}
        return Sweep(frozenset(through), tuple(reversed(steps)), readers, loops)

    def _is_planned(self, value: Value, dropped: Dropped) -> bool:
        """Whether a value is computed through effective weights."""
        return value in self.lowered and value not in dropped

    def _are_kept(self, equation: Equation, made: Sequence[Value], dropped: Dropped) -> bool:
        """Whether results are kept, rather than computed in every call."""
        known = self.written.known
        ahead_of_calls = all(known[v].of == "param" and ahead.is_ahead(v, known) for v in made)
        return ahead_of_calls and not ahead.is_look(equation) and dropped.isdisjoint(made)
