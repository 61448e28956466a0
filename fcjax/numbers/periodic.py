"""Arrays that repeat themselves, of which one period is kept.

Most axes of a network are uniform: what is done to one token or channel is done to all. On numbers
that repeat themselves along such an axis, a program gives numbers that do too, so one period of
each says everything: a sum over an axis of size N is that over a period, each entry counted as
often as it occurs. So a program is evaluated exactly, at its own sizes, for the price of a few
rows. Where something looks at positions along an axis (a slice, a convolution, a sort) the axis is
written out, and its *sources*, the axes of inputs that it varies with, are noted: numbers that are
to tell positions apart must not repeat themselves there.

Floats are kept in double precision, whatever dtype they have in the program; what rounds to a
narrower dtype is rounded. They may carry a derivative as an imaginary part, ``x + i h dx``, which
every analytic function passes on exactly (Squire and Trapp 1998, complex-step differentiation).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

__all__ = [
    "NOWHERE",
    "STEP",
    "Array",
    "Numbers",
    "Sources",
    "aligned",
    "as_numbers",
    "counts",
    "stored",
]

Array = np.ndarray[Any, Any]
Sources = frozenset[Hashable]
STEP = 1e-30
"""How small the imaginary part of a number is that carries a derivative of 1."""
NOWHERE: Sources = frozenset()


@dataclasses.dataclass(eq=False)
class Run:
    """What all numbers of one evaluation share.

    Attributes:
      looked_at: the sources of axes that something looks at by position.
      rounds: whether a cast to a narrower dtype rounds.
    """

    looked_at: set[Hashable] = dataclasses.field(default_factory=set)
    rounds: bool = True


class Numbers:
    """An array that repeats itself along its axes.

    Attributes:
      period: one period of it, of the array's rank; axis i of the array is ``period`` at the index
        modulo the period's size.
      shape: the shape of the whole array.
      dtype: the dtype that it has in the program.
      sources: for each axis the axes of inputs that it varies with.
      run: what it shares with all numbers of its evaluation.
    """

    __slots__ = ("dtype", "period", "run", "shape", "sources")
    __array_ufunc__ = None  # so that numpy leaves arithmetic to us

    def __init__(
        self,
        period: Array,
        shape: tuple[int, ...],
        dtype: Any,
        sources: tuple[Sources, ...],
        run: Run,
    ) -> None:
        self.period = period
        self.shape = shape
        self.dtype = dtype
        self.sources = sources
        self.run = run

    def __repr__(self) -> str:
        return f"Numbers({self.dtype}{list(self.shape)} by {list(self.period.shape)})"

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def like(
        self, period: Array, shape: tuple[int, ...], sources: tuple[Sources, ...], dtype: Any = None
    ) -> Numbers:
        """Other numbers of the same run."""
        return Numbers(period, shape, self.dtype if dtype is None else dtype, sources, self.run)

    def entrywise(self, period: Array, dtype: Any = None) -> Numbers:
        """What a function of each entry makes of it."""
        return self.like(period, self.shape, self.sources, dtype)

    def repeating(self, axis: int, size: int) -> Array:
        """The period with more of an axis, up to ``size`` entries of it; looks at no position."""
        have = self.period.shape[axis]
        if have == size:
            return self.period
        if have == 1:
            wide = (*self.period.shape[:axis], size, *self.period.shape[axis + 1 :])
            return np.broadcast_to(self.period, wide)
        return np.take(self.period, np.arange(size) % have, axis=axis)

    def written_out(self, axes: Iterable[int]) -> Numbers:
        """The same, with every position along some axes."""
        made = self
        for axis in axes:
            self.run.looked_at.update(self.sources[axis])
            if made.period.shape[axis] != made.shape[axis]:
                made = made.entrywise(made.repeating(axis, made.shape[axis]))
        return made

    def full(self) -> Array:
        """The whole array."""
        return self.written_out(range(self.ndim)).period

    # --- what arrays do by themselves; the operations stand on this module ----------------------

    @property
    def operations(self) -> Any:
        """The functions of ``jax.lax`` for numbers; see ``running.arrays``."""
        from fcjax.numbers import operations

        return operations

    def reshape(self, *shape: Any) -> Numbers:
        """Another shape, row-major; one size may be -1."""
        sizes = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if -1 in sizes:
            known = -math.prod(sizes)
            sizes[sizes.index(-1)] = math.prod(self.shape) // known if known else 0
        return self.operations.reshape(self, sizes)

    def transpose(self, permutation: Sequence[int]) -> Numbers:
        """The axes in another order."""
        return self.operations.transpose(self, permutation)

    def astype(self, dtype: Any) -> Numbers:
        """Another dtype, rounded to its numbers."""
        return self.operations.convert_element_type(self, dtype)

    def sum(self, axes: Sequence[int]) -> Numbers:
        """The sum over axes."""
        return self.operations.reduce_sum(self, axes)

    def mean(self, axes: Sequence[int], keepdims: bool = False) -> Numbers:
        """The mean over axes."""
        found = self.sum(axes) * (1 / math.prod(self.shape[i] for i in axes))
        kept = [1 if i in axes else n for i, n in enumerate(self.shape)]
        return found.reshape(kept) if keepdims else found

    def __add__(self, other: Any) -> Numbers:
        return self.operations.combined(np.add, [self, other])

    def __sub__(self, other: Any) -> Numbers:
        return self.operations.combined(np.subtract, [self, other])

    def __mul__(self, other: Any) -> Numbers:
        return self.operations.combined(np.multiply, [self, other])

    __radd__, __rmul__ = __add__, __mul__


def as_numbers(value: Any, like: Numbers) -> Numbers:
    """A constant as numbers of a run; numbers as they are."""
    if isinstance(value, Numbers):
        return value
    dtype = value.dtype if hasattr(value, "dtype") else like.dtype
    array = stored(np.asarray(value), dtype)
    return like.like(array, array.shape, (NOWHERE,) * array.ndim, dtype)


def stored(array: Array, dtype: Any) -> Array:
    """How numbers of a dtype are kept: floats in double precision."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return array.astype(np.complex128)
    return array.astype(np.float64) if jnp.issubdtype(dtype, jnp.floating) else np.asarray(array)


