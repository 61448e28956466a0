"""How the terms of one expression are computed together: alone, merged, or as a mean square.

Terms that see the data through the same factors add up to one effective weight,

    ``x A + x B C = x Z``,   ``Z = A + B C``,

the gain of a normalisation folds into it and the scale of each row is applied afterwards,

    ``((x - mean) / std * g) W = (x Z) / std``,   ``Z`` = ``diag(g) W`` less its column means,

and the variance that a batch normalisation takes of ``x W`` needs ``x`` only through its own
second moments. Which of these a value uses is decided here, by price; nothing is computed yet.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fcjax import contraction, kernels
from fcjax.contraction import Cost, Operand, Order
from fcjax.expressions import Expr, Factor, Label, Term, Unrepresentable, Window, term_key
from fcjax.kernels import Grid, Place, View

__all__ = [
    "Convolution",
    "Linear",
    "MeanSquare",
    "Part",
    "Product",
    "Recipe",
    "computed_over",
    "recipe",
]

MOMENTS = 3.0
"""Products of the rows with a matrix of their own width that a mean square takes."""


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
    """

    rows: Factor
    row_scales: tuple[Factor, ...]
    weights: tuple[Product, ...]
    weight_labels: tuple[Label, ...]
    centre_weight: frozenset[Label]
    centre_rows: frozenset[Label]


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
class Convolution:
    """``rows * Z`` with ``Z`` the sum of ``weights``, each at its place among the taps.

    Attributes:
      rows: the factor that is convolved, not centred; None for ones.
      ones: labels along which the rows are repeated.
      grids: the axes of space.
      weights: the products whose sum is Z.
      places: where each stands in Z.
      weight_labels: the axes of Z: taps first.
      kept: the labels of the result.
      windows: those that put the result in its place in the value.
    """

    rows: Factor | None
    ones: tuple[Label, ...]
    grids: tuple[Grid, ...]
    weights: tuple[Product, ...]
    places: tuple[Place, ...]
    weight_labels: tuple[Label, ...]
    kept: frozenset[Label]
    windows: tuple[Window, ...]


Part = Product | Linear | MeanSquare | Convolution


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to compute an expression: its parts are computed and added.

    Attributes:
      expr: the expression.
      parts: what is added up.
      cost: the analytic price of a training step through it.
    """

    expr: Expr
    parts: tuple[Part, ...]
    cost: Cost


def recipe(expr: Expr, runs: float = 1) -> Recipe:
    """Chooses the cheapest parts for ``expr``.

    Args:
      expr: the value to compute.
      runs: how often the body it belongs to runs in a step; weights that do not change between
        the runs are formed once.

    Raises:
      Unrepresentable: if a term has no safe way to be computed.
    """
    squares = [t for t in expr.terms if len(_roles(t, expr)[0]) == 2]
    if len(squares) > 1 and np.dtype(expr.dtype).itemsize < 8:
        raise Unrepresentable("the square of a sum, expanded, which narrow floats would cancel")
    groups: dict[object, list[Term]] = {}
    for term in expr.terms:
        rows, scales, _ = _roles(term, expr)
        key = _signature(rows, scales, expr) if rows and not term.windows else id(term)
        groups.setdefault(key, []).append(term)
    chosen = _with_convolutions([tuple(group) for group in groups.values()], expr, runs)
    parts = tuple(part for option, _ in chosen for part in option)
    cost = sum((cost for _, cost in chosen), Cost())
    whole = _whole(expr)
    share = 1 / runs if whole.once else 1.0
    additions = contraction.written(whole) * (_additions(parts, expr) * share)
    return Recipe(expr, parts, cost + additions)


def _additions(parts: Sequence[Part], expr: Expr) -> int:
    """How often the whole value is written beside what its products write by themselves."""
    products = [part for part in parts if _contracts(part, expr)]
    if not products or any(t.windows and not kernels.has_taps(t) for t in expr.terms):
        return 1
    of_data = [p for p in products if not isinstance(p, Product) or p.term.degree]
    return max(len(of_data) - 1, 0)


def _whole(expr: Expr) -> Operand:
    trainable = any(f.leaf.trainable for t in expr.terms for f in t.factors)
    once = not expr.has_data and all(f.leaf.invariant for t in expr.terms for f in t.factors)
    return Operand(expr.free, trainable, once, np.dtype(expr.dtype).itemsize)


def _contracts(part: Part, expr: Expr) -> bool:
    """Whether the part writes an array of the value's own size by itself."""
    if isinstance(part, Convolution):
        return part.rows is not None and part.rows.is_data
    labels = part.term.labels if isinstance(part, Product) else part.rows.labels
    return not labels <= expr.free and contraction.size(labels & expr.free) > 0


