"""Starting from balanced values changes no function, whatever of it is folded then."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flow_networks import normal, normalised

import fcjax

relu = jax.nn.relu
SGD = optax.sgd(1e-2)

# Gains that two layers share: scaling them with one keeps them from being scaled with the other.
NETWORKS = {
    "behind a linear layer": lambda p, x: x @ p["a"] * p["g"] @ p["c"],
    "behind units": lambda p, x: relu(x @ p["a"]) * p["g"] @ p["c"],
    "behind units with a bias": lambda p, x: relu(x @ p["a"] + p["s"]) * p["g"] @ p["c"],
    "with a shift": lambda p, x: (relu(x @ p["a"]) * p["g"] + p["s"]) @ p["c"],
    "behind squares": lambda p, x: (x @ p["a"]) ** 2 * p["g"] @ p["c"],
    "between units": lambda p, x: relu(relu(x @ p["a"]) * p["g"] @ p["b"]) @ p["c"],
    "behind a layer that no unit ends": lambda p, x: (
        jnp.tanh(x @ p["a"]) @ p["b"] * p["g"] @ p["c"]
    ),
    "behind a chain of matrices": lambda p, x: relu(x @ p["a"]) @ p["b"] @ p["e"] * p["g"] @ p["c"],
    "behind a chain of vectors": lambda p, x: relu(x * p["u"] * p["v"] @ p["a"]) * p["g"] @ p["c"],
    "in front": lambda p, x: normalised(x) * p["u"] @ p["a"] * p["g"] @ p["c"],
    "two in turn": lambda p, x: relu(x @ p["a"]) * p["g"] @ p["b"] * p["s"] @ p["c"],
    "squares of a chain": lambda p, x: (x @ p["a"] @ p["b"]) ** 2 @ p["c"],
}


class Read(dict):
    """Parameters that are made when they are first read, for hidden layers of some width."""

    def __init__(self, width, seed):
        h, self.seed = width, seed
        self.shapes = {"a": (3, h), "b": (h, h), "c": (h, 2), "e": (h, h), "g": (h,), "s": (h,)}
        self.shapes |= {"u": (3,), "v": (3,)}

    def __missing__(self, name):
        self[name] = jnp.asarray(normal(*self.shapes[name], seed=self.seed, scale=0.6))
        return self[name]


def made(name, seed, width=4):
    """A network with its parameters and inputs."""
    params, x = Read(width, seed), jnp.asarray(normal(12, 3, seed=seed))
    NETWORKS[name](params, x)
    return NETWORKS[name], dict(params), x


@pytest.mark.parametrize("exactness", ["flow", "approximate"])
@pytest.mark.parametrize("name", NETWORKS)
def test_rebalance_keeps_the_function(name, exactness):
    for seed, width in itertools.product(range(3), (4, 1)):
        apply, params, x = made(name, seed, width)
        fc = fcjax.front_contribute(
            apply, params, x, optimizer=SGD, exactness=exactness, rebalance=True
        )
        wanted = apply(params, x)
        for found in (fc.apply(fc.params, x), apply(fc.expand(fc.params), x)):
            np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "squares of a chain"])
def test_rebalance_folds_a_gain(name):
    apply, params, x = made(name, 1)
    fc = fcjax.front_contribute(apply, params, x, optimizer=SGD, exactness="flow", rebalance=True)
    (row,) = [row for row in fc.report if row.path == ("u" if name == "in front" else "g")]
    assert (row.rule, row.exactness) == ("fold", "flow")


def test_what_the_radial_closure_takes_is_left_as_it_is():
    apply, params, x = made("behind units", 0)
    fc = fcjax.front_contribute(
        apply, params, x, optimizer=SGD, exactness="approximate", rebalance=True
    )
    assert {row.rule for row in fc.report} == {"radial"}
    jax.tree.map(np.testing.assert_allclose, fc.expand(fc.params), params)


def test_what_follows_another_weight_is_not_compressed_too():
    """Balanced weights behind an outer product are equal but for signs, and few are reached."""
    params = {"u": normal(2), "v": normal(8), "w": normal(8, seed=1)}
    x = normal(2, 2)

    def apply(p, x):
        return x @ jnp.outer(p["u"], p["v"]) @ p["w"]

    fc = fcjax.front_contribute(apply, params, x, optimizer=SGD, exactness="flow", rebalance=True)
    full = fc.expand(fc.params)
    assert jax.tree.map(jnp.shape, full) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(apply(full, x), apply(params, x), atol=1e-12)
    np.testing.assert_allclose(fc.apply(fc.params, x), apply(params, x), atol=1e-12)
