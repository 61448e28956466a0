"""The closed forms against the formulas they stand for, on plain arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fcjax.running import numerics
from fcjax.running.numerics import (
    centred_square_sum,
    differentiated_apart,
    row_square_sum,
    scaled_product,
)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def plain_square_sum(x, z):
    product = x @ z
    return jnp.sum(jnp.square(product - product.mean(0)), axis=0)


def plain_scaled(rows, scales, weight):
    product = jnp.tensordot(rows, weight, 1)
    for scale in scales:
        product = product * scale.reshape(scale.shape + (1,) * (product.ndim - scale.ndim))
    return product


def scaled(rows, scales, weight):
    return scaled_product(rows, scales, weight, None)


def plain_row_square_sum(x, weight):
    product = x @ weight[: x.shape[-1]]
    if len(weight) > x.shape[-1]:
        product = product + weight[-1]
    return jnp.sum(jnp.square(product), axis=-1)


def arguments_of_row_squares(bias=1, columns=7):
    return normal(2, 3, 4), normal(4 + bias, columns, seed=1)


def arguments_of_square_sum():
    return normal(9, 4) + 3.0, normal(4, 5, seed=1)


def arguments_of_scaled(batch=(6,), columns=(5,), scales=2):
    rows, weight = normal(*batch, 4), normal(4, *columns, seed=1)
    return rows, tuple(normal(*batch, seed=2 + i) for i in range(scales)), weight


def branch(x, weights):
    w, a, b = weights
    return x @ w + x @ a @ b


def apart(x, w, a, b):
    return differentiated_apart(lambda x, ws: x @ (ws[0] + ws[1] @ ws[2]), branch, x, [w, a, b])


def arguments_of_branch():
    return normal(9, 6), normal(6, 5, seed=1), normal(6, 2, seed=2), normal(2, 5, seed=3)


CASES = {
    "apart": (apart, lambda x, *weights: branch(x, weights), arguments_of_branch()),
    "square sum": (centred_square_sum, plain_square_sum, arguments_of_square_sum()),
    "square sum, one column": (centred_square_sum, plain_square_sum, (normal(7, 3), normal(3, 1))),
    "square sum, few rows": (centred_square_sum, plain_square_sum, (normal(3, 5), normal(5, 2))),
    "rows": (row_square_sum, plain_row_square_sum, arguments_of_row_squares()),
    "rows, no bias": (row_square_sum, plain_row_square_sum, arguments_of_row_squares(bias=0)),
    "rows, narrow": (row_square_sum, plain_row_square_sum, arguments_of_row_squares(columns=3)),
    "rows, of rank 2": (
        row_square_sum,
        plain_row_square_sum,
        (normal(6, 4), normal(4, 2, seed=1) @ normal(2, 7, seed=2)),
    ),
    "scaled": (scaled, plain_scaled, arguments_of_scaled()),
    "scaled, no scale": (scaled, plain_scaled, arguments_of_scaled(scales=0)),
    "scaled, three scales": (scaled, plain_scaled, arguments_of_scaled(scales=3)),
    "scaled, heads": (scaled, plain_scaled, arguments_of_scaled((2, 3), (2, 3), 1)),
    "scaled, vector": (scaled, plain_scaled, arguments_of_scaled((6,), (), 1)),
}
each_case = pytest.mark.parametrize("case", CASES)


def close(actual, expected, rtol=1e-10):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * float(jnp.max(jnp.abs(e))))


def loss(function):
    return lambda *args: jnp.sum(jnp.sin(function(*args)))


def tangents_like(args):
    return jax.tree.map(lambda a: normal(*a.shape, seed=5), args)


@each_case
def test_value(case):
    closed, plain, args = CASES[case]
    close(jax.jit(closed)(*args), plain(*args), 1e-12)


@each_case
def test_forward_mode(case):
    closed, plain, args = CASES[case]
    close(*(jax.jvp(f, args, tangents_like(args)) for f in (closed, plain)))


@each_case
def test_reverse_mode(case):
    closed, plain, args = CASES[case]
    every = tuple(range(len(args)))
    close(*(jax.jit(jax.grad(loss(f), every))(*args) for f in (closed, plain)))


@each_case
def test_hessian_vector_product(case):
    closed, plain, args = CASES[case]
    every = tuple(range(len(args)))

    def product(function):
        gradient = jax.grad(loss(function), every)
        return jax.jit(lambda: jax.jvp(gradient, args, tangents_like(args))[1])()

    close(product(closed), product(plain), 1e-9)


@pytest.mark.parametrize("case", ["square sum", "rows", "scaled"])
def test_hessian(case):
    closed, plain, args = CASES[case]
    last = len(args) - 1
    close(*(jax.jit(jax.hessian(loss(f), last))(*args) for f in (closed, plain)), 1e-9)


@pytest.mark.parametrize("case", ["square sum", "rows", "scaled"])
def test_derivatives_against_differences(case):
    closed, _, args = CASES[case]
    check_grads(closed, args, order=1, modes=("fwd", "rev"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)])
def test_square_sum_under_vmap(mapped):
    x, z = arguments_of_square_sum()
    stacks = [
        jnp.stack([a, 2.0 * a, a[::-1]]) if m == 0 else a
        for a, m in zip((x, z), mapped, strict=True)
    ]
    gradients = (jax.grad(loss(f), (0, 1)) for f in (centred_square_sum, plain_square_sum))
    close(*(jax.vmap(g, mapped)(*stacks) for g in gradients))


@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)])
def test_row_squares_under_vmap(mapped):
    args = arguments_of_row_squares()
    stacks = [jnp.stack([a, 2.0 * a]) if m == 0 else a for a, m in zip(args, mapped, strict=True)]
    gradients = (jax.grad(loss(f), (0, 1)) for f in (row_square_sum, plain_row_square_sum))
    close(*(jax.vmap(g, mapped)(*stacks) for g in gradients))


def test_scaled_product_under_vmap():
    rows, scales, weight = arguments_of_scaled()
    stacked = jnp.stack([rows, -rows])
    close(*(jax.vmap(f, (0, None, None))(stacked, scales, weight) for f in (scaled, plain_scaled)))


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_scaled_product_with_symbolic_zeros(moving):
    """The tangents of arguments that stand still are never formed, and are not missed."""
    args = arguments_of_scaled()
    close(*(jax.grad(loss(f), moving)(*args) for f in (scaled, plain_scaled)))


@pytest.mark.parametrize("moving", [0, 1])
@pytest.mark.parametrize("case", ["square sum", "rows"])
def test_square_sums_with_symbolic_zeros(case, moving):
    closed, plain, args = CASES[case]
    close(*(jax.grad(loss(f), moving)(*args) for f in (closed, plain)))


def test_row_squares_save_their_rows_and_small_matrices():
    x, weight = normal(64, 4), normal(5, 7, seed=1)
    kept = jax.eval_shape(lambda x, w: jax.vjp(row_square_sum, x, w)[1], x, weight)
    assert [a.shape for a in jax.tree.leaves(kept) if 64 in a.shape] == [x.shape]


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_both_triangles(rank):
    """The compiled loop of the CPU, and the factorisation of other devices."""
    weight = normal(5, rank) @ normal(rank, 9, seed=1)
    for triangle in (numerics._orthogonalised, numerics._by_qr):
        found = triangle(weight)
        close(found @ found.T, weight @ weight.T, 1e-13)
        assert jnp.all(jnp.triu(found, 1) == 0.0)


def test_gradient_by_the_weight_alone_takes_no_product_for_the_rows():
    rows, scales, weight = arguments_of_scaled()
    count = [
        str(jax.make_jaxpr(jax.grad(loss(scaled), which))(rows, scales, weight)).count(
            "dot_general"
        )
        for which in (2, (0, 2))
    ]
    assert count == [2, 3]


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (2, 3), (0, 2, 3)])
def test_branch_with_symbolic_zeros(moving):
    args = arguments_of_branch()
    plain = CASES["apart"][1]
    close(*(jax.grad(loss(f), moving)(*args) for f in (apart, plain)))


def test_gradient_beside_a_frozen_weight_takes_no_gradient_of_it():
    """No product has the shape of the weight but the effective one itself."""
    x, w, a, b = arguments_of_branch()
    gradient = jax.jit(jax.grad(loss(apart), (0, 2, 3)))
    text = gradient.lower(x, w, a, b).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    of_weight = [line for line in products if line.rstrip().endswith("tensor<6x5xf64>")]
    of_rows = [line for line in products if "tensor<9x6xf64>" in line.split("->")[0]]
    assert all("tensor<6x2xf64>, tensor<2x5xf64>" in line for line in of_weight)
    assert of_rows


# --- accuracy in float32 ---

ROWS, WIDTH = 4096, 16


def thin(ratio, mean=0.0):
    """Rows that vary ``ratio`` times less in one direction, columns along it and along others.

    Returns arrays in float64 that float32 holds exactly.
    """
    rotation, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((WIDTH, WIDTH)))
    std = np.ones(WIDTH)
    std[0] = ratio
    rows = np.random.default_rng(4).standard_normal((ROWS, WIDTH)) * std @ rotation + mean
    columns = np.concatenate([rotation[:1].T, rotation[1:4].T], axis=1)
    return [np.asarray(np.float32(a), np.float64) for a in (rows, columns)]


def two_pass(x, z):
    """The variance that backpropagation's network takes, times the number of rows."""
    return jnp.var(x @ z, axis=0) * x.shape[0]


