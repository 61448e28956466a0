"""Convolutions and placings on plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from fcjax.planning.grids import Grid
from fcjax.running.arrays import library

__all__ = ["convolve", "place", "placing"]


def convolve(
    rows: Any, kernel: Any, grids: Sequence[Grid], groups: int, precision: lax.Precision | None
) -> Any:
    """``y[n, o, f] = sum_kc x[n, i, c] Z[k, c, f]`` on a grid for each axis of space.

    Args:
      rows: shape ``(n, *space, groups * c)``.
      kernel: shape ``(*taps, c, groups * f)``.
      grids: ``spread * i = stride * o + dilation * k + low`` for each axis; zero outside.
      groups: the number of groups of channels.
      precision: of the products.

    Returns:
      shape ``(n, *places, groups * f)``.
    """
    n = len(grids)
    pads = [_pads(g) for g in grids]
    if any(g.spread == 1 and g.stride * (g.out.size - 1) >= g.read.size for g in grids):
        # Where more is made than is read, XLA on a CPU takes 40 times as long for the gradient of
        # the kernel (jax 0.10.1 and 0.12), unless the rows are padded by themselves.
        first = [p if g.spread == 1 else (0, 0) for p, g in zip(pads, grids, strict=True)]
        edges = [(0, 0, 0), *((*p, 0) for p in first), (0, 0, 0)]
        rows = library(rows).pad(rows, np.zeros((), rows.dtype), edges)
        pads = [(0, 0) if g.spread == 1 else p for p, g in zip(pads, grids, strict=True)]
    order = (0, n + 1, *range(1, n + 1))
    numbers = lax.ConvDimensionNumbers(order, (n + 1, n, *range(n)), order)
    return library(rows, kernel).conv_general_dilated(
        rows,
        kernel,
        window_strides=[g.stride for g in grids],
        padding=pads,
        lhs_dilation=[g.spread for g in grids],
        rhs_dilation=[g.dilation for g in grids],
        dimension_numbers=numbers,
        feature_group_count=groups,
        precision=precision,
    )


def _pads(grid: Grid) -> tuple[int, int]:
    """Padding that makes as many places as the grid has; none above where none is needed."""
    taps = grid.tap.size if grid.tap is not None else 1
    last = grid.stride * (grid.out.size - 1) + grid.dilation * (taps - 1) + grid.low
    high = last - grid.spread * (grid.read.size - 1)
    return -grid.low, 0 if -grid.stride < high < 0 else high


def placing(
    taps: Sequence[tuple[int, int]],
    summed: Sequence[tuple[int, int]],
    low: int,
    count: int,
    every: int = 1,
) -> np.ndarray[Any, Any]:
    """The array that is 1 where taps stand at a place of a kernel.

    Args:
      taps: for each tap its size and distance.
      summed: the same for taps along which the weights are constant, which are added up.
      low: where the first stands.
      count: the number of places, at ``0, every, 2 * every, ...``.
      every: the distance of two places; what stands between them is left out.

    Returns:
      shape ``(*sizes of taps, count)``, with the number of ways in which a place is reached.

    Example:
      >>> placing([(2, 2)], [(2, 1)], 0, 4)
      array([[1., 1., 0., 0.],
             [0., 0., 1., 1.]])
    """
    steps = (*taps, *summed)
    where = np.indices([size for size, _ in steps])
    stand = low + sum((by * i for (_, by), i in zip(steps, where, strict=True)), np.int64(0))
    made = np.asarray(stand)[..., None] == every * np.arange(count)
    return made.sum(axis=tuple(range(len(taps), len(steps))), dtype=float)


def place(array: Any, axis: int, spread: int, stride: int, offset: int, count: int) -> Any:
    """``y[o] = x[i]`` where ``spread * i = stride * o + offset``, and zero elsewhere.

    Example:
      >>> import jax.numpy as jnp
      >>> place(jnp.array([1.0, 2.0]), 0, 2, 1, -1, 5).tolist()
      [0.0, 1.0, 0.0, 2.0, 0.0]
    """
    last = stride * (count - 1) + offset
    high = last - spread * (array.shape[axis] - 1)
    pads = [(0, 0, 0)] * array.ndim
    pads[axis] = (-offset, high, spread - 1)
    ours = library(array)
    wide = ours.pad(array, np.zeros((), array.dtype), pads)
    strides = [stride if i == axis else 1 for i in range(array.ndim)]
    return ours.slice(wide, [0] * array.ndim, wide.shape, strides)
