"""Merged networks against the originals, and hand-annotated counts of what is left."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import zoo
import zoo_blocks
import zoo_conv
import zoo_time  # noqa: F401 (adds to the zoo)
from training import relative_deviation

import fcjax
from fcjax import FrontContributionError
from fcjax.tracing import trace

TOLERANCE = {jnp.float64: 1e-12, jnp.float32: 1e-5}


def normal(*shape):
    """Seeded Gaussian entries."""
    return np.random.default_rng(sum(shape)).standard_normal(shape) / math.sqrt(shape[0])


def moved(variables):
    """Variables off their zeros and ones; all positive changes, as variances are among them."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * rng.uniform(size=x.shape), variables)


def of_size(args, size):
    """The arguments with another batch: the last one's rows, repeated."""
    return (*args[:-1], np.resize(np.asarray(args[-1]), (size, *np.shape(args[-1])[1:])))


def shapes(merged):
    """The shapes of what is kept, largest first."""
    return sorted((x.shape for x in jax.tree.leaves(merged.params)), key=math.prod)[::-1]


def deviation(merged, apply_fn, params, *args):
    """How far the merged network is from the original."""
    return relative_deviation(merged.apply(merged.params, *args), apply_fn(params, *args))


# --- every network of the zoo -------------------------------------------------------------------


def check_merged(network, dtype, size):
    """That a network and its merged form agree for another batch size than the example's."""
    params, args = zoo.cast(network.params, dtype), zoo.cast(network.example_args, dtype)
    merged = fcjax.merge(network.apply_fn, params, *args)
    given = of_size(args, size)
    expected = jax.jit(network.apply_fn)(params, *given)
    actual = jax.jit(merged.apply)(merged.params, *given)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert jax.tree.map(jnp.result_type, actual) == jax.tree.map(jnp.result_type, expected)
    assert relative_deviation(actual, expected) <= TOLERANCE[dtype]
    assert merged.weights[1] <= merged.weights[0]
    assert merged.flops[1] <= merged.flops[0]


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float64, 7), (jnp.float32, 1)])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, id=name)
        for family in (zoo, zoo_conv, zoo_blocks)
        for name in family.names()
    ],
)
def test_merged_networks_return_what_the_original_returns(family, name, dtype, size):
    check_merged(family.build(name), dtype, size)


@pytest.mark.parametrize("name", ["relu_mlp", "gated_linear_unit", "equinox_mlp"])
def test_a_network_with_nothing_to_merge_is_left_as_it_is(name):
    network = zoo.build(name)
    merged = fcjax.merge(network.apply_fn, network.params, *network.example_args)
    assert merged.params is network.params
    assert "nothing to merge" in merged.reason
    assert merged.reason in str(merged)
    assert deviation(merged, network.apply_fn, network.params, *network.example_args) == 0.0


# --- hand-annotated networks --------------------------------------------------------------------


def chain(*widths):
    """A linen chain of dense layers."""
    return nn.Sequential([nn.Dense(width) for width in widths])


class Branches(nn.Module):
    """Two RepVGG-like blocks of dense branches with BatchNorm, and a readout."""

    width: int = 16

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        for _ in range(2):
            plain = norm()(nn.Dense(self.width, use_bias=False)(x))
            deep = nn.Dense(self.width, use_bias=False)(nn.Dense(4 * self.width)(x))
            x = nn.relu(plain + norm()(deep) + norm()(x))
        return nn.Dense(3)(x)


class Adapted(nn.Module):
    """A frozen dense layer with a low-rank branch beside it, scaled, before tanh; twice."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            low = nn.Dense(2, use_bias=False, name=f"a{i}")(x)
            x = nn.Dense(12, name=f"w{i}")(x) + 0.5 * nn.Dense(12, use_bias=False, name=f"b{i}")(
                low
            )
            x = jnp.tanh(x)
        return x


class Autoencoder(nn.Module):
    """A linear autoencoder of a given code width."""

    code: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(16)(nn.Dense(self.code)(x))


class Encoder(nn.Module):
    """A factorised embedding, a dense map on it, and a pre-norm feed-forward block."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Dense(16, use_bias=False)(nn.Dense(12)(nn.Embed(10, 4)(ids)))
        return x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))


