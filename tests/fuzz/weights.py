"""Weights: how they begin, and in which forms steps read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from .domains import Among
from .dtypes import alias

if TYPE_CHECKING:
    from .writing import Context

GENERAL = {
    "source": Among((
        "own", "constant", "stopped", "tied", "transposed", "doubled", "quantised", "narrower",
        "mixed", "integer",
    )),
    "init": Among(("normal", "offset", "ones", "zeros", "small", "orthogonal", "equal", "tiny")),
}  # fmt: skip
"""Arguments that any step has that reads weights."""


def sourced(b: Context, shape: tuple[int, ...], dtype: Any, init: str | None) -> str:
    """Text for a weight of a step, as its ``source`` says."""
    source = b.general("source")
    begin = _begin(b, b.general("init") if init is None else init, dtype)
    if source in ("tied", "transposed"):
        found = _other(b, shape if source == "tied" else shape[::-1], dtype)
        return found + (".T" if source == "transposed" else "") if found else begin(shape)
    return SOURCES.get(source, lambda b, begin, shape, dtype: begin(shape))(b, begin, shape, dtype)


def _begin(b: Context, init: str, dtype: Any) -> Callable[..., str]:
    """Makes a new weight of a shape."""
    inits = INITS | {"equal": lambda shape: _equal(b, shape, dtype)}

    def begin(shape: tuple[int, ...], other: Any = None) -> str:
        made = jnp.dtype(dtype if other is None else other)
        return b.writer.weight(lambda full: typed(inits[init](full), full, made), shape, made)

    return begin


def typed(text: str, shape: tuple[int, ...], dtype: Any) -> str:
    """Text for a numpy array in some type."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        text = f"{text} + 0.5j * normal({shape})"
    return text if dtype == jnp.float64 else f"({text}).astype({alias(dtype)})"


def _normal(shape: tuple[int, ...]) -> str:
    fan = max(math.prod(shape[:-1]), 1)
    return f"normal({shape})" if fan == 1 else f"{fan**-0.5:.2g} * normal({shape})"


INITS: dict[str, Callable[[tuple[int, ...]], str]] = {
    "normal": _normal,
    "offset": lambda shape: f"1 + 0.3 * normal({shape})",
    "ones": lambda shape: f"np.ones({shape})",
    "zeros": lambda shape: f"np.zeros({shape})",
    "small": lambda shape: f"1e-3 * normal({shape})",
    "tiny": lambda shape: f"1e-6 * normal({shape})",
    "orthogonal": lambda shape: (
        f"orthogonal(normal({shape}))" if len(shape) == 2 and 0 not in shape else _normal(shape)
    ),
}


def _equal(b: Context, shape: tuple[int, ...], dtype: Any) -> str:
    """The magnitudes of an earlier weight, with other signs."""
    found = _other(b, shape, dtype)
    return f"np.sign(normal({shape})) * {found}" if found else INITS["offset"](shape)


def _other(b: Context, shape: tuple[int, ...], dtype: Any) -> str | None:
    """The latest weight of a shape."""
    tables = b.writer.tables
    found = [n for n in tables.weights if tables.shapes[n] == (tuple(shape), dtype)]
    return f'p["{found[-1]}"]' if found else None


def _integer(b: Context, _: Any, shape: tuple[int, ...], dtype: Any) -> str:
    del dtype
    integers = jnp.dtype("int32")
    drawn = lambda full: f"rng.integers(-2, 3, {full}).astype(i32)"  # noqa: E731
    return b.writer.weight(drawn, shape, integers)


def _constant(b: Context, _: Any, shape: tuple[int, ...], dtype: Any) -> str:
    return b.constant(typed(_normal(shape), shape, dtype), shape, dtype)


def _wrapped(text: str) -> Callable[..., str]:
    return lambda b, begin, shape, dtype: text.format(begin(shape), alias(dtype))


def _narrow(text: str) -> Callable[..., str]:
    """A weight that is stored in a narrower type than the one it is met in."""

    def write(b: Context, begin: Any, shape: tuple[int, ...], dtype: Any) -> str:
        narrower = jnp.float32 if dtype == jnp.float64 else jnp.bfloat16
        real = jnp.issubdtype(dtype, jnp.floating)
        return text.format(begin(shape, narrower if real else dtype), alias(dtype))

    return write


SOURCES: dict[str, Callable[..., str]] = {
    "constant": _constant,
    "stopped": _wrapped("lax.stop_gradient({0})"),
    "doubled": _wrapped("({0} + 0.5 * {0})"),
    "quantised": _wrapped("quantised({0})"),
    "narrower": _narrow("{0}.astype({1})"),
    "mixed": _narrow("{0}"),
    "integer": _integer,
}
