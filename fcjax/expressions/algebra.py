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
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jax import lax

from fcjax.expressions import windows

__all__ = [
    "Expr",
    "Factor",
    "Label",
    "Leaf",
    "Term",
    "Unrepresentable",
    "Window",
    "add",
    "at_least",
    "broadcast",
    "cast",
    "concatenate",
    "contract",
    "deviation",
    "multiply",
    "of_leaf",
    "recentre",
    "reduce_sum",
    "reshape",
    "resolved",
    "scale",
    "slice_axis",
    "substitute",
    "term_key",
    "transpose",
    "unfold",
]

MAX_TERMS = 18
"""Expressions longer than this are cut: their value is computed and becomes a leaf."""
MAX_FACTORS = 16
"""Terms with more factors than this are cut likewise."""
MAX_TIES = 720
"""Orderings of interchangeable factors tried for a canonical key before giving up on merging."""


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
      slices: for each axis ``(start, limit, stride)`` or None for all of it; applied first.
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
        axes = _rename_dims(self.axes, renaming)
        centred = frozenset(p for label in self.centred for p in renaming.get(label, (label,)))
        return dataclasses.replace(self, axes=axes, centred=centred)


@dataclasses.dataclass(frozen=True)
class Window:
    """An affine relation of indices, ``sum(by * label) + offset == 0``, as a 0/1 factor.

    A convolution has ``spread * read = stride * out + dilation * tap - low``; padding, and joining
    along an axis, ``out = read + low``. See :mod:`fcjax.windows`.

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
        """Replaces labels one for one."""
        if any(len(renaming.get(label, (label,))) != 1 for label in self.labels):
            raise Unrepresentable("a windowed axis cannot be split")
        steps = tuple((renaming.get(label, (label,))[0], by) for label, by in self.steps)
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
        terms = tuple(term.rename(renaming) for term in self.terms)
        return dataclasses.replace(self, dims=_rename_dims(self.dims, renaming), terms=terms)


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


# --- sums and scalings --------------------------------------------------------------------------


def scale(expr: Expr, by: float) -> Expr:
    """``by * expr`` for a known number."""
    terms = tuple(dataclasses.replace(term, scale=term.scale * by) for term in expr.terms)
    return dataclasses.replace(expr, terms=terms)


def add(a: Expr, b: Expr) -> Expr:
    """``a + b`` for equal shapes; like terms are added up and deviations from a mean found."""
    a, b = _aligned(a, apart(b, a))
    return recentre(_with_terms(a, a.terms + b.terms, b))


def _with_terms(expr: Expr, terms: Iterable[Term], *others: Expr) -> Expr:
    """``expr`` with other terms, checked for size, merged, and at the highest precision of all."""
    merged = _merge_like(tuple(terms), expr.free)
    if len(merged) > MAX_TERMS or any(len(t.factors) > MAX_FACTORS for t in merged):
        raise Unrepresentable("the expression grows too long")
    precision = max((e.precision for e in (expr, *others)), key=_precision_rank)
    return dataclasses.replace(expr, terms=merged, precision=precision)


def at_least(expr: Expr, precision: lax.Precision | None) -> Expr:
    """``expr`` with its products at ``precision`` or higher."""
    return dataclasses.replace(expr, precision=max(expr.precision, precision, key=_precision_rank))


def _precision_rank(precision: lax.Precision | None) -> int:
    return -1 if precision is None else int(precision.value)


def _merge_like(terms: tuple[Term, ...], free: frozenset[Label]) -> tuple[Term, ...]:
    """Adds up the scales of terms that are the same but for the names of bound labels."""
    if len(terms) < 2:
        return terms
    merged: dict[Hashable, Term] = {}
    for term in terms:
        key = term_key(term, free)
        if key in merged:
            term = dataclasses.replace(term, scale=term.scale + merged[key].scale)
        merged[key] = term
    return tuple(term for term in merged.values() if term.scale != 0.0)


# --- canonical keys -----------------------------------------------------------------------------


def term_key(term: Term, free: frozenset[Label]) -> Hashable:
    """A key equal for two terms exactly if they agree up to scale and names of bound labels.

    Bound labels are numbered in order of first appearance, over every order of the factors that
    share leaf and view, and the least key wins; with too many such orders the term is only equal
    to itself, which costs a merge but is never wrong.

    Args:
      term: the term.
      free: labels that keep their identity.
    """
    groups: dict[Any, list[Factor]] = {}
    for factor in term.factors:
        groups.setdefault(_shape_key(factor), []).append(factor)
    ordered = [groups[key] for key in sorted(groups, key=repr)]
    if math.prod(math.factorial(len(group)) for group in ordered) > MAX_TIES:
        return id(term)
    orders = itertools.product(*(itertools.permutations(group) for group in ordered))
    keys = [_numbered(list(itertools.chain(*order)), term.windows, free) for order in orders]
    return min(keys, key=repr) if len(keys) > 1 else keys[0]


def _shape_key(factor: Factor) -> tuple[Any, ...]:
    sizes = tuple(tuple(label.size for label in axis) for axis in factor.axes)
    return (id(factor.leaf.var), factor.slices, sizes, len(factor.centred))


def _numbered(
    factors: Sequence[Factor],
    windows: Sequence[Window],
    free: frozenset[Label],
) -> Hashable:
    numbers: dict[Label, Hashable] = {}

    def number(label: Label) -> Hashable:
        if label in free:
            return ("free", id(label))
        return numbers.setdefault(label, len(numbers))

    factor_keys = tuple(
        (
            id(factor.leaf.var),
            factor.slices,
            tuple(tuple((number(label), label.size) for label in axis) for axis in factor.axes),
            tuple(sorted((number(label) for label in factor.centred), key=repr)),
        )
        for factor in factors
    )
    window_keys = tuple(
        (tuple((number(label), label.size, by) for label, by in w.steps), w.offset) for w in windows
    )
    return factor_keys, window_keys


# --- layout: refine, align, reshape -------------------------------------------------------------


def _rename_dims(dims: Dims, renaming: Renaming) -> Dims:
    return tuple(
        tuple(part for label in axis for part in renaming.get(label, (label,))) for axis in dims
    )


def _refine(a: Axis, b: Axis) -> tuple[dict[Label, Axis], dict[Label, Axis]]:
    """Splits two axes of one size into common labels, outermost first."""
    parts_a: dict[Label, list[Label]] = {label: [] for label in a}
    parts_b: dict[Label, list[Label]] = {label: [] for label in b}
    left_a, left_b = [(x, x.size) for x in reversed(a)], [(x, x.size) for x in reversed(b)]
    while left_a and left_b:
        (label_a, rest_a), (label_b, rest_b) = left_a.pop(), left_b.pop()
        size = min(rest_a, rest_b)
        if rest_a % size or rest_b % size:
            raise Unrepresentable("two axes split at places that have no common refinement")
        # a label that is not split keeps its name, those of ``a`` first
        whole = [x for x in (label_a, label_b) if x.size == size]
        common = whole[0] if whole else Label(size)
        parts_a[label_a].append(common)
        parts_b[label_b].append(common)
        if rest_a > size:
            left_a.append((label_a, rest_a // size))
        if rest_b > size:
            left_b.append((label_b, rest_b // size))
    if left_a or left_b:
        raise Unrepresentable("two axes differ in size")
    return _changes(parts_a), _changes(parts_b)


def _changes(parts: dict[Label, list[Label]]) -> dict[Label, Axis]:
    return {label: tuple(new) for label, new in parts.items() if new != [label]}


def _aligned_axes(
    a: Expr, b: Expr, axes_a: Sequence[int], axes_b: Sequence[int]
) -> tuple[Expr, Expr]:
    """Gives the listed axes of ``a`` and ``b`` the same labels."""
    for axis_a, axis_b in zip(axes_a, axes_b, strict=True):
        rename_a, rename_b = _refine(a.dims[axis_a], b.dims[axis_b])
        a, b = a.rename(rename_a), b.rename(rename_b)
    return a, b


def _aligned(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    if a.shape != b.shape:
        raise Unrepresentable(f"shapes {a.shape} and {b.shape} differ")
    axes = range(len(a.dims))
    return _aligned_axes(a, b, axes, axes)


def reshape(expr: Expr, shape: Sequence[int]) -> Expr:
    """A row-major reshape: axes merge freely and split where the labels allow it."""
    wanted = fresh_dims(shape)
    flat = tuple(itertools.chain.from_iterable(expr.dims))
    rename, rename_wanted = _refine(flat, tuple(itertools.chain.from_iterable(wanted)))
    return dataclasses.replace(expr.rename(rename), dims=_rename_dims(wanted, rename_wanted))


def transpose(expr: Expr, permutation: Sequence[int]) -> Expr:
    """Reorders the axes."""
    return dataclasses.replace(expr, dims=tuple(expr.dims[i] for i in permutation))


def broadcast(expr: Expr, shape: Sequence[int], positions: Sequence[int]) -> Expr:
    """Puts axis i of ``expr`` at ``positions[i]`` of ``shape``; other axes are repeated."""
    dims = list(fresh_dims(shape))
    for axis, position in zip(expr.dims, positions, strict=True):
        if axis or shape[position] == 1:
            dims[position] = axis
    return dataclasses.replace(expr, dims=tuple(dims))


def cast(expr: Expr, dtype: Any) -> Expr:
    """A change of float dtype of something that depends on no data; otherwise a boundary.

    The policy for mixed precision: products of weights are formed in the dtype the weights are
    stored in and rounded once, where they meet the data.
    """
    if np.dtype(dtype) == np.dtype(expr.dtype):
        return expr
    floats = all(
        np.issubdtype(np.dtype(d), np.floating) or np.dtype(d).name == "bfloat16"
        for d in (dtype, expr.dtype)
    )
    if expr.has_data or not floats:
        raise Unrepresentable("a cast of data rounds, so it stays where it is")
    return dataclasses.replace(expr, dtype=np.dtype(dtype))


# --- slices and concatenation -------------------------------------------------------------------


def slice_axis(expr: Expr, axis: int, start: int, limit: int, stride: int = 1) -> Expr:
    """``expr[..., start:limit:stride, ...]``, pushed down to the leaves."""
    if (start, limit, stride) == (0, expr.shape[axis], 1):
        return expr
    if len(expr.dims[axis]) != 1:
        raise Unrepresentable("a slice of a merged axis")
    (label,) = expr.dims[axis]
    size = len(range(start, limit, stride))
    new: Axis = (Label(size),) if size != 1 else ()
    dims = tuple(new if i == axis else dim for i, dim in enumerate(expr.dims))
    free = frozenset(itertools.chain.from_iterable(dims))
    view = (start, limit, stride)
    terms = tuple(resolved(_slice_term(term, label, new, view), free) for term in expr.terms)
    return dataclasses.replace(expr, dims=dims, terms=terms)


def _slice_term(term: Term, label: Label, new: Axis, view: tuple[int, int, int]) -> Term:
    start, _, stride = view
    windowed = tuple(
        w.where(label, start, stride, new) if label in w.labels else w for w in term.windows
    )
    factors = tuple(_slice_factor(f, label, new, view) for f in term.factors)
    return Term(term.scale, factors, windowed)


def _slice_factor(factor: Factor, label: Label, new: Axis, view: tuple[int, int, int]) -> Factor:
    if label not in factor.labels:
        return factor
    if label in factor.centred or any(label in axis and axis != (label,) for axis in factor.axes):
        raise Unrepresentable("a slice across a split or centred axis")
    slices = tuple(
        _compose_slices(old, view) if axis == (label,) else old
        for axis, old in zip(factor.axes, factor.slices, strict=True)
    )
    axes = tuple(new if axis == (label,) else axis for axis in factor.axes)
    return dataclasses.replace(factor, axes=axes, slices=slices)


def _compose_slices(
    first: tuple[int, int, int] | None, second: tuple[int, int, int]
) -> tuple[int, int, int]:
    if first is None:
        return second
    start, _, stride = first
    begin, limit, step = second
    last = start + (limit - 1) * stride
    return (start + begin * stride, last + 1, stride * step)


def concatenate(parts: Sequence[Expr], axis: int) -> Expr:
    """Joins along ``axis``: each part carries a window that puts it at its offset."""
    parts = [refreshed(part) for part in parts]
    others = [i for i in range(len(parts[0].dims)) if i != axis]
    for _ in range(2):  # a later part may refine an axis that earlier ones had whole
        for i in range(1, len(parts)):
            parts[0], parts[i] = _aligned_axes(parts[0], parts[i], others, others)
    if any(len(part.dims[axis]) != 1 for part in parts):
        raise Unrepresentable("a concatenation of merged axes or of single rows")
    outer = Label(sum(part.shape[axis] for part in parts))
    terms: list[Term] = []
    offset = 0
    for part in parts:
        (inner,) = part.dims[axis]
        window = Window(((outer, 1), (inner, -1)), -offset)
        terms += [dataclasses.replace(t, windows=(*t.windows, window)) for t in part.terms]
        offset += inner.size
    dims = tuple((outer,) if i == axis else dim for i, dim in enumerate(parts[0].dims))
    return _with_terms(dataclasses.replace(parts[0], dims=dims), terms, *parts)


def unfold(
    expr: Expr, axis: int, out: int, taps: int, *, spread: int = 1, stride: int = 1,
    dilation: int = 1, offset: int = 0,
) -> Expr:  # fmt: skip
    """What a window sees: ``result[..., o, ..., k] = expr[..., i, ...]``, zero where there is no i.

    With ``spread * i = stride * o + dilation * k + offset``; the axis of ``k`` comes last.
    """
    if (out, taps, spread, stride, offset) == (expr.shape[axis], 1, 1, 1, 0):
        return dataclasses.replace(expr, dims=(*expr.dims, ()))
    places, tap = fresh_dims((out, taps))
    free = frozenset((*itertools.chain.from_iterable(expr.dims), *places, *tap))
    dims = (*(places if i == axis else dim for i, dim in enumerate(expr.dims)), tap)
    read = expr.dims[axis]
    if len(read) != 1:
        raise Unrepresentable("a window over a merged axis or one of size 1")
    steps = [(read, spread), (places, -stride), (tap, -dilation)]
    window = Window(tuple((x, by) for labels, by in steps for x in labels), -offset)
    terms = [
        resolved(dataclasses.replace(t, windows=(*t.windows, window)), free - {*read})
        for t in expr.terms
    ]
    return _with_terms(dataclasses.replace(expr, dims=dims), terms)


def resolved(term: Term, free: frozenset[Label]) -> Term:
    """Sums over the labels that windows determine.

    What stays is a window whose value is zero outside of what it reads, and taps of kernels.
    """
    for step in (_located, _cut, _met):
        for window in term.windows:
            for label, _ in window.steps:
                new = step(term, window, label, free)
                if new is not None:
                    return resolved(new, free)
    return term


def _view(window: Window, label: Label) -> tuple[int, int, Axis] | None:
    """``(start, step, other)`` if a window makes ``label`` a slice that ``other`` runs through."""
    others = [x for x in window.labels if x is not label]
    if len(others) > 1:
        return None
    other, count = (window.by(others[0]), others[0].size) if others else (-window.by(label), 1)
    found = windows.as_view(window.by(label), label.size, other, count, window.offset)
    return None if found is None else (*found, tuple(others))


def _located(term: Term, window: Window, label: Label, free: frozenset[Label]) -> Term | None:
    """Reads what a summed label stands on at the one place that its window leaves of it."""
    found = None if label in free else _view(window, label)
    if found is None:
        return None
    _, _, new = found
    others = tuple(
        w.where(label, *found) if label in w.labels else w for w in term.windows if w is not window
    )
    left = Term(term.scale, _sliced(term.factors, label, *found), others)
    return _repeated(left, [x for x in new if x not in free])


def _repeated(term: Term, labels: Iterable[Label]) -> Term:
    """The term summed over labels, with its scale for those that it does not carry any more."""
    count = math.prod(x.size for x in labels if x not in term.labels)
    return dataclasses.replace(term, scale=term.scale * count)


def _sliced(
    factors: tuple[Factor, ...], label: Label, start: int, step: int, new: Axis
) -> tuple[Factor, ...]:
    count = math.prod(x.size for x in new)
    if (start, step, count) == (0, 1, label.size):
        return tuple(f.rename({label: new}) for f in factors)
    view = (start, start + step * (count - 1) + 1, step)
    return tuple(_slice_factor(f, label, new, view) for f in factors)


def _cut(term: Term, window: Window, label: Label, free: frozenset[Label]) -> Term | None:
    """Cuts what else carries an axis of the value to the part where its window is not zero."""
    if label not in free or not any(label in f.labels for f in term.factors):
        return None
    found = _view(window, label)
    return found and dataclasses.replace(term, factors=_sliced(term.factors, label, *found))


def _met(term: Term, window: Window, label: Label, free: frozenset[Label]) -> Term | None:
    """Sums over a label that only windows carry, one or two in a row."""
    meeting = [w for w in term.windows if label in w.labels]
    carried = any(label in f.labels for f in term.factors)
    if label in free or (carried and len(meeting) == 1):
        return None
    if carried or len(meeting) > 2:
        raise Unrepresentable("a value that several windows read")
    left = Term(term.scale, term.factors, tuple(w for w in term.windows if w not in meeting))
    if len(meeting) == 2:
        return dataclasses.replace(left, windows=(*left.windows, _joined(meeting, label)))
    if not windows.always_solved(window.rest(label), window.by(label), label.size):
        return None
    return _repeated(left, window.labels - free - {label})


def _joined(meeting: Sequence[Window], label: Label) -> Window:
    """Two windows in a row as one, if what the second reads is what the first makes."""
    first, second = meeting
    a, b = first.by(label), second.by(label)
    if first.labels & second.labels != {label} or not windows.joins_exactly(
        first.rest(label), a, second.rest(label), b, label.size
    ):
        raise Unrepresentable("two windows that are not one: what lies outside differs")
    steps = [(x, by * b) for x, by in first.steps if x is not label]
    steps += [(x, -by * a) for x, by in second.steps if x is not label]
    offset = first.offset * b - second.offset * a
    common = math.gcd(offset, *(by for _, by in steps)) or 1
    return Window(tuple((x, by // common) for x, by in steps), offset // common)


# --- products and reductions --------------------------------------------------------------------


def reduce_sum(expr: Expr, axes: Iterable[int]) -> Expr:
    """Sums over axes; a label that a term lacks multiplies it by its size."""
    axes = set(axes)
    gone = [label for axis in axes for label in expr.dims[axis]]
    dims = tuple(dim for i, dim in enumerate(expr.dims) if i not in axes)
    free = frozenset(itertools.chain.from_iterable(dims))
    terms = [t for term in expr.terms for t in _sum_term(term, gone, free)]
    return recentre(_with_terms(dataclasses.replace(expr, dims=dims), terms))


def _sum_term(term: Term, gone: Sequence[Label], free: frozenset[Label]) -> list[Term]:
    missing = math.prod(label.size for label in gone if label not in term.labels)
    holders = [[f for f in term.factors if label in f.labels] for label in gone]
    for label, holding in zip(gone, holders, strict=True):
        if len(holding) == 1 and label in holding[0].centred:
            if len(holding[0].centred & set(gone)) < len(holding[0].centred):
                raise Unrepresentable("a partial sum of a centred value")
            return []  # deviations from a mean add up to zero
    summed = resolved(dataclasses.replace(term, scale=term.scale * missing), free)
    if any(w.labels.isdisjoint(free) for w in summed.windows):
        raise Unrepresentable("a sum over an axis that windows with taps make")
    return [summed]


def multiply(a: Expr, b: Expr) -> Expr:
    """The elementwise product of equal shapes."""
    a, b = _aligned(a, apart(b, a))
    return _product(a, b, a.dims, squared=_same(a, b))


def contract(
    a: Expr,
    b: Expr,
    contracting: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
) -> Expr:
    """``lax.dot_general``: axes of the result are batch, free axes of ``a``, free axes of ``b``."""
    b = apart(b, a)
    a, b = _aligned_axes(a, b, (*contracting[0], *batch[0]), (*contracting[1], *batch[1]))
    free_a = [d for i, d in enumerate(a.dims) if i not in (*contracting[0], *batch[0])]
    free_b = [d for i, d in enumerate(b.dims) if i not in (*contracting[1], *batch[1])]
    dims = (*(a.dims[i] for i in batch[0]), *free_a, *free_b)
    if any(t.degree and u.degree for t in a.terms for u in b.terms):
        raise Unrepresentable("a product of two activations")
    summed = [label for i in contracting[0] for label in a.dims[i]]
    return _product(a, b, dims, summed=summed)


def _product(
    a: Expr, b: Expr, dims: Dims, *, squared: bool = False, summed: Sequence[Label] = ()
) -> Expr:
    free = frozenset(itertools.chain.from_iterable(dims))
    terms = []
    for t, u in itertools.product(a.terms, b.terms):
        if t.degree and u.degree and not (squared or _scales(t, u, free) or _scales(u, t, free)):
            raise Unrepresentable("a product of two activations")
        both = Term(t.scale * u.scale, t.factors + u.factors, t.windows + u.windows)
        if both.degree > 2 or (t.windows and u.windows):
            raise Unrepresentable("a product of degree above two in the data")
        missing = math.prod(label.size for label in summed if label not in both.labels)
        both = dataclasses.replace(both, scale=both.scale * missing)
        terms.append(resolved(both, free))
    return recentre(_with_terms(dataclasses.replace(a, dims=dims), terms, b))


def _scales(small: Term, large: Term, free: frozenset[Label]) -> bool:
    """Whether the data in ``small`` is a statistic of coarser shape, such as a row's norm."""
    data = [
        frozenset().union(*(f.labels for f in t.factors if f.is_data)) & free
        for t in (small, large)
    ]
    return data[0] < data[1]