class PreNorm(nn.Module):
    """A pre-norm transformer block."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(16)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))


class Stacked(nn.Module):
    """Three scanned pre-norm layers with an over-parameterised feed-forward map."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan()(x, None)[0]


class Layer(nn.Module):
    """One layer of `Stacked`."""

    @nn.compact
    def __call__(self, x, _):
        hidden = jnp.tanh(nn.Dense(24)(nn.Dense(32)(nn.RMSNorm()(x))))
        return x + nn.Dense(12)(hidden), None


ROWS, TOKENS = np.zeros((8, 12)), np.zeros((2, 5, 16))
IDS = np.zeros((2, 5), np.int32)
GOLDEN = {
    "deep linear": (chain(32, 32, 32, 3), ROWS, [(12, 3), (3,)]),
    "waist": (chain(32, 2, 32, 12), ROWS, [(12, 2), (2, 12), (12,)]),
    "branches": (
        Branches(),
        np.zeros((8, 16)),
        [(16, 16), (16, 16), (16, 3), (16,), (16,), (3,)],
    ),
    "adapters": (Adapted(), ROWS, [(12, 12), (12, 12), (12,), (12,)]),
    "wide autoencoder": (Autoencoder(64), np.zeros((8, 16)), [(16, 16), (16,)]),
    "LayerNorm and dense": (
        nn.Sequential([nn.LayerNorm(), nn.Dense(32)]),
        ROWS,
        [(12, 32), (32,)],
    ),
    "factorised embedding": (
        Encoder(),
        IDS,
        [(32, 16), (16, 32), (4, 16), (10, 4), (32,), (16,), (16,)],
    ),
    "pre-norm block": (
        PreNorm(),
        TOKENS,
        [(16, 64), (64, 16), *[(16, 2, 8)] * 3, (2, 8, 16), (64,), *[(16,)] * 2, *[(2, 8)] * 3],
    ),
    "scanned layers": (
        Stacked(),
        ROWS,
        [(3, 12, 24), (3, 24, 12), (3, 24), (3, 12)],
    ),
}


@functools.cache
def annotated(name):
    """The network's apply function, its variables, an input, and the merged network."""
    module, like, _ = GOLDEN[name]
    x = like if like.dtype == np.int32 else np.random.default_rng(1).standard_normal(like.shape)
    variables = moved(zoo.cast(jax.jit(module.init)(jax.random.key(0), x), jnp.float64))
    return module.apply, variables, x, fcjax.merge(module.apply, variables, x)


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_left_is_what_a_person_would_leave(name):
    apply_fn, variables, x, merged = annotated(name)
    assert sorted(shapes(merged)) == sorted(GOLDEN[name][2])
    assert deviation(merged, apply_fn, variables, x) <= 1e-12
    assert merged.flops[1] < merged.flops[0]
    assert [row.path for row in merged.report] == list(merged.params)


def test_a_narrow_code_stays():
    module = Autoencoder(3)
    variables = moved(module.init(jax.random.key(0), np.zeros((8, 16))))
    merged = fcjax.merge(module.apply, variables, np.zeros((8, 16)))
    assert merged.params is variables
    assert "nothing to merge" in merged.reason


