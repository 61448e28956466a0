"""Groups of hidden units that can be scaled or mixed, and where they stand in the parameters."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from fcjax.laws.dims import Opened

__all__ = ["Place", "Symmetry", "quadratic"]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the units of a symmetry stand in a parameter, and how it scales with them.

    Attributes:
      leaf: the number of the parameter.
      charge: unit k scaled by c multiplies slice k of the parameter by ``c ** charge``.
      shape: the shape of the parameter.
      views: how its axes are opened, in order.
      axes: the axes of the opened array that number the units.
    """

    leaf: int
    charge: Fraction
    shape: tuple[int, ...]
    views: tuple[Opened, ...]
    axes: tuple[int, ...]

    @property
    def axis(self) -> int | None:
        """The axis of the parameter that numbers the units, if that is one axis in full."""
        return self.axes[0] if len(self.axes) == 1 and not self.views else None

    def rows(self, array: Any) -> Any:
        """The slices of all units, of shape ``(*units, entries of a slice)``."""
        for view in self.views:
            array = _open(array, view)
        units = tuple(array.shape[axis] for axis in self.axes)
        rest = tuple(axis for axis in range(array.ndim) if axis not in self.axes)
        entries = math.prod(array.shape[axis] for axis in rest)
        return array.transpose(self.axes + rest).reshape(*units, entries)

    def spread(self, values: Any, fill: float) -> Any:
        """For each entry of the parameter the value of its unit, ``fill`` where it has none.

        Args:
          values: of shape ``units``.
          fill: a number.
        """
        shapes = [self.shape]
        for view in self.views:
            shapes.append(_opened_shape(shapes[-1], view))
        values = values.reshape(*values.shape, *[1] * (len(shapes[-1]) - values.ndim))
        by = jnp.broadcast_to(jnp.moveaxis(values, range(len(self.axes)), self.axes), shapes[-1])
        for view, shape in zip(reversed(self.views), reversed(shapes[:-1]), strict=True):
            if view.sizes:
                by = by.reshape(shape)
            else:
                where = (slice(None),) * view.axis + (slice(*view.part),)
                by = jnp.full(shape, fill, by.dtype).at[where].set(by)
        return by

    def scaled(self, array: Array, factors: Array) -> Array:
        """The parameter with the slice of each unit multiplied by its factor, of shape ``units``.

        Example:
          >>> place = Place(0, Fraction(1), (2, 2), (), (1,))
          >>> place.scaled(jnp.ones((2, 2)), jnp.array([2.0, 3.0])).tolist()
          [[2.0, 3.0], [2.0, 3.0]]
        """
        return array * self.spread(factors, 1.0)

    def numbers(self) -> np.ndarray[Any, Any]:
        """For each entry of the parameter the number of its unit, counted through; -1 for none."""
        shape: tuple[int, ...] = self.shape
        for view in self.views:
            shape = _opened_shape(shape, view)
        units = tuple(shape[axis] for axis in self.axes)
        return np.asarray(self.spread(jnp.arange(math.prod(units)).reshape(units), -1))


def _opened_shape(shape: tuple[int, ...], view: Opened) -> tuple[int, ...]:
    sizes = view.sizes or (view.part[1] - view.part[0],)
    return (*shape[: view.axis], *sizes, *shape[view.axis + 1 :])


def _open(array: Any, view: Opened) -> Any:
    if view.sizes:
        return array.reshape(_opened_shape(array.shape, view))
    return array[(slice(None),) * view.axis + (slice(*view.part),)]


@dataclasses.dataclass(frozen=True)
class Symmetry:
    """A group of hidden units that can be scaled one by one, or mixed by any invertible matrix.

    Attributes:
      units: how many units there are, along one axis or several, such as heads and their units.
      mixed: how many of these axes, counted from the last, may be mixed; 0 for scaling alone.
      places: where the units stand in parameters, in the order in which these are first read.
    """

    units: tuple[int, ...]
    mixed: int
    places: tuple[Place, ...]

    @property
    def mixing(self) -> tuple[int, int]:
        """How many blocks of units there are, and how many units of a block mix: 1 for scaling."""
        count = len(self.units) - self.mixed
        return math.prod(self.units[:count]), math.prod(self.units[count:])

    @property
    def laws(self) -> int:
        """How many laws follow: one a unit, or the entries of a symmetric matrix a block."""
        blocks, size = self.mixing
        return blocks * size * (size + 1) // 2

    def blocks(self, rows: Sequence[Any]) -> Any:
        """Slices of units side by side, of shape ``(blocks, units that mix, entries)``.

        Args:
          rows: for each of some places, its slices of shape ``(*units, entries)``.
        """
        blocks, size = self.mixing
        shaped = [each.reshape(blocks, size, each.shape[-1]) for each in rows]
        return np.concatenate(shaped, axis=-1) if shaped else np.zeros((blocks, size, 0))

    @property
    def incoming(self) -> tuple[Place, ...]:
        """The parameters that scale with a unit."""
        return tuple(place for place in self.places if place.charge > 0)

    @property
    def outgoing(self) -> tuple[Place, ...]:
        """The parameters that scale against it; ``-charge`` is the unit's degree of homogeneity."""
        return tuple(place for place in self.places if place.charge < 0)

    @property
    def is_untied(self) -> bool:
        """Whether every parameter holds the units only once."""
        leaves = [place.leaf for place in self.places]
        return len(set(leaves)) == len(leaves)


def quadratic(symmetry: Symmetry, leaves: Mapping[int, Any] | Sequence[Any]) -> Array:
    r"""The values of the laws of a symmetry, of shape ``(laws,)``.

    The charges q give :math:`\sum_places q\, w_i \cdot w_j` for the slices w of the units i and j
    of a block, once for i <= j; for scaling i = j.

    Args:
      symmetry: the symmetry.
      leaves: the arrays of its places, by their numbers.
    """
    blocks, size = symmetry.mixing
    total: Any = 0.0
    for place in symmetry.places:
        rows = place.rows(leaves[place.leaf])
        rows = rows.reshape(blocks, size, rows.shape[-1])
        total = total + float(place.charge) * jnp.einsum("bir,bjr->bij", rows, rows)
    return total[:, *np.triu_indices(size)].ravel()
