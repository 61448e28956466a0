"""Slices, concatenations and the windows of convolutions, on expressions."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

from fcjax.expressions import windows
from fcjax.expressions.circular import goes_round, joined_round, sliced_round
from fcjax.expressions.layout import aligned_axes
from fcjax.expressions.like_terms import with_terms
from fcjax.expressions.terms import (
    Axis,
    Expr,
    Factor,
    Label,
    Term,
    Unrepresentable,
    Window,
    fresh_dims,
    refreshed,
    strides,
)

__all__ = ["concatenate", "resolved", "slice_axis", "unfold"]


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
    cut = sliced_round if goes_round(view, label.size) else _slice_term
    terms = tuple(resolved(cut(term, label, new, view), free) for term in expr.terms)
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
        _compose_slices(old, view, size) if axis == (label,) else old
        for axis, old, size in zip(factor.axes, factor.slices, factor.leaf.shape, strict=True)
    )
    axes = tuple(new if axis == (label,) else axis for axis in factor.axes)
    return dataclasses.replace(factor, axes=axes, slices=slices)


def _compose_slices(
    first: tuple[int, int, int] | None, second: tuple[int, int, int], size: int
) -> tuple[int, int, int] | None:
    if first is None:
        return second
    start, _, stride = first
    begin, limit, step = second
    last = start + (limit - 1) * stride
    both = (start + begin * stride, last + 1, stride * step)
    return None if both == (0, size, 1) else both


def concatenate(parts: Sequence[Expr], axis: int) -> Expr:
    """Joins along ``axis``: each part carries a window that puts it at its offset.

    Slices of one array that go round an axis of it, as circular padding does, are a view of it.
    """
    around = joined_round(parts, axis)
    if around is not None:
        return around
    parts = [refreshed(part) for part in parts]
    others = [i for i in range(len(parts[0].dims)) if i != axis]
    for _ in range(2):  # a later part may refine an axis that earlier ones had whole
        for i in range(1, len(parts)):
            parts[0], parts[i] = aligned_axes(parts[0], parts[i], others, others)
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
    return with_terms(dataclasses.replace(parts[0], dims=dims), terms, *parts)


def unfold(
    expr: Expr, axis: int, out: int, taps: int, *, spread: int = 1, stride: int = 1,
    dilation: int = 1, offset: int = 0,
) -> Expr:  # fmt: skip
    """What a window sees: ``result[..., o, ..., k] = expr[..., i, ...]``, zero where there is no i.

    With ``spread * i = stride * o + dilation * k + offset``; the axis of ``k`` comes last. An axis
    may be merged from several labels if all but one of them repeat a value, as in nearest
    upsampling.
    """
    if (out, taps, spread, stride, offset) == (expr.shape[axis], 1, 1, 1, 0):
        return dataclasses.replace(expr, dims=(*expr.dims, ()))
    places, tap = fresh_dims((out, taps))
    free = frozenset((*itertools.chain.from_iterable(expr.dims), *places, *tap))
    dims = (*(places if i == axis else dim for i, dim in enumerate(expr.dims)), tap)
    read = expr.dims[axis]
    if not read or any(len(t.labels.intersection(read)) > 1 for t in expr.terms):
        raise Unrepresentable("a window over a merged axis or one of size 1")
    steps = [(x, spread * by) for x, by in strides(read)]
    steps += [(x, by) for labels, by in ((places, -stride), (tap, -dilation)) for x in labels]
    window = Window(tuple(steps), -offset)
    terms = [
        resolved(dataclasses.replace(t, windows=(*t.windows, window)), free - {*read})
        for t in expr.terms
    ]
    return with_terms(dataclasses.replace(expr, dims=dims), terms)


# --- what windows determine ---------------------------------------------------------------------


def resolved(term: Term, free: frozenset[Label]) -> Term:
    """Sums over the labels that windows determine.

    What stays is a window whose value is zero outside of what it reads, and taps of kernels.

    Raises:
      Unrepresentable: if something else carries an axis that a window puts something into.
    """
    for step in (_located, _inside, _cut, _met):
        for window in term.windows:
            for label, _ in window.steps:
                new = step(term, window, label, free)
                if new is not None:
                    return resolved(new, free)
    placed = [x for w in term.windows if len(w.steps) == 2 for x in w.labels & free]
    if any(not f.labels.isdisjoint(placed) for f in term.factors):
        raise Unrepresentable("a factor along an axis that something is put into")
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


def _inside(term: Term, window: Window, label: Label, free: frozenset[Label]) -> Term | None:
    """Leaves out what a window puts outside of an axis of the value."""
    others = [x for x in window.labels if x is not label]
    if label in free or len(others) != 1 or others[0] not in free:
        return None
    (out,) = others
    start, count = windows.inside(
        window.by(label), label.size, window.by(out), out.size, window.offset
    )
    if count == label.size:
        return None
    if not count:
        return Term(0.0, ())
    new: Axis = (Label(count),) if count > 1 else ()
    factors = _sliced(term.factors, label, start, 1, new)
    moved = [w.where(label, start, 1, new) if label in w.labels else w for w in term.windows]
    return Term(term.scale, factors, tuple(moved))


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
