"""`fc.apply` in place of `apply_fn`: JAX's transformations and the usual training loops."""

from __future__ import annotations

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from training import backprop, floating, objective, relative_deviation

import fcjax
from fcjax.planning.plan import always_fold

SMALL = ["segments_between_activations", "layer_norm_then_chain", "batch_norm_branches", "cond"]


@pytest.fixture(params=SMALL)
def network(request):
    return zoo.build(request.param)


@pytest.fixture
def chain():
    return zoo.build("linear_depth_4_biases")


def folded(network, **options):
    """The network's front contribution, collapsed wherever it can be."""
    return fcjax.front_contribute(
        network.apply_fn, network.params, *network.example_args, **options
    )


def both_losses(network, fc):
    """The loss of one batch as a function of parameters alone: backprop's and the folded one's."""
    args, target = network.batch(np.random.default_rng(7))
    return [
        lambda params, apply=apply: objective(network, apply)(params, args, target)
        for apply in (backprop(network)[0], fc.apply)
    ]


def direction(params):
    """A fixed pytree of unit-size entries, shaped as the parameters."""
    rng = np.random.default_rng(11)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), params)


# --- transformations --------------------


TRANSFORMED = {
    "grad": jax.grad,
    "value_and_grad": jax.value_and_grad,
    "jvp": lambda f: lambda p: jax.jvp(f, (p,), (direction(p),)),
    "linearize": lambda f: lambda p: jax.linearize(f, p)[1](direction(p)),
    "grad of checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    "hessian-vector product": lambda f: lambda p: jax.jvp(jax.grad(f), (p,), (direction(p),))[1],
    "grad of gradient norm": lambda f: jax.grad(
        lambda p: optax.tree.norm(jax.grad(f)(p), squared=True)
    ),
}


@pytest.mark.parametrize("transformation", TRANSFORMED)
def test_transformations_agree_with_backprop(network, transformation):
    with always_fold():
        fc = folded(network)
        expected, actual = (
            jax.jit(TRANSFORMED[transformation](loss))(fc.params)
            for loss in both_losses(network, fc)
        )
    assert relative_deviation(actual, expected, floor=1e-3) <= 1e-10


def test_hessian():
    network = zoo.build("identity_branch")
    with always_fold():
        fc = folded(network)
        expected, actual = (
            jax.jit(jax.hessian(loss))(fc.params) for loss in both_losses(network, fc)
        )
    assert relative_deviation(actual, expected, floor=1e-3) <= 1e-10


def test_forward_mode_jacobian_with_respect_to_the_data(network):
    *extra, x = network.example_args
    with always_fold():
        fc = folded(network)
        expected, actual = (
            jax.jit(jax.jacfwd(lambda x, apply=apply: apply(fc.params, *extra, x)))(x)
            for apply in (backprop(network)[0], fc.apply)
        )
    assert relative_deviation(actual, expected, floor=1e-3) <= 1e-10


def test_vmap_over_params_and_their_gradients(network):
    stacked = jax.tree.map(
        lambda leaf: jnp.stack([leaf, 0.9 * leaf, 1.1 * leaf]), floating(network.params)
    )
    with always_fold():
        fc = folded(network)
        expected, actual = (
            jax.jit(jax.vmap(jax.value_and_grad(loss)))(stacked)
            for loss in both_losses(network, fc)
        )
    assert relative_deviation(actual, expected, floor=1e-3) <= 1e-10


def test_vmap_over_the_data(chain):
    x = np.random.default_rng(0).standard_normal((5, 64, 6))
    fc = folded(chain)
    expected = jax.vmap(chain.apply_fn, (None, 0))(chain.params, x)
    np.testing.assert_allclose(jax.vmap(fc.apply, (None, 0))(fc.params, x), expected, rtol=1e-11)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 1000])
def test_any_batch_size(chain, tokens):
    x = np.random.default_rng(0).standard_normal((tokens, 6))
    fc = folded(chain)
    expected, actual = (
        jax.value_and_grad(lambda p, apply=apply: jnp.sum(jnp.sin(apply(p, x))))(fc.params)
        for apply in (chain.apply_fn, fc.apply)
    )
    assert relative_deviation(actual, expected) <= 1e-11


def test_other_batch_ranks(chain):
    x = np.random.default_rng(0).standard_normal((2, 3, 64, 6))
    fc = folded(chain)
    np.testing.assert_allclose(
        fc.apply(fc.params, x), chain.apply_fn(chain.params, x), rtol=1e-11, atol=1e-13
    )


# --- training loops --------------------


def steps_in_a_scan(loss, params, optimizer, batches):
    """Parameters after training on the stacked batches inside one jitted scan."""

    def step(carry, batch):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, *batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimizer.init(params))
    return jax.jit(lambda start, batches: jax.lax.scan(step, start, batches)[0][0])(start, batches)


def stacked(network, steps):
    """A few batches stacked along a new first axis."""
    rngs = [np.random.default_rng(step) for step in range(steps)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(network.batch(rng) for rng in rngs))


def unstacked(network, steps):
    """A few batches."""
    return [network.batch(np.random.default_rng(step)) for step in range(steps)]