# --- the roles of factors -----------------------------------------------------------------------


def _roles(
    term: Term, expr: Expr
) -> tuple[tuple[Factor, ...], tuple[Factor, ...], tuple[Factor, ...]]:
    """Splits a term's factors into rows, scales of rows, and weights.

    A data factor whose labels all stand on weights too (a statistic of a channel) counts as a
    weight; one whose labels are all free and all on the rows (a statistic of a row) scales rows.
    """
    data = [f for f in term.factors if f.is_data]
    weights = [f for f in term.factors if not f.is_data]
    known = frozenset().union(*(f.labels for f in weights))
    if len(data) == 2:
        for small, large in (data, data[::-1]):
            if small.labels <= known and not large.labels <= known:
                return (large,), (), (*weights, small)
            if small.labels <= expr.free and small.labels < large.labels:
                return (large,), (small,), tuple(weights)
    return tuple(data), (), tuple(weights)


def _signature(rows: Sequence[Factor], scales: Sequence[Factor], expr: Expr) -> object:
    """Equal for terms that see the same data in the same way."""
    if len(rows) != 1:
        return object()
    bound = rows[0].labels - expr.free
    seen = Term(1.0, (*rows, *scales))
    return term_key(seen, expr.free), len(bound)


# --- options for a group of terms ---------------------------------------------------------------

Option = tuple[tuple[Part, ...], Cost]


def _cheapest(group: tuple[Term, ...], expr: Expr, runs: float) -> Option:
    square = _mean_square(group[0], expr, runs)
    if square is not None:
        return square
    options: list[Option] = []
    rows, scales, weights = _roles(group[0], expr)
    joins = len(rows) == 1 and bool(weights) and not group[0].windows
    joins = joins and any(_meets(t, expr) for t in group)
    must_merge = joins and bool(scales or rows[0].centred)
    if not must_merge:
        alone = [_product(term, expr, runs) for term in group]
        options.append((tuple(p for p, _ in alone), sum((c for _, c in alone), Cost())))
    if must_merge or (joins and len(group) > 1):
        options.append(_linear(group, expr, runs))
    return min(options, key=lambda option: contraction.measure(option[1], runs))


def _meets(term: Term, expr: Expr) -> bool:
    """Whether rows and weights of a term share a label that is summed."""
    rows, _, weights = _roles(term, expr)
    return any(rows[0].labels & f.labels - expr.free for f in weights)


def _operand(factor: Factor) -> Operand:
    leaf = factor.leaf
    once = leaf.kind != "data" and leaf.invariant
    return Operand(factor.labels, leaf.trainable, once, np.dtype(leaf.dtype).itemsize)


def _product(term: Term, expr: Expr, runs: float, keep: frozenset[Label] | None = None):
    """A term by itself, over the labels ``keep`` (those of the value by default)."""
    keep = computed_over(term, expr.free) if keep is None else keep
    if not term.factors:
        return Product(term, 0), Cost()
    operands = [_operand(f) for f in term.factors]
    order = contraction.search(operands, keep, runs)
    _, cost = contraction.price(order, operands, keep, runs)
    for factor, operand in zip(term.factors, operands, strict=True):
        if factor.centred and factor.is_data:  # the shifted copy is written out
            cost = cost + contraction.written(operand)
    if _is_one_pass(term, expr):
        raise Unrepresentable("a second moment of a product that float32 would cancel")
    return Product(term, order), cost


def computed_over(term: Term, free: frozenset[Label]) -> frozenset[Label]:
    """The labels a windowed term is computed over before it is put in place."""
    return kernels.computed_over(free, term.windows)


def _is_one_pass(term: Term, expr: Expr) -> bool:
    """Whether a term is a second moment that narrow floats would cancel.

    ``|x W|^2`` written as ``x (W W^T) x`` loses its digits where x W is small; see
    ``numerics.centred_square_sum`` for the form that keeps them.
    """
    if np.dtype(expr.dtype).itemsize >= 8:
        return False
    rows, _, weights = _roles(term, expr)
    return len(rows) == 2 and any(f.labels - expr.free for f in weights)


