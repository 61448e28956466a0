"""Effective weights: products of parameters, sums of them, and which can be formed ahead."""

import dataclasses
import itertools
import math
from collections.abc import Hashable
from typing import Any

import numpy as np

from fcjax.expressions.terms import Expr, Factor, Label
from fcjax.planning.contraction import Order, members
from fcjax.planning.grids import Taps
from fcjax.planning.parts import (
    Convolution,
    Linear,
    MeanSquare,
    Part,
    Product,
    Recipe,
    RowSquare,
    computed_over,
)
from fcjax.running import convolving
from fcjax.running.arrays import broadcast_to, library
from fcjax.running.named import (
    Env,
    Named,
    less_mean,
    met,
    ordered,
    pair,
    realised,
    sum_out,
    widest,
)

__all__ = ["Formed", "form", "formed_leaves", "product_of", "weight_of", "whole_weight"]


Formed = dict[Hashable, Named]
"""Weights of a recipe that were formed earlier, by the part or the product they belong to."""


def product_of(
    part: Product, keep: frozenset[Label], expr: Expr, env: Env, formed: Formed | None = None,
    key: tuple[Hashable, ...] = (),
) -> Named:  # fmt: skip
    """A product, summed over all labels that are not kept.

    Args:
      part: the product.
      keep: the labels of the result.
      expr: the expression that it is part of.
      env: the arrays of its leaves.
      formed: sub-products formed earlier, under ``(*key, order)``.
      key: the number of the part in its recipe.
    """
    term = part.term
    if not term.factors:
        return Named(np.asarray(term.scale, expr.dtype), (), False)
    value = sum_out(_multiply(part, part.order, keep, expr, env, formed or {}, key), keep)
    if term.scale == 1.0:
        return value
    return dataclasses.replace(value, array=value.array * term.scale)


def _multiply(
    part: Product, order: Order, needed: frozenset[Label], expr: Expr, env: Env, formed: Formed,
    key: tuple[Hashable, ...],
) -> Named:  # fmt: skip
    if (*key, order) in formed:
        return formed[(*key, order)]
    if isinstance(order, int):
        return realised(part.term.factors[order], env)
    a, b = (
        _multiply(part, half, needed | _labels_of(part, other), expr, env, formed, key)
        for half, other in (order, order[::-1])
    )
    return pair(a, b, needed, expr)


def _labels_of(part: Product, order: Order) -> frozenset[Label]:
    return frozenset().union(*(part.term.factors[k].labels for k in members(order)))


def weight_of(part: Linear | MeanSquare | Convolution, env: Env, expr: Expr) -> Named:
    """The effective weight Z, on exactly ``part.weight_labels``."""
    labels = part.weight_labels
    total: Any = None
    for i, product in enumerate(_products(part)):
        if isinstance(part, Convolution):
            value = _tap_product(part, i, expr, env)
        else:
            value = product_of(product, frozenset(labels), expr, env)
        array = ordered(value, labels)
        array = array.astype(widest(expr.dtype, array.dtype))  # where the data are wider
        total = array if total is None else total + array
    assert total is not None
    total = broadcast_to(total, [label.size for label in labels])
    if isinstance(part, Linear) and part.centre_weight:
        total = less_mean(total, labels, part.centre_weight)
    data = any(f.is_data for product in _products(part) for f in product.term.factors)
    return Named(total, labels, data)


def _products(part: Part) -> tuple[Product, ...]:
    if isinstance(part, Product):
        return (part,)
    if isinstance(part, RowSquare):
        return (*part.inner.weights, *part.shifts)
    return (part.weight,) if isinstance(part, MeanSquare) else part.weights


def whole_weight(
    part: Linear | MeanSquare | RowSquare | Convolution, env: Env, expr: Expr
) -> Named:
    """The effective weight; of a row square as a matrix, with the shift as its last row."""
    if not isinstance(part, RowSquare):
        return weight_of(part, env, expr)
    contracted = [x for x in itertools.chain(*part.rows.axes) if x in part.inner.weight_labels]
    width, columns = (math.prod(x.size for x in labels) for labels in (contracted, part.over))
    own = weight_of(part.inner, env, expr)
    matrix = ordered(own, (*contracted, *part.over)).reshape(width, columns)
    if not part.shifts:
        return Named(matrix, (Label(width), Label(columns)), own.data)
    shift = np.zeros([x.size for x in part.over], matrix.dtype)
    for product in part.shifts:
        value = product_of(product, frozenset(part.over), expr, env)
        shift = ordered(value, part.over) + shift
    dtype = np.promote_types(matrix.dtype, shift.dtype)
    both = [matrix.astype(dtype), shift.reshape(1, columns).astype(dtype)]
    rows = library(*both).concatenate(both, 0)
    return Named(rows, (Label(width + 1), Label(columns)), own.data)


