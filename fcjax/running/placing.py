"""Values where windows put them along the axes of an expression."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from fcjax.expressions.terms import Expr, Label, Window
from fcjax.running import convolving
from fcjax.running.arrays import broadcast_to, library
from fcjax.running.named import Named, ordered

__all__ = ["put_in_place"]


def put_in_place(values: Sequence[tuple[Named, tuple[Window, ...]]], expr: Expr) -> Iterator[Named]:
    """Values where windows put them; pieces that fill an axis between them are joined."""
    pieces: dict[Label, list[tuple[Named, Window]]] = {}
    for value, windows in values:
        if len(windows) == 1 and all(abs(by) == 1 for _, by in windows[0].steps):
            (out,) = windows[0].labels & expr.free
            pieces.setdefault(out, []).append((value, windows[0]))
        else:
            yield functools.reduce(lambda v, w: _placed(v, w, expr.free), windows, value)
    for out, own in pieces.items():
        if _fills(out, own):
            yield _joined(out, own, expr)
        else:
            yield from (_placed(value, window, expr.free) for value, window in own)


def _span(out: Label, window: Window) -> tuple[int, int]:
    """Where the piece that a window puts into ``out`` starts and ends."""
    (read,) = window.labels - {out}
    start = -window.by(out) * window.offset
    return start, start + read.size


def _fills(out: Label, pieces: Sequence[tuple[Named, Window]]) -> bool:
    spans = sorted({_span(out, window) for _, window in pieces})
    return [0, *(end for _, end in spans)] == [*(start for start, _ in spans), out.size]


def _joined(out: Label, pieces: Sequence[tuple[Named, Window]], expr: Expr) -> Named:
    """Pieces that fill an axis, those at the same place added up."""
    labels = tuple(itertools.chain(*expr.dims))
    axis = labels.index(out)
    at: dict[tuple[int, int], Any] = {}
    for value, window in pieces:
        (read,) = window.labels - {out}
        array = ordered(value, tuple(read if x is out else x for x in labels)).astype(expr.dtype)
        span = _span(out, window)
        at[span] = at[span] + array if span in at else array
    sizes = [label.size for label in labels]
    whole = [
        broadcast_to(at[span], [*sizes[:axis], span[1] - span[0], *sizes[axis + 1 :]])
        for span in sorted(at)
    ]
    return Named(library(*whole).concatenate(whole, axis), labels, True)


def _placed(value: Named, window: Window, free: frozenset[Label]) -> Named:
    """Puts an axis of a value where a window says, zero elsewhere."""
    (read,), (out,) = window.labels - free, window.labels & free
    if read not in value.labels:
        wide = value.array.reshape((*value.array.shape, 1))
        repeated = broadcast_to(wide, (*value.array.shape, read.size))
        value = Named(repeated, (*value.labels, read), value.data)
    sign = 1 if window.by(read) > 0 else -1
    spread, stride, offset = (sign * n for n in (window.by(read), -window.by(out), -window.offset))
    axis = value.labels.index(read)
    array = convolving.place(value.array, axis, spread, stride, offset, out.size)
    labels = tuple(out if i == axis else x for i, x in enumerate(value.labels))
    return Named(array, labels, value.data)