def _linear(group: tuple[Term, ...], expr: Expr, runs: float) -> Option:
    """All terms of a group through one effective weight."""
    rows, scales, _ = _roles(group[0], expr)
    (row,) = rows
    if row.centred and np.dtype(expr.dtype).itemsize < 4:
        raise Unrepresentable("a mean that half precision would not cancel through the weights")
    split = [_weight_term(term, row, expr) for term in group]
    inside = frozenset().union(*(t.labels for t in split)) & (row.labels | expr.free)
    labels = tuple(sorted(inside, key=_position(row, expr)))
    built = [_product(t, expr, runs, inside) for t in split]
    cost = sum((c for _, c in built), Cost())
    weight = _effective(split, inside, expr)
    result, product = contraction.pair(_operand(row), weight, expr.free, runs)
    cost = cost + product
    for factor in scales:
        result, extra = contraction.pair(result, _operand(factor), expr.free, runs)
        cost = cost + extra
        if weight.trainable:  # the scaled cotangent of the product is written for the gradient of Z
            cost = cost + Cost(time=contraction.BYTE * result.bytes)
    if row.centred & expr.free and row.centred - expr.free:
        raise Unrepresentable("a mean over both summed and free labels")
    part = Linear(
        rows=dataclasses.replace(row, centred=frozenset()),
        row_scales=scales,
        weights=tuple(p for p, _ in built),
        weight_labels=labels,
        centre_weight=row.centred - expr.free,
        centre_rows=row.centred & expr.free,
    )
    return (part,), cost


def _position(row: Factor, expr: Expr):
    order = list(itertools.chain(*row.axes, *expr.dims))
    return order.index


def _weight_term(term: Term, row: Factor, expr: Expr) -> Term:
    """What multiplies the rows in ``term``, on the bound labels of ``row``."""
    (own,), _, weights = _roles(term, expr)
    renaming = {
        mine: (theirs,)
        for mine, theirs in zip(itertools.chain(*own.axes), itertools.chain(*row.axes), strict=True)
    }
    weight = Term(term.scale, weights)
    inner = weight.labels - own.labels - expr.free  # the row's labels may stand here by chance
    renaming |= {label: (Label(label.size),) for label in inner}
    return weight.rename(renaming)


# --- convolutions -------------------------------------------------------------------------------


def _with_convolutions(groups: Sequence[tuple[Term, ...]], expr: Expr, runs: float) -> list[Option]:
    """The options for groups of terms; what sees the data on the same taps may share a kernel."""
    tapped = [group for group in groups if kernels.has_taps(group[0])]
    others = [group for group in groups if not kernels.has_taps(group[0])]
    if not tapped:
        return [_cheapest(group, expr, runs) for group in others]
    apart: list[Option] = []
    found: list[tuple[tuple[View, ...], Option]] = []
    for group in (*tapped, *others):
        views = _views(group, expr)
        alone = _convolution(views, expr, runs) if group in tapped else _cheapest(group, expr, runs)
        assert alone is not None
        joined = next(_joining(found, views, alone, expr, runs), None) if views else None
        if joined is not None:
            k, together = joined
            found[k] = ((*found[k][0], *views), together)
        elif group in tapped:
            found.append((views, alone))
        else:
            apart.append(alone)
    return [*(option for _, option in found), *apart]


def _views(group: Sequence[Term], expr: Expr) -> tuple[View, ...]:
    """How terms see the data, if they could be part of a convolution."""
    views = []
    for term in group:
        rows, scales, weights = _roles(term, expr)
        if kernels.has_taps(term):
            if len(rows) > 1 or scales:
                raise Unrepresentable("a window over a product of two activations")
        elif len(rows) != 1 or scales or rows[0].centred:
            return ()
        views.append(kernels.view(term, rows[0] if rows else None, weights, expr.free))
    return tuple(views)


def _joining(
    found: Sequence[tuple[tuple[View, ...], Option]], views: tuple[View, ...], alone: Option,
    expr: Expr, runs: float,
) -> Iterator[tuple[int, Option]]:  # fmt: skip
    """The convolutions that are no dearer with further terms in their kernels than beside them."""
    addition = contraction.written(_whole(expr)).time
    for k, (own, (_, cost)) in enumerate(found):
        together = _convolution((*own, *views), expr, runs)
        if together is not None and together[1].time <= cost.time + alone[1].time + addition:
            yield k, together


