"""Index arithmetic of convolutions, padding and slices, on integers alone.

Each is an affine relation between indices, ``sum(by * index) + offset == 0``: an array is read at
``i`` for the result's ``o`` and the kernel's ``k`` where

    ``spread * i = stride * o + dilation * k - low``

(lhs dilation, stride, rhs dilation, low padding), and what lies outside is zero. Two relations in a
row, summed over the index between them, are again one relation exactly if every solution of the
joined equation passes through an index that exists: an integer within range. All sizes are static,
so this is decided by enumeration, not by a list of cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["always_solved", "as_view", "inside", "joins_exactly", "tap_grid", "values"]

Integers = np.ndarray[Any, np.dtype[np.int64]]
Steps = Iterable[tuple[int, int]]


def values(steps: Steps, offset: int) -> Integers:
    """What ``sum(by * index) + offset`` can be, each value once, in ascending order.

    Args:
      steps: for each index its size and what it is multiplied by.
      offset: a constant.

    Example:
      >>> values([(3, 1), (2, 4)], -1).tolist()
      [-1, 0, 1, 3, 4, 5]
    """
    found = np.array([offset], np.int64)
    for size, by in steps:
        found = np.unique(found[:, None] + by * np.arange(size, dtype=np.int64))
    return found


def joins_exactly(first: Integers, a: int, second: Integers, b: int, size: int) -> bool:
    """Whether ``b * first == a * second`` already means that ``first + a j = second + b j = 0``.

    Args:
      first: what the rest of the first relation can be.
      a: what j is multiplied by in the first relation.
      second: the same for the second relation.
      b: likewise.
      size: j is one of ``0, ..., size - 1``.

    Example:
      Two convolutions with three taps, the second over five values padded by one on both sides:
      for the first output it reads the value at -1, which is zero, but not what its inputs give.

      >>> reads_of_first = values([(7, 1), (3, -1)], 0)  # i - k, j = i - k
      >>> reads_of_second = values([(5, -1), (3, -1)], 1)  # j = o + l - 1
      >>> joins_exactly(reads_of_first, -1, reads_of_second, 1, 5)
      False
    """
    return bool(np.all(_exist(np.intersect1d(b * first, a * second), -a * b, size)))


def always_solved(rest: Integers, by: int, size: int) -> bool:
    """Whether ``rest + by * j == 0`` has a solution in ``0, ..., size - 1`` for every rest."""
    return bool(np.all(_exist(rest, -by, size)))


def _exist(products: Integers, by: int, size: int) -> Any:
    """Which products are ``by * j`` for some j in ``0, ..., size - 1``."""
    return (products % by == 0) & (products // by >= 0) & (products // by < size)


def as_view(by: int, size: int, other: int, count: int, offset: int) -> tuple[int, int] | None:
    """Where ``by * p + other * q + offset == 0`` makes p a slice that q runs through.

    Returns:
      ``(start, step)`` with ``p = start + step * q`` and ``0 <= p < size`` for all of the ``count``
      values of q, or None.

    Example:
      >>> as_view(1, 8, -2, 3, -1)  # p = 2 q + 1 is the slice [1:6:2]
      (1, 2)
      >>> as_view(1, 4, -2, 3, -1) is None  # it would end outside
      True
    """
    if offset % by or other % by:
        return None
    start, step = -offset // by, -other // by
    inside = start >= 0 and start + step * (count - 1) < size
    return (start, step) if step > 0 and inside else None


def inside(by: int, size: int, other: int, count: int, offset: int) -> tuple[int, int]:
    """Which p of ``by * p + other * q + offset == 0`` have their q among ``0, ..., count - 1``.

    Returns:
      the first, and how many there are in a row; some of them may have no q at all.

    Example:
      >>> inside(2, 4, -1, 5, -1)  # q = 2 p - 1 is -1, 1, 3, 5
      (1, 2)
    """
    q = -(by * np.arange(size) + offset) / other
    (found,) = np.nonzero((q >= 0) & (q <= count - 1))
    return (int(found[0]), len(found)) if len(found) else (0, 0)


def tap_grid(positions: Iterable[Integers]) -> tuple[int, int, int]:
    """The coarsest grid ``low + dilation * t`` of ``count`` points that holds all positions.

    Returns:
      ``(low, dilation, count)``.

    Example:
      >>> tap_grid([values([(3, 2)], -2), values([], 0)])
      (-2, 2, 3)
    """
    every = np.unique(np.concatenate(list(positions)))
    low = int(every[0])
    dilation = math.gcd(*(every - low).tolist()) or 1
    return low, dilation, int(every[-1] - low) // dilation + 1