CONVOLUTIONS = {
    "rep_vgg_inference": [(3, 3, 3, 3), (3,)] * 2,
    "diverse_branches": [(3, 3, 3, 3), (3,)],
    "ac_net": [(3, 3, 3, 3), (3,)],
    "mobile_one": [(3, 3, 1, 3), (3, 3)],
    "expand_net": [(3, 3, 3, 3), (3,)] * 2,
    "expand_net_valid": [(5, 5, 3, 3), (3,)],
    "res_net_bottleneck_inference": [(3, 3), (3,), (3, 3, 3, 3), (3,), (3, 12), (3, 12), (12,)],
    "inverted_bottleneck_inference": [(3, 18), (18,), (3, 3, 1, 18), (18,), (18, 3), (3,)],
    "conv_next": [(7, 7, 1, 3), (3,), (3, 12), (12,), (12, 3), (3,)],
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_branches_and_running_statistics_become_one_kernel_and_one_bias(name):
    network = zoo_conv.build(name)
    merged = fcjax.merge(network.apply_fn, network.params, *network.example_args)
    assert sorted(shapes(merged)) == sorted(CONVOLUTIONS[name])


def strides(fn, *args):
    """Of the convolutions; None for other products."""
    equations = trace.flatten(jax.make_jaxpr(fn)(*args)).equations
    products = [e for e in equations if e.name in ("conv_general_dilated", "dot_general")]
    return [e.source.params.get("window_strides") for e in products]


@pytest.mark.parametrize("name", ["res_net_bottleneck_inference", "inverted_bottleneck_inference"])
def test_pointwise_convolutions_stay_convolutions(name):
    network = zoo_conv.build(name)
    merged = fcjax.merge(network.apply_fn, network.params, *network.example_args)
    written = strides(network.apply_fn, network.params, *network.example_args)
    assert sorted(strides(merged.apply, merged.params, *network.example_args)) == sorted(written)
    assert None not in written


def pointwise(x, kernel, strides=(1, 1), groups=1):
    """A pointwise convolution of images whose last axis has the channels."""
    return jax.lax.conv_general_dilated(
        x, kernel[None, None], strides, "VALID", feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


COMPOSED = {
    "with strides": (lambda p, x: pointwise(pointwise(x, p[0], (2, 1)), p[1], (1, 3)), (2, 3)),
    "on part of the images": (lambda p, x: pointwise(pointwise(x[:, 1:, ::2], p[0]), p[1]), (1, 2)),
    "on every second image": (lambda p, x: pointwise(pointwise(x[::2], p[0]), p[1]), None),
    "before a product": (lambda p, x: pointwise(x, p[0]) @ p[1], None),
    "before a mean": (lambda p, x: pointwise(pointwise(x, p[0]), p[1]).mean((1, 2)), None),
    "mapped over another axis": (
        lambda p, x: jax.vmap(lambda x: pointwise(pointwise(x, p[0]), p[1]))(jnp.stack([x, x])),
        (1, 1),
    ),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_pointwise_convolutions_are_one(name):
    apply_fn, expected = COMPOSED[name]
    params, x = [normal(3, 8), normal(8, 4)], normal(4, 6, 7, 3)
    merged = fcjax.merge(apply_fn, params, x)
    assert shapes(merged) == [(3, 4)]
    assert strides(merged.apply, merged.params, x) == [expected]
    assert deviation(merged, apply_fn, params, x) <= 1e-12


def test_grouped_pointwise_convolutions_stay_grouped():
    params, x = [normal(2, 12), normal(3, 8)], normal(4, 6, 7, 8)

    def apply_fn(p, x):
        return pointwise(pointwise(x, p[0], groups=4), p[1], (2, 2), groups=4)

    merged = fcjax.merge(apply_fn, params, x)
    assert [math.prod(shape) for shape in shapes(merged)] == [4 * 2 * 2]
    assert strides(merged.apply, merged.params, x) == [(2, 2)]
    assert deviation(merged, apply_fn, params, x) <= 1e-12


def test_no_matrix_is_made_for_each_channel_of_a_gain():
    params = {"gain": normal(8), "mixing": normal(5, 16)}

    def apply_fn(p, x):
        normed = (x - x.mean(-1, keepdims=True)) / (1.0 + jnp.std(x, axis=-1, keepdims=True))
        return jnp.einsum("ntc,tm->ncm", normed * p["gain"], p["mixing"])

    merged = fcjax.merge(apply_fn, params, normal(4, 5, 8))
    assert shapes(merged) == [(5, 16), (8,)]
    assert deviation(merged, apply_fn, params, normal(3, 5, 8)) <= 1e-12


@pytest.mark.parametrize("shape", [(12,), (1, 12), (256, 12), (2, 3, 12)])
@pytest.mark.parametrize("name", ["deep linear", "adapters", "LayerNorm and dense"])
def test_inputs_may_have_any_rank_and_batch_size(name, shape):
    apply_fn, variables, _, merged = annotated(name)
    assert deviation(merged, apply_fn, variables, normal(*shape)) <= 1e-12


def test_sequences_may_have_any_length():
    apply_fn, variables, _, merged = annotated("pre-norm block")
    for length in (1, 3, 11):
        assert deviation(merged, apply_fn, variables, normal(4, length, 16)) <= 1e-12


def test_names_and_reasons_say_what_an_array_is_made_of():
    _, _, _, merged = annotated("adapters")
    rows = {row.path: row for row in merged.report}
    row = rows["params/a0+b0+w0/kernel"]
    assert row.sources == ("params/a0/kernel", "params/b0/kernel", "params/w0/kernel")
    assert row.reason.startswith("effective weight of params/a0/kernel")
    assert rows["params/w0/bias"].reason == "as it was"
    printed = str(merged)
    for text in (f"{merged.weights[0]:,} weights before", "FLOPs", "params/a0+b0+w0/kernel"):
        assert text in printed
    before, after = merged.weights
    assert repr(merged) == f"Merged({before:,} weights before, {after:,} after)"


# --- what stays exact ---------------------------------------------------------------------------


def test_statistics_in_another_argument():
    apply_fn, variables, x, merged = annotated("branches")
    split = lambda params, stats, x: apply_fn({"params": params, "batch_stats": stats}, x)  # noqa: E731
    parts = (variables["params"], variables["batch_stats"])
    constant = fcjax.merge(split, *parts, x, constant_argnums=[1])
    assert sorted(shapes(constant)) == sorted(shapes(merged))
    for size in (1, 9):
        given = of_size((x,), size)
        actual = constant.apply(constant.params, *given)
        assert relative_deviation(actual, split(*parts, *given)) <= 1e-12
    given = fcjax.merge(split, *parts, x)  # as an argument like any other they stay one
    actual = given.apply(given.params, parts[1], x)
    assert relative_deviation(actual, split(*parts, x)) <= 1e-12


def test_tied_weights_are_kept_once():
    params = {"w": normal(16, 3), "b": normal(16)}
    apply_fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T + p["b"] + p["b"]  # noqa: E731
    merged = fcjax.merge(apply_fn, params, normal(8, 16))
    assert shapes(merged) == [(16, 3), (16,)]
    assert deviation(merged, apply_fn, params, normal(5, 16)) <= 1e-12


def test_equal_products_are_kept_once():
    params = {"up": normal(4, 16), "down": normal(16, 4)}
    apply_fn = lambda p, x: jnp.tanh(x @ p["up"] @ p["down"]) @ p["up"] @ p["down"]  # noqa: E731
    merged = fcjax.merge(apply_fn, params, normal(8, 4))
    assert shapes(merged) == [(4, 4)]
    assert deviation(merged, apply_fn, params, normal(5, 4)) <= 1e-12


def test_outer_looks_of_one_vector_are_not_taken_for_one():
    params = {"a": normal(4), "w": normal(4, 4)}

    def apply_fn(p, x):
        across = jnp.broadcast_to(jnp.sin(p["a"])[:, None], (4, 4)) * p["w"]
        down = jnp.broadcast_to(jnp.sin(p["a"])[None, :], (4, 4)) * p["w"]
        return jnp.tanh(x @ across) @ down

    merged = fcjax.merge(apply_fn, params, normal(8, 4))
    assert deviation(merged, apply_fn, params, normal(5, 4)) <= 1e-12


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (zoo, "concatenate_before_dense"),
        (zoo, "slices_after_dense"),
        (zoo, "several_consumers"),
        (zoo_conv, "u_net"),
    ],
)
def test_what_is_multiplied_does_not_depend_on_the_size_of_the_example(family, name):
    network = family.build(name)
    args = network.example_args
    merged = [fcjax.merge(network.apply_fn, network.params, *of_size(args, n)) for n in (3, 512)]
    assert shapes(merged[0]) == shapes(merged[1])
    assert merged[0].flops[1] < merged[0].flops[0]
    assert merged[0].weights[1] < merged[0].weights[0]


def test_what_is_computed_from_parameters_is_computed_once():
    params = [{"v": normal(4, 8), "g": np.ones(8)}, {"v": normal(8, 3), "g": np.ones(3)}]

    def apply_fn(params, x):
        first, second = (p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0) for p in params)
        return jnp.tanh(x @ first) @ second

    merged = fcjax.merge(apply_fn, params, normal(8, 4))
    assert shapes(merged) == [(4, 8), (8, 3)]
    assert {row.reason.split()[0] for row in merged.report} == {"computed"}
    assert deviation(merged, apply_fn, params, normal(5, 4)) <= 1e-12