def _convolution(views: tuple[View, ...], expr: Expr, runs: float) -> Option | None:
    """All terms of a group through one kernel, if there is one."""
    shared, kept = kernels.share(views), views[0].kept
    if shared is None:
        return None
    built = [
        _product(weight, expr, runs, shared.inside(i, kept))
        for i, weight in enumerate(shared.weights)
    ]
    labels = shared.labels(kept, tuple(itertools.chain(*expr.dims)))
    kernel = _effective(shared.weights, labels, expr)
    trainable = shared.rows is not None and shared.rows.leaf.trainable
    rows = Operand(shared.seen, trainable, False, np.dtype(expr.dtype).itemsize)
    _, cost = contraction.pair(rows, kernel, kept, runs)
    if shared.is_assembled:
        cost = cost + contraction.written(kernel) * (1 / runs if kernel.once else 1.0)
    part = Convolution(
        shared.rows, shared.ones, shared.grids, tuple(p for p, _ in built), shared.places, labels,
        kept, views[0].windows,
    )  # fmt: skip
    return (part,), sum((c for _, c in built), cost)


def _effective(terms: Sequence[Term], labels: Iterable[Label], expr: Expr) -> Operand:
    """An effective weight that terms add up to, as far as its price is concerned."""
    factors = [f for t in terms for f in t.factors]
    once = all(f.leaf.invariant and not f.is_data for f in factors)
    trainable = any(f.leaf.trainable for f in factors)
    return Operand(frozenset(labels), trainable, once, np.dtype(expr.dtype).itemsize)


# --- mean squares -------------------------------------------------------------------------------


def _mean_square(term: Term, expr: Expr, runs: float) -> Option | None:
    """Recognises ``sum_n z z W W'`` with z centred over n and W, W' the same weight."""
    data = [f for f in term.factors if f.is_data]
    if len(data) != 2 or term.windows or not data[0].centred or data[0].leaf != data[1].leaf:
        return None
    first, second = data
    if first.centred != second.centred or first.centred & expr.free:
        return None
    if math.isinf(runs):
        raise Unrepresentable("statistics of a batch through weights, for which nothing is saved")
    halves = _halves(term, first, second, expr)
    if halves is None or np.dtype(expr.dtype).itemsize < 4:
        return None
    contracted = tuple(label for axis in first.axes for label in axis if label in halves.labels)
    contracted = tuple(label for label in contracted if label not in expr.free)
    inside = halves.labels & (first.labels | expr.free)
    if first.labels - first.centred - frozenset(contracted):
        return None  # a free label on the rows: one statistic for each of its values
    labels = contracted + tuple(label for axis in expr.dims for label in axis if label in inside)
    weight, cost = _product(halves, expr, runs, inside)
    rows, columns = _operand(first), Operand(inside, True, False, np.dtype(expr.dtype).itemsize)
    width, height = (contraction.size(frozenset(s)) for s in (contracted, first.centred))
    moments = 2.0 * width * width * height * (MOMENTS + rows.trainable)
    cost = cost + Cost(moments, moments)
    _, small = contraction.pair(
        Operand(frozenset((*contracted, Label(int(width) + 1))), True, False, rows.itemsize),
        columns, expr.free, runs,
    )  # fmt: skip
    cost = cost + small + contraction.written(dataclasses.replace(rows, trainable=False))
    part = MeanSquare(first, weight, labels, contracted, term.scale)
    return (part,), cost


def _halves(term: Term, first: Factor, second: Factor, expr: Expr) -> Term | None:
    """The weights next to ``first``, if those next to ``second`` are the same."""
    weights = [f for f in term.factors if f is not first and f is not second]
    shared = first.centred
    near = [_reachable(own.labels - shared - expr.free, weights, expr) for own in (first, second)]
    if not near[0] or len(near[0]) + len(near[1]) != len(weights):
        return None
    if set(map(id, near[0])) & set(map(id, near[1])):
        return None
    sides = [Term(1.0, (own, *part)) for own, part in zip((first, second), near, strict=True)]
    keys = {term_key(side, expr.free | shared) for side in sides}
    return Term(1.0, tuple(near[0])) if len(keys) == 1 else None


def _reachable(start: frozenset[Label], weights: Sequence[Factor], expr: Expr) -> list[Factor]:
    """The factors connected to some labels through summed labels."""
    seen, found = set(start), list[Factor]()
    while True:
        more = [f for f in weights if f.labels & seen and not any(f is g for g in found)]
        if not more:
            return found
        found += more
        seen |= functools.reduce(frozenset.union, (f.labels for f in more)) - expr.free
