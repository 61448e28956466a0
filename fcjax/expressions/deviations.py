"""Deviations from a mean, found before anything expands them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable

from fcjax.expressions.like_terms import term_key, with_terms
from fcjax.expressions.terms import Expr, Label, Term, Unrepresentable

__all__ = ["deviation", "recentre", "recentred_term"]


def recentre(expr: Expr) -> Expr:
    """Rewrites differences that a mean makes, before anything expands them.

    ``z[n] - sum_m z[m] / N`` becomes the centred factor of z, and ``sum z z / N - (sum z / N)^2``
    the mean square of the centred factor: shifting first keeps the digits that the one-pass
    formula loses when ``|mean| >> std``.
    """
    for i, term in enumerate(expr.terms):
        for rewrite in (_centred_square, _centred_value):
            found = rewrite(expr, i, term)
            if found is not None:
                return recentre(dataclasses.replace(expr, terms=found))
    return expr


def deviation(expr: Expr, axis: int) -> Expr:
    """``z - mean(z)`` over an axis, pushed down to the factors that vary along it.

    A product in which one factor varies has that factor centred, as ``x W`` has ``W``; one in
    which several do is less its own mean.
    """
    over = frozenset(expr.dims[axis])
    terms = [t for term in expr.terms for t in _deviation_term(term, over)]
    return recentre(with_terms(expr, terms))


def _deviation_term(term: Term, over: frozenset[Label]) -> list[Term]:
    if sum(bool(f.labels & over) for f in term.factors) < 2:
        return recentred_term(term, over)
    if any(window.labels & over for window in term.windows):
        raise Unrepresentable("a centred concatenation")
    inside = over & term.labels
    mean = term.rename({label: (Label(label.size),) for label in inside})
    by = -mean.scale / math.prod(label.size for label in inside)
    return [term, dataclasses.replace(mean, scale=by)]


def recentred_term(term: Term, centred: frozenset[Label]) -> list[Term]:
    """Moves the subtraction of a mean from a product onto the factor that varies."""
    if not centred:
        return [term]
    if any(window.labels & centred for window in term.windows):
        raise Unrepresentable("a centred concatenation")
    holding = [k for k, f in enumerate(term.factors) if f.labels & centred]
    if not holding:
        return []  # constant over the labels, so its deviation from the mean is zero
    if len(holding) > 1:
        raise Unrepresentable("a centred product of two factors that both vary")
    factor = term.factors[holding[0]]
    over = factor.labels & centred
    if factor.centred not in (frozenset(), over):
        raise Unrepresentable("deviations from two different means")
    return [_centre(term, holding, over)]


def _counterpart(expr: Expr, i: int, mean: Term) -> int | None:
    """The index of the term equal to ``mean``, scale included, other than term i."""
    leaves = Counter(id(f.leaf.var) for f in mean.factors)
    candidates = [
        j
        for j, other in enumerate(expr.terms)
        if j != i
        and math.isclose(other.scale, mean.scale, rel_tol=1e-12)
        and Counter(id(f.leaf.var) for f in other.factors) == leaves
    ]
    if not candidates:
        return None
    key = term_key(mean, expr.free)
    return next((j for j in candidates if term_key(expr.terms[j], expr.free) == key), None)


def _without(expr: Expr, i: int, j: int, new: Term) -> tuple[Term, ...]:
    kept = tuple(t for k, t in enumerate(expr.terms) if k not in (i, j))
    return (*kept, new)


def _centred_value(expr: Expr, i: int, term: Term) -> tuple[Term, ...] | None:
    """``s z[n] - s/N sum_m z[m]`` for a data factor z and a subset n of its free labels."""
    if len(expr.terms) < 2 or term.windows:
        return None
    for position, factor in enumerate(term.factors):
        others = [f.labels for k, f in enumerate(term.factors) if k != position]
        own = sorted(factor.labels & expr.free - frozenset().union(*others), key=id)
        if not factor.is_data or factor.centred or len(own) > 6:
            continue
        for count in range(1, len(own) + 1):
            for over in itertools.combinations(own, count):
                j = _counterpart(expr, i, _averaged(term, position, over))
                if j is not None:
                    return _without(expr, i, j, _centre(term, (position,), over))
    return None


def _centred_square(expr: Expr, i: int, term: Term) -> tuple[Term, ...] | None:
    """``s sum_n z z' - s/N sum_nm z[n] z'[m]`` for two data factors of one leaf."""
    pair = [k for k, f in enumerate(term.factors) if f.is_data]
    if len(expr.terms) < 2 or term.windows or len(pair) != 2:
        return None
    first, second = (term.factors[k] for k in pair)
    if first.centred or second.centred:
        return None
    over = tuple(first.labels & second.labels - expr.free)
    others = [f.labels for k, f in enumerate(term.factors) if k not in pair]
    if not over or frozenset(over) & frozenset().union(*others):
        return None
    j = _counterpart(expr, i, _averaged(term, pair[1], over))
    return None if j is None else _without(expr, i, j, _centre(term, pair, over))


def _averaged(term: Term, position: int, over: Iterable[Label]) -> Term:
    """The term to be subtracted from ``term`` so that one factor loses its mean over labels."""
    over = tuple(over)
    factor = term.factors[position].rename({x: (Label(x.size),) for x in over})
    factors = (*term.factors[:position], factor, *term.factors[position + 1 :])
    return Term(-term.scale / math.prod(x.size for x in over), factors)


def _centre(term: Term, positions: Iterable[int], over: Iterable[Label]) -> Term:
    factors = tuple(
        dataclasses.replace(f, centred=f.centred | frozenset(over)) if k in set(positions) else f
        for k, f in enumerate(term.factors)
    )
    return dataclasses.replace(term, factors=factors)
