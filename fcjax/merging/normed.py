"""Values that are a normalised array times a gain plus a shift, as written in two steps.

``LayerNorm(x) = u * g + b`` with ``u = (x - mean) / std``: whoever reads it linearly can then read
``u`` through a weight that holds the gain, and a bias that holds the shift. ``u`` itself costs
what it costs in the original.
"""

import dataclasses

from fcjax.expressions import algebra, terms
from fcjax.expressions.terms import Expr, Term
from fcjax.expressions.written import Written
from fcjax.tracing.trace import Equation, Value

__all__ = ["with_normed"]


def with_normed(network: Written) -> Written:
    """The network with the normalised arrays as roots of their own."""
    found = {value: Value(value.aval) for value, expr in network.roots.items() if _data_term(expr)}
    if not found:
        return network
    roots: dict[Value, Expr] = {}
    for value, expr in network.roots.items():
        if value in found:
            kind = network.known[value]
            roots[found[value]], roots[value] = _split(expr, terms.of_leaf(kind.leaf(found[value])))
        else:
            roots[value] = expr
    equations = []
    for equation in network.body.equations:
        equations += [_making(found[v], equation) for v in equation.outputs if v in found]
        equations.append(equation)
    known = {**network.known, **{new: network.known[v] for v, new in found.items()}}
    body = dataclasses.replace(network.body, equations=tuple(equations))
    hard = network.hard.union(found.values())
    forced = network.forced.union(found.values())
    return dataclasses.replace(
        network, body=body, roots=roots, known=known, hard=hard, forced=forced
    )


def _data_term(expr: Expr) -> Term | None:
    """The only term with data, if it is a product of data with a gain, entry by entry."""
    terms = [term for term in expr.terms if term.degree]
    if len(terms) != 1 or terms[0].windows or not terms[0].labels <= expr.free:
        return None
    (term,) = terms
    data = [f for f in term.factors if f.is_data]
    gains = [f for f in term.factors if not f.is_data]
    is_normed = len(data) > 1 or bool(data[0].centred)
    covers = frozenset().union(*(f.labels for f in data)) == expr.free
    ahead = bool(gains) and all(f.leaf.invariant for f in gains)
    return term if is_normed and covers and ahead else None


def _split(expr: Expr, normed: Expr) -> tuple[Expr, Expr]:
    """The normalised array, and the value in terms of it."""
    term = _data_term(expr)
    assert term is not None
    data = Term(1.0, tuple(f for f in term.factors if f.is_data))
    gains = tuple(f for f in term.factors if not f.is_data)
    inner = dataclasses.replace(expr, terms=(data,))
    (placed,) = algebra.add(dataclasses.replace(expr, terms=()), normed).terms
    read = Term(term.scale, (*placed.factors, *gains))
    terms = tuple(read if t is term else t for t in expr.terms)
    return inner, dataclasses.replace(expr, terms=terms)


def _making(value: Value, equation: Equation) -> Equation:
    """Where a new value is computed: in front of the one that it is part of."""
    return Equation(equation.source, equation.inputs, (value,))
