"""Which parts an expression is computed by, chosen by price."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from fcjax.expressions.terms import Expr, Term, Unrepresentable
from fcjax.planning import contraction, kernels
from fcjax.planning.contraction import Cost, Operand
from fcjax.planning.effective import in_separate_orders, one_product, through_one_weight
from fcjax.planning.grids import share
from fcjax.planning.kernels import View
from fcjax.planning.moments import mean_square, row_square
from fcjax.planning.parts import Convolution, Option, Part, Product, Recipe
from fcjax.planning.phases import convolved
from fcjax.planning.roles import meets, roles, signature
from fcjax.planning.squares import Square

__all__ = ["convolution", "recipe"]


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
        parts = row_square(expr, square, runs)
        unexpanded = _sum(expr, parts, runs, square) if parts else None
    try:
        expanded = dataclasses.replace(_expanded(expr, runs), square=square)
    except Unrepresentable:
        if unexpanded is None:
            raise
        return unexpanded
    cheaper = unexpanded is not None and unexpanded.cost.time < expanded.cost.time
    return unexpanded if unexpanded is not None and cheaper else expanded


def _expanded(expr: Expr, runs: float) -> Recipe:
    squares = [t for t in expr.terms if len(roles(t, expr)[0]) == 2]
    if len(squares) > 1 and np.dtype(expr.dtype).itemsize < 8:
        raise Unrepresentable("the square of a sum, expanded, which narrow floats would cancel")
    groups: dict[object, list[Term]] = {}
    for term in expr.terms:
        rows, scales, _ = roles(term, expr)
        key = signature(rows, scales, expr) if rows and not term.windows else id(term)
        groups.setdefault(key, []).append(term)
    chosen = _with_convolutions([tuple(group) for group in groups.values()], expr, runs)
    return _sum(expr, chosen, runs)


def _sum(expr: Expr, chosen: Sequence[Option], runs: float, square: Square | None = None) -> Recipe:
    parts = tuple(part for option, _ in chosen for part in option)
    cost = sum((cost for _, cost in chosen), Cost())
    whole = _whole(expr)
    share = 1 / runs if whole.once else 1.0
    repeats = not expr.free <= frozenset().union(*(t.labels for t in expr.terms))
    writes = max(_additions(parts, expr), int(repeats))  # repeating a product writes it anew
    additions = contraction.written(whole, runs) * (writes * share)
    return Recipe(expr, parts, cost + additions + _gradients_added(expr), square)


def _gradients_added(expr: Expr) -> Cost:
    """Adding up the gradients of what several terms read."""
    uses = [f.leaf.var for t in expr.terms for f in t.factors if f.leaf.trainable]
    return Cost(time=contraction.START * (len(uses) - len(set(uses))))


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


def _cheapest(group: tuple[Term, ...], expr: Expr, runs: float) -> Option:
    square = mean_square(group[0], expr, runs)
    if square is not None:
        return square
    options: list[Option] = []
    rows, scales, weights = roles(group[0], expr)
    joins = len(rows) == 1 and bool(weights) and not group[0].windows
    joins = joins and any(meets(t, expr) for t in group)
    must_merge = joins and bool(scales or rows[0].centred)
    if not must_merge:
        alone = [one_product(term, expr, runs) for term in group]
        options.append((tuple(p for p, _ in alone), sum((c for _, c in alone), Cost())))
    if must_merge or (joins and len(group) > 1):
        options.append(through_one_weight(group, expr, runs))
    apart = joins and len(group) > 1 and not must_merge and runs == 1
    if apart and all(t.degree == 1 for t in group):  # the weights are of parameters alone
        options.append(in_separate_orders(group, expr))
    return min(options, key=lambda option: contraction.measure(option[1], runs))


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
        alone = convolution(views, expr, runs) if group in tapped else _cheapest(group, expr, runs)
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
        rows, scales, weights = roles(term, expr)
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
    addition = contraction.written(_whole(expr), runs).time
    for k, (own, (_, cost)) in enumerate(found):
        together = convolution((*own, *views), expr, runs)
        if together is not None and together[1].time <= cost.time + alone[1].time + addition:
            yield k, together


def convolution(views: tuple[View, ...], expr: Expr, runs: float) -> Option | None:
    """Terms that see the same data through one kernel, if there is one for all of them."""
    shared, kept = share(views), views[0].kept
    if shared is None:
        return None
    built = [
        one_product(weight, expr, runs, shared.inside(i, kept))
        for i, weight in enumerate(shared.weights)
    ]
    part = Convolution(
        shared.rows, shared.ones, shared.grids, tuple(p for p, _ in built), shared.places,
        shared.labels(kept, tuple(itertools.chain(*expr.dims))), kept, views[0].windows,
    )  # fmt: skip
    return (part,), sum((c for _, c in built), convolved(part, expr, runs))
