"""How terms with windows meet the data: through one kernel for all that see it on the same grid.

A term ``sum x[n, i, e] A[a, e, m] B[b, m, c]`` with ``i = o + a + b - 2`` is a convolution of x by
the kernel whose entry at ``t = a + b`` adds up the products of taps at that place. Branches whose
kernels have other sizes stand on the same grid of taps; a branch that keeps the channels, such as
an identity or a depthwise kernel, is a diagonal of it. Nothing is computed here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

from fcjax.expressions import windows
from fcjax.expressions.circular import goes_round
from fcjax.expressions.terms import Axis as Labels
from fcjax.expressions.terms import Factor, Label, Term, Unrepresentable, Window

__all__ = ["Grid", "Place", "Shared", "Taps", "View", "computed_over", "has_taps", "share", "view"]


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
        rows, seen = _unsliced(rows, seen)
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


def _unsliced(rows: Factor, seen: tuple[Seen, ...]) -> tuple[Factor, tuple[Seen, ...]]:
    """Reads the whole axis instead of a slice where that is the same."""
    found = {s.label: s for s in seen}
    axes, slices = list(rows.axes), list(rows.slices)
    for axis, cut in enumerate(rows.slices):
        labels, size = rows.axes[axis], rows.leaf.shape[axis]
        if cut is None or not labels or goes_round(cut, size):
            continue
        whole = _through(cut, size, found[labels[0]])
        if whole is not None:
            found[labels[0]] = whole
            axes[axis], slices[axis] = (whole.label,), None
    rows = dataclasses.replace(rows, axes=tuple(axes), slices=tuple(slices))
    return rows, tuple(found.values())


def _through(cut: tuple[int, int, int], size: int, seen: Seen) -> Seen | None:
    """``seen`` of the whole axis that is sliced, if no place outside the slice comes into it."""
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


# --- several terms over the same rows -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Grid:
    """One axis of a convolution: ``spread * read = stride * out + dilation * tap + low``.

    Attributes:
      read: the label of the rows.
      out: the label of the value.
      tap: the label of the kernel; None if it has one place only.
      spread: dilation of the rows.
      stride: between two places of the value.
      dilation: between two taps.
      low: the place of the first tap for the first place of the value.
    """

    read: Label
    out: Label
    tap: Label | None
    spread: int
    stride: int
    dilation: int
    low: int


@dataclasses.dataclass(frozen=True)
class Taps:
    """Which tap of a kernel the entries of a product stand at, along one axis of space.

    At the tap t with ``every * t == sum(by * index) + low``; those for which there is none count
    for nothing.

    Attributes:
      steps: labels of the product, labels along which it is constant, which are added up, and
        labels of the kernel, each with what its index is multiplied by.
      low: the constant.
      every: the distance of two taps.
    """

    steps: tuple[tuple[Label, int], ...]
    low: int
    every: int = 1


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a product of weights stands in the kernel.

    Attributes:
      taps: for each axis of the grid, at which tap.
      diagonal: pairs of a summed channel and the one of the value that equals it.
    """

    taps: tuple[Taps, ...]
    diagonal: tuple[tuple[Label, Label], ...]

    @property
    def labels(self) -> frozenset[Label]:
        """The taps of the product."""
        return frozenset(x for taps in self.taps for x, _ in taps.steps)


@dataclasses.dataclass(frozen=True)
class Shared:
    """Terms over the same rows as one convolution.

    Attributes:
      rows: the data factor; None for ones.
      ones: labels along which the rows are repeated.
      grids: the axes of space.
      weights: for each term what its rows are multiplied with.
      places: for each term where that stands in the kernel.
    """

    rows: Factor | None
    ones: Labels
    grids: tuple[Grid, ...]
    weights: tuple[Term, ...]
    places: tuple[Place, ...]

    @property
    def on_rows(self) -> frozenset[Label]:
        """The labels of the rows."""
        own = self.rows.labels if self.rows is not None else frozenset[Label]()
        return own.union(self.ones)

    def _channels(self, kept: frozenset[Label]) -> frozenset[Label]:
        return (self.on_rows | kept).difference(g.read for g in self.grids)

    def inside(self, i: int, kept: frozenset[Label]) -> frozenset[Label]:
        """The labels over which a product is computed; the value is computed over ``kept``."""
        return self.weights[i].labels & (self._channels(kept) | self.places[i].labels)

    def labels(self, kept: frozenset[Label], order: Labels) -> Labels:
        """The axes of the kernel: taps, channels as the rows have them, those of the value."""
        inside = {x for w in self.weights for x in w.labels & self._channels(kept)}
        inside |= {x for place in self.places for pair in place.diagonal for x in pair}
        rows = tuple(itertools.chain(*self.rows.axes)) if self.rows is not None else ()
        first = (*rows, *(x for x in order if x not in rows))
        rest = sorted(inside, key=lambda x: first.index(x) if x in first else len(first))
        return (*(g.tap for g in self.grids if g.tap is not None), *rest)


