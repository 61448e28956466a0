"""Networks that name mapped axes: statistics of the global batch, wherever they are computed."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from training import relative_deviation
from zoo import cast, weights

import fcjax
from fcjax import FrontContributionError
from fcjax.planning.plan import always_fold

DEVICES, ROWS, AXIS = 8, 4, "batch"
X = np.random.default_rng(0).standard_normal((DEVICES, ROWS, 5))
TARGET = np.sin(X @ np.random.default_rng(1).standard_normal((5, 3)))


class Normalised(nn.Module):
    """A wide dense pair, a batch normalisation over all devices, and a readout."""

    axis_name: str | None = AXIS

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(8, use_bias=False)(nn.Dense(32, use_bias=False)(x))
        norm = functools.partial(nn.BatchNorm, use_running_average=False, momentum=0.9)
        return nn.Dense(3)(nn.relu(norm(axis_name=self.axis_name)(h)))


def variables():
    """Parameters and running averages, off their initial values, in float64."""
    made = cast(Normalised(None).init(jax.random.key(0), X[0]), jnp.float64)
    noise = np.random.default_rng(2)
    made = jax.tree.map(lambda a: a + 0.1 * np.abs(noise.standard_normal(a.shape)), made)
    return made["params"], made["batch_stats"]


def apply_with(axis_name):
    def apply_fn(params, statistics, x):
        given = {"params": params, "batch_stats": statistics}
        y, new = Normalised(axis_name).apply(given, x, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return apply_fn


def loss(apply, params, statistics, x, target):
    """Loss of one device's rows, and the updated running averages."""
    y, new = apply(params, statistics, x)
    return jnp.mean((y - target) ** 2), new


def of_all_rows(apply, params, statistics):
    """Backpropagation of the same network on one device, without a named axis."""
    fn = jax.jit(jax.value_and_grad(functools.partial(loss, apply), has_aux=True))
    return fn(params, statistics, X.reshape(-1, 5), TARGET.reshape(-1, 3))


def in_vmap(apply, params, statistics):
    def total(p):
        one = lambda x, y: loss(apply, p, statistics, x, y)  # noqa: E731
        losses, new = jax.vmap(one, axis_name=AXIS)(X, TARGET)
        return losses.mean(), jax.tree.map(lambda a: a[3], new)

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)


def of_device(apply, params, statistics, x, target):
    """The gradient on one device, averaged over all."""
    fn = jax.value_and_grad(functools.partial(loss, apply), has_aux=True)
    (value, new), gradient = fn(params, statistics, x, target)
    return (jax.lax.pmean(value, AXIS), new), jax.lax.pmean(gradient, AXIS)


def in_pmap(apply, params, statistics):
    fn = jax.pmap(
        functools.partial(of_device, apply), AXIS, in_axes=(None, None, 0, 0), out_axes=None
    )
    return fn(params, statistics, X, TARGET)


def in_shard_map(apply, params, statistics):
    def device(p, statistics, x, target):
        def mean(p):
            value, new = loss(apply, p, statistics, x, target)
            return jax.lax.pmean(value, AXIS), new

        return jax.value_and_grad(mean, has_aux=True)(p)

    split, whole = PartitionSpec(AXIS), PartitionSpec()
    fn = jax.shard_map(device, mesh=mesh(), in_specs=(whole, whole, split, split), out_specs=whole)
    return jax.jit(fn)(params, statistics, X.reshape(-1, 5), TARGET.reshape(-1, 3))


def in_sharded_jit(apply, params, statistics):
    """No axis has a name here: the compiler takes the statistics over all devices."""
    rows = NamedSharding(mesh(), PartitionSpec(AXIS))
    data = jax.device_put((X.reshape(-1, 5), TARGET.reshape(-1, 3)), rows)
    fn = jax.jit(jax.value_and_grad(functools.partial(loss, apply), has_aux=True))
    return fn(params, statistics, *data)


def mesh():
    return jax.make_mesh((DEVICES,), (AXIS,), axis_types=(AxisType.Auto,))


MODES = {
    "vmap": in_vmap,
    "pmap": in_pmap,
    "shard_map": in_shard_map,
    "sharded jit": in_sharded_jit,
}


