"""Front contribution against backpropagation of untouched convolutional networks and blocks."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import zoo_blocks
import zoo_conv
from training import backprop, objective, outputs_of_all, relative_deviation, stacked_batches, train
from zoo import is_inexact

import fcjax
from fcjax.planning.plan import always_fold

STEPS = 200

each_network = pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, id=name)
        for family in (zoo_conv, zoo_blocks)
        for name in family.names()
    ],
)


def folded(network):
    """The front contribution of all that can be folded, priced or not, and a held-out batch."""
    args, target = network.batch(np.random.default_rng(7))
    return fcjax.front_contribute(network.apply_fn, network.params, *args), args, target


def value_and_gradients(network, apply, params, args, target):
    """Outputs and gradients by parameters and, unless it is integer, by the last input."""

    def loss(params, x):
        return network.loss(apply(params, *args[:-1], x), target)

    by = (0, 1) if is_inexact(args[-1]) else 0
    return apply(params, *args), jax.grad(loss, by)(params, args[-1])


@pytest.mark.long
@each_network
def test_200_steps_of_every_optimizer_follow_backprop(family, name):
    """A key's bias has no gradient but rounding, so outputs are compared and not parameters."""
    network = family.build(name)
    batches = stacked_batches(network, STEPS)
    apply, params = backprop(network)
    losses, trained = train(objective(network, apply), params, batches)
    with always_fold():
        fc, args, _ = folded(network)
        fc_losses, fc_trained = train(objective(network, fc.apply), fc.params, batches)
        outputs = outputs_of_all(fc.apply, fc_trained, args)
    assert relative_deviation(fc_losses, losses) <= 1e-9
    assert relative_deviation(outputs, outputs_of_all(apply, trained, args)) <= 1e-9


@each_network
def test_value_and_gradients_are_those_of_backprop(family, name):
    network = family.build(name)
    apply, params = backprop(network)
    with always_fold():
        fc, *batch = folded(network)
        step = functools.partial(value_and_gradients, network, fc.apply, fc.params)
        found = {"jitted": jax.jit(step)(*batch), "plain": step(*batch)}
    step = functools.partial(value_and_gradients, network, apply, params)
    expected = jax.jit(step)(*batch)
    for how, actual in found.items():
        assert relative_deviation(actual, expected, floor=1e-3) <= 1e-11, how