def _same(a: Expr, b: Expr) -> bool:
    """Whether two aligned expressions are term by term the same."""
    keys = [Counter((term_key(t, e.free), t.scale) for t in e.terms) for e in (a, b)]
    return keys[0] == keys[1]


# --- deviations from a mean ---------------------------------------------------------------------


def recentre(expr: Expr) -> Expr:
    """Rewrites differences that a mean makes, before anything expands them.

    ``z[n] - sum_m z[m] / N`` becomes the centred factor of z, and ``sum z z / N - (sum z / N)^2``
    the mean square of the centred factor: shifting first keeps the digits that the one-pass
    formula loses when ``|mean| >> std``.
    """
    for i, term in enumerate(expr.terms):
        for rewrite in (_centred_square, _centred_value):
            found = rewrite(expr, i, term)
            if found is not None:
                return recentre(dataclasses.replace(expr, terms=found))
    return expr


def deviation(expr: Expr, axis: int) -> Expr:
    """``z - mean(z)`` over an axis, pushed down to the factors that vary along it.

    A product in which one factor varies has that factor centred, as ``x W`` has ``W``; one in
    which several do is less its own mean.
    """
    over = frozenset(expr.dims[axis])
    terms = [t for term in expr.terms for t in _deviation_term(term, over)]
    return recentre(_with_terms(expr, terms))


