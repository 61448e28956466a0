"""Training fewer weights against backpropagation of the untouched network, for many optimizers."""

from __future__ import annotations

import functools
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import random_segments
import segments
from training import backprop, entry, objective, relative_deviation, stacked_batches, train, updated

import fcjax
from fcjax.errors import FrontContributionError

STEPS = 500
clip = optax.clip_by_global_norm
decay = optax.add_decayed_weights
# All but LARS treat all leaves as one vector, which compiles several times as fast.
OPTIMIZERS = {
    "sgd": optax.flatten(optax.sgd(1e-2)),
    "decay, momentum": optax.flatten(optax.chain(decay(1e-2), optax.sgd(2e-3, momentum=0.9))),
    "LARS": optax.lars(0.1, weight_decay=1e-2, trust_coefficient=0.05),
    "clip, nesterov, decay": optax.flatten(
        optax.chain(clip(1.0), optax.trace(0.9, nesterov=True), decay(1e-2), optax.scale(-2e-3))
    ),
    "decay, clip, sgd": optax.flatten(optax.chain(decay(1e-2), clip(0.1), optax.sgd(5e-2))),
    "momentum": optax.flatten(optax.sgd(2e-3, momentum=0.9)),
    "sgd, decay": optax.flatten(optax.chain(decay(1e-2), optax.scale(-1e-2))),
    "clip, sgd": optax.flatten(optax.chain(clip(0.1), optax.sgd(5e-2))),
    "nesterov": optax.flatten(optax.sgd(2e-3, momentum=0.9, nesterov=True)),
}
MOVES_THE_REST = {
    "decay, momentum", "LARS", "sgd, decay", "decay, clip, sgd", "clip, nesterov, decay"
}  # fmt: skip
NAMED = {
    "orthogonal_middles": tuple(OPTIMIZERS),
    "three_biased_segments": ("clip, nesterov, decay", "LARS"),
}


def chosen(name):
    """The optimizers that a network is trained with: two in turn, or one where leaves are many."""
    if name in NAMED:
        return NAMED[name]
    every = itertools.cycle(OPTIMIZERS)
    count = 1 if len(jax.tree.leaves(segments.build(name).params)) > 4 else 2
    start = 2 * segments.names().index(name)
    return tuple(itertools.islice(every, start, start + count))


def reduced(network, optimizer, **options):
    """The network's front contribution for an optimizer."""
    return fcjax.front_contribute(
        network.apply_fn,
        network.params,
        *network.example_args,
        optimizer=optimizer,
        data=network.data,
        **options,
    )


def by_shapes(fcs):
    """Groups of the named front contributions whose parameters have equal shapes."""
    groups = {}
    for name, fc in fcs.items():
        groups.setdefault(tuple(map(jnp.shape, jax.tree.leaves(fc.params))), []).append(name)
    return groups.values()


@pytest.mark.long
@pytest.mark.parametrize("name", segments.names())
def test_500_steps_follow_backprop_in_fewer_weights(name):
    network = segments.build(name)
    of = chosen(name)
    fcs = {o: reduced(network, OPTIMIZERS[o]) for o in of}
    sizes = {o: segments.size(fc.params) for o, fc in fcs.items()}
    everything = segments.size(network.params)
    counts = {o: network.rho if o in MOVES_THE_REST else network.count for o in of}
    assert sizes == {o: everything if n is None else n for o, n in counts.items()}
    if network.count is None:
        return

    apply, params = backprop(network)
    batches = stacked_batches(network, STEPS)
    args, _ = network.batch(np.random.default_rng(7))
    _, full = train(objective(network, apply), params, batches, [OPTIMIZERS[o] for o in of])
    for group in by_shapes(fcs):
        fc = fcs[group[0]]
        optimizers = [OPTIMIZERS[o] for o in group]
        _, small = train(objective(network, fc.apply), fc.params, batches, optimizers)
        for i, o in enumerate(group):
            expected, actual = entry(full, of.index(o)), entry(small, i)
            outputs = apply(expected, *args)
            assert np.all(np.isfinite(jax.tree.leaves(outputs)[0])), o
            assert relative_deviation(fc.apply(actual, *args), outputs) <= 1e-9, o
            # Couplings below the rounding of float32 are dropped, and only outputs forget them.
            limit = 1e-5 if name == "orthogonal_in_float32" else 1e-9
            assert relative_deviation(fc.expand(actual), expected, floor=1e-3) <= limit, o
            assert relative_deviation(full_outputs(network, fc, actual, args), outputs) <= 1e-9, o


def full_outputs(network, fc, params, args):
    """The outputs of the untouched network with the expanded parameters."""
    return network.apply_fn(fc.expand(params), *args)


