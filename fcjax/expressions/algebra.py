"""Sums, products and substitution of expressions.

Every operation here is exact algebra; what cannot be represented raises
:class:`~fcjax.expressions.terms.Unrepresentable` and becomes a boundary.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from fcjax.expressions.deviations import recentre, recentred_term
from fcjax.expressions.layout import aligned, aligned_axes, refine
from fcjax.expressions.like_terms import term_key, with_terms
from fcjax.expressions.terms import (
    Axis,
    Dims,
    Expr,
    Factor,
    Label,
    Renaming,
    Term,
    Unrepresentable,
    Window,
    apart,
    refreshed,
)
from fcjax.expressions.windowed import resolved, slice_axis

__all__ = ["add", "contract", "multiply", "reduce_sum", "scale", "substitute"]


def scale(expr: Expr, by: float) -> Expr:
    """``by * expr`` for a known number."""
    terms = tuple(dataclasses.replace(term, scale=term.scale * by) for term in expr.terms)
    return dataclasses.replace(expr, terms=terms)


def add(a: Expr, b: Expr) -> Expr:
    """``a + b`` for equal shapes; like terms are added up and deviations from a mean found."""
    a, b = aligned(a, apart(b, a))
    return recentre(with_terms(a, a.terms + b.terms, b))


def multiply(a: Expr, b: Expr) -> Expr:
    """The elementwise product of equal shapes."""
    a, b = aligned(a, apart(b, a))
    return _product(a, b, a.dims, squared=_same(a, b))


def contract(
    a: Expr,
    b: Expr,
    contracting: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
) -> Expr:
    """``lax.dot_general``: axes of the result are batch, free axes of ``a``, free axes of ``b``."""
    b = apart(b, a)
    a, b = aligned_axes(a, b, (*contracting[0], *batch[0]), (*contracting[1], *batch[1]))
    free_a = [d for i, d in enumerate(a.dims) if i not in (*contracting[0], *batch[0])]
    free_b = [d for i, d in enumerate(b.dims) if i not in (*contracting[1], *batch[1])]
    dims = (*(a.dims[i] for i in batch[0]), *free_a, *free_b)
    if any(t.degree and u.degree for t in a.terms for u in b.terms):
        raise Unrepresentable("a product of two activations")
    summed = [label for i in contracting[0] for label in a.dims[i]]
    return _product(a, b, dims, summed=summed)


def _product(
    a: Expr, b: Expr, dims: Dims, *, squared: bool = False, summed: Sequence[Label] = ()
) -> Expr:
    free = frozenset(itertools.chain.from_iterable(dims))
    terms = []
    for t, u in itertools.product(a.terms, b.terms):
        if t.degree and u.degree and not (squared or _scales(t, u, free) or _scales(u, t, free)):
            raise Unrepresentable("a product of two activations")
        both = Term(t.scale * u.scale, t.factors + u.factors, t.windows + u.windows)
        if both.degree > 2 or (t.windows and u.windows):
            raise Unrepresentable("a product of degree above two in the data")
        missing = math.prod(label.size for label in summed if label not in both.labels)
        both = dataclasses.replace(both, scale=both.scale * missing)
        terms.append(resolved(both, free))
    return recentre(with_terms(dataclasses.replace(a, dims=dims), terms, b))


def _scales(small: Term, large: Term, free: frozenset[Label]) -> bool:
    """Whether the data in ``small`` is a statistic of coarser shape, such as a row's norm.

    A number scales anything with axes, also a single row, whose own axis has no label.
    """
    own, other = ([f for f in t.factors if f.is_data] for t in (small, large))
    labels = [frozenset[Label]().union(*(f.labels for f in fs)) for fs in (own, other)]
    number = all(not f.leaf.shape for f in own) and any(f.leaf.shape for f in other)
    return number or labels[0] & free < labels[1] & free


def _same(a: Expr, b: Expr) -> bool:
    """Whether two aligned expressions are term by term the same."""
    keys = [Counter((term_key(t, e.free), t.scale) for t in e.terms) for e in (a, b)]
    return keys[0] == keys[1]


def reduce_sum(expr: Expr, axes: Iterable[int]) -> Expr:
    """Sums over axes; a label that a term lacks multiplies it by its size."""
    axes = set(axes)
    gone = [label for axis in axes for label in expr.dims[axis]]
    dims = tuple(dim for i, dim in enumerate(expr.dims) if i not in axes)
    free = frozenset(itertools.chain.from_iterable(dims))
    terms = [t for term in expr.terms for t in _sum_term(term, gone, free)]
    return recentre(with_terms(dataclasses.replace(expr, dims=dims), terms))


def _sum_term(term: Term, gone: Sequence[Label], free: frozenset[Label]) -> list[Term]:
    missing = math.prod(label.size for label in gone if label not in term.labels)
    holders = [[f for f in term.factors if label in f.labels] for label in gone]
    for label, holding in zip(gone, holders, strict=True):
        if len(holding) == 1 and label in holding[0].centred:
            if len(holding[0].centred & set(gone)) < len(holding[0].centred):
                raise Unrepresentable("a partial sum of a centred value")
            return []  # deviations from a mean add up to zero
    summed = resolved(dataclasses.replace(term, scale=term.scale * missing), free)
    if any(w.labels.isdisjoint(free) for w in summed.windows):
        raise Unrepresentable("a sum over an axis that windows with taps make")
    return [summed]


# --- substitution -------------------------------------------------------------------------------


def substitute(expr: Expr, var: Hashable, value: Expr) -> Expr:
    """``expr`` with the leaf ``var`` replaced by what it is."""
    expr = _split(expr, var, value)
    terms: list[Term] = []
    for term in expr.terms:
        terms += _substitute_term(term, expr.free, var, value)
    return recentre(with_terms(expr, terms, value))


def _split(expr: Expr, var: Hashable, value: Expr) -> Expr:
    """``expr`` with its axes split where ``value`` splits those that are read into them.

    An axis that windows make in other terms stays whole: a window puts the read one in its place.
    """
    for i, term in enumerate(expr.terms):
        for k, factor in enumerate(term.factors):
            found = _splits(factor, value) if factor.leaf.var == var else {}
            free = {label: new for label, new in found.items() if label in expr.free}
            if not free:
                continue
            if all(w.labels.isdisjoint(free) for t in expr.terms for w in t.windows):
                return _split(expr.rename(free), var, value)
            terms = (*expr.terms[:i], _read_apart(term, k, free), *expr.terms[i + 1 :])
            return _split(dataclasses.replace(expr, terms=terms), var, value)
    return expr


def _splits(factor: Factor, value: Expr) -> dict[Label, Axis]:
    """Into what the labels of a factor are split if ``value`` is put in its place."""
    found: dict[Label, Axis] = {}
    for axis, own, view in zip(factor.axes, value.dims, factor.slices, strict=True):
        if view is None:
            found |= refine(axis, tuple(Label(x.size) for x in own))[0]
    return {label: new for label, new in found.items() if len(new) != 1}


def _read_apart(term: Term, position: int, labels: Iterable[Label]) -> Term:
    """The term with labels of its own on one factor, and windows that say they are the same."""
    own = {label: (Label(label.size),) for label in labels}
    same = [Window(((new, 1), (label, -1))) for label, (new,) in own.items()]
    factors = list(term.factors)
    factors[position] = factors[position].rename(own)
    return Term(term.scale, tuple(factors), (*term.windows, *same))


def _substitute_term(term: Term, free: frozenset[Label], var: Hashable, value: Expr) -> list[Term]:
    position = next((k for k, f in enumerate(term.factors) if f.leaf.var == var), None)
    if position is None:
        return [term]
    factor = term.factors[position]
    rest = dataclasses.replace(term, factors=term.factors[:position] + term.factors[position + 1 :])
    new: list[Term] = []
    for part, renaming in _viewed(factor, value):
        joined = Term(
            term.scale * part.scale,
            part.factors + rest.rename(renaming).factors,
            part.windows + rest.rename(renaming).windows,
        )
        missing = (factor.rename(renaming).labels - joined.labels) - free
        joined = dataclasses.replace(
            joined, scale=joined.scale * math.prod(label.size for label in missing)
        )
        if joined.degree > 2:
            raise Unrepresentable("a product of degree above two in the data")
        new += _substitute_term(resolved(joined, free), free, var, value)
    return new


def _viewed(factor: Factor, value: Expr) -> list[tuple[Term, Renaming]]:
    """The terms of ``value`` on the labels of ``factor``, and how labels outside are refined."""
    value = refreshed(value)
    for axis, view in enumerate(factor.slices):
        if view is not None:
            value = slice_axis(value, axis, *view)
    renaming: dict[Label, Axis] = {}
    for axis in range(len(factor.axes)):
        outer, inner = refine(factor.axes[axis], value.dims[axis])
        value = value.rename(inner)
        factor = factor.rename(outer)
        renaming.update(outer)
    return [(t, renaming) for term in value.terms for t in recentred_term(term, factor.centred)]
