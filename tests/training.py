"""Train networks by one plain loop, whichever function applies them, and compare what comes out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from zoo import is_inexact

# Those that act on each entry alone act on all leaves as one vector, which compiles twice as fast.
OPTIMIZERS = {
    "sgd": optax.flatten(optax.sgd(1e-2)),
    "momentum": optax.flatten(optax.sgd(2e-3, momentum=0.9)),
    "adam": optax.flatten(optax.adam(1e-3)),
    "adamw": optax.flatten(optax.adamw(1e-3, weight_decay=1e-2)),
    "lion": optax.flatten(optax.lion(2e-4)),
    "muon": optax.contrib.muon(2e-3),
}


ALL = tuple(OPTIMIZERS.values())


def floating(params):
    """The trainable part of a pytree: None where a leaf is not floating."""
    return jax.tree.map(lambda leaf: leaf if is_inexact(leaf) else None, params)


def backprop(network):
    """The untouched network as a function of its floating parameters, and those parameters."""

    def apply(trained, *args):
        leaves = jax.tree.structure(network.params).flatten_up_to(trained)
        fixed, treedef = jax.tree.flatten(network.params)
        merged = [old if new is None else new for old, new in zip(fixed, leaves, strict=True)]
        return network.apply_fn(jax.tree.unflatten(treedef, merged), *args)

    return apply, floating(network.params)


def objective(network, apply):
    """`objective(params, args, target)`: the network's loss through `apply`."""
    return lambda params, args, target: network.loss(apply(params, *args), target)


def stacked_batches(network, steps):
    """Mini-batches of `steps` training steps, stacked along a new first axis."""
    batches = [network.batch(np.random.default_rng(1000 + step)) for step in range(steps)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def train(loss_fn, params, batches, optimizers=ALL):
    """Train once with each optimizer, in one compiled program.

    The gradient is compiled once: `lax.map` applies it, unbatched, to one optimizer's parameters
    after another.

    Returns:
        Losses of shape (steps, optimizers), and the final parameters, stacked in order of
        `optimizers`.
    """

    def step(carry, batch):
        stacked, states = carry
        losses, gradients = jax.lax.map(lambda p: jax.value_and_grad(loss_fn)(p, *batch), stacked)
        moved = [
            updated(optimizer, entry(gradients, i), states[i], entry(stacked, i))
            for i, optimizer in enumerate(optimizers)
        ]
        new_params, new_states = zip(*moved, strict=True)
        return (_stack(new_params), new_states), losses

    @jax.jit
    def run(params, batches):
        states = tuple(optimizer.init(params) for optimizer in optimizers)
        (stacked, _), losses = jax.lax.scan(
            step, (_stack([params] * len(optimizers)), states), batches
        )
        return losses, stacked

    return run(params, batches)


def updated(optimizer, gradients, state, params):
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def entry(tree, index):
    """One entry along the first axis of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def outputs_of_all(apply, stacked, args):
    """Outputs of every optimizer's parameters, stacked in order of `OPTIMIZERS`."""
    return jax.jit(lambda stacked: jax.lax.map(lambda params: apply(params, *args), stacked))(
        stacked
    )


def relative_deviation(actual, expected, floor=0.0):
    """Largest deviation over a pytree, relative to each leaf's largest entry.

    `floor` is the share of the largest entry of all leaves below which no leaf's own scale goes:
    gradients that are zero but for rounding have no scale of their own.
    """
    pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    top = max(_largest(expected) for _, expected in pairs)
    return max(
        _deviation(a, b) / max(_largest(b), floor * top, np.finfo(np.float64).tiny)
        for a, b in pairs
    )


def _largest(leaf):
    return float(np.max(np.abs(_wide(leaf)), initial=0.0))


def _deviation(actual, expected):
    return _largest(_wide(actual) - _wide(expected))


def _wide(leaf):
    return np.asarray(leaf, np.float64)
