"""`verify` against trainings whose difference is known."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fcjax
from fcjax.errors import FrontContributionError

STEPS = 4


@dataclasses.dataclass(frozen=True)
class Altered:
    """A transform of `apply_fn` that is wrong on purpose, by `change`."""

    apply_fn: Any
    params: Any
    change: Any

    def apply(self, params, *args):
        return self.change(self.apply_fn(params, *args))

    def expand(self, params):
        return params


def mlp(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


def mlp_params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "w1": jax.random.normal(keys[0], (3, 8)),
        "b1": jnp.zeros(8),
        "w2": jax.random.normal(keys[1], (8, 2)),
    }


def make_batches(steps=STEPS, rows=5):
    keys = jax.random.split(jax.random.key(1), steps)
    return [(jax.random.normal(key, (rows, 3)), jnp.ones((rows, 2))) for key in keys]


def squared_error(apply, params, batch):
    x, y = batch
    return jnp.mean((apply(params, x) - y) ** 2)


def identical():
    return Altered(mlp, mlp_params(), lambda y: y)


def slightly_larger(by=1e-3):
    return Altered(mlp, mlp_params(), lambda y: y * (1 + by))


def rounding():
    return 100 * float(jnp.finfo(jnp.result_type(float)).eps)


def test_front_contribution_matches_backprop():
    fc = fcjax.front_contribute(mlp, mlp_params(), jnp.ones((5, 3)))
    result = fcjax.verify(fc, squared_error, make_batches(), optax.sgd(0.1))
    assert result.max_output_deviation < rounding()
    assert result.max_param_deviation < rounding()
    assert result.output_deviations.shape == result.param_deviations.shape == (STEPS,)
    np.testing.assert_allclose(result.losses["fc"], result.losses["backprop"], rtol=rounding())


def test_losses_are_those_of_a_plain_training_loop():
    optimizer, params = optax.adam(0.1), mlp_params()
    state, losses = optimizer.init(params), []
    for batch in make_batches():
        loss, gradient = jax.value_and_grad(lambda p, b: squared_error(mlp, p, b))(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    result = fcjax.verify(identical(), squared_error, make_batches(), optimizer)
    np.testing.assert_allclose(result.losses["backprop"], losses, rtol=1e-5)
    np.testing.assert_allclose(result.params["backprop"]["w1"], params["w1"], rtol=1e-4)


def test_a_wrong_output_is_measured():
    result = fcjax.verify(slightly_larger(1e-3), squared_error, make_batches(1), optax.sgd(0.0))
    assert result.max_output_deviation == pytest.approx(1e-3, rel=1e-2)
    assert result.max_param_deviation == 0.0


def test_a_wrong_gradient_is_measured():
    fc = Altered(mlp, mlp_params(), lambda y: y + 0.1 * (y - jax.lax.stop_gradient(y)))
    result = fcjax.verify(fc, squared_error, make_batches(1), optax.sgd(0.1))
    assert result.max_output_deviation < rounding()
    assert result.max_param_deviation > 1e-4


def inner_jit(apply, params, batch):
    return jax.jit(lambda p: squared_error(apply, p, batch))(params)


def inner_checkpoint(apply, params, batch):
    return jax.checkpoint(lambda p: squared_error(apply, p, batch))(params)


def inner_vmap(apply, params, batch):
    return jnp.mean(jax.vmap(lambda x, y: squared_error(apply, params, (x, y)))(*batch))


def inner_scan(apply, params, batch):
    def body(total, row):
        return total + squared_error(apply, params, row), None

    return jax.lax.scan(body, 0.0, batch)[0]


def inner_gradient(apply, params, batch):
    x, y = batch
    slope = jax.grad(lambda x: squared_error(apply, params, (x, y)))(x)
    return squared_error(apply, params, batch) + jnp.mean(slope**2)


@pytest.mark.parametrize(
    "loss_fn", [squared_error, inner_jit, inner_checkpoint, inner_vmap, inner_scan, inner_gradient]
)
def test_outputs_are_seen_through_transformations(loss_fn):
    result = fcjax.verify(slightly_larger(1e-3), loss_fn, make_batches(1), optax.sgd(0.0))
    assert result.max_output_deviation == pytest.approx(1e-3, rel=1e-2)


def test_every_call_is_compared():
    def wrong_for_large_inputs(params, x):
        return jnp.where(jnp.max(x) > 50, 1.5, 1.0) * mlp(params, x)

    fc = dataclasses.replace(identical(), change=lambda y: y)
    object.__setattr__(fc, "apply", wrong_for_large_inputs)

    def second_call_differs(apply, params, batch):
        again = apply(params, 100 + batch[0])
        return squared_error(apply, params, batch) + jnp.mean(again**2)

    result = fcjax.verify(fc, second_call_differs, make_batches(1), optax.sgd(0.0))
    assert result.max_output_deviation == pytest.approx(0.5, rel=1e-3)


def test_outputs_may_be_any_pytree():
    def apply_fn(params, x):
        return {"y": mlp(params, x), "label": jnp.argmax(x, axis=-1), "none": None}

    def loss_fn(apply, params, batch):
        outputs = apply(params, batch[0])
        assert outputs["none"] is None
        return jnp.mean(outputs["y"] ** 2) + 0 * jnp.sum(outputs["label"])

    fc = Altered(apply_fn, mlp_params(), lambda outputs: outputs)
    result = fcjax.verify(fc, loss_fn, make_batches(), optax.sgd(0.1))
    assert result.max_output_deviation < rounding()


def test_leaves_without_true_gradient_are_named_and_left_out():
    def normalised(params, x):
        y = x @ params["layer"]["kernel"] + params["layer"]["bias"]
        return (y - y.mean(0)) / jnp.sqrt(y.var(0) + 1e-5) * params["gain"]

    params = {
        "layer": {"kernel": mlp_params()["w1"], "bias": jnp.zeros(8)},
        "gain": jnp.ones(8),
        "unused": jnp.ones(3),
    }

    def loss_fn(apply, params, batch):
        return jnp.mean((apply(params, batch[0]) - jnp.arange(8.0)) ** 2 * batch[0][:, :1])

    # The same function, rounded differently.
    fc = Altered(normalised, params, lambda y: (y * 1.1) / 1.1)
    result = fcjax.verify(fc, loss_fn, make_batches(20, rows=64), optax.adam(1e-2))
    assert result.zero_gradient_leaves == ("layer/bias", "unused")
    assert result.max_param_deviation < 1e-3
    assert "layer/bias" in str(result)


def attention(params, x):
    """Attention whose queries, keys and values share one bias; the keys' part has no gradient."""
    q, k, v = jnp.split(x @ params["kernel"] + params["bias"], 3, axis=-1)
    weights = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2), where=jnp.tri(len(q), dtype=bool))
    return weights @ v @ params["out"]