def _deviation_term(term: Term, over: frozenset[Label]) -> list[Term]:
    if sum(bool(f.labels & over) for f in term.factors) < 2:
        return _recentred_term(term, over)
    if any(window.labels & over for window in term.windows):
        raise Unrepresentable("a centred concatenation")
    inside = over & term.labels
    mean = term.rename({label: (Label(label.size),) for label in inside})
    by = -mean.scale / math.prod(label.size for label in inside)
    return [term, dataclasses.replace(mean, scale=by)]


def _counterpart(expr: Expr, i: int, mean: Term) -> int | None:
    """The index of the term equal to ``mean``, scale included, other than term i."""
    leaves = Counter(id(f.leaf.var) for f in mean.factors)
    candidates = [
        j
        for j, other in enumerate(expr.terms)
        if j != i
        and math.isclose(other.scale, mean.scale, rel_tol=1e-12)
        and Counter(id(f.leaf.var) for f in other.factors) == leaves
    ]
    if not candidates:
        return None
    key = term_key(mean, expr.free)
    return next((j for j in candidates if term_key(expr.terms[j], expr.free) == key), None)


def _without(expr: Expr, i: int, j: int, new: Term) -> tuple[Term, ...]:
    kept = tuple(t for k, t in enumerate(expr.terms) if k not in (i, j))
    return (*kept, new)


