"""Small trees that stand in for the weights of a network, full and reduced, to train optimizers on.

Both trees of a pair are made of one block of numbers for each leaf, so that they describe the same
weights and are given the same gradients.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fcjax.names import path_name

__all__ = [
    "Change",
    "Follows",
    "Pair",
    "Shrinks",
    "Stays",
    "chains",
    "layers",
    "real_shapes",
    "stand_ins",
]

# Decay has to be seen in a norm that is compared with 1, even if it is weak.
_REST_SIZE = 1e3

# An optimizer that returns new weights minus old ones returns their rounding error too, in units
# of eps times the largest weight.
_ROUNDING_UNITS = 16


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


@dataclasses.dataclass(frozen=True)
class Pair:
    """A full tree and its reduced tree, made of one block of numbers per leaf that both have."""

    structure: jax.tree_util.PyTreeDef
    leaves: Sequence[_Leaf]

    @property
    def names(self) -> list[str]:
        """The path of each leaf."""
        tree = jax.tree.unflatten(self.structure, range(len(self.leaves)))
        return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

    @property
    def concerned(self) -> list[int]:
        """The numbers of the leaves that shrink or are followed."""
        followed = {leaf.survivor for leaf in self.leaves if isinstance(leaf, _Copy)}
        return sorted(followed | {n for n, leaf in self._trained if leaf.shrinks})

    @property
    def size(self) -> int:
        """The number of entries of the full tree, without the copies."""
        return sum(leaf.rest.size for _, leaf in self._trained)

    def weights(self) -> tuple[Any, Any]:
        """The full and the reduced tree of weights."""
        blocks = {n: _random((1, *leaf.core), seed=(n, 0)) for n, leaf in self._trained}
        return jax.tree.map(lambda leaf: leaf[0], self._trees(blocks, weights=True))

    def gradients(self, steps: int) -> tuple[Any, Any]:
        """The full and the reduced tree of gradients, with a leading axis of steps.

        They have a part that persists, because some optimizers (Prodigy) sit still without, and
        sizes around 1 that vary from step to step.
        """
        sizes = 10.0 ** np.random.default_rng(0).uniform(-0.5, 0.5, size=steps)
        blocks = {}
        for n, leaf in self._trained:
            directions = _random(leaf.core, seed=(n, 1)) + _random((steps, *leaf.core), seed=(n, 2))
            blocks[n] = sizes.reshape(-1, *[1] * len(leaf.core)) * directions
        return self._trees(blocks, weights=False)

    def compared(self, full: Any, reduced: Any, weights: Any) -> tuple[np.ndarray, ...]:
        """Compares some steps' updates of the two trees.

        Args:
          full: updates of the full tree, with a leading axis of steps.
          reduced: updates of the reduced tree.
          weights: the full tree's weights after these steps.

        Returns:
          For each leaf the drift, the stray and how often it moved, as in `_Seen`.
        """
        full, weights = _arrays(full), _arrays(weights)
        numbers = [n for n, _ in self._trained]
        reduced = dict(zip(numbers, _arrays(reduced), strict=True))
        if not all(np.all(np.isfinite(x)) for x in (*full, *weights, *reduced.values())):
            return np.full(len(full), np.inf), np.full(len(full), np.inf), np.zeros(len(full), int)
        rows = []
        for n, leaf in enumerate(self.leaves):
            noise = _ROUNDING_UNITS * np.finfo(float).eps * _size(weights[n])
            other = full[leaf.survivor] if isinstance(leaf, _Copy) else reduced[n]
            drift, size, stray, whole = leaf.differences(full[n], other)
            moves = np.sum(size > noise)
            rows.append((_relative(drift, size, noise), _relative(stray, whole, noise), moves))
        return tuple(np.array(column) for column in zip(*rows, strict=True))

    @property
    def _trained(self) -> list[tuple[int, _Embedded]]:
        return [(n, leaf) for n, leaf in enumerate(self.leaves) if isinstance(leaf, _Embedded)]

    def _trees(self, blocks: dict[int, np.ndarray], *, weights: bool) -> tuple[Any, Any]:
        embedded = {n: leaf.full(blocks[n], weights) for n, leaf in self._trained}
        reduced = {n: leaf.reduced(blocks[n], weights) for n, leaf in self._trained}
        full = [
            leaf.signs * embedded[leaf.survivor] if isinstance(leaf, _Copy) else embedded[n]
            for n, leaf in enumerate(self.leaves)
        ]
        return (
            jax.tree.unflatten(self.structure, full),
            jax.tree.unflatten(self.structure, [reduced.get(n) for n in range(len(full))]),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Embedded:
    """A leaf that both trees have, in coordinates of which the first ones are trained.

    Its methods take and return arrays with a leading axis of steps.

    Attributes:
      bases: for each axis, orthogonal matrices whose first columns span the subspace of each slice
        along the leading axes, or `None`.
      core: the shape of the trained block.
      rest: the untouched block in these coordinates, zero elsewhere, of the full shape.
      rho: whether the reduced leaf has the additional coordinates.
    """

    bases: tuple[np.ndarray | None, ...]
    core: tuple[int, ...]
    rest: np.ndarray
    rho: bool

    @property
    def shrinks(self) -> bool:
        return self.core != self.rest.shape

    @property
    def astray(self) -> str:
        """What is wrong if the updates outside the block are not what is restored."""
        if self._has_rho:
            return "it does not move untouched weights in proportion to their norm"
        return "it moves weights whose gradient is zero"

    def full(self, block: np.ndarray, weights: bool) -> np.ndarray:
        """The leaf of the full tree, as weights or as gradients."""
        inside = _padded(block, self.rest.shape)
        return self._turned(inside + self.rest if weights else inside, back=False)

    def reduced(self, block: np.ndarray, weights: bool) -> np.ndarray:
        """The leaf of the reduced tree, as weights or as gradients."""
        more = [self.rho and basis is not None for basis in self.bases]
        padded = _padded(block, [size + one for size, one in zip(self.core, more, strict=True)])
        if weights and self._has_rho:
            padded[self._corner] = self._norm
        return padded

    def differences(self, full: np.ndarray, reduced: np.ndarray) -> tuple[np.ndarray, ...]:
        """Compares the updates of the full and of the reduced leaf.

        The unused coordinates of the reduced leaf, which nothing is restored from, must not move.

        Returns:
          For each step the difference in the trained block, the block's size, the difference of
          the rest from what is restored, and the leaf's size.
        """
        core = (slice(None), *(slice(size) for size in self.core))
        turned = self._turned(full, back=True)
        drift = _sizes(turned[core] - reduced[core])
        size = np.maximum(_sizes(turned[core]), _sizes(reduced[core]))
        whole = np.maximum(_sizes(turned), _sizes(reduced))
        off, unused = turned.copy(), reduced.copy()
        off[core] = unused[core] = 0.0
        if self._has_rho:
            off -= np.multiply.outer(reduced[self._corner] / self._norm, self.rest)
            unused[self._corner] = 0.0
        return drift, size, np.maximum(_sizes(off), _sizes(unused)), whole

    @property
    def _corner(self) -> tuple[Any, ...]:
        return (slice(None), *(-1 for _ in self.core))

    @property
    def _norm(self) -> float:
        return float(np.linalg.norm(self.rest))

    @property
    def _has_rho(self) -> bool:
        return self.rho and self._norm > 0

    def _turned(self, x: np.ndarray, *, back: bool) -> np.ndarray:
        for axis, basis in enumerate(self.bases, start=1):
            if basis is not None:
                moved = np.moveaxis(x, axis, -1)
                slices = moved.reshape(len(x), len(basis), -1, moved.shape[-1])
                turned = slices @ (basis if back else basis.transpose(0, 2, 1))
                x = np.moveaxis(turned.reshape(moved.shape), -1, axis)
        return x


@dataclasses.dataclass(frozen=True, eq=False)
class _Copy:
    """A leaf that only the full tree has: another leaf times signs."""

    survivor: int
    signs: np.ndarray

    @property
    def astray(self) -> str:
        """What is wrong if the updates are not the survivor's."""
        return "it parts folded weights from the ones that they follow"

    def differences(self, full: np.ndarray, survivor: np.ndarray) -> tuple[np.ndarray, ...]:
        """As `_Embedded.differences`; all of this leaf is restored."""
        size = _sizes(survivor)
        return np.zeros_like(size), size, _sizes(full - self.signs * survivor), size


