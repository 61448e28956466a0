"""Flow folds of networks against plain backpropagation of the untouched network."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flow_networks import (
    NETWORKS,
    Network,
    chain,
    network,
    normal,
    product,
    relu,
    same_product,
    unbalanced,
    vectors,
)

import fcjax
from fcjax.errors import FrontContributionError, NotFoldableError
from fcjax.measure import residual_bytes
from fcjax.rules import linearity

RATES = [0.02 / 2**k for k in range(5)]
SGD = optax.sgd(1e-2)


def sgd(rate):
    return optax.sgd(rate)


def momentum(rate):
    return optax.sgd(rate / 10, momentum=0.9)


def decay(rate):
    return optax.chain(optax.add_decayed_weights(0.2), optax.sgd(rate))


def decay_and_momentum(rate):
    return optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate / 10, momentum=0.9))


def folded(network, optimizer=SGD, **options):
    return fcjax.front_contribute(
        network.apply, network.params, network.x,
        optimizer=optimizer, exactness="flow", **options,
    )  # fmt: skip


def loss_of(network, apply):
    return lambda p: 0.5 * jnp.mean(jnp.sum((apply(p, network.x) - network.y) ** 2, -1))


def trained(network, apply, params, make, rates=RATES, extra=None):
    """The parameters after the network's time at each rate, and the last optimizer state."""
    loss = loss_of(network, apply)

    @jax.jit
    def run(params, rate, steps):
        optimizer = make(rate) if extra is None else optax.chain(extra(rate), make(rate))

        def step(_, carry):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))

    return [run(params, rate, round(network.time / rate)) for rate in rates]


def deviations(network, make, rates=RATES):
    """Relative deviation of the outputs from backpropagation's, at each rate."""
    fc = folded(network, make(1e-2))
    full = trained(network, network.apply, network.params, make, rates)
    reduced = trained(network, fc.apply, fc.params, make, rates)
    apply = jax.jit(network.apply)
    found = []
    for (p, _), (q, _) in zip(full, reduced, strict=True):
        assert fc.check(q) == ()
        wanted = apply(p, network.x)
        outputs = apply(fc.expand(q), network.x)
        np.testing.assert_allclose(outputs, fc.apply(q, network.x), atol=1e-10)
        found.append(float(jnp.linalg.norm(outputs - wanted) / jnp.linalg.norm(wanted)))
    return found


def rows(fc):
    return {row.path: row for row in fc.report}


def away(fc):
    return tuple(row.path for row in fc.report if row.rule == "fold" and row.reduced_shape is None)


# --- convergence ---


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_deviation_from_sgd_halves_with_the_learning_rate(name):
    network = NETWORKS[name]()
    found = deviations(network, sgd)
    ratios = [a / b for a, b in itertools.pairwise(found)]
    assert max(found[1:]) < 1e-2, found  # at learning rates of 0.01 and less
    if network.has_kinks:
        assert found[-1] < found[0] / 8, found
    else:
        assert all(1.7 < ratio < 2.3 for ratio in ratios), (found, ratios)


def test_at_kinks_the_deviation_is_uneven_and_of_the_size_of_sgds_own():
    """A gate that flips a step earlier parts SGD from gradient flow, and the fold from SGD."""

    def apply(p, x):
        return relu(product(p["chain"], x)) * p["u"] * p["v"] @ p["out"]

    u, v = vectors(2, 5)
    params = {"chain": chain(6, 8, 5, seed=2), "out": normal(5, 2, scale=0.5, seed=2)}
    one = network(apply, params | {"u": u, "v": v}, 6, 2, "chain/0", "u", time=4.0)
    fc, rates = folded(one), RATES[:3]
    assert away(fc) == one.folded
    runs = trained(one, apply, one.params, sgd, [*rates, rates[-1] / 16])
    *plain, flow = (apply(p, one.x) for p, _ in runs)
    closed = [fc.apply(p, one.x) for p, _ in trained(one, fc.apply, fc.params, sgd, rates)]
    found = [float(jnp.linalg.norm(a - b)) for a, b in zip(plain, closed, strict=True)]
    own = [float(jnp.linalg.norm(a - flow)) for a in plain]
    assert not all(1.7 < a / b < 2.3 for a, b in itertools.pairwise(found)), found
    assert all(a < b for a, b in zip(found, own, strict=True)), (found, own)


