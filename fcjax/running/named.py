"""Arrays with labelled axes, and their products."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fcjax.expressions.terms import Expr, Factor, Label
from fcjax.running.arrays import library, wrapped

__all__ = [
    "Env",
    "Named",
    "less_mean",
    "met",
    "ordered",
    "pair",
    "realised",
    "sum_out",
    "widest",
]


Env = Mapping[Any, Any]
"""Arrays, of jax or of another library; see ``arrays``."""


@dataclasses.dataclass(frozen=True)
class Named:
    """An array with a label for each axis.

    Attributes:
      array: the values.
      labels: one for each axis, all different.
      data: whether it depends on data; weights among themselves are multiplied at full precision.
    """

    array: Any
    labels: tuple[Label, ...]
    data: bool


def realised(factor: Factor, env: Env) -> Named:
    """The leaf of a factor, seen as the factor sees it."""
    array = env[factor.leaf.var]
    if any(view is not None for view in factor.slices):
        views = [
            view or (0, size, 1) for view, size in zip(factor.slices, array.shape, strict=True)
        ]
        for axis, (start, limit, step) in enumerate(views):
            low, high = max(-start, 0), max(limit - array.shape[axis], 0)
            if low or high:
                array = wrapped(array, axis, low, high)
                views[axis] = (start + low, limit + low, step)
        array = library(array).slice(array, *(list(v) for v in zip(*views, strict=True)))
    labels = tuple(itertools.chain(*factor.axes))
    array = array.reshape([label.size for label in labels])
    if factor.centred:
        array = less_mean(array, labels, factor.centred)
    return Named(array, labels, factor.is_data)


def less_mean(array: Any, labels: tuple[Label, ...], over: frozenset[Label]) -> Any:
    """The array less its mean over labels."""
    axes = tuple(labels.index(x) for x in labels if x in over)
    return array - array.mean(axes, keepdims=True)


def sum_out(value: Named, keep: frozenset[Label]) -> Named:
    """The sum over all labels that are not kept."""
    gone = tuple(i for i, label in enumerate(value.labels) if label not in keep)
    if not gone:
        return value
    labels = tuple(label for label in value.labels if label in keep)
    return Named(value.array.sum(gone), labels, value.data)


def pair(a: Named, b: Named, keep: frozenset[Label], expr: Expr) -> Named:
    """Multiplies two arrays and sums the labels outside ``keep``.

    Data stands on the left: the axes of the result are then those of its rows, then the others.
    """
    if b.data and not a.data:
        a, b = b, a
    a = sum_out(a, keep | frozenset(b.labels))
    b = sum_out(b, keep | frozenset(a.labels))
    data = a.data or b.data
    dtype = met(b, expr)
    if not data:  # weights keep the wider of the dtypes they are stored and used in
        dtype = widest(expr.dtype, a.array.dtype, b.array.dtype, np.dtype(np.float32))
    x, y = a.array.astype(dtype), b.array.astype(dtype)
    shared = [label for label in a.labels if label in b.labels]
    contracted = [label for label in shared if label not in keep]
    own_a = tuple(label for label in a.labels if label not in shared)
    own_b = tuple(label for label in b.labels if label not in shared)
    if not contracted or not (own_a or own_b):
        labels = a.labels + own_b
        product = Named(x, a.labels, data), Named(y, b.labels, data)
        value = ordered(product[0], labels) * ordered(product[1], labels)
        return sum_out(Named(value, labels, data), keep)
    batch = [label for label in shared if label in keep]
    numbers = (
        ([a.labels.index(n) for n in contracted], [b.labels.index(n) for n in contracted]),
        ([a.labels.index(n) for n in batch], [b.labels.index(n) for n in batch]),
    )
    precision = expr.precision if data else lax.Precision.HIGHEST
    value = library(x, y).dot_general(x, y, numbers, precision=precision)
    return Named(value, (*batch, *own_a, *own_b), data)


def met(weight: Named, expr: Expr) -> Any:
    """The dtype in which a weight meets the data.

    That of the value, but for float16: a product of weights may be too large or too small for it
    though none of its factors is, so it meets the data as it was formed.
    """
    narrow = expr.dtype == jnp.float16 and not weight.data
    return widest(expr.dtype, weight.array.dtype) if narrow else np.dtype(expr.dtype)


def widest(*dtypes: Any) -> Any:
    """The dtype that holds all of these, of which numbers of 8 bits have no common one in jax."""
    return functools.reduce(jnp.promote_types, [d for d in dtypes if np.dtype(d).itemsize > 1])


def ordered(value: Named, labels: tuple[Label, ...]) -> Any:
    """The array with its axes in the order of ``labels``, size 1 where it has none of them."""
    present = [label for label in labels if label in value.labels]
    array = value.array.transpose([value.labels.index(label) for label in present])
    return array.reshape([label.size if label in value.labels else 1 for label in labels])
