"""The algebra of expressions: merging, deviations from means, substitution, and its limits."""

from __future__ import annotations

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcjax.expressions import algebra, layout, like_terms, terms, windowed
from fcjax.expressions.like_terms import term_key
from fcjax.expressions.terms import Expr, Factor, Label, Leaf, Term, Unrepresentable
from fcjax.planning.recipes import recipe
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
    return layout.reshape(algebra.scale(algebra.reduce_sum(expr, axes), 1.0 / count), kept)


def minus(a, b):
    positions = range(len(a.shape))
    return algebra.add(a, algebra.scale(layout.broadcast(b, a.shape, positions), -1.0))


def matmul(a, b):
    return algebra.contract(a, b, ((len(a.dims) - 1,), (0,)), ((), ()))


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
    x = terms.of_leaf(leaf("x", (3, 2)))
    of_squares = algebra.reduce_sum(algebra.multiply(x, x), (1,))
    row = algebra.reduce_sum(x, (1,))
    both = algebra.add(of_squares, algebra.multiply(row, row))
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
    x = terms.of_leaf(leaf("x", shape))
    total = algebra.add(algebra.scale(x, a), algebra.scale(x, b))
    assert [t.scale for t in total.terms] == ([a + b] if a + b else [])


def test_like_products_cancel():
    x, w = terms.of_leaf(leaf("x", (3, 2))), terms.of_leaf(leaf("w", (2, 4), "param"))
    difference = algebra.add(matmul(x, w), algebra.scale(matmul(x, w), -1.0))
    assert difference.terms == ()
    close(difference, jnp.zeros((3, 4)))