def attention_params():
    params = {"kernel": jax.random.normal(jax.random.key(2), (3, 24)), "bias": jnp.ones(24)}
    return params | {"out": mlp_params()["w2"]}


def test_entries_without_true_gradient_are_told_from_the_others_of_their_leaf():
    def otherwise_rounded(params, x):
        return attention(params | {"kernel": params["kernel"][::-1]}, x[:, ::-1])

    fc = Altered(attention, attention_params(), lambda y: y)
    object.__setattr__(fc, "apply", otherwise_rounded)
    optimizer = optax.adam(1e-2, eps=1e-30)
    result = fcjax.verify(fc, squared_error, make_batches(20, rows=16), optimizer)
    assert result.zero_gradient_leaves == ()
    assert result.left_out == {"bias": (8, 24)}
    assert "  bias: 8 of 24 entries" in str(result)
    assert result.max_param_deviation < 1e-3
    bias = [np.asarray(result.params[side]["bias"]) for side in ("backprop", "fc")]
    assert np.max(np.abs(bias[0] - bias[1])[8:16]) > 1e-2  # or there would be nothing to leave out


def rows_of_a_table(params, rows):
    return params["table"][rows] @ params["out"]


def table_params():
    return {"table": jax.random.normal(jax.random.key(3), (6, 8)), "out": mlp_params()["w2"]}


