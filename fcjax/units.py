"""Groups of hidden units that can be scaled or mixed, and where they stand in the parameters."""

import dataclasses
from fractions import Fraction

import jax.numpy as jnp
from jax import Array

from fcjax.dims import Opened

__all__ = ["Place", "Symmetry"]


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

    def rows(self, array: Array) -> Array:
        """The slices of all units, of shape ``(*units, entries of a slice)``."""
        for view in self.views:
            array = _open(array, view)
        array = jnp.moveaxis(array, self.axes, range(len(self.axes)))
        return array.reshape(*array.shape[: len(self.axes)], -1)

    def scaled(self, array: Array, factors: Array) -> Array:
        """The parameter with the slice of each unit multiplied by its factor, of shape ``units``.

        Example:
          >>> place = Place(0, Fraction(1), (2, 2), (), (1,))
          >>> place.scaled(jnp.ones((2, 2)), jnp.array([2.0, 3.0])).tolist()
          [[2.0, 3.0], [2.0, 3.0]]
        """
        shapes = [self.shape]
        for view in self.views:
            shapes.append(_opened_shape(shapes[-1], view))
        by = factors.reshape(*factors.shape, *[1] * (len(shapes[-1]) - factors.ndim))
        by = jnp.broadcast_to(jnp.moveaxis(by, range(factors.ndim), self.axes), shapes[-1])
        for view, shape in zip(reversed(self.views), reversed(shapes[:-1]), strict=True):
            if view.sizes:
                by = by.reshape(shape)
            else:
                where = (slice(None),) * view.axis + (slice(*view.part),)
                by = jnp.ones(shape, by.dtype).at[where].set(by)
        return array * by


def _opened_shape(shape: tuple[int, ...], view: Opened) -> tuple[int, ...]:
    sizes = view.sizes or (view.part[1] - view.part[0],)
    return (*shape[: view.axis], *sizes, *shape[view.axis + 1 :])


def _open(array: Array, view: Opened) -> Array:
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
