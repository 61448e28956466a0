"""Sums of all kinds: reductions, products, convolutions, pooling, cumulative sums."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fcjax.numbers.layout import padded, reshape, transpose
from fcjax.numbers.periodic import Array, Numbers, counts
from fcjax.numbers.rules import Params, rule

__all__ = ["convolve", "dot_general", "reduce_sum"]


def _left(x: Numbers, period: Array, axes: Sequence[int], dtype: Any = None) -> Numbers:
    """What is left of numbers without some axes."""
    kept = [i for i in range(x.ndim) if i not in axes]
    return x.like(period, tuple(x.shape[i] for i in kept), tuple(x.sources[i] for i in kept), dtype)


def _weights(x: Numbers, axis: int) -> Array | float:
    """How often each entry of a period occurs, to be multiplied with the period."""
    have, size = x.period.shape[axis], x.shape[axis]
    if have == size:
        return 1.0
    if size % have == 0:
        return float(size // have)
    return counts(size, have).reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def reduce_sum(x: Numbers, axes: Sequence[int]) -> Numbers:
    """The sum over some axes."""
    period = x.period
    for axis in axes:
        weights = _weights(x, axis)
        if not isinstance(weights, float) or weights != 1.0:
            period = period * (
                weights if period.dtype.kind in "fc" else np.asarray(weights).astype(period.dtype)
            )
    return _left(x, np.sum(period, tuple(axes), dtype=period.dtype), axes)


@rule("reduce_sum")
def _reduce_sum(params: Params, x: Numbers) -> Numbers:
    return reduce_sum(x, params["axes"])


def _register_reductions(functions: dict[str, Callable[..., Any]], *, repeats: bool) -> None:
    for name, function in functions.items():

        @rule(name)
        def reduce(params: Params, x: Numbers, function: Any = function) -> Numbers:
            axes = tuple(params["axes"])
            x = x if repeats else x.written_out(axes)
            return _left(x, function(x.period, axes), axes)


def _extreme(largest: bool) -> Callable[..., Array]:
    def reduce(period: Array, axes: tuple[int, ...]) -> Array:
        real = period.real if np.iscomplexobj(period) else period
        if not real.size:
            kept = [n for i, n in enumerate(real.shape) if i not in axes]
            return np.full(kept, -np.inf if largest else np.inf)
        found = (np.max if largest else np.min)(real, axes, keepdims=True)
        if real is period:
            return np.squeeze(found, axes)
        at = real == found  # jax shares the cotangent of equals
        shared = np.sum(np.where(at, period.imag, 0), axes, keepdims=True) / np.sum(
            at, axes, keepdims=True
        )
        return np.squeeze(found + 1j * shared, axes)

    return reduce


_register_reductions(
    {
        "reduce_max": _extreme(True), "reduce_min": _extreme(False),
        "reduce_and": np.bitwise_and.reduce, "reduce_or": np.bitwise_or.reduce,
    },
    repeats=True,
)  # fmt: skip
_register_reductions({"reduce_prod": np.prod}, repeats=False)


def _register_positions(functions: dict[str, Callable[..., Any]]) -> None:
    for name, function in functions.items():

        @rule(name)
        def find(params: Params, x: Numbers, function: Any = function) -> Numbers:
            (axis,) = params["axes"]
            x = x.written_out([axis])
            found = function(x.period.real if np.iscomplexobj(x.period) else x.period, axis)
            dtype = np.dtype(params["index_dtype"])
            return _left(x, found.astype(dtype), [axis], dtype)


_register_positions({"argmax": np.argmax, "argmin": np.argmin})


def _register_cumulative(functions: dict[str, Callable[..., Any]]) -> None:
    for name, function in functions.items():

        @rule(name)
        def along(params: Params, x: Numbers, function: Any = function) -> Numbers:
            axis = params["axis"]
            x = x.written_out([axis])
            period = np.flip(x.period, axis) if params["reverse"] else x.period
            made = function(period, axis).astype(x.period.dtype)
            return x.entrywise(np.flip(made, axis) if params["reverse"] else made)


_register_cumulative(
    {
        "cumsum": np.cumsum, "cumprod": np.cumprod,
        "cummax": lambda p, axis: np.maximum.accumulate(p.real, axis),
        "cummin": lambda p, axis: np.minimum.accumulate(p.real, axis),
        "cumlogsumexp": lambda p, axis: np.logaddexp.accumulate(p.real, axis),
    }
)  # fmt: skip


# --- products -----------------------------------------------------------------------------------


def dot_general(a: Numbers, b: Numbers, numbers: Any, dtype: Any = None) -> Numbers:
    """``lax.dot_general``; of repeated axes a period is contracted, by how often it occurs."""
    (sum_a, sum_b), (batch_a, batch_b) = numbers
    free_a = [i for i in range(a.ndim) if i not in (*sum_a, *batch_a)]
    free_b = [i for i in range(b.ndim) if i not in (*sum_b, *batch_b)]
    a = transpose(a, (*batch_a, *free_a, *sum_a))
    b = transpose(b, (*batch_b, *sum_b, *free_b))
    n, k, m = len(batch_a), len(sum_a), len(free_a)
    x, y = a.period, b.period
    for i in range(n):
        x, y = _shared(x, i, y, i, a.shape[i])
    for i in range(k):
        x, y = _counted(x, n + m + i, y, n + i, a.shape[n + m + i])
    batch = [max(p, q) for p, q in zip(x.shape[:n], y.shape[:n], strict=True)]
    rows, columns = x.shape[n : n + m], y.shape[n + k :]
    inside = math.prod(x.shape[n + m :])
    left = x.reshape((*x.shape[:n], math.prod(rows), inside))
    right = y.reshape((*y.shape[:n], inside, math.prod(columns)))
    made = np.matmul(left, right)
    period = made.reshape((*batch, *rows, *columns))
    shape = (*a.shape[: n + m], *b.shape[n + k :])
    sources = (
        *(s | t for s, t in zip(a.sources[:n], b.sources[:n], strict=True)),
        *a.sources[n : n + m], *b.sources[n + k :],
    )  # fmt: skip
    return a.like(period, shape, sources, dtype)


def _shared(x: Array, i: int, y: Array, j: int, size: int) -> tuple[Array, Array]:
    """Two periods of which one axis is the same; where one of them is 1 it stays so."""
    p, q = x.shape[i], y.shape[j]
    if 1 in (p, q) or p == q:
        return x, y
    common = min(math.lcm(p, q), size)
    return _repeated(x, i, common), _repeated(y, j, common)


def _counted(x: Array, i: int, y: Array, j: int, size: int) -> tuple[Array, Array]:
    """Two periods of which an axis is summed together, each entry as often as it occurs."""
    x, y = _shared(x, i, y, j, size)
    common = max(x.shape[i], y.shape[j])
    x, y = _repeated(x, i, common), _repeated(y, j, common)
    if common != size:
        x = x * counts(size, common).reshape([-1 if k == i else 1 for k in range(x.ndim)])
    return x, y


def _repeated(period: Array, axis: int, size: int) -> Array:
    have = period.shape[axis]
    return period if have == size else np.take(period, np.arange(size) % have, axis=axis)


@rule("dot_general")
def _dot_general(params: Params, a: Numbers, b: Numbers) -> Numbers:
    wanted = params.get("preferred_element_type")
    return dot_general(a, b, params["dimension_numbers"], wanted and np.dtype(wanted))


# --- windows ------------------------------------------------------------------------------------


def convolve(
    rows: Numbers, kernel: Numbers, *, window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]], lhs_dilation: Sequence[int], rhs_dilation: Sequence[int],
    dimension_numbers: Any, feature_group_count: int = 1, batch_group_count: int = 1,
    dtype: Any = None,
) -> Numbers:  # fmt: skip
    """``lax.conv_general_dilated``: a sum over taps of products of channels."""
    of_rows, of_kernel, of_out = dimension_numbers
    rows, kernel = transpose(rows, of_rows), transpose(kernel, of_kernel)
    space = range(2, rows.ndim)
    edges = [(lo, hi, by - 1) for (lo, hi), by in zip(padding, lhs_dilation, strict=True)]
    rows = padded(rows, np.zeros(()), [(0, 0, 0), (0, 0, 0), *edges])
    kernel = kernel.written_out(space)
    rows, kernel, groups = _grouped(rows, kernel, feature_group_count, batch_group_count)
    made: Numbers | None = None  # rows: groups, examples, channels, *space
    taps = kernel.shape[3:]
    for tap, part in _seen_by_taps(rows, 3, taps, window_strides, rhs_dilation):
        weight = kernel.period[(slice(None),) * 3 + tap]
        weights = kernel.like(weight, kernel.shape[:3], kernel.sources[:3])
        product = dot_general(part, weights, (((2,), (2,)), ((0,), (0,))))
        made = product if made is None else made.entrywise(made.period + product.period)
    assert made is not None  # groups, examples, *space, out
    made = transpose(made, (1, 0, made.ndim - 1, *range(2, made.ndim - 1)))
    count, _, out, *places = made.shape
    made = reshape(made, (count, groups * out, *places))
    made = transpose(made, [of_out.index(i) for i in range(made.ndim)])
    return made.like(made.period, made.shape, made.sources, dtype)


def _seen_by_taps(
    x: Numbers, first: int, taps: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], Numbers]]:
    """Every tap of a window over the axes from ``first``, with what it sees."""
    x = x.written_out([first + i for i, own in enumerate(taps) if (own, strides[i]) != (1, 1)])
    shape = list(x.shape)
    for i, (own, by, stride) in enumerate(zip(taps, dilations, strides, strict=True)):
        size = shape[first + i]
        shape[first + i] = max((size - by * (own - 1) - 1) // stride + 1, 0) if size else 0
    for tap in np.ndindex(*taps):
        at = [slice(None)] * x.ndim
        for i, (t, by, stride) in enumerate(zip(tap, dilations, strides, strict=True)):
            if (taps[i], stride) != (1, 1):
                last = stride * (shape[first + i] - 1) + 1 if shape[first + i] else 0
                at[first + i] = slice(t * by, t * by + last, stride)
        yield tap, x.like(x.period[tuple(at)], tuple(shape), x.sources)


def _grouped(
    rows: Numbers, kernel: Numbers, of_features: int, of_examples: int
) -> tuple[Numbers, Numbers, int]:
    """Rows ``(groups, examples, channels, *space)``, kernel ``(groups, out, channels, *taps)``."""
    count, channels, *space = rows.shape
    groups = max(of_features, of_examples)
    if of_examples == 1:
        rows = reshape(rows, (count, groups, channels // groups, *space))
        rows = transpose(rows, (1, 0, *range(2, rows.ndim)))
    else:
        rows = reshape(rows, (groups, count // groups, channels, *space))
    out, inside, *taps = kernel.shape
    return rows, reshape(kernel, (groups, out // groups, inside, *taps)), groups


@rule("conv_general_dilated")
def _convolution(params: Params, rows: Numbers, kernel: Numbers) -> Numbers:
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers",
             "feature_group_count", "batch_group_count")  # fmt: skip
    wanted = params.get("preferred_element_type")
    return convolve(
        rows, kernel, dtype=wanted and np.dtype(wanted), **{name: params[name] for name in names}
    )


def _pooled(x: Numbers, params: Params, fill: float, join: Callable[..., Array]) -> Numbers:
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    window, strides, padding, spread, dilation = (params[name] for name in names)
    config = [(lo, hi, by - 1) for (lo, hi), by in zip(padding, spread, strict=True)]
    dtype = x.period.dtype
    if dtype.kind not in "fc" and fill:
        fill = np.iinfo(dtype).min if fill < 0 else np.iinfo(dtype).max
    x = padded(x, np.asarray(fill, dtype), config)
    parts = [part for _, part in _seen_by_taps(x, 0, window, strides, dilation)]
    return parts[0].entrywise(functools.reduce(join, (part.period for part in parts)))


def _larger(a: Array, b: Array) -> Array:
    return np.where(b.real > a.real, b, a) if np.iscomplexobj(a) else np.maximum(a, b)


def _smaller(a: Array, b: Array) -> Array:
    return np.where(b.real < a.real, b, a) if np.iscomplexobj(a) else np.minimum(a, b)


@rule("reduce_window_sum")
def _window_sum(params: Params, x: Numbers) -> Numbers:
    return _pooled(x, params, 0.0, np.add)


@rule("reduce_window_max")
def _window_max(params: Params, x: Numbers) -> Numbers:
    return _pooled(x, params, -np.inf, _larger)


@rule("reduce_window_min")
def _window_min(params: Params, x: Numbers) -> Numbers:
    return _pooled(x, params, np.inf, _smaller)