# --- what comes back from fewer weights ---


@functools.cache
def middles():
    """The chain with orthogonal middles, with an optimizer that needs no rho and one that does."""
    network = segments.build("orthogonal_middles")
    return network, {o: reduced(network, OPTIMIZERS[o]) for o in ("momentum", "decay, momentum")}


@pytest.mark.parametrize("name", ["momentum", "decay, momentum"])
def test_expand_and_reduce_are_inverse(name):
    network, fcs = middles()
    fc = fcs[name]
    moved = jax.tree.map(
        lambda w: w + 0.1 * jnp.sin(jnp.arange(w.size).reshape(w.shape)), fc.params
    )
    if name == "decay, momentum":  # whose last coordinates only hold a norm
        old = jax.tree.leaves(fc.params)
        inner = [w.at[tuple(slice(-1) if n == 16 else slice(None) for n in w.shape)].set(
            m[tuple(slice(-1) if n == 16 else slice(None) for n in w.shape)])
            for w, m in zip(old, jax.tree.leaves(moved), strict=True)]  # fmt: skip
        moved = jax.tree.unflatten(jax.tree.structure(moved), inner)
    assert relative_deviation(fc.reduce(fc.expand(moved)), moved) <= 1e-12
    assert relative_deviation(fc.expand(fc.params), network.params) <= 1e-12
    assert relative_deviation(fc.expand(fc.reduce(network.params)), network.params) <= 1e-12


def test_the_state_of_the_optimizer_shrinks_with_the_weights():
    network, fcs = middles()
    state = OPTIMIZERS["momentum"].init(fcs["momentum"].params)
    assert segments.size(state) == segments.size(fcs["momentum"].params) == 675
    assert segments.size(OPTIMIZERS["momentum"].init(network.params)) == 34_688


def test_contributions_survive_a_file(tmp_path):
    network, fcs = middles()
    for fc in fcs.values():
        leaves, structure = jax.tree.flatten(fc.contributions)
        np.savez(tmp_path / "saved.npz", *leaves)
        with np.load(tmp_path / "saved.npz") as saved:
            restored = jax.tree.unflatten(structure, list(saved.values()))
        restored = pickle.loads(pickle.dumps(restored))
        args = network.example_args
        np.testing.assert_array_equal(
            fc.apply_with(fc.params, restored, *args), fc.apply(fc.params, *args)
        )


def test_transformations_of_jax_and_other_batch_sizes():
    network, fcs = middles()
    fc = fcs["decay, momentum"]
    (x,) = network.example_args
    expected = network.apply_fn(network.params, x)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
    near(jax.jit(fc.apply)(fc.params, x), expected)
    near(jax.vmap(lambda row: fc.apply(fc.params, row[None])[0])(x), expected)
    near(jax.lax.map(lambda row: fc.apply(fc.params, row[None])[0], x), expected)
    near(fc.apply(fc.params, x[:3]), expected[:3])
    ensemble = jax.tree.map(lambda w: jnp.stack([w, 0.5 * w]), fc.params)
    near(jax.vmap(fc.apply, (0, None))(ensemble, x)[0], expected)
    slopes = jax.grad(lambda p: jnp.sum(jnp.sin(fc.apply(p, x))))(fc.params)
    full = jax.grad(lambda p: jnp.sum(jnp.sin(network.apply_fn(p, x))))(network.params)
    # The gradient is orthogonal to what is left out, so it is reduced as weights without a rest.
    for g, w in zip(jax.tree.leaves(slopes), jax.tree.leaves(full), strict=True):
        near(np.linalg.norm(g), np.linalg.norm(w))


def test_reduced_weights_can_be_donated():
    network, fcs = middles()
    fc, optimizer = fcs["momentum"], OPTIMIZERS["momentum"]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry, x):
        params, state = carry
        gradients = jax.grad(lambda p: jnp.mean(fc.apply(p, x) ** 2))(params)
        return updated(optimizer, gradients, state, params)

    params = jax.tree.map(jnp.array, fc.params)
    carry = step((params, optimizer.init(params)), *network.example_args)
    carry = step(carry, *network.example_args)
    assert all(jax.tree.leaves(jax.tree.map(lambda w: w.is_deleted(), params)))
    assert np.isfinite(fc.apply(carry[0], *network.example_args)).all()
    assert segments.size(fc.params) == 675
    assert not any(w.is_deleted() for w in jax.tree.leaves(fc.params))


# --- optimizers that do not allow it ---

