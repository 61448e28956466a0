"""Programs of kinds that few networks have: against jax on the same program, planned and forced."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import fcjax
from fcjax.numbers.interpreter import values_of
from fcjax.planning.plan import always_fold


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape) * scale)


def with_gradients(fn, params, args):
    """A function's results, their sum by random numbers, and the gradients of that."""

    def loss(params, floats):
        given = [f if f is not None else x for f, x in zip(floats, args, strict=True)]
        out = fn(params, *given)
        total = 0.0
        for i, leaf in enumerate(jax.tree.leaves(out)):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                total += jnp.sum(leaf * normal(*leaf.shape, seed=i).astype(leaf.dtype))
        return total, out

    floats = [x if jnp.issubdtype(jnp.result_type(x), jnp.floating) else None for x in args]
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, floats)


def assert_same(found, expected, close=1e-11):
    """Equal up to rounding, relative to each array's largest entry; NaN in the same places."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        size = np.max(np.abs(np.nan_to_num(b)), initial=1e-3)
        np.testing.assert_allclose(a, b, rtol=close, atol=close * size)


def checked(fn, params, *args, forced=True, close=1e-11):
    """Values and gradients of `fc.apply` are those of `fn`, NaN included; returns fc."""
    with always_fold() if forced else contextlib.nullcontext():
        fc = fcjax.front_contribute(fn, params, *args)
        str(fc)
        found = values_of(lambda p: with_gradients(fc.apply, p, args), fc.params)
    assert_same(found, values_of(lambda p: with_gradients(fn, p, args), params), close)
    return fc


both = pytest.mark.parametrize("forced", [False, True], ids=["planned", "forced"])

# --- rows less their mean, scaled ---

CENTRED = {
    "over the batch": lambda x: x - x.mean(0),
    "over positions": lambda x: x - x.mean(-2, keepdims=True),
    "over both": lambda x: x - x.mean(tuple(range(x.ndim - 1)), keepdims=True),
    "over features": lambda x: x - x.mean(-1, keepdims=True),
    "over all": lambda x: x - x.mean(),
    "over the batch, then features": lambda x: (y := x - x.mean(0)) - y.mean(-1, keepdims=True),
    "not at all": lambda x: x,
}
SQUARED = {
    "mean square": lambda z: jnp.square(z).mean(-1, keepdims=True),
    "product": lambda z: (z * z).mean(-1, keepdims=True),
    "of the batch": lambda z: jnp.square(z).mean(0, keepdims=True),
}


@both
@pytest.mark.parametrize("shape", [(6, 4), (3, 5, 4), (1, 5, 4), (3, 1, 4), (5, 1), (1, 1)])
@pytest.mark.parametrize("squared", SQUARED)
@pytest.mark.parametrize("centred", CENTRED)
def test_rows_centred_over_one_axis_and_scaled_over_another(centred, squared, shape, forced):
    def fn(p, x):
        z = CENTRED[centred](x)
        return (z * lax.rsqrt(SQUARED[squared](z) + 1e-2) * p["g"]) @ p["a"] @ p["b"]

    width = shape[-1]
    params = {"g": normal(width), "a": normal(width, 9), "b": normal(9, 2)}
    checked(fn, params, normal(*shape) + 2.0, forced=forced, close=1e-9)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_centred_norm_before_one_matrix(offset):
    def fn(p, x):
        z = x - x.mean(0)
        return (z * lax.rsqrt(jnp.square(z).mean(-1, keepdims=True) + 1e-3)) @ p

    checked(fn, normal(8, 3), normal(40, 8) + offset, close=1e-9)


# --- windows over axes that are merged, cut, or empty ---

Y = functools.partial(normal, 2, 4, 3)
MERGED = {
    "roll by nothing": lambda y: jnp.roll(y, 0, 0),
    "roll by a whole turn": lambda y: jnp.roll(y, 8, 0),
    "roll back by a whole turn": lambda y: jnp.roll(y, -8, 0),
    "roll by two turns": lambda y: jnp.roll(y, 16, 0),
    "roll": lambda y: jnp.roll(y, 3, 0),
    "roll along both axes": lambda y: jnp.roll(y, (8, 1), (0, 1)),
    "joined with nothing": lambda y: jnp.concatenate([y, y[:0]]),
    "joined with itself": lambda y: jnp.concatenate([y, y]),
    "cut and joined": lambda y: jnp.concatenate([y[3:], y[:3]]),
    "wrapped by nothing": lambda y: jnp.pad(y, ((0, 0), (0, 0)), mode="wrap"),
    "wrapped": lambda y: jnp.pad(y, ((8, 8), (0, 0)), mode="wrap"),
    "wrapped and cut back": lambda y: jnp.pad(y, ((8, 8), (0, 0)), mode="wrap")[8:16],
    "edges behind": lambda y: jnp.pad(y, ((0, 2), (0, 0)), mode="edge"),
    "edges before": lambda y: jnp.pad(y, ((2, 0), (0, 0)), mode="edge"),
    "reflected": lambda y: jnp.pad(y, ((2, 1), (0, 0)), mode="reflect"),
    "flipped": lambda y: y[::-1],
    "every second": lambda y: y[1::2],
    "tiled": lambda y: jnp.tile(y, (2, 1)),
    "repeated": lambda y: jnp.repeat(y, 2, 0),
    "cumulated": lambda y: jnp.cumsum(y, 0),
    "scanned": lambda y: lax.associative_scan(jnp.add, y),
}


@both
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "plain"])
@pytest.mark.parametrize("name", MERGED)
def test_what_moves_rows_of_a_merged_axis(name, merged, forced):
    def fn(p, x):
        return MERGED[name]((x @ p["w"]).reshape(8, 3)) @ p["v"]

    shape = (2, 4, 3) if merged else (8, 3)
    checked(fn, {"w": normal(3, 3), "v": normal(3, 2)}, normal(*shape), forced=forced)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_recurrences_by_an_associative_scan(count):
    def join(a, b):
        return a[0] * b[0], b[0] * a[1] + b[1]

    def fn(p, x):
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"]), x.shape)
        return lax.associative_scan(join, (decay, x @ p["w"]), axis=1)[1]

    params = {"decay": normal(3), "w": normal(3, 3)}
    checked(fn, params, normal(2, count, 3))


@pytest.mark.parametrize("start", range(7))
@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_parts_of_what_is_joined_beside_a_gain(start, count):
    """The gain is read where the part is, whichever pieces the part is made of."""

    def fn(p, x):
        joined = jnp.concatenate([x @ p["a"], x @ p["b"]])[start : start + count]
        return (joined * p["g"][: joined.shape[0], None]) @ p["c"]

    params = {"a": normal(3, 5), "b": normal(3, 5, seed=1), "g": normal(6), "c": normal(5, 2)}
    checked(fn, params, normal(3, 3))


CONV = functools.partial(lax.conv_general_dilated, dimension_numbers=("NWC", "WIO", "NWC"))
CUT = {  # padding, input dilation, stride
    "cropped before": ((-1, 2), 1, 1),
    "cropped behind": ((2, -1), 1, 1),
    "cropped between": ((-1, 2), 2, 1),
    "strided": ((1, 2), 1, 2),
    "dilated": ((0, 1), 3, 2),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("taps", [1, 2, 3])
@pytest.mark.parametrize("name", CUT)
def test_convolutions_that_are_cropped_beside_biases_and_gains(name, taps, groups):
    padding, spread, stride = CUT[name]

    def fn(p, x):
        y = CONV(x, p["k"], (stride,), [padding], (spread,), feature_group_count=groups) + p["b"]
        y = y * p["g"][: y.shape[1], None]
        return (y @ p["w"]) * 2.0

    params = {"k": normal(taps, 2 // groups, 4), "b": normal(4), "g": normal(12), "w": normal(4, 2)}
    checked(fn, params, normal(2, 4, 2))


@both
@pytest.mark.parametrize("size", [1, 2, 5])
def test_an_image_convolved_along_one_axis_and_padded_along_the_other(size, forced):
    def fn(p, x):
        return lax.conv_general_dilated(
            -x, p, (2, 1), [(1, 1), (0, 1)], (2, 1), (2, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    checked(fn, normal(2, 1, 1, 3), normal(2, size, size, 1), forced=forced)


@pytest.mark.parametrize("forced", [True])
def test_strided_pooling_under_a_space_to_channels(forced):
    def fn(p, x):
        v = lax.reduce_window(x, 0.0, lax.add, (1, 1, 1, 2), (1, 1, 2, 1), "VALID")
        v = v.reshape(2, 1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(2, 1, 2, 8)
        y = v - v.mean(3, keepdims=True)
        return (y * lax.rsqrt(jnp.square(y).mean(3, keepdims=True) + 0.1) * p["g"]) @ p["w"]

    checked(fn, {"g": normal(8), "w": normal(8, 3)}, normal(2, 2, 8, 3), forced=forced, close=1e-10)


POOLED = {
    "channels last": (("NWC", "WIO", "NWC"), lambda x: x, (1, 4, 1)),
    "channels first": (("NCW", "WIO", "NCW"), lambda x: x.swapaxes(1, 2), (1, 1, 4)),
}


@both
@pytest.mark.parametrize("over", [(1, 2), (1,), (2,)])
@pytest.mark.parametrize("layout", POOLED)
def test_a_norm_over_space_and_channels_before_a_pooled_pointwise_map(layout, over, forced):
    numbers, turned, window = POOLED[layout]

    def fn(p, x):
        x = x - x.mean(over, keepdims=True)
        h = x * lax.rsqrt(jnp.square(x).mean(over, keepdims=True) + 1e-3) * p["g"]
        h = lax.conv_general_dilated(turned(h), p["k"], (1,), "VALID", dimension_numbers=numbers)
        return lax.reduce_window(h, 0.0, lax.add, window, (1, 1, 1), "VALID")

    params = {"g": normal(2), "k": normal(1, 2, 5)}
    checked(fn, params, normal(6, 4, 2), forced=forced, close=1e-9)


@both
def test_a_gain_of_channels_before_a_pooling_that_leaves_some_out(forced):
    def fn(p, x):
        def pooled(y):
            window, strides = (1, 1, 1, 2, 2), (1, 1, 2, 1, 1)
            return lax.reduce_window(y, 0.0, lax.add, window, strides, "SAME")

        return pooled(x * p) / pooled(jnp.ones_like(x))

    checked(fn, normal(3, 1, 1), normal(2, 2, 3, 2, 2), forced=forced)


@both
def test_a_circular_convolution_beside_its_input(forced):
    def fn(p, x):
        y = jnp.pad(x, ((0, 0), (0, 0), (0, 1)), mode="wrap")
        y = lax.conv_general_dilated(y.reshape(-1, 1, 3), p, (1,), "VALID")
        return y.reshape(2, 2, 2) + x

    checked(fn, normal(1, 1, 2), normal(2, 2, 2), forced=forced)


NOTHING = {
    "times zero": lambda p, x: (x * 0.0) @ p["w"],
    "deviations of one": lambda p, x: (x - x.mean(0)) @ p["w"],
    "variance of one": lambda p, x: x * lax.rsqrt(x.var(0) + 0.1) @ p["w"],
    "less itself": lambda p, x: (x @ p["w"] - x @ p["w"]) + p["b"],
    "cut away": lambda p, x: jnp.concatenate([x @ p["w"], 0 * x[:0] @ p["w"]])[:0],
    "tiled": lambda p, x: jnp.tile(x @ p["w"], (2, 1)),
    "softmax": lambda p, x: jax.nn.softmax(x, 0) @ p["w"],
    "a product with itself": lambda p, x: (lambda y: y @ y.T)((x @ p["w"])[:, :0]),
    "its own norms": lambda p, x: (lambda y: y * (y * y).sum(-1, keepdims=True))((x @ p["w"])[:0]),
    "longer windows": lambda p, x: (lambda y: y * jnp.einsum("na,na->n", y, y)[:, None])(
        lax.reduce_window(x @ p["w"], 0.0, lax.add, (1, 3), (1, 1), "VALID")
    ),
}


@both
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("name", NOTHING)
def test_values_of_which_nothing_is_left(name, rows, forced):
    checked(NOTHING[name], {"w": normal(4, 2), "b": normal(2)}, normal(rows, 4), forced=forced)


NOTHING_BEFORE_A_LOOP = {
    "w0": normal(2, 3), "w1": normal(3, 2, 20, seed=1), "w2": normal(3, 20, 3, seed=2)
}  # fmt: skip


def into_a_loop(p, x):
    z = x @ p["w0"]
    return lax.scan(lambda h, w: (x @ w[0] @ w[1], None), z - z, (p["w1"], p["w2"]))[0]


@pytest.mark.parametrize(
    ("fn", "params"),
    [
        (lambda p, x: x @ p["w0"] - x @ p["w0"], {"w0": normal(2, 2)}),
        (into_a_loop, NOTHING_BEFORE_A_LOOP),
    ],
    ids=["result", "carry"],
)
def test_the_width_of_a_value_that_cancels_is_not_compressed(fn, params):
    x = normal(5, 2)
    fc = fcjax.front_contribute(fn, params, x, optimizer=optax.sgd(0.1))
    assert not fc.plan.refuted
    assert fc.params["w0"].shape == params["w0"].shape
    np.testing.assert_allclose(fc.apply(fc.params, x), fn(params, x), atol=1e-12)


def mixed_with_itself(p, x):
    h = x @ p["a"][:, :2] + x
    return jnp.concatenate([h @ h, h], 1) @ p["b"]


def mixed_with_another(p, x):
    h, other = x @ p["a"][:, :2] + x, x.T @ p["a"][:, :2]
    return jnp.concatenate([h @ jnp.tanh(other), h], 1) @ p["b"]


@both
@pytest.mark.parametrize("fn", [mixed_with_itself, mixed_with_another])
def test_low_rank_branches_of_which_data_are_a_factor(fn, forced):
    checked(fn, {"a": normal(2, 4), "b": normal(4, 2)}, normal(2, 2), forced=forced)


@pytest.mark.parametrize("number", [0, 2, 3, -1, -4])
def test_a_looked_up_row_that_meets_a_function_of_itself(number):
    def fn(p, i):
        v = jnp.take_along_axis(p["table"], i.reshape(-1, 1), axis=0)
        return jnp.einsum("te,td,edk->tk", jax.nn.softmax(v @ p["a"]), v, p["b"])

    params = {"table": normal(3, 2), "a": normal(2, 2), "b": normal(2, 2, 2)}
    checked(fn, params, jnp.int32(number))


# --- sizes of 0 and 1 ---

SIZES = {
    "batch of 0": ((0, 3), (3, 4), (4, 2)),
    "batch of 1": ((1, 3), (3, 4), (4, 2)),
    "no features": ((5, 0), (0, 4), (4, 2)),
    "no hidden units": ((5, 3), (3, 0), (0, 2)),
    "no outputs": ((5, 3), (3, 4), (4, 0)),
    "one feature": ((5, 1), (1, 4), (4, 2)),
    "one hidden unit": ((5, 3), (3, 1), (1, 2)),
    "one output": ((5, 3), (3, 4), (4, 1)),
    "a vector of outputs": ((5, 3), (3, 4), (4,)),
    "one of all": ((1, 1), (1, 1), (1, 1)),
    "no leading rows": ((0, 5, 3), (3, 4), (4, 2)),
}


def looped(p, x, times):
    return lax.scan(lambda h, _: (h @ p["a"] @ p["a"].T, None), x, None, times)[0]


LAYERS = {
    "linear": lambda p, x: (x @ p["a"] + p["c"]) @ p["b"],
    "relu": lambda p, x: jax.nn.relu(x @ p["a"] + p["c"]) @ p["b"],
    "normed": lambda p, x: ((x - x.mean(0)) @ p["a"] * p["c"]) @ p["b"],
    "looped": lambda p, x: lax.scan(lambda h, _: (h @ p["a"] @ p["a"].T, None), x, None, 2)[0],
    "never looped": lambda p, x: lax.scan(lambda h, _: (h @ p["a"] @ p["a"].T, None), x, None, 0)[
        0
    ],
    "mapped": lambda p, x: jax.vmap(lambda row: (row @ p["a"]) @ p["b"])(x),
}


@both
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("sizes", SIZES)
def test_sizes_of_none_and_of_one(sizes, layers, forced):
    rows, first, second = SIZES[sizes]
    params = {"a": normal(*first), "b": normal(*second), "c": normal(first[1])}
    checked(LAYERS[layers], params, normal(*rows), forced=forced)


def test_loops_over_no_layers():
    def fn(p, x):
        return lax.scan(lambda h, w: (h @ w["a"] @ w["b"], None), x, p)[0]

    params = {"a": jnp.zeros((0, 2, 5)), "b": jnp.zeros((0, 5, 2))}
    checked(fn, params, normal(3, 2))


# --- effects ---


def printed(x):
    jax.debug.print("{}", x.sum())
    return x


def called(x):
    jax.debug.callback(lambda _: None, x)
    return x


def sent(x):
    jax.experimental.io_callback(lambda _: None, None, lax.stop_gradient(x).sum())
    return x


@both
@pytest.mark.parametrize("effect", [printed, called, sent])
@pytest.mark.parametrize("where", ["plain", "scan", "cond", "checkpoint"])
def test_programs_with_effects_run_as_they_are(effect, where, forced, capfd):
    def layer(p, x):
        return effect(x @ p["a"]) @ p["b"]

    def fn(p, x):
        if where == "scan":
            return lax.scan(lambda h, _: (layer(p, h), None), x, None, 2)[0]
        if where == "cond":
            return lax.cond(x[0, 0] > 0, lambda x: layer(p, x), lambda x: x, x)
        return jax.checkpoint(layer)(p, x) if where == "checkpoint" else layer(p, x)

    params = {"a": normal(3, 8), "b": normal(8, 3)}
    x = normal(4, 3)
    with always_fold() if forced else contextlib.nullcontext():
        fc = fcjax.front_contribute(fn, params, x)
        np.testing.assert_allclose(fc.apply(params, x), fn(params, x), rtol=1e-12)


def test_beside_an_effect_layers_collapse():
    def fn(p, x):
        jax.debug.print("{}", x.sum())
        return x @ p["a"] @ p["b"]

    fc = fcjax.front_contribute(fn, {"a": normal(3, 64), "b": normal(64, 3)}, normal(128, 3))
    assert {row.rule for row in fc.report} == {"collapse"}
