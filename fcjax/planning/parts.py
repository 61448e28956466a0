"""The ways in which terms of an expression are computed: alone, merged, or as a mean square.

Terms that see the data through the same factors add up to one effective weight,

    ``x A + x B C = x Z``,   ``Z = A + B C``,

the gain of a normalisation folds into it and the scale of each row is applied afterwards,

    ``((x - mean) / std * g) W = (x Z) / std``,   ``Z`` = ``diag(g) W`` less its column means,

the variance that a batch normalisation takes of ``x W`` needs ``x`` only through its own second
moments, and the squared norms of the rows of ``x W`` need no more of W than ``W W^T``. Which of
these a value uses is decided by price in :mod:`fcjax.planning.recipes`; these are the words for it.
"""

import dataclasses

from fcjax.expressions.terms import Expr, Factor, Label, Term, Window
from fcjax.planning import kernels
from fcjax.planning.contraction import Cost, Order
from fcjax.planning.grids import Grid, Place
from fcjax.planning.squares import Square

__all__ = [
    "Convolution",
    "Linear",
    "MeanSquare",
    "Option",
    "Part",
    "Phases",
    "Product",
    "Recipe",
    "RowSquare",
    "computed_over",
]


@dataclasses.dataclass(frozen=True)
class Product:
    """One term, its factors multiplied pair by pair in ``order``; no factor: a constant."""

    term: Term
    order: Order


@dataclasses.dataclass(frozen=True)
class Linear:
    """``row_scales * (rows @ Z)`` with ``Z`` the sum of ``weights``.

    Attributes:
      rows: the data factor, not centred.
      row_scales: data factors constant over what is contracted, applied to the result.
      weights: the products whose sum is Z, each over a subset of ``weight_labels``.
      weight_labels: the axes of Z.
      centre_weight: axes of Z whose mean is subtracted, for rows centred over bound labels.
      centre_rows: free labels of the rows whose mean is subtracted from the result.
      apart: the products of rows and weights, one for each of ``weights``, in whose order the
        derivative by the weights is taken; empty if it is taken through Z.
    """

    rows: Factor
    row_scales: tuple[Factor, ...]
    weights: tuple[Product, ...]
    weight_labels: tuple[Label, ...]
    centre_weight: frozenset[Label]
    centre_rows: frozenset[Label]
    apart: tuple[Product, ...] = ()


@dataclasses.dataclass(frozen=True)
class MeanSquare:
    """``scale * sum_n (rows° @ Z)**2``: ``rows`` centred over the summed labels n.

    Attributes:
      rows: the centred data factor.
      weight: the product that is Z.
      weight_labels: the axes of Z: contracted ones first.
      contracted: the labels that rows and Z share and no other factor has.
      scale: a number.
    """

    rows: Factor
    weight: Product
    weight_labels: tuple[Label, ...]
    contracted: tuple[Label, ...]
    scale: float


@dataclasses.dataclass(frozen=True)
class RowSquare:
    """``scale * sum_c (rows @ Z + b)**2``: the squared norm of each row.

    Attributes:
      inner: the rows and Z, whose labels are those that rows and Z share, and the summed ones c.
      shifts: the products whose sum is b.
      over: the summed labels c.
      scale: a number.
    """

    inner: Linear
    shifts: tuple[Product, ...]
    over: tuple[Label, ...]
    scale: float

    @property
    def rows(self) -> Factor:
        """The data factor."""
        return self.inner.rows


@dataclasses.dataclass(frozen=True)
class Phases:
    """An axis of space of which every ``phase.size``-th place is computed as a channel.

    ``out + start = phase.size * made + phase``.

    Attributes:
      out: the label of the value.
      made: the label of the places that are computed.
      phase: the label of the channels; None for one.
      start: the place before the first of the value.
    """

    out: Label
    made: Label
    phase: Label | None
    start: int


@dataclasses.dataclass(frozen=True)
class Convolution:
    """``rows * Z`` with ``Z`` the sum of ``weights``, each at its place among the taps.

    Attributes:
      rows: the factor that is convolved, not centred; None for ones.
      ones: labels along which the rows are repeated.
      grids: the axes of space.
      weights: the products whose sum is Z.
      places: where each stands in Z.
      weight_labels: the axes of Z: taps first.
      kept: the labels of what is computed.
      windows: those that put the result in its place in the value.
      phases: the axes that are computed by phases, which are interleaved afterwards.
    """

    rows: Factor | None
    ones: tuple[Label, ...]
    grids: tuple[Grid, ...]
    weights: tuple[Product, ...]
    places: tuple[Place, ...]
    weight_labels: tuple[Label, ...]
    kept: frozenset[Label]
    windows: tuple[Window, ...]
    phases: tuple[Phases, ...] = ()

    @property
    def is_assembled(self) -> bool:
        """Whether the kernel is more than one product with its own taps."""
        composed = any(len(taps.steps) > 1 for place in self.places for taps in place.taps)
        return len(self.weights) > 1 or composed


Part = Product | Linear | MeanSquare | RowSquare | Convolution
Option = tuple[tuple[Part, ...], Cost]
"""Parts that some terms of an expression can be computed by, with their price."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to compute an expression: its parts are computed and added.

    Attributes:
      expr: the expression.
      parts: what is added up.
      cost: the analytic price of a training step through it.
      square: how ``expr`` is a sum of squares, if it is known to be one.
    """

    expr: Expr
    parts: tuple[Part, ...]
    cost: Cost
    square: Square | None = None


def computed_over(term: Term, free: frozenset[Label]) -> frozenset[Label]:
    """The labels a windowed term is computed over before it is put in place."""
    return kernels.computed_over(free, term.windows)
