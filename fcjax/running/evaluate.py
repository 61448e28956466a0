"""Computes a recipe on arrays. Everything here is traced by jax, so it differentiates itself."""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jax import lax

from fcjax.expressions.terms import Expr, Label, Window
from fcjax.planning.parts import (
    Convolution,
    Linear,
    MeanSquare,
    Part,
    Phases,
    Product,
    Recipe,
    RowSquare,
    computed_over,
)
from fcjax.running import convolving, numerics
from fcjax.running.arrays import broadcast_to, call, library
from fcjax.running.named import Env, Named, met, ordered, pair, realised, sum_out
from fcjax.running.placing import put_in_place
from fcjax.running.weights import Formed, product_of, weight_of, whole_weight

__all__ = ["SQUARE", "evaluate", "mean_squares", "squares_key"]


SQUARE = "square"
"""Under ``(SQUARE, i)`` stands a mean square that was computed together with others."""


def evaluate(recipe: Recipe, env: Env, formed: Formed) -> Any:
    """The value that the recipe describes.

    Args:
      recipe: how to compute it.
      env: the arrays of its leaves.
      formed: weights formed earlier, as ``form`` returns them; may be empty.

    Returns:
      an array of the recipe's shape and dtype.
    """
    expr = recipe.expr
    order = sorted(enumerate(recipe.parts), key=lambda numbered: _rank(numbered[1], expr))
    values = [(_part(recipe, i, env, formed), _windows(part)) for i, part in order]
    total: Any = None
    for named in put_in_place(values, expr):
        value = _laid_out(named, expr)
        total = value if total is None else total + value
    if total is None:
        total = np.zeros((), expr.dtype)
    return broadcast_to(total.astype(expr.dtype), expr.shape)


def _rank(part: Part, expr: Expr) -> int:
    """Products first, then constants, then what is only passed on, such as a residual branch.

    The compiler fuses the last addition into whoever reads the sum; a product that were added
    last would be kept beside the sum for that.
    """
    if not isinstance(part, Product) or not part.term.labels <= expr.free:
        return 0
    return 2 if part.term.degree else 1


def _windows(part: Part) -> tuple[Window, ...]:
    """The windows that put the result of a part in its place."""
    if isinstance(part, Product):
        return part.term.windows
    return part.windows if isinstance(part, Convolution) else ()


def _laid_out(value: Named, expr: Expr) -> Any:
    """The array on the expression's axes, size 1 along those it is constant over, to be added up.

    On whole axes, whatever they are split into: between a product and a sum that are reshaped in
    different ways the compiler writes the product to a place of its own.
    """
    varies = [any(label in value.labels for label in axis) for axis in expr.dims]
    along = list(zip(expr.dims, varies, strict=True))
    array = ordered(value, tuple(itertools.chain(*expr.dims))).astype(expr.dtype)
    array = broadcast_to(array, [x.size if v else 1 for axis, v in along for x in axis])
    return array.reshape([math.prod(x.size for x in axis) if v else 1 for axis, v in along])


# --- the kinds of part --------------------------------------------------------------------------


def _part(recipe: Recipe, i: int, env: Env, formed: Formed) -> Named:
    part, expr = recipe.parts[i], recipe.expr
    if isinstance(part, Product):
        return product_of(part, computed_over(part.term, expr.free), expr, env, formed, (i,))
    if isinstance(part, MeanSquare):
        return formed[SQUARE, i] if (SQUARE, i) in formed else mean_squares([(recipe, i)], env)[0]
    if isinstance(part, Linear) and part.apart:
        return _differentiated_apart(part, expr, env)
    weight = formed[i] if i in formed else whole_weight(part, env, expr)
    if isinstance(part, RowSquare):
        return _row_square(part, weight, expr, env)
    if isinstance(part, Convolution):
        return _convolution(part, weight, expr, env)
    return _linear(part, weight, expr, env)


