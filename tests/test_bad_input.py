"""Unusable arguments raise, naming the argument or layer and the remedy."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo

import fcjax

X = jnp.ones((64, 4))


def apply_chain(params, x):
    """Two dense layers."""
    return x @ params["first"]["kernel"] @ params["second"]["kernel"]


def chain_params():
    """Parameters of `apply_chain`."""
    first, second = zoo.weights((4, 16), (16, 3))
    return {"first": {"kernel": first}, "second": {"kernel": second}}


def refused(match, apply_fn, params, *args, **options):
    """Assert that `front_contribute` refuses with a message that matches."""
    with pytest.raises(fcjax.FrontContributionError, match=match):
        fcjax.front_contribute(apply_fn, params, *args, **options)


def test_input_is_inferred_for_a_dense_network():
    fc = fcjax.front_contribute(apply_chain, chain_params())
    assert [row.rule for row in fc.report] == ["collapse", "collapse"]
    np.testing.assert_allclose(fc.apply(fc.params, X), apply_chain(chain_params(), X), rtol=1e-12)


def test_input_is_inferred_for_flax_layers_with_biases():
    network = zoo.build("linear_depth_4_biases")
    fc = fcjax.front_contribute(network.apply_fn, network.params)
    expected = network.apply_fn(network.params, *network.example_args)
    np.testing.assert_allclose(fc.apply(fc.params, *network.example_args), expected, rtol=1e-12)


def test_no_example_with_two_inputs():
    refused(
        "(?i)example",
        lambda params, x, y: apply_chain(params, x) + apply_chain(params, y),
        chain_params(),
    )


def test_no_example_where_several_widths_fit():
    refused("(?i)example", lambda params, x: jnp.tanh(x) * params["scale"], {"scale": jnp.ones(())})


def test_no_example_where_no_width_fits():
    network = zoo.build("reshapes_and_transposes")
    refused("(?i)example", network.apply_fn, network.params)


def test_wrong_width():
    refused(r"(?s)64, ?5.*(shape|example)", apply_chain, chain_params(), jnp.ones((64, 5)))


def test_wrong_number_of_arguments():
    refused("(?i)arguments", apply_chain, chain_params(), X, X)


@pytest.mark.parametrize("leaf", [1.5, "relu", jax.nn.relu], ids=["float", "string", "function"])
def test_leaf_that_is_no_array(leaf):
    params = {**chain_params(), "extra": {"leaf": leaf}}
    refused(r"extra.*leaf.*array", apply_chain, params, X)


@pytest.mark.parametrize("params", [{}, [], None, {"first": {}}], ids=str)
def test_empty_params(params):
    refused("params.*empty", lambda params, x: x, params, X)


def test_params_without_floating_leaf():
    refused("params", lambda params, x: x * params["n"], {"n": jnp.arange(4)}, X)


def test_nan_in_params_names_the_leaf():
    params = chain_params()
    params["second"]["kernel"] = params["second"]["kernel"].at[0, 0].set(jnp.nan)
    refused("second.*kernel.*NaN", apply_chain, params, X)


def test_apply_fn_that_is_no_function():
    refused("apply_fn.*function", nn.Dense(3), chain_params(), X)


def test_untraceable_apply_fn():
    def branches_on_values(params, x):
        return apply_chain(params, x) if float(x[0, 0]) > 0 else x

    refused("apply_fn.*trace", branches_on_values, chain_params(), X)


def test_error_inside_apply_fn_keeps_its_message():
    def broken(params, x):
        raise KeyError("no such layer")

    refused("(?s)apply_fn.*no such layer", broken, chain_params(), X)


@pytest.mark.parametrize(
    "apply_fn",
    [
        lambda params, x: jnp.argmax(apply_chain(params, x), axis=-1),
        lambda params, x: jnp.tanh(x),
        lambda params, x: None,
        lambda params, x: jax.lax.stop_gradient(apply_chain(params, x)),
    ],
    ids=["integers", "without params", "nothing", "stopped"],
)
def test_nothing_differentiable(apply_fn):
    refused("apply_fn.*differentiable", apply_fn, chain_params(), X)


class TrainsItsStatistics(nn.Module):
    """A dense layer with BatchNorm in training mode."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))


