"""Which terms are the same, and sums of terms in which those are added up."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from jax import lax

from fcjax.expressions.terms import Expr, Factor, Label, Term, Unrepresentable, Window

__all__ = ["at_least", "term_key", "with_terms"]


MAX_TERMS = 18
"""Expressions longer than this are cut: their value is computed and becomes a leaf."""
MAX_FACTORS = 16
"""Terms with more factors than this are cut likewise."""
MAX_TIES = 720
"""Orderings of interchangeable factors tried for a canonical key before giving up on merging."""


def with_terms(expr: Expr, terms: Iterable[Term], *others: Expr) -> Expr:
    """``expr`` with other terms, checked for size, merged, and at the highest precision of all."""
    merged = _merge_like(tuple(terms), expr.free)
    if len(merged) > MAX_TERMS or any(len(t.factors) > MAX_FACTORS for t in merged):
        raise Unrepresentable("the expression grows too long")
    precision = max((e.precision for e in (expr, *others)), key=_precision_rank)
    return dataclasses.replace(expr, terms=merged, precision=precision)


def at_least(expr: Expr, precision: lax.Precision | None) -> Expr:
    """``expr`` with its products at ``precision`` or higher."""
    return dataclasses.replace(expr, precision=max(expr.precision, precision, key=_precision_rank))


def _precision_rank(precision: lax.Precision | None) -> int:
    return -1 if precision is None else int(precision.value)


def _merge_like(terms: tuple[Term, ...], free: frozenset[Label]) -> tuple[Term, ...]:
    """Adds up the scales of terms that are the same but for the names of bound labels."""
    if len(terms) < 2:
        return tuple(term for term in terms if term.scale != 0.0)
    merged: dict[Hashable, Term] = {}
    for term in terms:
        key = term_key(term, free)
        if key in merged:
            term = dataclasses.replace(term, scale=term.scale + merged[key].scale)
        merged[key] = term
    return tuple(term for term in merged.values() if term.scale != 0.0)


def term_key(term: Term, free: frozenset[Label]) -> Hashable:
    """A key equal for two terms exactly if they agree up to scale and names of bound labels.

    Bound labels are numbered in order of first appearance, over every order of the factors that
    share leaf and view, and the least key wins; with too many such orders the term is only equal
    to itself, which costs a merge but is never wrong.

    Args:
      term: the term.
      free: labels that keep their identity.
    """
    groups: dict[Any, list[Factor]] = {}
    for factor in term.factors:
        groups.setdefault(_shape_key(factor), []).append(factor)
    ordered = [groups[key] for key in sorted(groups, key=repr)]
    if math.prod(math.factorial(len(group)) for group in ordered) > MAX_TIES:
        return id(term)
    orders = itertools.product(*(itertools.permutations(group) for group in ordered))
    keys = [_numbered(list(itertools.chain(*order)), term.windows, free) for order in orders]
    return min(keys, key=repr) if len(keys) > 1 else keys[0]


def _shape_key(factor: Factor) -> tuple[Any, ...]:
    sizes = tuple(tuple(label.size for label in axis) for axis in factor.axes)
    return (id(factor.leaf.var), factor.slices, sizes, len(factor.centred))


def _numbered(
    factors: Sequence[Factor],
    windows: Sequence[Window],
    free: frozenset[Label],
) -> Hashable:
    numbers: dict[Label, Hashable] = {}

    def number(label: Label) -> Hashable:
        if label in free:
            return ("free", id(label))
        return numbers.setdefault(label, len(numbers))

    factor_keys = tuple(
        (
            id(factor.leaf.var),
            factor.slices,
            tuple(tuple((number(label), label.size) for label in axis) for axis in factor.axes),
            tuple(sorted((number(label) for label in factor.centred), key=repr)),
        )
        for factor in factors
    )
    window_keys = tuple(
        (tuple((number(label), label.size, by) for label, by in w.steps), w.offset) for w in windows
    )
    return factor_keys, window_keys