@pytest.mark.long
@pytest.mark.parametrize("make", [momentum, decay, decay_and_momentum])
def test_deviation_halves_with_momentum_and_decay(make):
    network = NETWORKS["together"]()
    slow = 4 if make is not decay else 1
    found = deviations(network, make, [rate / slow for rate in RATES])
    ratios = [a / b for a, b in itertools.pairwise(found)]
    assert all(1.7 < ratio < 2.3 for ratio in ratios), (found, ratios)
    assert found[-1] < 1e-2


def test_momentum_has_a_larger_constant():
    network = NETWORKS["diagonal"]()
    plain = deviations(network, sgd, RATES[-1:])[0]
    heavy = deviations(network, momentum, RATES[-1:])[0]
    assert 5 < heavy / plain < 40  # (1 + beta) / (1 - beta) = 19 in the laws' drift


def test_nesterov_and_schedules_are_flows_too():
    for optimizer in (
        optax.sgd(1e-2, momentum=0.9, nesterov=True),
        optax.sgd(optax.cosine_decay_schedule(1e-2, 100)),
        optax.MultiSteps(SGD, 4),
    ):
        assert away(folded(NETWORKS["diagonal"](), optimizer)) == ("0", "1")


def test_hidden_bases_of_a_matrix_chain_are_not_tracked():
    """The product and the laws are backpropagation's; how hidden bases turn depends on the path."""
    network = NETWORKS["relaxed"]()
    fc = folded(network)
    (full, _) = trained(network, network.apply, network.params, sgd, [2e-3])[0]
    (moved, _) = trained(network, fc.apply, fc.params, sgd, [2e-3])[0]
    expanded = fc.expand(moved)

    def gap(found, wanted):
        return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))

    assert gap(functools.reduce(jnp.matmul, expanded), functools.reduce(jnp.matmul, full)) < 5e-3
    spectra = [jnp.linalg.svd(w, compute_uv=False) for w in (expanded[1], full[1])]
    assert gap(*spectra) < 5e-3
    assert gap(expanded[1], full[1]) > 0.1


# --- what is folded, and what the report says ---


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_and_inverse(name):
    network = NETWORKS[name]()
    fc = folded(network)
    assert away(fc) == network.folded
    for path in network.folded:
        assert rows(fc)[path].exactness == "flow"
    back = fc.expand(fc.params)
    for found, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(network.params), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)
    again = fc.reduce(back)
    for found, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(fc.params), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert jax.tree.structure(again) == jax.tree.structure(fc.params)


@pytest.mark.parametrize("name", ["diagonal", "relaxed", "balanced", "norm_gain"])
def test_reduce_finds_how_far_weights_have_decayed(name):
    network = NETWORKS[name]()
    fc = folded(network, decay(1e-2))
    (moved, _) = trained(network, fc.apply, fc.params, decay, [1e-2])[0]
    scalars = [p for p in network.folded if rows(fc)[p].reduced_shape == ()]
    assert len(scalars) == 1
    full = fc.expand(moved)
    again = fc.reduce(full)
    for found, wanted in zip(jax.tree.leaves(fc.expand(again)), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-8)


def test_printed_formulas():
    printed = str(folded(NETWORKS["together"]()))
    assert re.search(r"w_eff = u \* v = \+-v \* sqrt\(v\^2 \+ c1\)\n +c1 \[4\] in [\d.]+ ", printed)
    assert "W_eff = chain.0 chain.1 chain.2 [6x4], trained in the place of chain.2" in printed
    assert re.search(r"g = scale = \+-sqrt\(\|w\|\^2 \+ c\), unit by unit\n +c \[5\] in", printed)
    assert "exact for this optimizer as its learning rate goes to 0" in printed
    assert "4 folded away" in printed
    assert "x W_eff" in printed
    assert "a step pays for one eigendecomposition of 4 x 4" in printed


