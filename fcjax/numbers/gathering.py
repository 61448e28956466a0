"""Look-ups at computed places, and their transposes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax

from fcjax.numbers.periodic import NOWHERE, Array, Numbers
from fcjax.numbers.rules import Params, rule

__all__: list[str] = []

FILL = lax.GatherScatterMode.FILL_OR_DROP
CLIP = lax.GatherScatterMode.CLIP


def _places(
    starts: Array, axes: Sequence[int], sizes: Sequence[int], window: Sequence[int], batching: Any,
) -> tuple[list[Array], Array]:  # fmt: skip
    """For each axis the first index of every window, and which windows lie inside.

    Args:
      starts: shape ``(*batch, len(axes))``.
      axes: which axes the last axis of ``starts`` is for.
      sizes: of the array that is read.
      window: how much of each axis a window reads.
      batching: pairs of an axis and that of ``starts`` with which it is counted along.
    """
    batch = starts.shape[:-1]
    begin = [np.zeros(batch, np.int64) for _ in sizes]
    for k, axis in enumerate(axes):
        begin[axis] = starts[..., k].astype(np.int64)
    for axis, along in batching:
        shape = [n if i == along else 1 for i, n in enumerate(batch)]
        begin[axis] = np.broadcast_to(np.arange(sizes[axis]).reshape(shape), batch)
    inside = np.ones(batch, bool)
    for first, size, part in zip(begin, sizes, window, strict=True):
        inside &= (first >= 0) & (first <= size - part)
    return begin, inside


def _grid(begin: Sequence[Array], window: Sequence[int], kept: Sequence[int]) -> list[Array]:
    """The index of every entry of every window: batch axes first, then the window's."""
    rank, count = begin[0].ndim, len(window)
    grid = []
    for axis, first in enumerate(begin):
        along = np.arange(kept[axis]).reshape([-1 if i == axis else 1 for i in range(count)])
        grid.append(
            first.reshape(first.shape + (1,) * count) + along.reshape((1,) * rank + along.shape)
        )
    return grid


@rule("gather")
def _gather(params: Params, x: Numbers, starts: Numbers) -> Numbers:
    """Axes that are read whole may repeat themselves; so may those of the numbers."""
    form, window, mode = (params[k] for k in ("dimension_numbers", "slice_sizes", "mode"))
    batching = list(zip(form.operand_batching_dims, form.start_indices_batching_dims, strict=True))
    read = [i for i in range(x.ndim) if window[i] != x.shape[i] or i in form.start_index_map]
    x = x.written_out([*read, *(i for i, _ in batching)])
    starts = starts.written_out([starts.ndim - 1, *(i for _, i in batching)])
    begin, inside = _places(starts.period, form.start_index_map, x.shape, window, batching)
    if not math.prod(x.shape):
        begin = [np.zeros_like(b) for b in begin]
    for axis, size in enumerate(x.shape):
        begin[axis] = np.clip(begin[axis], 0, max(size - window[axis], 0))
    kept = [x.period.shape[i] if i not in read else window[i] for i in range(x.ndim)]
    made = x.period[tuple(_grid(begin, window, kept))]
    if mode == FILL:
        fill = params["fill_value"]
        if fill is None:
            fill = np.nan if x.period.dtype.kind in "fc" else _extreme(x.period.dtype)
        made = np.where(inside.reshape(inside.shape + (1,) * x.ndim), made, fill)
    rank = inside.ndim
    gone = (*form.collapsed_slice_dims, *form.operand_batching_dims)
    made = made.reshape(inside.shape + tuple(n for i, n in enumerate(kept) if i not in gone))
    shape = starts.shape[:-1] + tuple(n for i, n in enumerate(window) if i not in gone)
    sources = (*starts.sources[:-1], *(x.sources[i] for i in range(x.ndim) if i not in gone))
    order = _places_of(rank, form.offset_dims, len(shape))
    return x.like(
        np.transpose(made, order), tuple(shape[i] for i in order), tuple(sources[i] for i in order)
    )


def _extreme(dtype: Any) -> Any:
    return (
        dtype.type(True)
        if dtype.kind == "b"
        else np.iinfo(dtype).max
        if dtype.kind == "u"
        else (np.iinfo(dtype).min)
    )


def _places_of(batch: int, offset: Sequence[int], rank: int) -> list[int]:
    """The permutation that puts window axes, which come last, at ``offset``."""
    first, last = iter(range(batch)), iter(range(batch, rank))
    return [next(last) if i in offset else next(first) for i in range(rank)]


def _scattered(function: Callable[..., Any], linear: bool) -> Callable[..., Numbers]:
    def scatter(params: Params, x: Numbers, starts: Numbers, new: Numbers) -> Numbers:
        form, mode = params["dimension_numbers"], params["mode"]
        batching = list(
            zip(form.operand_batching_dims, form.scatter_indices_batching_dims, strict=True)
        )
        whole, at, values = x.full(), starts.full(), new.full()
        gone = (*form.inserted_window_dims, *form.operand_batching_dims)
        rest = iter(form.update_window_dims)
        window = [1 if i in gone else new.shape[next(rest)] for i in range(x.ndim)]
        begin, inside = _places(at, form.scatter_dims_to_operand_dims, x.shape, window, batching)
        if mode == CLIP:
            begin = [
                np.clip(b, 0, size - part)
                for b, size, part in zip(begin, x.shape, window, strict=True)
            ]
            inside = np.ones_like(inside)
        first = [i for i in range(new.ndim) if i not in form.update_window_dims]
        values = np.transpose(values, [*first, *form.update_window_dims])
        values = values.reshape(inside.shape + tuple(window))
        grid = np.broadcast_arrays(*_grid(begin, window, window))
        made = np.array(whole, np.result_type(whole, values) if linear else whole.dtype)
        kept = tuple(g[inside] for g in grid)
        if 0 not in x.shape:
            function(made, kept, values[inside])
        return x.like(made, x.shape, (NOWHERE,) * x.ndim)

    return scatter


def _set(made: Array, at: Any, values: Array) -> None:
    made[at] = values


SCATTERS = {
    "scatter": (_set, True), "scatter-add": (np.add.at, True), "scatter_add": (np.add.at, True),
    "scatter-mul": (np.multiply.at, True), "scatter_mul": (np.multiply.at, True),
    "scatter-min": (np.minimum.at, False), "scatter_min": (np.minimum.at, False),
    "scatter-max": (np.maximum.at, False), "scatter_max": (np.maximum.at, False),
}  # fmt: skip
for _name, (_function, _linear) in SCATTERS.items():
    rule(_name)(_scattered(_function, _linear))
