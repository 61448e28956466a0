"""How the terms of one expression are computed together: alone, merged, or as a mean square.

Terms that see the data through the same factors add up to one effective weight,

    ``x A + x B C = x Z``,   ``Z = A + B C``,

the gain of a normalisation folds into it and the scale of each row is applied afterwards,

    ``((x - mean) / std * g) W = (x Z) / std``,   ``Z`` = ``diag(g) W`` less its column means,

the variance that a batch normalisation takes of ``x W`` needs ``x`` only through its own second
moments, and the squared norms of the rows of ``x W`` need no more of W than ``W W^T``. Which of
these a value uses is decided here, by price; nothing is computed yet.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fcjax.expressions.like_terms import term_key
from fcjax.expressions.terms import Expr, Factor, Label, Term, Unrepresentable, Window
from fcjax.planning import contraction, kernels
from fcjax.planning.contraction import Cost, Operand, Order
from fcjax.planning.kernels import Grid, Place, View
from fcjax.planning.squares import Square

__all__ = [
    "Convolution",
    "Linear",
    "MeanSquare",
    "Part",
    "Product",
    "Recipe",
    "RowSquare",
    "computed_over",
    "recipe",
]

MOMENTS = 3.0
"""Products of the rows with a matrix of their own width that a mean square takes."""
TRIANGLE = 10.0
"""Products of the weight with itself that a triangular factor of it takes the time of."""
MUCH_WIDER = 2.0
"""A product must be this many times wider than its rows for its norms to be taken without it."""
APART = 1.1
"""How much more than its price a product with separate orders takes: on a CPU, three sizes whose
prices were 4%, 9% and 17% below those as written took 6% more, the same and 7% less time."""


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


Part = Product | Linear | MeanSquare | RowSquare | Convolution


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


def recipe(expr: Expr, runs: float = 1, square: Square | None = None) -> Recipe:
    """Chooses the cheapest parts for ``expr``.

    Args:
      expr: the value to compute.
      runs: how often the body it belongs to runs in a step; weights that do not change between
        the runs are formed once.
      square: how ``expr`` is a sum of squares, if it is known to be one.

    Raises:
      Unrepresentable: if a term has no safe way to be computed.
    """
    unexpanded = None
    if square is not None and not math.isinf(runs):  # for inference a norm stays as written
        unexpanded = _unexpanded(expr, square, runs)
    try:
        expanded = dataclasses.replace(_expanded(expr, runs), square=square)
    except Unrepresentable:
        if unexpanded is None:
            raise
        return unexpanded
    cheaper = unexpanded is not None and unexpanded.cost.time < expanded.cost.time
    return unexpanded if unexpanded is not None and cheaper else expanded


def _expanded(expr: Expr, runs: float) -> Recipe:
    squares = [t for t in expr.terms if len(_roles(t, expr)[0]) == 2]
    if len(squares) > 1 and np.dtype(expr.dtype).itemsize < 8:
        raise Unrepresentable("the square of a sum, expanded, which narrow floats would cancel")
    groups: dict[object, list[Term]] = {}
    for term in expr.terms:
        rows, scales, _ = _roles(term, expr)
        key = _signature(rows, scales, expr) if rows and not term.windows else id(term)
        groups.setdefault(key, []).append(term)
    chosen = _with_convolutions([tuple(group) for group in groups.values()], expr, runs)
    return _whole_recipe(expr, chosen, runs)


def _whole_recipe(
    expr: Expr, chosen: "Sequence[Option]", runs: float, square: Square | None = None
) -> Recipe:
    parts = tuple(part for option, _ in chosen for part in option)
    cost = sum((cost for _, cost in chosen), Cost())
    whole = _whole(expr)
    share = 1 / runs if whole.once else 1.0
    additions = contraction.written(whole) * (_additions(parts, expr) * share)
    return Recipe(expr, parts, cost + additions, square)


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
    if joins and len(group) > 1 and not must_merge and runs == 1:
        options.append(_apart(group, expr))
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
        if factor.centred:  # the shifted copy is written out
            cost = cost + contraction.written(operand) * (1 / runs if operand.once else 1.0)
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
    part, weight, cost = _effective(group, expr, runs)
    result, product = contraction.pair(_operand(part.rows), weight, expr.free, runs)
    cost = cost + product
    for factor in part.row_scales:
        result, extra = contraction.pair(result, _operand(factor), expr.free, runs)
        cost = cost + extra
        if weight.trainable:  # the scaled cotangent of the product is written for the gradient of Z
            cost = cost + Cost(time=contraction.BYTE * result.bytes)
    return (part,), cost


def _effective(group: tuple[Term, ...], expr: Expr, runs: float) -> tuple[Linear, Operand, Cost]:
    """The rows of a group of terms, their one effective weight, and the price of forming it."""
    rows, scales, _ = _roles(group[0], expr)
    (row,) = rows
    if row.centred and np.dtype(expr.dtype).itemsize < 4:
        raise Unrepresentable("a mean that half precision would not cancel through the weights")
    split = [_weight_term(term, row, expr) for term in group]
    inside = frozenset().union(*(t.labels for t in split)) & (row.labels | expr.free)
    labels = tuple(sorted(inside, key=_position(row, expr)))
    built = [_product(t, expr, runs, inside) for t in split]
    cost = sum((c for _, c in built), Cost())
    weight = _effective_weight(split, inside, expr)
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
    return part, weight, cost


def _apart(group: tuple[Term, ...], expr: Expr) -> Option:
    """All terms through one weight, but for the derivative by the weights.

    Beside a frozen weight, ``x (W + A B)``, that is ``x^T (dy B^T)`` and ``(x A)^T dy``, which the
    gradient of the effective weight would cost as much as one of W.
    """
    (linear,), _ = _linear(group, expr, 1)
    assert isinstance(linear, Linear)
    fixed = [_fixed(term, weights=True) for term in group]
    _, cost = _linear(tuple(fixed), expr, 1)
    apart = []
    for term in group:
        product, _ = _product(term, expr, 1)
        operands = [_operand(f) for f in _fixed(term, weights=False).factors]
        apart.append(product)
        if any(o.trainable for o in operands):
            cost = cost + contraction.backward(product.order, operands, expr.free)
    cost = dataclasses.replace(cost, time=APART * cost.time)
    return (dataclasses.replace(linear, apart=tuple(apart)),), cost


def _fixed(term: Term, *, weights: bool) -> Term:
    """The term with no gradient to its weights, or with none to its data."""
    factors = tuple(
        dataclasses.replace(f, leaf=dataclasses.replace(f.leaf, trainable=False))
        if f.is_data != weights
        else f
        for f in term.factors
    )
    return dataclasses.replace(term, factors=factors)


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


# --- squared norms of rows ----------------------------------------------------------------------


def _unexpanded(expr: Expr, square: Square, runs: float) -> Recipe | None:
    """The recipe of a sum of squares of ``rows @ Z + b``, or None if it is none that pays."""
    inner, over = square.inner, frozenset(square.over)
    group, constant = _by_degree(inner)
    bound = _contracted(group, inner)
    if not bound or contraction.size(over) < MUCH_WIDER * contraction.size(bound):
        return None
    if np.dtype(expr.dtype).itemsize < 4 or any(t.labels - over for t in constant):
        return None
    part, weight, cost = _effective(group, inner, runs)
    if weight.labels != bound | over or part.centre_rows:
        return None
    shifts = [_product(t, inner, runs, over) for t in constant]
    rest = [_product(t, expr, runs) for t in square.rest.terms]
    cost = sum((c for _, c in shifts), cost) + _row_square_cost(_operand(part.rows), weight, over)
    norm = RowSquare(part, tuple(p for p, _ in shifts), square.over, square.scale)
    return _whole_recipe(expr, [((norm,), cost), *(((p,), c) for p, c in rest)], runs, square)


def _by_degree(expr: Expr) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """The terms with data, and those without."""
    return tuple(t for t in expr.terms if t.degree), tuple(t for t in expr.terms if not t.degree)


def _contracted(group: Sequence[Term], expr: Expr) -> frozenset[Label]:
    """The summed labels of the rows of a group, if all its terms are the same rows by weights."""
    roles = [_roles(term, expr) for term in group]
    alike = len({_signature(rows, scales, expr) for rows, scales, _ in roles}) == 1
    plain = all(len(rows) == 1 and not scales for rows, scales, _ in roles)
    if not (alike and plain) or any(term.windows for term in expr.terms):
        return frozenset()
    return roles[0][0][0].labels - expr.free


def _row_square_cost(rows: Operand, weight: Operand, over: frozenset[Label]) -> Cost:
    """What ``numerics.row_square_sum`` pays, and its two derivatives."""
    width, columns = (contraction.size(x) for x in (weight.labels - over, over))
    passes = 1 + rows.trainable + weight.trainable
    squares = 2.0 * width * width * columns
    work = 2.0 * width * contraction.size(rows.labels)
    copies = contraction.written(dataclasses.replace(rows, trainable=False)) * passes
    small = Cost(time=(TRIANGLE + passes) * squares, flops=(2 + passes) * squares)
    return small + Cost(time=work * passes, flops=work * passes) + Cost(time=copies.time)


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
    kernel = _effective_weight(shared.weights, labels, expr)
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


def _effective_weight(terms: Sequence[Term], labels: Iterable[Label], expr: Expr) -> Operand:
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
