"""Shapes and positions: what only moves, repeats or picks entries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fcjax.numbers.periodic import NOWHERE, Array, Numbers, Sources, aligned, as_numbers, stored
from fcjax.numbers.rules import Params, rule

__all__ = ["broadcast", "concatenate", "padded", "reshape", "sliced", "transpose"]


# --- axes ---------------------------------------------------------------------------------------


def transpose(x: Numbers, permutation: Sequence[int]) -> Numbers:
    """Reorders the axes."""
    return x.like(
        np.transpose(x.period, permutation),
        tuple(x.shape[i] for i in permutation),
        tuple(x.sources[i] for i in permutation),
    )


def broadcast(x: Numbers, shape: Sequence[int], positions: Sequence[int]) -> Numbers:
    """Puts axis i at ``positions[i]`` of ``shape``; other axes are repeated."""
    sizes, sources = [1] * len(shape), [NOWHERE] * len(shape)
    for axis, position in enumerate(positions):
        sizes[position] = x.period.shape[axis]
        sources[position] = x.sources[axis]
    if 0 in shape:
        return x.like(np.zeros(shape, x.period.dtype), tuple(shape), tuple(sources))
    return x.like(x.period.reshape(sizes), tuple(shape), tuple(sources))


def reshape(x: Numbers, shape: Sequence[int]) -> Numbers:
    """A row-major reshape, group by group of axes that stay together."""
    shape = tuple(shape)
    if x.shape == shape:
        return x
    if 0 in shape:
        full = np.zeros(shape, x.period.dtype)
        return x.like(full, shape, (NOWHERE,) * len(shape))
    for old, new in _groups(x.shape, shape):
        if len(old) > 1 or (len(new) != 1 and old):
            x = _regroupable(x, old, [shape[i] for i in new])
    sizes: list[int] = []
    sources: list[Sources] = []
    for old, new in _groups(x.shape, shape):
        joined = frozenset().union(*(x.sources[i] for i in old))
        period = _merged_period(x, old)
        sizes += _split_period(period, [shape[i] for i in new])
        sources += [joined] * len(new)
    return x.like(x.period.reshape(sizes), shape, tuple(sources))


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest runs of axes of two shapes with the same number of entries, in order."""
    i = j = 0
    while i < len(old) or j < len(new):
        own: list[int] = []
        other: list[int] = []
        a = b = 1
        while True:
            if a == b and (own or other):
                break
            if (a <= b and i < len(old)) or j >= len(new):
                a *= old[i]
                own.append(i)
                i += 1
            else:
                b *= new[j]
                other.append(j)
                j += 1
        yield own, other


def _regroupable(x: Numbers, old: Sequence[int], new: Sequence[int]) -> Numbers:
    """The same with as much of some axes written out as keeps a period when they are regrouped."""
    first = next((i for i in old if x.period.shape[i] > 1), None)
    if first is None:
        return x
    whole = [i for i in old if i > first and x.shape[i] != x.period.shape[i]]
    x = _filled(x, whole)
    leading = math.prod(x.shape[i] for i in old if i < first)
    if leading > 1 and x.shape[first] % x.period.shape[first]:
        x = _filled(x, [first])
    period = _merged_period(x, old)
    total = math.prod(new)
    fits = period == total or (total % period == 0 and _split_period(period, new, strict=False))
    return x if fits else _filled(x, [i for i in old if x.period.shape[i] != x.shape[i]])


def _filled(x: Numbers, axes: Sequence[int]) -> Numbers:
    """Some axes in full, though nothing looks at their positions."""
    for axis in axes:
        x = x.entrywise(np.ascontiguousarray(x.repeating(axis, x.shape[axis])))
    return x


def _merged_period(x: Numbers, axes: Sequence[int]) -> int:
    return math.prod(x.period.shape[i] for i in axes)


