r"""Which directions of each hidden space backpropagation can ever reach.

BP's updates are ``dW_j = P^T G Q^T`` with ``P`` the product of the layers before and ``Q`` that of
the layers after, so they never leave the smallest spaces with

.. math:: S_j \supseteq \mathrm{span}(W_j^T S_{j-1},\; b_j,\; W_{j+1} S_{j+1}),

found here by fixpoint iteration on plain arrays. Everything is in float64, whatever the weights'
dtype; the tolerance is that of the dtype in which they were made.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fcjax.spaces.hidden import Place, Space, Spaces

__all__ = ["Basis", "Reached", "change", "made_with", "outside", "reach", "span", "used"]

EXACT = 1e-12
"""Couplings below this, relative to the weights that make them, are rounding in float64."""
MADE_EPS = 30.0
"""The same for weights that were made in float32, in units of its eps: an orthogonal matrix of size
1024 is orthogonal to 16 of them."""
GREY = 1e3
"""A direction whose coupling is within this factor of the tolerance is kept, for safety."""

POWER_STEPS = 12
FEW = 32
INDEPENDENT = 1e-4
"""Columns whose Cholesky factor has no diagonal entry below this share of the largest are
independent beyond doubt."""
LARGE = 1024
"""Spaces beyond this size are taken to be reached in full once they pass half of it and still all
that is offered is new: that is what weights drawn at random do, and it is always safe."""

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Basis:
    """Orthonormal columns.

    Attributes:
      columns: of shape ``(slices, dimension, rank)``; a slice of smaller rank ends in zeros.
      ranks: the rank of each slice.
    """

    columns: Array
    ranks: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The largest rank, which is the size of the reduced axis."""
        return int(self.columns.shape[2])


@dataclasses.dataclass(frozen=True)
class Weights:
    """A parameter as an array of pieces.

    Attributes:
      array: in float64, of the shape of its pieces.
      on: for each piece the number of the space it is, or None.
      scales: its norm as a matrix whose columns are a piece that is a space.
      tolerance: relative to its norm, what may be rounding in it.
    """

    array: Array
    on: tuple[int | None, ...]
    scales: Mapping[int, float]
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Reached:
    """What can be reached of each space.

    Attributes:
      bases: the bases; None for a space that is reached in full.
      unsure: the spaces in which a coupling near the tolerance was found.
      saddles: the spaces whose initial values reach fewer directions than the layers around them
        could use, with that number.
    """

    bases: tuple[Basis | None, ...]
    unsure: frozenset[int]
    saddles: Mapping[int, int]


def reach(
    spaces: Spaces, arrays: Sequence[Any], given: Mapping[int, Basis] | None = None
) -> Reached:
    """The least spaces that contain every update of backpropagation.

    Args:
      spaces: where the spaces stand.
      arrays: the initial values of the parameters.
      given: bases of the spaces of inputs, which the data decide.
    """
    growth = _Growth(spaces, arrays, given or {})
    growth.run()
    ranks = [
        s.dimension if b is None else min(b.ranks)
        for s, b in zip(spaces.found, growth.bases, strict=True)
    ]
    needed = _needed(growth, given or {})
    saddles = {
        i: needed[i]
        for i, space in enumerate(spaces.found)
        if space.source is None and ranks[i] < needed[i]
    }
    return Reached(tuple(growth.bases), frozenset(growth.unsure), saddles)


def change(array: Any, piece: int, matrix: Any, depth: int = 0) -> Any:
    """Contracts one axis of an array with the rows of a matrix, for numpy and jax alike.

    Args:
      array: of any shape.
      piece: the axis.
      matrix: of shape ``(slices, old, new)``.
      depth: the number of leading axes that number the slices.
    """
    rest = [i for i in range(array.ndim) if i >= depth and i != piece]
    order = [*range(depth), *rest, piece]
    moved = array.transpose(order)
    slices, old, new = matrix.shape
    count = math.prod(moved.shape[:-1]) // slices
    made = (moved.reshape(slices, count, old) @ matrix).reshape(*moved.shape[:-1], new)
    return made.transpose(np.argsort(order))


def span(rows: Array) -> Basis:
    """An orthonormal basis of the space that the rows of a matrix span."""
    tolerance = made_with(rows) * _spectral(rows)
    found, _ = _new_directions(rows, np.zeros((rows.shape[1], 0)), tolerance)
    return Basis(found[None], (found.shape[1],))


def used(rows: Array) -> Basis:
    """The coordinates in which any row of a matrix differs from zero, as a basis."""
    columns = np.eye(rows.shape[1])[:, np.any(rows != 0, axis=0)]
    return Basis(columns[None], (columns.shape[1],))


def outside(rows: Array, basis: Array) -> float:
    """The largest distance of a row from the span of the columns, relative to the largest row."""
    wide = np.asarray(rows, np.float64)
    largest = np.max(np.linalg.norm(wide, axis=1), initial=0.0)
    away = np.linalg.norm(_outside(wide.T, basis), axis=0)
    return float(np.max(away, initial=0.0) / (largest or 1.0))