REFUSED = {
    "adam": optax.adam(1e-2),
    "lion": optax.lion(1e-3),
    "adafactor": optax.adafactor(1e-2),
    "muon": optax.contrib.muon(1e-2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_read_coordinates_train_all_weights_and_the_report_says_why(name):
    network = segments.build("zero_biases")
    fc = reduced(network, REFUSED[name])
    assert jax.tree.map(jnp.shape, fc.params) == jax.tree.map(jnp.shape, network.params)
    reasons = [row.reason for row in fc.report if row.path == "w"]
    assert any("with this optimizer" in reason for reason in reasons)
    assert "compress" not in {row.rule for row in fc.report}


def test_reducing_under_them_all_the_same_is_wrong():
    network = segments.build("zero_biases")
    fc = reduced(network, optax.sgd(1e-2))
    batches = stacked_batches(network, 100)
    args, _ = network.batch(np.random.default_rng(7))
    forced = list(REFUSED.values())
    _, full = train(objective(network, network.apply_fn), network.params, batches, forced)
    _, small = train(objective(network, fc.apply), fc.params, batches, forced)
    for i, name in enumerate(REFUSED):
        actual = fc.apply(entry(small, i), *args)
        assert relative_deviation(actual, network.apply_fn(entry(full, i), *args)) > 1e-3, name


# --- elementwise chains ---

ELEMENTWISE = {
    "sgd": optax.sgd(1e-2),
    "momentum": optax.sgd(2e-3, momentum=0.9),
    "adam": optax.adam(1e-3),
    "lion": optax.lion(2e-4),
    "sign": optax.chain(optax.scale_by_sign(), optax.scale(-2e-4)),
}


def signed(rng, size, count):
    """Vectors of equal magnitudes and random signs."""
    magnitudes = rng.uniform(0.5, 1.2, size)
    return [magnitudes * rng.choice([-1.0, 1.0], size) for _ in range(count)]


def diagonal(depth):
    """A network of ``depth`` diagonal layers."""
    params = signed(np.random.default_rng(depth), 5, depth)
    return lambda p, x: functools.reduce(jnp.multiply, p, x), params, depth - 1


def two_chains():
    u, v = signed(np.random.default_rng(0), 5, 2)
    s, t = signed(np.random.default_rng(1), 5, 2)
    apply_fn = lambda p, x: x * (p["u"] * p["v"] - p["s"] * p["t"])  # noqa: E731
    return apply_fn, {"u": u, "v": v, "s": s, "t": t}, 2


def with_relu():
    params = signed(np.random.default_rng(2), 5, 3)
    return lambda p, x: jax.nn.relu(jax.nn.relu(x * p[0]) * p[1]) * p[2], params, 2


def inside_a_network():
    u, v = signed(np.random.default_rng(3), 7, 2)
    a, b = segments.normal((5, 7), (7, 5))

    def apply_fn(p, x):
        return jnp.tanh(jax.nn.relu(jnp.sin(x @ p["a"]) * p["u"]) * p["v"] + p["c"]) @ p["b"]

    return apply_fn, {"a": a, "u": u, "v": v, "b": b, "c": np.full(7, 0.1)}, 1


CHAINS = {f"diagonal, depth {n}": functools.partial(diagonal, n) for n in range(2, 6)} | {
    "two chains": two_chains,
    "relu": with_relu,
    "inside a network": inside_a_network,
}


def elementwise(name):
    """One of the chains as a network."""
    apply_fn, params, folded = CHAINS[name]()
    batch = segments.rows(5, 5, segments.TOKENS)
    params = jax.tree.map(jnp.asarray, params)
    loss = segments.squared_error
    return segments.Segments(name, apply_fn, params, batch, loss, None), folded


@pytest.mark.parametrize("name", CHAINS)
def test_one_factor_of_an_elementwise_chain_trains_for_all(name):
    network, folded = elementwise(name)
    optimizers = list(ELEMENTWISE.values())
    fcs = [reduced(network, o) for o in optimizers]
    batches = stacked_batches(network, STEPS)
    args, _ = network.batch(np.random.default_rng(7))
    _, full = train(objective(network, network.apply_fn), network.params, batches, optimizers)
    fc = fcs[0]
    _, small = train(objective(network, fc.apply), fc.params, batches, optimizers)
    count = len(jax.tree.leaves(network.params))
    for i, o in enumerate(ELEMENTWISE):
        assert len(jax.tree.leaves(fcs[i].params)) == count - folded, o
        assert sum(row.rule == "fold" for row in fcs[i].report) == folded, o
        expected, actual = entry(full, i), entry(small, i)
        outputs = network.apply_fn(expected, *args)
        assert relative_deviation(fcs[i].apply(actual, *args), outputs) <= 1e-9, o
        assert relative_deviation(fcs[i].expand(actual), expected) <= 1e-9, o


def test_clipping_by_the_global_norm_counts_every_factor():
    network, _ = elementwise("diagonal, depth 3")
    optimizer = optax.chain(clip(0.1), optax.sgd(0.1))
    assert segments.size(reduced(network, optimizer).params) == segments.size(network.params)
    fc = reduced(network, optax.sgd(0.1))
    assert segments.size(fc.params) < segments.size(network.params)
    batches = stacked_batches(network, 100)
    args, _ = network.batch(np.random.default_rng(7))
    _, full = train(objective(network, network.apply_fn), network.params, batches, [optimizer])
    _, small = train(objective(network, fc.apply), fc.params, batches, [optimizer])
    outputs = network.apply_fn(entry(full, 0), *args)
    assert relative_deviation(fc.apply(entry(small, 0), *args), outputs) > 1e-4


# --- random networks and optimizers ---


@pytest.mark.parametrize("seed", range(16))
def test_random_networks_follow_backprop_under_random_optimizers(seed):
    apply_fn, params, batch = random_segments.network(seed)
    described, optimizer = random_segments.optimizer(seed)
    batches = [batch(np.random.default_rng(i)) for i in range(60)]
    try:
        fc = fcjax.front_contribute(apply_fn, params, *batches[0][0], optimizer=optimizer)
    except FrontContributionError:
        assert any(rank < usable for rank, usable in random_segments.ranks(params))
        return
    expected = steps(apply_fn, params, optimizer, batches)
    actual = steps(fc.apply, fc.params, optimizer, batches)
    args, _ = batch(np.random.default_rng(99))
    outputs = apply_fn(expected, *args)
    limit = 1e-7 if random_segments.made_in_float32(params) else 1e-9
    assert np.isfinite(outputs).all(), described
    assert relative_deviation(fc.apply(actual, *args), outputs) <= limit, described
    assert relative_deviation(fc.expand(actual), expected, floor=1e-3) <= limit, described


def steps(apply, params, optimizer, batches):
    """Trains one step after the other, as some optimizers change the dtypes of their state."""

    @jax.jit
    def step(params, state, args, target):
        loss = lambda p: random_segments.loss(apply(p, *args), target)  # noqa: E731
        return updated(optimizer, jax.grad(loss)(params), state, params)

    state = optimizer.init(params)
    for args, target in batches:
        params, state = step(params, state, args, target)
    return params


# --- what is refused ---

SADDLES = {
    "zero": [np.zeros((4, 20)), np.zeros((20, 3))],
    "rank one": [segments.normal((4, 1))[0] * np.ones((1, 20)), np.ones((20, 1)) * np.ones((1, 3))],
}


@pytest.mark.parametrize("name", SADDLES)
def test_saddles_are_refused_by_name(name):
    params = dict(zip(("up", "down"), SADDLES[name], strict=True))
    with pytest.raises(FrontContributionError, match="down, up stand at a saddle"):
        fcjax.front_contribute(
            lambda p, x: x @ p["up"] @ p["down"], params, np.ones((8, 4)), optimizer=optax.sgd(0.1)
        )


@pytest.mark.parametrize(("nudge", "doubtful"), [(3e-11, True), (1e-6, False), (0.0, False)])
def test_rank_that_depends_on_the_tolerance_is_said(nudge, doubtful):
    up, down = segments.balanced(4, 20, 4)
    outside = segments.orthogonal(20, 1, seed=5)
    down = down + nudge * (outside - up.T @ np.linalg.lstsq(up.T, outside, rcond=None)[0])
    params = {"up": up, "down": down}
    fc = fcjax.front_contribute(
        lambda p, x: x @ p["up"] @ p["down"], params, np.ones((8, 4)), optimizer=optax.sgd(0.1)
    )
    assert fc.params["up"].shape == (4, 5 if nudge else 4)
    assert [("weights' rounding" in row.reason) for row in fc.report] == [doubtful] * 2


BAD_DATA = {
    "rows": (np.ones((9, 5)), "data for argument 0 has shape"),
    "axes": (np.ones(4), "data for argument 0 has shape"),
    "NaN": (np.full((9, 4), np.nan), "NaN or infinite"),
    "more": ((np.ones((9, 4)), np.ones((9, 4))), "data has 2 arrays"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused(name):
    data, message = BAD_DATA[name]
    params = segments.normal((4, 20), (20, 3))
    with pytest.raises(FrontContributionError, match=message):
        fcjax.front_contribute(
            segments.chain, params, np.ones((8, 4)), optimizer=optax.sgd(0.1), data=data
        )


def test_data_without_an_optimizer_is_refused():
    with pytest.raises(FrontContributionError, match="pass optimizer= too"):
        fcjax.front_contribute(
            segments.chain, segments.normal((4, 3)), np.ones((8, 4)), data=np.ones((9, 4))
        )
