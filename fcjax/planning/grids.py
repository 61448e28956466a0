"""Several terms over the same rows as one convolution, with one kernel for all.

Branches whose kernels have other sizes stand on the same grid of taps; a branch that keeps the
channels, such as an identity or a depthwise kernel, is a diagonal of it. Nothing is computed here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from fcjax.expressions import windows
from fcjax.expressions.circular import goes_round
from fcjax.expressions.terms import Axis as Labels
from fcjax.expressions.terms import Factor, Label, Term
from fcjax.planning.kernels import Seen, View, through

__all__ = ["Grid", "Place", "Shared", "Taps", "share"]


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
    wide = through((start - far[0], limit - far[0], 1), far[1] - far[0], own)
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
