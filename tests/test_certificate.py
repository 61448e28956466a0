"""The rank certificate: theory's table, brute force on random networks, and what strict says."""

from __future__ import annotations

import itertools
import re
import time

import jax
import jax.numpy as jnp
import law_networks
import numpy as np
import pytest

import fcjax
from fcjax.laws import certificate
from fcjax.laws.certificate import Certificate

ACTS = {"linear": lambda z: z, "relu": jax.nn.relu, "squared": lambda z: jax.nn.relu(z) ** 2}


def dense(rng, sizes, acts, biases=False, zeros=0.0):
    """Dense layers with some activations between them; some of the weights are zero."""
    params = []
    for a, b in itertools.pairwise(sizes):
        params.append({"w": law_networks.normal(rng, a, b) * (rng.random((a, b)) >= zeros)})
        if biases:
            params[-1]["b"] = law_networks.normal(rng, b)

    def apply(p, x):
        for layer, act in itertools.zip_longest(p, acts, fillvalue=ACTS["linear"]):
            x = act(x @ layer["w"] + layer.get("b", 0.0))
        return x

    return apply, params, jnp.ones((4, sizes[0]))


@pytest.mark.parametrize(
    ("sizes", "act", "expected"),
    [
        ((1, 3, 3, 1), "linear", (12, 12)),
        ((2, 3, 2), "linear", (5, 6)),
        ((1, 4, 1), "relu", (4, 4)),
        ((2, 4, 1), "relu", (4, 8)),
        ((1, 3, 3, 1), "relu", (6, 12)),
        ((3, 1), "linear", (0, 0)),
    ],
)
def test_table_of_the_theory(sizes, act, expected):
    network = dense(np.random.default_rng(0), sizes, [ACTS[act]] * (len(sizes) - 2))
    laws = fcjax.conservation_laws(*network)
    assert laws.rank() == expected
    determined, hidden = expected
    words = str(laws.certificate())
    if hidden:
        assert words.startswith(
            f"{determined} of {hidden} hidden degrees of freedom are determined"
        )
        rest = f"; the laws leave {hidden - determined} free"
        assert words.endswith(rest if determined < hidden else "hidden weights are its function")
    else:
        assert words == "no weights stand before the final layer"


def random_network(seed):
    rng = np.random.default_rng(seed)
    if seed % 5 == 4:
        return law_networks.build(seed)[:3]
    sizes = [int(n) for n in rng.integers(1, 5, int(rng.integers(3, 6)))]
    kind = list(ACTS.values())
    acts = [kind[i] for i in rng.integers(0, 3, len(sizes) - 2)]
    apply, params, x = dense(rng, sizes, acts, bool(seed % 2), zeros=0.3 * (seed % 3 == 0))
    return apply, params, (x,)


def law_values(laws, leaves):
    """All laws, by their definition."""
    found = []
    for group in laws.groups:
        blocks, size = group.symmetry.mixing
        total = 0.0
        for place in group.symmetry.places:
            rows = place.rows(leaves[place.leaf])
            rows = rows.reshape(blocks, size, rows.shape[-1])
            total = total + float(place.charge) * (rows @ rows.transpose(0, 2, 1))
        found.append(total[:, *np.triu_indices(size)].ravel())
    return np.concatenate(found)