@functools.cache
def counts(size: int, period: int) -> Array:
    """How often each entry of a period occurs along an axis.

    Example:
      >>> counts(8, 3).tolist()
      [3.0, 3.0, 2.0]
    """
    return np.asarray([math.ceil((size - i) / period) for i in range(period)], float)


def aligned(
    arrays: Sequence[Numbers], apart: Sequence[int] = ()
) -> tuple[list[Array], tuple[int, ...], tuple[Sources, ...]]:
    """The periods of arrays of one shape, brought to periods that they share.

    Axes of size 1, and missing leading ones, are repeated as numpy does.

    Args:
      arrays: the arrays.
      apart: axes along which they may differ in size, which are left alone.

    Returns:
      the periods, the shape, and the sources of its axes.
    """
    rank = max(x.ndim for x in arrays)
    arrays = [_of_rank(x, rank) for x in arrays]
    sizes = list(zip(*(x.shape for x in arrays), strict=True))
    shape = tuple(0 if 0 in own else max(own) for own in sizes)
    sources = tuple(
        frozenset().union(*own) for own in zip(*(x.sources for x in arrays), strict=True)
    )
    for axis, size in enumerate(shape):
        different = {x.period.shape[axis] for x in arrays} - {1}
        if len(different) > 1 and axis not in apart:
            common = min(math.lcm(*different), size)
            arrays = [
                x if x.period.shape[axis] == 1 else x.entrywise(x.repeating(axis, common))
                for x in arrays
            ]
    return [x.period for x in arrays], shape, sources


def _of_rank(x: Numbers, rank: int) -> Numbers:
    missing = rank - x.ndim
    if not missing:
        return x
    ones = (1,) * missing
    period = x.period.reshape(ones + x.period.shape)
    return x.like(period, ones + x.shape, (NOWHERE,) * missing + x.sources)
