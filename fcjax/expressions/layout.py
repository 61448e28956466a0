"""Axes of expressions: common refinements, reshapes, transposes, broadcasts, and casts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fcjax.expressions.terms import (
    Axis,
    Expr,
    Label,
    Unrepresentable,
    fresh_dims,
    rename_dims,
)

__all__ = [
    "aligned",
    "aligned_axes",
    "broadcast",
    "cast",
    "holds",
    "refine",
    "reshape",
    "transpose",
]


def refine(a: Axis, b: Axis) -> tuple[dict[Label, Axis], dict[Label, Axis]]:
    """Splits two axes of one size into common labels, outermost first."""
    if not all(label.size for label in (*a, *b)):
        raise Unrepresentable("an axis without entries")
    parts_a: dict[Label, list[Label]] = {label: [] for label in a}
    parts_b: dict[Label, list[Label]] = {label: [] for label in b}
    left_a, left_b = [(x, x.size) for x in reversed(a)], [(x, x.size) for x in reversed(b)]
    while left_a and left_b:
        (label_a, rest_a), (label_b, rest_b) = left_a.pop(), left_b.pop()
        size = min(rest_a, rest_b)
        if rest_a % size or rest_b % size:
            raise Unrepresentable("two axes split at places that have no common refinement")
        # a label that is not split keeps its name, those of ``a`` first
        whole = [x for x in (label_a, label_b) if x.size == size]
        common = whole[0] if whole else Label(size)
        parts_a[label_a].append(common)
        parts_b[label_b].append(common)
        if rest_a > size:
            left_a.append((label_a, rest_a // size))
        if rest_b > size:
            left_b.append((label_b, rest_b // size))
    if left_a or left_b:
        raise Unrepresentable("two axes differ in size")
    return _changes(parts_a), _changes(parts_b)


def _changes(parts: dict[Label, list[Label]]) -> dict[Label, Axis]:
    return {label: tuple(new) for label, new in parts.items() if new != [label]}


def aligned_axes(
    a: Expr, b: Expr, axes_a: Sequence[int], axes_b: Sequence[int]
) -> tuple[Expr, Expr]:
    """Gives the listed axes of ``a`` and ``b`` the same labels."""
    for axis_a, axis_b in zip(axes_a, axes_b, strict=True):
        rename_a, rename_b = refine(a.dims[axis_a], b.dims[axis_b])
        a, b = a.rename(rename_a), b.rename(rename_b)
    return a, b


def aligned(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Gives two expressions of one shape the same labels."""
    if a.shape != b.shape:
        raise Unrepresentable(f"shapes {a.shape} and {b.shape} differ")
    axes = range(len(a.dims))
    return aligned_axes(a, b, axes, axes)


def reshape(expr: Expr, shape: Sequence[int]) -> Expr:
    """A row-major reshape: axes merge freely and split where the labels allow it."""
    wanted = fresh_dims(shape)
    flat = tuple(itertools.chain.from_iterable(expr.dims))
    rename, rename_wanted = refine(flat, tuple(itertools.chain.from_iterable(wanted)))
    return dataclasses.replace(expr.rename(rename), dims=rename_dims(wanted, rename_wanted))


def transpose(expr: Expr, permutation: Sequence[int]) -> Expr:
    """Reorders the axes."""
    return dataclasses.replace(expr, dims=tuple(expr.dims[i] for i in permutation))


def broadcast(expr: Expr, shape: Sequence[int], positions: Sequence[int]) -> Expr:
    """Puts axis i of ``expr`` at ``positions[i]`` of ``shape``; other axes are repeated."""
    dims = list(fresh_dims(shape))
    for axis, position in zip(expr.dims, positions, strict=True):
        if axis or shape[position] == 1:
            dims[position] = axis
    return dataclasses.replace(expr, dims=tuple(dims))


def cast(expr: Expr, dtype: Any) -> Expr:
    """A change of float dtype of something that depends on no data; otherwise a boundary.

    The policy for mixed precision: products of weights are formed in the dtype the weights are
    stored in and rounded once, where they meet the data. What arithmetic in a narrow dtype made
    meets wider data rounded, so only a mere look at narrow numbers is widened.
    """
    new, old = np.dtype(dtype), np.dtype(expr.dtype)
    if new == old:
        return expr
    floats = all(jnp.issubdtype(d, jnp.floating) for d in (new, old))
    if expr.has_data or not floats:
        raise Unrepresentable("a cast of data rounds, so it stays where it is")
    if not holds(old, new) and not (holds(new, old) and _is_unrounded(expr)):
        raise Unrepresentable("a wider copy of rounded numbers")
    return dataclasses.replace(expr, dtype=new)


def holds(wide: Any, narrow: Any) -> bool:
    """Whether every number of one float dtype is one of the other."""
    a, b = jnp.finfo(wide), jnp.finfo(narrow)
    return bool(a.nmant >= b.nmant and a.maxexp >= b.maxexp and a.minexp <= b.minexp)


def _is_unrounded(expr: Expr) -> bool:
    """Whether an expression is numbers of its own dtype, without arithmetic in it."""
    made = [t for t in expr.terms if t.scale != 1.0 or len(t.factors) != 1 or t.factors[0].centred]
    summed = any(not term.labels <= expr.free for term in expr.terms)
    held = all(holds(expr.dtype, leaf.dtype) for leaf in expr.leaves.values())
    return held and not made and not summed and len(expr.terms) < 2
