"""Small trees that stand in for the weights of a network, full and reduced."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from fcjax.rules.pairs import Copy, Embedded, Leaf, Pair, random

__all__ = ["Change", "Follows", "Shrinks", "Stays", "chains", "layers", "real_shapes", "stand_ins"]

# Decay has to be seen in a norm that is compared with 1, even if it is weak.
_REST_SIZE = 1e3


@dataclasses.dataclass(frozen=True)
class Stays:
    """A leaf that both trees have.

    Attributes:
      shape: the leaf's shape.
    """

    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Shrinks:
    """A leaf that is trained in smaller coordinates.

    Its gradient vanishes outside the product of one subspace per compressed axis.

    Attributes:
      shape: the leaf's shape in the full tree.
      axes: for each axis, whether it is compressed.
      rest: whether the leaf is non-zero where every compressed axis is outside its subspace.
      aligned: whether the subspaces are spanned by coordinate axes.
      depth: the number of leading axes, each slice along which has subspaces of its own.
    """

    shape: tuple[int, ...]
    axes: tuple[bool, ...]
    rest: bool
    aligned: bool = False
    depth: int = 0


@dataclasses.dataclass(frozen=True)
class Follows:
    """A leaf that equals another one up to the signs of its elements, and so does its gradient.

    Attributes:
      survivor: the number of the other leaf, which stays.
    """

    survivor: int


Change = Stays | Shrinks | Follows


def _embedded(
    sizes: Sequence[tuple[int, int]],
    *,
    rest: bool = False,
    aligned: bool = False,
    rho: bool = False,
    depth: int = 0,
) -> Embedded:
    """A leaf with axes of these sizes, full and reduced."""
    shape = tuple(full for full, _ in sizes)
    untouched = np.zeros(shape)
    if rest and any(full > reduced for full, reduced in sizes):
        outside = tuple(slice(reduced if full > reduced else 0, None) for full, reduced in sizes)
        untouched[outside] = _REST_SIZE * random(shape)[outside]
    count = math.prod(shape[:depth])
    bases = tuple(
        np.stack([_basis(full, aligned, seed) for seed in range(count)]) if full > reduced else None
        for full, reduced in sizes
    )
    return Embedded(bases, tuple(reduced for _, reduced in sizes), untouched, rho)


def _copy(survivor: int, shape: Sequence[int], number: int) -> Copy:
    return Copy(survivor, np.sign(random(shape, seed=(number,))))


def _basis(size: int, aligned: bool, seed: int) -> np.ndarray:
    if aligned:
        return np.eye(size)[np.random.default_rng((seed, size)).permutation(size)]
    return np.linalg.qr(random((size, size), seed=(seed,)))[0]


def stand_ins(
    structure: jax.tree_util.PyTreeDef,
    changes: Sequence[Change],
    rho: bool,
    past: int | None = None,
) -> Pair:
    """Small leaves with as many axes as the real ones, those past a threshold past it as well."""
    leaves: list[Leaf] = []
    for number, (change, shape) in enumerate(zip(changes, real_shapes(changes), strict=True)):
        axes = change.axes if isinstance(change, Shrinks) else (False,) * len(shape)
        sizes = _stand_in_sizes(shape, axes, past or max(shape, default=0) + 1)
        match change:
            case Follows(survivor):
                leaves.append(_copy(survivor, [full for full, _ in sizes], number))
            case Shrinks(_, _, rest, aligned, depth):
                embedded = _embedded(sizes, rest=rest, aligned=aligned, rho=rho, depth=depth)
                leaves.append(embedded)
            case Stays():
                leaves.append(_embedded(sizes))
    return Pair(structure, leaves)


def _stand_in_sizes(shape: Sequence[int], axes: Sequence[bool], past: int) -> list[tuple[int, int]]:
    """Sizes of stand-ins, full and reduced, for the axes of a leaf of which some are compressed.

    A tall matrix stays tall, since its rule may be another one than a wide one's (Muon). If both
    axes are compressed the order is turned round, so that a rate by the axes' ratio is not missed.
    """
    by_size = sorted(range(len(shape)), key=lambda axis: shape[axis])
    sizes = [(size, size) for size in shape]
    for rank, axis in enumerate(axis for axis in by_size if shape[axis] > 1):
        full = 6 + 2 * rank + (past if shape[axis] >= past else 0)
        kept = min(full, shape[axis])
        sizes[axis] = (full, max(2, 4 - rank)) if axes[axis] else (kept, kept)
    return sizes


def real_shapes(changes: Sequence[Change]) -> list[tuple[int, ...]]:
    """The real shapes of the full tree's leaves."""
    sources = [changes[c.survivor] if isinstance(c, Follows) else c for c in changes]
    return [source.shape for source in sources if not isinstance(source, Follows)]


def layers() -> Pair:
    """Layers for the orthogonal class, one of them past the sizes at which optimizers change."""
    tree = {
        "dense": {"kernel": _embedded([(6, 6), (9, 4)]), "bias": _embedded([(9, 4)])},
        "inner": {"kernel": _embedded([(9, 4), (11, 3)], rest=True)},
        "conv": {"kernel": _embedded([(3, 3), (8, 5), (7, 2)], rest=True)},
        "wide": {"kernel": _embedded([(140, 20), (132, 132)], rest=True)},
        "scale": _embedded([]),
    }
    leaves, structure = jax.tree.flatten(tree)
    return Pair(structure, leaves)


def chains() -> Pair:
    """Chains of leaves for the sign class, beside layers that no leaf follows."""
    tree = {
        "conv": _embedded([(3, 3), (8, 8), (5, 5)]),
        "dense": {"bias": _embedded([(9, 9)]), "kernel": _embedded([(6, 6), (9, 9)])},
        "gains": [_embedded([(9, 9)]), _copy(3, [9], 1), _copy(3, [9], 2)],
        "scale": _embedded([]),
        "wide": [_embedded([(140, 140), (132, 132)]), _copy(7, [140, 132], 3)],
    }
    leaves, structure = jax.tree.flatten(tree)
    return Pair(structure, leaves)