def _linear(part: Linear, weight: Named, expr: Expr, env: Env) -> Named:
    rows = realised(part.rows, env)
    result = _rows_product(rows, weight, part, expr, env)
    if part.centre_rows:
        means = Named(
            rows.array.mean(tuple(rows.labels.index(x) for x in part.centre_rows)),
            tuple(x for x in rows.labels if x not in part.centre_rows),
            True,
        )
        shift = pair(means, weight, expr.free, expr)
        for factor in part.row_scales:  # what scales the rows scales their mean too
            shift = pair(shift, realised(factor, env), expr.free, expr)
        result = dataclasses.replace(result, array=result.array - ordered(shift, result.labels))
    return result


def _rows_product(rows: Named, weight: Named, part: Linear, expr: Expr, env: Env) -> Named:
    """Rows times weight, scaled afterwards where there are scales."""
    scales = [realised(f, env) for f in part.row_scales]
    rows = sum_out(rows, expr.free.union(weight.labels))
    contracted = [x for x in rows.labels if x in weight.labels and x not in expr.free]
    plain = not any(x in weight.labels and x in expr.free for x in rows.labels)
    if not scales or not plain or not contracted:
        result = pair(rows, weight, expr.free, expr)
        for factor in scales:
            result = pair(result, factor, expr.free, expr)
        return result
    tokens = tuple(x for x in rows.labels if x not in contracted)
    columns = tuple(x for x in weight.labels if x not in contracted)
    width = math.prod(x.size for x in contracted)
    x = ordered(rows, (*tokens, *contracted)).reshape([t.size for t in tokens] + [width])
    dtype = met(weight, expr)
    z = ordered(weight, (*contracted, *columns)).astype(dtype)
    z = z.reshape([width] + [c.size for c in columns])
    factors = tuple(ordered(s, tokens) for s in scales)
    x = x.astype(dtype)
    out = call(numerics.scaled_product, x, factors, z, static=(expr.precision,))
    return Named(out, (*tokens, *columns), True)


def _differentiated_apart(part: Linear, expr: Expr, env: Env) -> Named:
    """``_linear``, its derivative by the weights taken term by term."""
    rows = part.rows.leaf.var
    weights = list(
        dict.fromkeys(f.leaf.var for p in part.weights for f in p.term.factors if not f.is_data)
    )
    labels = tuple(x for x in itertools.chain(*expr.dims) if x in part.rows.labels)
    labels += tuple(x for x in part.weight_labels if x in expr.free and x not in labels)

    def given(x: Any, ws: Sequence[Any]) -> Env:
        return {rows: x, **dict(zip(weights, ws, strict=True))}

    def merged(x: Any, ws: Sequence[Any]) -> Any:
        env = given(x, ws)
        return ordered(_linear(part, weight_of(part, env, expr), expr, env), labels)

    def apart(x: Any, ws: Sequence[Any]) -> Any:
        env = given(x, ws)
        terms = [product_of(p, expr.free, expr, env) for p in part.apart]
        return functools.reduce(operator.add, (ordered(term, labels) for term in terms))

    function = functools.partial(numerics.differentiated_apart, merged, apart)
    value = call(function, env[rows], [env[w] for w in weights])
    return Named(value, labels, True)


def _row_square(part: RowSquare, weight: Named, expr: Expr, env: Env) -> Named:
    rows = realised(part.rows, env)
    tokens = tuple(x for x in rows.labels if x in expr.free)
    contracted = [x for x in rows.labels if x not in expr.free]
    x = ordered(rows, (*tokens, *contracted)).reshape([*(t.size for t in tokens), -1])
    z = weight.array.astype(expr.dtype)
    norm = call(numerics.row_square_sum, x.astype(expr.dtype), z)
    return Named(part.scale * norm, tokens, True)