def _split_period(period: int, sizes: Sequence[int], *, strict: bool = True) -> list[int]:
    """The periods of the axes that one with a period is split into; none if there are no such."""
    made: list[int] = []
    left = period
    for size in reversed(sizes):
        here = size if left % size == 0 else left
        if here != size and (size % here and len(made) + 1 < len(sizes)):
            assert not strict
            return []
        made.append(here)
        left //= here
    if left != 1:
        assert not strict
        return []
    return made[::-1]


@rule("transpose")
def _transpose(params: Params, x: Numbers) -> Numbers:
    return transpose(x, params["permutation"])


@rule("broadcast_in_dim")
def _broadcast(params: Params, x: Numbers, *dynamic: Numbers) -> Numbers:
    return broadcast(x, params["shape"], params["broadcast_dimensions"])


@rule("reshape")
def _reshape(params: Params, x: Numbers) -> Numbers:
    if params.get("dimensions") is not None:
        x = transpose(x, params["dimensions"])
    return reshape(x, params["new_sizes"])


@rule("squeeze")
def _squeeze(params: Params, x: Numbers) -> Numbers:
    gone = {axis % x.ndim for axis in params["dimensions"]}
    return reshape(x, [size for i, size in enumerate(x.shape) if i not in gone])


@rule("expand_dims")
def _expand_dims(params: Params, x: Numbers) -> Numbers:
    shape = list(x.shape)
    for axis in sorted(params["dimensions"]):
        shape.insert(axis, 1)
    return reshape(x, shape)


# --- positions ----------------------------------------------------------------------------------


def sliced(
    x: Numbers, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int] | None = None
) -> Numbers:
    """``x[start:limit:stride]`` along every axis."""
    cuts = list(zip(starts, limits, strides or (1,) * x.ndim, strict=True))
    axes = [i for i, cut in enumerate(cuts) if cut != (0, x.shape[i], 1)]
    x = x.written_out(axes)
    at = tuple(slice(*cuts[i]) if i in axes else slice(None) for i in range(x.ndim))
    shape = tuple(len(range(*cut)) for cut in cuts)
    return x.like(x.period[at], shape, x.sources)


def concatenate(arrays: Sequence[Any], axis: int) -> Numbers:
    """Joins along an axis."""
    like = next(x for x in arrays if isinstance(x, Numbers))
    parts = [as_numbers(x, like).written_out([axis]) for x in arrays]
    periods, _, sources = aligned(parts, apart=(axis,))
    wide = np.broadcast_shapes(*(_without(p.shape, axis) for p in periods))
    period = np.concatenate(
        [np.broadcast_to(p, (*wide[:axis], p.shape[axis], *wide[axis:])) for p in periods], axis
    )
    first = parts[0].shape
    shape = (*first[:axis], sum(x.shape[axis] for x in parts), *first[axis + 1 :])
    return like.like(period, shape, sources, parts[0].dtype)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def padded(x: Numbers, value: Any, config: Sequence[tuple[int, int, int]]) -> Numbers:
    """``lax.pad``: further entries before, behind and between those of an axis, or fewer."""
    axes = [i for i, own in enumerate(config) if own != (0, 0, 0)]
    x = x.written_out(axes)
    fill = as_numbers(value, x).full()
    shape, period = list(x.shape), x.period
    for axis in axes:
        low, high, between = config[axis]
        at = low + (between + 1) * np.arange(shape[axis])
        shape[axis] = max(low + high + shape[axis] + between * max(shape[axis] - 1, 0), 0)
        inside = (at >= 0) & (at < shape[axis])
        wide = np.full(
            _resized(period.shape, axis, shape[axis]), fill, np.result_type(fill, period)
        )
        wide[_along(axis, at[inside])] = period[_along(axis, inside)]
        period = wide
    return x.like(period, tuple(shape), x.sources)


def _along(axis: int, which: Any) -> tuple[Any, ...]:
    return (*(slice(None),) * axis, which)


