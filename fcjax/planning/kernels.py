"""How terms with windows meet the data: as kernels over rows.

A term ``sum x[n, i, e] A[a, e, m] B[b, m, c]`` with ``i = o + a + b - 2`` is a convolution of x by
the kernel whose entry at ``t = a + b`` adds up the products of taps at that place. Nothing is
computed here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

from fcjax.expressions import windows
from fcjax.expressions.circular import goes_round
from fcjax.expressions.terms import Factor, Label, Term, Unrepresentable, Window

__all__ = ["Seen", "View", "computed_over", "has_taps", "through", "view"]


@dataclasses.dataclass(frozen=True)
class Seen:
    """How a term reads one label of its rows: ``spread * read = stride * out + taps + offset``.

    Attributes:
      label: the label on the rows.
      out: the label of the value; None if the label is summed against the weights.
      spread: what the index read is multiplied by.
      stride: what the index of the value is multiplied by.
      taps: the labels of kernels, each with its dilation.
      offset: the constant.
    """

    label: Label
    out: Label | None
    spread: int = 1
    stride: int = 1
    taps: tuple[tuple[Label, int], ...] = ()
    offset: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether the value has the label as it is."""
        grid = (self.spread, self.stride, self.offset)
        same = self.out is not None and self.out.size == self.label.size
        return same and grid == (1, 1, 0) and not self.taps


@dataclasses.dataclass(frozen=True)
class View:
    """A term as a kernel over rows.

    Attributes:
      rows: the factor that the windows read; None if they read nothing but ones.
      seen: how each label of the rows is read, then labels along which the rows are constant.
      weights: what the rows are multiplied with.
      windows: those that put the result in place afterwards.
      kept: the labels of the result before that.
    """

    rows: Factor | None
    seen: tuple[Seen, ...]
    weights: Term
    windows: tuple[Window, ...]
    kept: frozenset[Label]


def has_taps(term: Term) -> bool:
    """Whether a term is a convolution or a pooling, not only something put in place."""
    return any(len(w.steps) > 2 for w in term.windows)


def view(
    term: Term, rows: Factor | None, weights: Sequence[Factor], free: frozenset[Label]
) -> View:
    """A term as a kernel over rows, with labels of its own for all that is summed.

    Args:
      term: the term.
      rows: its data factor, if it has one.
      weights: its other factors.
      free: the labels of the value.

    Raises:
      Unrepresentable: if the windows are no convolution of the rows.
    """
    own = {x: (Label(x.size),) for x in term.labels - free}
    relations = [w.rename(own) for w in term.windows]
    factors = [f.rename(own) for f in weights]
    if rows is None:
        rows, factors = _rows_among(factors, relations, free)
    else:
        rows = rows.rename(own)
    if rows is not None and rows.centred:
        raise Unrepresentable("a window over deviations from a mean")
    on_weights = frozenset[Label]().union(*(f.labels for f in factors))
    on_rows = rows.labels if rows is not None else frozenset[Label]()
    after = tuple(w for w in relations if _places(w, on_rows - on_weights, free))
    kept = computed_over(free, after)
    by_label = {
        _read(w, on_rows, on_rows | on_weights, kept): w for w in relations if w not in after
    }
    flat = tuple(itertools.chain.from_iterable(rows.axes)) if rows is not None else ()
    constant = tuple(label for label in by_label if label not in on_rows)
    seen = tuple(_seen(label, by_label.get(label), kept) for label in (*flat, *constant))
    if on_weights & {label for s in seen for label in (s.label, s.out) if s.label in by_label}:
        raise Unrepresentable("weights that differ from place to place of a convolution")
    if rows is not None:
        rows, seen = _unsliced(rows, seen, on_weights)
    return View(rows, seen, Term(term.scale, tuple(factors)), after, kept)


def _places(window: Window, rows: frozenset[Label], free: frozenset[Label]) -> bool:
    """Whether a window puts an axis of weights in its place in the value, as joining does."""
    bound = window.labels - free
    return len(window.steps) == 2 and len(bound) == 1 and not bound <= rows


def computed_over(free: frozenset[Label], placing: Sequence[Window]) -> frozenset[Label]:
    """The labels over which a term is computed before windows put it in place.

    Raises:
      Unrepresentable: if a window does not put one summed axis into one of the value.
    """
    for w in placing:
        if len(w.steps) != 2 or len(w.labels & free) != 1:
            raise Unrepresentable("a window between two axes that are summed")
        if w.steps[0][1] * w.steps[1][1] > 0:
            raise Unrepresentable("a window that puts something in place runs backwards")
    return free.union(*(w.labels for w in placing)) - free.intersection(
        itertools.chain.from_iterable(w.labels for w in placing)
    )


