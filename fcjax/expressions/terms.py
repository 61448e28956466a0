"""Values as sums of einsum terms over leaves, with labelled axes.

An expression says what a value *is* in terms of arrays that exist already (its leaves):

    ``y[n, k] = sum_e  x[n, e] A[e, k]  +  b[k]``      two terms, labels n, k free and e bound.

Axes carry labels, so nobody has to say which axis is the batch: an axis is a tuple of labels
(merged axes concatenate theirs, a split axis refines its label), a label that no axis of the
value carries is summed, and a label that a term lacks is broadcast. Every operation here is exact
algebra; what cannot be represented raises :class:`Unrepresentable` and becomes a boundary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jax import lax

from fcjax.expressions import windows

__all__ = [
    "Axis",
    "Dims",
    "Expr",
    "Factor",
    "Label",
    "Leaf",
    "Renaming",
    "Term",
    "Unrepresentable",
    "Window",
    "apart",
    "fresh_dims",
    "of_leaf",
    "refreshed",
    "rename_dims",
    "strides",
]


class Unrepresentable(Exception):  # noqa: N818 (an answer of a rule, not a failure)
    """An operation whose result is no sum of einsum terms of data degree at most two."""


@dataclasses.dataclass(frozen=True, eq=False)
class Label:
    """One index variable; two labels are the same only if they are the same object.

    Attributes:
      size: the number of values it takes; never 1 (an axis of size 1 is the empty tuple).
    """

    size: int


Axis = tuple[Label, ...]
Dims = tuple[Axis, ...]
Renaming = Mapping[Label, Axis]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array that is computed elsewhere.

    Attributes:
      var: what identifies it: the value that it is (``tracing.trace.Value``).
      kind: ``"param"`` if it depends on parameters alone, ``"const"`` if on nothing, or ``"data"``.
      shape: its shape.
      dtype: its dtype.
      trainable: whether a gradient flows to it.
      invariant: whether it stays the same between two runs of the body it is used in.
    """

    var: Any
    kind: Literal["param", "data", "const"]
    shape: tuple[int, ...]
    dtype: Any
    trainable: bool
    invariant: bool = True

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Factor:
    """A leaf seen through a view: slice each axis, reshape, subtract means.

    Attributes:
      leaf: the array.
      axes: for each axis of the leaf, the labels it is split into, outermost first.
      slices: for each axis ``(start, limit, stride)`` or None for all of it; applied first. Those
        that begin before an axis or end behind it go round it.
      centred: labels over which the mean of the view is subtracted from it.
    """

    leaf: Leaf
    axes: Dims
    slices: tuple[tuple[int, int, int] | None, ...]
    centred: frozenset[Label] = frozenset()

    @functools.cached_property
    def labels(self) -> frozenset[Label]:
        """The labels of all its axes."""
        return frozenset(itertools.chain.from_iterable(self.axes))

    @property
    def is_data(self) -> bool:
        """Whether the leaf depends on data."""
        return self.leaf.kind == "data"

    def rename(self, renaming: Renaming) -> Factor:
        """Replaces labels by the labels they are split into."""
        if self.labels.isdisjoint(renaming):
            return self
        axes = rename_dims(self.axes, renaming)
        centred = frozenset(p for label in self.centred for p in renaming.get(label, (label,)))
        return dataclasses.replace(self, axes=axes, centred=centred)


@dataclasses.dataclass(frozen=True)
class Window:
    """An affine relation of indices, ``sum(by * label) + offset == 0``, as a 0/1 factor.

    A convolution has ``spread * read = stride * out + dilation * tap - low``; padding, and joining
    along an axis, ``out = read + low``. See :mod:`fcjax.expressions.windows`.

    Attributes:
      steps: the labels, each with what its index is multiplied by.
      offset: the constant.
    """

    steps: tuple[tuple[Label, int], ...]
    offset: int = 0

    @functools.cached_property
    def labels(self) -> frozenset[Label]:
        """The labels it relates."""
        return frozenset(label for label, _ in self.steps)

    def by(self, label: Label) -> int:
        """What the index of ``label`` is multiplied by."""
        return dict(self.steps)[label]

    def rest(self, *labels: Label) -> windows.Integers:
        """What the relation without these labels can be."""
        steps = [(x.size, by) for x, by in self.steps if x not in labels]
        return windows.values(steps, self.offset)

    def where(self, label: Label, start: int, step: int, new: Axis) -> Window:
        """The relation with ``start + step * new`` for the index of ``label``."""
        by = self.by(label)
        steps = tuple(
            pair
            for x, b in self.steps
            for pair in ([(x, b)] if x is not label else [(n, b * step) for n in new])
        )
        return Window(steps, self.offset + by * start)

    def rename(self, renaming: Renaming) -> Window:
        """Replaces labels, each by those that its index is made of: ``r * i + u`` for (i, u)."""
        steps = tuple(
            (x, by * stride)
            for label, by in self.steps
            for x, stride in strides(renaming.get(label, (label,)))
        )
        return dataclasses.replace(self, steps=steps)


