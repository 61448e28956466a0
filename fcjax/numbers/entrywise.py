"""Functions of each entry, by numpy.

Analytic functions pass on imaginary parts, which carry derivatives, by themselves; where a function
has pieces the real parts choose the piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fcjax.numbers.periodic import STEP, Array, Numbers, aligned, as_numbers
from fcjax.numbers.rules import Params, rule

__all__ = ["cast", "combined", "rounded"]

Function = Callable[..., Any]


def combined(function: Function, arrays: Sequence[Any], dtype: Any = None) -> Numbers:
    """A function of the entries of arrays of one shape; axes of size 1 are repeated."""
    like = next(x for x in arrays if isinstance(x, Numbers))
    periods, shape, sources = aligned([as_numbers(x, like) for x in arrays])
    with np.errstate(all="ignore"):
        made = function(*periods)
    return like.like(made, shape, sources, like.dtype if dtype is None else dtype)


def _register(functions: dict[str, Function], dtype: Any = None) -> None:
    for name, function in functions.items():

        @rule(name)
        def apply(
            params: Params, *arrays: Numbers, function: Function = function, name: str = name
        ) -> Numbers:
            if jnp.issubdtype(arrays[0].dtype, jnp.complexfloating):
                return combined(COMPLEX.get(name, function), arrays, dtype)
            return combined(function, arrays, dtype)


COMPLEX: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "sign": lambda x: np.where(x == 0, 0, x / np.where(x == 0, 1, np.abs(x))),
    "pow": np.power,
}
"""What complex numbers need, whose imaginary parts are no derivatives."""


# --- arithmetic ---------------------------------------------------------------------------------

_erf = np.vectorize(math.erf, otypes=[float])
_erfc = np.vectorize(math.erfc, otypes=[float])


def _with_derivative(function: Function, derivative: Function) -> Function:
    """A real function that numpy cannot take of complex numbers."""

    def made(x: Array) -> Array:
        if not np.iscomplexobj(x):
            return function(x)
        return function(x.real) + 1j * derivative(x.real) * x.imag

    return made


def _bell(x: Array) -> Array:
    return 2 / math.sqrt(math.pi) * np.exp(-np.square(x))


def _chosen(larger: bool) -> Function:
    def choose(a: Array, b: Array) -> Array:
        if not (np.iscomplexobj(a) or np.iscomplexobj(b)):
            return np.maximum(a, b) if larger else np.minimum(a, b)
        first = a.real > b.real if larger else a.real < b.real
        first = first | np.isnan(a.real)
        tie = np.where(a.real == b.real, (a + b) / 2, b)  # jax shares the cotangent of equals
        return np.where(first, a, tie)

    return choose


def _abs(x: Array) -> Array:
    return np.where(x.real < 0, -x, x)


def _remainder(a: Array, b: Array) -> Array:
    if a.dtype.kind in "iu":
        return np.where(
            b == 0, -1 if a.dtype.kind == "i" else a, np.fmod(a, np.where(b == 0, 1, b))
        )
    return a - b * np.trunc(a.real / b.real)


def _quotient(a: Array, b: Array) -> Array:
    if a.dtype.kind not in "iu":
        return a / b
    whole = np.abs(a) // np.abs(np.where(b == 0, 1, b))
    return np.where(b == 0, -1, whole * np.sign(a) * np.sign(b)).astype(a.dtype)


def _power(a: Array, b: Array) -> Array:
    if np.iscomplexobj(a) and not np.iscomplexobj(b) and np.all(b == np.round(b)):
        return _integer_powers(a, b)
    if np.iscomplexobj(a) or np.iscomplexobj(b):
        real = np.power(a.real, b.real)
        slope = b.real * np.power(a.real, b.real - 1) * a.imag
        slope = slope + np.where(b.imag == 0, 0, real * np.log(a.real) * b.imag)
        return real + 1j * slope
    return np.power(a, b)


def _integer_powers(a: Array, b: Array) -> Array:
    slope = np.where(b == 0, 0, b * np.power(a.real, np.where(b == 0, 1, b) - 1.0) * a.imag)
    return np.power(a.real, b.astype(float)) + 1j * slope


def _above(lowest: float, function: Function) -> Function:
    """A function that real numbers below ``lowest`` are outside of."""

    def made(x: Array) -> Array:
        derived = np.iscomplexobj(x) and bool(np.all(np.abs(x.imag) < 1e-9 * (1 + np.abs(x.real))))
        return np.where(x.real < lowest, np.nan, function(x)) if derived else function(x)

    return made


def _sign(x: Array) -> Array:
    return np.sign(x.real) if np.iscomplexobj(x) else np.sign(x)


def _real(function: Function) -> Function:
    """A function that is constant between its jumps."""
    return lambda *arrays: function(*(x.real if np.iscomplexobj(x) else x for x in arrays))


_register(
    {
        "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply,
        "div": _quotient, "rem": _remainder, "pow": _power, "max": _chosen(True),
        "min": _chosen(False), "neg": np.negative, "sign": _sign,
        "square": np.square, "sqrt": _above(0, np.sqrt),
        "rsqrt": _above(0, lambda x: 1 / np.sqrt(x)),
        "cbrt": _with_derivative(np.cbrt, lambda x: np.cbrt(x) / (3 * x)), "exp": np.exp,
        "exp2": np.exp2, "expm1": np.expm1, "log": _above(0, np.log), "log1p": _above(-1, np.log1p),
        "sin": np.sin,
        "cos": np.cos, "tan": np.tan, "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh,
        "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "asinh": np.arcsinh,
        "acosh": np.arccosh, "atanh": np.arctanh, "atan2": _real(np.arctan2),
        "logistic": lambda x: 1 / (1 + np.exp(-x)),
        "erf": _with_derivative(_erf, _bell), "erfc": _with_derivative(_erfc, lambda x: -_bell(x)),
        "floor": _real(np.floor), "ceil": _real(np.ceil),
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        "not": lambda x: np.logical_not(x) if x.dtype == bool else np.invert(x),
        "shift_left": lambda a, b: np.left_shift(a, b),
        "shift_right_arithmetic": lambda a, b: np.right_shift(a, b),
        "copy": np.asarray, "copy_p": np.asarray, "stop_gradient": _real(np.asarray),
    }
)  # fmt: skip
_register(
    {
        "eq": _real(np.equal), "ne": _real(np.not_equal), "lt": _real(np.less),
        "le": _real(np.less_equal), "gt": _real(np.greater), "ge": _real(np.greater_equal),
        "is_finite": _real(np.isfinite),
    },
    bool,
)  # fmt: skip


@rule("integer_pow")
def _integer_pow(params: Params, x: Numbers) -> Numbers:
    return combined(lambda a: a ** params["y"], [x])


@rule("round")
def _round(params: Params, x: Numbers) -> Numbers:
    if int(params["rounding_method"]) == 1:  # to nearest, ties to even
        return combined(_real(np.round), [x])
    return combined(_real(lambda a: np.trunc(a + np.copysign(0.5, a))), [x])


@rule("clamp")
def _clamp(params: Params, low: Numbers, x: Numbers, high: Numbers) -> Numbers:
    return combined(
        lambda a, b, c: np.where(b.real < a.real, a, np.where(b.real > c.real, c, b)),
        [low, x, high],
    )


@rule("select_n")
def _select(params: Params, which: Numbers, *cases: Numbers) -> Numbers:
    dtype = cases[0].dtype

    def choose(which: Array, *cases: Array) -> Array:
        if len(cases) == 2:
            return np.where(which.astype(bool), cases[1], cases[0])
        return np.select([which == i for i in range(len(cases))], list(cases))

    return combined(choose, [which, *cases], dtype)


# --- other dtypes -------------------------------------------------------------------------------


@rule("abs")
def _absolute(params: Params, x: Numbers) -> Numbers:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return combined(np.abs, [x], jnp.finfo(x.dtype).dtype)
    return combined(_abs, [x])


@rule("real")
def _real_part(params: Params, x: Numbers) -> Numbers:
    return combined(np.real, [x], jnp.finfo(x.dtype).dtype)


@rule("imag")
def _imaginary_part(params: Params, x: Numbers) -> Numbers:
    return combined(np.imag, [x], jnp.finfo(x.dtype).dtype)


@rule("conj")
def _conj(params: Params, x: Numbers) -> Numbers:
    return combined(np.conj, [x], jnp.result_type(x.dtype, jnp.complex64))


@rule("complex")
def _complex(params: Params, a: Numbers, b: Numbers) -> Numbers:
    dtype = jnp.complex64 if a.dtype == jnp.float32 else jnp.complex128
    return combined(lambda x, y: x.real + 1j * y.real, [a, b], np.dtype(dtype))


@rule("convert_element_type")
def _converted(params: Params, x: Numbers) -> Numbers:
    return cast(x, params["new_dtype"])


def cast(x: Numbers, dtype: Any) -> Numbers:
    """Another dtype."""
    narrower = rounded if x.run.rounds else _unrounded
    return combined(lambda a: _cast(a, x.dtype, dtype, narrower), [x], np.dtype(dtype))


def _unrounded(array: Array, dtype: Any) -> Array:
    return array


@rule("reduce_precision")
def _reduced(params: Params, x: Numbers) -> Numbers:
    if not x.run.rounds:
        return x
    bits, exponents = params["mantissa_bits"], params["exponent_bits"]
    return combined(lambda a: _in_parts(a, lambda b: _fewer_bits(b, bits, exponents)), [x])


def _fewer_bits(array: Array, mantissa: int, exponent: int) -> Array:
    """Numbers of so many bits: the nearest, infinite if too large, zero if too small."""
    digits, power = np.frexp(array)
    made = np.ldexp(np.round(np.ldexp(digits, mantissa + 1)), power - mantissa - 1)
    largest = 2 ** (exponent - 1)
    made = np.where(np.abs(made) >= 2.0**largest, np.copysign(np.inf, array), made)
    return np.where(np.abs(made) < 2.0 ** (2 - largest), np.copysign(0.0, array), made)


@rule("optimization_barrier")
def _barrier(params: Params, *arrays: Numbers) -> list[Numbers]:
    return list(arrays)


def _cast(array: Array, old: Any, new: Any, narrower: Function) -> Array:
    floats = [jnp.issubdtype(d, jnp.floating) for d in (old, new)]
    if all(floats):
        held = jnp.finfo(new).nmant >= jnp.finfo(old).nmant
        held = held and jnp.finfo(new).maxexp >= jnp.finfo(old).maxexp
        return array if held else narrower(array, new)
    if jnp.issubdtype(new, jnp.complexfloating):
        return array.real.astype(np.complex128) if floats[0] else array.astype(np.complex128)
    array = array.real if np.iscomplexobj(array) else array
    if floats[1]:
        return rounded(array.astype(np.float64), new)
    if floats[0] and jnp.issubdtype(new, jnp.integer):
        info = jnp.iinfo(new)
        array = np.nan_to_num(
            np.trunc(array), nan=0.0, posinf=float(info.max), neginf=float(info.min)
        )
        high = np.nextafter(float(info.max), 0) if info.bits > 52 else info.max
        return np.clip(array, info.min, high).astype(new)
    return array.astype(new)


def rounded(array: Array, dtype: Any) -> Array:
    """Numbers rounded to those that a float dtype has, and the derivatives that they carry."""
    if np.dtype(dtype) == np.float64:
        return array

    return _in_parts(array, lambda x: x.astype(dtype).astype(np.float64))


def _in_parts(array: Array, nearest: Function) -> Array:
    """What rounds numbers, and the derivatives that they carry."""
    with np.errstate(all="ignore"):
        if np.iscomplexobj(array):
            return nearest(array.real) + 1j * STEP * nearest(array.imag / STEP)
        return nearest(array)