def test_mutated_flax_state():
    module = TrainsItsStatistics()
    variables = module.init(jax.random.key(0), X)
    stats = variables["batch_stats"]

    def apply_fn(params, x):
        return module.apply({"params": params, "batch_stats": stats}, x)

    refused("(?s)mutat.*mutable", apply_fn, variables["params"], X)


@pytest.mark.parametrize("optimizer", [0.1, "adam", optax.adam], ids=["number", "name", "factory"])
def test_optimizer_that_is_no_transformation(optimizer):
    refused(
        "optimizer.*GradientTransformation", apply_chain, chain_params(), X, optimizer=optimizer
    )


@pytest.mark.parametrize("argument", ["exactness", "objective"])
@pytest.mark.parametrize("value", ["fast", None, 1])
def test_unknown_option_lists_the_known_ones(argument, value):
    known = {"exactness": "discrete.*flow.*approximate", "objective": "time.*memory"}[argument]
    refused(f"{argument}.*{known}", apply_chain, chain_params(), X, **{argument: value})


def test_data_needs_an_optimizer():
    refused("optimizer", apply_chain, chain_params(), X, data=X)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (jnp.ones((64, 5)), "shape"),
        (jnp.full((64, 4), jnp.nan), "NaN"),
        ((X, X), "2 arrays"),
    ],
)
def test_unusable_data(data, match):
    refused(match, apply_chain, chain_params(), X, data=data, optimizer=optax.sgd(0.1))


def low_rank_inputs():
    """Inputs that span three of eight dimensions, and one that lies elsewhere."""
    basis, coordinates = zoo.weights((3, 8), (64, 3))
    return coordinates @ basis, jnp.ones((64, 8))


def apply_relu(params, x):
    """A network whose first layer can only be compressed to the span of its inputs."""
    return jax.nn.relu(x @ params["first"]) @ params["second"]


def relu_params():
    """Parameters of `apply_relu`."""
    first, second = zoo.weights((8, 16), (16, 3))
    return {"first": first, "second": second}


def test_example_leaves_the_span_of_the_data():
    inside, elsewhere = low_rank_inputs()
    options = {"data": inside, "optimizer": optax.sgd(0.1)}
    refused("first.*span|span.*first", apply_relu, relu_params(), elsewhere, **options)


def test_known_input_of_a_call_leaves_the_span_of_the_data():
    inside, elsewhere = low_rank_inputs()
    fc = fcjax.front_contribute(
        apply_relu, relu_params(), inside, data=inside, optimizer=optax.sgd(0.1)
    )
    with pytest.raises(fcjax.FrontContributionError, match="expand"):
        fc.apply(fc.params, elsewhere)
    np.testing.assert_allclose(
        fc.apply(fc.params, 3 * inside[:5]), apply_relu(relu_params(), 3 * inside[:5]), rtol=1e-10
    )


