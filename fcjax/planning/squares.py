"""Sums of squares that are kept as such, beside their expansion.

The statistic of a layer normalisation is ``s sum_c h[n, c]^2``. Where ``h = x W + b`` is expressed
through ``x``, the square of the sum expands into terms that cancel in narrow floats. What is under
the square is therefore kept, and substituted into by itself.
"""

import dataclasses
import itertools
from collections.abc import Hashable

from fcjax.expressions import algebra
from fcjax.expressions.terms import Expr, Label, Term, Unrepresentable

__all__ = ["Square", "square_in"]


@dataclasses.dataclass(frozen=True)
class Square:
    """``scale * sum_over inner**2 + rest``.

    Attributes:
      inner: what is squared; its last axis is summed.
      scale: a number.
      rest: further terms of the value, without data.
    """

    inner: Expr
    scale: float
    rest: Expr

    @property
    def over(self) -> tuple[Label, ...]:
        """The labels that are summed."""
        return self.inner.dims[-1]

    def substitute(self, var: Hashable, value: Expr) -> "Square | None":
        """The same with the leaf ``var`` replaced by what it is; None if that has no such form."""
        try:
            inner, rest = (algebra.substitute(e, var, value) for e in (self.inner, self.rest))
        except Unrepresentable:
            return None
        return dataclasses.replace(self, inner=inner, rest=rest)


def square_in(expr: Expr) -> Square | None:
    """The square that an expression is, if it is the square of one value and constants."""
    data = [term for term in expr.terms if term.degree]
    rest = tuple(term for term in expr.terms if not term.degree)
    if len(data) != 1 or len(data[0].factors) != 2 or data[0].windows:
        return None
    first, second = data[0].factors
    over = tuple(x for x in itertools.chain(*first.axes) if x not in expr.free)
    if first != second or not over:
        return None
    inner = dataclasses.replace(expr, dims=(*expr.dims, over), terms=(Term(1.0, (first,)),))
    return Square(inner, data[0].scale, dataclasses.replace(expr, terms=rest))
