"""The radial closure: the final layer alone, every law kept, and what it is not."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import fcjax
from fcjax.errors import FrontContributionError, NotFoldableError
from fcjax.measure import residual_bytes

RATE = 0.02


def dense(*widths, bias=True, seed=0, scale=1.0):
    """Kernels and biases of dense layers."""
    rng = np.random.default_rng(seed)
    layers = []
    for a, b in itertools.pairwise(widths):
        layer = {"kernel": jnp.asarray(scale * rng.normal(size=(a, b)) * (2 / a) ** 0.5)}
        if bias:
            layer["bias"] = jnp.asarray(0.1 * rng.normal(size=b))
        layers.append(layer)
    return layers


def network(activation):
    """Dense layers with an activation between them."""

    def apply_fn(params, x):
        for i, layer in enumerate(params):
            x = activation(x) if i else x
            x = x @ layer["kernel"] + layer.get("bias", 0.0)
        return x

    return apply_fn


class Convolutions(nn.Module):
    """Two convolutions, max pooling and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.leaky_relu(nn.Conv(5, (3, 3), padding="VALID")(x))
        return nn.Dense(3)(x.mean(axis=(1, 2)))


def convolutional():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 8, 8, 2)))
    params = Convolutions().init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) + 0.05, params)
    return lambda p, x: Convolutions().apply({"params": p}, x), params, x


def plain(activation, *widths, **options):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(32, widths[0])))
    return network(activation), dense(*widths, **options), x


NETWORKS = {
    "relu": lambda: plain(jax.nn.relu, 4, 9, 7, 3),
    "without biases": lambda: plain(jax.nn.relu, 4, 9, 7, 3, bias=False),
    "leaky relu": lambda: plain(jax.nn.leaky_relu, 4, 9, 3),
    "squared relu": lambda: plain(lambda x: jax.nn.relu(x) ** 2, 4, 6, 5, 3, scale=0.5),
    "abs": lambda: plain(jnp.abs, 4, 6, 6, 6, 3),
    "linear": lambda: plain(lambda x: x, 4, 6, 5, 3),
    "convolutional": convolutional,
}


def closed(name, **options):
    apply_fn, params, x = NETWORKS[name]()
    fc = fcjax.front_contribute(
        apply_fn, params, x, optimizer=optax.sgd(RATE), exactness="approximate", **options
    )
    return fc, x


def stepped(apply, params, x):
    """The parameters after one step of gradient descent on a smooth loss."""
    gradient = jax.grad(lambda p: jnp.mean(jnp.sin(apply(p, x)) ** 2))(params)
    return jax.tree.map(lambda p, g: p - RATE * g, params, gradient)


def trained(apply, params, x, steps=30):
    return jax.lax.fori_loop(0, steps, lambda _, p: stepped(apply, p, x), params)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_laws_stay_what_they_are_and_only_the_final_layer_moves(name):
    fc, x = closed(name, strict=True)
    laws = fcjax.conservation_laws(fc.apply_fn, fc.expand(fc.params), x)
    after = fc.expand(trained(fc.apply, fc.params, x))
    before = fc.expand(fc.params)
    assert laws.names
    units = np.array(["entry" not in n or _is_diagonal(n) for n in laws.names])
    scale = np.max(np.abs(laws.values(before)))
    assert np.max(np.abs(laws.drift(before, after)[units])) <= 1e-12 * scale
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), before, after)
    assert min(jax.tree.leaves(moved)) > 1e-6
    np.testing.assert_allclose(
        fc.apply(fc.params, x), fc.apply_fn(before, x), rtol=1e-12, atol=1e-12
    )


def _is_diagonal(name):
    row, column = name.rsplit("(", 1)[1].rstrip(")").split(", ")
    return row == column


@pytest.mark.parametrize("name", NETWORKS)
def test_the_final_layers_first_step_is_backpropagations(name):
    fc, x = closed(name)
    full = stepped(fc.apply_fn, fc.expand(fc.params), x)
    actual = stepped(fc.apply, fc.params, x)
    left = {row.path for row in fc.report if row.reduced_shape is not None}
    paths = [(fcjax.names.path_name(p), leaf) for p, leaf in _leaves(full)]
    expected = [leaf for path, leaf in paths if path in left]
    for a, b in zip(jax.tree.leaves(actual), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_it_is_not_backpropagation():
    fc, x = closed("relu")
    full = trained(fc.apply_fn, fc.expand(fc.params), x, steps=100)
    small = fc.expand(trained(fc.apply, fc.params, x, steps=100))
    difference = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), full, small)
    assert max(jax.tree.leaves(difference)) > 1e-2
    assert {row.exactness for row in fc.report} == {"approximate", "any optimizer"}
    assert "the radial closure is an approximation" in str(fc)
    assert "r^2 = c + |2|^2" in str(fc)
    assert "16 of 115 hidden degrees of freedom" in str(fc)


def test_no_backward_pass_crosses_a_hidden_layer():
    apply_fn, params, _ = NETWORKS["without biases"]()
    x = jax.ShapeDtypeStruct((1000, 4), jnp.float64)
    fc = fcjax.front_contribute(
        apply_fn, params, x, optimizer=optax.sgd(RATE), exactness="approximate"
    )
    # All that is saved of the batch is what the final layer reads.
    assert residual_bytes(fc.apply, fc.params, x) < (1000 * 7 + 200) * 8
    assert residual_bytes(apply_fn, params, x) > 1000 * (9 + 7) * 8