def worst(function, x, z):
    """The largest relative error of a function in float32."""
    exact = np.sum(np.square(x @ z - (x @ z).mean(0)), axis=0)
    found = np.asarray(function(jnp.float32(x), jnp.float32(z)), np.float64)
    return float(np.max(np.abs(found - exact) / exact))


def as_good_as(actual, reference, floor, factor=3.0):
    assert actual <= max(factor * reference, floor)


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-4])
def test_accuracy_in_directions_of_low_variance(ratio):
    """Relative error at most three times that of two passes over the product, or 2e-5."""
    x, z = thin(ratio)
    as_good_as(worst(centred_square_sum, x, z), worst(two_pass, x, z), 2e-5)


def test_plain_second_moments_would_not_do():
    """The test above can fail: the covariance of x loses all digits of a thin direction."""

    def by_covariance(x, z):
        shifted = x - x.mean(0)
        return jnp.sum(z * (shifted.T @ shifted @ z), axis=0)

    x, z = thin(1e-4)
    assert worst(by_covariance, x, z) > 100 * max(worst(two_pass, x, z), 2e-5)


def test_accuracy_far_from_the_origin():
    """Means of 1e3 standard deviations: as good as two passes, to three times."""
    x, z = thin(1.0, mean=1e3)
    as_good_as(worst(centred_square_sum, x, z), worst(two_pass, x, z), 2e-5)


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-4])
def test_accuracy_of_the_gradient_by_the_columns(ratio):
    """Of log v, so that every column counts alike; at most 200 times two passes.

    The coordinates are shifted by the rounding of the largest moment, so a direction thinner than
    that keeps fewer digits of its gradient than of its value.
    """
    x, z = thin(ratio)

    def gradient(function, dtype):
        return jax.grad(lambda z: jnp.sum(jnp.log(function(jnp.asarray(x, dtype), z))))(
            jnp.asarray(z, dtype)
        )

    exact = gradient(two_pass, jnp.float64)
    scale = jnp.max(jnp.abs(exact), axis=0)
    errors = [
        float(jnp.max(jnp.abs(gradient(f, jnp.float32) - exact) / scale))
        for f in (centred_square_sum, two_pass)
    ]
    as_good_as(*errors, 0.0, factor=200.0)


