"""What programs begin with: their arguments."""

from __future__ import annotations

import jax.numpy as jnp

from .domains import FLAG, Among, Shape
from .dtypes import DTYPES, alias
from .registry import op
from .weights import typed
from .writing import Context

NUMBERS = {
    "normal": "normal({0})",
    "offset": "normal({0}) + 30",
    "apart": "normal({0}) * 3 + 2",
    "positive": "np.abs(normal({0})) + 0.1",
}
"""How the numbers of an input are distributed: their mean can be far from zero."""
DTYPE = Among(("float64", "float32", "bfloat16", "float16", "complex128", "complex64"))


def _data(b: Context, shape: tuple[int, ...], numbers: str, dtype: str = "float64") -> str:
    made = jnp.dtype(dtype)
    return b.input(typed(NUMBERS[numbers].format(shape), shape, made), shape, made)


@op(shape=Shape(0, 4), numbers=Among(tuple(NUMBERS)))
def data(b, *, shape, numbers):
    return _data(b, shape, numbers)


@op(shape=Shape(2, 3), numbers=Among(tuple(NUMBERS)))
def rows(b, *, shape, numbers):
    return _data(b, shape, numbers)


@op(shape=Shape(3, 5), numbers=Among(tuple(NUMBERS)))
def image(b, *, shape, numbers):
    return _data(b, shape, numbers)


@op(shape=Shape(0, 4), numbers=Among(tuple(NUMBERS)), dtype=DTYPE)
def typed_data(b, *, shape, numbers, dtype):
    return _data(b, shape, numbers, dtype)


@op(shape=Shape(0, 3), low=Among((0, -2)), high=Among((2, 4, 9)), narrow=FLAG)
def ids(b, *, shape, low, high, narrow):
    """Row numbers, some of which may lie outside of what is looked up."""
    text, made = f"rng.integers({low}, {high}, {shape})", jnp.dtype("int32" if narrow else "int64")
    return b.input(f"{text}.astype(i32)" if narrow else text, shape, made)


@op(shape=Shape(0, 3))
def flags(b, *, shape):
    return b.input(f"rng.random({shape}) < 0.6", shape, jnp.dtype("bool"))


@op(value=Among((0.7, 3, 0.0, -1, True)))
def number(b, *, value):
    """A Python number, as users pass a temperature or a step."""
    return b.input(repr(value), (), jnp.result_type(value), value)


@op(shape=Shape(0, 3), dtype=Among(("int64", "int32", "int8", "uint8", "bool")))
def whole(b, *, shape, dtype):
    low = 0 if dtype in ("uint8", "bool") else -3
    name = alias(dtype)
    assert name in DTYPES
    return b.input(f"rng.integers({low}, 4, {shape}).astype({name})", shape, jnp.dtype(dtype))