def _centred_value(expr: Expr, i: int, term: Term) -> tuple[Term, ...] | None:
    """``s z[n] - s/N sum_m z[m]`` for a data factor z and a subset n of its free labels."""
    if len(expr.terms) < 2 or term.windows:
        return None
    for position, factor in enumerate(term.factors):
        others = [f.labels for k, f in enumerate(term.factors) if k != position]
        own = sorted(factor.labels & expr.free - frozenset().union(*others), key=id)
        if not factor.is_data or factor.centred or len(own) > 6:
            continue
        for count in range(1, len(own) + 1):
            for over in itertools.combinations(own, count):
                j = _counterpart(expr, i, _averaged(term, position, over))
                if j is not None:
                    return _without(expr, i, j, _centre(term, (position,), over))
    return None


def _centred_square(expr: Expr, i: int, term: Term) -> tuple[Term, ...] | None:
    """``s sum_n z z' - s/N sum_nm z[n] z'[m]`` for two data factors of one leaf."""
    pair = [k for k, f in enumerate(term.factors) if f.is_data]
    if len(expr.terms) < 2 or term.windows or len(pair) != 2:
        return None
    first, second = (term.factors[k] for k in pair)
    if first.centred or second.centred:
        return None
    over = tuple(first.labels & second.labels - expr.free)
    others = [f.labels for k, f in enumerate(term.factors) if k not in pair]
    if not over or frozenset(over) & frozenset().union(*others):
        return None
    j = _counterpart(expr, i, _averaged(term, pair[1], over))
    return None if j is None else _without(expr, i, j, _centre(term, pair, over))


