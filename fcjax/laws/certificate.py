"""How far the final layer can go: how many hidden weights the conservation laws determine.

Hidden weights are, locally and at a generic point, a function of the final layer and of the laws'
values if and only if the derivatives of the laws with respect to them have full rank. The rank is
the number of laws less the relations between these derivatives: symmetric matrices (for mixing) and
numbers (for scaling), one for each group of units, such that in every hidden weight what all laws
contribute cancels. Most groups have a layer to themselves that admits no relation, so they drop
out one after another; what is left is solved as a graph, or numerically while it is small.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from fcjax.clusters import Clusters
from fcjax.laws.charges import Charges
from fcjax.laws.invariance import invariant
from fcjax.laws.symmetries import find
from fcjax.laws.units import Place, Symmetry
from fcjax.names import layer_name, short_names
from fcjax.tracing.final import hidden_leaves
from fcjax.tracing.trace import Body, Kind

__all__ = ["Certificate", "LayerRank", "certificate", "of_network"]

Array = np.ndarray[Any, Any]
LARGEST = 10_000_000
"""Relations whose matrix has more entries than this are not solved numerically."""
TOLERANCE = 1e-9
"""Singular values below this, relative to the largest, count as zero."""


@dataclasses.dataclass(frozen=True)
class LayerRank:
    """How many weights of one layer are determined by the laws and all other layers.

    Attributes:
      name: the layer.
      determined: the rank of the laws' derivatives with respect to its weights.
      size: its number of weights.
      exact: whether ``determined`` is known, and not only an upper bound.
    """

    name: str
    determined: int
    size: int
    exact: bool = True


@dataclasses.dataclass(frozen=True)
class Certificate:
    """How many hidden weights the conservation laws and the final layer determine.

    To first order: at degenerate points, such as exactly balanced initial values, more can be
    determined than the rank shows.

    Attributes:
      determined: the rank of the laws' derivatives with respect to the hidden weights.
      hidden: the number of hidden weights: all that stand before the final layer.
      laws: the number of laws.
      layers: the same for each hidden layer by itself.
      exact: whether ``determined`` is known, and not only an upper bound.

    Example:
      >>> print(Certificate(4, 8, 4, ()))
      4 of 8 hidden degrees of freedom are determined by the 4 conservation laws and the final \