_Leaf = _Embedded | _Copy


def _embedded(
    sizes: Sequence[tuple[int, int]],
    *,
    rest: bool = False,
    aligned: bool = False,
    rho: bool = False,
    depth: int = 0,
) -> _Embedded:
    """A leaf with axes of these sizes, full and reduced."""
    shape = tuple(full for full, _ in sizes)
    untouched = np.zeros(shape)
    if rest and any(full > reduced for full, reduced in sizes):
        outside = tuple(slice(reduced if full > reduced else 0, None) for full, reduced in sizes)
        untouched[outside] = _REST_SIZE * _random(shape)[outside]
    count = math.prod(shape[:depth])
    bases = tuple(
        np.stack([_basis(full, aligned, seed) for seed in range(count)]) if full > reduced else None
        for full, reduced in sizes
    )
    return _Embedded(bases, tuple(reduced for _, reduced in sizes), untouched, rho)


def _copy(survivor: int, shape: Sequence[int], number: int) -> _Copy:
    return _Copy(survivor, np.sign(_random(shape, seed=(number,))))


def _basis(size: int, aligned: bool, seed: int) -> np.ndarray:
    if aligned:
        return np.eye(size)[np.random.default_rng((seed, size)).permutation(size)]
    return np.linalg.qr(_random((size, size), seed=(seed,)))[0]


def _random(shape: Sequence[int], seed: Sequence[int] = ()) -> np.ndarray:
    return np.random.default_rng((*seed, *shape)).normal(size=shape)


def _padded(x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Zeros after the entries of every axis but the first."""
    return np.pad(x, [(0, 0), *((0, n - m) for m, n in zip(x.shape[1:], shape, strict=True))])


def _arrays(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def _size(x: np.ndarray) -> float:
    return float(np.max(np.abs(x), initial=0.0))


def _sizes(x: np.ndarray) -> np.ndarray:
    """The largest magnitude in each step."""
    return np.max(np.abs(x).reshape(len(x), -1), axis=1, initial=0.0)


def _relative(difference: np.ndarray, size: np.ndarray, noise: float) -> float:
    """The largest relative difference of updates, from both sizes in each step.

    Updates that happen to cancel are compared with the ones shortly before them.
    """
    recent = np.fromiter(itertools.accumulate(size, lambda past, now: max(0.9 * past, now)), float)
    return _size(np.maximum(difference - noise, 0.0) / np.where(recent > 0, recent, 1.0))


def stand_ins(
    structure: jax.tree_util.PyTreeDef,
    changes: Sequence[Change],
    rho: bool,
    past: int | None = None,
) -> Pair:
    """Small leaves with as many axes as the real ones, those past a threshold past it as well."""
    leaves: list[_Leaf] = []
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