def table_batches():
    return [(jnp.array([0, 1, 1, 4]), jnp.ones((4, 2)))] * STEPS


def test_a_gradient_where_there_is_none_is_measured():
    def stray(params, rows):
        idle = params["table"][5].sum()  # no batch reads this row
        return rows_of_a_table(params, rows) + idle - jax.lax.stop_gradient(idle)

    fc = Altered(rows_of_a_table, table_params(), lambda y: y)
    object.__setattr__(fc, "apply", stray)
    result = fcjax.verify(fc, squared_error, table_batches(), optax.sgd(0.1))
    assert result.max_output_deviation < rounding()
    assert result.max_param_deviation > 1e-2


def test_weights_without_any_gradient_are_compared():
    fc = Altered(rows_of_a_table, table_params(), lambda y: y)
    object.__setattr__(fc, "expand", lambda p: p | {"table": p["table"].at[5].set(1.0)})
    decay = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1))
    result = fcjax.verify(fc, squared_error, table_batches(), decay)
    assert result.left_out == {}
    assert result.param_deviations[-1] > 1e-2


def test_only_the_first_leaves_that_are_left_out_are_printed():
    paths = {f"layer_{i}": (3, 3) for i in range(14)}
    result = fcjax.verify(identical(), squared_error, make_batches(1), optax.sgd(0.1))
    lines = str(dataclasses.replace(result, left_out=paths)).splitlines()
    assert lines[-2:] == ["  layer_9", "  and 4 more"]


def plain_loop(optimizer, steps=STEPS):
    """Losses of a training loop that gives the optimizer all that optax's may want."""
    params = mlp_params()
    state, losses = optimizer.init(params), []

    @jax.jit
    def step(params, state, batch):
        value_fn = lambda p: squared_error(mlp, p, batch)  # noqa: E731
        loss, gradient = jax.value_and_grad(value_fn)(params)
        more = {"value": loss, "grad": gradient, "value_fn": value_fn}
        updates, state = optimizer.update(gradient, state, params, **more)
        return optax.apply_updates(params, updates), state, loss

    for batch in make_batches(steps):
        params, state, loss = step(params, state, batch)
        losses.append(loss)
    return losses


BY_THE_LOSS = {
    "plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
    "polyak": optax.polyak_sgd(0.1),
    "momo": optax.contrib.momo(0.1),
    "line search": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(8)),
}


@pytest.mark.parametrize("name", BY_THE_LOSS)
def test_optimizers_that_want_the_loss(name):
    optimizer = BY_THE_LOSS[name]
    fc = fcjax.front_contribute(mlp, mlp_params(), jnp.ones((5, 3)))
    result = fcjax.verify(fc, squared_error, make_batches(), optimizer)
    np.testing.assert_allclose(result.losses["backprop"], plain_loop(optimizer), rtol=1e-9)
    assert result.max_param_deviation < 1e-9


def test_lbfgs():
    fc = Altered(lambda w, x: x @ w, jnp.ones((3, 2)), lambda y: y)
    optimizer = optax.lbfgs(memory_size=1, linesearch=optax.scale_by_zoom_linesearch(2))
    result = fcjax.verify(fc, squared_error, make_batches(1) * 3, optimizer)
    assert result.losses["backprop"][-1] < 0.5 * result.losses["backprop"][0]
    assert result.max_param_deviation < rounding()


def test_optimizers_that_want_yet_more():
    def update(updates, state, params=None, *, hessian, **_):
        return updates, state

    optimizer = optax.GradientTransformationExtraArgs(lambda _: (), update)
    with pytest.raises(FrontContributionError, match=r"wants more than the value=.*'hessian'"):
        fcjax.verify(identical(), squared_error, make_batches(), optimizer)


def test_a_type_error_of_the_optimizer_passes():
    optimizer = optax.stateless(lambda updates, _: updates + 1)
    with pytest.raises(TypeError, match="unsupported operand"):
        fcjax.verify(identical(), squared_error, make_batches(), optimizer)