@pytest.fixture
def trained_chain(chain):
    """Parameters of the chain after 20 steps of momentum with plain backprop."""
    loss = objective(chain, chain.apply_fn)
    return steps_in_a_scan(loss, chain.params, momentum(), stacked(chain, 20))


def momentum():
    """The optimizer of this file's training loops."""
    return optax.sgd(1e-2, momentum=0.9)


def test_scan_over_steps(chain, trained_chain):
    fc = folded(chain)
    actual = steps_in_a_scan(objective(chain, fc.apply), fc.params, momentum(), stacked(chain, 20))
    assert relative_deviation(actual, trained_chain) <= 1e-11


def test_donated_buffers(chain, trained_chain):
    fc = folded(chain)
    loss, optimizer = objective(chain, fc.apply), momentum()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        updates, state = optimizer.update(jax.grad(loss)(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, fc.params)
    state = optimizer.init(params)
    for batch in unstacked(chain, 20):
        donated = params
        params, state = step(params, state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    assert relative_deviation(params, trained_chain) <= 1e-11


def test_train_state(chain, trained_chain):
    fc = folded(chain)
    state = TrainState.create(apply_fn=fc.apply, params=fc.params, tx=momentum())

    @jax.jit
    def step(state, args, target):
        gradients = jax.grad(objective(chain, state.apply_fn))(state.params, args, target)
        return state.apply_gradients(grads=gradients)

    for args, target in unstacked(chain, 20):
        state = step(state, args, target)
    assert relative_deviation(state.params, trained_chain) <= 1e-11


def test_nnx_optimizer():
    network = zoo.build("nnx_chain")
    fc = folded(network)
    loss = objective(network, fc.apply)
    model = nnx.merge(nnx.graphdef(zoo.NnxChain(nnx.Rngs(0))), fc.params)
    optimizer = nnx.Optimizer(model, momentum(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        optimizer.update(model, jax.grad(loss)(nnx.state(model, nnx.Param), *batch))

    for batch in unstacked(network, 20):
        step(model, optimizer, batch)
    expected = steps_in_a_scan(
        objective(network, network.apply_fn), network.params, momentum(), stacked(network, 20)
    )
    assert relative_deviation(nnx.state(model, nnx.Param), expected) <= 1e-11


def test_multi_transform(chain):
    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "kernels" if "kernel" in str(path[-1]) else "biases", params
        )

    optimizer = optax.multi_transform(
        {"kernels": optax.adamw(1e-3), "biases": optax.sgd(1e-2)}, labels
    )
    fc = folded(chain)
    expected, actual = (
        steps_in_a_scan(objective(chain, apply), fc.params, optimizer, stacked(chain, 20))
        for apply in (chain.apply_fn, fc.apply)
    )
    assert relative_deviation(actual, expected) <= 1e-11


def test_frozen_leaves_by_multi_transform_stay(chain):
    fc = folded(chain)
    optimizer = optax.multi_transform(
        {"train": momentum(), "freeze": optax.set_to_zero()},
        lambda params: {name: "freeze" if name == "layers_0" else "train" for name in params},
    )
    trained = steps_in_a_scan(objective(chain, fc.apply), fc.params, optimizer, stacked(chain, 5))
    assert relative_deviation(trained["layers_0"], fc.params["layers_0"]) == 0
    assert relative_deviation(trained["layers_1"], fc.params["layers_1"]) > 1e-6


def test_bfloat16_compute_with_float32_params_stays_as_close_as_backprop_does(chain, trained_chain):
    def apply_fn(params, x):
        return chain.apply_fn(zoo.cast(params, jnp.bfloat16), x.astype(jnp.bfloat16))

    params = zoo.cast(chain.params, jnp.float32)
    batches = zoo.cast(stacked(chain, 20), jnp.float32)
    fc = fcjax.front_contribute(apply_fn, params, batches[0][0][0])
    of_backprop, of_fc = (
        steps_in_a_scan(objective(chain, apply), params, momentum(), batches)
        for apply in (apply_fn, fc.apply)
    )
    own_error = relative_deviation(of_backprop, trained_chain, floor=0.1)
    assert {leaf.dtype for leaf in jax.tree.leaves(of_fc)} == {jnp.dtype(jnp.float32)}
    assert relative_deviation(of_fc, trained_chain, floor=0.1) <= max(3e-2, 2 * own_error)


# --- devices --------------------


WIDTHS = (784, 1024, 1024, 1024, 1024, 10)
BATCH = 1024
ITEM_BYTES = {"f32": 4, "f64": 8, "bf16": 2}


def wide_chain():
    """784-1024x4-10 in float32."""
    shapes = itertools.pairwise(WIDTHS)
    params = [kernel.astype(jnp.float32) for kernel in zoo.weights(*shapes)]
    return lambda params, x: functools.reduce(jnp.matmul, params, x), params


def all_reduced_bytes(compiled):
    """Bytes that the all-reduces of a compiled program produce, from its text."""
    shapes = re.findall(r"= (.*?) all-reduce(?:-start)?\(", compiled.as_text())
    arrays = [array for shape in shapes for array in re.findall(r"(\w+)\[([\d,]*)\]", shape)]
    return sum(
        ITEM_BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in arrays
    )


def compiled_gradient(apply, params, mesh):
    """The compiled gradient of a squared output, parameters replicated and the batch sharded."""
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    params = jax.device_put(params, replicated)
    x = jax.device_put(np.ones((BATCH, WIDTHS[0]), np.float32), sharded)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda params, x: jnp.mean(apply(params, x) ** 2)))
        return gradient.lower(params, x).compile()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_batch_all_reduces_100_times_less(kind):
    apply_fn, params = wide_chain()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    fc = fcjax.front_contribute(
        apply_fn, params, jax.ShapeDtypeStruct((BATCH, WIDTHS[0]), jnp.float32)
    )
    of_backprop, of_fc = (
        all_reduced_bytes(compiled_gradient(apply, params, mesh)) for apply in (apply_fn, fc.apply)
    )
    assert of_backprop >= 4 * sum(kernel.size for kernel in params)
    assert 0 < of_fc <= of_backprop / 100


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_training_agrees_with_one_device(chain, trained_chain, kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    fc = folded(chain)
    params = jax.device_put(fc.params, NamedSharding(mesh, P()))
    batches = jax.device_put(stacked(chain, 20), NamedSharding(mesh, P(None, "data")))
    with jax.set_mesh(mesh):
        actual = steps_in_a_scan(objective(chain, fc.apply), params, momentum(), batches)
    assert relative_deviation(actual, trained_chain) <= 1e-11


# --- compilation --------------------


def test_new_values_neither_retrace_nor_recompile(chain):
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return chain.apply_fn(params, x)

    (x,) = chain.example_args
    fc = fcjax.front_contribute(counted, chain.params, x)
    gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(fc.apply(params, x) ** 2)))
    gradient(fc.params, x)
    fc.apply(fc.params, x)
    before = len(traces)
    for scale in (0.5, 2.0, 3.0):
        changed = jax.tree.map(lambda leaf, scale=scale: scale * leaf, fc.params)
        gradient(changed, scale * x)
        fc.apply(changed, scale * x)
    assert len(traces) == before
    assert gradient._cache_size() == 1


