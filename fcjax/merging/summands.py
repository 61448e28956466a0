"""Sums whose summands are held for as long as the sum is read.

    ``r = x W_1 + A x W_2 + s``, of which a norm takes the mean, and which is read again behind it

is cheap to add up, so the compiler does that anew in every reader, and holds the summands in
between. With more products in a sum than the network as written has there, more arrays are held.
"""

from fcjax.expressions.terms import Expr
from fcjax.expressions.written import Written
from fcjax.planning.parts import Part, Product, Recipe
from fcjax.planning.plan import Plan, folds_always
from fcjax.planning.recipes import recipe
from fcjax.tracing.trace import Equation, Value

__all__ = ["are_more"]


def are_more(value: Value, network: Written, planned: Plan) -> bool:
    """Whether a value that is held is planned as a sum of more products than it is written as."""
    if folds_always() or not _is_held(value, network):
        return False
    written = recipe(planned.bases[value], planned.runs)
    return _summands(planned.recipes[value]) > _summands(written)


def _summands(how: Recipe) -> int:
    return sum(map(_has_data, how.parts))


def _has_data(part: Part) -> bool:
    if isinstance(part, Product):
        return part.term.degree > 0
    return part.rows is not None and part.rows.is_data


def _is_held(value: Value, network: Written) -> bool:
    """Whether a value is read by a product or a norm, and by something else beside."""
    roots = [expr for expr in network.computed.values() if value in expr.leaves]
    boundaries = [e for e in network.boundaries if value in e.values]
    sums = any(map(_sums, roots)) or any(_shrinks(e, value) for e in boundaries)
    return sums and len(roots) + len(boundaries) > 1


def _sums(expr: Expr) -> bool:
    """Whether a value is a product, or takes a mean."""
    return any(not t.labels <= expr.free or any(f.centred for f in t.factors) for t in expr.terms)


def _shrinks(equation: Equation, value: Value) -> bool:
    return any(v is not None and v.shape != value.shape for v in equation.outputs)
