"""Front contribution against backpropagation of the untouched network, over the zoo."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
import zoo_time  # noqa: F401 (adds to the zoo)
from training import (
    OPTIMIZERS,
    backprop,
    entry,
    floating,
    objective,
    outputs_of_all,
    relative_deviation,
    stacked_batches,
    train,
)

import fcjax
from fcjax.planning.plan import always_fold

STEPS = 300
PLANNERS = {"priced": contextlib.nullcontext, "always": always_fold}

each_network = pytest.mark.parametrize("name", zoo.names())


def folded(network, **options):
    """The network's front contribution."""
    return fcjax.front_contribute(
        network.apply_fn, network.params, *network.example_args, **options
    )


def held_out(network):
    """A batch that no training step uses."""
    return network.batch(np.random.default_rng(7))


def deviations(actual, expected):
    """Relative deviation of each optimizer's entry along the first axis of every leaf."""
    return {
        name: relative_deviation(entry(actual, i), entry(expected, i))
        for i, name in enumerate(OPTIMIZERS)
    }


def above(limit, measured):
    """The measurements that are not within the limit."""
    return {name: value for name, value in measured.items() if not value <= limit}


def value_and_gradients(network, apply, params, args, target):
    """Outputs, loss and gradients of one batch."""
    loss_fn = objective(network, apply)
    return apply(params, *args), *jax.value_and_grad(loss_fn)(params, args, target)


@functools.lru_cache(maxsize=1)
def one_step_of_backprop(name):
    """Outputs, loss and gradients of the untouched network in float64."""
    network = zoo.build(name)
    apply, params = backprop(network)
    return jax.jit(functools.partial(value_and_gradients, network, apply))(
        params, *held_out(network)
    )


def in_dtype(network, dtype):
    """The network with its parameters and data in another floating type."""
    batch = lambda rng: zoo.cast(network.batch(rng), dtype)  # noqa: E731
    return dataclasses.replace(network, params=zoo.cast(network.params, dtype), batch=batch)


def computing_in_bfloat16(network):
    """The network with float32 parameters and data, computing in bfloat16."""

    def apply_fn(params, *args):
        return network.apply_fn(zoo.cast(params, jnp.bfloat16), *zoo.cast(args, jnp.bfloat16))

    return dataclasses.replace(in_dtype(network, jnp.float32), apply_fn=apply_fn)


def planned_differently(name):
    """The planners whose front contributions are different expressions, with those."""
    network = zoo.build(name)
    found = {}
    for planner, context in PLANNERS.items():
        with context():
            found.setdefault(str(folded(network)), planner)
    return found.values()


@pytest.mark.long
@each_network
def test_300_steps_of_every_optimizer_follow_backprop(name):
    network = zoo.build(name)
    args, _ = held_out(network)
    batches = stacked_batches(network, STEPS)
    apply, params = backprop(network)
    losses, trained = train(objective(network, apply), params, batches)
    outputs = outputs_of_all(apply, trained, args)
    for planner in planned_differently(name):
        with PLANNERS[planner]():
            fc = folded(network)
            fc_losses, stacked = train(objective(network, fc.apply), fc.params, batches)
            fc_outputs = outputs_of_all(fc.apply, stacked, args)
        expanded = outputs_of_all(
            lambda p, *args, fc=fc: network.apply_fn(fc.expand(p), *args), stacked, args
        )
        assert above(1e-9, deviations(fc_losses.T, losses.T)) == {}, planner
        assert above(1e-9, deviations(fc_outputs, outputs)) == {}, planner
        assert above(1e-9, deviations(expanded, outputs)) == {}, planner


@each_network
def test_value_and_gradients_are_those_of_backprop(name):
    network = zoo.build(name)
    expected = one_step_of_backprop(name)
    for planner, outer in itertools.product(planned_differently(name), (jax.jit, lambda f: f)):
        with PLANNERS[planner]():
            fc = folded(network)
            step = outer(functools.partial(value_and_gradients, network, fc.apply))
            actual = step(fc.params, *held_out(network))
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for actual_part, expected_part in zip(actual, expected, strict=True):
            assert relative_deviation(actual_part, expected_part, floor=1e-3) <= 1e-11, planner


@each_network
def test_float32_gradients_are_within_1e_4_of_float64_backprop(name):
    outputs, _, gradients = one_step_of_backprop(name)
    network = in_dtype(zoo.build(name), jnp.float32)
    with always_fold():
        fc = folded(network)
        step = jax.jit(functools.partial(value_and_gradients, network, fc.apply))
        fc_outputs, _, fc_gradients = step(fc.params, *held_out(network))

    assert relative_deviation(fc_outputs, outputs) <= 1e-4
    assert relative_deviation(fc_gradients, gradients, floor=0.1) <= 1e-4


IN_BFLOAT16 = [
    "linear_depth_4_biases",
    "residual_linear",
    "parallel_branches",
    "dense_general",
    "tied_in_a_chain",
    "layer_norm_then_dense",
    "rms_norm_then_dense",
    "transformer_block",
    "nnx_chain",
    "equinox_chain",
]


# Folding the transformer at any price forms the argument of each gelu twice; in bfloat16 the two
# copies round apart. The planner does not do that, so only its choice is held to the tolerance.
IN_BFLOAT16_CASES = [
    (name, planner)
    for name in IN_BFLOAT16
    for planner in PLANNERS
    if (name, planner) != ("transformer_block", "always")
]


@pytest.mark.parametrize(("name", "planner"), IN_BFLOAT16_CASES)
def test_bfloat16_gradients_are_within_3e_2_or_twice_the_error_of_backprop(name, planner):
    _, _, gradients = one_step_of_backprop(name)
    network = computing_in_bfloat16(zoo.build(name))
    _, _, rounded = jax.jit(functools.partial(value_and_gradients, network, backprop(network)[0]))(
        floating(network.params), *held_out(network)
    )
    own_error = relative_deviation(rounded, gradients, floor=0.1)
    with PLANNERS[planner]():
        fc = folded(network)
        step = jax.jit(functools.partial(value_and_gradients, network, fc.apply))
        _, _, fc_gradients = step(fc.params, *held_out(network))

    assert {leaf.dtype for leaf in jax.tree.leaves(fc_gradients)} == {jnp.dtype(jnp.float32)}
    assert relative_deviation(fc_gradients, gradients, floor=0.1) <= max(3e-2, 2 * own_error)
