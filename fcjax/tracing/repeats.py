"""Look-ups at known places that are nothing but a repetition, as ``jax.image.resize`` traces to.

Nearest upsampling by a whole number reads row ``j // r`` for each j. Written as a repetition, what
comes after may meet the rows before them.
"""

from typing import Any

import jax
import numpy as np
from jax import Array, lax

from fcjax.compat import JaxprEqn

__all__ = ["KNOWN", "repeated", "repetition"]

KNOWN = frozenset(
    {"add", "and", "broadcast_in_dim", "concatenate", "convert_element_type", "div", "eq",
     "expand_dims", "floor", "ge", "gt", "iota", "le", "lt", "max", "min", "mul", "ne", "rem",
     "reshape", "select_n", "sign", "squeeze", "sub"}
)  # fmt: skip
"""What numbers of rows are made by, and may be computed while tracing if they depend on nothing."""


def repetition(eqn: JaxprEqn, numbers: np.ndarray[Any, Any]) -> tuple[int, int] | None:
    """The axis along which a gather repeats each entry, and how often; None if it does not.

    Args:
      eqn: the gather.
      numbers: its indices, shape ``(places, 1)``.
    """
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]  # type: ignore[attr-defined]
    form = eqn.params["dimension_numbers"]
    if len(form.start_index_map) != 1 or form.operand_batching_dims or numbers.ndim != 2:
        return None
    (axis,) = form.start_index_map
    others = tuple(i for i in range(len(shape)) if i != axis)
    whole = all(sizes[i] == shape[i] for i in others) and sizes[axis] == 1
    if form.collapsed_slice_dims != (axis,) or form.offset_dims != others or not whole:
        return None
    times = len(numbers) // shape[axis]
    if times < 2 or not np.array_equal(numbers[:, 0], np.repeat(np.arange(shape[axis]), times)):
        return None
    return axis, times


def repeated(aval: Any, axis: int, times: int) -> Any:
    """The jaxpr that repeats every entry along an axis."""
    shape = aval.shape
    wide = (*shape[: axis + 1], times, *shape[axis + 1 :])
    kept = [i for i in range(len(wide)) if i != axis + 1]

    def repeat(x: Array) -> Array:
        made = lax.broadcast_in_dim(x, wide, kept)
        return lax.reshape(made, (*shape[:axis], shape[axis] * times, *shape[axis + 1 :]))

    return jax.make_jaxpr(repeat)(jax.ShapeDtypeStruct(shape, aval.dtype))