def share(views: Sequence[View]) -> Shared | None:
    """Several terms as one convolution, or None if they see different data or another grid."""
    views = _read_alike(views)
    first = views[0]
    if len(views) > 1 and any(_data(v) != _data(first) or v.windows for v in views):
        return None
    columns = list(zip(*(v.seen for v in views), strict=True))
    if not all(map(_alike, columns)):
        return None
    labels = [_common(column) for column in columns]
    grids = [_grid(column, x) for column, x in zip(columns, labels, strict=True)]
    renamed = [
        {s.label: (x,) for s, x in zip(v.seen, labels, strict=True) if s.out is None} for v in views
    ]
    places = tuple(_place(v, labels, grids) for v in views)
    rows = first.rows
    if rows is not None:
        rows = rows.rename({s.label: (x,) for s, x in zip(first.seen, labels, strict=True)})
    on_rows = rows.labels if rows is not None else frozenset[Label]()
    return Shared(
        rows,
        tuple(x for x in labels if x not in on_rows),
        tuple(g for g in grids if g is not None),
        tuple(v.weights.rename(r) for v, r in zip(views, renamed, strict=True)),
        places,
    )


def _read_alike(views: Sequence[View]) -> Sequence[View]:
    """Views that go round an axis of the same data differently far, all as far as the farthest."""
    rows = [v.rows for v in views if v.rows is not None]
    if len(rows) < len(views) or len({f.leaf.var for f in rows}) > 1:
        return views
    for axis, size in enumerate(rows[0].leaf.shape):
        cuts = [v.rows.slices[axis] or (0, size, 1) for v in views if v.rows is not None]
        if any(goes_round(cut, size) for cut in cuts) and all(step == 1 for _, _, step in cuts):
            far = (min(start for start, _, _ in cuts), max(limit for _, limit, _ in cuts), 1)
            views = [_read_by(v, axis, far) for v in views]
    return views


def _read_by(view: View, axis: int, far: tuple[int, int, int]) -> View:
    """A view with more of an axis of its rows, if nothing of that comes into it."""
    rows = view.rows
    assert rows is not None
    start, limit, _ = rows.slices[axis] or (0, rows.leaf.shape[axis], 1)
    if len(rows.axes[axis]) != 1 or (start, limit, 1) == far:
        return view
    (label,) = rows.axes[axis]
    own = next(s for s in view.seen if s.label is label)
    wide = _through((start - far[0], limit - far[0], 1), far[1] - far[0], own)
    if wide is None:
        return view
    axes = (*rows.axes[:axis], (wide.label,), *rows.axes[axis + 1 :])
    slices = (*rows.slices[:axis], far, *rows.slices[axis + 1 :])
    rows = dataclasses.replace(rows, axes=axes, slices=slices)
    seen = tuple(wide if s is own else s for s in view.seen)
    return dataclasses.replace(view, rows=rows, seen=seen)


def _data(view: View) -> object:
    """Equal for views of the same data, up to the names of labels."""
    if view.rows is None:
        return view
    sizes = tuple(tuple(x.size for x in axis) for axis in view.rows.axes)
    return view.rows.leaf.var, view.rows.slices, sizes, len(view.seen)


def _alike(column: Sequence[Seen]) -> bool:
    """Whether terms read a label on the same grid, or some sum over it and others keep it."""
    grids = {(s.out, s.spread, s.stride) for s in column if s.out is not None}
    mixed = any(s.out is None for s in column) and grids
    return len(grids) <= 1 and not (mixed and any(s.out and not s.is_plain for s in column))


def _common(column: Sequence[Seen]) -> Label:
    """The label of the shared rows: a summed one, one of space, or the value's own."""
    return next((s.label for s in column if s.out is None or not s.is_plain), column[0].label)


def _grid(column: Sequence[Seen], label: Label) -> Grid | None:
    (s, *_) = column
    if s.out is None or any(x.out is None for x in column) or all(x.is_plain for x in column):
        return None
    positions = [windows.values([(x.size, by) for x, by in o.taps], o.offset) for o in column]
    low, dilation, count = windows.tap_grid(positions)
    tap = Label(count) if count > 1 else None
    return Grid(label, s.out, tap, s.spread, s.stride, dilation, low)


def _place(view: View, labels: Sequence[Label], grids: Sequence[Grid | None]) -> Place:
    taps = []
    diagonal = []
    for s, label, grid in zip(view.seen, labels, grids, strict=True):
        if grid is not None:
            steps = tuple((x, by // grid.dilation) for x, by in s.taps)
            taps.append(Taps(steps, (s.offset - grid.low) // grid.dilation))
        elif s.out is not None and s.out is not label:
            diagonal.append((label, s.out))
    return Place(tuple(taps), tuple(diagonal))
