"""Conservation laws: as many as there are, exactly conserved, and the discrete identity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import law_networks
import numpy as np
import pytest

import fcjax

ETA, DECAY, STEPS = 1e-2, 0.1, 4


def descend(laws, loss, params, learning_rate, decay):
    """Per step of SGD: the drift, the predicted drift, and the drift of half the step."""

    def moved(p, g, eta):
        return jax.tree.map(lambda w, g: w - eta * (g + decay * w), p, g)

    def step(p, _):
        g = jax.grad(loss)(p)
        after = moved(p, g, learning_rate)
        found = {
            "drift": laws.drift(p, after),
            "predicted": laws.predicted_drift(p, g, learning_rate, decay),
            "half": laws.drift(p, moved(p, g, learning_rate / 2)),
            "flow": jax.jvp(laws.values, (p,), (g,))[1],
            "size": jnp.max(jnp.abs(laws.values(p))),
        }
        return after, found

    return jax.jit(lambda p: jax.lax.scan(step, p, length=STEPS)[1])(params)


@pytest.mark.parametrize("seed", range(40))
def test_laws_of_random_networks(seed):
    """The count by hand, conservation under the flow, and the identity of the discrete step."""
    apply_fn, params, args, count = law_networks.build(seed)
    laws = fcjax.conservation_laws(apply_fn, params, *args)
    assert len(laws) == len(laws.names) == len(set(laws.names)) == count
    loss = law_networks.scalar_loss(apply_fn, args)
    run = jax.device_get(descend(laws, loss, params, ETA, decay=0.0))
    scale = run["size"].max()
    # Moving along the gradient itself changes no law, and does change single weights.
    assert np.abs(run["flow"]).max() < 1e-11 * scale
    assert np.abs(run["drift"] - run["predicted"]).max() < 1e-12 * scale
    # Of second order in the learning rate: half of it leaves a quarter.
    assert np.abs(run["drift"]).max() > 1e-9
    np.testing.assert_allclose(run["half"], run["drift"] / 4, atol=1e-12 * scale)