def apply_embedding(params, ids):
    """Two readings of a table."""
    return jnp.tanh(params["table"][ids] + jnp.take(params["table"], ids // 2, axis=0)).sum(1)


def test_example_reads_rows_that_the_data_do_not():
    ids = jnp.arange(12).reshape(4, 3)
    (table,) = zoo.weights((50, 4))
    options = {"data": ids, "optimizer": optax.adam(0.1)}
    refused("table", apply_embedding, {"table": table}, ids + 30, **options)


def test_row_that_the_data_did_not_read_cannot_go_unseen():
    ids = jnp.arange(12).reshape(4, 3)
    (table,) = zoo.weights((50, 4))
    fc = fcjax.front_contribute(
        apply_embedding, {"table": table}, ids, data=ids, optimizer=optax.adam(0.1)
    )
    assert fc.params["table"].shape == (12, 4)
    outputs = fc.apply(fc.params, ids.at[0, 0].set(40))
    assert np.isnan(outputs[0]).all()
    np.testing.assert_allclose(outputs[1:], apply_embedding({"table": table}, ids)[1:], rtol=1e-12)


def test_full_parameters_that_training_cannot_reach():
    wide = dict(zip(("first", "second"), zoo.weights((4, 64), (64, 3)), strict=True))
    fc = fcjax.front_contribute(
        lambda p, x: x @ p["first"] @ p["second"], wide, X, optimizer=optax.sgd(0.1)
    )
    with pytest.raises(fcjax.FrontContributionError, match="second"):
        fc.reduce(jax.tree.map(lambda leaf: leaf[::-1], wide))


def test_call_that_reads_a_compressed_space():
    wide = dict(zip(("first", "second"), zoo.weights((4, 64), (64, 3)), strict=True))

    def apply_fn(params, x, return_hidden=False):
        hidden = x @ params["first"]
        return hidden if return_hidden else hidden @ params["second"]

    fc = fcjax.front_contribute(apply_fn, wide, X, optimizer=optax.sgd(0.1))
    assert fc.params["first"].shape == (4, 7)
    with pytest.raises(fcjax.FrontContributionError, match=r"first.*expand"):
        fc.apply(fc.params, X, return_hidden=True)


def test_saddle():
    zeros = {"first": jnp.zeros((4, 16)), "second": jnp.zeros((16, 3))}
    refused(
        "first, second.*saddle",
        lambda p, x: x @ p["first"] @ p["second"],
        zeros,
        X,
        optimizer=optax.sgd(0.1),
    )


def test_strict_names_the_layers_that_stay():
    network = zoo.build("relu_mlp")
    with pytest.raises(fcjax.NotFoldableError, match=r"(?s)layers_0.*kernel.*strict"):
        fcjax.front_contribute(network.apply_fn, network.params, *network.example_args, strict=True)


def test_strict_accepts_a_single_layer():
    network = zoo.build("linear_depth_1")
    fc = fcjax.front_contribute(
        network.apply_fn, network.params, *network.example_args, strict=True
    )
    assert [row.rule for row in fc.report] == ["train"]


WRONG_STRUCTURES = {
    "missing layer": lambda params: {"first": params["first"]},
    "extra layer": lambda params: {**params, "third": jnp.ones(3)},
    "another container": lambda params: list(params.values()),
    "none": lambda params: None,
}


@pytest.mark.parametrize("wrong", WRONG_STRUCTURES)
@pytest.mark.parametrize("method", ["apply", "expand", "reduce", "apply_with"])
def test_params_of_the_wrong_structure(method, wrong):
    fc = fcjax.front_contribute(apply_chain, chain_params(), X)
    params = WRONG_STRUCTURES[wrong](fc.params)
    calls = {
        "apply": lambda: fc.apply(params, X),
        "apply_with": lambda: fc.apply_with(params, fc.contributions, X),
        "expand": lambda: fc.expand(params),
        "reduce": lambda: fc.reduce(params),
    }
    with pytest.raises(fcjax.FrontContributionError, match=r"(?s)structure.*expected"):
        calls[method]()


@pytest.mark.parametrize("method", ["apply", "expand", "reduce"])
def test_params_of_the_wrong_shape_name_the_leaf(method):
    fc = fcjax.front_contribute(apply_chain, chain_params(), X)
    params = {**fc.params, "second": {"kernel": jnp.ones((16, 5))}}
    args = (X,) if method == "apply" else ()
    with pytest.raises(fcjax.FrontContributionError, match=r"second.*kernel.*\(16, 5\)"):
        getattr(fc, method)(params, *args)


def test_wrong_shape_of_data_in_a_later_call():
    fc = fcjax.front_contribute(apply_chain, chain_params(), X)
    with pytest.raises(fcjax.FrontContributionError, match=r"64, ?5"):
        fc.apply(fc.params, jnp.ones((64, 5)))


def test_infinite_weights_in_a_segment():
    params = chain_params()
    params["first"]["kernel"] = params["first"]["kernel"].at[0, 0].set(jnp.inf)
    refused("first/kernel.*infinite", apply_chain, params, X, optimizer=optax.sgd(0.1))


def test_initial_values_that_are_not_known_are_trained_in_full():
    shapes = []

    @jax.jit
    def traced(params):
        fc = fcjax.front_contribute(apply_chain, params, X, optimizer=optax.sgd(0.1))
        shapes.extend(row.reduced_shape for row in fc.report)
        return fc.apply(fc.params, X)

    np.testing.assert_allclose(traced(chain_params()), apply_chain(chain_params(), X), rtol=1e-12)
    assert shapes == [(4, 16), (16, 3)]