def test_printed_constants_of_a_relaxed_chain_and_of_decay():
    assert "c = 0.4, 0, 0.9" in str(folded(NETWORKS["relaxed"]()))
    assert "is trained as rho" in str(folded(NETWORKS["diagonal"](), decay(1e-2)))
    assert "is trained as rho" in str(folded(NETWORKS["channel_scale"](), decay(1e-2)))


def test_several_effective_weights_are_numbered():
    printed = str(folded(NETWORKS["difference"]()))
    assert "w_eff1 = " in printed
    assert "w_eff2 = " in printed


def test_without_an_optimizer_nothing_is_folded():
    network = NETWORKS["together"]()
    fc = fcjax.front_contribute(network.apply, network.params, network.x, exactness="flow")
    assert away(fc) == ()
    for path in ("chain/0", "u", "v"):
        assert "pass optimizer=" in rows(fc)[path].reason


def test_discrete_exactness_folds_nothing_along_the_flow():
    network = NETWORKS["together"]()
    fc = fcjax.front_contribute(network.apply, network.params, network.x, optimizer=SGD)
    assert all(row.exactness != "flow" for row in fc.report)


def test_equal_magnitudes_are_folded_exactly_under_flow_too():
    params = [jnp.ones(3), -jnp.ones(3)]
    fc = fcjax.front_contribute(
        lambda p, x: x * p[0] * p[1], params, jnp.ones((2, 3)), optimizer=SGD, exactness="flow"
    )
    assert rows(fc)["0"].exactness == "sign"


def test_other_layers_are_compressed_beside_a_fold():
    def apply(p, x):
        return jnp.tanh(x @ p["a"] @ p["b"]) @ p["c"] @ p["d"]

    a, b = chain(6, 8, 4)
    params = {"a": a, "b": b, "c": normal(4, 40, scale=0.3), "d": normal(40, 2, scale=0.15)}
    params = jax.tree.map(jnp.asarray, params)
    network = Network(apply, params, jnp.asarray(normal(9, 6)), jnp.ones((9, 2)), ("a",))
    fc = folded(network)
    assert {p: (r.rule, r.reduced_shape) for p, r in rows(fc).items()} == {
        "a": ("fold", None),
        "b": ("fold", (6, 4)),
        "c": ("compress", (4, 6)),
        "d": ("compress", (6, 2)),
    }
    found = deviations(network, sgd, RATES[:3])
    assert found[2] < found[0] / 3 < 1e-2


def test_strict_accepts_a_network_of_one_chain():
    assert away(folded(NETWORKS["balanced"](), strict=True)) == ("0", "1", "2")
    with pytest.raises(NotFoldableError, match="b "):
        folded(
            Network(
                lambda p, x: jnp.tanh(x @ p["a"] @ p["b"]) @ p["c"],
                {"a": chain(4, 5, 3)[0], "b": chain(4, 5, 3)[1], "c": normal(3, 1)},
                jnp.ones((2, 4)), None, (),
            ),
            strict=True,
        )  # fmt: skip


# --- gradients ---


def test_gradients_are_the_factors_gradients():
    """The gradient of a survivor is the partial derivative; that of Z sums over the factors."""
    network = NETWORKS["diagonal"]()
    fc = folded(network)
    full = jax.grad(loss_of(network, network.apply))(network.params)
    reduced = jax.grad(loss_of(network, fc.apply))(fc.params)
    smallest = np.argmin(np.abs(network.params), axis=0)
    signs = 1.0
    wanted = np.take_along_axis(np.stack(full), smallest[None], 0)[0] * signs
    np.testing.assert_allclose(reduced[2], wanted, rtol=1e-12)