def low(ratio, columns=64):
    """Rows along one direction, in which the weight is ``ratio`` times as large as elsewhere."""
    rotation, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((WIDTH, WIDTH)))
    other, _ = np.linalg.qr(np.random.default_rng(4).standard_normal((columns, WIDTH)))
    size = np.ones(WIDTH)
    size[0] = ratio
    rows = np.outer(1 + np.random.default_rng(5).random(ROWS), rotation[0])
    weight = (rotation.T * size) @ other.T
    return [np.asarray(np.float32(a), np.float64) for a in (rows, weight)]


def row_errors(function, x, weight):
    """Root mean square relative errors in float32: of the values, and of both gradients of logs."""
    by_both = jax.grad(lambda x, w: jnp.sum(jnp.log(function(x, w))), (0, 1))
    plain = jax.grad(lambda x, w: jnp.sum(jnp.log(plain_row_square_sum(x, w))), (0, 1))
    exact = [plain_row_square_sum(x, weight), *plain(x, weight)]
    narrow = jnp.float32(x), jnp.float32(weight)
    found = [function(*narrow), *jax.jit(by_both)(*narrow)]
    return [
        float(jnp.linalg.norm(jnp.float64(f) - e) / jnp.linalg.norm(e))
        for f, e in zip(found, exact, strict=True)
    ]


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-4])
def test_accuracy_of_row_squares(ratio):
    """Values and gradients by the rows err at most five times as much as through the product.

    Where all rows lie in the one direction in which the weight is small, its gradient is the
    second moments of the rows times the weight, and errs by their rounding over the ratio.
    """
    x, weight = low(ratio)
    errors = [row_errors(f, x, weight) for f in (row_square_sum, plain_row_square_sum)]
    (*actual, by_weight), (*references, _) = errors
    for error, reference in zip(actual, references, strict=True):
        as_good_as(error, reference, 1e-6, factor=5.0)
    assert by_weight <= 64 * np.finfo(np.float32).eps / ratio


