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

import jax
import jax.numpy as jnp
import numpy as np

from fcjax.numbers.entrywise import combined
from fcjax.numbers.periodic import STEP, Array, Numbers, Run, aligned
from fcjax.tracing.trace import Value

__all__ = [
    "CLOSE",
    "Draw",
    "apart",
    "differ",
    "less_mean",
    "moving",
    "settled",
    "size",
    "slope",
    "still",
]

POOL = 65537
"""Random numbers that all leaves are cut from: a prime, so that no shape meets them in step."""
PERIODS = range(3, 9)
OTHERWISE = 5
"""How long the period of an axis is that none of ``PERIODS`` divides."""
TINY = 1e-250
"""The size of numbers that are zero; derivatives are ``STEP`` times their size."""
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

    def __call__(self, value: Value) -> Any:
        """Random numbers of a value's shape: floats with random derivatives, small integers."""
        shape, dtype = value.shape, value.aval.dtype
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            return jax.random.split(jax.random.key(self._next), shape)
        keys = [(value, axis) for axis in range(len(shape))]
        sizes = [
            n if k in self._written_out else _period(n) for n, k in zip(shape, keys, strict=True)
        ]
        count = math.prod(sizes)
        self._next = (self._next * 48271) % POOL
        drawn = np.take(_pool(), np.arange(self._next, self._next + count), mode="wrap")
        sources = tuple(frozenset((key,)) for key in keys)
        return Numbers(_of(dtype, drawn.reshape(sizes)), shape, dtype, sources, self.run)


def _of(dtype: Any, drawn: Array) -> Array:
    """Numbers of a dtype; complex ones carry no derivative."""
    if jnp.issubdtype(dtype, jnp.floating):
        return drawn
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return drawn.real + 1j * drawn.imag / STEP
    if jnp.issubdtype(dtype, jnp.bool_):
        return drawn.real > 0
    return np.abs(3 * drawn.real).astype(dtype)


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
    return float(np.abs(period.real).max()), float(np.abs(period.imag).max())


def differ(
    found: Numbers, expected: Numbers, scale: tuple[float, float], close: float = CLOSE
) -> str | None:
    """How far two computations of a value are apart; None if no farther than by rounding.

    Args:
      found: one of them.
      expected: the other.
      scale: the size of the numbers that were added up on the way, and of their derivatives.
      close: how far is not.
    """
    if found.shape != expected.shape:
        return f"its shape is {found.shape}, not {expected.shape}"
    if found.dtype != expected.dtype:
        return f"its dtype is {found.dtype}, not {expected.dtype}"
    value, derivative = apart(found, expected, scale)
    if value > close:
        return f"its value is off by {value:.1g} of its size"
    return f"its derivative is off by {derivative:.1g} of its size" if derivative > close else None


def apart(
    found: Numbers, expected: Numbers, scale: tuple[float, float] | None = None
) -> tuple[float, float]:
    """How far two arrays, and their derivatives, are apart relative to their size.

    What is infinite or no number must be so in both.
    """
    a, b = aligned([found, expected])[0]
    return tuple(
        _apart(part(a), part(b), None if scale is None else scale[i])
        for i, part in enumerate((np.real, np.imag))
    )  # type: ignore[return-value]


def _apart(a: Array, b: Array, scale: float | None) -> float:
    a, b = np.broadcast_arrays(a.astype(float), b.astype(float))
    if not a.size:
        return 0.0
    odd = ~(np.isfinite(a) & np.isfinite(b))
    if odd.any():
        if not np.array_equal(a[odd], b[odd], equal_nan=True):
            return math.inf
        a, b = np.where(odd, 0.0, a), np.where(odd, 0.0, b)
    largest = np.abs(b).max() if scale is None else scale
    return float(np.abs(a - b).max() / max(largest, TINY))


def less_mean(numbers: Numbers, axis: int) -> Numbers:
    """Numbers less their mean over an axis."""
    return combined(np.subtract, [numbers, numbers.mean((axis,), keepdims=True)])


# --- derivatives --------------------------------------------------------------------------------


def still(x: Any) -> Any:
    """Numbers without their derivatives; anything else as it is."""
    return combined(np.real, [x]) if isinstance(x, Numbers) else x


def moving(x: Numbers, by: Array) -> Numbers:
    """Numbers with other derivatives."""
    return combined(lambda a: a.real + 1j * STEP * by, [x])


def slope(x: Any) -> float:
    """The largest derivative; 0 for what has none."""
    if not isinstance(x, Numbers) or not x.period.size or x.period.dtype.kind != "c":
        return 0.0
    return float(np.max(np.abs(x.period.imag)) / STEP)
