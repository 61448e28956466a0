"""Functions of looked-up rows, computed once for each row of the table."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training import relative_deviation
from zoo import cast, from_nnx, linen, weights

import fcjax
from fcjax.planning.plan import always_fold

VOCABULARY, WIDTH = 6, 4
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (5, 8)).astype(np.int32)
MATRICES = dict(zip("abc", weights((WIDTH, 12), (12, WIDTH), (WIDTH, 3)), strict=True))
OUTSIDE = IDS.copy()
OUTSIDE[0, 1], OUTSIDE[2, 3], OUTSIDE[3, 3] = VOCABULARY, 10**6, -VOCABULARY - 1
PARAMS = {"table": weights((VOCABULARY, WIDTH))[0], "gain": jnp.full(WIDTH, 1.5), **MATRICES}


def layer_norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


@jax.custom_jvp
def clipped(x):
    """Its derivative is that of the identity."""
    return jnp.clip(x, -0.5, 0.5)


clipped.defjvp(lambda primals, tangents: (clipped(*primals), tangents[0]))


@jax.custom_jvp
def row_softmax(x):
    """A softmax over the features with a derivative of its own."""
    return jnp.exp(x) / jnp.sum(jnp.exp(x), -1, keepdims=True)


@row_softmax.defjvp
def _row_softmax_jvp(primals, tangents):
    y, (dx,) = row_softmax(*primals), tangents
    return y, 2 * y * (dx - jnp.sum(y * dx, -1, keepdims=True))


def two_halves(p, h):
    left, right = jnp.split(h @ p["a"], 2, axis=-1)
    return jnp.concatenate([left * jax.nn.sigmoid(right), h[..., 1:3]], axis=-1)


ROWWISE = {
    "dense": lambda p, h: h @ p["a"],
    "norm and dense": lambda p, h: (layer_norm(h) * p["gain"]) @ p["a"],
    "relu": lambda p, h: jax.nn.relu(h @ p["a"]) @ p["b"],
    "gelu and residual": lambda p, h: h + jax.nn.gelu(h @ p["a"]) @ p["b"],
    "softplus": lambda p, h: jax.nn.softplus(h @ p["a"]),
    "custom derivative": lambda p, h: clipped(h @ p["a"]) @ p["b"],
    "custom derivative over features": lambda p, h: row_softmax(h @ p["a"]) @ p["b"],
    "softmax": lambda p, h: jax.nn.softmax(h @ p["a"]),
    "heads": lambda p, h: (h @ p["a"]).reshape(*h.shape[:-1], 3, 4).max(-1) * p["gain"][0],
    "gated halves": two_halves,
    "where": lambda p, h: jnp.where(h > 0, h, 0.1 * h) @ p["a"],
    "weights normalised later": lambda p, h: h @ (p["a"] / jnp.linalg.norm(p["a"], axis=0)),
    "tied": lambda p, h: layer_norm(h) @ p["table"].T,
}


def looked_up(fn, params, ids):
    """The function of looked-up rows, then something that mixes tokens."""
    return jnp.tanh(jnp.cumsum(fn(params, params["table"][ids]), axis=1))


def value_and_gradients(apply, params, ids):
    def loss(p):
        outputs = apply(p, ids)
        return jnp.sum(outputs**2), outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def hoists(fc):
    return bool(fc.plan.body.rows)


def reads(fc):
    """The feature shapes of what is looked up for the tokens."""
    gathers = [e.outputs[0].shape for e in fc.plan.body.equations if e.name == "gather"]
    return sorted(shape[2:] for shape in gathers if len(shape) > 2)


@pytest.mark.parametrize("name", ROWWISE)
def test_functions_of_rows_are_hoisted_with_backprops_gradient(name):
    params = cast(PARAMS, jnp.float64)
    apply_fn = functools.partial(looked_up, ROWWISE[name])
    with always_fold():
        fc = fcjax.front_contribute(apply_fn, params, IDS)
        assert hoists(fc)
        found = value_and_gradients(fc.apply, fc.params, IDS)
    expected = value_and_gradients(apply_fn, params, IDS)
    assert relative_deviation(found, expected, floor=1e-3) < 1e-12


@pytest.mark.parametrize("name", ["relu", "custom derivative over features"])
def test_second_derivatives_go_through_custom_ones(name):
    params = cast(PARAMS, jnp.float64)
    apply_fn = functools.partial(looked_up, ROWWISE[name])
    with always_fold():
        fc = fcjax.front_contribute(apply_fn, params, IDS)
        assert hoists(fc)
        found, expected = (
            jax.jvp(jax.grad(lambda p, f=f: jnp.sum(f(p, IDS) ** 2)), (params,), (params,))
            for f in (fc.apply, apply_fn)
        )
    assert relative_deviation(found, expected, floor=1e-3) < 1e-11


MIXING = {
    "positions": lambda p, h: (h + jnp.arange(8.0)[:, None]) @ p["a"],
    "sum over tokens": lambda p, h: (h - h.mean((0, 1))) @ p["a"],
    "shift": lambda p, h: h[:, ::-1] @ p["a"],
    "transpose": lambda p, h: jnp.swapaxes(h, 0, 1) @ p["a"],
    "token axes merged": lambda p, h: h.reshape(8, 5, WIDTH) @ p["a"],
    "mixed across a reshape": lambda p, h: h.reshape(40, WIDTH)[::-1].reshape(5, 8, WIDTH) @ p["a"],
    "sums across a transpose": lambda p, h: jnp.swapaxes(h, 0, 1).sum(-1)[:5] * p["gain"][0],
    "sort": lambda p, h: jnp.sort(h, axis=1) @ p["a"],
    "custom gradient": lambda p, h: doubled(h) @ p["a"],
    "products of tokens": lambda p, h: jnp.einsum("btd,bsd->bts", h, h),
}


@jax.custom_vjp
def doubled(x):
    return x * 1.0


doubled.defvjp(lambda x: (x * 1.0, None), lambda _, cotangent: (2.0 * cotangent,))


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_tokens_ends_the_region(name):
    params = cast(PARAMS, jnp.float64)
    apply_fn = functools.partial(looked_up, MIXING[name])
    with always_fold():
        fc = fcjax.front_contribute(apply_fn, params, IDS)
        found = value_and_gradients(fc.apply, fc.params, IDS)
    assert not hoists(fc)
    expected = value_and_gradients(apply_fn, params, IDS)
    assert relative_deviation(found, expected, floor=1e-3) < 1e-12


# Functions of one value, its partner of the same width, two parameters and the data.
ALONE = [
    lambda v, u, w, g, x: v @ w,
    lambda v, u, w, g, x: v * g + g,
    lambda v, u, w, g, x: jax.nn.relu(v),
    lambda v, u, w, g, x: jax.nn.softplus(v),
    lambda v, u, w, g, x: v - v.mean(-1, keepdims=True),
    lambda v, u, w, g, x: v * jax.lax.rsqrt(1 + jnp.square(u).sum(-1, keepdims=True)),
    lambda v, u, w, g, x: v + u,
    lambda v, u, w, g, x: jnp.concatenate([v[..., :2], v[..., 2:] * u[..., :2]], -1),
    lambda v, u, w, g, x: jnp.where(u > 0, v, 0.1 * u),
    lambda v, u, w, g, x: v.reshape(5, 8, 2, 2).swapaxes(2, 3).reshape(5, 8, 4),
]
TOGETHER = [
    lambda v, u, w, g, x: jnp.cumsum(v, 1),
    lambda v, u, w, g, x: v - u.mean((0, 1)),
    lambda v, u, w, g, x: v * x,
    lambda v, u, w, g, x: v.reshape(40, 4)[::-1].reshape(5, 8, 4),
    lambda v, u, w, g, x: jnp.swapaxes(jnp.swapaxes(v, 0, 1) * 2, 0, 1),
]


@pytest.mark.parametrize("seed", range(8))
def test_random_functions_of_rows_and_tokens(seed):
    rng = np.random.default_rng(seed)
    chosen = [ALONE[i] for i in rng.integers(0, len(ALONE), 6)]
    chosen += [(ALONE + TOGETHER)[i] for i in rng.integers(0, len(ALONE + TOGETHER), 6)]
    where = rng.integers(0, 1 << 30, (len(chosen), 2))
    params = {"table": rng.standard_normal((VOCABULARY, WIDTH))}
    params["w"] = rng.standard_normal((len(chosen), WIDTH, WIDTH)) / 2
    params["g"] = rng.standard_normal((len(chosen), WIDTH))
    x = rng.standard_normal((5, 8, 1))

    def apply_fn(p, ids):
        values = [jnp.take(p["table"], ids, axis=0, mode=("clip", "fill")[seed % 2])]
        for fn, (i, j), w, g in zip(chosen, where, p["w"], p["g"], strict=True):
            values.append(fn(values[i % len(values)], values[j % len(values)], w, g, x))
        return jnp.tanh(values[-1] + jnp.cumsum(values[len(values) // 2], 1))

    with always_fold():
        fc = fcjax.front_contribute(apply_fn, params, IDS)
        assert hoists(fc)
        found = value_and_gradients(fc.apply, fc.params, IDS)
        outside = jax.jit(fc.apply)(fc.params, OUTSIDE)
    expected = value_and_gradients(apply_fn, params, IDS)
    assert relative_deviation(found, expected, floor=1e-3) < 1e-11
    np.testing.assert_allclose(outside, jax.jit(apply_fn)(params, OUTSIDE), rtol=1e-9, atol=1e-12)


def test_the_frontier_is_looked_up():
    """Queries, keys and values, and the rows that the residual stream holds."""

    def apply_fn(p, ids):
        h = p["table"][ids]
        q, k, v = (layer_norm(h) @ w for w in (p["a"], p["a"] + 1.0, p["c"]))
        return (
            h.sum(1) + (jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k)) @ v).sum((1, 2))[:, None]
        )

    with always_fold():
        fc = fcjax.front_contribute(apply_fn, PARAMS, jax.ShapeDtypeStruct((64, 512), jnp.int32))
    assert reads(fc) == [(3,), (WIDTH,), (12,), (12,)]


def test_several_tables():
    def apply_fn(p, ids):
        first = jnp.tanh(p["table"][ids] @ p["c"])
        second = p["table"][ids[:, :, None]] @ p["c"]
        return jnp.cumsum(first, 1) + jnp.cumsum(second[:, :, 0], 1)

    params = cast(PARAMS, jnp.float64)
    with always_fold():
        fc = fcjax.front_contribute(apply_fn, params, IDS)
        found = value_and_gradients(fc.apply, fc.params, IDS)
    assert len(fc.plan.body.rows) == 2
    expected = value_and_gradients(apply_fn, params, IDS)
    assert relative_deviation(found, expected, floor=1e-3) < 1e-12


# --- row numbers outside the table --------------------------------------------------------------

READINGS = {
    "index": lambda table, ids: table[ids],
    "promise": lambda table, ids: table.at[ids].get(mode="promise_in_bounds"),
    "index clipped": lambda table, ids: table.at[ids].get(mode="clip"),
    "index filled": lambda table, ids: table.at[ids].get(mode="fill", fill_value=0.5),
    "negative as they are": lambda table, ids: table.at[ids].get(
        mode="fill", wrap_negative_indices=False
    ),
    "clip": lambda table, ids: jnp.take(table, ids, axis=0, mode="clip"),
    "wrap": lambda table, ids: jnp.take(table, ids, axis=0, mode="wrap"),
    "fill": lambda table, ids: jnp.take(table, ids, axis=0),
    "fill with 0": lambda table, ids: jnp.take(table, ids, axis=0, mode="fill", fill_value=0.0),
    "fill with 0.5": lambda table, ids: jnp.take(table, ids, axis=0, fill_value=0.5),
}


def rectified(p, h):
    """Forgets NaN."""
    z = h @ p["a"]
    return jnp.where(z > 0, z, 0.0)


FORGETTING = {
    "rectified": rectified,
    "power": lambda p, h: h ** jnp.zeros(WIDTH) + p["gain"],
    "constant columns": lambda p, h: jnp.concatenate([h, jnp.zeros_like(h)], -1) @ p["a"].T[:8],
}
NUMBERS = {
    "one behind": np.where(np.arange(40).reshape(5, 8) == 17, VOCABULARY, IDS),
    "one before": np.where(np.arange(40).reshape(5, 8) == 3, -VOCABULARY - 2, IDS),
    "several": OUTSIDE,
    "all inside": IDS,
    "negative": IDS - VOCABULARY,
    "all outside": IDS + VOCABULARY,
}


def checked_reading(apply_fn, ids, params=PARAMS):
    """Values and gradients, NaN included, equal those of the network as written."""
    params = cast(params, jnp.float64)
    with always_fold():
        fc = fcjax.front_contribute(apply_fn, params, ids)
        found = value_and_gradients(fc.apply, fc.params, ids)
    expected = value_and_gradients(apply_fn, params, ids)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * np.abs(np.nan_to_num(b)).max())
    return fc


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", ["norm and dense", "gelu and residual", *FORGETTING])
def test_row_numbers_outside_the_table_keep_their_meaning_and_their_gradient(reading, name):
    fn = FORGETTING.get(name) or ROWWISE[name]

    def apply_fn(p, ids):
        return jnp.swapaxes(fn(p, READINGS[reading](p["table"], ids)), 0, 1)

    fc = checked_reading(apply_fn, OUTSIDE)
    assert hoists(fc)


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("reading", READINGS)
def test_row_numbers_of_every_kind_are_read_as_written(reading, numbers):
    def apply_fn(p, ids):
        return jnp.cumsum(jnp.tanh(READINGS[reading](p["table"], ids) @ p["a"]), axis=1)

    assert hoists(checked_reading(apply_fn, NUMBERS[numbers].astype(np.int32)))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64, np.uint8, np.uint32])
@pytest.mark.parametrize("count", [1, 2, 127])
def test_numbers_of_every_integer_type_are_read_as_written(dtype, count):
    table = np.random.default_rng(0).standard_normal((count, WIDTH))
    ids = np.random.default_rng(1).integers(0, count + 2, (5, 8))
    ids = np.minimum(ids, np.iinfo(dtype).max).astype(dtype)
    checked_reading(
        lambda p, ids: jnp.cumsum(jnp.tanh(p["table"][ids] @ p["a"]), axis=1),
        ids, {**PARAMS, "table": jnp.asarray(table)},
    )  # fmt: skip


GATHERS = {
    "vmap over tables": lambda p, ids: jax.vmap(lambda t, i: t[i])(p["tables"], ids),
    "vmap over numbers": lambda p, ids: jax.vmap(lambda i: p["table"][i])(ids),
    "take along an axis": lambda p, ids: jnp.take_along_axis(
        p["tables"], ids[:, :, None], 1, mode="clip"
    ),
    "two axes": lambda p, ids: p["tables"][jnp.arange(5)[:, None], ids],
    "columns": lambda p, ids: jnp.take(p["table"].T, ids, axis=1).transpose(1, 2, 0),
    "one row each": lambda p, ids: p["table"][ids][:, :1],
}


@pytest.mark.parametrize("name", GATHERS)
def test_other_gathers_are_read_as_written(name):
    tables = np.random.default_rng(2).standard_normal((5, VOCABULARY, WIDTH))
    checked_reading(
        lambda p, ids: jnp.cumsum(jnp.tanh(GATHERS[name](p, ids) @ p["a"]), axis=1),
        OUTSIDE, {**PARAMS, "tables": jnp.asarray(tables)},
    )  # fmt: skip


def test_forward_mode_reads_outside_as_written():
    params = cast(PARAMS, jnp.float64)
    apply_fn = functools.partial(looked_up, ROWWISE["relu"])
    with always_fold():
        fc = fcjax.front_contribute(apply_fn, params, OUTSIDE)
        assert hoists(fc)
        found, expected = (
            jax.jvp(lambda p, f=f: f(p, OUTSIDE), (params,), (params,))
            for f in (fc.apply, apply_fn)
        )
    assert relative_deviation(found, expected, floor=1e-3) < 1e-12


@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (1, 1), (1, 8)])
def test_numbers_of_no_and_of_one_token_are_read_as_written(shape):
    ids = np.zeros(shape, np.int32)
    params = cast(PARAMS, jnp.float64)

    def apply_fn(p, ids):
        return jnp.tanh(p["table"][ids] @ p["a"])

    with always_fold():
        fc = fcjax.front_contribute(apply_fn, params, ids)
        found = value_and_gradients(fc.apply, fc.params, ids)
    expected = value_and_gradients(apply_fn, params, ids)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


# --- prices -------------------------------------------------------------------------------------


class Characters(nn.Module):
    """A look-up and a pre-norm feed-forward block."""

    vocabulary: int = 64
    width: int = 32

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(self.vocabulary, self.width)(ids)
        h = nn.relu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return jnp.cumsum(x + nn.Dense(self.width)(h), axis=1)


class NnxCharacters(nnx.Module):
    def __init__(self, rngs):
        self.table, self.norm = nnx.Embed(64, 32, rngs=rngs), nnx.LayerNorm(32, rngs=rngs)
        self.up, self.down = nnx.Linear(32, 128, rngs=rngs), nnx.Linear(128, 32, rngs=rngs)

    def __call__(self, ids):
        x = self.table(ids)
        return jnp.cumsum(x + self.down(nnx.relu(self.up(self.norm(x)))), axis=1)


def ids_of(*shape):
    return np.random.default_rng(1).integers(0, 64, shape).astype(np.int32)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_the_number_of_tokens_decides(framework):
    many, few = ids_of(16, 64), ids_of(2, 8)
    if framework == "linen":
        apply_fn, params = linen(Characters(), lambda rng: ((many,), None))
    else:
        apply_fn, params, _ = from_nnx(NnxCharacters(nnx.Rngs(0)), None)
    fc = fcjax.front_contribute(apply_fn, params, many)
    assert hoists(fc)
    assert not hoists(fcjax.front_contribute(apply_fn, params, few))
    assert fc.plan.after.flops < 0.1 * fc.plan.before.flops
    assert {row.rule for row in fc.report} == {"collapse"}
    assert all("computed for the 64 rows of" in row.reason for row in fc.report)
    for ids in (many, few):
        assert relative_deviation(fc.apply(fc.params, ids), apply_fn(params, ids)) < 1e-5


def test_a_large_vocabulary_is_left_as_written():
    apply_fn, params = linen(Characters(4096), lambda rng: ((ids_of(16, 64),), None))
    assert not hoists(fcjax.front_contribute(apply_fn, params, ids_of(16, 64)))


def test_nothing_is_hoisted_in_front_of_a_collapse_that_is_worth_more():
    """A wide map that positions follow: collapsed with the next, it never exists."""

    def apply_fn(p, ids, positions):
        return (p["table"][ids] @ p["up"] + positions) @ p["down"]

    table, up, down = weights((64, 8), (8, 4096), (4096, 8))
    params = {"table": table, "up": up, "down": down}
    fc = fcjax.front_contribute(apply_fn, params, ids_of(64, 64), np.ones((64, 4096), np.float32))
    assert not hoists(fc)
    assert {row.rule for row in fc.report if row.path != "table"} == {"collapse"}


def test_no_row_is_read_where_there_is_no_token_axis():
    fc = fcjax.front_contribute(lambda p, i: p["table"][i] @ p["a"], PARAMS, np.int32(3))
    assert not hoists(fc)
