"""The rule "compress": train a linear segment in the coordinates that backpropagation can reach.

Every update of backpropagation stays within the reachable spaces of ``subspaces.py``. With
orthonormal bases ``S_j`` of them the network trained is ``S_{j-1}^T W_j S_j``: the same function,
the same gradients in other coordinates, and so the same trajectory under every optimizer that acts
alike in both, which ``equivariance.py`` finds out.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fcjax.spaces.hidden import Spaces
from fcjax.spaces.subspaces import Basis, change, made_with

__all__ = ["Compression", "compression"]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Compression:
    """Parameters in the coordinates of reachable spaces.

    Attributes:
      spaces: all spaces of the network.
      bases: the columns of the bases of those that are reduced, by number.
      shapes: the original shapes of the parameters that are reduced.
      rests: what lies outside the reachable spaces, of the parameters where that is not zero.
      rows: for tables of which only some rows are ever read, those.
      rho: whether the norm of what lies outside is trained along, at ``[-1, ..., -1]`` of the
        parameter, for optimizers that read norms or shrink weights (the rho leaf).
      aligned: whether the bases select coordinates, which elementwise optimizers respect too.
    """

    spaces: Spaces
    bases: Mapping[int, np.ndarray[Any, Any]]
    shapes: Mapping[int, tuple[int, ...]]
    rests: Mapping[int, np.ndarray[Any, Any]]
    rows: Mapping[int, np.ndarray[Any, Any]] = dataclasses.field(default_factory=dict)
    rho: bool = False
    aligned: bool = False

    def size(self, number: int) -> int:
        """The number of coordinates a space keeps, that of rho included."""
        return int(self.bases[number].shape[2]) + (number in self._with_rho)

    @property
    def _with_rho(self) -> set[int]:
        """The spaces that need one more coordinate, which no value ever has."""
        if not self.rho:
            return set()
        return set(itertools.chain.from_iterable(self.on(leaf).values() for leaf in self.rests))

    def on(self, leaf: int) -> dict[int, int]:
        """The pieces of a parameter that are reduced, with the numbers of their spaces."""
        return {
            place.piece: number
            for number in self.bases
            for place in self.spaces.found[number].places
            if place.leaf == leaf
        }

    def reduced_shape(self, leaf: int) -> tuple[int, ...]:
        """The shape in which a parameter is trained."""
        if leaf in self.rows:
            return (len(self.rows[leaf]) + self._has_rho(leaf), *self.shapes[leaf][1:])
        pieces = list(itertools.chain.from_iterable(self.spaces.splits[leaf]))
        for piece, number in self.on(leaf).items():
            pieces[piece] = self.size(number)
        return _merged(pieces, self.spaces.splits[leaf])

    def _has_rho(self, leaf: int) -> bool:
        return self.rho and leaf in self.rests

    def places(self, leaf: int) -> np.ndarray[Any, Any]:
        """For each row of a table where it is trained; the number of rows there if it is not."""
        found = np.full(self.shapes[leaf][0], self.reduced_shape(leaf)[0], np.int32)
        found[self.rows[leaf]] = np.arange(len(self.rows[leaf]))
        return found

    def padded(self) -> dict[int, np.ndarray[Any, Any]]:
        """The bases as ``reduce`` and ``expand`` take them: with a column of zeros for rho."""
        return {
            number: np.pad(basis, ((0, 0), (0, 0), (0, self.size(number) - basis.shape[2])))
            for number, basis in self.bases.items()
        }

    @property
    def sources(self) -> list[int]:
        """The spaces of inputs among those that are reduced."""
        return [n for n in self.bases if self.spaces.found[n].source is not None]

    @property
    def exactness(self) -> str:
        """For which optimizers the rule is exact."""
        return "sign" if self.aligned else "orthogonal"

    def reduce(self, leaf: int, array: Array, bases: Mapping[int, Array], rest: Array) -> Array:
        """A parameter in the coordinates of its spaces."""
        reduced = self._chosen(leaf, array, bases)
        if rest is None or not self.rho:
            return reduced
        norm = np.linalg.norm(self.rests[leaf])
        corner = (-1,) * reduced.ndim
        return jnp.asarray(reduced).at[corner].set(jnp.vdot(rest, array) / norm)

    def _chosen(self, leaf: int, array: Array, bases: Mapping[int, Array]) -> Array:
        if leaf in self.rows:
            chosen = array[self.rows[leaf]]
            return jnp.pad(chosen, [(0, self._has_rho(leaf)), *[(0, 0)] * (array.ndim - 1)])
        pieces = array.reshape(list(itertools.chain.from_iterable(self.spaces.splits[leaf])))
        for piece, number in self.on(leaf).items():
            pieces = change(pieces, piece, bases[number], self._lead(leaf, number))
        return pieces.reshape(self.reduced_shape(leaf))

    def _restored(self, leaf: int, array: Array, bases: Mapping[int, Array]) -> Array:
        if leaf in self.rows:
            rows = self.rows[leaf]
            return jnp.zeros(self.shapes[leaf], array.dtype).at[rows].set(array[: len(rows)])
        pieces = list(itertools.chain.from_iterable(self.spaces.splits[leaf]))
        for piece, number in self.on(leaf).items():
            pieces[piece] = self.size(number)
        full = array.reshape(pieces)
        for piece, number in self.on(leaf).items():
            back = bases[number].transpose(0, 2, 1)
            full = change(full, piece, back, self._lead(leaf, number))
        return full.reshape(self.shapes[leaf])

    def expand(self, leaf: int, array: Array, bases: Mapping[int, Array], rest: Array) -> Array:
        """The inverse: the parameter as backpropagation would have trained it."""
        full = self._restored(leaf, array, bases)
        if rest is None:
            return full
        norm = np.linalg.norm(self.rests[leaf])
        return full + rest * (array[(-1,) * array.ndim] / norm if self.rho else 1.0)

    def _lead(self, leaf: int, number: int) -> int:
        depth = self.spaces.found[number].depth
        return sum(len(sizes) for sizes in self.spaces.splits[leaf][:depth])


def compression(
    spaces: Spaces,
    bases: Mapping[int, Basis],
    rows: Mapping[int, np.ndarray[Any, Any]],
    arrays: Sequence[Any],
) -> Compression:
    """Parameters reduced to the given bases and rows, without rho.

    Args:
      spaces: the spaces of the network.
      bases: a basis for each space to be reduced.
      rows: the rows of each table that are kept.
      arrays: the initial values of the parameters.
    """
    columns = {number: basis.columns for number, basis in bases.items()}
    leaves = sorted({p.leaf for number in bases for p in spaces.found[number].places} | set(rows))
    shapes = {leaf: tuple(np.shape(arrays[leaf])) for leaf in leaves}
    made = Compression(spaces, columns, shapes, {}, rows)
    rests = {}
    for leaf in leaves:
        wide = np.asarray(arrays[leaf], np.float64)
        if leaf in rows:
            rest = wide.copy()
            rest[rows[leaf]] = 0.0
        else:
            rest = wide - made.expand(leaf, made.reduce(leaf, wide, columns, None), columns, None)
        limit = RESTS * made_with(arrays[leaf]) * np.linalg.norm(wide)
        if np.linalg.norm(rest) > limit:
            rests[leaf] = rest
    return dataclasses.replace(made, rests=rests)


RESTS = 10.0
"""What lies outside the reachable spaces is rounding below this many tolerances of the weights."""


def _merged(pieces: Sequence[int], splits: Sequence[Sequence[int]]) -> tuple[int, ...]:
    left = iter(pieces)
    return tuple(math.prod(itertools.islice(left, len(sizes))) for sizes in splits)