def test_a_mean_over_positions_may_have_any_length():
    params = [normal(4, 16), normal(16, 3)]
    apply_fn = lambda p, x: jnp.mean(x @ p[0], axis=1) @ p[1]  # noqa: E731
    merged = fcjax.merge(apply_fn, params, normal(2, 5, 4))
    assert shapes(merged) == [(4, 3)]
    assert deviation(merged, apply_fn, params, normal(3, 9, 4)) <= 1e-12


def test_parameters_repeated_for_every_row_are_read_as_they_are():
    params = {"b": normal(4), "w": normal(4, 16), "v": normal(16, 3)}

    def apply_fn(p, x):
        return jnp.cos(jnp.broadcast_to(p["b"], x.shape)) * (x @ p["w"] @ p["v"]).sum(-1)[..., None]

    merged = fcjax.merge(apply_fn, params, normal(8, 4))
    assert sorted(shapes(merged)) == [(4,), (4,)]
    for size in (1, 2, 30):
        assert deviation(merged, apply_fn, params, normal(size, 4)) <= 1e-12


def test_batch_statistics_stay_as_written():
    network = zoo.build("batch_norm_branches")
    args = network.example_args
    merged = fcjax.merge(network.apply_fn, network.params, *args)
    for size in (1, 2, 7, 33):
        given = of_size(args, size)
        assert deviation(merged, network.apply_fn, network.params, *given) <= 1e-12