def closes_over_a_table():
    """A chain after a multiplication with a large constant."""
    table = np.random.default_rng(0).standard_normal((6, 4096)) / 64
    params = [kernel / 8 for kernel in zoo.weights((4096, 16), (16, 3))]
    table = jnp.asarray(table)
    return lambda params, x: x @ table @ params[0] @ params[1], params, table


def test_closed_over_constants_are_not_baked_in():
    apply_fn, params, table = closes_over_a_table()
    x = jnp.ones((64, 6))
    fc = fcjax.front_contribute(apply_fn, params, x)
    held = [leaf.shape for leaf in jax.tree.leaves(fc.contributions)]
    lowered = jax.jit(fc.apply_with).lower(fc.params, fc.contributions, x)
    assert table.shape in held
    assert largest_literal(lowered.as_text()) < 100
    assert largest_literal(jax.jit(lambda p: apply_fn(p, x)).lower(params).as_text()) == table.size


def largest_literal(text):
    """Entries of the largest array constant in a lowered program."""
    shapes = re.findall(r"stablehlo\.constant dense<.*> : tensor<([\dx]*)x\w+>", text)
    return max((math.prod(map(int, shape.split("x"))) for shape in shapes), default=0)


def test_apply_with_uses_the_contributions_it_is_given():
    apply_fn, params, _ = closes_over_a_table()
    x = jnp.ones((64, 6))
    fc = fcjax.front_contribute(apply_fn, params, x)
    expected = apply_fn(params, x)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, fc.contributions)
    np.testing.assert_allclose(fc.apply_with(fc.params, fc.contributions, x), expected, rtol=1e-11)
    np.testing.assert_allclose(fc.apply_with(fc.params, doubled, x), 2 * expected, rtol=1e-11)


@pytest.mark.parametrize("name", ["relu_mlp", "gated_linear_unit", "linear_depth_1", "equinox_mlp"])
def test_nothing_to_fold_calls_apply_fn_itself(name):
    network = zoo.build(name)
    fc = folded(network)
    as_written, as_folded = (
        jax.make_jaxpr(apply)(network.params, *network.example_args)
        for apply in (network.apply_fn, fc.apply)
    )
    assert str(as_folded) == str(as_written)


# --- expand and reduce --------------------


def described(tree):
    """Structure, shapes and dtypes of a pytree."""
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("compile_", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", zoo.names())
def test_expand_and_reduce_round_trip(name, compile_):
    network = zoo.build(name)
    fc = folded(network)
    full = compile_(fc.expand)(fc.params)
    reduced = compile_(fc.reduce)(full)
    assert described(full) == described(network.params)
    assert described(reduced) == described(fc.params) == described(floating(network.params))
    assert all(map(np.array_equal, jax.tree.leaves(full), jax.tree.leaves(network.params)))
    assert all(map(np.array_equal, jax.tree.leaves(reduced), jax.tree.leaves(fc.params)))
