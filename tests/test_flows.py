"""The closed forms of gradient flow on plain arrays, against gradient descent on all factors."""

from __future__ import annotations

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_networks import chain, normal, vectors

from fcjax.rules import flows, matrix_flows

RATES = [0.02 / 2**k for k in range(5)]
CHAINS = {
    "balanced": (chain(7, 9, 8, 5), 5),
    "wide output": (chain(3, 6, 6, 8), 3),
    "narrow": (chain(6, 2, 5, 7), 2),
    "narrow, tall": (chain(7, 5, 2, 6), 2),
    "two": (chain(5, 6, 4), 4),
    "relaxed": (chain(5, 5, 5, 5, offsets=[0.5, 0.0, 1.0]), 5),
    "relaxed, tall": (chain(8, 4, 4, offsets=[0.0, 0.7]), 4),
    "relaxed, wide": (chain(4, 4, 9, offsets=[0.3, 0.0]), 4),
    "relaxed, narrow": (chain(6, 3, 3, 7, offsets=[0.3, 0.0, 0.5]), 3),
    "deep": (chain(*[4] * 9), 4),
}
each_chain = pytest.mark.parametrize("name", CHAINS)


def multiplied(factors):
    return functools.reduce(operator.matmul, factors)


def offsets_of(factors):
    return jnp.asarray(matrix_flows.gaps(factors)[0])


def descended(loss, start, steps):
    """What gradient descent makes of parameters over the same time at each rate."""

    @jax.jit
    def run(params, rate, count):
        def step(_, p):
            return jax.tree.map(lambda a, g: a - rate * g, p, jax.grad(loss)(p))

        return jax.lax.fori_loop(0, count, step, params)

    return [run(start, rate, round(steps * RATES[0] / rate)) for rate in RATES]


def gradient(loss, params):
    return jax.jit(jax.grad(loss))(params)


def relative(found, wanted):
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


def assert_halves(deviations, low=1.7, high=2.3):
    ratios = [a / b for a, b in itertools.pairwise(deviations)]
    assert all(low < ratio < high for ratio in ratios), (deviations, ratios)


# --- elementwise chains ---


def fit(targets):
    return lambda w: jnp.sum((w - targets) ** 2)


TARGETS = jnp.asarray([1.5, -0.8, 0.4, -1.0, 2.0, 0.9])
"""Some of the opposite sign of the initial product, so that survivors pass zero."""


def elementwise_deviations(closed, start):
    """Deviation of the product from that of gradient descent on three vectors."""
    loss = fit(TARGETS)
    factors = [jnp.asarray(v) for v in vectors(3)]
    full = descended(lambda w: loss(w[0] * w[1] * w[2]), factors, 150)
    reduced = descended(lambda u: loss(closed(u)), start, 150)
    return [relative(closed(u), w[0] * w[1] * w[2]) for u, w in zip(reduced, full, strict=True)]


def test_factors_and_survivor_are_inverse():
    factors = [*vectors(3), -vectors(3)[0]]  # with a tie in magnitude
    u, constants, signs = flows.survivor(factors)
    np.testing.assert_allclose(flows.factors(jnp.asarray(u), constants, signs), factors, rtol=1e-15)
    assert np.all(constants >= 0)
    np.testing.assert_array_equal(np.abs(u), np.min(np.abs(factors), axis=0))


def test_tied_factors_follow_through_zero():
    u, constants, signs = flows.survivor([np.array([0.5]), np.array([-0.5]), np.array([2.0])])
    found = flows.factors(jnp.asarray([-0.1]), constants, signs).ravel()
    np.testing.assert_allclose(found, [-0.1, 0.1, np.sqrt(2.0**2 - 0.5**2 + 0.1**2)])
    assert float(u[0]) == 0.5


def test_smallest_survivor_converges_to_gradient_descent():
    u, constants, signs = flows.survivor(vectors(3))
    signs_of = np.prod(np.sign(vectors(3)), axis=0)
    assert np.any(signs_of != np.sign(TARGETS))

    def closed(u):
        kept, last = flows.effective(u, constants, signs)
        return jnp.prod(kept, axis=0) * last

    deviations = elementwise_deviations(closed, jnp.asarray(u))
    assert_halves(deviations)
    assert deviations[1] < 1e-2  # at the learning rate 0.01


