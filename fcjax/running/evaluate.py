"""Computes a recipe on arrays. Everything here is traced by jax, so it differentiates itself."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fcjax.expressions.terms import Expr, Factor, Label, Window
from fcjax.planning.contraction import Order, members
from fcjax.planning.parts import (
    Convolution,
    Linear,
    MeanSquare,
    Part,
    Product,
    Recipe,
    RowSquare,
    computed_over,
)
from fcjax.running import convolving, numerics

__all__ = ["SQUARE", "evaluate", "form", "formed_leaves", "kernel", "mean_squares", "squares_key"]

Env = Mapping[Any, Array]
Formed = dict[Hashable, "Named"]
SQUARE = "square"
"""Under ``(SQUARE, i)`` stands a mean square that was computed together with others."""


@dataclasses.dataclass(frozen=True)
class Named:
    """An array with a label for each axis.

    Attributes:
      array: the values.
      labels: one for each axis, all different.
      data: whether it depends on data; weights among themselves are multiplied at full precision.
    """

    array: Array
    labels: tuple[Label, ...]
    data: bool


def evaluate(recipe: Recipe, env: Env, formed: Formed) -> Array:
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
    total: Array | None = None
    for named in _put_in_place(values, expr):
        value = _laid_out(named, expr)
        total = value if total is None else total + value
    if total is None:
        total = jnp.zeros((), expr.dtype)
    sizes = [label.size for label in itertools.chain(*expr.dims)]
    return jnp.broadcast_to(total.astype(expr.dtype), sizes).reshape(expr.shape)


def _rank(part: Part, expr: Expr) -> int:
    """Products first, then constants, then what is only passed on, such as a residual branch.

    The compiler fuses the last addition into whoever reads the sum; a product that were added
    last would be kept beside the sum for that.
    """
    if not isinstance(part, Product) or not part.term.labels <= expr.free:
        return 0
    return 2 if part.term.degree else 1


def form(recipe: Recipe, env: Env) -> Formed:
    """The weights of a recipe that are the same in every run of the body it belongs to."""
    formed: Formed = {}
    for i, part in enumerate(recipe.parts):
        if isinstance(part, Product):
            _form_product(part, (i,), recipe.expr, env, formed)
        elif not _is_apart(part) and _is_invariant(part):
            formed[i] = _whole_weight(part, env, recipe.expr)
    return formed


def formed_leaves(recipe: Recipe) -> set[Hashable]:
    """The leaves that ``form`` reads."""
    factors = [
        f
        for part in recipe.parts
        for product in _products(part)
        for f in product.term.factors
        if _invariant(f)
    ]
    return {f.leaf.var for f in factors}


def kernel(part: Convolution, env: Env, expr: Expr) -> Array:
    """The array that a convolution convolves with, its axes those of ``part.weight_labels``."""
    return _weight(part, env, expr).array


def _products(part: Part) -> tuple[Product, ...]:
    if isinstance(part, Product):
        return (part,)
    if isinstance(part, RowSquare):
        return (*part.inner.weights, *part.shifts)
    return (part.weight,) if isinstance(part, MeanSquare) else part.weights


def _is_apart(part: Part) -> bool:
    return isinstance(part, Linear) and bool(part.apart)


def _is_invariant(part: Part) -> bool:
    return all(_invariant(f) for p in _products(part) for f in p.term.factors)


def _invariant(factor: Factor) -> bool:
    return factor.leaf.kind != "data" and factor.leaf.invariant


def _form_product(
    part: Product, key: tuple[Hashable, ...], expr: Expr, env: Env, formed: Formed
) -> None:
    """Forms the largest invariant sub-products of a product."""
    if not part.term.factors or all(_invariant(f) for f in part.term.factors):
        return  # a constant of the value: nothing meets it but the sum

    def visit(order: Order, needed: frozenset[Label]) -> None:
        if isinstance(order, int):
            return
        inside = members(order)
        if all(_invariant(part.term.factors[k]) for k in inside):
            formed[(*key, order)] = _multiply(part, order, needed, expr, env, {}, key)
            return
        for half, other in (order, order[::-1]):
            visit(half, needed | _labels_of(part, other))

    visit(part.order, computed_over(part.term, expr.free))


# --- the four kinds of part --------------------------------------------------------------------


def _part(recipe: Recipe, i: int, env: Env, formed: Formed) -> Named:
    part, expr = recipe.parts[i], recipe.expr
    if isinstance(part, Product):
        return _product(part, (i,), computed_over(part.term, expr.free), expr, env, formed)
    if isinstance(part, MeanSquare):
        return formed[SQUARE, i] if (SQUARE, i) in formed else mean_squares([(recipe, i)], env)[0]
    if isinstance(part, Linear) and part.apart:
        return _differentiated_apart(part, expr, env)
    weight = formed[i] if i in formed else _whole_weight(part, env, expr)
    if isinstance(part, RowSquare):
        return _row_square(part, weight, expr, env)
    if isinstance(part, Convolution):
        return _convolution(part, weight, expr, env)
    return _linear(part, weight, expr, env)


def _product(
    part: Product, key: tuple[Hashable, ...], keep: frozenset[Label], expr: Expr, env: Env,
    formed: Formed,
) -> Named:  # fmt: skip
    term = part.term
    if not term.factors:
        value = Named(jnp.asarray(term.scale, expr.dtype), (), False)
    else:
        value = _multiply(part, part.order, keep, expr, env, formed, key)
        value = _summed(value, keep)
        if term.scale != 1.0:
            value = dataclasses.replace(value, array=value.array * term.scale)
    return value


def _multiply(
    part: Product, order: Order, needed: frozenset[Label], expr: Expr, env: Env, formed: Formed,
    key: tuple[Hashable, ...],
) -> Named:  # fmt: skip
    if (*key, order) in formed:
        return formed[(*key, order)]
    if isinstance(order, int):
        return _realised(part.term.factors[order], env)
    a, b = (
        _multiply(part, half, needed | _labels_of(part, other), expr, env, formed, key)
        for half, other in (order, order[::-1])
    )
    return _pair(a, b, needed, expr)


def _labels_of(part: Product, order: Order) -> frozenset[Label]:
    return frozenset().union(*(part.term.factors[k].labels for k in members(order)))


def _weight(part: Linear | MeanSquare | Convolution, env: Env, expr: Expr) -> Named:
    """The effective weight Z, on exactly ``part.weight_labels``."""
    labels = part.weight_labels
    total: Array | None = None
    for i, product in enumerate(_products(part)):
        if isinstance(part, Convolution):
            value = _tap_product(part, i, expr, env)
        else:
            value = _product(product, (), frozenset(labels), expr, env, {})
        array = _ordered(value, labels)
        total = array if total is None else total + array
    assert total is not None
    total = jnp.broadcast_to(total, [label.size for label in labels])
    if isinstance(part, Linear) and part.centre_weight:
        total = _less_mean(total, labels, part.centre_weight)
    data = any(f.is_data for product in _products(part) for f in product.term.factors)
    return Named(total, labels, data)


def _whole_weight(
    part: Linear | MeanSquare | RowSquare | Convolution, env: Env, expr: Expr
) -> Named:
    """The effective weight; of a row square as a matrix, with the shift as its last row."""
    if not isinstance(part, RowSquare):
        return _weight(part, env, expr)
    contracted = [x for x in itertools.chain(*part.rows.axes) if x in part.inner.weight_labels]
    width, columns = (math.prod(x.size for x in labels) for labels in (contracted, part.over))
    own = _weight(part.inner, env, expr)
    matrix = _ordered(own, (*contracted, *part.over)).reshape(width, columns)
    shift = jnp.zeros([x.size for x in part.over], matrix.dtype)
    for product in part.shifts:
        value = _product(product, (), frozenset(part.over), expr, env, {})
        shift = shift + _ordered(value, part.over)
    rows = [matrix, shift.reshape(1, columns)] if part.shifts else [matrix]
    return Named(jnp.concatenate(rows), (Label(width + len(rows) - 1), Label(columns)), own.data)


def _row_square(part: RowSquare, weight: Named, expr: Expr, env: Env) -> Named:
    rows = _realised(part.rows, env)
    tokens = tuple(x for x in rows.labels if x in expr.free)
    contracted = [x for x in rows.labels if x not in expr.free]
    x = _ordered(rows, (*tokens, *contracted)).reshape([*(t.size for t in tokens), -1])
    z = weight.array.astype(expr.dtype)
    norm = numerics.row_square_sum(x.astype(expr.dtype), z)
    return Named(part.scale * norm, tokens, True)


def _linear(part: Linear, weight: Named, expr: Expr, env: Env) -> Named:
    rows = _realised(part.rows, env)
    result = _rows_product(rows, weight, part, expr, env)
    if part.centre_rows:
        means = Named(
            jnp.mean(rows.array, [rows.labels.index(x) for x in part.centre_rows]),
            tuple(x for x in rows.labels if x not in part.centre_rows),
            True,
        )
        shift = _pair(means, weight, expr.free, expr)
        result = dataclasses.replace(result, array=result.array - _ordered(shift, result.labels))
    return result


def _differentiated_apart(part: Linear, expr: Expr, env: Env) -> Named:
    """``_linear``, its derivative by the weights taken term by term."""
    rows = part.rows.leaf.var
    weights = list(
        dict.fromkeys(f.leaf.var for p in part.weights for f in p.term.factors if not f.is_data)
    )
    labels = tuple(x for x in itertools.chain(*expr.dims) if x in part.rows.labels)
    labels += tuple(x for x in part.weight_labels if x in expr.free and x not in labels)

    def given(x: Array, ws: Sequence[Array]) -> Env:
        return {rows: x, **dict(zip(weights, ws, strict=True))}

    def merged(x: Array, ws: Sequence[Array]) -> Array:
        env = given(x, ws)
        return _ordered(_linear(part, _weight(part, env, expr), expr, env), labels)

    def apart(x: Array, ws: Sequence[Array]) -> Array:
        env = given(x, ws)
        terms = [_product(p, (), expr.free, expr, env, {}) for p in part.apart]
        return functools.reduce(jnp.add, (_ordered(term, labels) for term in terms))

    value = numerics.differentiated_apart(merged, apart, env[rows], [env[w] for w in weights])
    return Named(value, labels, True)


def _rows_product(rows: Named, weight: Named, part: Linear, expr: Expr, env: Env) -> Named:
    """Rows times weight, scaled afterwards where there are scales."""
    scales = [_realised(f, env) for f in part.row_scales]
    contracted = [x for x in rows.labels if x in weight.labels and x not in expr.free]
    plain = not any(x in weight.labels and x in expr.free for x in rows.labels)
    if not scales or not plain or not contracted:
        result = _pair(rows, weight, expr.free, expr)
        for factor in scales:
            result = _pair(result, factor, expr.free, expr)
        return result
    tokens = tuple(x for x in rows.labels if x not in contracted)
    columns = tuple(x for x in weight.labels if x not in contracted)
    width = math.prod(x.size for x in contracted)
    x = _ordered(rows, (*tokens, *contracted)).reshape([t.size for t in tokens] + [width])
    z = _ordered(weight, (*contracted, *columns)).astype(expr.dtype)
    z = z.reshape([width] + [c.size for c in columns])
    factors = tuple(_ordered(s, tokens) for s in scales)
    out = numerics.scaled_product(x, factors, z, expr.precision)
    return Named(out, (*tokens, *columns), True)


def _tap_product(part: Convolution, i: int, expr: Expr, env: Env) -> Named:
    """One of the products that a kernel is the sum of, at its place among the taps."""
    product, place = part.weights[i], part.places[i]
    taps = place.labels
    value = _product(product, (), frozenset(part.weight_labels) | taps, expr, env, {})
    for grid, (steps, low) in zip(part.grids, place.taps, strict=True):
        if grid.tap is not None:
            value = _at_taps(
                value, steps, low, grid.tap, frozenset(part.weight_labels) | taps, expr
            )
    for summed, kept in place.diagonal:
        eye = Named(jnp.eye(kept.size, dtype=value.array.dtype), (summed, kept), False)
        value = _pair(value, eye, frozenset(part.weight_labels), expr)
    return value


def _at_taps(
    value: Named, steps: Sequence[tuple[Label, int]], low: int, tap: Label, keep: frozenset[Label],
    expr: Expr,
) -> Named:  # fmt: skip
    """Puts the taps of a product where they stand among those of a kernel."""
    present = [(x, by) for x, by in steps if x in value.labels]
    if len(steps) == 1 and present and low == 0 and present[0][0].size == tap.size:
        labels = tuple(tap if x is present[0][0] else x for x in value.labels)
        return dataclasses.replace(value, labels=labels)  # it is the kernel's own grid
    absent = [(x.size, by) for x, by in steps if x not in value.labels]
    chosen = convolving.placing([(x.size, by) for x, by in present], absent, low, tap.size)
    axes = (*(x for x, _ in present), tap)
    placing = Named(jnp.asarray(chosen, value.array.dtype), axes, False)
    return _pair(value, placing, keep - frozenset(x for x, _ in present), expr)


def _convolution(part: Convolution, weight: Named, expr: Expr, env: Env) -> Named:
    """Convolves the rows, ordered as examples, space, channels, with the kernel Z."""
    rows = Named(jnp.ones((), expr.dtype), (), False)
    if part.rows is not None:
        rows = _realised(part.rows, env)
    space = tuple(g.read for g in part.grids)
    on_rows = (*rows.labels, *part.ones)
    summed = tuple(x for x in weight.labels if x in on_rows and x not in part.kept)
    groups = tuple(x for x in weight.labels if x in on_rows and x in part.kept)
    out = tuple(x for x in weight.labels if x in part.kept and x not in on_rows)
    examples = tuple(x for x in on_rows if x not in (*space, *summed, *groups))
    taps = tuple(x for g in part.grids for x in [g.tap] if x is not None)
    order = (*examples, *space, *groups, *summed)
    x = jnp.broadcast_to(_ordered(rows, order), [label.size for label in order])
    z = _ordered(weight, (*taps, *summed, *groups, *out))
    made = convolving.convolve(
        x.astype(expr.dtype).reshape(_total(examples), *(i.size for i in space), -1),
        z.astype(expr.dtype).reshape([g.tap.size if g.tap else 1 for g in part.grids]
                                     + [_total(summed), _total((*groups, *out))]),
        part.grids, _total(groups), expr.precision if rows.data else lax.Precision.HIGHEST,
    )  # fmt: skip
    labels = (*examples, *(g.out for g in part.grids), *groups, *out)
    return Named(made.reshape([label.size for label in labels]), labels, rows.data or weight.data)


def _total(labels: Sequence[Label]) -> int:
    return math.prod(label.size for label in labels)


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
    rows = _realised(dataclasses.replace(first.rows, centred=frozenset()), env)
    summed = tuple(x for x in rows.labels if x in first.rows.centred)
    width = math.prod(x.size for x in first.contracted)
    x = _ordered(rows, (*summed, *first.contracted)).reshape(-1, width)
    columns = [tuple(k for k in p.weight_labels if k not in p.contracted) for p in parts]
    weights = [
        _ordered(_weight(part, env, recipe.expr), (*part.contracted, *own))
        for part, own, (recipe, _) in zip(parts, columns, which, strict=True)
    ]
    z = [weight.astype(x.dtype).reshape(width, -1) for weight in weights]
    ends = list(itertools.accumulate(w.shape[1] for w in z))
    found = jnp.split(numerics.centred_square_sum(x, jnp.concatenate(z, axis=1)), ends[:-1])
    return [
        Named(part.scale * square.reshape([label.size for label in own]), own, True)
        for part, square, own in zip(parts, found, columns, strict=True)
    ]


def _square_part(recipe: Recipe, i: int) -> MeanSquare:
    part = recipe.parts[i]
    assert isinstance(part, MeanSquare)
    return part


# --- arrays with labels -------------------------------------------------------------------------


def _realised(factor: Factor, env: Env) -> Named:
    array = env[factor.leaf.var]
    if any(view is not None for view in factor.slices):
        views = [
            view or (0, size, 1) for view, size in zip(factor.slices, array.shape, strict=True)
        ]
        array = lax.slice(array, *(list(v) for v in zip(*views, strict=True)))
    labels = tuple(itertools.chain(*factor.axes))
    array = jnp.reshape(array, [label.size for label in labels])
    if factor.centred:
        array = _less_mean(array, labels, factor.centred)
    return Named(array, labels, factor.is_data)


def _less_mean(array: Array, labels: tuple[Label, ...], over: frozenset[Label]) -> Array:
    return array - jnp.mean(array, [labels.index(x) for x in labels if x in over], keepdims=True)


def _summed(value: Named, keep: frozenset[Label]) -> Named:
    gone = [i for i, label in enumerate(value.labels) if label not in keep]
    if not gone:
        return value
    labels = tuple(label for label in value.labels if label in keep)
    return Named(jnp.sum(value.array, gone), labels, value.data)


def _pair(a: Named, b: Named, keep: frozenset[Label], expr: Expr) -> Named:
    """Multiplies two arrays and sums the labels outside ``keep``.

    Data stands on the left: the axes of the result are then those of its rows, then the others.
    """
    if b.data and not a.data:
        a, b = b, a
    a = _summed(a, keep | frozenset(b.labels))
    b = _summed(b, keep | frozenset(a.labels))
    data = a.data or b.data
    dtype = np.dtype(expr.dtype)
    if not data:  # weights keep the wider of the dtypes they are stored and used in
        dtype = jnp.promote_types(dtype, jnp.promote_types(a.array.dtype, b.array.dtype))
    x, y = a.array.astype(dtype), b.array.astype(dtype)
    shared = [label for label in a.labels if label in b.labels]
    contracted = [label for label in shared if label not in keep]
    own_a = tuple(label for label in a.labels if label not in shared)
    own_b = tuple(label for label in b.labels if label not in shared)
    if not contracted or not (own_a or own_b):
        labels = a.labels + own_b
        product = Named(x, a.labels, data), Named(y, b.labels, data)
        value = _ordered(product[0], labels) * _ordered(product[1], labels)
        return _summed(Named(value, labels, data), keep)
    batch = [label for label in shared if label in keep]
    numbers = (
        ([a.labels.index(n) for n in contracted], [b.labels.index(n) for n in contracted]),
        ([a.labels.index(n) for n in batch], [b.labels.index(n) for n in batch]),
    )
    precision = expr.precision if data else lax.Precision.HIGHEST
    value = lax.dot_general(x, y, numbers, precision=precision)
    return Named(value, (*batch, *own_a, *own_b), data)


def _ordered(value: Named, labels: tuple[Label, ...]) -> Array:
    """The array with its axes in the order of ``labels``, size 1 where it has none of them."""
    present = [label for label in labels if label in value.labels]
    array = jnp.transpose(value.array, [value.labels.index(label) for label in present])
    return array.reshape([label.size if label in value.labels else 1 for label in labels])


def _windows(part: Part) -> tuple[Window, ...]:
    """The windows that put the result of a part in its place."""
    if isinstance(part, Product):
        return part.term.windows
    return part.windows if isinstance(part, Convolution) else ()


def _put_in_place(
    values: Sequence[tuple[Named, tuple[Window, ...]]], expr: Expr
) -> Iterator[Named]:
    """Values where windows put them; pieces that fill an axis between them are joined."""
    pieces: dict[Label, list[tuple[Named, Window]]] = {}
    for value, windows in values:
        if len(windows) == 1 and all(abs(by) == 1 for _, by in windows[0].steps):
            (out,) = windows[0].labels & expr.free
            pieces.setdefault(out, []).append((value, windows[0]))
        else:
            yield functools.reduce(lambda v, w: _placed(v, w, expr.free), windows, value)
    for out, own in pieces.items():
        if _fills(out, own):
            yield _joined(out, own, expr)
        else:
            yield from (_placed(value, window, expr.free) for value, window in own)


def _span(out: Label, window: Window) -> tuple[int, int]:
    """Where the piece that a window puts into ``out`` starts and ends."""
    (read,) = window.labels - {out}
    start = -window.by(out) * window.offset
    return start, start + read.size


def _fills(out: Label, pieces: Sequence[tuple[Named, Window]]) -> bool:
    spans = sorted({_span(out, window) for _, window in pieces})
    return [0, *(end for _, end in spans)] == [*(start for start, _ in spans), out.size]


def _joined(out: Label, pieces: Sequence[tuple[Named, Window]], expr: Expr) -> Named:
    """Pieces that fill an axis, those at the same place added up."""
    labels = tuple(itertools.chain(*expr.dims))
    axis = labels.index(out)
    at: dict[tuple[int, int], Array] = {}
    for value, window in pieces:
        (read,) = window.labels - {out}
        array = _ordered(value, tuple(read if x is out else x for x in labels)).astype(expr.dtype)
        span = _span(out, window)
        at[span] = at[span] + array if span in at else array
    sizes = [label.size for label in labels]
    whole = [
        jnp.broadcast_to(at[span], [*sizes[:axis], span[1] - span[0], *sizes[axis + 1 :]])
        for span in sorted(at)
    ]
    return Named(jnp.concatenate(whole, axis), labels, True)


def _placed(value: Named, window: Window, free: frozenset[Label]) -> Named:
    """Puts an axis of a value where a window says, zero elsewhere."""
    (read,), (out,) = window.labels - free, window.labels & free
    if read not in value.labels:
        ones = jnp.ones([read.size], value.array.dtype)
        value = Named(value.array[..., None] * ones, (*value.labels, read), value.data)
    sign = 1 if window.by(read) > 0 else -1
    spread, stride, offset = (sign * n for n in (window.by(read), -window.by(out), -window.offset))
    axis = value.labels.index(read)
    array = convolving.place(value.array, axis, spread, stride, offset, out.size)
    labels = tuple(out if i == axis else x for i, x in enumerate(value.labels))
    return Named(array, labels, value.data)


def _laid_out(value: Named, expr: Expr) -> Array:
    """The array on the flattened labels of the expression's axes, to be added to others."""
    return _ordered(value, tuple(itertools.chain(*expr.dims))).astype(expr.dtype)
