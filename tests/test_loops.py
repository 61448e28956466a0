"""Gradient accumulation in the user's own loop, with the loop inside apply_fn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from training import relative_deviation
from zoo import weights

import fcjax

MICROBATCHES, ROWS, WIDTHS = 16, 64, ((32, 256), (256, 256), (256, 8))


def chain(params, x):
    for w in params:
        x = x @ w
    return x


def accumulated(params, xs):
    """The loop over microbatches as part of the network."""
    return jax.lax.map(lambda x: chain(params, x), xs)


def loss(apply):
    return lambda params, xs: jnp.mean(jnp.sin(apply(params, xs)))


def summed_gradients(apply):
    """The usual way: a gradient for every microbatch, added up."""

    def total(params, xs):
        def one(added, x):
            gradient = jax.grad(lambda p: jnp.mean(jnp.sin(apply(p, x))))(params)
            return jax.tree.map(jnp.add, added, gradient), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        added, _ = jax.lax.scan(one, zeros, xs)
        return jax.tree.map(lambda g: g / MICROBATCHES, added)

    return total


def products_in_loops(jaxpr, inside=False):
    """The numbers of elements of the results of matrix products that loops repeat."""
    found = []
    for equation in jaxpr.eqns:
        loop = inside or equation.primitive.name in ("scan", "while")
        if equation.primitive.name == "dot_general" and inside:
            found.append(equation.outvars[0].aval.size)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += products_in_loops(inner, loop)
    return found


def test_a_loop_inside_the_network_expands_gradients_once():
    """Of the products in the loop two are left: with the effective weight, and its gradient."""
    params = weights(*WIDTHS)
    xs = np.random.default_rng(0).standard_normal((MICROBATCHES, ROWS, 32))
    fc = fcjax.front_contribute(accumulated, params, xs)
    gradient = jax.jit(jax.grad(loss(fc.apply)))
    products = products_in_loops(jax.make_jaxpr(gradient)(params, xs).jaxpr)
    assert sorted(products) == [WIDTHS[0][0] * WIDTHS[-1][1], ROWS * WIDTHS[-1][1]]
    expected = jax.jit(summed_gradients(chain))(params, xs)
    assert relative_deviation(gradient(params, xs), expected) < 1e-12


def test_a_loop_around_the_network_expands_them_in_every_run():
    """Exact too, but the gradients of the factors are formed for every microbatch."""
    params = weights(*WIDTHS)
    xs = np.random.default_rng(0).standard_normal((MICROBATCHES, ROWS, 32))
    fc = fcjax.front_contribute(chain, params, xs[0])
    around = jax.jit(summed_gradients(fc.apply))
    products = products_in_loops(jax.make_jaxpr(around)(params, xs).jaxpr)
    assert max(products) == max(m * n for m, n in WIDTHS)
    expected = jax.jit(summed_gradients(chain))(params, xs)
    assert relative_deviation(around(params, xs), expected) < 1e-12
