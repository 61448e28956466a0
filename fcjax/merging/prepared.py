"""A network merged for the shapes of a call, so that other batch sizes read the same arrays."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fcjax.measure import flops
from fcjax.merging.kept import Kept, Merging
from fcjax.merging.planned import merging
from fcjax.running.program import Program
from fcjax.tracing import trace
from fcjax.tracing.calls import Call
from fcjax.tracing.trace import Body

__all__ = ["Compiled", "Settled", "Traced", "compiled", "resized", "settled"]

PyTree = Any
OTHER_SIZES = (1, 1024)
"""Batch sizes for which a merged network is prepared beside that of the example."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """A network, traced for the shapes of a call.

    Attributes:
      jaxpr: it, as jax traced it.
      structure: that of what it returns.
    """

    jaxpr: Any
    structure: Any

    @functools.cached_property
    def body(self) -> Body:
        """Its equations."""
        return trace.flatten(self.jaxpr, trace.INLINED | trace.REMAT)

    @property
    def is_empty(self) -> bool:
        """Whether an argument or a parameter has no entries, as for a batch of size 0."""
        return any(0 in value.shape for value in self.body.inputs)


class Compiled:
    """The merged network for one set of shapes, as a jitted function."""

    def __init__(self, found: Merging, structure: Any) -> None:
        self.merging = found
        self.constants = [array for _, array in found.plan.body.constants]
        self._structure = structure
        program = Program(found.plan)
        self._run = jax.jit(lambda inputs, constants: program(inputs, constants, {}))

    def other_than(self, first: "Compiled") -> list[Kept]:
        """What is kept here, but not there."""
        known = {k.identity for k in first.merging.kept}
        return [k for k in self.merging.kept if k.identity not in known]

    def flops(self, arrays: Sequence[Any]) -> float:
        """Floating-point operations of a call."""
        stored = [
            jax.ShapeDtypeStruct(k.value.shape, k.value.aval.dtype) for k in self.merging.kept
        ]
        return flops(self, stored, arrays)

    def __call__(self, stored: Sequence[Any], arrays: Sequence[Any]) -> PyTree:
        """What the network returns, given the arrays that are kept and the arguments."""
        shaped = [
            jnp.reshape(x, k.value.shape) for x, k in zip(stored, self.merging.kept, strict=True)
        ]
        outputs = self._run([*shaped, *arrays], self.constants)
        return jax.tree.unflatten(self._structure, outputs)


def compiled(
    traced: Traced, names: Sequence[str], raw: frozenset[str], first: Compiled | None = None
) -> Compiled:
    """Merges a network.

    Args:
      traced: the network.
      names: the names of its parameters.
      raw: the identities of what is kept as it is.
      first: the same network for other sizes, whose decisions are taken again.
    """
    decided = None if first is None else first.merging.planned
    return Compiled(merging(traced.body, names, raw, first=decided), traced.structure)


@dataclasses.dataclass(frozen=True)
class Settled:
    """A network merged for several sizes.

    Attributes:
      found: the merged network for each size.
      raw: the identities of parameters and constants that are kept as they are.
      first: the number of the size for which it was decided what is merged.
    """

    found: tuple[Compiled, ...]
    raw: frozenset[str]
    first: int


def settled(traced: Sequence[Traced], names: Sequence[str]) -> Settled:
    """The same network for several batch sizes, merged so that all read the same arrays.

    What one of them would multiply in another way is kept as it is.

    Args:
      traced: the network for each size.
      names: the names of its parameters.
    """
    raw = frozenset[str]()
    chosen = next((i for i, t in enumerate(traced) if not t.is_empty), 0)
    while True:
        first = compiled(traced[chosen], names, raw)
        found = tuple(
            first if i == chosen else compiled(t, names, raw, first) for i, t in enumerate(traced)
        )
        odd = raw.union(*(k.sources for c in found for k in c.other_than(first)))
        if odd == raw:
            return Settled(found, raw, chosen)
        raw = odd


def resized(call: Call) -> list[Call]:
    """A call with other batch sizes: that of its first argument of most axes, wherever it is."""
    batch = max((x.shape for x in call.arrays), key=len, default=())[:1]
    return [
        dataclasses.replace(
            call, arrays=tuple(_of_size(x, batch, size) for x in call.shapes.arrays)
        )
        for size in OTHER_SIZES
        if batch and batch != (size,)
    ]


def _of_size(array: Any, batch: tuple[int, ...], size: int) -> jax.ShapeDtypeStruct:
    return array.update(shape=(size, *array.shape[1:])) if array.shape[:1] == batch else array