@pytest.mark.parametrize("mode", MODES)
def test_statistics_are_those_of_the_global_batch(mode):
    """Loss, updated running averages and gradients, from a folded network made outside."""
    params, statistics = variables()
    expected = of_all_rows(apply_with(None), params, statistics)
    apply_fn = apply_with(None if mode == "sharded jit" else AXIS)
    example = X[0] if mode != "sharded jit" else X.reshape(-1, 5)
    with always_fold():
        fc = fcjax.front_contribute(apply_fn, params, statistics, example)
        assert not fc.plan.is_trivial
        found = MODES[mode](fc.apply, fc.params, statistics)
    assert relative_deviation(found, expected) < 1e-11


def test_local_statistics_would_be_others():
    """What the test above could not see if the axis were ignored."""
    params, statistics = variables()
    expected = of_all_rows(apply_with(None), params, statistics)
    assert relative_deviation(in_vmap(apply_with(None), params, statistics), expected) > 1e-3


def test_training_in_a_mapped_axis_follows_backprop():
    """100 steps of Adam, running averages carried along."""
    params, statistics = variables()
    optimizer = optax.flatten(optax.adam(1e-2))

    @functools.partial(jax.jit, static_argnums=0)
    def train(apply, params):
        def step(carry, _):
            params, state, statistics = carry
            (value, statistics), gradient = in_vmap(apply, params, statistics)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state, statistics), value

        start = params, optimizer.init(params), statistics
        (trained, _, averages), losses = jax.lax.scan(step, start, length=100)
        return losses, averages, trained

    with always_fold():
        fc = fcjax.front_contribute(apply_with(AXIS), params, statistics, X[0])
        found = train(fc.apply, fc.params)
    expected = train(apply_with(AXIS), params)
    assert relative_deviation(found, expected) < 1e-9


# --- other collectives, other sizes, and no axis at all ---


def gathered(params, x):
    """Every device sees the rows of all, and divides by their number."""
    rows = jax.lax.all_gather(x @ params["a"], AXIS).reshape(-1, 4)
    return (x @ params["a"] - rows.sum(0) / jax.lax.axis_size(AXIS)) @ params["b"]


def test_one_network_in_axes_of_several_sizes():
    a, b = weights((5, 16), (16, 4))
    params = {"a": a @ b, "b": jnp.eye(4, 3)}
    with always_fold():
        fc = fcjax.front_contribute(gathered, params, X[0])
        for x in (X, X[:3], X[:, :2], X):
            found, expected = (
                jax.vmap(f, (None, 0), axis_name=AXIS)(params, x) for f in (fc.apply, gathered)
            )
            assert relative_deviation(found, expected) < 1e-12


def test_a_call_outside_the_axis_is_refused():
    fc = fcjax.front_contribute(apply_with(AXIS), *variables(), X[0])
    with pytest.raises(FrontContributionError, match="Call it where the axis 'batch' is mapped"):
        fc.apply(fc.params, variables()[1], X[0])


def test_the_printed_plan_is_that_of_several_devices():
    params, statistics = variables()
    outside = str(fcjax.front_contribute(apply_with(AXIS), params, statistics, X[0])).splitlines()
    note = "planned as if inside the mapped axis 'batch' of size 2; a call plans for its own axes"
    (line,) = [line for line in outside if line.startswith(note)]
    outside.remove(line)
    inside = []

    def made(x):
        inside.extend(
            str(fcjax.front_contribute(apply_with(AXIS), params, statistics, x)).split("\n")
        )
        return x

    jax.vmap(made, axis_name=AXIS)(X[:2])
    assert outside == inside


def test_what_cannot_be_traced_with_two_devices_is_with_one():
    def scattered(params, x):
        return jax.lax.psum_scatter(x @ params, AXIS, tiled=True)

    w, x = weights((5, 4))[0], np.ones((DEVICES, 3 * DEVICES, 5))
    fc = fcjax.front_contribute(scattered, w, x[0, :3])
    assert "'batch' of size 1" in str(fc)
    found, expected = (jax.vmap(f, (None, 0), axis_name=AXIS)(w, x) for f in (fc.apply, scattered))
    assert relative_deviation(found, expected) < 1e-12


def mapped_loss(apply, params, batch):
    """The loss of all devices, for `verify`."""
    _, statistics = variables()
    one = lambda x, target: loss(apply, params, statistics, x, target)[0]  # noqa: E731
    return jax.vmap(one, axis_name=AXIS)(*batch).mean()