def test_products_of_weights_are_formed_in_the_wider_dtype():
    params = [normal(16, 64).astype(np.float32), normal(64, 16).astype(np.float32)]
    apply_fn = lambda p, x: x @ p[0].astype(x.dtype) @ p[1].astype(x.dtype)  # noqa: E731
    x = jnp.asarray(normal(8, 16), jnp.bfloat16)
    merged = fcjax.merge(apply_fn, params, x)
    exact = np.asarray(x, np.float64) @ params[0] @ params[1]
    own = relative_deviation(apply_fn(params, x), exact)
    assert {a.dtype for a in merged.params.values()} == {jnp.dtype(jnp.bfloat16)}
    assert relative_deviation(merged.apply(merged.params, x), exact) <= max(1e-2, 2 * own)


# --- transformations, export, checkpoints -------------------------------------------------------


def test_under_jit_vmap_and_grad():
    apply_fn, variables, x, merged = annotated("branches")
    expected = apply_fn(variables, x)
    mapped = jax.jit(jax.vmap(functools.partial(merged.apply, merged.params)))
    assert relative_deviation(mapped(x), expected) <= 1e-12
    slope = lambda apply, params: jax.grad(lambda x: jnp.sum(jnp.sin(apply(params, x))))(x)  # noqa: E731
    expected_slope = slope(apply_fn, variables)
    assert relative_deviation(slope(merged.apply, merged.params), expected_slope) <= 1e-12
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), merged.params)
    both = jax.vmap(merged.apply, in_axes=(0, None))(stacked, x)
    assert relative_deviation(both[0], expected) <= 1e-12


def test_merging_inside_jit():
    params = [normal(4, 16), normal(16, 3)]
    apply_fn = lambda p, x: x @ p[0] @ p[1]  # noqa: E731

    @jax.jit
    def run(params, x):
        merged = fcjax.merge(apply_fn, params, x)
        return merged.apply(merged.params, x)

    x = normal(8, 4)
    assert relative_deviation(run(params, x), apply_fn(params, x)) <= 1e-12