def _averaged(term: Term, position: int, over: Iterable[Label]) -> Term:
    """The term to be subtracted from ``term`` so that one factor loses its mean over labels."""
    over = tuple(over)
    factor = term.factors[position].rename({x: (Label(x.size),) for x in over})
    factors = (*term.factors[:position], factor, *term.factors[position + 1 :])
    return Term(-term.scale / math.prod(x.size for x in over), factors)


def _centre(term: Term, positions: Iterable[int], over: Iterable[Label]) -> Term:
    factors = tuple(
        dataclasses.replace(f, centred=f.centred | frozenset(over)) if k in set(positions) else f
        for k, f in enumerate(term.factors)
    )
    return dataclasses.replace(term, factors=factors)


# --- substitution -------------------------------------------------------------------------------


def substitute(expr: Expr, var: Hashable, value: Expr) -> Expr:
    """``expr`` with the leaf ``var`` replaced by what it is."""
    terms: list[Term] = []
    for term in expr.terms:
        terms += _substitute_term(term, expr.free, var, value)
    return recentre(_with_terms(expr, terms, value))


def _substitute_term(term: Term, free: frozenset[Label], var: Hashable, value: Expr) -> list[Term]:
    position = next((k for k, f in enumerate(term.factors) if f.leaf.var == var), None)
    if position is None:
        return [term]
    factor = term.factors[position]
    rest = dataclasses.replace(term, factors=term.factors[:position] + term.factors[position + 1 :])
    new: list[Term] = []
    for part, renaming in _viewed(factor, value):
        joined = Term(
            term.scale * part.scale,
            part.factors + rest.rename(renaming).factors,
            part.windows + rest.rename(renaming).windows,
        )
        if any(len(renaming.get(label, (label,))) != 1 for label in free):
            raise Unrepresentable("the value splits an axis of the result")
        missing = (factor.rename(renaming).labels - joined.labels) - free
        joined = dataclasses.replace(
            joined, scale=joined.scale * math.prod(label.size for label in missing)
        )
        if joined.degree > 2:
            raise Unrepresentable("a product of degree above two in the data")
        new += _substitute_term(resolved(joined, free), free, var, value)
    return new


