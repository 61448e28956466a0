"""The arguments of one call of a network."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

__all__ = ["Call"]


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of a call, arrays apart from what is fixed while tracing.

    Attributes:
      arrays: the array arguments in flattening order.
      static: the structure and everything in it that is no array.
    """

    arrays: tuple[Any, ...]
    static: tuple[Any, tuple[Any, ...]]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """Tells arrays (or shapes that stand for them) from everything else."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = (Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
        is_array = [isinstance(x, arrays) for x in leaves]
        fixed = tuple(None if a else x for x, a in zip(leaves, is_array, strict=True))
        marks = tuple(is_array)
        return cls(
            tuple(x for x, a in zip(leaves, is_array, strict=True) if a),
            (structure, tuple(zip(marks, fixed, strict=True))),
        )

    def rebuild(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other arrays in place of ``self.arrays``."""
        structure, marked = self.static
        given = iter(arrays)
        return jax.tree.unflatten(structure, [next(given) if a else x for a, x in marked])

    def bind(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn(first, *args, **kwargs)`` as a function of ``first`` and the array arguments."""

        def bound(first: Any, *arrays: Any) -> Any:
            args, kwargs = self.rebuild(arrays)
            return fn(first, *args, **kwargs)

        return bound

    def flattened(self, fn: Callable[..., Any], structure: Any) -> Callable[..., Any]:
        """``bind(fn)`` as a function of the leaves of ``first``, a pytree of this structure."""
        bound, count = self.bind(fn), structure.num_leaves

        def flat(*inputs: Any) -> Any:
            return bound(jax.tree.unflatten(structure, inputs[:count]), *inputs[count:])

        return flat