def _convolution(part: Convolution, weight: Named, expr: Expr, env: Env) -> Named:
    """Convolves the rows, ordered as examples, space, channels, with the kernel Z."""
    rows = Named(np.ones((), expr.dtype), (), False)
    if part.rows is not None:
        used = part.kept.union(weight.labels, (g.read for g in part.grids))
        rows = sum_out(realised(part.rows, env), used)
    space = tuple(g.read for g in part.grids)
    on_rows = (*rows.labels, *part.ones)
    summed = tuple(x for x in weight.labels if x in on_rows and x not in part.kept)
    groups = tuple(x for x in weight.labels if x in on_rows and x in part.kept)
    out = tuple(x for x in weight.labels if x in part.kept and x not in on_rows)
    examples = tuple(x for x in on_rows if x not in (*space, *summed, *groups))
    taps = tuple(x for g in part.grids for x in [g.tap] if x is not None)
    order = (*examples, *space, *groups, *summed)
    x = broadcast_to(ordered(rows, order), [label.size for label in order])
    z, dtype = ordered(weight, (*taps, *summed, *groups, *out)), met(weight, expr)
    made = convolving.convolve(
        x.astype(dtype).reshape(_total(examples), *(i.size for i in space), -1),
        z.astype(dtype).reshape([g.tap.size if g.tap else 1 for g in part.grids]
                                     + [_total(summed), _total((*groups, *out))]),
        part.grids, _total(groups), expr.precision if rows.data else lax.Precision.HIGHEST,
    )  # fmt: skip
    labels = (*examples, *(g.out for g in part.grids), *groups, *out)
    made = made.reshape([label.size for label in labels])
    return _interleaved(Named(made, labels, rows.data or weight.data), part.phases)


def _interleaved(value: Named, phases: Sequence[Phases]) -> Named:
    """The places of the value, of which each phase has every so many."""
    if not phases:
        return value
    inside = {f.made: f for f in phases}
    channels = {f.made: (f.phase,) for f in phases if f.phase is not None}
    among = tuple(itertools.chain(*channels.values()))
    outer = [x for x in value.labels if x not in among]
    axes = [(x, *channels.get(x, ())) for x in outer]
    array = ordered(value, tuple(itertools.chain(*axes))).reshape([_total(axis) for axis in axes])
    starts = [inside[x].start if x in inside else 0 for x in outer]
    labels = tuple(inside[x].out if x in inside else x for x in outer)
    ends = [start + x.size for start, x in zip(starts, labels, strict=True)]
    return Named(library(array).slice(array, starts, ends), labels, value.data)


def _total(labels: Sequence[Label]) -> int:
    return math.prod(label.size for label in labels)


# --- mean squares -------------------------------------------------------------------------------


def squares_key(part: MeanSquare) -> Hashable:
    """Equal for mean squares of products of the same rows, which share the moments of the rows."""
    rows = part.rows
    labels = itertools.chain(*rows.axes)
    roles = tuple((x.size, x in rows.centred, x in part.contracted) for x in labels)
    return rows.leaf.var, rows.slices, roles


def mean_squares(which: Sequence[tuple[Recipe, int]], env: Env) -> list[Named]:
    """Several mean squares of products of the same rows, through one set of moments.

    Args:
      which: recipes and the numbers of their parts; all parts of one ``squares_key``.
      env: the arrays of their leaves.
    """
    parts = [_square_part(recipe, i) for recipe, i in which]
    first = parts[0]
    rows = realised(dataclasses.replace(first.rows, centred=frozenset()), env)
    summed = tuple(x for x in rows.labels if x in first.rows.centred)
    width = math.prod(x.size for x in first.contracted)
    x = ordered(rows, (*summed, *first.contracted)).reshape(-1, width)
    columns = [tuple(k for k in p.weight_labels if k not in p.contracted) for p in parts]
    weights = [
        ordered(weight_of(part, env, recipe.expr), (*part.contracted, *own))
        for part, own, (recipe, _) in zip(parts, columns, which, strict=True)
    ]
    z = [weight.astype(x.dtype).reshape(width, -1) for weight in weights]
    ours = library(*z)
    both = call(numerics.centred_square_sum, x, ours.concatenate(z, 1))
    ends = list(itertools.accumulate(w.shape[1] for w in z))
    found = [ours.slice(both, [end - w.shape[1]], [end]) for w, end in zip(z, ends, strict=True)]
    return [
        Named(part.scale * square.reshape([label.size for label in own]), own, True)
        for part, square, own in zip(parts, found, columns, strict=True)
    ]


def _square_part(recipe: Recipe, i: int) -> MeanSquare:
    part = recipe.parts[i]
    assert isinstance(part, MeanSquare)
    return part
