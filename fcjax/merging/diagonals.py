"""Scaled copies of what a matrix reads, as further terms of that matrix.

    ``x Z + x * s  =  x (Z + diag(s))``

A BatchNorm on an identity branch is the common case. A copy that nothing scales is left: it is
exact as it is, whatever the precision of products.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fcjax.expressions.terms import Expr, Factor, Label, Leaf, Term
from fcjax.planning.parts import Linear, Part, Product
from fcjax.tracing.trace import Value

__all__ = ["Identity", "absorbed"]


class Identity(Value):
    """The identity matrix, as the value that a leaf stands for."""

    @classmethod
    def of(cls, size: int, dtype: jnp.dtype) -> "Identity":
        """The identity matrix of a size."""
        return cls(jax.core.ShapedArray((size, size), dtype))

    @property
    def name(self) -> str:
        """What tells it from other leaves."""
        return f"identity of size {self.shape[0]}"

    def array(self) -> np.ndarray:
        """Its entries; also while something is traced."""
        return np.eye(self.shape[0], dtype=self.aval.dtype)


def absorbed(parts: Sequence[Part], expr: Expr) -> list[Part]:
    """The parts, with scaled copies of the rows of a matrix taken into the matrix."""
    left = list(parts)
    for matrix in parts:
        seen = _matrix(matrix, expr)
        if seen is None:
            continue
        terms = {p: _diagonal(p, seen, expr) for p in left if isinstance(p, Product)}
        taken = {p: Product(t, 0) for p, t in terms.items() if t is not None}
        if taken:
            larger = dataclasses.replace(seen, weights=(*seen.weights, *taken.values()))
            left = [larger if p is matrix else p for p in left if p not in taken]
    return left


def _matrix(part: Part, expr: Expr) -> Linear | None:
    """A part as rows times one constant weight, if it is that."""
    if isinstance(part, Linear):
        plain = not (part.row_scales or part.centre_rows or part.centre_weight)
        constant = all(_is_constant(w.term) for w in part.weights)
        return part if plain and constant else None
    if not isinstance(part, Product) or part.term.degree != 1 or isinstance(part.order, int):
        return None
    (rows,) = [f for f in part.term.factors if f.is_data]
    weights = tuple(f for f in part.term.factors if not f.is_data)
    term = Term(part.term.scale, weights)
    alone = part.term.factors.index(rows) in part.order
    inside = term.labels & (rows.labels | expr.free)
    if not alone or part.term.windows or not _is_constant(term) or rows.labels <= expr.free:
        return None
    place = {label: i for i, label in enumerate(itertools.chain(*expr.dims))}
    labels = [x for x in itertools.chain(*(a for f in weights for a in f.axes)) if x in inside]
    ordered = tuple(sorted(dict.fromkeys(labels), key=lambda x: place.get(x, -1)))
    return Linear(rows, (), (Product(term, 0),), ordered, frozenset(), frozenset())


def _diagonal(part: Product, matrix: Linear, expr: Expr) -> Term | None:
    """A scaled copy of the matrix's rows, as a term of the matrix."""
    term = part.term
    own = [f for f in term.factors if f.is_data]
    scales = tuple(f for f in term.factors if not f.is_data)
    if len(own) != 1 or not scales or term.windows or not _is_constant(Term(1.0, scales)):
        return None
    pairs = _pairs(own[0], matrix, expr)
    if not pairs or not Term(1.0, scales).labels <= {after for _, after in pairs}:
        return None
    deltas = [_delta(before, after, expr) for before, after in pairs]
    return Term(term.scale, (*scales, *deltas))


def _pairs(copy: Factor, matrix: Linear, expr: Expr) -> list[tuple[Label, Label]]:
    """The contracted labels of the matrix's rows, and what stands for them on the copy."""
    rows = matrix.rows
    if (copy.leaf, copy.slices, copy.centred) != (rows.leaf, rows.slices, rows.centred):
        return []
    before, after = (list(itertools.chain(*f.axes)) for f in (rows, copy))
    if [x.size for x in before] != [x.size for x in after]:
        return []
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b is not a]
    contracted = rows.labels - expr.free
    moved = {b for b, _ in pairs}
    fits = moved == contracted and all(a in expr.free for _, a in pairs)
    weight = frozenset(matrix.weight_labels)
    return pairs if fits and weight == moved | {a for _, a in pairs} else []


def _delta(before: Label, after: Label, expr: Expr) -> Factor:
    value = Identity.of(before.size, jnp.dtype(expr.dtype))
    leaf = Leaf(value, "const", value.shape, value.aval.dtype, trainable=False)
    return Factor(leaf, ((before,), (after,)), (None, None))


def _is_constant(term: Term) -> bool:
    return all(not f.is_data and f.leaf.invariant for f in term.factors) and not term.windows
