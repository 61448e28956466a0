"""Copies and pickles of transformed networks."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from training import relative_deviation

import fcjax

X = np.random.default_rng(0).standard_normal((8, 4))


def normal(*shape):
    """Seeded Gaussian entries."""
    return np.random.default_rng(sum(shape)).standard_normal(shape) / shape[0] ** 0.5


PARAMS = {"a": normal(4, 32), "b": normal(32), "c": normal(32, 3), "n": np.array([2, 3])}
TABLE = normal(3)


def biased(params, x, scale=1.0):
    """Two layers, with a constant that is closed over, an integer leaf and a number."""
    return ((x * scale) @ params["a"] + params["b"]) @ params["c"] * params["n"][0] + TABLE


def gained(params, x):
    """An elementwise chain, of which one factor is trained under gradient flow."""
    return jax.nn.relu(x * params[0]) * params[1]


def layers(params, x):
    """Two layers with something between them."""
    return jnp.tanh(x @ params["a"]) @ params["c"]


SGD = optax.sgd(1e-2)
FOLDED = {
    "as written": (layers, PARAMS, {}),
    "collapsed": (biased, PARAMS, {}),
    "compressed": (biased, PARAMS, {"optimizer": SGD}),
    "inputs known": (biased, PARAMS, {"optimizer": SGD, "data": X[:2]}),
    "chain": (gained, [np.ones(4), -np.ones(4)], {"optimizer": SGD}),
    "flow": (gained, [np.ones(4), 2 * np.ones(4)], {"optimizer": SGD, "exactness": "flow"}),
    "approximate": (layers, PARAMS, {"optimizer": SGD, "exactness": "approximate"}),
}
MERGED = {"as written": (layers, PARAMS), "one operator": (biased, PARAMS)}
COPIES = pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["copy", "deepcopy", "pickle"],
)  # fmt: skip


def arrays_of(tree):
    """The leaves, each as an array."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@COPIES
@pytest.mark.parametrize("kind", FOLDED)
def test_a_copy_of_a_folded_network_computes_the_same(kind, copied):
    apply_fn, params, options = FOLDED[kind]
    rows = options.get("data", X)
    fc = fcjax.front_contribute(apply_fn, params, rows, **options)
    again = copied(fc)
    slope = lambda net, x: jax.grad(  # noqa: E731
        lambda p: jnp.sin(net.apply(p, x)).sum(), allow_int=True
    )(net.params)
    for x in (rows, rows[: 2 if "data" in options else 1]):
        assert relative_deviation(again.apply(again.params, x), fc.apply(fc.params, x)) <= 1e-14
        for a, b in zip(*(arrays_of(slope(net, x)) for net in (fc, again)), strict=True):
            np.testing.assert_array_equal(a, b)
        given = again.apply_with(again.params, again.contributions, x)
        assert relative_deviation(given, fc.apply(fc.params, x)) <= 1e-14
    for a, b in zip(*(arrays_of(net.expand(net.params)) for net in (fc, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert str(again) == str(fc)
    assert again.report == fc.report
    assert [p.shape for p in arrays_of(again.reduce(again.expand(again.params)))] == [
        p.shape for p in arrays_of(fc.params)
    ]


@COPIES
@pytest.mark.parametrize("kind", MERGED)
def test_a_copy_of_a_merged_network_computes_the_same(kind, copied):
    apply_fn, params = MERGED[kind]
    merged = fcjax.merge(apply_fn, params, X)
    again = copied(merged)
    for x in (X, X[:1], np.ones((50, 4))):
        expected = merged.apply(merged.params, x)
        assert relative_deviation(again.apply(again.params, x), expected) == 0.0
    assert str(again) == str(merged)
    assert (again.reason, again.report) == (merged.reason, merged.report)
    assert again.latency(X, repeats=2).median("merged") > 0


@pytest.mark.parametrize("kind", [fcjax.merge, fcjax.front_contribute])
def test_deep_copies_share_no_arrays_that_may_change(kind):
    found = kind(biased, {k: jnp.asarray(v) for k, v in PARAMS.items()}, X)
    again = copy.deepcopy(found)
    mine, theirs = (jax.tree.leaves(net.params) for net in (found, again))
    assert all(a is not b for a, b in zip(mine, theirs, strict=True))
    again.params.clear()
    assert found.params


@pytest.mark.parametrize("transform", [fcjax.merge, fcjax.front_contribute])
@pytest.mark.parametrize("name", ["linen_remat", "nnx_chain", "equinox_chain"])
def test_networks_of_frameworks_are_copied(name, transform):
    network = zoo.build(name)
    found = transform(network.apply_fn, network.params, *network.example_args)
    again = copy.deepcopy(found)
    expected = found.apply(found.params, *network.example_args)
    actual = again.apply(again.params, *network.example_args)
    assert relative_deviation(actual, expected) <= 1e-14


@pytest.mark.parametrize("transform", [fcjax.merge, fcjax.front_contribute])
def test_what_cannot_be_pickled_says_so_itself(transform):
    found = transform(lambda p, x: x @ p["a"] @ p["c"], PARAMS, X)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(found)
    again = copy.deepcopy(found)
    assert relative_deviation(again.apply(again.params, X), found.apply(found.params, X)) == 0.0


def test_a_merged_network_decides_after_pickling_what_it_decided_before():
    merged = fcjax.merge(biased, PARAMS, X[:1])
    again = pickle.loads(pickle.dumps(merged))
    for size in (0, 1, 2, 300):
        x = np.resize(X, (size, 4))
        expected = merged.apply(merged.params, x)
        np.testing.assert_array_equal(again.apply(again.params, x), expected)
