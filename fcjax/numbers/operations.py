"""Functions of ``jax.lax``, by the same names and arguments, for numbers.

With the methods that numbers share with other arrays these are all that a recipe is computed by.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fcjax.numbers import sums
from fcjax.numbers.entrywise import cast, combined
from fcjax.numbers.interpreter import Interpreter
from fcjax.numbers.layout import broadcast, concatenate, padded, reshape, sliced, transpose
from fcjax.numbers.periodic import STEP, Numbers, as_numbers
from fcjax.numbers.sums import reduce_sum

__all__ = [
    "broadcast_in_dim",
    "call",
    "combined",
    "concatenate",
    "conv_general_dilated",
    "convert_element_type",
    "dot_general",
    "pad",
    "reduce_sum",
    "reshape",
    "slice",
    "transpose",
]


def convert_element_type(x: Numbers, dtype: Any) -> Numbers:
    """Another dtype, rounded to its numbers."""
    return x if x.dtype == dtype else cast(x, dtype)


def broadcast_in_dim(x: Numbers, shape: Sequence[int], positions: Sequence[int]) -> Numbers:
    """Puts axis i at ``positions[i]`` of ``shape``."""
    return broadcast(x, shape, positions)


def pad(x: Numbers, value: Any, config: Sequence[tuple[int, int, int]]) -> Numbers:
    """Further entries before, behind and between those of an axis, or fewer."""
    return padded(x, value, [(lo, hi, between) for lo, hi, between in config])


def slice(
    x: Numbers, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int] | None = None
) -> Numbers:
    """``x[start:limit:stride]`` along every axis."""
    return sliced(x, starts, limits, strides)


def dot_general(a: Any, b: Any, numbers: Any, precision: Any = None) -> Numbers:
    """Products, summed over axes."""
    a, b = _both(a, b)
    return sums.dot_general(a, b, numbers)


def conv_general_dilated(rows: Any, kernel: Any, *, precision: Any = None, **how: Any) -> Numbers:
    """Convolutions."""
    rows, kernel = _both(rows, kernel)
    return sums.convolve(rows, kernel, **how)


def _both(a: Any, b: Any) -> tuple[Numbers, Numbers]:
    like = a if isinstance(a, Numbers) else b
    return as_numbers(a, like), as_numbers(b, like)


# --- functions with derivatives of their own ----------------------------------------------------


def call(function: Callable[..., Any], args: Any, static: tuple[Any, ...]) -> Numbers:
    """A function of pytrees of numbers, with the derivative that jax takes of it.

    What jax would run is traced, value and tangent, and evaluated.
    """
    leaves, structure = jax.tree.flatten(args, is_leaf=lambda x: isinstance(x, Numbers))
    like = next(x for x in leaves if isinstance(x, Numbers))
    leaves = [as_numbers(x, like) for x in leaves]
    avals = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    jaxpr = _with_tangent(function, structure, avals, static)
    values = [combined(np.real, [x]) for x in leaves]
    tangents = [combined(lambda a: np.imag(a) / STEP, [x]) for x in leaves]
    value, tangent = Interpreter(like.run).evaluate(jaxpr, [*values, *tangents])
    return combined(lambda a, b: a + 1j * STEP * b, [value, tangent])


@functools.lru_cache(maxsize=256)
def _with_tangent(function: Any, structure: Any, avals: Any, static: tuple[Any, ...]) -> Any:
    def of_leaves(*leaves: Any) -> Any:
        return function(*jax.tree.unflatten(structure, leaves), *static)

    def both(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        return jax.jvp(of_leaves, primals, tangents)

    return jax.make_jaxpr(both)(avals, avals)
