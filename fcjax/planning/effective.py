"""Terms that see the same rows, each by itself or all through one effective weight."""

import dataclasses
import itertools

import numpy as np

from fcjax.expressions.terms import Expr, Factor, Label, Term, Unrepresentable
from fcjax.planning import contraction
from fcjax.planning.contraction import Cost, Operand
from fcjax.planning.parts import Linear, Option, Product, computed_over
from fcjax.planning.roles import effective_weight, operand, roles, weight_term

__all__ = ["effective", "in_separate_orders", "one_product", "through_one_weight"]


APART = 1.1
"""How much more than its price a product with separate orders takes: on a CPU, three sizes whose
prices were 4%, 9% and 17% below those as written took 6% more, the same and 7% less time."""


def one_product(
    term: Term, expr: Expr, runs: float, keep: frozenset[Label] | None = None
) -> tuple[Product, Cost]:
    """A term by itself, over the labels ``keep`` (those of the value by default)."""
    keep = computed_over(term, expr.free) if keep is None else keep
    if not term.factors:
        return Product(term, 0), Cost()
    operands = [operand(f) for f in term.factors]
    order = contraction.search(operands, keep, runs)
    _, cost = contraction.price(order, operands, keep, runs)
    for factor, own in zip(term.factors, operands, strict=True):
        if factor.centred:  # the shifted copy is written out
            cost = cost + contraction.written(own, runs) * (1 / runs if own.once else 1.0)
        if any(factor.slices) and not factor.is_data:  # taken out, and its gradient put back
            cost = cost + Cost(time=(1 + 2 * factor.leaf.trainable) * contraction.begun(runs))
    if _is_one_pass(term, expr):
        raise Unrepresentable("a second moment of a product that float32 would cancel")
    return Product(term, order), cost


def _is_one_pass(term: Term, expr: Expr) -> bool:
    """Whether a term is a second moment that narrow floats would cancel.

    ``|x W|^2`` written as ``x (W W^T) x`` loses its digits where x W is small; see
    ``numerics.centred_square_sum`` for the form that keeps them.
    """
    if np.dtype(expr.dtype).itemsize >= 8:
        return False
    rows, _, weights = roles(term, expr)
    if len(rows) != 2 or len({f.labels & expr.free for f in rows}) > 1:
        return False  # two different rows, such as a query and a key
    return any(f.labels - expr.free for f in weights)


def through_one_weight(group: tuple[Term, ...], expr: Expr, runs: float) -> Option:
    """All terms of a group through one effective weight."""
    part, weight, cost = effective(group, expr, runs)
    result, product = contraction.pair(operand(part.rows), weight, expr.free, runs)
    cost = cost + product
    for factor in part.row_scales:
        result, extra = contraction.pair(result, operand(factor), expr.free, runs)
        cost = cost + extra
        if weight.trainable:
            # The scaled cotangent of the product is written for the gradient of Z, and read with
            # the product for that of the scale: in a cache that takes no less than BYTE.
            cost = cost + Cost(time=contraction.BYTE * result.bytes)
    return (part,), cost


def effective(group: tuple[Term, ...], expr: Expr, runs: float) -> tuple[Linear, Operand, Cost]:
    """The rows of a group of terms, their one effective weight, and the price of forming it."""
    rows, scales, _ = roles(group[0], expr)
    (row,) = rows
    if row.centred and np.dtype(expr.dtype).itemsize < 4:
        raise Unrepresentable("a mean that half precision would not cancel through the weights")
    split = [weight_term(term, row, expr) for term in group]
    inside = frozenset().union(*(t.labels for t in split)) & (row.labels | expr.free)
    labels = tuple(sorted(inside, key=_position(row, expr)))
    built = [one_product(t, expr, runs, inside) for t in split]
    cost = sum((c for _, c in built), Cost())
    weight = effective_weight(split, inside, expr)
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


def _position(row: Factor, expr: Expr):
    order = list(itertools.chain(*row.axes, *expr.dims))
    return order.index


def in_separate_orders(group: tuple[Term, ...], expr: Expr) -> Option:
    """All terms through one weight, but for the derivative by the weights.

    Beside a frozen weight, ``x (W + A B)``, that is ``x^T (dy B^T)`` and ``(x A)^T dy``, which the
    gradient of the effective weight would cost as much as one of W.
    """
    (linear,), _ = through_one_weight(group, expr, 1)
    assert isinstance(linear, Linear)
    fixed = [_fixed(term, weights=True) for term in group]
    _, cost = through_one_weight(tuple(fixed), expr, 1)
    apart = []
    for term in group:
        product, _ = one_product(term, expr, 1)
        operands = [operand(f) for f in _fixed(term, weights=False).factors]
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
