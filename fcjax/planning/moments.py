"""Mean squares and squared norms of products, without the products."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from fcjax.expressions.like_terms import term_key
from fcjax.expressions.terms import Expr, Factor, Label, Term, Unrepresentable
from fcjax.planning import contraction
from fcjax.planning.contraction import Cost, Operand
from fcjax.planning.effective import effective, one_product
from fcjax.planning.parts import MeanSquare, Option, RowSquare
from fcjax.planning.roles import operand, roles, signature
from fcjax.planning.squares import Square

__all__ = ["mean_square", "row_square"]


MOMENTS = 3.0
"""Products of the rows with a matrix of their own width that a mean square takes."""
TRIANGLE = 10.0
"""Products of the weight with itself that a triangular factor of it takes the time of."""
MANY = 100.0
"""Operations on arrays that a mean square or a triangular factor begins, each way of a step."""
MUCH_WIDER = 2.0
"""A product must be this many times wider than its rows for its norms to be taken without it."""


def mean_square(term: Term, expr: Expr, runs: float) -> Option | None:
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
    weight, cost = one_product(halves, expr, runs, inside)
    rows, columns = operand(first), Operand(inside, True, False, np.dtype(expr.dtype).itemsize)
    width, height = (contraction.size(frozenset(s)) for s in (contracted, first.centred))
    moments = 2.0 * width * width * height * (MOMENTS + rows.trainable)
    cost = cost + Cost(moments + MANY * contraction.begun(runs), moments)
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


# --- squared norms of rows ----------------------------------------------------------------------


def row_square(expr: Expr, square: Square, runs: float) -> list[Option] | None:
    """The parts of a sum of squares of ``rows @ Z + b``, or None if it is none that pays."""
    inner, over = square.inner, frozenset(square.over)
    group, constant = _by_degree(inner)
    bound = _contracted(group, inner)
    if not bound or contraction.size(over) < MUCH_WIDER * contraction.size(bound):
        return None
    if np.dtype(expr.dtype).itemsize < 4 or any(t.labels - over for t in constant):
        return None
    part, weight, cost = effective(group, inner, runs)
    if weight.labels != bound | over or part.centre_rows:
        return None
    shifts = [one_product(t, inner, runs, over) for t in constant]
    rest = [one_product(t, expr, runs) for t in square.rest.terms]
    cost = sum((c for _, c in shifts), cost) + _row_square_cost(operand(part.rows), weight, over)
    norm = RowSquare(part, tuple(p for p, _ in shifts), square.over, square.scale)
    return [((norm,), cost), *(((p,), c) for p, c in rest)]


def _by_degree(expr: Expr) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """The terms with data, and those without."""
    return tuple(t for t in expr.terms if t.degree), tuple(t for t in expr.terms if not t.degree)


def _contracted(group: Sequence[Term], expr: Expr) -> frozenset[Label]:
    """The summed labels of the rows of a group, if all its terms are the same rows by weights."""
    found = [roles(term, expr) for term in group]
    alike = len({signature(rows, scales, expr) for rows, scales, _ in found}) == 1
    plain = all(len(rows) == 1 and not scales for rows, scales, _ in found)
    if not (alike and plain) or any(term.windows for term in expr.terms):
        return frozenset()
    return found[0][0][0].labels - expr.free


def _row_square_cost(rows: Operand, weight: Operand, over: frozenset[Label]) -> Cost:
    """What ``numerics.row_square_sum`` pays, and its two derivatives."""
    width, columns = (contraction.size(x) for x in (weight.labels - over, over))
    passes = 1 + rows.trainable + weight.trainable
    squares = 2.0 * width * width * columns
    work = 2.0 * width * contraction.size(rows.labels)
    copies = contraction.written(dataclasses.replace(rows, trainable=False)) * passes
    starts = MANY * contraction.START
    small = Cost(time=starts + (TRIANGLE + passes) * squares, flops=(2 + passes) * squares)
    return small + Cost(time=work * passes, flops=work * passes) + Cost(time=copies.time)
