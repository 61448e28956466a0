"""Views that go round an axis, as circular padding makes them.

A slice of data may begin before its axis or end behind it: what it reads there is the same axis
again, ``x[start + step * o]`` modulo the size. So padding an array circularly only looks at it,
and a circular convolution is an ordinary one of such a view, which reads no padding.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from fcjax.expressions import windows
from fcjax.expressions.terms import (
    Axis,
    Expr,
    Factor,
    Label,
    Term,
    Unrepresentable,
    Window,
    rename_dims,
)

__all__ = ["goes_round", "joined_round", "sliced_round"]

Slice = tuple[int, int, int]


def goes_round(view: Slice | None, size: int) -> bool:
    """Whether a slice reads before or behind an axis of this size."""
    return view is not None and (view[0] < 0 or view[1] > size)


def joined_round(parts: Sequence[Expr], axis: int) -> Expr | None:
    """A concatenation of slices that go on where an array starts again; None if it is none.

    Args:
      parts: the slices, as jnp.pad joins them for ``mode="wrap"``.
      axis: the axis they are joined along.
    """
    ends = [_slice_of(part, axis) for part in parts]
    if None in ends:
        return None
    found = [end for end in ends if end is not None]
    longest = max(range(len(parts)), key=lambda i: parts[i].shape[axis])
    factor, at = found[longest][:2]
    size = factor.leaf.shape[at]
    if any(not _alike(part, end, parts[longest], found[longest], axis)
           for part, end in zip(parts, found, strict=True)):  # fmt: skip
        return None
    pairs = list(itertools.pairwise((start, limit) for _, _, start, limit in found))
    rounds = [limit == size and start == 0 for (_, limit), (start, _) in pairs]
    goes_on = [limit == start for (_, limit), (start, _) in pairs]
    if not any(rounds) or not all(a or b for a, b in zip(rounds, goes_on, strict=True)):
        return None
    start = found[0][2] - (size if found[0][2] else 0)
    label = Label(sum(part.shape[axis] for part in parts))
    made = _reading(factor, at, (label,), (start, start + label.size, 1))
    dims = parts[longest].dims
    dims = (*dims[:axis], (label,), *dims[axis + 1 :])
    return dataclasses.replace(parts[longest], dims=dims, terms=(Term(1.0, (made,)),))


_Slice = tuple[Factor, int, int, int]
"""A factor, one of its axes, and from where to where it is read there."""


def _slice_of(part: Expr, axis: int) -> _Slice | None:
    """The slice of data that a value is, along an axis; None if it is anything more."""
    (term, *more) = part.terms or (None,)
    if term is None or more or term.windows or term.scale != 1.0 or len(term.factors) != 1:
        return None
    (factor,) = term.factors
    cuts = [i for i, own in enumerate(factor.axes) if own == part.dims[axis] and len(own) < 2]
    if not part.dims[axis]:  # one row: the axis that is cut down to it
        cuts = [i for i in cuts if factor.slices[i] is not None]
    if len(cuts) != 1 or not factor.is_data or factor.centred:
        return None
    start, limit, step = factor.slices[cuts[0]] or (0, factor.leaf.shape[cuts[0]], 1)
    whole = step == 1 and not goes_round((start, limit, step), factor.leaf.shape[cuts[0]])
    return (factor, cuts[0], start, limit) if whole else None


def _alike(part: Expr, end: _Slice, other: Expr, wanted: _Slice, axis: int) -> bool:
    """Whether two slices differ in nothing but where they begin and end along the axis."""
    (factor, at, *_), (same, there, *_) = end, wanted
    if factor.leaf != same.leaf or at != there:
        return False
    pairs = [(a, b) for i, (a, b) in enumerate(zip(factor.axes, same.axes, strict=True)) if i != at]
    if any(len(a) != len(b) for a, b in pairs):
        return False
    renaming = {x: (y,) for a, b in pairs for x, y in zip(a, b, strict=True)}
    cuts = [tuple(v for i, v in enumerate(f.slices) if i != at) for f in (factor, same)]
    dims = [tuple(d for i, d in enumerate(e.dims) if i != axis) for e in (part, other)]
    return cuts[0] == cuts[1] and rename_dims(dims[0], renaming) == dims[1]


def _reading(factor: Factor, at: int, new: Axis, view: Slice) -> Factor:
    """The factor read by another slice of one of its axes, which may be all of it."""
    whole = view == (0, factor.leaf.shape[at], 1)
    axes = (*factor.axes[:at], new, *factor.axes[at + 1 :])
    slices = (*factor.slices[:at], None if whole else view, *factor.slices[at + 1 :])
    return dataclasses.replace(factor, axes=axes, slices=slices)


def sliced_round(term: Term, label: Label, new: Axis, view: Slice) -> Term:
    """The term at ``start + step * new`` modulo the size of a label, if it repeats with it.

    Raises:
      Unrepresentable: if it does not, or where it is not known to.
    """
    start, _, step = view
    holding = [i for i, f in enumerate(term.factors) if label in f.labels]
    meeting = [w for w in term.windows if label in w.labels]
    if len(holding) + len(meeting) > 1:
        raise Unrepresentable("several factors along an axis that is gone round")
    factors = list(term.factors)
    for i in holding:
        at, begin = _period(factors[i], label)
        if factors[i].leaf.shape[at] != label.size:
            raise Unrepresentable("a part of an axis that is gone round")
        count = new[0].size if new else 1
        around = (begin + start, begin + start + step * (count - 1) + 1, step)
        factors[i] = _reading(factors[i], at, new, around)
    others = tuple(w for w in term.windows if w not in meeting)
    made = Term(term.scale, tuple(factors), others)
    return _convolved(made, meeting[0], label, new, view) if meeting else made


def _period(factor: Factor, label: Label) -> tuple[int, int]:
    """The axis of data that has a label, read one by one, and where that begins."""
    if not factor.is_data or factor.centred or (label,) not in factor.axes:
        raise Unrepresentable("something else than data along an axis that is gone round")
    at = factor.axes.index((label,))
    begin, _, step = factor.slices[at] or (0, factor.leaf.shape[at], 1)
    if step != 1:
        raise Unrepresentable("a part of an axis that is gone round")
    return at, begin


def _convolved(term: Term, window: Window, label: Label, new: Axis, view: Slice) -> Term:
    """A convolution that is gone round: its rows are, if its stride divides their size."""
    reads = [
        (i, x) for x, by in window.steps if abs(by) == 1 and x is not label
        for i, f in enumerate(term.factors) if f.is_data and x in f.labels
    ]  # fmt: skip
    if len(reads) != 1 or any(reads[0][1] in w.labels for w in term.windows):
        raise Unrepresentable("a window of no single axis that is gone round")
    ((i, read),) = reads
    at, begin = _period(term.factors[i], read)
    by, size = window.by(read), term.factors[i].leaf.shape[at]
    closes = (window.by(label) * label.size) % size == 0
    if not closes or not windows.always_solved(window.rest(read), by, read.size):
        raise Unrepresentable("a window that does not close when it is gone round")
    far = window.where(label, view[0], view[2], new)
    places = -by * far.rest(read)
    low, high = int(places.min()), int(places.max())
    wide = (Label(high - low + 1),) if high > low else ()
    factors = list(term.factors)
    factors[i] = _reading(factors[i], at, wide, (begin + low, begin + high + 1, 1))
    return Term(term.scale, tuple(factors), (*term.windows, far.where(read, low, 1, wide)))
