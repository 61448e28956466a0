"""What the factors of a term do in it: rows, scales of rows, and weights."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from fcjax.expressions.like_terms import term_key
from fcjax.expressions.terms import Expr, Factor, Label, Term
from fcjax.planning.contraction import Operand

__all__ = ["effective_weight", "meets", "operand", "roles", "signature", "weight_term"]


def roles(
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


def signature(rows: Sequence[Factor], scales: Sequence[Factor], expr: Expr) -> object:
    """Equal for terms that see the same data in the same way."""
    if len(rows) != 1:
        return object()
    bound = rows[0].labels - expr.free
    seen = Term(1.0, (*rows, *scales))
    return term_key(seen, expr.free), len(bound)


def meets(term: Term, expr: Expr) -> bool:
    """Whether rows and weights of a term share a label that is summed."""
    rows, _, weights = roles(term, expr)
    return any(rows[0].labels & f.labels - expr.free for f in weights)


def operand(factor: Factor) -> Operand:
    """A factor, as far as its price is concerned."""
    leaf = factor.leaf
    once = leaf.kind != "data" and leaf.invariant
    return Operand(factor.labels, leaf.trainable, once, np.dtype(leaf.dtype).itemsize)


def weight_term(term: Term, row: Factor, expr: Expr) -> Term:
    """What multiplies the rows in ``term``, on the bound labels of ``row``."""
    (own,), _, weights = roles(term, expr)
    renaming = {
        mine: (theirs,)
        for mine, theirs in zip(itertools.chain(*own.axes), itertools.chain(*row.axes), strict=True)
    }
    weight = Term(term.scale, weights)
    inner = weight.labels - own.labels - expr.free  # the row's labels may stand here by chance
    renaming |= {label: (Label(label.size),) for label in inner}
    return weight.rename(renaming)


def effective_weight(terms: Sequence[Term], labels: Iterable[Label], expr: Expr) -> Operand:
    """An effective weight that terms add up to, as far as its price is concerned."""
    factors = [f for t in terms for f in t.factors]
    once = all(f.leaf.invariant and not f.is_data for f in factors)
    trainable = any(f.leaf.trainable for f in factors)
    return Operand(frozenset(labels), trainable, once, np.dtype(expr.dtype).itemsize)