def _viewed(factor: Factor, value: Expr) -> list[tuple[Term, Renaming]]:
    """The terms of ``value`` on the labels of ``factor``, and how labels outside are refined."""
    value = refreshed(value)
    for axis, view in enumerate(factor.slices):
        if view is not None:
            value = slice_axis(value, axis, *view)
    renaming: dict[Label, Axis] = {}
    for axis in range(len(factor.axes)):
        outer, inner = _refine(factor.axes[axis], value.dims[axis])
        value = value.rename(inner)
        factor = factor.rename(outer)
        renaming.update(outer)
    return [(t, renaming) for term in value.terms for t in _recentred_term(term, factor.centred)]


def _recentred_term(term: Term, centred: frozenset[Label]) -> list[Term]:
    """Moves the subtraction of a mean from a product onto the factor that varies."""
    if not centred:
        return [term]
    if any(window.labels & centred for window in term.windows):
        raise Unrepresentable("a centred concatenation")
    holding = [k for k, f in enumerate(term.factors) if f.labels & centred]
    if not holding:
        return []  # constant over the labels, so its deviation from the mean is zero
    if len(holding) > 1:
        raise Unrepresentable("a centred product of two factors that both vary")
    factor = term.factors[holding[0]]
    over = factor.labels & centred
    if factor.centred not in (frozenset(), over):
        raise Unrepresentable("deviations from two different means")
    return [_centre(term, holding, over)]