def test_last_layer_as_survivor_is_wrong():
    first, second, last = vectors(3)

    def closed(w):
        squares = [jnp.maximum(w**2 + f**2 - last**2, 0) for f in (first, second)]
        roots = [jnp.sign(f) * jnp.sqrt(s) for f, s in zip((first, second), squares, strict=True)]
        return jax.lax.stop_gradient(roots[0] * roots[1]) * w

    deviations = elementwise_deviations(closed, jnp.asarray(last))
    assert min(deviations) > 0.1


def test_derivative_of_the_closed_form_is_wrong():
    u, constants, signs = flows.survivor(vectors(3))

    def closed(u):
        return jnp.prod(flows.factors(u, constants, signs), axis=0)

    deviations = elementwise_deviations(closed, jnp.asarray(u))
    assert deviations[-1] > 0.9 * deviations[-2] > 1e-2


def test_effective_has_the_partial_derivative():
    factors = [jnp.asarray(v) for v in vectors(3)]
    u, constants, signs = flows.survivor(vectors(3))
    smallest = np.argmin(np.abs(factors), axis=0)
    products = jax.jacfwd(lambda w: w[0] * w[1] * w[2])(jnp.stack(factors))
    wanted = [products[i, smallest[i], i] for i in range(6)]

    def closed(u):
        kept, last = flows.effective(u, constants, signs)
        return jnp.prod(kept, axis=0) * last

    np.testing.assert_allclose(jnp.diag(jax.jacrev(closed)(jnp.asarray(u))), wanted, rtol=1e-14)


# --- matrix chains ---


@each_chain
def test_preconditioner_is_that_of_the_factors(name):
    factors, rank = CHAINS[name]
    Z, G = multiplied(factors), normal(factors[0].shape[0], factors[-1].shape[1], seed=5)
    wanted = 0.0
    for j in range(len(factors)):
        before = multiplied([np.eye(factors[0].shape[0]), *factors[:j]])
        after = multiplied([*factors[j + 1 :], np.eye(factors[-1].shape[1])])
        wanted = wanted + before @ before.T @ G @ after.T @ after
    offsets = offsets_of(factors)
    found = gradient(lambda Z: jnp.vdot(G, matrix_flows.product(Z, offsets, rank)), Z)
    np.testing.assert_allclose(found, wanted, atol=1e-12 * np.max(np.abs(wanted)))


@each_chain
def test_product_converges_to_gradient_descent(name):
    factors, rank = CHAINS[name]
    goal = normal(factors[0].shape[0], factors[-1].shape[1], seed=7, scale=0.4)
    offsets, start = offsets_of(factors), jnp.asarray(multiplied(factors))

    def closed(Z):
        return matrix_flows.product(Z, offsets, rank)

    full = descended(
        lambda w: 0.2 * fit(goal)(multiplied(w)), [jnp.asarray(w) for w in factors], 60
    )
    reduced = descended(lambda Z: 0.2 * fit(goal)(closed(Z)), start, 60)
    assert_halves(
        [relative(closed(Z), multiplied(w)) for Z, w in zip(reduced, full, strict=True)], 1.7, 2.4
    )


def test_a_narrow_chain_must_be_truncated():
    """What leaves the matrices of its rank grows, and the flow of all matrices runs away."""
    factors, rank = CHAINS["narrow"]
    goal = normal(6, 7, seed=7, scale=0.4)
    start = jnp.asarray(multiplied(factors))
    deviations = {}
    full = descended(lambda w: fit(goal)(multiplied(w)), [jnp.asarray(w) for w in factors], 800)
    for kept in (rank, 6):
        closed = functools.partial(matrix_flows.product, offsets=jnp.zeros(3), rank=kept)
        found = descended(lambda Z, closed=closed: fit(goal)(closed(Z)), start, 800)
        deviations[kept] = [
            relative(closed(Z), multiplied(w)) for Z, w in zip(found, full, strict=True)
        ]
    assert_halves(deviations[rank])
    assert min(deviations[6]) > 0.4


def test_preconditioner_is_symmetric_and_transforms():
    factors, rank = CHAINS["narrow"]
    Z, offsets = jnp.asarray(multiplied(factors)), jnp.zeros(3)
    A, B = normal(6, 7, seed=1), normal(6, 7, seed=2)
    closed = functools.partial(matrix_flows.product, offsets=offsets, rank=rank)

    @jax.jit
    def moved(tangent):
        return jax.jvp(closed, (Z,), (tangent,))[1]

    np.testing.assert_allclose(jnp.vdot(A, moved(B)), jnp.vdot(B, moved(A)), rtol=1e-12)
    pulled = gradient(lambda Z: jnp.vdot(A, closed(Z)), Z)
    np.testing.assert_allclose(pulled, moved(A), atol=1e-12)
    each = jax.vmap(jax.grad(lambda Z: jnp.sum(closed(Z) ** 2)))
    several = jax.jit(each)(jnp.stack([Z, 2 * Z]))
    assert several.shape == (2, 6, 7)
    np.testing.assert_allclose(several[0], moved(2 * closed(Z)), atol=1e-11)


