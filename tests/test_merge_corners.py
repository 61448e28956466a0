"""Merged networks of kinds that few networks have: sizes of 1 and 0, integers, rounded weights."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_corners import assert_same, both, normal

import fcjax
from fcjax.numbers.interpreter import values_of
from fcjax.planning.plan import always_fold


def merged_as_written(fn, params, *args, forced=False, rows=()):
    """Checks values, also for other numbers of rows of the first argument; returns the network."""
    with always_fold() if forced else contextlib.nullcontext():
        merged = fcjax.merge(fn, params, *args)
        str(merged)
        for count in (None, *rows):
            given = args if count is None else (normal(count, *args[0].shape[1:]), *args[1:])
            found = values_of(merged.apply, merged.params, *given)
            assert_same(found, values_of(fn, params, *given))
    return merged


def norm(v, g=1.0, b=0.0):
    v = v - v.mean(-1, keepdims=True)
    return v * lax.rsqrt(jnp.square(v).mean(-1, keepdims=True) + 0.1) * g + b


def gated(p, x):
    v = x @ p["a"] + p["b"]
    return (jax.nn.silu(v @ p["c"]) * (v @ p["c"][:, ::-1])) @ p["d"]


def convolved(p, x):
    y = x.reshape(-1, 2, x.shape[-1] // 2) if x.shape[-1] % 2 == 0 else x[:, None]
    kernel = jnp.ones((1, y.shape[-1], 1)) * p["e"]
    dims = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(y, kernel, (1,), "SAME", dimension_numbers=dims)
    return (y + p["b"]) @ p["c"] @ p["d"]


# Networks of a width and a number of outputs: x (rows, width), a (width, width), b (width,),
# c (width, outputs), d (outputs, outputs), e (outputs,).
HEADS = {
    "a bias before a head": lambda p, x: (x @ p["a"] + p["b"]) @ p["c"],
    "a head without an axis": lambda p, x: (x @ p["a"] + p["b"]) @ p["c"].sum(-1),
    "a gain and a shift": lambda p, x: norm(x, p["b"], p["b"]) @ p["c"],
    "shifts on both sides": lambda p, x: norm((x - p["b"]) @ p["a"], p["b"]) @ p["c"] @ p["d"],
    "a gated unit": gated,
    "a head turned round": lambda p, x: (norm(x) * p["b"] + p["b"]) @ p["c"] @ p["d"].T + p["e"],
    "two branches": lambda p, x: x @ p["c"] + (x @ p["a"] + p["b"]) @ p["c"] * p["e"],
    "outer products": lambda p, x: (x @ p["c"] + p["e"])[:, :, None] * p["e"] @ p["d"],
    "a table": lambda p, x: jnp.tanh(p["a"][jnp.arange(3) % max(len(p["a"]), 1)] @ p["c"]) @ p["d"]
    if len(p["a"]) else x @ p["c"],
    "a mean over rows": lambda p, x: ((x - x.mean(0)) @ p["a"] + p["b"]) @ p["c"],
}  # fmt: skip


def weights(width, outputs):
    shapes = {"a": (width, width), "b": (width,), "c": (width, outputs)}
    shapes |= {"d": (outputs, outputs), "e": (outputs,)}
    return {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


@both
@pytest.mark.parametrize("outputs", [1, 2, 0])
@pytest.mark.parametrize("width", [1, 4, 0])
@pytest.mark.parametrize("name", HEADS)
def test_heads_of_any_size(name, width, outputs, forced):
    rows = (1, 3, 0) if name != "a mean over rows" else (1, 3)
    x = normal(5, width)
    merged_as_written(HEADS[name], weights(width, outputs), x, forced=forced, rows=rows)


@both
@pytest.mark.parametrize("rows", [0, 1])
def test_an_example_of_no_rows_or_one(rows, forced):
    fn = HEADS["two branches"]
    merged = merged_as_written(fn, weights(4, 1), normal(rows, 4), forced=forced, rows=(1, 6))
    assert merged.weights[1] <= merged.weights[0]


@both
@pytest.mark.parametrize("taps", [(1, 1), (3, 2)])
@pytest.mark.parametrize("channels", [(2, 1), (1, 1), (1, 2), (2, 0)])
def test_kernels_with_few_channels(channels, taps, forced):
    params = {"k": normal(*taps, *channels), "b": normal(channels[1]), "w": normal(channels[1], 2)}

    def fn(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, p["k"], (1, 1), "VALID", dimension_numbers=dims)
        return (y + p["b"]) @ p["w"]

    merged_as_written(fn, params, normal(2, 3, 3, channels[0]), forced=forced, rows=(1, 0))


ROUNDED = {
    "fake quantisation": lambda w: w.astype(jnp.bfloat16).astype(w.dtype),
    "float8": lambda w: w.astype(jnp.float8_e4m3fn).astype(w.dtype),
    "reduced precision": lambda w: lax.reduce_precision(w, 8, 4),
    "steps": lambda w: jnp.round(8 * w) / 8,
}


@both
@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_weights_stay_rounded(name, forced):
    rounded = ROUNDED[name]
    params = {"a": normal(4, 8), "b": normal(8, 3)}
    fn = lambda p, x: x @ rounded(p["a"]) @ rounded(p["b"])  # noqa: E731
    merged_as_written(fn, params, normal(5, 4), forced=forced)


@both
def test_parameters_that_are_all_integers(forced):
    params = {"a": jnp.arange(12).reshape(4, 3), "b": jnp.arange(6).reshape(3, 2) - 3}
    merged_as_written(
        lambda p, x: x @ p["a"] @ p["b"], params, normal(5, 4), forced=forced, rows=(1,)
    )
    fn = lambda p, x: jnp.tanh(x @ (p["a"] * 0.1) @ p["b"])  # noqa: E731
    merged_as_written(fn, params, normal(5, 4), forced=forced, rows=(1,))


MOVED = {
    "rolled by nothing": lambda y: jnp.roll(y.reshape(-1, 3), 0, 0),
    "rolled round": lambda y: jnp.roll(y.reshape(-1, 3), y.shape[0] * 4, 0),
    "with nothing joined": lambda y: jnp.concatenate([y, y[:0]]),
    "padded by nothing": lambda y: jnp.pad(y, ((0, 0), (0, 1), (0, 0)), mode="edge"),
}


@both
@pytest.mark.parametrize("name", MOVED)
def test_what_hardly_moves(name, forced):
    fn = lambda p, x: MOVED[name](x @ p["a"] @ p["b"]) @ p["c"]  # noqa: E731
    params = {"a": normal(3, 5), "b": normal(5, 3), "c": normal(3, 1)}
    merged_as_written(fn, params, normal(2, 4, 3), forced=forced, rows=(1,))


def test_a_number_that_is_an_argument_is_not_baked_in():
    params = {"a": normal(4, 8), "b": normal(8, 3)}
    fn = lambda p, x, t: x @ p["a"] @ p["b"] / t  # noqa: E731
    merged = fcjax.merge(fn, params, normal(5, 4), 2.0)
    for t in (2.0, 0.5, 3):
        np.testing.assert_allclose(
            merged.apply(merged.params, normal(5, 4), t), fn(params, normal(5, 4), t), rtol=1e-12
        )
    assert len(merged._compiled) <= 4


ONES = np.ones(8), np.ones(8)


def handed_twice(p, x):
    """One stack of weights, sliced twice; then one that stays the same, used twice."""
    y = lax.scan(lambda h, w: (jnp.tanh(h @ w[0] @ w[1]), None), x, (p["w"], p["w"]), 3)[0]
    a, b = p["w"][0], p["w"][0]
    return lax.scan(lambda h, _: (jnp.tanh(h @ a @ b), None), y, None, 2)[0]


def equal_constants(p, x):
    a, b = map(jnp.asarray, ONES)
    layer = lambda h, w: (jnp.tanh((h * a) @ (w[0] * b[:, None]) @ w[1]), None)  # noqa: E731
    return lax.scan(layer, x, (p["w"][:, :, :2], p["w"][:, :2]), 3)[0]


@both
@pytest.mark.parametrize("fn", [handed_twice, equal_constants])
def test_loops_that_read_equal_arrays(fn, forced):
    merged_as_written(fn, {"w": normal(3, 8, 8)}, normal(32, 8), forced=forced, rows=(1,))
