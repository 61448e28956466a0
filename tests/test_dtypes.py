"""Programs in several dtypes: casts that round, constants in a narrower dtype, half precision."""

from __future__ import annotations

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_corners import both, checked, normal

import fcjax
from fcjax.planning.plan import always_fold

NARROW = [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float8_e4m3fn, jnp.float8_e5m2]
narrow = pytest.mark.parametrize("dtype", NARROW, ids=lambda d: d.__name__)

ROUNDED = {
    "by casts": lambda w, dtype: w.astype(dtype).astype(w.dtype),
    "and doubled": lambda w, dtype: (w.astype(dtype) * jnp.asarray(2, dtype)).astype(w.dtype),
    "twice": lambda w, dtype: w.astype(jnp.float32).astype(dtype).astype(w.dtype),
    "by precision": lambda w, dtype: lax.reduce_precision(w, 5, 7),
    "and reshaped": lambda w, dtype: (
        w.astype(dtype).T.reshape(-1).astype(w.dtype).reshape(w.T.shape).T
    ),
}


@both
@narrow
@pytest.mark.parametrize("name", ROUNDED)
def test_weights_that_are_rounded_and_widened_again_stay_rounded(name, dtype, forced):
    """Fake quantisation changes the function, however exact its product is formed."""

    def rounded(w):
        return ROUNDED[name](w, dtype)

    def fn(p, x):
        return jnp.tanh(x @ rounded(p["a"]) @ rounded(p["b"]) + rounded(p["c"])) @ rounded(p["d"])

    shapes = {"a": (4, 16), "b": (16, 3), "c": (3,), "d": (3, 2)}
    checked(fn, {k: normal(*shape) for k, shape in shapes.items()}, normal(32, 4), forced=forced)


@both
@narrow
def test_constants_meet_wide_data_as_narrow_as_they_were_computed(dtype, forced):
    m, v = (jnp.abs(normal(8, seed=i)).astype(dtype) + jnp.asarray(0.5, dtype) for i in (1, 2))

    def fn(p, x):
        scale = (m * v).astype(x.dtype)
        shift = (m - v).astype(x.dtype)
        return ((x @ p["a"]) * scale + shift) @ p["b"]

    checked(fn, {"a": normal(4, 8), "b": normal(8, 2)}, normal(32, 4), forced=forced)


@both
@pytest.mark.parametrize("of_stats", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("of_params", [jnp.float32, jnp.float64])
def test_batch_norm_with_statistics_of_another_dtype(of_params, of_stats, forced):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(16, dtype=x.dtype)(x)
            return nn.Dense(3)(nn.BatchNorm(use_running_average=True)(x))

    x = normal(32, 4)
    variables = Net().init(jax.random.key(0), x)
    drawn = jax.tree.map(lambda a: a + jnp.abs(normal(*a.shape)), variables)
    stats = jax.tree.map(lambda a: a.astype(of_stats), drawn["batch_stats"])

    def fn(p, x):
        return Net().apply({"params": p, "batch_stats": stats}, x)

    params = jax.tree.map(lambda a: a.astype(of_params), drawn["params"])
    checked(fn, params, x, forced=forced, close=1e-6 if of_params == jnp.float32 else 1e-11)
    with always_fold() if forced else contextlib.nullcontext():
        fc = fcjax.front_contribute(fn, params, x)
    np.testing.assert_allclose(fc.apply(params, x), fn(params, x), rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("large", [1e3, 1e6, 1e9])
def test_constants_are_added_up_before_they_meet_the_data(large, forced):
    """The mask of attention: one less a mask, times a large number."""

    def fn(p, x):
        q, k, v = (x @ p[name] for name in "qkv")
        scores = q @ k.T / 2 - large * (1 - jnp.tril(jnp.ones((6, 6))))
        return jax.nn.softmax(scores, -1) @ v @ p["o"]

    shapes = {"q": (4, 4), "k": (4, 4), "v": (4, 4), "o": (4, 4)}
    params = {k: normal(*shape, seed=ord(k)) for k, shape in shapes.items()}
    checked(fn, params, normal(6, 4), forced=forced)


@both
def test_integers_are_multiplied_in_the_dtype_of_each_reader(forced):
    def fn(p, i):
        centred = i - i.mean((0, 1), keepdims=True)
        q, k, v = (jnp.einsum("td,dhk->htk", i, p[name]) for name in "qkv")
        heads = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v
        return centred * jnp.einsum("htk,hkd->td", heads, p["o"])

    shapes = {"q": (1, 2, 4), "k": (1, 2, 4), "v": (1, 2, 4), "o": (2, 4, 1)}
    params = {k: normal(*s, seed=ord(k)).astype(jnp.float32) for k, s in shapes.items()}
    ids = jnp.asarray([[1], [4], [-2]], jnp.int32)
    fc = checked(fn, params, ids, forced=forced, close=1e-5)
    assert fc.apply(params, ids).dtype == fn(params, ids).dtype


# --- half precision ---


def errors(apply, params, x):
    """How far a network's values and gradients are from those in double precision."""
    weights = normal(32, 3, seed=9)

    def loss(p, x, dtype):
        out = apply(p, x).astype(dtype)
        return jnp.sum(out * weights.astype(dtype)), out

    return jax.grad(loss, has_aux=True)(params, x, jnp.float32)


def relative(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return [np.abs(a - b).max() / np.abs(b).max() for a, b in wide]


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-3, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("stored", ["half", "float32"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("kind", ["dense", "convolution", "normed"])
def test_products_of_half_precision_weights_keep_their_range(kind, dtype, stored, size):
    """Nothing is lost that the written order keeps: a product of two may leave float16's range."""

    def fn(p, x):
        a, b, x = (w.astype(dtype) for w in (p["a"], p["b"], x))
        if kind == "convolution":
            x, a, b = x.reshape(8, 4, 8), a[None], b[None]
            numbers = ("NWC", "WIO", "NWC")
            for w in (a, b):
                x = lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=numbers)
            return x.reshape(32, 3)
        if kind == "normed":
            x = x * lax.rsqrt(jnp.square(x / x.max()).mean(-1, keepdims=True) + 1e-3)
        return x @ a @ b

    storing = dtype if stored == "half" else jnp.float32
    params = {"a": normal(8, 16, scale=size), "b": normal(16, 3, scale=1 / 16)}
    params = jax.tree.map(lambda w: w.astype(storing), params)
    x = normal(32, 8, scale=min(1e3, 1 / size)).astype(dtype)
    with always_fold():
        fc = fcjax.front_contribute(fn, params, x)
        found = errors(fc.apply, fc.params, x)
    wide = jax.tree.map(lambda w: w.astype(jnp.float64), params)

    def exactly(p, x):
        x = x.astype(jnp.float64)
        if kind == "normed":
            x = x * lax.rsqrt(jnp.square(x / x.max()).mean(-1, keepdims=True) + 1e-3)
        return x @ p["a"] @ p["b"]

    expected = errors(exactly, wide, x)
    own = relative(errors(fn, params, x), expected)
    rounding = float(jnp.finfo(dtype).eps)
    for ours, theirs in zip(relative(found, expected), own, strict=True):
        assert ours <= 2 * theirs + rounding
    with always_fold():
        merged = fcjax.merge(fn, params, x)
        value = merged.apply(merged.params, x)
    exact = exactly(wide, x)
    (ours,), (theirs,) = relative(value, exact), relative(jax.jit(fn)(params, x), exact)
    assert ours <= 2 * theirs + rounding