def test_grad_jvp_vmap_and_jit_agree():
    network = NETWORKS["together"]()
    fc = folded(network)
    loss = loss_of(network, fc.apply)
    tangent = jax.tree.map(lambda x: jnp.asarray(normal(*x.shape, seed=9)), fc.params)
    gradient = jax.jit(jax.grad(loss))(fc.params)
    forward = jax.jit(lambda p: jax.jvp(loss, (p,), (tangent,))[1])(fc.params)
    along = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, tangent)))
    np.testing.assert_allclose(forward, along, rtol=1e-10)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), fc.params)
    each = jax.jit(jax.vmap(jax.grad(loss)))(stacked)
    for found, wanted in zip(jax.tree.leaves(each), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(found[0], wanted, atol=1e-10)
    single = jax.vmap(lambda x: fc.apply(fc.params, x[None])[0])(network.x)
    np.testing.assert_allclose(single, network.apply(network.params, network.x), atol=1e-12)


def test_contributions_are_arguments():
    network = NETWORKS["together"]()
    fc = folded(network)
    assert set(fc.contributions["flows"]) == {"chain/2", "v", "scale"}
    found = jax.jit(fc.apply_with)(fc.params, fc.contributions, network.x)
    np.testing.assert_allclose(found, network.apply(network.params, network.x), atol=1e-12)


def test_no_residual_of_a_folded_layer_is_saved():
    network = NETWORKS["balanced"]()
    fc, x = folded(network), jax.ShapeDtypeStruct((4096, 20), jnp.float64)
    saved = residual_bytes(fc.apply, fc.params, x)
    hidden = 4096 * 64 * 8
    assert saved < hidden // 2 + 4096 * 20 * 8
    assert residual_bytes(network.apply, network.params, x) > 3 * hidden


def test_gates_of_a_folded_layer_are_saved_at_most_once():
    network = NETWORKS["scalar_output"]()
    fc, x = folded(network), jax.ShapeDtypeStruct((4096, 6), jnp.float64)
    assert residual_bytes(fc.apply, fc.params, x) < residual_bytes(network.apply, network.params, x)


def test_float32():
    network = NETWORKS["together"]()
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), network.params)
    x = network.x.astype(jnp.float32)
    fc = fcjax.front_contribute(network.apply, narrow, x, optimizer=SGD, exactness="flow")
    assert away(fc) == network.folded
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fc.params))
    wanted = network.apply(network.params, network.x)
    np.testing.assert_allclose(fc.apply(fc.params, x), wanted, atol=2e-5)
    assert fc.apply(fc.params, x).dtype == jnp.float32


# --- refusals ---


def reason(network, path, optimizer=SGD, **options):
    row = rows(folded(network, optimizer, **options))[path]
    assert row.rule != "fold", row
    return row.reason


@pytest.mark.parametrize("rebalance", [False, True])
def test_a_chain_whose_product_has_no_entries_is_not_folded(rebalance):
    shapes = [(3, 4), (4, 4), (4, 0)]
    params = [jnp.asarray(np.random.default_rng(0).normal(size=shape)) for shape in shapes]
    empty = Network(lambda p, x: product(p, x), params, jnp.ones((5, 3)), None, ())
    fc = folded(empty, rebalance=rebalance)
    assert rows(fc)["2"].rule == "train"
    assert fc.apply(fc.params, empty.x).shape == (5, 0)
    assert [leaf.shape for leaf in fc.expand(fc.params)] == shapes


def test_unbalanced_chain_is_refused_with_the_violation():
    network = unbalanced()
    found = reason(network, "1")
    factors = network.params
    gap = [b @ b.T - a.T @ a for a, b in itertools.pairwise(factors)]
    sizes = [max(np.linalg.norm(a.T @ a), np.linalg.norm(b @ b.T))
             for a, b in itertools.pairwise(factors)]  # fmt: skip
    rest = [np.linalg.norm(g - np.trace(g) / len(g) * np.eye(len(g))) for g in gap]
    violation = max(r / s for r, s in zip(rest, sizes, strict=True))
    assert f"departs from a multiple of the identity by {violation:.2g} of its size" in found
    assert "rebalance=True" in found


def test_rebalance_makes_it_balanced():
    network = unbalanced()
    fc = folded(network, rebalance=True)
    assert away(fc) == ("0", "1")
    assert "rebalanced before training" in rows(fc)["0"].reason
    np.testing.assert_allclose(
        fc.apply(fc.params, network.x), network.apply(network.params, network.x), atol=1e-12
    )
    np.testing.assert_allclose(fc.expand(fc.params)[1], same_product(network).params[1], atol=1e-12)


