"""How far two results are apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EXACT = 1e-10
"""Relative deviation that float64 may have, of each array's largest entry."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """An array that differs.

    Attributes:
      kind: what is wrong, without numbers.
      detail: what is wrong, with numbers.
      where: the array's path.
      limit: the deviation that it may have.
    """

    kind: str
    detail: str
    where: str = ""
    limit: float = 0.0


def difference(
    actual: Any, expected: Any, allowed: Mapping[str, float] | None
) -> Difference | None:
    """The first array that differs, outputs in front.

    Args:
      actual: a pytree of arrays, the kinds of results in front.
      expected: likewise.
      allowed: deviations that are no difference, by path; ``EXACT`` of the largest entry
        where nothing is said. None if no two numbers may differ.
    """
    structures = jax.tree.structure(actual), jax.tree.structure(expected)
    if structures[0] != structures[1]:
        return Difference("structure", f"{structures[0]}, not {structures[1]}")
    pairs = zip(named(expected), jax.tree.leaves(actual), strict=True)
    for (where, b), a in sorted(pairs, key=lambda pair: not pair[0][0].startswith("value")):
        limit = 0.0 if allowed is None else allowed.get(where, EXACT * largest(b))
        if not where.startswith("value"):
            b = _without_zeros(b, a)
        found = _off(a, b, limit)
        if found:
            detail = f"{where}: {a.dtype}{a.shape} {a.ravel()[:6]}, "
            detail += f"not {b.dtype}{b.shape} {b.ravel()[:6]}"
            return Difference(f"{where.split()[0]} is {found}", detail, where, limit)
    return None


def named(tree: Any) -> list[tuple[str, np.ndarray]]:
    """The arrays of a pytree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator=" "), x) for path, x in leaves]


def _off(a: np.ndarray, b: np.ndarray, limit: float) -> str | None:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return "of another type"
    a, b = wide(a), wide(b)
    if np.isinf(limit):
        return None
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return "finite elsewhere"
    infinite = np.isinf(a) & np.isinf(b)  # in another order of products some are NaN
    if not np.array_equal(a[infinite], b[infinite]):
        return "infinite otherwise"
    finite = np.isfinite(a)
    return "off" if largest(a[finite] - b[finite]) > limit else None


def _without_zeros(x: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Derivatives of what is not finite are NaN where one that is known to be zero is left out."""
    if x.shape != found.shape:
        return x
    return np.where(np.isfinite(wide(x)) | (found != 0), x, np.zeros_like(x))


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64)


def largest(x: np.ndarray) -> float:
    """The largest magnitude of the finite entries."""
    sizes = np.abs(wide(np.asarray(x)))
    return float(np.max(sizes, initial=0.0, where=np.isfinite(sizes)))


def apart(x: np.ndarray, y: np.ndarray) -> float:
    """How far two roundings of one array are apart; infinite if they are different numbers."""
    if x.shape != y.shape or not np.array_equal(np.isfinite(wide(x)), np.isfinite(wide(y))):
        return np.inf
    both = np.isfinite(wide(x))
    return largest(wide(x)[both] - wide(y)[both])
