"""Random numbers for the leaves of a body, and how they are compared.

What a recipe and the equations of its value say are polynomials in their leaves. Two polynomials
that differ do so at almost every point, so one random evaluation refutes a false rewrite (Schwartz
1980, Zippel 1979), and with a random derivative at each leaf also one whose derivative is another.
Axes along which nothing looks at positions repeat themselves after a few numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Set
from typing import Any

import numpy as np

from fcjax.numbers.entrywise import combined
from fcjax.numbers.periodic import STEP, Array, Numbers, Run, aligned
from fcjax.tracing.trace import Value

__all__ = ["Draw", "differ", "settled", "size"]

POOL = 65537
"""Random numbers that all leaves are cut from: a prime, so that no shape meets them in step."""
PERIODS = range(3, 9)
OTHERWISE = 5
"""How long the period of an axis is that none of ``PERIODS`` divides."""
CLOSE = 1e-9
"""By how much, relative to the numbers on the way, two computations in double precision differ."""


@functools.cache
def _pool() -> Array:
    rng = np.random.default_rng(20210610)
    return rng.standard_normal(POOL) + 1j * STEP * rng.standard_normal(POOL)


class Draw:
    """Draws numbers for leaves, different ones for each.

    Attributes:
      run: what all these numbers share.
    """

    def __init__(self, written_out: Set[Hashable]) -> None:
        self.run = Run(rounds=False)
        self._written_out = written_out
        self._next = 1

    def __call__(self, value: Value) -> Numbers:
        """Random numbers of a value's shape, with random derivatives."""
        shape = value.shape
        keys = [(value, axis) for axis in range(len(shape))]
        sizes = [n if k in self._written_out else _period(n) for n, k in zip(shape, keys, strict=True)]
        count = math.prod(sizes)
        self._next = (self._next * 48271) % POOL
        drawn = np.take(_pool(), np.arange(self._next, self._next + count), mode="wrap")
        sources = tuple(frozenset((key,)) for key in keys)
        return Numbers(drawn.reshape(sizes), shape, value.aval.dtype, sources, self.run)


def _period(size: int) -> int:
    """How many numbers an axis repeats itself after."""
    if size <= 4:
        return size
    return next((n for n in PERIODS if size % n == 0), min(size, OTHERWISE))


def settled(evaluate: Callable[[Draw], Any]) -> Any:
    """What an evaluation gives on numbers that tell positions apart wherever it looks at them."""
    known: set[Hashable] = set()
    while True:
        draw = Draw(known)
        found = evaluate(draw)
        if draw.run.looked_at <= known:
            return found
        known |= draw.run.looked_at


# --- comparison ---------------------------------------------------------------------------------


def size(numbers: Numbers) -> tuple[float, float]:
    """The largest number, and the largest derivative."""
    period = numbers.period
    if not period.size:
        return 0.0, 0.0
    return float(np.abs(period.real).max()), float(np.abs(period.imag).max()) / STEP


def differ(found: Numbers, expected: Numbers, scale: tuple[float, float]) -> str | None:
    """How far two computations of a value are apart; None if no farther than by rounding.

    Args:
      found: one of them.
      expected: the other.
      scale: the size of the numbers that were added up on the way, and of their derivatives.
    """
    if found.shape != expected.shape:
        return f"its shape is {found.shape}, not {expected.shape}"
    periods, *_ = aligned([found, expected])
    apart = periods[0] - periods[1]
    if not apart.size:
        return None
    value = float(np.abs(apart.real).max()) / max(scale[0], 1e-300)
    derivative = float(np.abs(apart.imag).max()) / STEP / max(scale[1], 1e-300)
    if not value <= CLOSE:  # also if it is no number
        return f"its value is off by {value:.1g} of its size"
    if not derivative <= CLOSE:
        return f"its derivative is off by {derivative:.1g} of its size"
    return None


def less_mean(numbers: Numbers, axis: int) -> Numbers:
    """Numbers less their mean over an axis."""
    return combined(np.subtract, [numbers, numbers.mean((axis,), keepdims=True)])
