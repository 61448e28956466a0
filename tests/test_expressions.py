"""The algebra of expressions: merging, deviations from means, substitution, and its limits."""

from __future__ import annotations

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcjax.expressions import algebra as ex
from fcjax.expressions.algebra import Expr, Factor, Label, Leaf, Term, Unrepresentable, term_key
from fcjax.planning.parts import recipe
from fcjax.running.evaluate import evaluate

moderate = settings(max_examples=10, deadline=None, derandomize=True)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
numbers = st.sampled_from((-2.0, -0.5, 1.0, 3.0))


def leaf(name, shape, kind="data"):
    return Leaf(name, kind, tuple(shape), np.dtype(float), trainable=kind == "param")


@functools.cache
def array(name, shape):
    seed = sum(map(ord, name)) + 1000 * len(shape)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def value(expr, **arrays):
    """The value of an expression whose leaves are named after their arrays."""
    env = {name: array(name, known.shape) for name, known in expr.leaves.items()} | arrays
    return evaluate(recipe(expr), env, {})


def close(expr, expected, **arrays):
    np.testing.assert_allclose(value(expr, **arrays), expected, rtol=1e-12, atol=1e-12)


def mean(expr, axes):
    """The mean over axes, which keep size 1."""
    kept = [1 if i in axes else s for i, s in enumerate(expr.shape)]
    count = np.prod([expr.shape[i] for i in axes])
    return ex.reshape(ex.scale(ex.reduce_sum(expr, axes), 1.0 / count), kept)


def minus(a, b):
    positions = range(len(a.shape))
    return ex.add(a, ex.scale(ex.broadcast(b, a.shape, positions), -1.0))


def matmul(a, b):
    return ex.contract(a, b, ((len(a.dims) - 1,), (0,)), ((), ()))


def axes_of(shape):
    count = len(shape)
    some = st.lists(st.integers(0, count - 1), min_size=1, unique=True)
    return some.map(sorted).map(tuple)


# --- canonical keys ---


def pair(first, second):
    """Two factors of one leaf ``x`` on these labels."""
    known = leaf("x", (first[0].size, first[1].size))
    return [
        Factor(known, tuple((label,) for label in axes), (None, None)) for axes in (first, second)
    ]


def test_diagonal_and_outer_squares_are_told_apart():
    n, d, other = Label(2), Label(2), Label(2)
    same = Term(1.0, tuple(pair((n, d), (n, d))))
    apart = Term(1.0, tuple(pair((n, d), (n, other))))
    assert term_key(same, frozenset()) != term_key(apart, frozenset())
    assert term_key(same, frozenset({n})) != term_key(apart, frozenset({n}))


def test_squares_of_sums_and_sums_of_squares_are_not_merged():
    x = ex.of_leaf(leaf("x", (3, 2)))
    of_squares = ex.reduce_sum(ex.multiply(x, x), (1,))
    row = ex.reduce_sum(x, (1,))
    both = ex.add(of_squares, ex.multiply(row, row))
    assert len(both.terms) == 2
    known = array("x", (3, 2))
    close(both, (known**2).sum(1) + known.sum(1) ** 2)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_keys_ignore_order_of_factors_and_names_of_bound_labels(order):
    free = Label(3)

    def term(order):
        a, b = Label(3), Label(3)
        w = leaf("w", (3, 3), "param")
        factors = [Factor(w, ((x,), (y,)), (None, None)) for x, y in ((free, a), (a, b), (b, free))]
        return Term(1.0, tuple(factors[k] for k in order))

    assert term_key(term(order), frozenset({free})) == term_key(term(range(3)), frozenset({free}))


def test_keys_tell_chains_from_cycles():
    def term(links):
        labels = [Label(3) for _ in range(4)]
        w = leaf("w", (3, 3), "param")
        return Term(
            1.0, tuple(Factor(w, ((labels[i],), (labels[j],)), (None, None)) for i, j in links)
        )

    keys = {
        term_key(term(links), frozenset())
        for links in ([(0, 1), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 0)], [(0, 1), (2, 1), (2, 3)])
    }
    assert len(keys) == 3


def test_keys_distinguish_free_labels_slices_and_centring():
    n, d = Label(2), Label(2)
    factor = pair((n, d), (n, d))[0]
    swapped = pair((d, n), (d, n))[0]
    cut = Factor(factor.leaf, factor.axes, ((0, 2, 1), None))
    centred = Factor(factor.leaf, factor.axes, (None, None), frozenset({n}))
    everything = [Term(1.0, (f,)) for f in (factor, swapped, cut, centred)]
    assert len({term_key(t, frozenset({n, d})) for t in everything}) == 4


def test_terms_with_too_many_orders_equal_only_themselves():
    w = leaf("w", (2,), "param")
    term, again = (
        Term(1.0, tuple(Factor(w, ((Label(2),),), (None,)) for _ in range(7))) for _ in range(2)
    )
    assert term_key(term, frozenset()) == term_key(term, frozenset())
    assert term_key(term, frozenset()) != term_key(again, frozenset())


