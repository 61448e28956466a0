"""Front contribution against backpropagation of untouched convolutional networks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo_conv
from training import backprop, objective, outputs_of_all, relative_deviation, stacked_batches, train

import fcjax
from fcjax.planning.plan import always_fold

STEPS = 200

each_network = pytest.mark.parametrize("name", zoo_conv.names())


def value_and_gradients(network, apply, params, args, target):
    """Outputs and gradients by parameters and by the last input, of one batch."""

    def loss(params, x):
        return network.loss(apply(params, *args[:-1], x), target)

    return apply(params, *args), jax.grad(loss, (0, 1))(params, args[-1])


@pytest.mark.long
@each_network
def test_200_steps_of_every_optimizer_follow_backprop(name):
    network = zoo_conv.build(name)
    args, target = network.batch(np.random.default_rng(7))
    batches = stacked_batches(network, STEPS)
    apply, params = backprop(network)
    losses, trained = train(objective(network, apply), params, batches)
    with always_fold():
        fc = fcjax.front_contribute(network.apply_fn, network.params, *args)
        fc_losses, fc_trained = train(objective(network, fc.apply), fc.params, batches)
        outputs = outputs_of_all(fc.apply, fc_trained, args)
        one = jax.jit(functools.partial(value_and_gradients, network, fc.apply))(
            fc.params, args, target
        )
    expected = jax.jit(functools.partial(value_and_gradients, network, apply))(params, args, target)
    assert relative_deviation(one, expected, floor=1e-3) <= 1e-11
    assert relative_deviation(fc_losses, losses) <= 1e-9
    assert relative_deviation(outputs, outputs_of_all(apply, trained, args)) <= 1e-9


@each_network
def test_planner_gives_the_golden_answer_at_a_useful_size(name):
    network = zoo_conv.build(name, zoo_conv.USEFUL_CHANNELS)
    x = network.example_args[-1]
    shape = (zoo_conv.USEFUL_IMAGES, *[zoo_conv.USEFUL_SIZE] * 2, x.shape[-1])
    params, *rest = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float32), (network.params, *network.example_args[:-1])
    )
    useful = jax.ShapeDtypeStruct(shape, jnp.float32)
    fc = fcjax.front_contribute(network.apply_fn, params, *rest, useful)
    wanted = zoo_conv.collapsed(name)
    rules = {row.path.removesuffix("/value"): row.rule for row in fc.report}
    expected = {path for path in rules if wanted == ("all",) or path.endswith(wanted)}
    assert {path for path, rule in rules.items() if rule == "collapse"} == expected, str(fc)
