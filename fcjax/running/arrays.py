"""Whose operations the arrays have that a recipe is computed on.

Recipes are computed by the methods that all arrays share and by a few functions of ``jax.lax``.
Arrays of another kind, such as the numbers that a plan is checked on, bring a module with functions
of the same names and arguments as their attribute ``operations``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

__all__ = ["broadcast_to", "call", "library", "wrapped"]


def library(*arrays: Any) -> Any:
    """The module with the operations of these arrays: ``jax.lax`` unless any brings its own."""
    return next((x.operations for x in arrays if hasattr(x, "operations")), lax)


def call(function: Callable[..., Any], *args: Any, static: tuple[Any, ...] = ()) -> Any:
    """A function with a derivative of its own, of pytrees of arrays and then of ``static``."""
    ours = library(*jax.tree.leaves(args))
    return function(*args, *static) if ours is lax else ours.call(function, args, static)


def broadcast_to(array: Any, shape: Sequence[int]) -> Any:
    """An array of the same rank, or a scalar, repeated along its axes of size 1."""
    if array.shape == tuple(shape):
        return array
    return library(array).broadcast_in_dim(array, tuple(shape), tuple(range(array.ndim)))


def wrapped(array: Any, axis: int, low: int, high: int) -> Any:
    """An array with what comes before and behind it if an axis goes round.

    Example:
      >>> import jax.numpy as jnp
      >>> wrapped(jnp.arange(3), 0, 1, 4).tolist()
      [2, 0, 1, 2, 0, 1, 2, 0]
    """
    ours, size = library(array), array.shape[axis]

    def part(start: int, limit: int) -> list[Any]:
        starts, limits = [0] * array.ndim, list(array.shape)
        starts[axis], limits[axis] = start, limit
        return [ours.slice(array, starts, limits)] if limit > start else []

    rounds = low // size + 1 + high // size
    return ours.concatenate(
        [*part(size - low % size, size), *[array] * rounds, *part(0, high % size)], axis
    )