@pytest.mark.parametrize("ratio", [1.0, 1e-2, 1e-4])
def test_accuracy_of_row_squares_of_all_kinds_of_rows(ratio):
    """Rows in every direction, with one in which they, or the weight, hardly vary."""
    rows, _ = thin(ratio)
    _, weight = low(ratio)
    for x, w in ((rows, low(1.0)[1]), (thin(1.0)[0], weight)):
        errors = [row_errors(f, x, w) for f in (row_square_sum, plain_row_square_sum)]
        for error, reference in zip(*errors, strict=True):
            as_good_as(error, reference, 2e-6, factor=4.0)


def test_row_squares_by_the_gram_matrix_would_not_do():
    """The test above can fail: ``x W W^T x`` loses all digits where the product is small."""
    x, weight = low(1e-4)
    by_gram = lambda x, w: jnp.sum(x * (x @ (w @ w.T)), axis=-1)  # noqa: E731
    (error, *_), (reference, *_) = (row_errors(f, x, weight) for f in (by_gram, row_square_sum))
    assert error > 100 * reference


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("constant", [slice(None), slice(0, 1), slice(1, 4)])
def test_constant_columns(constant, dtype):
    """Columns that do not vary add nothing, and no gradient is infinite there."""
    x, z = normal(32, 4).astype(dtype).at[:, constant].set(2.5), normal(4, 3).astype(dtype)
    value, gradients = jax.value_and_grad(lambda x, z: centred_square_sum(x, z).sum(), (0, 1))(x, z)
    expected = jax.value_and_grad(lambda x, z: plain_square_sum(x, z).sum(), (0, 1))(x, z)
    tolerance = 1e-10 if dtype == jnp.float64 else 2e-4
    for actual, wanted in zip(
        jax.tree.leaves((value, gradients)), jax.tree.leaves(expected), strict=True
    ):
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance)


def test_the_dtype_is_that_of_the_operands():
    x, z = (a.astype(jnp.float32) for a in arguments_of_square_sum())
    assert centred_square_sum(x, z).dtype == jnp.float32
    assert scaled(x, (x[:, 0],), z).dtype == jnp.float32
