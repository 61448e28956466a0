"""Both rules on one network, loops with a basis for each layer, and what the report says of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import zoo

import fcjax
from fcjax.rules.equivariance import experiment
from fcjax.rules.stand_ins import Shrinks


def apply_both(params, x):
    """An elementwise chain in front of a linear segment."""
    x = jnp.tanh(x * params["u"] * params["v"])
    return x @ params["first"] @ params["second"]


def params_of_both():
    """Parameters of `apply_both`, the chain with equal magnitudes."""
    first, second, gains = zoo.weights((4, 32), (32, 3), (1, 4))
    return {"u": -gains[0], "v": gains[0], "first": first, "second": second}


def rules(optimizer):
    """The rule of each leaf of `apply_both`, by path."""
    x = jnp.ones((16, 4))
    fc = fcjax.front_contribute(apply_both, params_of_both(), x, optimizer=optimizer)
    reasons = " ".join(row.reason for row in fc.report)
    return {row.path: row.rule for row in fc.report}, str(fc) + reasons


def test_fold_and_compress_together():
    found, text = rules(optax.sgd(0.1, momentum=0.9))
    assert found == {"u": "fold", "v": "train", "first": "compress", "second": "compress"}
    assert "53 weights trained, 232 before" in text
    assert "optimizer moves full and reduced weights alike" in text


def test_an_optimizer_that_couples_leaves_compresses_and_does_not_fold():
    found, text = rules(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)))
    assert (found["u"], found["first"]) == ("train", "compress")
    assert "could follow v, but with this optimizer" in text


def test_an_elementwise_optimizer_folds_and_does_not_compress():
    found, text = rules(optax.adam(0.1))
    assert (found["u"], found["second"]) == ("fold", "collapse")
    assert "could be trained in fewer coordinates, but with this optimizer" in text


def test_layers_of_a_loop_have_subspaces_of_their_own():
    """An optimizer that mixes the layers respects one basis for all, but not one for each."""

    def update(gradients, state, params=None):
        del params

        def mixed(leaf):
            rows = leaf.reshape(-1, leaf.shape[-1])
            return -0.1 * (rows @ (rows.T @ rows)).reshape(leaf.shape)

        return jax.tree.map(mixed, gradients), state

    mixing = optax.GradientTransformation(lambda params: (), update)
    structure = jax.tree.structure(0)

    def verdict(depth):
        change = Shrinks((4, 12, 32), (False, False, True), rest=False, depth=depth)
        return experiment(mixing, structure, [change], rho=False)

    assert verdict(0).exact
    assert not verdict(1).exact


def test_the_rules_follow_backprop_together():
    optimizer = optax.sgd(0.05, momentum=0.9)
    x, y = zoo.weights((64, 4), (64, 3))
    fc = fcjax.front_contribute(apply_both, params_of_both(), x, optimizer=optimizer)

    def trained(apply, params):
        @jax.jit
        def step(carry, _):
            params, state = carry
            gradient = jax.grad(lambda p: jnp.mean((apply(p, x) - y) ** 2))(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=500)[0][0]

    full = trained(apply_both, params_of_both())
    restored = fc.expand(trained(fc.apply, fc.params))
    for name in full:
        np.testing.assert_allclose(restored[name], full[name], rtol=1e-9, atol=1e-10)