def _rows_among(
    factors: list[Factor], relations: Sequence[Window], free: frozenset[Label]
) -> tuple[Factor | None, list[Factor]]:
    """The factor whose larger axes windows read, where no data are: a map that is the same for all.

    A convolution is symmetric in what it reads and its kernel, so either could be called the rows.
    """
    largest = {
        _largest(w, (x for x, _ in w.steps if x not in free), free)
        for w in relations
        if len(w.steps) > 2
    }
    holding = [f for f in factors if f.labels & largest]
    if len(holding) > 1:
        raise Unrepresentable("windows over two different parameters")
    return (holding[0], [f for f in factors if f is not holding[0]]) if holding else (None, factors)


def _read(
    window: Window, rows: frozenset[Label], known: frozenset[Label], free: frozenset[Label]
) -> Label:
    """The label that a window reads of the rows, or of ones."""
    bound = [x for x, _ in window.steps if x not in free]
    read = [x for x in bound if x in rows] or [x for x in bound if x not in known]
    if not read or (len(read) > 1 and read[0] in rows):
        raise Unrepresentable("a window over kernels alone, or over two axes of the same data")
    return _largest(window, read, free)


def _largest(window: Window, among: Iterable[Label], free: frozenset[Label]) -> Label:
    """The largest label, if possible on the other side of the relation than that of the value.

    There stand the rows: ``spread * read = stride * out + dilation * tap``.
    """
    out = sum(by for x, by in window.steps if x in free)
    return max(among, key=lambda x: (window.by(x) * out < 0, x.size))


def _seen(label: Label, window: Window | None, free: frozenset[Label]) -> Seen:
    if window is None:
        return Seen(label, label if label in free else None)
    out = [x for x in window.labels if x in free]
    if len(out) != 1:
        raise Unrepresentable("a window that makes no axis of the value")
    sign = 1 if window.by(label) > 0 else -1
    taps = tuple((x, -sign * by) for x, by in window.steps if x not in (label, out[0]))
    stride = -sign * window.by(out[0])
    if stride < 0:
        raise Unrepresentable("a window with taps runs backwards")
    return Seen(label, out[0], sign * window.by(label), stride, taps, -sign * window.offset)


def _unsliced(
    rows: Factor, seen: tuple[Seen, ...], on_weights: frozenset[Label]
) -> tuple[Factor, tuple[Seen, ...]]:
    """Reads the whole axis instead of a slice where that is the same.

    What is read like the weights, by the same index, keeps the index.
    """
    found = {s.label: s for s in seen}
    axes, slices = list(rows.axes), list(rows.slices)
    for axis, cut in enumerate(rows.slices):
        labels, size = rows.axes[axis], rows.leaf.shape[axis]
        if cut is None or len(labels) != 1 or goes_round(cut, size) or labels[0] in on_weights:
            continue
        whole = through(cut, size, found[labels[0]])
        if whole is not None:
            found[labels[0]] = whole
            axes[axis], slices[axis] = (whole.label,), None
    rows = dataclasses.replace(rows, axes=tuple(axes), slices=tuple(slices))
    return rows, tuple(found.values())


def through(cut: tuple[int, int, int], size: int, seen: Seen) -> Seen | None:
    """``seen`` of all the places of an axis that is cut, if nothing of the others comes into it."""
    if seen.out is None:
        return None
    start, _, step = cut
    steps = [(seen.out.size, -seen.stride), *((x.size, -by) for x, by in seen.taps)]
    outside, inside = windows.values([(size, 1)], -start), windows.values(steps, -seen.offset)
    if not windows.joins_exactly(outside, -step, inside, seen.spread, seen.label.size):
        return None
    offset = step * seen.offset + seen.spread * start
    numbers = [seen.spread, step * seen.stride, offset, *(step * by for _, by in seen.taps)]
    common = math.gcd(*numbers)
    spread, stride, offset, *dilations = (number // common for number in numbers)
    taps = tuple((x, by) for (x, _), by in zip(seen.taps, dilations, strict=True))
    return Seen(Label(size), seen.out, spread, stride, taps, offset)