def test_rebalance_gives_equal_magnitudes_and_leaves_zeros():
    u, v = vectors(2)
    network = Network(
        lambda p, x: x * p["u"] * p["v"], {"u": u, "v": v}, jnp.ones((3, 6)), None, ()
    )
    fc = folded(network, rebalance=True)
    assert rows(fc)["u"].exactness == "sign"
    np.testing.assert_allclose(np.abs(fc.params["v"]), np.sqrt(np.abs(u * v)), rtol=1e-14)
    zero = Network(network.apply, {"u": u, "v": 0 * v}, network.x, None, ())
    assert rows(folded(zero, rebalance=True))["u"].exactness == "flow"


def test_rebalance_scales_units_whose_gain_is_too_small():
    for name, path in (("scalar_output", "a"), ("norm_gain", "gain"), ("channel_scale", "scale")):
        network = NETWORKS[name]()
        small = {**network.params, path: 0.2 * network.params[path]}
        network = Network(network.apply, small, network.x, network.y, (path,))
        assert away(folded(network)) == ()
        fc = folded(network, rebalance=True)
        assert away(fc) == (path,)
        assert "rebalanced before training" in rows(fc)[path].reason
        assert "rebalanced before training" in rows(fc)["w"].reason
        outputs = fc.apply(fc.params, network.x)
        np.testing.assert_allclose(outputs, network.apply(small, network.x), atol=1e-12)