OPERATIONS = {
    "transposed": lambda x: layout.transpose(x, tuple(reversed(range(len(x.shape))))),
    "flat": lambda x: layout.reshape(x, (int(np.prod(x.shape)),)),
    "repeated": lambda x: layout.broadcast(x, (2, *x.shape), range(1, len(x.shape) + 1)),
    "summed": lambda x: algebra.reduce_sum(x, (0,)),
    "sliced": lambda x: windowed.slice_axis(x, 0, x.shape[0] // 2, x.shape[0]),
    "centred": lambda x: minus(x, mean(x, (0,))),
    "times a leaf": lambda x: algebra.multiply(x, terms.of_leaf(leaf("g", x.shape, "param"))),
    "through a product": lambda x: algebra.contract(
        x, terms.of_leaf(leaf("w", (x.shape[0], 2), "param")), ((0,), (0,)), ((), ())
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(shapes, numbers, numbers)
@settings(max_examples=4, deadline=None, derandomize=True)
def test_operations_are_linear(name, shape, a, b):
    operation = OPERATIONS[name]
    x, y = (terms.of_leaf(leaf(k, shape)) for k in "xy")
    together = operation(algebra.add(algebra.scale(x, a), algebra.scale(y, b)))
    apart = algebra.add(algebra.scale(operation(x), a), algebra.scale(operation(y), b))
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
    x = terms.of_leaf(leaf("x", shape))
    deviation = minus(x, mean(x, axes))
    assert is_centred(deviation)
    known = array("x", shape)
    close(deviation, known - known.mean(axes, keepdims=True))


@given(st.lists(st.integers(2, 4), min_size=1, max_size=3).map(tuple), st.data())
@moderate
def test_mean_of_square_less_squared_mean_is_centred(shape, data):
    axes = data.draw(axes_of(shape))
    x = terms.of_leaf(leaf("x", shape))
    average = mean(x, axes)
    variance = algebra.add(
        mean(algebra.multiply(x, x), axes), algebra.scale(algebra.multiply(average, average), -1.0)
    )
    assert is_centred(variance)
    shifted = array("x", shape) + 1e6  # the one-pass formula has four digits left here
    expected = jnp.var(shifted, axes, keepdims=True)
    np.testing.assert_allclose(value(variance, x=shifted), expected, rtol=1e-8)


def test_two_pass_variance_is_the_one_pass_one():
    x = terms.of_leaf(leaf("x", (4, 3)))
    average = mean(x, (0,))
    one = algebra.add(
        mean(algebra.multiply(x, x), (0,)), algebra.scale(algebra.multiply(average, average), -1.0)
    )
    deviation = minus(x, average)
    two = mean(algebra.multiply(deviation, deviation), (0,))
    assert algebra.add(one, algebra.scale(two, -1.0)).terms == ()


def test_deviations_sum_to_zero():
    x = terms.of_leaf(leaf("x", (4, 3)))
    assert algebra.reduce_sum(minus(x, mean(x, (0,))), (0,)).terms == ()


def test_half_the_mean_is_not_taken_for_a_deviation():
    x = terms.of_leaf(leaf("x", (4, 3)))
    expr = minus(x, algebra.scale(mean(x, (0,)), 0.5))
    assert len(expr.terms) == 2
    known = array("x", (4, 3))
    close(expr, known - 0.5 * known.mean(0))


def test_partial_sum_of_a_deviation_is_refused():
    x = terms.of_leaf(leaf("x", (4, 3)))
    deviation = minus(x, mean(x, (0, 1)))
    with pytest.raises(Unrepresentable, match="partial sum of a centred value"):
        algebra.reduce_sum(deviation, (0,))


# --- substitution ---


def reads(view):
    """An expression of the leaf ``h`` of shape (4, 6) through a view."""
    return view(terms.of_leaf(leaf("h", (4, 6))))


VIEWS = {
    "whole": lambda h: h,
    "centred rows": lambda h: minus(h, mean(h, (0,))),
    "centred columns": lambda h: minus(h, mean(h, (1,))),
    "sliced": lambda h: windowed.slice_axis(windowed.slice_axis(h, 0, 1, 4, 2), 1, 2, 5),
    "split": lambda h: layout.reshape(h, (4, 2, 3)),
    "merged": lambda h: layout.reshape(h, (24,)),
    "summed": lambda h: algebra.reduce_sum(h, (0,)),
    "summed twice": lambda h: algebra.reduce_sum(layout.reshape(h, (2, 2, 6)), (0, 2)),
    "times a gain": lambda h: algebra.multiply(h, terms.of_leaf(leaf("g", (4, 6), "param"))),
    "squared": lambda h: algebra.multiply(h, h),
    "variance": lambda h: mean(
        algebra.multiply(minus(h, mean(h, (0,))), minus(h, mean(h, (0,)))), (0,)
    ),
}


def values_of_h():
    x = terms.of_leaf(leaf("x", (4, 5)))
    w = terms.of_leaf(leaf("w", (5, 6), "param"))
    b = layout.broadcast(terms.of_leaf(leaf("b", (6,), "param")), (4, 6), (1,))
    c = layout.broadcast(terms.of_leaf(leaf("c", (4, 1), "param")), (4, 6), (0, 1))
    return {"product": matmul(x, w), "affine": algebra.add(matmul(x, w), b), "row": c, "bias": b}


@pytest.mark.parametrize("of", ["product", "affine", "row", "bias"])
@pytest.mark.parametrize("view", VIEWS)
def test_substitution_through_views(view, of):
    expr, inner = reads(VIEWS[view]), values_of_h()[of]
    expected = value(expr, h=value(inner))
    close(algebra.substitute(expr, "h", inner), expected)


def test_substitution_of_what_is_not_read_changes_nothing():
    x = terms.of_leaf(leaf("x", (4, 5)))
    assert algebra.substitute(x, "h", values_of_h()["product"]).terms == x.terms


def test_substitution_by_zero_leaves_nothing():
    zero = Expr(terms.of_leaf(leaf("h", (4, 6))).dims, (), np.dtype(float))
    assert algebra.substitute(reads(VIEWS["centred rows"]), "h", zero).terms == ()


def test_substitution_of_a_centred_product_of_two_varying_factors_is_refused():
    x, g = terms.of_leaf(leaf("x", (4, 6))), terms.of_leaf(leaf("g", (4, 6), "param"))
    with pytest.raises(Unrepresentable, match="two factors that both vary"):
        algebra.substitute(reads(VIEWS["centred rows"]), "h", algebra.multiply(x, g))


# --- limits ---


def test_too_many_terms_are_refused():
    total = terms.of_leaf(leaf("x0", (2,)))
    for i in range(1, like_terms.MAX_TERMS):
        total = algebra.add(total, terms.of_leaf(leaf(f"x{i}", (2,))))
    assert len(total.terms) == like_terms.MAX_TERMS
    with pytest.raises(Unrepresentable, match="grows too long"):
        algebra.add(total, terms.of_leaf(leaf("one more", (2,))))


def test_too_many_factors_are_refused():
    product = terms.of_leaf(leaf("w0", (2,), "param"))
    for i in range(1, like_terms.MAX_FACTORS):
        product = algebra.multiply(product, terms.of_leaf(leaf(f"w{i}", (2,), "param")))
    assert len(product.terms[0].factors) == like_terms.MAX_FACTORS
    with pytest.raises(Unrepresentable, match="grows too long"):
        algebra.multiply(product, terms.of_leaf(leaf("one more", (2,), "param")))


REFUSED = {
    "two activations": lambda x, y: algebra.multiply(x, y),
    "product of two activations": lambda x, y: matmul(x, layout.transpose(y, (1, 0))),
    "no common refinement": lambda x, y: layout.reshape(x, (3, 2)),
    "slice of a merged axis": lambda x, y: windowed.slice_axis(layout.reshape(x, (6,)), 0, 1, 4),
    "shapes .* differ": lambda x, y: algebra.add(x, layout.transpose(y, (1, 0))),
    "degree above two": lambda x, y: algebra.multiply(
        algebra.multiply(x, x), algebra.multiply(x, x)
    ),
    "window over a merged axis": lambda x, y: windowed.unfold(layout.reshape(x, (6,)), 0, 5, 2),
    "merged axes or of single rows": lambda x, y: windowed.concatenate(
        [x, windowed.slice_axis(y, 0, 0, 1)], 0
    ),
    "cast of data": lambda x, y: layout.cast(x, jnp.float32),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_represented_is_refused(message):
    x, y = (terms.of_leaf(leaf(name, (2, 3))) for name in "xy")
    with pytest.raises(Unrepresentable, match=message):
        REFUSED[message](x, y)
