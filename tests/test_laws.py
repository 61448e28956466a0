"""Conservation laws: as many as there are, exactly conserved, and the discrete identity."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import law_networks
import numpy as np
import optax
import pytest

import fcjax
from fcjax.laws import plots as law_plots

ETA, DECAY, STEPS = 1e-2, 0.1, 4


def descend(laws, loss, params, learning_rate, decay):
    """Per step of SGD: the drift, the predicted drift, and the drift of half the step."""

    def moved(p, g, eta):
        return jax.tree.map(lambda w, g: w - eta * (g + decay * w), p, g)

    def step(p, _):
        g = jax.grad(loss)(p)
        after = moved(p, g, learning_rate)
        found = {
            "drift": laws.drift(p, after),
            "predicted": laws.predicted_drift(p, g, learning_rate, decay),
            "half": laws.drift(p, moved(p, g, learning_rate / 2)),
            "flow": jax.jvp(laws.values, (p,), (g,))[1],
            "size": jnp.max(jnp.abs(laws.values(p))),
        }
        return after, found

    return jax.jit(lambda p: jax.lax.scan(step, p, length=STEPS)[1])(params)


@pytest.mark.parametrize("seed", range(40))
def test_laws_of_random_networks(seed):
    """The count by hand, conservation under the flow, and the identity of the discrete step."""
    apply_fn, params, args, count = law_networks.build(seed)
    laws = fcjax.conservation_laws(apply_fn, params, *args)
    assert len(laws) == len(laws.names) == len(set(laws.names)) == count
    loss = law_networks.scalar_loss(apply_fn, args)
    run = jax.device_get(descend(laws, loss, params, ETA, decay=0.0))
    scale = run["size"].max()
    # Moving along the gradient itself changes no law, and does change single weights.
    assert np.abs(run["flow"]).max() < 1e-11 * scale
    assert np.abs(run["drift"] - run["predicted"]).max() < 1e-12 * scale
    # Of second order in the learning rate: half of it leaves a quarter.
    assert np.abs(run["drift"]).max() > 1e-9
    np.testing.assert_allclose(run["half"], run["drift"] / 4, atol=1e-12 * scale)


# --- the object ---------------------------------------------------------------------------------


def mlp():
    """A relu network with biases: 4 laws, and one for the gain behind it."""
    rng = np.random.default_rng(0)
    params = {
        "Dense_0": {"kernel": law_networks.normal(rng, 3, 4), "bias": law_networks.normal(rng, 4)},
        "Dense_1": {"kernel": law_networks.normal(rng, 4, 2)},
        "gain": jnp.ones(2),
    }

    def apply(p, x):
        hidden = jax.nn.relu(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
        return hidden @ p["Dense_1"]["kernel"] * p["gain"]

    return apply, params, law_networks.normal(rng, 5, 3)


def test_names_and_values_are_in_one_order():
    apply_fn, params, x = mlp()
    laws = fcjax.conservation_laws(apply_fn, params, x)
    assert laws.names == (
        *(f"Dense_0 -> Dense_1, unit {k}" for k in range(4)),
        *(f"Dense_1 -> gain, unit {k}" for k in range(2)),
    )
    w, b = params["Dense_0"]["kernel"], params["Dense_0"]["bias"]
    v, g = params["Dense_1"]["kernel"], params["gain"]
    expected = np.concatenate([(w**2).sum(0) + b**2 - (v**2).sum(1), (v**2).sum(0) - g**2])
    np.testing.assert_allclose(jax.jit(laws.values)(params), expected, rtol=1e-14)
    moved = jax.tree.map(lambda a: 2 * a, params)
    np.testing.assert_allclose(laws.drift(params, moved), 3 * expected, rtol=1e-13)


def test_entries_of_a_matrix_are_in_the_order_of_their_names():
    rng = np.random.default_rng(0)
    w, v = law_networks.normal(rng, 3, 2), law_networks.normal(rng, 2, 5)
    laws = fcjax.conservation_laws(
        lambda p, x: x @ p["a"] @ p["b"], {"a": w, "b": v}, jnp.ones((1, 3))
    )
    matrix = np.asarray(w.T @ w - v @ v.T)
    assert laws.names == tuple(f"a -> b, entry {ij}" for ij in ("(0, 0)", "(0, 1)", "(1, 1)"))
    np.testing.assert_allclose(laws.values({"a": w, "b": v}), matrix[np.triu_indices(2)])


@pytest.mark.parametrize("in_loss", [False, True])
def test_the_identity_with_weight_decay(in_loss):
    """Decay that the optimizer adds, as optax does it, and a penalty in the loss."""
    apply_fn, params, x = mlp()
    laws = fcjax.conservation_laws(apply_fn, params, x)
    data_loss = law_networks.scalar_loss(apply_fn, (x,))

    def penalty(p):
        return DECAY / 2 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))

    def loss(p):
        return data_loss(p) + (penalty(p) if in_loss else 0.0)

    decay = optax.identity() if in_loss else optax.add_decayed_weights(DECAY)
    optimizer = optax.chain(decay, optax.sgd(ETA))

    def step(carry, _):
        p, state = carry
        g = jax.grad(loss)(p)
        updates, state = optimizer.update(g, state, p)
        after = optax.apply_updates(p, updates)
        predicted = laws.predicted_drift(p, g, ETA, DECAY, in_loss=in_loss)
        return (after, state), laws.drift(p, after) - predicted

    run = jax.jit(lambda c: jax.lax.scan(step, c, length=20))
    (last, _), errors = run((params, optimizer.init(params)))
    assert np.abs(errors).max() < 1e-13
    # in twenty steps the laws themselves shrink as the flow says, up to the square of the rate
    shrunk = np.exp(-2 * ETA * DECAY * 20) * np.asarray(laws.values(params))
    np.testing.assert_allclose(laws.values(last), shrunk, atol=0.05)
    assert np.abs(laws.drift(params, last)).max() > 1e-3


def test_drift_over_a_fixed_time_halves_with_the_learning_rate():
    """Each step drifts by the square of the rate, and the time takes one step more for each."""
    apply_fn, params, (x,), _ = law_networks.linear_chain(np.random.default_rng(0))
    laws = fcjax.conservation_laws(apply_fn, params, x)

    def loss(p):
        return jnp.mean((apply_fn(p, x) - 1.0) ** 2)

    ends = []
    for rate in (0.08, 0.04, 0.02, 0.01):
        values = law_plots.drifts(laws, loss, params, rate, round(4 / rate))
        ends.append(np.abs(values[-1] - values[0]).max())
    for larger, smaller in itertools.pairwise(ends):
        assert 1.8 < larger / smaller < 2.2


def test_a_network_without_laws_says_why():
    params, x = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((5, 3))
    laws = fcjax.conservation_laws(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, x)
    assert len(laws) == 0
    assert laws.names == ()
    assert laws.values(params).shape == (0,)
    assert laws.rank() == (0, 12)
    assert "no conservation laws" in str(laws)
    assert "tanh" in laws.reason
    single = fcjax.conservation_laws(lambda p, x: x @ p, jnp.ones((3, 4)), x)
    assert single.reason == "no hidden unit can be scaled without changing the output"


def test_the_table_lists_layers_counts_ranges_and_ranks():
    apply_fn, params, x = mlp()
    printed = str(fcjax.conservation_laws(apply_fn, params, x))
    assert printed.startswith("fcjax: 6 conservation laws of gradient flow")
    row = next(line for line in printed.split("\n") if line.startswith("Dense_0 -> Dense_1"))
    laws = fcjax.conservation_laws(apply_fn, params, x)
    values = np.asarray(laws.values(params))[:4]
    assert row.split() == ["Dense_0", "->", "Dense_1", "4", "one", "a", "unit",
                           f"{values.min():.3g}", f"{values.max():.3g}"]  # fmt: skip
    assert "4 of 16" in printed
    assert "6 of 24 hidden degrees of freedom" in printed
    assert repr(laws) == "ConservationLaws(6 laws in 2 groups)"


def test_params_that_were_donated():
    apply_fn, params, x = mlp()
    laws = fcjax.conservation_laws(apply_fn, params, x)
    trained = jax.jit(lambda p: jax.tree.map(lambda w: 2 * w, p), donate_argnums=0)(params)
    assert str(laws) == "fcjax: 6 laws of gradient flow, of params without known values"
    with pytest.raises(
        fcjax.FrontContributionError, match=r"have been donated.*pass others as params="
    ):
        laws.rank()
    assert laws.rank(trained) == (6, 24)


def test_groups_with_one_name_are_numbered():
    """Two hidden layers between the same layers, by name."""
    rng = np.random.default_rng(0)
    params = {"w": [law_networks.normal(rng, 3, 3) for _ in range(2)]}

    def apply(p, x):
        a, b = p["w"]
        return jax.nn.relu(jax.nn.relu(x @ a)[:, :1] @ a[:1] @ b)

    laws = fcjax.conservation_laws(apply, params, jnp.ones((2, 3)))
    assert len(set(laws.names)) == len(laws.names) == len(laws)


@pytest.mark.parametrize("times", [2, 3])
def test_gains_of_what_is_joined_have_a_law_an_entry(times):
    """The parts of an axis stand beside the rows, and not beside each other."""
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(2, 2 * times))) for name in ("a", "b")}
    x = jnp.asarray(rng.normal(size=(2, 2)))

    def scaled(p, x):
        return jnp.concatenate([x] * times, 1) * p["a"] * p["b"]

    laws = fcjax.conservation_laws(scaled, params, x)
    assert len(laws) == 4 * times
    assert laws.rank() == (4 * times, 4 * times)
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(scaled(p, x))))(params)
    flow = jax.jvp(laws.values, (params,), (gradient,))[1]
    np.testing.assert_allclose(flow, 0, atol=1e-14)


def test_laws_of_look_ups_are_those_of_rows_that_stand_in_the_table():
    """Beside the table ``x[i]`` gives the nearest row, to which JAX passes no gradient."""
    rng = np.random.default_rng(0)
    params = {
        "table": jnp.asarray(rng.normal(size=(5, 3))),
        "w": jnp.asarray(rng.normal(size=(3, 2))),
    }
    apply_fn = lambda p, i: jnp.tanh(p["table"][i] @ p["w"])  # noqa: E731
    laws = fcjax.conservation_laws(apply_fn, params, jnp.arange(4))

    def change(indices):
        gradient = jax.grad(lambda p: jnp.sum(apply_fn(p, indices) ** 2))(params)
        return np.abs(jax.jvp(laws.values, (params,), (gradient,))[1]).max()

    assert len(laws) == 6
    assert change(jnp.array([0, 4, -1, 4])) < 1e-14 < 1e-3 < change(jnp.array([0, 4, 9, 4]))


def test_functions_of_integers_with_a_derivative_of_their_own_are_none_of_units():
    @jax.custom_jvp
    def rounded(x):
        return jnp.round(4 * x) / 4

    rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0]))
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(3, 4))), "b": jnp.asarray(rng.normal(size=(4, 2)))}
    apply_fn = lambda p, n, x: rounded(n) * (x @ p["a"] @ p["b"])  # noqa: E731
    laws = fcjax.conservation_laws(apply_fn, params, jnp.int32(3), jnp.ones((5, 3)))
    assert len(laws) == 10


def test_bad_arguments_are_refused_as_by_front_contribute():
    apply_fn, params, x = mlp()
    with pytest.raises(fcjax.FrontContributionError, match="apply_fn must be a function"):
        fcjax.conservation_laws(None, params, x)
    with pytest.raises(fcjax.FrontContributionError, match="params is empty"):
        fcjax.conservation_laws(apply_fn, {}, x)
    with pytest.raises(fcjax.FrontContributionError, match="could not be traced"):
        fcjax.conservation_laws(apply_fn, params, jnp.ones((5, 7)))
    with pytest.raises(fcjax.FrontContributionError, match="nothing differentiable"):
        fcjax.conservation_laws(lambda p, x: x, params, x)
    laws = fcjax.conservation_laws(apply_fn, params, x)
    with pytest.raises(fcjax.FrontContributionError, match="another structure"):
        laws.values({"gain": jnp.ones(2)})
    wrong = {**params, "gain": jnp.ones(3)}
    with pytest.raises(fcjax.FrontContributionError, match="params leaf gain has shape"):
        laws.drift(params, wrong)


def test_the_input_is_inferred_as_by_front_contribute():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    laws = fcjax.conservation_laws(lambda p, x: x @ p["a"] @ p["b"], params)
    assert len(laws) == 10


# --- pictures -----------------------------------------------------------------------------------


def test_plot_draws_one_line_for_each_learning_rate(tmp_path):
    apply_fn, params, x = mlp()
    path = tmp_path / "laws.png"
    figure = law_plots.plot_drift(apply_fn, params, x, rates=(0.1, 0.05), total=0.5, path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    values, drift, ends = figure.axes
    assert len(values.lines) == 6
    assert [line.get_label() for line in drift.lines] == ["0.1", "0.05"]
    first, second = ends.lines[0].get_ydata()
    assert 1.5 < first / second < 2.5


def test_plot_refuses_what_it_cannot_draw():
    apply_fn, params, x = mlp()
    with pytest.raises(fcjax.FrontContributionError, match="nothing to draw"):
        law_plots.plot_drift(lambda p, x: x @ p, jnp.ones((3, 4)), x)
    with pytest.raises(fcjax.FrontContributionError, match="returns one array, not a tuple"):
        law_plots.plot_drift(lambda p, x: (apply_fn(p, x), 1.0), params, x)