layer; the laws leave 4 free
    """

    determined: int
    hidden: int
    laws: int
    layers: tuple[LayerRank, ...]
    exact: bool = True

    def __str__(self) -> str:
        if not self.hidden:
            return "no weights stand before the final layer"
        return (
            f"{counted(self.determined, self.hidden, self.exact)} hidden degrees of freedom are "
            f"determined by the {self.laws:,} conservation laws and the final layer{self._rest()}"
        )

    def _rest(self) -> str:
        free = self.hidden - self.determined
        if free:
            return f"; the laws leave {'' if self.exact else 'at least '}{free:,} free"
        return ": near these values hidden weights are its function" if self.exact else ""


def counted(determined: int, size: int, exact: bool) -> str:
    """Such as "4 of 8"."""
    return f"{'' if exact else 'at most '}{determined:,} of {size:,}"


def of_network(
    body: Body, kinds: Sequence[Kind], paths: Sequence[str], leaves: Sequence[Any]
) -> Certificate:
    """The certificate of a traced network.

    Args:
      body: the network.
      kinds: what each of its inputs is.
      paths: the names of the parameters, its first inputs.
      leaves: their values.
    """
    hidden = hidden_leaves(body, kinds, len(paths))
    found = invariant(body, find(body, kinds), leaves)
    return certificate(found, hidden, paths, leaves)


def certificate(
    symmetries: Sequence[Symmetry], hidden: Sequence[int], paths: Sequence[str], leaves: Any
) -> Certificate:
    """The certificate for some symmetries.

    Args:
      symmetries: what conserves something.
      hidden: the numbers of the hidden parameters.
      paths: the names of all parameters.
      leaves: the values of all parameters.
    """
    names = short_names(paths)
    layers: dict[str, list[int]] = {}
    for leaf in hidden:
        layers.setdefault(layer_name(names[paths[leaf]]), []).append(leaf)
    arrays = {leaf: np.asarray(leaves[leaf], np.float64) for leaf in hidden}

    def rank(chosen: Sequence[int]) -> tuple[int, int, bool]:
        size = sum(arrays[leaf].size for leaf in chosen)
        least, most = _Relations(symmetries, {leaf: arrays[leaf] for leaf in chosen}).rank()
        return min(most, size), size, least == min(most, size)

    determined, size, exact = rank(hidden)
    rows = tuple(LayerRank(name, *rank(chosen)) for name, chosen in layers.items())
    return Certificate(determined, size, sum(s.laws for s in symmetries), rows, exact)


# --- relations between the derivatives of laws --------------------------------------------------


class _Relations:
    """Counts the relations between the derivatives of laws with respect to some parameters."""

    def __init__(self, symmetries: Sequence[Symmetry], arrays: dict[int, Array]) -> None:
        self.arrays = arrays
        self.left = [s for s in symmetries if self._places(s)]
        self.laws = sum(s.laws for s in self.left)

    def rank(self) -> tuple[int, int]:
        """A lower and an upper bound of the rank, which mostly agree."""
        while self._drop_independent():
            pass
        least, most = zip((0, 0), *map(self._relations, self._coupled()), strict=True)
        return self.laws - sum(most), self.laws - sum(least)

    def _places(self, symmetry: Symmetry) -> list[Place]:
        return [place for place in symmetry.places if place.leaf in self.arrays]

    def _own(self, symmetry: Symmetry) -> list[Place]:
        """The places in parameters in which no other group and no other axis stands."""
        count: dict[int, int] = {}
        for place in itertools.chain.from_iterable(map(self._places, self.left)):
            count[place.leaf] = count.get(place.leaf, 0) + 1
        return [place for place in self._places(symmetry) if count[place.leaf] == 1]

    def _drop_independent(self) -> bool:
        """Takes out groups that cannot take part in any relation."""
        kept = [s for s in self.left if self._room(s, self._own(s)) > 0 and not self._is_split(s)]
        dropped = len(kept) < len(self.left)
        self.left = kept
        return dropped

    def _room(self, symmetry: Symmetry, places: Sequence[Place]) -> int:
        """How many relations some places admit for one group by itself."""
        blocks = symmetry.blocks([place.rows(self.arrays[place.leaf]) for place in places])
        if not symmetry.mixed:
            return int(np.sum(~np.any(blocks != 0, axis=-1)))
        free = [block.shape[0] - _rank(block) for block in blocks]
        return sum(n * (n + 1) // 2 for n in free)

    def _is_split(self, symmetry: Symmetry) -> bool:
        """Whether a matrix to the next mixing group and the group's own weights admit no relation.

        A relation is a pair of symmetric matrices with S W = W T. If the singular values of W
        differ, S is diagonal in its left singular vectors, but for its left null space. Where no
        singular vector, and no vector of the null space, is orthogonal to all own weights, S is 0.
        """
        own = self._own(symmetry)
        if not symmetry.mixed or not own or symmetry.mixing[0] > 1:
            return False
        (rows,) = symmetry.blocks([place.rows(self.arrays[place.leaf]) for place in own])
        return any(_splits(matrix, rows) for matrix in self._to_others(symmetry))

    def _to_others(self, symmetry: Symmetry) -> Iterator[Array]:
        """The weights between this and one other mixing group, this group's units first."""
        for place in self._places(symmetry):
            shared = [s for s in self.left for p in self._places(s) if p.leaf == place.leaf]
            array = self.arrays[place.leaf]
            others = [s for s in shared if s is not symmetry and s.mixed]
            sizes = math.prod(symmetry.units) * math.prod(others[0].units) if others else 0
            if len(shared) == 2 and array.size == sizes and others[0].mixing[0] == 1:
                yield symmetry.blocks([place.rows(array)])[0]

    def _coupled(self) -> list[list[Symmetry]]:
        """The groups that are left, by the parameters that connect them."""
        clusters: Clusters[tuple[str, int]] = Clusters()
        for i, symmetry in enumerate(self.left):
            clusters.add(("group", i))
            for place in self._places(symmetry):
                clusters.join(("group", i), ("leaf", place.leaf))
        parts = ([self.left[i] for kind, i in part if kind == "group"]
                 for part in clusters.groups())  # fmt: skip
        return [part for part in parts if part]

    def _relations(self, part: Sequence[Symmetry]) -> tuple[int, int]:
        """A lower and an upper bound of the number of relations between coupled groups."""
        if not any(s.mixed for s in part):
            exactly = self._of_graph(part)
        elif sum(s.laws for s in part) * sum(a.size for a in self.arrays.values()) <= LARGEST:
            exactly = self._of_matrix(part)
        else:
            return (
                sum(self._room(s, self._places(s)) for s in part),
                sum(self._room(s, self._own(s)) for s in part),
            )
        return exactly, exactly

    def _of_graph(self, part: Sequence[Symmetry]) -> int:
        """Numbers for units such that in every weight that is not zero the charges cancel."""
        starts = list(itertools.accumulate([s.laws for s in part], initial=0))
        charges = Charges(starts[-1])
        at: dict[int, list[tuple[int, Place]]] = {}
        for start, symmetry in zip(starts, part, strict=False):
            for place in self._places(symmetry):
                at.setdefault(place.leaf, []).append((start, place))
        for leaf, places in at.items():
            factors = [place.charge for _, place in places]
            for row in _met(self.arrays[leaf], [(start, place) for start, place in places]):
                equation: dict[int, Fraction] = {}
                for unit, factor in zip(row, factors, strict=True):
                    if unit >= 0:
                        equation[unit] = equation.get(unit, Fraction(0)) + factor
                charges.add(equation)
        return len(charges.solutions(float))

    def _of_matrix(self, part: Sequence[Symmetry]) -> int:
        """The same from the derivatives themselves."""
        starts = itertools.accumulate((s.laws for s in part), initial=0)
        columns = list(itertools.accumulate((a.size for a in self.arrays.values()), initial=0))
        at = dict(zip(self.arrays, columns, strict=False))
        derivatives = np.zeros((sum(s.laws for s in part), columns[-1]))
        for start, symmetry in zip(starts, part, strict=False):
            for place in self._places(symmetry):
                array = self.arrays[place.leaf]
                numbers = at[place.leaf] + np.arange(array.size).reshape(array.shape)
                _differentiate(derivatives[start:], symmetry, place, array, numbers)
        return len(derivatives) - _rank(derivatives)