def test_the_merged_network_exports():
    apply_fn, variables, x, merged = annotated("branches")
    exported = jax.export.export(jax.jit(merged.apply))(merged.params, x)
    assert len(exported.in_avals) == len(merged.params) + 1
    expected = apply_fn(variables, x)
    assert relative_deviation(exported.call(merged.params, x), expected) <= 1e-12


def test_an_exported_network_can_be_saved():
    apply_fn, variables, x, merged = annotated("branches")
    exported = jax.export.export(jax.jit(merged.apply))(merged.params, x)
    again = jax.export.deserialize(exported.serialize())
    assert relative_deviation(again.call(merged.params, x), apply_fn(variables, x)) <= 1e-12


def test_an_orbax_checkpoint_restores_the_arrays(tmp_path):
    apply_fn, variables, x, merged = annotated("branches")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "merged", merged.params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "merged", merged.params)
    assert jax.tree.map(jnp.array_equal, restored, merged.params) == dict.fromkeys(restored, True)
    actual = merged.apply(restored, x)
    assert relative_deviation(actual, apply_fn(variables, x)) <= 1e-12


def test_latency_is_measured_when_asked_for():
    _, _, x, merged = annotated("deep linear")
    assert "latency" not in str(merged)
    timings = merged.latency(x, repeats=3)
    assert timings.median("merged") > 0
    assert "latency" in str(merged)


def test_original_leaves_are_not_copied():
    params = {"w": jnp.ones((4, 4)), "up": jnp.ones((4, 16)), "down": jnp.ones((16, 4))}
    apply_fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["up"] @ p["down"]  # noqa: E731
    merged = fcjax.merge(apply_fn, params, jnp.ones((8, 4)))
    assert merged.params["w"] is params["w"]


# --- what is refused ----------------------------------------------------------------------------


def two_layers():
    params = [normal(4, 16), normal(16, 3)]
    return params, fcjax.merge(lambda p, x: x @ p[0] @ p[1], params, normal(8, 4))


def test_params_of_another_structure_are_refused():
    params, merged = two_layers()
    with pytest.raises(FrontContributionError, match="merged params given have another structure"):
        merged.apply(params, normal(8, 4))


def test_params_of_another_dtype_are_refused():
    _, merged = two_layers()
    changed = zoo.cast(merged.params, jnp.float32)
    with pytest.raises(FrontContributionError, match=r"merged params 0\+1/kernel is float32"):
        merged.apply(changed, normal(8, 4))


def test_a_call_that_reads_the_parameters_in_another_way_is_refused():
    params = {"a": normal(4, 16), "b": normal(16, 4)}

    def apply_fn(p, x):
        return x @ p["a"] @ p["b"] if x.ndim == 2 else jnp.tanh(x @ p["a"]) @ p["b"]

    merged = fcjax.merge(apply_fn, params, normal(8, 4))
    with pytest.raises(FrontContributionError, match=r"reads a, b in another way than the example"):
        merged.apply(merged.params, normal(2, 8, 4))


@pytest.mark.parametrize("number", [0, 2])
def test_constant_argnums_must_name_arguments(number):
    params = [normal(4, 3)]
    with pytest.raises(FrontContributionError, match=f"constant_argnums has {number}"):
        fcjax.merge(lambda p, x: x @ p[0], params, normal(8, 4), constant_argnums=[number])


def test_constant_arguments_must_be_arrays():
    params, like = [normal(4, 3)], jax.ShapeDtypeStruct((4,), jnp.float64)
    with pytest.raises(FrontContributionError, match="not an array"):
        fcjax.merge(lambda p, b, x: x @ p[0] + b, params, like, normal(8, 4), constant_argnums=[1])


def test_a_network_that_mutates_state_is_refused():
    module = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
    variables = module.init(jax.random.key(0), ROWS)
    with pytest.raises(FrontContributionError, match="mutates Flax state"):
        fcjax.merge(module.apply, variables, ROWS)


def test_parameters_that_are_no_arrays_are_refused():
    with pytest.raises(FrontContributionError, match="not an array"):
        fcjax.merge(lambda p, x: x * p["scale"], {"scale": 2.0}, ROWS)