def test_refreshing_every_step_is_backpropagation():
    fc, x = closed("relu")

    @jax.jit
    def step(params, contributions):
        return fc.refresh(stepped(fc.apply_fn, fc.expand(params, contributions), x))

    params, contributions = fc.params, fc.contributions
    for _ in range(20):
        params, contributions = step(params, contributions)
    full = trained(fc.apply_fn, fc.expand(fc.params), x, steps=20)
    for a, b in zip(_leaves(fc.expand(params, contributions)), _leaves(full), strict=True):
        np.testing.assert_allclose(a[1], b[1], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(
        fc.apply_with(params, contributions, x), fc.apply_fn(full, x), rtol=1e-10, atol=1e-12
    )


def test_a_norm_that_the_laws_no_longer_allow_is_told():
    fc, x = closed("relu")
    assert fc.check(fc.params) == ()
    shrunk = jax.tree.map(lambda leaf: 1e-3 * leaf, fc.params)
    (found,) = fc.check(shrunk)
    assert "the laws leave" in found
    assert "fc.refresh" in found
    assert np.isnan(fc.apply(shrunk, x)).any()
    (found,) = fc.check(jax.tree.map(lambda leaf: leaf * np.nan, fc.params))
    assert "is not finite" in found


def test_it_runs_under_transformations():
    fc, x = closed("relu")

    def loss(params):
        return jnp.mean(fc.apply(params, x) ** 2)

    gradient = jax.grad(loss)(fc.params)
    _, along = jax.jvp(jax.jit(loss), (fc.params,), (gradient,))
    squares = sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient))
    np.testing.assert_allclose(along, squares, rtol=1e-12)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.9 * leaf]), fc.params)
    mapped = jax.vmap(loss)(stacked)
    np.testing.assert_allclose(mapped[0], loss(fc.params), rtol=1e-12)
    restored = fc.reduce(fc.expand(fc.params))
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(fc.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


REFUSED = {
    "tanh": (network(jnp.tanh), dense(4, 5, 3), "has none"),
    "residual": (
        lambda p, x: (
            (lambda h: h + jax.nn.relu(h @ p[1]["kernel"]) @ p[2]["kernel"])(x @ p[0]["kernel"])
            @ p[3]["kernel"]
        ),
        [
            *dense(4, 6, bias=False),
            *dense(6, 5, 6, bias=False, seed=1),
            *dense(6, 3, bias=False, seed=2),
        ],
        "tied in a cycle",
    ),
    "two outputs": (
        lambda p, x: (
            jax.nn.relu(x @ p[0]["kernel"]) @ p[1]["kernel"],
            jax.nn.relu(x @ p[0]["kernel"]) @ p[2]["kernel"],
        ),
        [*dense(4, 6, 3, bias=False), *dense(6, 2, bias=False)],
        "several final layers",
    ),
    "no hidden layer": (network(jax.nn.relu), dense(4, 3), "no hidden layer"),
    "tied": (
        lambda p, x: jax.nn.relu(jax.nn.relu(x @ p[0]["kernel"]) @ p[0]["kernel"]) @ p[1]["kernel"],
        [*dense(4, 4, bias=False), *dense(4, 3, bias=False)],
        "has none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_networks_without_a_closure_train_as_they_are_and_the_report_says_why(name):
    apply_fn, params, reason = REFUSED[name]
    fc = fcjax.front_contribute(
        apply_fn, params, jnp.ones((5, 4)), optimizer=optax.sgd(RATE), exactness="approximate"
    )
    assert "radial" not in {row.rule for row in fc.report}
    assert any(reason in row.reason for row in fc.report), [row.reason for row in fc.report]


def test_half_precision_has_no_closure():
    apply_fn, params, x = NETWORKS["relu"]()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    fc = fcjax.front_contribute(
        apply_fn, params, x, optimizer=optax.sgd(RATE), exactness="approximate"
    )
    assert any("needs float32 or float64" in row.reason for row in fc.report)


def test_without_an_optimizer_nothing_is_approximated():
    apply_fn, params, x = NETWORKS["relu"]()
    fc = fcjax.front_contribute(apply_fn, params, x, exactness="approximate")
    assert jax.tree.structure(fc.params) == jax.tree.structure(params)
    assert any("pass optimizer= too" in row.reason for row in fc.report)
    with pytest.raises(NotFoldableError, match="16 of 115 hidden degrees of freedom"):
        fcjax.front_contribute(apply_fn, params, x, exactness="flow", strict=True)


def test_refresh_and_track_drift_say_what_they_are_for():
    apply_fn, params, x = NETWORKS["relu"]()
    fc = fcjax.front_contribute(apply_fn, params, x)
    with pytest.raises(FrontContributionError, match="refresh is for the radial closure"):
        fc.refresh(params)
    fc, _ = closed("relu")
    with pytest.raises(FrontContributionError, match="an approximation all the same"):
        fcjax.track_drift(fc, RATE)
    with pytest.raises(FrontContributionError, match="another structure"):
        fc.refresh(params[:1])


@pytest.mark.parametrize("seed", range(8))
def test_units_without_weights_stay_without(seed):
    """Their squared norm is the difference of two equal numbers, which rounding makes negative."""
    rng = np.random.default_rng(seed)
    params = {
        "w0": jnp.zeros((1, 2)),
        "w1": jnp.asarray(rng.standard_normal(2)),
        "w2": jnp.asarray(rng.standard_normal(2)),
    }
    fc = fcjax.front_contribute(
        lambda p, x: x @ p["w0"] * p["w1"] * p["w2"], params, jnp.ones((3, 1)),
        optimizer=optax.sgd(RATE), exactness="approximate",
    )  # fmt: skip
    assert fc.params["w0"] is None
    for a, b in zip(*map(jax.tree.leaves, (fc.expand(fc.params), params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