def brute_force(laws, params):
    """The rank of the Jacobian of all laws with respect to all hidden weights, one by one.

    The derivative of a quadratic form is half the difference at the distance one.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    columns = []
    for leaf in laws._hidden:
        for index in np.ndindex(leaves[leaf].shape):
            ends = []
            for by in (1.0, -1.0):
                moved = list(leaves)
                moved[leaf] = leaves[leaf].copy()
                moved[leaf][index] += by
                ends.append(law_values(laws, moved))
            columns.append((ends[0] - ends[1]) / 2)
    return int(np.linalg.matrix_rank(np.array(columns), rtol=1e-9)) if columns else 0


@pytest.mark.parametrize("seed", range(50))
def test_brute_force(seed):
    apply_fn, params, args = random_network(seed)
    laws = fcjax.conservation_laws(apply_fn, params, *args)
    found = laws.certificate()
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(params)]
    assert found.exact
    assert found.hidden == sum(sizes[leaf] for leaf in laws._hidden)
    assert found.hidden == sum(row.size for row in found.layers)
    assert found.determined == (brute_force(laws, params) if len(laws) else 0)


EMPTY = [
    (0, 3, 2),
    (2, 0, 2),
    (2, 3, 0),
    (0, 0, 1),
    (2, 3, 0, 2),
    (2, 0, 3, 2),
    (1, 3, 3, 0),
    (0,) * 4,
]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("sizes", EMPTY)
def test_layers_of_no_units(sizes, act, biases):
    acts = [ACTS[act]] * (len(sizes) - 2)
    apply_fn, params, x = dense(np.random.default_rng(0), sizes, acts, biases)
    laws = fcjax.conservation_laws(apply_fn, params, x)
    assert len(laws) == len(laws.names) == laws.values(params).size
    assert laws.certificate().determined == (brute_force(laws, params) if len(laws) else 0)
    gradient = jax.grad(law_networks.scalar_loss(apply_fn, (x,)))(params)
    flow = jax.jvp(laws.values, (params,), (gradient,))[1]
    np.testing.assert_allclose(flow, 0.0, atol=1e-12)
    assert "inf" not in str(laws)


def test_hidden_weights_are_those_before_the_final_layer():
    apply_fn, params, x = dense(np.random.default_rng(0), (3, 4, 2), [ACTS["relu"]], biases=True)
    found = fcjax.conservation_laws(apply_fn, params, x).certificate()
    assert found == Certificate(4, 16, 4, found.layers)
    # elementwise products are layers too
    scaled = fcjax.conservation_laws(
        lambda p, x: x * p[0] * p[1], [jnp.ones(3)] * 2, jnp.ones((2, 3))
    )
    assert scaled.rank() == (3, 3)


def test_each_layer_by_itself():
    """Given all other layers, a relu layer has one determined weight for each unit at its ends."""
    network = dense(np.random.default_rng(0), (5, 3, 4, 1), [ACTS["relu"]] * 2)
    layers = fcjax.conservation_laws(*network).certificate().layers
    # of the second layer's 3 + 4 norms, one follows from the others: both sum up to all of it
    assert [(row.determined, row.size) for row in layers] == [(3, 15), (6, 12)]


def test_wide_relu_network_takes_no_time():
    network = dense(np.random.default_rng(0), (784, 256, 10), [ACTS["relu"]])
    laws = fcjax.conservation_laws(*network)
    start = time.perf_counter()
    found = laws.certificate()
    assert time.perf_counter() - start < 3
    assert (found.determined, found.hidden, found.exact) == (256, 200_704, True)
    assert "256 of 200,704 hidden degrees of freedom" in str(laws)


def test_wide_linear_networks_are_known():
    """Layers drop out one after another, whether they are narrower or wider than those before."""
    rng = np.random.default_rng(0)
    for sizes in ((80, 70, 60, 2), (2, 70, 75, 68, 2)):
        network = dense(rng, sizes, [ACTS["linear"]] * (len(sizes) - 2))
        found = fcjax.conservation_laws(*network).certificate()
        laws = sum(n * (n + 1) // 2 for n in sizes[1:-1])
        assert (found.determined, found.exact) == (min(laws, found.hidden), True)


VALUES = {
    "as they are": lambda w: w,
    "rounded": np.round,
    "of rank one": lambda w: np.linalg.svd(w)[0][:, :1] * w[:1],
    "orthogonal": lambda w: np.linalg.multi_dot(np.linalg.svd(w, full_matrices=False)[::2]),
}


@pytest.mark.parametrize("sizes", [(2, 5, 4, 3, 1), (1, 3, 6, 2), (3, 4, 4, 2), (2, 6, 5, 5, 1)])
@pytest.mark.parametrize("values", VALUES)
def test_without_the_matrix_of_derivatives(sizes, values, monkeypatch):
    """What is found layer by layer is the rank, or a bound; also for singular and equal values."""
    apply_fn, params, x = dense(
        np.random.default_rng(0), sizes, [ACTS["linear"]] * (len(sizes) - 2)
    )
    params = jax.tree.map(lambda w: jnp.asarray(VALUES[values](np.asarray(w))), params)
    laws = fcjax.conservation_laws(apply_fn, params, x)
    expected = brute_force(laws, params)
    assert laws.certificate().exact
    assert laws.rank()[0] == expected
    monkeypatch.setattr(certificate, "LARGEST", 0)
    without = laws.certificate()
    assert without.determined == expected if without.exact else without.determined >= expected
    if values == "as they are":
        assert without.exact


def test_a_bound_says_so(monkeypatch):
    """Convolutions one after another, of whose relations only a bound is known."""
    rng = np.random.default_rng(0)
    params = [law_networks.normal(rng, 1, 1, a, b) for a, b in ((2, 5), (5, 4), (4, 2))]
    params[1] = law_networks.normal(rng, 3, 3, 5, 4)

    def apply(p, x):
        for kernel in p:
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return x

    laws = fcjax.conservation_laws(apply, params, jnp.ones((1, 4, 4, 2)))
    assert laws.certificate().exact
    monkeypatch.setattr(certificate, "LARGEST", 0)
    bounded = laws.certificate()
    assert not bounded.exact
    assert bounded.determined >= brute_force(laws, params)
    assert str(bounded).startswith("at most 25 of 190 hidden degrees of freedom")


def test_strict_raises_with_the_certificate():
    network = dense(np.random.default_rng(0), (3, 4, 2), [ACTS["relu"]])
    with pytest.raises(fcjax.NotFoldableError, match="4 of 12 hidden degrees of freedom"):
        fcjax.front_contribute(*network, exactness="flow", strict=True)


def test_rank_inside_jit_is_refused():
    apply_fn, params, x = dense(np.random.default_rng(0), (3, 4, 2), [ACTS["relu"]])

    @jax.jit
    def rank(p):
        return fcjax.conservation_laws(apply_fn, p, x).rank()[0]

    message = "call rank and certificate outside jit"
    with pytest.raises(fcjax.FrontContributionError, match=re.escape(message)):
        rank(params)