def test_equal_singular_values_have_finite_gradients():
    Z = jnp.eye(4)
    second = jax.hessian(lambda Z: jnp.sum(matrix_flows.product(Z, jnp.zeros(3), 4) ** 3))
    assert np.isfinite(jax.jit(second)(Z)).all()
    for offsets in (jnp.zeros(3), jnp.asarray([0.0, 1.0, 2.0])):
        zero = gradient(lambda Z, o=offsets: jnp.sum(matrix_flows.product(Z, o, 4)), 0.0 * Z)
        assert np.isfinite(zero).all()


@each_chain
def test_factors_of_a_product(name):
    factors, rank = CHAINS[name]
    offsets, initial = offsets_of(factors), matrix_flows.gauge(factors, rank)
    at_start = matrix_flows.factors(jnp.asarray(multiplied(factors)), offsets, rank, initial)
    for found, wanted in zip(at_start, factors, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-13)
    left, right = (chain(n, n)[0] for n in (factors[0].shape[0], factors[-1].shape[1]))
    Z = 1.3 * left @ multiplied(factors) @ right
    moved = matrix_flows.factors(Z, offsets, rank, initial)
    np.testing.assert_allclose(multiplied(moved), Z, atol=1e-12)
    found, violation = matrix_flows.gaps([np.asarray(w) for w in moved])
    assert violation < 1e-12
    np.testing.assert_allclose(found, offsets, atol=1e-12)


def test_factors_change_continuously():
    factors, rank = CHAINS["balanced"]
    Z, initial = multiplied(factors), matrix_flows.gauge(factors, rank)
    for size in (1e-3, 1e-6):
        near = matrix_flows.factors(Z + size * normal(7, 5), jnp.zeros(3), rank, initial)
        gaps = [float(jnp.max(jnp.abs(a - b))) for a, b in zip(near, factors, strict=True)]
        assert max(gaps) < 20 * size


@each_chain
def test_gradient_norms_add_up(name):
    factors, rank = CHAINS[name]
    goal = normal(factors[0].shape[0], factors[-1].shape[1], seed=7)
    each = gradient(lambda w: fit(goal)(multiplied(w)), [jnp.asarray(w) for w in factors])
    Z, offsets = jnp.asarray(multiplied(factors)), offsets_of(factors)
    moved = gradient(lambda Z: fit(goal)(matrix_flows.product(Z, offsets, rank)), Z)
    found = jax.jit(matrix_flows.gradient_norms, static_argnums=3)(Z, moved, offsets, rank)
    np.testing.assert_allclose(found, sum(jnp.sum(g**2) for g in each), rtol=1e-10)


def test_gaps_measure_what_departs_from_the_identity():
    factors = [normal(6, 8), normal(8, 3)]
    gap = factors[1] @ factors[1].T - factors[0].T @ factors[0]
    gap -= np.trace(gap) / 8 * np.eye(8)
    _, violation = matrix_flows.gaps(factors)
    larger = max(
        np.linalg.norm(factors[1] @ factors[1].T), np.linalg.norm(factors[0].T @ factors[0])
    )
    np.testing.assert_allclose(violation, np.linalg.norm(gap) / larger)


def test_rebalanced_keeps_the_product():
    factors = [normal(6, 8), normal(8, 7), normal(7, 3)]
    made = matrix_flows.rebalanced(factors, 3)
    assert [w.shape for w in made] == [w.shape for w in factors]
    np.testing.assert_allclose(multiplied(made), multiplied(factors), atol=1e-12)
    offsets, violation = matrix_flows.gaps(made)
    assert violation < 1e-13
    np.testing.assert_allclose(offsets, 0, atol=1e-12)


def test_float32():
    factors = [w.astype(np.float32) for w in CHAINS["balanced"][0]]
    Z, G = multiplied(factors), normal(7, 5, seed=5).astype(np.float32)
    found = jax.grad(lambda Z: jnp.vdot(G, matrix_flows.product(Z, jnp.zeros(3, Z.dtype), 5)))(Z)
    wide = jax.grad(lambda Z: jnp.vdot(np.float64(G), matrix_flows.product(Z, jnp.zeros(3), 5)))(
        np.float64(Z)
    )
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wide, atol=2e-5)