# --- sums ---


@given(shapes, numbers, numbers)
@moderate
def test_like_terms_add_up(shape, a, b):
    x = ex.of_leaf(leaf("x", shape))
    total = ex.add(ex.scale(x, a), ex.scale(x, b))
    assert [t.scale for t in total.terms] == ([a + b] if a + b else [])


def test_like_products_cancel():
    x, w = ex.of_leaf(leaf("x", (3, 2))), ex.of_leaf(leaf("w", (2, 4), "param"))
    difference = ex.add(matmul(x, w), ex.scale(matmul(x, w), -1.0))
    assert difference.terms == ()
    close(difference, jnp.zeros((3, 4)))


OPERATIONS = {
    "transposed": lambda x: ex.transpose(x, tuple(reversed(range(len(x.shape))))),
    "flat": lambda x: ex.reshape(x, (int(np.prod(x.shape)),)),
    "repeated": lambda x: ex.broadcast(x, (2, *x.shape), range(1, len(x.shape) + 1)),
    "summed": lambda x: ex.reduce_sum(x, (0,)),
    "sliced": lambda x: ex.slice_axis(x, 0, x.shape[0] // 2, x.shape[0]),
    "centred": lambda x: minus(x, mean(x, (0,))),
    "times a leaf": lambda x: ex.multiply(x, ex.of_leaf(leaf("g", x.shape, "param"))),
    "through a product": lambda x: ex.contract(
        x, ex.of_leaf(leaf("w", (x.shape[0], 2), "param")), ((0,), (0,)), ((), ())
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(shapes, numbers, numbers)
@settings(max_examples=4, deadline=None, derandomize=True)
def test_operations_are_linear(name, shape, a, b):
    operation = OPERATIONS[name]
    x, y = (ex.of_leaf(leaf(k, shape)) for k in "xy")
    together = operation(ex.add(ex.scale(x, a), ex.scale(y, b)))
    apart = ex.add(ex.scale(operation(x), a), ex.scale(operation(y), b))
    close(together, value(apart))
    assert float(jnp.max(jnp.abs(value(operation(x))))) > 0 or name == "centred"


# --- deviations from a mean ---


def is_centred(expr):
    (term,) = expr.terms
    return all(bool(f.centred) for f in term.factors if f.is_data)


@given(st.lists(st.integers(2, 4), min_size=1, max_size=3).map(tuple), st.data())
@moderate
def test_value_less_its_mean_is_centred(shape, data):
    axes = data.draw(axes_of(shape))
    x = ex.of_leaf(leaf("x", shape))
    deviation = minus(x, mean(x, axes))
    assert is_centred(deviation)
    known = array("x", shape)
    close(deviation, known - known.mean(axes, keepdims=True))


@given(st.lists(st.integers(2, 4), min_size=1, max_size=3).map(tuple), st.data())
@moderate
def test_mean_of_square_less_squared_mean_is_centred(shape, data):
    axes = data.draw(axes_of(shape))
    x = ex.of_leaf(leaf("x", shape))
    average = mean(x, axes)
    variance = ex.add(mean(ex.multiply(x, x), axes), ex.scale(ex.multiply(average, average), -1.0))
    assert is_centred(variance)
    shifted = array("x", shape) + 1e6  # the one-pass formula has four digits left here
    expected = jnp.var(shifted, axes, keepdims=True)
    np.testing.assert_allclose(value(variance, x=shifted), expected, rtol=1e-8)


def test_two_pass_variance_is_the_one_pass_one():
    x = ex.of_leaf(leaf("x", (4, 3)))
    average = mean(x, (0,))
    one = ex.add(mean(ex.multiply(x, x), (0,)), ex.scale(ex.multiply(average, average), -1.0))
    deviation = minus(x, average)
    two = mean(ex.multiply(deviation, deviation), (0,))
    assert ex.add(one, ex.scale(two, -1.0)).terms == ()


def test_deviations_sum_to_zero():
    x = ex.of_leaf(leaf("x", (4, 3)))
    assert ex.reduce_sum(minus(x, mean(x, (0,))), (0,)).terms == ()


def test_half_the_mean_is_not_taken_for_a_deviation():
    x = ex.of_leaf(leaf("x", (4, 3)))
    expr = minus(x, ex.scale(mean(x, (0,)), 0.5))
    assert len(expr.terms) == 2
    known = array("x", (4, 3))
    close(expr, known - 0.5 * known.mean(0))


def test_partial_sum_of_a_deviation_is_refused():
    x = ex.of_leaf(leaf("x", (4, 3)))
    deviation = minus(x, mean(x, (0, 1)))
    with pytest.raises(Unrepresentable, match="partial sum of a centred value"):
        ex.reduce_sum(deviation, (0,))


# --- substitution ---


def reads(view):
    """An expression of the leaf ``h`` of shape (4, 6) through a view."""
    return view(ex.of_leaf(leaf("h", (4, 6))))


VIEWS = {
    "whole": lambda h: h,
    "centred rows": lambda h: minus(h, mean(h, (0,))),
    "centred columns": lambda h: minus(h, mean(h, (1,))),
    "sliced": lambda h: ex.slice_axis(ex.slice_axis(h, 0, 1, 4, 2), 1, 2, 5),
    "split": lambda h: ex.reshape(h, (4, 2, 3)),
    "merged": lambda h: ex.reshape(h, (24,)),
    "summed": lambda h: ex.reduce_sum(h, (0,)),
    "summed twice": lambda h: ex.reduce_sum(ex.reshape(h, (2, 2, 6)), (0, 2)),
    "times a gain": lambda h: ex.multiply(h, ex.of_leaf(leaf("g", (4, 6), "param"))),
    "squared": lambda h: ex.multiply(h, h),
    "variance": lambda h: mean(ex.multiply(minus(h, mean(h, (0,))), minus(h, mean(h, (0,)))), (0,)),
}


def values_of_h():
    x = ex.of_leaf(leaf("x", (4, 5)))
    w = ex.of_leaf(leaf("w", (5, 6), "param"))
    b = ex.broadcast(ex.of_leaf(leaf("b", (6,), "param")), (4, 6), (1,))
    c = ex.broadcast(ex.of_leaf(leaf("c", (4, 1), "param")), (4, 6), (0, 1))
    return {"product": matmul(x, w), "affine": ex.add(matmul(x, w), b), "row": c, "bias": b}


@pytest.mark.parametrize("of", ["product", "affine", "row", "bias"])
@pytest.mark.parametrize("view", VIEWS)
def test_substitution_through_views(view, of):
    expr, inner = reads(VIEWS[view]), values_of_h()[of]
    expected = value(expr, h=value(inner))
    close(ex.substitute(expr, "h", inner), expected)


def test_substitution_of_what_is_not_read_changes_nothing():
    x = ex.of_leaf(leaf("x", (4, 5)))
    assert ex.substitute(x, "h", values_of_h()["product"]).terms == x.terms


def test_substitution_by_zero_leaves_nothing():
    zero = Expr(ex.of_leaf(leaf("h", (4, 6))).dims, (), np.dtype(float))
    assert ex.substitute(reads(VIEWS["centred rows"]), "h", zero).terms == ()


def test_substitution_of_a_centred_product_of_two_varying_factors_is_refused():
    x, g = ex.of_leaf(leaf("x", (4, 6))), ex.of_leaf(leaf("g", (4, 6), "param"))
    with pytest.raises(Unrepresentable, match="two factors that both vary"):
        ex.substitute(reads(VIEWS["centred rows"]), "h", ex.multiply(x, g))


# --- limits ---


def test_too_many_terms_are_refused():
    total = ex.of_leaf(leaf("x0", (2,)))
    for i in range(1, ex.MAX_TERMS):
        total = ex.add(total, ex.of_leaf(leaf(f"x{i}", (2,))))
    assert len(total.terms) == ex.MAX_TERMS
    with pytest.raises(Unrepresentable, match="grows too long"):
        ex.add(total, ex.of_leaf(leaf("one more", (2,))))


def test_too_many_factors_are_refused():
    product = ex.of_leaf(leaf("w0", (2,), "param"))
    for i in range(1, ex.MAX_FACTORS):
        product = ex.multiply(product, ex.of_leaf(leaf(f"w{i}", (2,), "param")))
    assert len(product.terms[0].factors) == ex.MAX_FACTORS
    with pytest.raises(Unrepresentable, match="grows too long"):
        ex.multiply(product, ex.of_leaf(leaf("one more", (2,), "param")))


REFUSED = {
    "two activations": lambda x, y: ex.multiply(x, y),
    "product of two activations": lambda x, y: matmul(x, ex.transpose(y, (1, 0))),
    "no common refinement": lambda x, y: ex.reshape(x, (3, 2)),
    "slice of a merged axis": lambda x, y: ex.slice_axis(ex.reshape(x, (6,)), 0, 1, 4),
    "shapes .* differ": lambda x, y: ex.add(x, ex.transpose(y, (1, 0))),
    "degree above two": lambda x, y: ex.multiply(ex.multiply(x, x), ex.multiply(x, x)),
    "window over a merged axis": lambda x, y: ex.unfold(ex.reshape(x, (6,)), 0, 5, 2),
    "merged axes or of single rows": lambda x, y: ex.concatenate([x, ex.slice_axis(y, 0, 0, 1)], 0),
    "cast of data": lambda x, y: ex.cast(x, jnp.float32),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_represented_is_refused(message):
    x, y = (ex.of_leaf(leaf(name, (2, 3))) for name in "xy")
    with pytest.raises(Unrepresentable, match=message):
        REFUSED[message](x, y)