def made_with(array: Any) -> float:
    """The relative tolerance of a parameter: float64 arrays may hold float32 values.

    Example:
      >>> import numpy as np
      >>> made_with(np.float64(np.float32([0.1]))) > made_with(np.array([0.1]))
      True
    """
    wide = np.asarray(array, np.float64)
    narrow = np.array_equal(wide, wide.astype(np.float32).astype(np.float64))
    return MADE_EPS * float(np.finfo(np.float32).eps) if narrow else EXACT


class _Growth:
    """The bases while they grow."""

    def __init__(self, spaces: Spaces, arrays: Sequence[Any], given: Mapping[int, Basis]) -> None:
        self.spaces = spaces
        self.fixed = frozenset(given)
        self.weights = {
            leaf: _weights(leaf, spaces, arrays[leaf])
            for leaf in {p.leaf for s in spaces.found for p in s.places}
        }
        self.bases: list[Basis | None] = [
            given.get(i, self._empty(s)) for i, s in enumerate(spaces.found)
        ]
        self.unsure: set[int] = set()
        self.brought: dict[Place, list[tuple[int, ...] | None]] = {}

    def _empty(self, space: Space) -> Basis:
        first = space.places[0]
        lead = self.weights[first.leaf].array.shape[: self.lead(first.leaf, space)]
        slices = math.prod(lead)
        return Basis(np.zeros((slices, space.dimension, 0)), (0,) * slices)

    def lead(self, leaf: int, space: Space) -> int:
        """How many leading pieces of a parameter number the slices."""
        return sum(len(sizes) for sizes in self.spaces.splits[leaf][: space.depth])

    def run(self) -> None:
        """Grows the bases until none grows any more."""
        stale = set(range(len(self.bases))) - self.fixed
        while stale:
            number = min(stale)
            stale.discard(number)
            if self._grow(number):
                stale |= self._beside(number) - self.fixed

    def _beside(self, number: int) -> set[int]:
        """The spaces that a parameter connects with this one, if they can still grow."""
        leaves = {p.leaf for p in self.spaces.found[number].places}
        on = itertools.chain.from_iterable(self.weights[leaf].on for leaf in leaves)
        return {s for s in on if s is not None and self.bases[s] is not None}

    def _grow(self, number: int) -> bool:
        """Adds what the parameters of one space bring into it; whether that was anything."""
        space, basis = self.spaces.found[number], self.bases[number]
        assert basis is not None
        blocks = [self._brought(place, space) for place in space.places]
        tolerance = max(self.weights[p.leaf].tolerance for p in space.places)
        columns = []
        offered = 0
        for i, rank in enumerate(basis.ranks):
            old = basis.columns[i, :, :rank]
            rows = np.concatenate([block[i] for block in blocks])
            new, doubt = _new_directions(rows, old, tolerance)
            offered += rows.shape[0]
            if doubt:
                self.unsure.add(number)
            columns.append(np.concatenate([old, new], axis=1))
        grown = _padded(columns)
        added = sum(grown.ranks) - sum(basis.ranks)
        full = min(grown.ranks) == space.dimension
        generic = space.dimension > LARGE and 2 * grown.rank > space.dimension and added == offered
        self.bases[number] = None if full or (generic and any(basis.ranks)) else grown
        return added > 0

    def _brought(self, place: Place, space: Space) -> Array:
        """What a parameter brings into a space from the others it stands on, as rows.

        Only what it has not brought before, and in units of the parameter's norm, so that what is
        rounding in it is rounding here.
        """
        weights = self.weights[place.leaf]
        others = [
            (piece, number)
            for piece, number in enumerate(weights.on)
            if number is not None and piece != place.piece
        ]
        lead = self.lead(place.leaf, space)
        slices = math.prod(weights.array.shape[:lead])
        now = [None if (b := self.bases[n]) is None else b.ranks for _, n in others]
        before = self.brought.get(place)
        if now == before:
            return np.zeros((slices, 0, space.dimension))
        self.brought[place] = now
        array = weights.array
        for piece, number in others:
            basis = self.bases[number]
            if basis is not None:
                first = before[0] if before is not None and len(others) == 1 else None
                columns = basis.columns[:, :, 0 if first is None else min(first) :]
                array = change(
                    array, piece, columns, self.lead(place.leaf, self.spaces.found[number])
                )
        rows = np.moveaxis(array, place.piece, -1)
        rows = rows.reshape(slices, rows[..., 0].size // slices, space.dimension)
        return rows / (weights.scales[place.piece] or 1.0)


def _weights(leaf: int, spaces: Spaces, array: Any) -> Weights:
    sizes = tuple(itertools.chain.from_iterable(spaces.splits[leaf]))
    on = dict.fromkeys(range(len(sizes)), None) | {
        p.piece: i for i, s in enumerate(spaces.found) for p in s.places if p.leaf == leaf
    }
    wide = np.asarray(array, np.float64).reshape(sizes)
    scales = {
        piece: _spectral(np.moveaxis(wide, piece, -1).reshape(-1, sizes[piece]))
        for piece, number in on.items()
        if number is not None
    }
    return Weights(wide, tuple(on.values()), scales, made_with(array))


def _spectral(matrix: Array) -> float:
    """The largest singular value, by a few steps of the power method."""
    if not matrix.size:
        return 0.0
    vector = np.random.default_rng(0).normal(size=matrix.shape[1])
    for _ in range(POWER_STEPS):
        vector = matrix.T @ (matrix @ vector)
        norm = np.linalg.norm(vector)
        if norm == 0.0:
            return 0.0
        vector /= norm
    return float(np.linalg.norm(matrix @ vector))


def _new_directions(rows: Array, basis: Array, tolerance: float) -> tuple[Array, bool]:
    """Orthonormal columns that, with ``basis``, span the rows up to the tolerance.

    A singular value decomposition, by way of the shortcuts that make it affordable for wide layers:
    nothing new, everything new, and little new.

    Returns:
      the columns, and whether any coupling lay so near the tolerance that it was kept in doubt.
    """
    left = _outside(_outside(rows.T, basis), basis)
    if left.shape[1] > left.shape[0]:
        left = np.transpose(np.linalg.qr(left.T, mode="r"))
    if not left.size or _spectral(left) <= tolerance:
        return left[:, :0], False
    independent = _all_independent(left, GREY * tolerance)
    if independent is not None:
        return independent, False
    within = _range(left, tolerance)
    turned, sizes, _ = np.linalg.svd(within.T @ left, full_matrices=False)
    kept = sizes > tolerance
    new = (within @ turned[:, kept])[:, : rows.shape[1] - basis.shape[1]]
    return np.linalg.qr(_outside(new, basis))[0], bool(np.any(sizes[kept] < GREY * tolerance))


def _range(columns: Array, tolerance: float) -> Array:
    """Orthonormal columns whose span holds the given ones up to the tolerance.

    Random combinations, twice as many each time, until nothing is left (Halko, Martinsson and
    Tropp 2011).
    """
    random = np.random.default_rng(0)
    count = FEW
    while 2 * count < min(columns.shape):
        found = np.linalg.qr(columns @ random.normal(size=(columns.shape[1], count)))[0]
        if _spectral(_outside(columns, found)) <= tolerance:
            return found
        count *= 2
    return np.linalg.qr(columns)[0]


def _all_independent(columns: Array, floor: float) -> Array | None:
    """The columns made orthonormal, if a Cholesky factorisation shows them to be independent.

    Many times faster than a QR factorisation, and the usual case for weights drawn at random.
    """
    if columns.shape[1] > columns.shape[0]:
        return None
    for _ in range(2):  # the second time restores the orthogonality that the first one loses
        gram = columns.T @ columns
        try:
            factor = np.linalg.cholesky(gram)
        except np.linalg.LinAlgError:
            return None
        sizes = np.diag(factor)
        if np.min(sizes) < max(floor, INDEPENDENT * np.max(sizes)):
            return None
        columns = np.linalg.solve(factor, columns.T).T
    return columns


def _outside(columns: Array, basis: Array) -> Array:
    return columns - basis @ (basis.T @ columns)


def _padded(columns: Sequence[Array]) -> Basis:
    ranks = tuple(c.shape[1] for c in columns)
    wide = [np.pad(c, ((0, 0), (0, max(ranks) - c.shape[1]))) for c in columns]
    return Basis(np.stack(wide), ranks)


# --- saddles ------------------------------------------------------------------------------------


def _needed(growth: _Growth, given: Mapping[int, Basis]) -> list[int]:
    """For each space the number of directions that the layers around it can use.

    What can be written into a space and what can be read from it, by sizes alone; the smaller of
    the two. Initial values that reach fewer directions leave the rest at a saddle: backpropagation
    then leaves it by its own rounding noise, which nothing can reproduce.
    """
    spaces = growth.spaces.found
    sides = [[0, 0] for _ in spaces]
    for i, basis in given.items():
        sides[i] = [basis.rank, basis.rank]
    moved = True
    while moved:
        moved = False
        for i in set(range(len(spaces))) - set(given):
            found = [0, 0]
            for place in spaces[i].places:
                found[place.reads] += _beyond(place, spaces[i], growth, sides)
            found = [min(n, spaces[i].dimension) for n in found]
            moved |= found != sides[i]
            sides[i] = found
    return [min(side) if space.sided else 0 for space, side in zip(spaces, sides, strict=True)]


def _beyond(place: Place, space: Space, growth: _Growth, sides: Sequence[Sequence[int]]) -> int:
    """How many directions a parameter connects a place with, through its other axes."""
    weights = growth.weights[place.leaf]
    count = 1
    for piece, number in enumerate(weights.on):
        if piece == place.piece or piece < growth.lead(place.leaf, space):
            continue
        if number is None:
            count *= weights.array.shape[piece]
            continue
        here = next(
            p
            for p in growth.spaces.found[number].places
            if (p.leaf, p.piece) == (place.leaf, piece)
        )
        count *= sides[number][not here.reads]
    return count