@pytest.mark.parametrize("devices", [1, 2, DEVICES])
def test_verify_compares_the_plan_that_runs_inside_the_axis(devices):
    params, statistics = variables()
    batches = [(X[:devices], TARGET[:devices])] * 3
    with always_fold():
        fc = fcjax.front_contribute(apply_with(AXIS), params, statistics, X[0])
        made = set(fc._compiled)
        result = fcjax.verify(fc, mapped_loss, batches, optax.adam(1e-2))
        (key,) = set(fc._compiled) - made
    assert ((AXIS, devices),) in key[-1]
    assert result.max_output_deviation < 1e-9
    assert result.max_param_deviation < 1e-9


def test_verify_outside_the_axis_says_what_to_do():
    params, statistics = variables()
    fc = fcjax.front_contribute(apply_with(AXIS), params, statistics, X[0])

    def loss_fn(apply, params, batch):
        return loss(apply, params, statistics, *batch)[0]

    with pytest.raises(FrontContributionError, match="call apply inside of it in loss_fn"):
        fcjax.verify(fc, loss_fn, [(X[0], TARGET[0])], optax.sgd(0.1))


def test_what_needs_an_axis_of_a_certain_size_is_made_inside_it():
    def scattered(params, x):
        return jax.lax.psum_scatter(x @ params, AXIS)

    w, x = weights((5, 4))[0], np.tile(X[0], (1, 2, 1)).reshape(DEVICES, 5)
    with pytest.raises(FrontContributionError, match="could not be traced"):
        fcjax.front_contribute(scattered, w, x)

    def inside(x):
        return fcjax.front_contribute(scattered, w, x).apply(w, x)

    found = jax.vmap(inside, axis_name=AXIS)(np.stack([x] * DEVICES))
    assert relative_deviation(found, DEVICES * x @ w) < 1e-12


def test_looked_up_rows_in_mapped_axes():
    """Hoisting inside vmap and shard_map, with row numbers that differ between devices."""
    table, a = weights((6, 4), (4, 3))
    params = {"table": table, "a": a}
    ids = np.random.default_rng(0).integers(0, 6, (DEVICES, 10)).astype(np.int32)

    def apply_fn(p, ids):
        h = jax.nn.relu(p["table"][ids] @ p["a"])
        return h - jax.lax.pmean(h.mean(0), AXIS)

    def over_devices(apply):
        split, whole = PartitionSpec(AXIS), PartitionSpec()
        body = lambda p, i: apply(p, i[0])[None]  # noqa: E731
        return jax.shard_map(body, mesh=mesh(), in_specs=(whole, split), out_specs=split)

    def over_a_batch(apply):
        return jax.vmap(apply, (None, 0), axis_name=AXIS)

    with always_fold():
        fc = fcjax.front_contribute(apply_fn, params, ids[0])
        assert fc.plan.body.rows
        for mapped in (over_devices, over_a_batch):
            found, expected = (
                jax.jit(jax.value_and_grad(lambda p, f=f: jnp.sum(mapped(f)(p, ids) ** 2)))(params)  # noqa: B023
                for f in (fc.apply, apply_fn)
            )
            assert relative_deviation(found, expected) < 1e-12


def test_looked_up_rows_on_an_explicit_mesh_are_left_as_written():
    """Their types say where they lie, which a table's rows would have to say too."""
    table, a = weights((6, 4), (4, 3))
    params = {"table": table, "a": a}
    ids = np.random.default_rng(0).integers(0, 6, (DEVICES, 10)).astype(np.int32)
    explicit = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(AxisType.Explicit,))
    rows = PartitionSpec(AXIS)

    def apply_fn(p, ids):
        return jax.nn.relu(p["table"].at[ids].get(out_sharding=rows) @ p["a"])

    def gradient(f):
        return jax.jit(jax.grad(lambda p, ids: jnp.sum(f(p, ids) ** 2)))

    with jax.set_mesh(explicit), always_fold():
        placed = jax.device_put(ids, NamedSharding(explicit, rows))
        whole = jax.device_put(params, NamedSharding(explicit, PartitionSpec()))
        fc = fcjax.front_contribute(apply_fn, whole, placed)
        assert not fc.plan.body.rows
        found, expected = (gradient(f)(whole, placed) for f in (fc.apply, apply_fn))
    assert relative_deviation(found, expected) < 1e-12