def _resized(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


@rule("slice")
def _slice(params: Params, x: Numbers) -> Numbers:
    return sliced(x, params["start_indices"], params["limit_indices"], params["strides"])


@rule("split")
def _split(params: Params, x: Numbers) -> list[Numbers]:
    axis, ends = params["axis"], list(itertools.accumulate(params["sizes"]))
    made = []
    for end, size in zip(ends, params["sizes"], strict=True):
        starts, limits = [0] * x.ndim, list(x.shape)
        starts[axis], limits[axis] = end - size, end
        made.append(sliced(x, starts, limits))
    return made


@rule("concatenate")
def _concatenate(params: Params, *arrays: Numbers) -> Numbers:
    return concatenate(arrays, params["dimension"])


@rule("stack")
def _stack(params: Params, *arrays: Numbers) -> Numbers:
    axis = params["axis"] % (arrays[0].ndim + 1)
    wide = (*arrays[0].shape[:axis], 1, *arrays[0].shape[axis:])
    return concatenate([reshape(x, wide) for x in arrays], axis)


@rule("unstack")
def _unstack(params: Params, x: Numbers) -> list[Numbers]:
    axis = params["axis"] % x.ndim
    parts = []
    for k in range(x.shape[axis]):
        starts, limits = [0] * x.ndim, list(x.shape)
        starts[axis], limits[axis] = k, k + 1
        parts.append(reshape(sliced(x, starts, limits), _without(x.shape, axis)))
    return parts


@rule("tile")
def _tile(params: Params, x: Numbers) -> Numbers:
    repeats = params["reps"]
    x = _filled(x, [i for i, n in enumerate(repeats) if n > 1])
    shape = tuple(size * n for size, n in zip(x.shape, repeats, strict=True))
    return x.like(x.period, shape, x.sources)


@rule("pad")
def _pad(params: Params, x: Numbers, value: Numbers) -> Numbers:
    return padded(
        x, value, [(int(lo), int(hi), int(by)) for lo, hi, by in params["padding_config"]]
    )


@rule("rev")
def _rev(params: Params, x: Numbers) -> Numbers:
    axes = params["dimensions"]
    x = x.written_out(axes)
    return x.entrywise(np.flip(x.period, axes))


@rule("iota")
def _iota(params: Params, *dynamic: Any) -> Array:
    shape, axis = params["shape"], params["dimension"]
    along = [size if i == axis else 1 for i, size in enumerate(shape)]
    row = stored(np.arange(shape[axis] if shape else 1), params["dtype"]).reshape(along)
    return np.broadcast_to(row.astype(row.dtype), shape)


@rule("dynamic_slice")
def _dynamic_slice(params: Params, x: Numbers, *starts: Numbers) -> Numbers:
    sizes = params["slice_sizes"]
    begin = [
        min(max(int(s.period.reshape(-1)[0].real), 0), n - size)
        for s, n, size in zip(starts, x.shape, sizes, strict=True)
    ]
    return sliced(x, begin, [b + size for b, size in zip(begin, sizes, strict=True)])


@rule("dynamic_update_slice")
def _dynamic_update_slice(params: Params, x: Numbers, new: Numbers, *starts: Numbers) -> Numbers:
    axes = [i for i in range(x.ndim) if x.shape[i] != new.shape[i]]
    x, new = x.written_out(axes), new.written_out(axes)
    (whole, part), _, sources = aligned([x, new], apart=axes)
    begin = [int(s.period.reshape(-1)[0].real) for s in starts]
    at = tuple(
        slice(b := min(max(begin[i], 0), x.shape[i] - n), b + n) if i in axes else slice(None)
        for i, n in enumerate(new.shape)
    )
    common = [max(a, b) for a, b in zip(whole.shape, part.shape, strict=True)]
    size = [x.shape[i] if i in axes else n for i, n in enumerate(common)]
    made = np.array(np.broadcast_to(whole, size), np.result_type(whole, part))
    made[at] = part
    return x.like(made, x.shape, sources)