def test_params_that_were_donated():
    fc = fcjax.front_contribute(mlp, mlp_params(), jnp.ones((5, 3)))
    step = jax.jit(lambda p: jax.tree.map(lambda w: 2 * w, p), donate_argnums=0)
    trained = step(jax.tree.map(jnp.copy, fc.params))
    assert fcjax.verify(fc, squared_error, make_batches(), optax.sgd(0.1)).max_param_deviation < 1
    step(fc.params)
    assert str(fc)
    with pytest.raises(FrontContributionError, match=r"fc\.params have been donated.*train a copy"):
        fcjax.verify(fc, squared_error, make_batches(), optax.sgd(0.1))
    assert fc.apply(trained, jnp.ones((5, 3))).shape == (5, 2)


def test_integer_leaves_are_carried_along():
    params = mlp_params() | {"steps": jnp.arange(2), "key": jax.random.key(3)}
    fc = Altered(lambda p, x: mlp(p, x) * p["steps"][1], params, lambda y: y)
    result = fcjax.verify(fc, squared_error, make_batches(), optax.adam(0.1))
    assert result.max_param_deviation < rounding()
    np.testing.assert_array_equal(result.params["backprop"]["steps"], [0, 1])


def test_mixed_precision():
    params = mlp_params()
    params["w2"] = params["w2"].astype(jnp.bfloat16)
    fc = Altered(lambda p, x: mlp(p, x).astype(jnp.bfloat16), params, lambda y: y)
    result = fcjax.verify(fc, squared_error, make_batches(), optax.sgd(0.1))
    assert result.max_output_deviation == 0.0
    assert result.losses["fc"].dtype == np.float64


def test_batches_may_be_a_generator_of_several_shapes():
    batches = (make_batches(1, rows)[0] for rows in (5, 5, 3))
    result = fcjax.verify(identical(), squared_error, batches, optax.sgd(0.1))
    assert result.output_deviations.shape == (3,)


def test_each_side_is_compiled_once():
    traces = []

    def loss_fn(apply, params, batch):
        traces.append(apply)
        return squared_error(apply, params, batch)

    fcjax.verify(identical(), loss_fn, make_batches(10), optax.sgd(0.1))
    once = len(traces)
    traces.clear()
    fcjax.verify(identical(), loss_fn, make_batches(1), optax.sgd(0.1))
    assert len(traces) == once


def test_plot_and_table(tmp_path):
    result = fcjax.verify(slightly_larger(), squared_error, make_batches(20), optax.sgd(0.1))
    figure = result.plot(tmp_path / "verify.png")
    assert len(figure.axes) == 2
    assert (tmp_path / "verify.png").read_bytes().startswith(b"\x89PNG")
    lines = str(result).splitlines()
    assert lines[1].split()[0] == "0"
    assert lines[8].split()[0] == "19"
    assert f"{result.max_output_deviation:.2e}" in str(result)


def test_no_batches():
    with pytest.raises(FrontContributionError, match="batches is empty"):
        fcjax.verify(identical(), squared_error, [], optax.sgd(0.1))


@pytest.mark.parametrize(
    ("loss_fn", "found"),
    [
        (lambda apply, p, b: (apply(p, b[0]) - b[1]) ** 2, r"\[5, 2\]"),
        (lambda apply, p, b: (squared_error(apply, p, b), 1.0), r"\(.*\[\]"),
        (lambda apply, p, b: jnp.argmax(apply(p, b[0])), r"int\d+\[\]"),
        (lambda apply, p, b: None, "None"),
    ],
)
def test_loss_that_is_no_scalar(loss_fn, found):
    with pytest.raises(FrontContributionError, match=f"must return one real number.*{found}"):
        fcjax.verify(identical(), loss_fn, make_batches(), optax.sgd(0.1))


def test_loss_that_ignores_apply():
    with pytest.raises(FrontContributionError, match="never calls the apply it is given"):
        fcjax.verify(
            identical(),
            lambda apply, p, b: squared_error(mlp, p, b),
            make_batches(),
            optax.sgd(0.1),
        )


def test_optimizer_that_is_none():
    with pytest.raises(FrontContributionError, match=r"optax\.GradientTransformation.*float"):
        fcjax.verify(identical(), squared_error, make_batches(), 0.1)