def _tap_product(part: Convolution, i: int, expr: Expr, env: Env) -> Named:
    """One of the products that a kernel is the sum of, at its place among the taps."""
    product, place = part.weights[i], part.places[i]
    value = product_of(product, frozenset(part.weight_labels) | place.labels, expr, env)
    kernel = frozenset(part.weight_labels)
    for grid, taps in zip(part.grids, place.taps, strict=True):
        if grid.tap is not None or taps.steps:
            value = _at_taps(value, taps, grid.tap, kernel, expr)
    for summed, kept in place.diagonal:
        eye = Named(np.eye(kept.size, dtype=value.array.dtype), (summed, kept), False)
        value = pair(value, eye, frozenset(part.weight_labels), expr)
    return value


def _at_taps(
    value: Named, taps: Taps, tap: Label | None, kernel: frozenset[Label], expr: Expr
) -> Named:
    """Puts the entries of a product at a tap of a kernel, whose labels are ``kernel``."""
    own = [x for x, _ in taps.steps if x in value.labels]
    plain = taps == Taps(tuple((x, 1) for x in own), 0)
    if tap is not None and own and plain and own[0].size == tap.size:
        labels = tuple(tap if x is own[0] else x for x in value.labels)
        return dataclasses.replace(value, labels=labels)  # it is the kernel's own grid
    kept = [(x, by) for x, by in taps.steps if x in own or x in kernel]
    absent = [(x.size, by) for x, by in taps.steps if not (x in own or x in kernel)]
    chosen = convolving.placing(
        [(x.size, by) for x, by in kept], absent, taps.low, tap.size if tap else 1, taps.every
    )
    axes = (*(x for x, _ in kept), *([tap] if tap else []))
    chosen = chosen.reshape([x.size for x in axes])
    placing = Named(np.asarray(chosen, value.array.dtype), axes, False)
    return pair(value, placing, frozenset(value.labels).difference(own) | kernel, expr)


# --- what is formed ahead -----------------------------------------------------------------------


def form(recipe: Recipe, env: Env) -> Formed:
    """The weights of a recipe that are the same in every run of the body it belongs to."""
    formed: Formed = {}
    for i, part in enumerate(recipe.parts):
        if isinstance(part, Product):
            _form_product(part, (i,), recipe.expr, env, formed)
        elif not _is_apart(part) and _is_invariant(part):
            weight = whole_weight(part, env, recipe.expr)
            array = weight.array.astype(met(weight, recipe.expr))  # once, not in every run
            formed[i] = dataclasses.replace(weight, array=array)
    return formed


def _form_product(
    part: Product, key: tuple[Hashable, ...], expr: Expr, env: Env, formed: Formed
) -> None:
    """Forms the largest invariant sub-products of a product."""
    if not part.term.factors or all(_invariant(f) for f in part.term.factors):
        return  # a constant of the value: nothing meets it but the sum

    def visit(order: Order, needed: frozenset[Label]) -> None:
        if isinstance(order, int):
            return
        inside = members(order)
        if all(_invariant(part.term.factors[k]) for k in inside):
            formed[(*key, order)] = _multiply(part, order, needed, expr, env, {}, key)
            return
        for half, other in (order, order[::-1]):
            visit(half, needed | _labels_of(part, other))

    visit(part.order, computed_over(part.term, expr.free))


def formed_leaves(recipe: Recipe) -> set[Hashable]:
    """The leaves that ``form`` reads."""
    factors = [
        f
        for part in recipe.parts
        for product in _products(part)
        for f in product.term.factors
        if _invariant(f)
    ]
    return {f.leaf.var for f in factors}


def _is_apart(part: Part) -> bool:
    return isinstance(part, Linear) and bool(part.apart)


def _is_invariant(part: Part) -> bool:
    return all(_invariant(f) for p in _products(part) for f in p.term.factors)


def _invariant(factor: Factor) -> bool:
    return factor.leaf.kind != "data" and factor.leaf.invariant
