"""Weights that an optimizer freezes: a plan does not pay for gradients that nobody needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from test_corners import normal

import fcjax
from fcjax.rules.unmoved import unmoved
from fcjax.transform import _tree

LAYERS, WIDTH, RANK = 3, 128, 8
LABELS = {"w": "frozen", "b": "frozen", "down": "trained", "up": "trained"}
FROZEN = {"frozen": optax.set_to_zero(), "trained": optax.adam(1e-2)}


def weight(*shape, seed):
    return normal(*shape, seed=seed, scale=shape[0] ** -0.5)


def adapter(seed):
    return {
        "w": weight(WIDTH, WIDTH, seed=seed),
        "b": jnp.zeros(WIDTH),
        "down": weight(WIDTH, RANK, seed=seed),
        "up": 0.1 * weight(RANK, WIDTH, seed=seed),
    }


PARAMS = {f"layer_{i}": adapter(i) for i in range(LAYERS)}
X = weight(1024, WIDTH, seed=9)


def adapted(params, x):
    for layer in params.values():
        x = jnp.tanh(x @ layer["w"] + layer["b"] + x @ layer["down"] @ layer["up"])
    return x


def partition(transforms):
    return optax.partition(transforms, dict.fromkeys(PARAMS, LABELS))


def gradient(apply, params, x=X):
    return jax.grad(lambda p: jnp.sum(apply(p, x) ** 2))(params)


def step(apply, optimizer, x=X):
    def run(params, state):
        updates, state = optimizer.update(gradient(apply, params, x), state, params)
        return optax.apply_updates(params, updates), state

    return run


def trained(apply, optimizer, params):
    run = step(apply, optimizer)
    return lax.fori_loop(0, 50, lambda _, c: run(*c), (params, optimizer.init(params)))[0]


def assert_close(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), actual, expected
    )


def needed(apply, optimizer, params, x):
    """The operations of a step without those that only frozen weights' gradients need."""
    run = step(apply, optimizer, x)
    compiled = jax.jit(run).lower(params, optimizer.init(params)).compile()
    return compiled.cost_analysis()["flops"]


def test_adapters_beside_frozen_weights_cost_no_more_operations_than_as_written():
    optimizer = partition(FROZEN)
    params, x = jax.tree.map(lambda a: a.astype(jnp.float32), (PARAMS, X))
    fc = fcjax.front_contribute(adapted, params, x, optimizer=optimizer)
    limit = needed(adapted, optimizer, params, x)
    assert needed(fc.apply, optimizer, fc.params, x) <= limit
    assert "without the gradients of 6 leaves" in str(fc)
    ignorant = fcjax.front_contribute(adapted, params, x)
    assert needed(ignorant.apply, optimizer, ignorant.params, x) > 1.2 * limit


def test_frozen_weights_train_as_written_and_keep_their_gradients():
    optimizer = partition(FROZEN)
    fc = fcjax.front_contribute(adapted, PARAMS, X, optimizer=optimizer)
    made, expected = trained(fc.apply, optimizer, fc.params), trained(adapted, optimizer, PARAMS)
    assert_close(fc.expand(made), expected)
    assert_close(gradient(fc.apply, fc.params), gradient(adapted, PARAMS))


MASK = {"a": True, "b": False}
OPTIMIZERS = {
    "partition": (
        optax.partition({"x": optax.set_to_zero(), "y": optax.adamw(1e-3)}, {"a": "x", "b": "y"}),
        {"a"},
    ),
    "masked first": (
        optax.chain(optax.masked(optax.set_to_zero(), MASK), optax.sgd(0.1)), {"a"}
    ),
    "masked last": (optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), MASK)), {"a"}),
    "masked behind a state": (
        optax.chain(optax.adam(0.1), optax.masked(optax.set_to_zero(), MASK)), set()
    ),
    "behind a norm of all gradients": (
        optax.chain(
            optax.clip_by_global_norm(1.0), optax.masked(optax.set_to_zero(), MASK)
        ), set(),
    ),
    "masked training alone": (optax.masked(optax.sgd(0.1), MASK), set()),
    "everything": (optax.set_to_zero(), {"a", "b"}),
    "nothing": (optax.adam(1e-3), set()),
    "needs a value": (optax.contrib.reduce_on_plateau(), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_leaves_that_an_optimizer_leaves_alone(name):
    optimizer, expected = OPTIMIZERS[name]
    tree = _tree({"a": jnp.ones((3, 2)), "b": jnp.ones(2)})
    found = unmoved(optimizer, tree)
    assert {tree.paths[i] for i in found} == expected
