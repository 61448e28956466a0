"""Residual streams that are only ever read less their mean, centred where they are written.

Where every reader of a stream ``h`` is a LayerNorm, nobody sees the mean of ``h`` over the width,
and the stream may as well be kept without it: with ``C = I - 11^T / d``,

    ``h C + (u W + b) C = h C + u (W C) + b C``.

The mean is taken off the weights that write the stream, once a step, and of the values that enter
it; each LayerNorm is then an RMSNorm of what it reads. This is a transformation of the network as
written, in which other expressions have the same meaning; the planner decides whether it pays.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from fcjax.expressions import deviations
from fcjax.expressions.terms import Expr, Factor, Term, Unrepresentable
from fcjax.expressions.written import Written
from fcjax.planning.parts import computed_over
from fcjax.planning.recipes import recipe
from fcjax.tracing.trace import Value

__all__ = ["Stream", "centred", "streams"]

Stream = tuple[Value, int]
"""A root and the axis that all its readers subtract the mean of."""


def centred(network: Written) -> Written | None:
    """The network with every stream less its mean, or None if it has no stream.

    Args:
      network: a body as written.

    Returns:
      the body with other expressions for the streams and their readers, all of them forced:
      what the equations say is no longer how these roots are computed.
    """
    found = streams(network)
    roots = dict(network.roots)
    try:
        for value, axis in found:
            roots[value] = deviations.deviation(roots[value], axis)
        members = dict(found)
        roots = {value: _less_centring(expr, members) for value, expr in roots.items()}
        changed = {v for v, expr in roots.items() if expr is not network.roots[v]}
        for value in changed:
            recipe(roots[value], network.runs)
    except Unrepresentable:
        return None
    if not changed:
        return None
    return dataclasses.replace(
        network, roots=roots, forced=network.forced | changed, less_mean=members
    )


def streams(network: Written) -> list[Stream]:
    """The largest set of roots of which nobody sees the mean over an axis.

    Every use of a member is centred over that axis, or passes it on to another member. A result,
    an input of something non-linear, a masked or sliced use, anything that is not known to
    subtract the mean: each keeps a root out, and with it all that is passed on to it.
    """
    members = {
        (value, axis)
        for value, expr in network.roots.items()
        for axis in range(len(expr.dims))
        if _may_be_centred(network, value, axis)
    }
    uses = _uses(network)
    while True:
        closed = {m for m in members if m in uses and uses[m] <= {None, *members}}
        if closed == members:
            break
        members = closed
    position = {value: i for i, value in enumerate(network.roots)}
    return sorted(members, key=lambda member: position[member[0]])


def _may_be_centred(network: Written, value: Value, axis: int) -> bool:
    """Whether a root is free to change, and its mean can be taken off what writes it.

    The mean of a half-precision stream would be cancelled only to the rounding of the weights.
    Data that meets weights on the way (the tokens of ``x W``) is not what writes an axis.
    """
    expr = network.roots[value]
    over = frozenset(expr.dims[axis])
    dtypes = [expr.dtype, *(leaf.dtype for leaf in expr.leaves.values())]
    wide = all(np.dtype(dtype).itemsize >= 4 for dtype in dtypes)
    if value in network.hard or not over or not expr.has_data or not wide:
        return False
    return all(
        _is_elementwise(term, expr) or not any(f.is_data and f.labels & over for f in term.factors)
        for term in expr.terms
    )


def _is_elementwise(term: Term, expr: Expr) -> bool:
    try:
        return term.labels - expr.free <= computed_over(term, expr.free)
    except Unrepresentable:  # a window that sums over the taps of a kernel
        return False


def _uses(network: Written) -> dict[Stream, set[Stream | None]]:
    """For each axis of a root what its uses do: None if centred, else where they pass it on.

    A use that does neither is passed on to an axis that does not exist.
    """
    found: dict[Stream, set[Stream | None]] = {}
    for reader, expr in network.roots.items():
        for term, factor in _factors(expr):
            if factor.leaf.var not in network.roots:
                continue
            for axis, labels in enumerate(factor.axes):
                whole = bool(labels) and factor.slices[axis] is None
                use: Stream | None = (reader, -1)
                if whole and factor.centred == frozenset(labels):
                    use = None
                elif whole and _passes_on(term, factor, axis):
                    use = (reader, _axis_of(expr, factor, axis))
                found.setdefault((factor.leaf.var, axis), set()).add(use)
    return found


def _factors(expr: Expr) -> Iterator[tuple[Term, Factor]]:
    return ((term, factor) for term in expr.terms for factor in term.factors)


def _passes_on(term: Term, factor: Factor, axis: int) -> bool:
    """Whether a term is the factor times something that does not vary along its axis."""
    beside = [f.labels for f in term.factors if f is not factor]
    beside += [window.labels for window in term.windows]
    return not factor.centred and not any(labels & set(factor.axes[axis]) for labels in beside)


def _axis_of(expr: Expr, factor: Factor, axis: int) -> int:
    """The axis of the value on which an axis of the factor stands, or -1."""
    return expr.dims.index(factor.axes[axis]) if factor.axes[axis] in expr.dims else -1


def _less_centring(expr: Expr, members: dict[Value, int]) -> Expr:
    """The expression for streams that have no mean; the same object if it reads none centred."""
    terms = tuple(
        dataclasses.replace(term, factors=tuple(_plain(f, members) for f in term.factors))
        for term in expr.terms
    )
    return expr if terms == expr.terms else dataclasses.replace(expr, terms=terms)


def _plain(factor: Factor, members: dict[Value, int]) -> Factor:
    axis = members.get(factor.leaf.var)
    if axis is None or factor.centred != frozenset(factor.axes[axis]):
        return factor
    return dataclasses.replace(factor, centred=frozenset())
