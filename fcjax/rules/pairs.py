"""A full tree of weights and its reduced tree, to train an optimizer on both and to compare them.

Both trees are made of one block of numbers for each leaf, so that they describe the same weights
and are given the same gradients.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fcjax.names import path_name

__all__ = ["Copy", "Embedded", "Leaf", "Pair", "random"]

# An optimizer that returns new weights minus old ones returns their rounding error too, in units
# of eps times the largest weight.
_ROUNDING_UNITS = 16


@dataclasses.dataclass(frozen=True)
class Pair:
    """A full tree and its reduced tree, made of one block of numbers per leaf that both have."""

    structure: jax.tree_util.PyTreeDef
    leaves: Sequence[Leaf]

    @property
    def names(self) -> list[str]:
        """The path of each leaf."""
        tree = jax.tree.unflatten(self.structure, range(len(self.leaves)))
        return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

    @property
    def concerned(self) -> list[int]:
        """The numbers of the leaves that shrink or are followed."""
        followed = {leaf.survivor for leaf in self.leaves if isinstance(leaf, Copy)}
        return sorted(followed | {n for n, leaf in self._trained if leaf.shrinks})

    @property
    def size(self) -> int:
        """The number of entries of the full tree, without the copies."""
        return sum(leaf.rest.size for _, leaf in self._trained)

    def weights(self) -> tuple[Any, Any]:
        """The full and the reduced tree of weights."""
        blocks = {n: random((1, *leaf.core), seed=(n, 0)) for n, leaf in self._trained}
        return jax.tree.map(lambda leaf: leaf[0], self._trees(blocks, weights=True))

    def gradients(self, steps: int) -> tuple[Any, Any]:
        """The full and the reduced tree of gradients, with a leading axis of steps.

        They have a part that persists, because some optimizers (Prodigy) sit still without, and
        sizes around 1 that vary from step to step.
        """
        sizes = 10.0 ** np.random.default_rng(0).uniform(-0.5, 0.5, size=steps)
        blocks = {}
        for n, leaf in self._trained:
            directions = random(leaf.core, seed=(n, 1)) + random((steps, *leaf.core), seed=(n, 2))
            blocks[n] = sizes.reshape(-1, *[1] * len(leaf.core)) * directions
        return self._trees(blocks, weights=False)

    def differences(self, full: Any, reduced: Any) -> np.ndarray:
        """Compares one step's updates of the two trees, in several trainings.

        Args:
          full: updates of the full tree, with a leading axis of trainings.
          reduced: updates of the reduced tree.

        Returns:
          What `Embedded.differences` has of each leaf, of shape `(4, leaves, trainings)`.
        """
        wide = _arrays(full)
        small = dict(zip([n for n, _ in self._trained], _arrays(reduced), strict=True))
        of_leaves = [
            leaf.differences(wide[n], wide[leaf.survivor] if isinstance(leaf, Copy) else small[n])
            for n, leaf in enumerate(self.leaves)
        ]
        return np.stack(of_leaves, axis=1)

    def compared(self, differences: Sequence[np.ndarray], weights: Any) -> np.ndarray:
        """What the differences of some steps show.

        Args:
          differences: those of each step.
          weights: the full tree's weights after these steps.

        Returns:
          The drift, the stray and how often it moved of each leaf, as in `_Seen`, of shape
          `(3, leaves, trainings)`.
        """
        sizes = np.stack([_sizes(leaf) for leaf in _arrays(weights)])
        noise = _ROUNDING_UNITS * np.finfo(float).eps * sizes
        drift, size, stray, whole = np.stack(differences, axis=1)
        moves = np.sum(size > noise, axis=0)
        shown = np.stack([_relative(drift, size, noise), _relative(stray, whole, noise), moves])
        finite = np.isfinite(differences).all(axis=(0, 1, 2)) & np.isfinite(sizes).all(axis=0)
        return np.where(finite, shown, np.array([np.inf, np.inf, 0.0])[:, None, None])

    @property
    def _trained(self) -> list[tuple[int, Embedded]]:
        return [(n, leaf) for n, leaf in enumerate(self.leaves) if isinstance(leaf, Embedded)]

    def _trees(self, blocks: dict[int, np.ndarray], *, weights: bool) -> tuple[Any, Any]:
        embedded = {n: leaf.full(blocks[n], weights) for n, leaf in self._trained}
        reduced = {n: leaf.reduced(blocks[n], weights) for n, leaf in self._trained}
        full = [
            leaf.signs * embedded[leaf.survivor] if isinstance(leaf, Copy) else embedded[n]
            for n, leaf in enumerate(self.leaves)
        ]
        return (
            jax.tree.unflatten(self.structure, full),
            jax.tree.unflatten(self.structure, [reduced.get(n) for n in range(len(full))]),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Embedded:
    """A leaf that both trees have, in coordinates of which the first ones are trained.

    Its methods take and return arrays with a leading axis of steps or of trainings.

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
        """Whether the reduced tree's leaf is smaller."""
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
          For each index of the leading axis the difference in the trained block, the block's size,
          the difference of the rest from what is restored, and the leaf's size.
        """
        if not self.shrinks:
            size = np.maximum(_sizes(full), _sizes(reduced))
            return _sizes(full - reduced), size, np.zeros_like(size), size
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
class Copy:
    """A leaf that only the full tree has: another leaf times signs."""

    survivor: int
    signs: np.ndarray

    @property
    def astray(self) -> str:
        """What is wrong if the updates are not the survivor's."""
        return "it parts folded weights from the ones that they follow"

    def differences(self, full: np.ndarray, survivor: np.ndarray) -> tuple[np.ndarray, ...]:
        """As `Embedded.differences`; all of this leaf is restored."""
        size = _sizes(survivor)
        return np.zeros_like(size), size, _sizes(full - self.signs * survivor), size


Leaf = Embedded | Copy


def random(shape: Sequence[int], seed: Sequence[int] = ()) -> np.ndarray:
    """Normally distributed numbers, others for every shape and seed."""
    return np.random.default_rng((*seed, *shape)).normal(size=shape)


def _padded(x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Zeros after the entries of every axis but the first."""
    return np.pad(x, [(0, 0), *((0, n - m) for m, n in zip(x.shape[1:], shape, strict=True))])


def _arrays(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def _sizes(x: np.ndarray) -> np.ndarray:
    """The largest magnitude for each index of the leading axis."""
    return np.max(np.abs(x).reshape(len(x), -1), axis=1, initial=0.0)


def _relative(difference: np.ndarray, size: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The largest relative difference of updates, from both sizes in each step.

    Updates that happen to cancel are compared with the ones shortly before them.
    """
    recent = np.stack([*itertools.accumulate(size, lambda past, now: np.maximum(0.9 * past, now))])
    return np.max(np.maximum(difference - noise, 0.0) / np.where(recent > 0, recent, 1.0), axis=0)