def test_rebalance_leaves_alone_what_is_not_folded():
    network = unbalanced()
    fc = folded(network, optax.adam(1e-3), rebalance=True)
    full = fc.expand(fc.params)
    for found, wanted in zip(full, network.params, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_rebalance_needs_flow_and_an_optimizer():
    network = unbalanced()
    for options in ({"exactness": "flow"}, {"optimizer": SGD}):
        with pytest.raises(FrontContributionError, match="rebalance=True changes the initial"):
            fcjax.front_contribute(
                network.apply, network.params, network.x, rebalance=True, **options
            )


def linear(params, outputs=None):
    params = [jnp.asarray(w) for w in params]
    x = jnp.asarray(normal(5, params[0].shape[0]))
    return Network(lambda p, x: functools.reduce(jnp.matmul, p, x), params, x, outputs, ())


def test_small_singular_values_are_refused():
    first, second = chain(4, 5, 4)
    shrink = np.diag([1.0, 1.0, 1.0, 1e-6])
    u, s, vt = np.linalg.svd(first @ second)
    q = np.eye(5)[:, :4]
    s = np.sqrt(s * np.diag(shrink))
    network = linear([u @ np.diag(s) @ q.T, q @ np.diag(s) @ vt])
    wide = reason(linear([np.float32(w) for w in network.params]), "0")
    assert re.search(r"smallest singular value .* is \de-0[67] of the largest, below", wide)
    assert "float32 resolves" in wide


def test_relaxed_chain_with_a_wide_hidden_layer_is_refused():
    first = chain(3, 5, 5, offsets=[0.0, 0.0])[0]
    gram = first.T @ first + 0.5 * np.eye(5)
    second = np.linalg.cholesky(gram)
    found = reason(linear([first, second]), "0")
    assert "differ by multiples of the identity of up to 0.5" in found
    assert "the widths are 3, 5, 5" in found


def test_product_larger_than_its_factors_is_refused():
    assert "more entries than its factors" in reason(linear(chain(9, 2, 9)), "0")


def test_mixed_and_half_precision_are_refused():
    first, second = chain(4, 5, 4)
    mixed = linear([first, np.float32(second)])
    assert "not all float32 or all float64" in reason(mixed, "0")


def test_infinite_chain_is_refused():
    u, v = vectors(2)
    u[0] = np.inf
    network = Network(lambda p, x: x * p[0] * p[1], [u, v], jnp.ones((3, 6)), None, ())
    assert "not finite" in reason(network, "0")


def test_zero_in_front_of_the_last_factor_is_refused():
    u, v = vectors(2)
    u[:2] = 0.0
    network = Network(lambda p, x: x * p[0] * p[1], [u, v], jnp.ones((3, 6)), None, ())
    assert "2 elements of the chain 0, 1 are exactly zero" in reason(network, "0")
    turned = Network(lambda p, x: x * p[0] * p[1], [v, u], jnp.ones((3, 6)), None, ())
    assert away(folded(turned)) == ("0",)


def test_gain_smaller_than_its_weights_is_refused():
    network = NETWORKS["channel_scale"]()
    scale, w = network.params["scale"], network.params["w"]
    small = {**network.params, "scale": scale.at[1].set(0.01)}
    found = reason(Network(network.apply, small, network.x, network.y, ()), "scale")
    excess = float(jnp.sum(w[:, 1] ** 2)) - 0.01**2
    assert f"in 1 of 5 units it does not, by up to {excess:.2g}" in found
    zero = {**network.params, "scale": scale.at[1].set(0.0)}
    found = reason(Network(network.apply, zero, network.x, network.y, ()), "scale")
    assert "in 1 it is zero" in found


def test_scalar_output_smaller_than_its_unit_is_refused():
    network = NETWORKS["scalar_output"]()
    small = {**network.params, "a": 0.1 * network.params["a"]}
    found = reason(Network(network.apply, small, network.x, network.y, ()), "a")
    assert "in 8 of 8 units" in found


def test_relu_net_with_vector_outputs_has_nothing_to_fold():
    def apply(p, x):
        return jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"]

    params = {"w": normal(3, 8), "b": np.zeros(8), "v": normal(8, 2)}
    network = Network(apply, params, jnp.ones((4, 3)), None, ())
    assert all(row.rule != "fold" for row in folded(network).report)
    with pytest.raises(NotFoldableError):
        folded(network, strict=True)


def test_tied_and_biased_chains_are_not_folded():
    a, b = chain(4, 4, 4)
    tied = Network(lambda p, x: x @ p[0] @ p[0], [a], jnp.ones((2, 4)), None, ())
    assert away(folded(tied)) == ()
    biased = Network(
        lambda p, x: (x @ p[0] + p[2]) @ p[1], [a, b, np.ones(4)], jnp.ones((2, 4)), None, ()
    )
    assert away(folded(biased)) == ()
    crossed = Network(
        lambda p, x: x @ p[0] @ p[1] + x @ p[1] @ p[0], [a, b], jnp.ones((2, 4)), None, ()
    )
    assert away(folded(crossed)) == ()
    gated = Network(lambda p, x: jnp.tanh(x @ p[0]) @ p[1], [a, b], jnp.ones((2, 4)), None, ())
    assert away(folded(gated)) == ()


OTHERS = {
    "adam": (optax.adam(1e-3), "not proportional"),
    "sign": (optax.sign_sgd(1e-3), "not proportional"),
    "clip": (optax.chain(optax.clip_by_global_norm(1.0), SGD), "not proportional"),
    "lars": (optax.lars(0.1), "not proportional"),
    "noise": (optax.chain(optax.add_noise(0.1, 0.5, 0), SGD), "not all by the same factor"),
    "masked decay": (
        optax.chain(optax.add_decayed_weights(0.1, mask=[True, False, True]), SGD),
        "not all by the same factor",
    ),
    "centralized": (optax.chain(optax.centralize(), SGD), "linear|one chain differently"),
    "two rates": (
        optax.multi_transform({"a": SGD, "b": optax.sgd(2e-2)}, ["a", "b", "a"]),
        "one chain differently",
    ),
    "frozen": (optax.set_to_zero(), "does not move them"),
    "by size": (
        optax.multi_transform(
            {"a": SGD, "b": optax.adam(1e-3)},
            lambda tree: jax.tree.map(lambda w: "b" if w.size > 20 else "a", tree),
        ),
        "real sizes",
    ),
    "wants the loss": (optax.polyak_sgd(), "could not be run on this tree: TypeError"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_are_refused(name):
    optimizer, why = OTHERS[name]
    found = reason(linear(chain(6, 6, 6, 6)), "0", optimizer)
    assert re.search(f"with this optimizer .*({why})", found)


def test_decay_that_spares_scalars_is_refused():
    def on_matrices(tree):
        return jax.tree.map(lambda w: w.ndim > 1, tree)

    optimizer = optax.chain(optax.add_decayed_weights(0.1, mask=on_matrices), SGD)
    assert "differently without" in reason(linear(chain(6, 6, 6)), "0", optimizer)


def test_weights_in_the_update_are_refused():
    def update(updates, state, params):
        return jax.tree.map(lambda g, w: -0.1 * g * (1 + w**2), updates, params), state

    optimizer = optax.GradientTransformation(lambda params: (), update)
    (verdict,) = linearity.follows_flow(
        optimizer, jax.tree.structure([0, 0]), [(4, 4)] * 2, [([0], [1])]
    )
    assert verdict.fault is not None


def test_another_reading_of_the_chain_raises():
    a, b = chain(4, 5, 4)

    def apply(p, x, inner=False):
        return x @ p[0] if inner else x @ p[0] @ p[1]

    network = Network(apply, [jnp.asarray(a), jnp.asarray(b)], jnp.ones((2, 4)), None, ())
    fc = folded(network)
    with pytest.raises(FrontContributionError, match="hidden spaces between 0, 1 in another way"):
        fc.apply(fc.params, network.x, inner=True)


def test_a_call_that_does_not_need_the_chain():
    a, b = chain(4, 5, 4)

    def apply(p, x, short=False):
        y = x @ p[0] @ p[1]
        return jnp.tanh(x @ p[2]) if short else jnp.tanh(y) @ p[2]

    params = [jnp.asarray(w) for w in (a, b, normal(4, 2))]
    network = Network(apply, params, jnp.ones((2, 4)), None, ())
    fc = folded(network)
    np.testing.assert_allclose(
        fc.apply(fc.params, network.x, short=True), apply(params, network.x, short=True)
    )


def test_reduce_refuses_what_is_off_the_manifold():
    for name in ("balanced", "diagonal", "norm_gain"):
        network = NETWORKS[name]()
        fc = folded(network)
        other = jax.tree.map(lambda w: w + 0.1 * normal(*w.shape, seed=4), network.params)
        with pytest.raises(FrontContributionError, match=r"manifold .* differ by [\d.e-]+ of"):
            fc.reduce(other)


# --- validity during training ---


def test_check_sees_a_determinant_change_its_sign():
    fc = folded(linear(chain(4, 5, 4)))
    Z = fc.params[1]
    assert fc.check(fc.params) == ()
    u, s, vt = np.linalg.svd(Z)
    flipped = u @ np.diag([*s[:3], -s[3]]) @ vt
    assert "determinant of the product in 1 has changed its sign" in fc.check([None, flipped])[0]
    small = u @ np.diag([*s[:3], 1e-12]) @ vt
    assert "smallest singular value" in fc.check([None, small])[0]


def test_check_sees_steps_too_large_for_a_balanced_chain():
    """One step that throws a singular value through zero, as gradient flow never would."""
    network = linear([np.eye(2), np.eye(2)])
    fc = folded(network)
    goal = jnp.diag(jnp.asarray([1.0, -1.0]))
    gradient = jax.grad(lambda p: jnp.sum((fc.apply(p, jnp.eye(2)) - goal) ** 2))(fc.params)
    small, large = ([None, fc.params[1] - rate * gradient[1]] for rate in (0.01, 0.5))
    assert fc.check(small) == ()
    assert len(fc.check(large)) == 1


def test_a_relaxed_chain_may_cross_zero():
    """The singular values of its one smallest factor are free to change their sign."""
    fc = folded(NETWORKS["relaxed"]())
    u, s, vt = np.linalg.svd(fc.params[2])
    assert fc.check([None, None, u @ np.diag([*s[:5], -s[5]]) @ vt]) == ()


def test_check_sees_a_narrow_chain_leave_its_rank():
    fc = folded(NETWORKS["narrow"]())
    assert fc.check(fc.params) == ()
    wide = fc.params[2] + 0.5 * np.eye(6, 7)
    assert "left the matrices of rank 3" in fc.check([None, None, wide])[0]


def test_check_sees_a_gain_reach_zero():
    network = NETWORKS["norm_gain"]()
    fc = folded(network)
    assert fc.check(fc.params) == ()
    shift = fc.params["shift"].at[2].set(3.0)
    assert "1 of 6 entries of gain have reached zero" in fc.check({**fc.params, "shift": shift})[0]


def test_check_sees_infinities_and_vanished_constants():
    for name, path in (("diagonal", 2), ("balanced", 3), ("norm_gain", "w")):
        fc = folded(NETWORKS[name]())
        broken = dict(fc.params) if isinstance(path, str) else list(fc.params)
        broken[path] = jnp.inf * broken[path]
        assert "not finite" in fc.check(broken)[0]
    fc = folded(NETWORKS["diagonal"](), decay(1e-2))
    assert "shrunk rho in 0" in fc.check([jnp.asarray(1e-6), *fc.params[1:]])[0]


# --- the drift certificate ---


def law_values(name, params):
    """The conserved quantities that a network's fold relies on, each as an array."""
    if name == "diagonal":
        squares = [w**2 for w in params]
        return [a - b for a, b in itertools.combinations(squares, 2)]
    if name == "scalar_output":
        return [jnp.sum(params["w"] ** 2, 0) + params["b"] ** 2 - params["a"][:, 0] ** 2]
    if name == "norm_gain":
        return [params["gain"] ** 2 + params["shift"] ** 2 - jnp.sum(params["w"] ** 2, 1)]
    return [b @ b.T - a.T @ a for a, b in itertools.pairwise(params)]


@pytest.mark.parametrize("name", ["diagonal", "balanced", "relaxed", "scalar_output", "norm_gain"])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_drift_is_bounded(name, beta):
    network = NETWORKS[name]()
    fc = folded(network)

    def make(rate):
        return optax.sgd(rate * (1 - beta), momentum=beta)

    rates = [0.01, 0.0025] if beta else [0.02, 0.005]
    full = trained(network, network.apply, network.params, make, rates)
    reduced = trained(
        network, fc.apply, fc.params, make, rates,
        extra=lambda rate: fcjax.track_drift(fc, rate * (1 - beta), beta),
    )  # fmt: skip
    norm = (lambda x: jnp.max(jnp.abs(x))) if name not in ("balanced", "relaxed") else (
        jnp.linalg.norm
    )  # fmt: skip
    start, bounds = law_values(name, network.params), []
    for (p, _), (_, state) in zip(full, reduced, strict=True):
        moved = [norm(a - b) for a, b in zip(law_values(name, p), start, strict=True)]
        (bound,) = state[0].drift.values()
        assert 0 < max(moved) <= bound
        assert bound < 60 * max(moved)  # and is no empty claim
        bounds.append(float(bound))
    assert 2.5 < bounds[0] / bounds[1] < 6  # first order in the learning rate


def test_drift_follows_a_schedule():
    network = NETWORKS["diagonal"]()
    fc = folded(network)
    tracked = fcjax.track_drift(fc, lambda count: 0.1 / (1 + count))
    gradient, state = [None, None, jnp.ones(6)], tracked.init(fc.params)
    for _ in range(2):
        passed, state = tracked.update(gradient, state, fc.params)
    np.testing.assert_array_equal(passed[2], gradient[2])
    np.testing.assert_allclose(state.drift["2"], 2 * (0.1**2 + 0.05**2))


def test_drift_needs_folds_and_parameters():
    network = NETWORKS["diagonal"]()
    plain = fcjax.front_contribute(network.apply, network.params, network.x)
    with pytest.raises(FrontContributionError, match="needs a network with flow folds"):
        fcjax.track_drift(plain, 0.1)
    fc = folded(network)
    tracked = fcjax.track_drift(fc, 0.1)
    with pytest.raises(FrontContributionError, match="needs the parameters"):
        tracked.update(fc.params, tracked.init(fc.params))