@dataclasses.dataclass(frozen=True)
class Term:
    """``scale`` times the product of ``factors`` and ``windows``, summed over bound labels."""

    scale: float
    factors: tuple[Factor, ...]
    windows: tuple[Window, ...] = ()

    @functools.cached_property
    def labels(self) -> frozenset[Label]:
        """The labels of all its factors and windows."""
        seen = [f.labels for f in self.factors] + [w.labels for w in self.windows]
        return frozenset().union(*seen)

    @property
    def degree(self) -> int:
        """The number of data factors."""
        return sum(f.is_data for f in self.factors)

    def rename(self, renaming: Renaming) -> Term:
        """Replaces labels by the labels they are split into."""
        if self.labels.isdisjoint(renaming):
            return self
        return Term(
            self.scale,
            tuple(f.rename(renaming) for f in self.factors),
            tuple(w.rename(renaming) for w in self.windows),
        )


@dataclasses.dataclass(frozen=True)
class Expr:
    """A value: the sum of ``terms`` over the free labels in ``dims``.

    Attributes:
      dims: for each axis of the value its labels, outermost first; ``()`` is an axis of size 1.
      terms: the summands; no term means zero.
      dtype: the dtype of the value.
      precision: the highest precision asked of any product in it.
    """

    dims: Dims
    terms: tuple[Term, ...]
    dtype: Any
    precision: lax.Precision | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of every axis."""
        return tuple(math.prod(label.size for label in axis) for axis in self.dims)

    @functools.cached_property
    def free(self) -> frozenset[Label]:
        """The labels that are not summed."""
        return frozenset(itertools.chain.from_iterable(self.dims))

    @functools.cached_property
    def labels(self) -> frozenset[Label]:
        """All its labels, free or summed."""
        return self.free.union(*(term.labels for term in self.terms))

    @functools.cached_property
    def leaves(self) -> dict[Any, Leaf]:
        """The arrays it is made of, by what identifies them."""
        return {f.leaf.var: f.leaf for term in self.terms for f in term.factors}

    @functools.cached_property
    def has_data(self) -> bool:
        """Whether it depends on data."""
        return any(f.is_data for term in self.terms for f in term.factors)

    def rename(self, renaming: Renaming) -> Expr:
        """Replaces labels by the labels they are split into."""
        if not renaming:
            return self
        split = {label for label, new in renaming.items() if len(new) != 1}
        if any(not w.labels.isdisjoint(split) for term in self.terms for w in term.windows):
            raise Unrepresentable("a windowed axis cannot be split")
        terms = tuple(term.rename(renaming) for term in self.terms)
        return dataclasses.replace(self, dims=rename_dims(self.dims, renaming), terms=terms)


def strides(axis: Axis) -> list[tuple[Label, int]]:
    """The labels of an axis, each with what its index adds to that of the axis.

    Example:
      >>> from fcjax.expressions.terms import Label, strides
      >>> [by for _, by in strides((Label(5), Label(3), Label(2)))]
      [6, 2, 1]
    """
    inner = [math.prod(x.size for x in axis[i + 1 :]) for i in range(len(axis))]
    return list(zip(axis, inner, strict=True))


def rename_dims(dims: Dims, renaming: Renaming) -> Dims:
    """Replaces labels by the labels they are split into."""
    return tuple(
        tuple(part for label in axis for part in renaming.get(label, (label,))) for axis in dims
    )


# --- construction -------------------------------------------------------------------------------


def of_leaf(leaf: Leaf) -> Expr:
    """The expression that is just ``leaf``, with fresh labels."""
    dims = fresh_dims(leaf.shape)
    return Expr(dims, (Term(1.0, (Factor(leaf, dims, (None,) * len(dims)),)),), leaf.dtype)


def fresh_dims(shape: Sequence[int]) -> Dims:
    """One new label for every axis that is not of size 1."""
    return tuple((Label(size),) if size != 1 else () for size in shape)


def refreshed(expr: Expr) -> Expr:
    """The same expression with new labels throughout."""
    return expr.rename({label: (Label(label.size),) for label in expr.labels})


def apart(expr: Expr, other: Expr) -> Expr:
    """``expr``, with new labels if it shares any with ``other``."""
    return expr if expr.labels.isdisjoint(other.labels) else refreshed(expr)