def _differentiate(
    derivatives: Array, symmetry: Symmetry, place: Place, array: Array, numbers: Array
) -> None:
    """Adds the derivative of each law with respect to a parameter, whose entries have numbers."""
    weights, columns = (symmetry.blocks([place.rows(x)]) for x in (array, numbers))
    law = 0
    for own, at in zip(weights, columns, strict=True):
        for i, j in itertools.combinations_with_replacement(range(len(own)), 2):
            derivatives[law, at[i]] += float(place.charge) * own[j]
            derivatives[law, at[j]] += float(place.charge) * own[i]
            law += 1


def _splits(matrix: Array, rows: Array) -> bool:
    """See ``_Relations._is_split``; both have one row for each unit."""
    left, values, _ = np.linalg.svd(matrix)
    limit = TOLERANCE * np.max(values, initial=0.0)
    values = values[values > limit]
    distinct = np.all(-np.diff(values) > limit)
    met = left.T @ rows
    each = np.linalg.norm(met[: len(values)], axis=1)
    null = met[len(values) :]
    norm = np.linalg.norm(rows)
    return bool(distinct and np.all(each > TOLERANCE * norm) and _rank(null) == len(null))


def _rank(matrix: Array) -> int:
    if not matrix.size:
        return 0
    found = np.linalg.svd(matrix, compute_uv=False)
    return int(np.sum(found > TOLERANCE * found[0]))


def _met(array: Array, places: Sequence[tuple[int, Place]]) -> Array:
    """The units that meet in a weight that is not zero, -1 for none; of pairs, enough of them."""
    there = np.flatnonzero(array)
    columns = []
    for start, place in places:
        numbers = place.numbers().ravel()[there]
        columns.append(np.where(numbers >= 0, numbers + start, -1))
    sizes = [int(column.max(initial=0)) + 2 for column in columns]
    keys = _different(np.ravel_multi_index([column + 1 for column in columns], sizes), sizes)
    rows = np.stack(np.unravel_index(keys, sizes), axis=-1) - 1
    alone = np.any(rows < 0, axis=1)
    if rows.shape[1] != 2:
        return rows
    return np.concatenate([rows[alone], _spanning(rows[~alone])])


def _different(keys: Array, sizes: Sequence[int]) -> Array:
    """The different ones of some numbers below the product of the sizes."""
    if math.prod(sizes) > 4 * len(keys):
        return np.unique(keys)
    found = np.zeros(math.prod(sizes), bool)
    found[keys] = True
    return np.flatnonzero(found)


def _spanning(pairs: Array) -> Array:
    """Of pairs that connect units of two sides, as many as connect them likewise.

    All units of one side of a connected part have one charge, whichever pairs connect it.
    """
    left, right = (np.unique(side) for side in pairs.T)
    if not len(pairs):
        return pairs
    if len(pairs) == len(left) * len(right):
        return pairs[(pairs[:, 0] == pairs[0, 0]) | (pairs[:, 1] == pairs[0, 1])]
    joined: Clusters[tuple[int, int]] = Clusters()
    kept = []
    for a, b in pairs.tolist():
        joined.add((0, a))
        joined.add((1, b))
        if joined.find((0, a)) != joined.find((1, b)):
            joined.join((0, a), (1, b))
            kept.append((a, b))
    return np.array(kept, pairs.dtype).reshape(-1, 2)
