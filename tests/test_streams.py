"""Residual streams that only LayerNorms read: which are found, which refused, what it is worth."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcjax
from fcjax.expressions.written import written
from fcjax.measure import residual_bytes
from fcjax.planning.plan import always_fold, plan
from fcjax.planning.streams import centred, streams
from fcjax.tracing import trace
from fcjax.transform import DATA, PARAM

BATCH, LENGTH, WIDTH = 3, 5, 8


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def params_of(dtype=jnp.float64, width=WIDTH, hidden=12):
    """Two blocks and a readout."""
    shapes = {"up": (width, hidden), "down": (hidden, width)}
    shapes |= {"shift": (width,), "scale": (width,), "gain": (width,), "bias": (width,)}
    blocks = [
        {k: normal(*s, seed=10 * i + j) / 3 for j, (k, s) in enumerate(shapes.items())}
        for i in range(2)
    ]
    tree = {"blocks": blocks, "out": normal(width, 3, seed=30)}
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def layer_norm(x):
    shifted = x - x.mean(-1, keepdims=True)
    return shifted * jax.lax.rsqrt(jnp.square(shifted).mean(-1, keepdims=True) + 1e-6)


def rms_norm(x):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def written_by(block, x, norm=layer_norm):
    """What a block adds to its stream."""
    h = jnp.tanh((norm(x) * block["gain"] + block["bias"]) @ block["up"])
    return h @ block["down"] + block["shift"]


def stack(params, x, norm=layer_norm, last=layer_norm, between=lambda p, x: x):
    """Blocks on one stream, which ``between`` may change, and what ``last`` reads of it."""
    for block in params["blocks"]:
        x = between(block, x) + written_by(block, x, norm)
    return last(x) @ params["out"]


def read(apply_fn, params, *data):
    """The network as written."""
    leaves, structure = jax.tree.flatten(params)
    count = len(leaves)
    jaxpr = jax.make_jaxpr(
        lambda *a: apply_fn(jax.tree.unflatten(structure, a[:count]), *a[count:])
    )
    kinds = [PARAM] * count + [DATA] * len(data)
    return written(trace.flatten(jaxpr(*leaves, *data)), kinds)


def found(apply_fn, params, *data):
    """Shapes and axes of the streams."""
    return [(value.shape, axis) for value, axis in streams(read(apply_fn, params, *data))]


X = normal(BATCH, LENGTH, WIDTH, seed=40)
STREAM = ((BATCH, LENGTH, WIDTH), 2)

# --- what is a stream ---------------------------------------------------------------------------


def with_scales(params, x):
    """LayerScale on what is written."""
    for block in params["blocks"]:
        x = x + block["scale"] * written_by(block, x)
    return layer_norm(x) @ params["out"]


def halved(params, x):
    """A constant scale and a scale for each row on the stream itself."""
    rows = jnp.tanh(x[..., :1])
    return stack(params, x, between=lambda _, x: 0.5 * x * rows)


def in_heads(params, x):
    """The width as two axes, of which the norm takes one mean."""

    def norm(x):
        return layer_norm(x.reshape(BATCH, LENGTH, WIDTH))

    x = x.reshape(BATCH, LENGTH, 2, WIDTH // 2)
    for block in params["blocks"]:
        x = x + written_by(block, x, norm).reshape(x.shape)
    return norm(x) @ params["out"]


def with_a_class_token(params, x):
    """A token in front of the others, the only one that is read in the end."""
    token = jnp.broadcast_to(params["blocks"][0]["scale"], (BATCH, 1, WIDTH))
    x = jnp.concatenate([token, x], axis=1)
    return stack(params, x, last=lambda x: layer_norm(x[:, 0]))


def columns_first(params, x):
    """The width in front of the positions."""
    for block in params["blocks"]:
        h = jnp.tanh(jnp.einsum("btd,de->bet", layer_norm(jnp.swapaxes(x, 1, 2)), block["up"]))
        x = x + jnp.einsum("bet,ed->bdt", h, block["down"])
    return layer_norm(jnp.swapaxes(x, 1, 2)) @ params["out"]


STREAMS = {
    "blocks": (stack, X, [STREAM] * 2),
    "scales of channels": (with_scales, X, [STREAM] * 2),
    "scales of rows": (halved, X, [STREAM] * 2),
    "class token": (
        with_a_class_token,
        X,
        [((BATCH, LENGTH + 1, WIDTH), 2), ((BATCH, WIDTH), 1)],  # the last is sliced first
    ),
    "columns first": (
        columns_first,
        jnp.swapaxes(X, 1, 2),
        [((BATCH, WIDTH, LENGTH), 1), STREAM],  # the last is transposed first
    ),
    "one product": (lambda p, x: layer_norm(x @ p["blocks"][0]["up"]), X, [((3, 5, 12), 2)]),
}
each_stream = pytest.mark.parametrize("name", STREAMS)


@each_stream
def test_what_is_found(name):
    apply_fn, x, expected = STREAMS[name]
    assert found(apply_fn, params_of(), x) == expected


@each_stream
def test_value_and_every_gradient(name):
    apply_fn, x, _ = STREAMS[name]
    params, x = params_of(), x + 3.0
    with always_fold():
        fc = fcjax.front_contribute(apply_fn, params, x)
    assert "- mean)" in str(fc)
    loss = [lambda p, x, f=f: jnp.sum(jnp.sin(f(p, x))) for f in (apply_fn, fc.apply)]
    expected, actual = (jax.jit(jax.value_and_grad(f, (0, 1)))(params, x) for f in loss)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12 * float(jnp.max(jnp.abs(e))))


def test_the_readers_subtract_no_mean_any_more():
    network = centred(read(stack, params_of(), X))
    of_streams = [v for v, _ in streams(read(stack, params_of(), X))]
    assert len(of_streams) == 2
    data = [f for e in network.roots.values() for t in e.terms for f in t.factors if f.is_data]
    (given,) = network.body.inputs[-1:]
    assert {f.leaf.var for f in data if f.centred} == {given}


# --- what is none -------------------------------------------------------------------------------


def returned(params, x):
    """The stream's last value is a result."""
    x = x + written_by(params["blocks"][0], x)
    return x + written_by(params["blocks"][1], x)


def on_the_way(change):
    """The stream changed in front of every block; what is written last is still a stream."""
    return lambda p, x: stack(p, x, between=change), [STREAM]


def at_the_end(last):
    """The stream read by something else in the end."""
    return lambda p, x: stack(p, x, last=last), []


def sliced(x):
    """A norm of half the channels."""
    return jnp.concatenate([layer_norm(x[..., :4]), x[..., 4:]], axis=-1)


REFUSED = {
    "a result": (returned, []),
    "read by RMSNorm": at_the_end(rms_norm),
    "read as it is": at_the_end(lambda x: x),
    "read by a non-linearity": at_the_end(lambda x: layer_norm(jnp.tanh(x))),
    "read by a non-linearity on the way": on_the_way(lambda _, x: jnp.sin(x)),
    "masked": on_the_way(lambda block, x: x * block["scale"]),
    "sliced over the width": at_the_end(sliced),
    "a mean over positions as well": at_the_end(lambda x: x - x.mean((1, 2), keepdims=True)),
    "RMSNorm alone": (lambda p, x: stack(p, x, norm=rms_norm, last=rms_norm), []),
    "tokens of a BatchNorm": (lambda p, x: x @ p["out"] - (x @ p["out"]).mean((0, 1)), []),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    apply_fn, expected = REFUSED[name]
    assert found(apply_fn, params_of(), X) == expected
    assert (centred(read(apply_fn, params_of(), X)) is None) == (not expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_refused(dtype):
    """The mean would be cancelled only to the rounding of the weights."""
    assert found(stack, params_of(jnp.float32), X.astype(jnp.float32)) == [STREAM] * 2
    assert found(stack, params_of(dtype), X.astype(dtype)) == []


def test_half_precision_weights_are_refused():
    def apply_fn(params, x):
        return stack(jax.tree.map(lambda leaf: leaf.astype(x.dtype), params), x)

    assert found(apply_fn, params_of(jnp.bfloat16), X.astype(jnp.float32)) == []


def test_the_carry_of_a_loop_is_refused():
    """What a loop hands on is a result of its body."""

    def apply_fn(params, x):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["blocks"])
        x = jax.lax.scan(lambda x, block: (x + written_by(block, x), None), x, stacked)[0]
        return layer_norm(x) @ params["out"]

    network = read(apply_fn, params_of(), X)
    ((inner,),) = network.nested.values()
    assert streams(network) == []
    assert streams(inner) == []


# --- prices -------------------------------------------------------------------------------------


def test_it_is_taken_for_many_rows_and_declined_for_one():
    params = params_of(jnp.float32, 64, 64)
    many, one = (plan(read(stack, params, jnp.zeros((1, n, 64), jnp.float32))) for n in (4096, 1))
    assert any(f.centred and not f.is_data for f in _factors(many))
    assert not any(f.centred and not f.is_data for f in _factors(one))
    assert many.after.time < many.before.time


def _factors(found):
    return [f for how in found.recipes.values() for t in how.expr.terms for f in t.factors]


@pytest.mark.parametrize(("objective", "arrays"), [("time", 1.9), ("memory", 0.9)])
def test_it_saves_an_array_for_each_norm(objective, arrays):
    """Less than the network as written, and than deferring the scales of the rows alone."""
    params, x = params_of(jnp.float32, 64, 64), jnp.ones((4, 1024, 64), jnp.float32)

    def with_its_stream(params, x):
        *_, last = params["blocks"]
        h = x + written_by(params["blocks"][0], x)
        h = h + written_by(last, h)
        return layer_norm(h) @ params["out"], h[0, 0]

    fc, deferred = (
        fcjax.front_contribute(f, params, x, objective=objective) for f in (stack, with_its_stream)
    )
    saved = [residual_bytes(f, params, x) for f in (fc.apply, deferred.apply, stack)]
    array = x.size * x.dtype.itemsize
    assert saved[0] <= saved[1] - arrays * array
    assert saved[1] <= saved[2] - 1.9 * array


# --- accuracy -----------------------------------------------------------------------------------


def far(params, x):
    """A stream whose writers add a mean that is a thousand times what varies."""
    for block in params["blocks"]:
        x = x + written_by(block, x) + 1e3 * jnp.abs(block["scale"][0])
    return layer_norm(x) @ params["out"]


def errors(apply_fn, mean):
    """Relative errors of the gradient in float32: with the stream centred, and as written."""
    params, x = params_of(jnp.float32), (X + mean).astype(jnp.float32)
    with always_fold():
        fc = fcjax.front_contribute(apply_fn, params, x)
        found = [_gradient(f, params, x) for f in (fc.apply, apply_fn)]
    exact = _gradient(apply_fn, *jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, x)))
    return [float(jnp.linalg.norm(g - exact) / jnp.linalg.norm(exact)) for g in found]


def _gradient(function, params, x):
    """All gradients in one vector."""
    by_all = jax.grad(lambda p, x: jnp.sum(jnp.sin(function(p, x))), (0, 1))
    leaves = jax.tree.leaves(jax.jit(by_all)(params, x))
    return jnp.concatenate([leaf.ravel().astype(jnp.float64) for leaf in leaves])


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_accuracy_in_float32(mean):
    """The gradient errs no more than three times as much as the network as written."""
    centred_error, written_error = errors(stack, mean)
    assert centred_error <= 3 * written_error + 1e-6


def test_the_large_mean_of_a_stream_is_no_trap_any_more():
    """What the writers add to all channels alike costs the network as written digits."""
    centred_error, written_error = errors(far, 0.0)
    assert centred_error < 0.1 * written_error
    assert centred_error < 1e-5


# --- Flax ---------------------------------------------------------------------------------------


class Vit(nn.Module):
    """Patches, a class token, positions, pre-norm attention blocks, a head on the class token."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH)(x)
        token = self.param("token", nn.initializers.normal(), (1, 1, WIDTH))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, WIDTH)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(), x.shape[1:])
        for _ in range(2):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h)
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])


def test_vision_transformer():
    module = Vit()
    params = jax.eval_shape(module.init, jax.random.key(0), X)["params"]

    def apply_fn(params, x):
        return module.apply({"params": params}, x)

    members = found(apply_fn, params, X)
    assert members == [((BATCH, LENGTH + 1, WIDTH), 2)] * 5


@pytest.mark.parametrize(("rate", "count"), [(0.0, 4), (0.5, 1)])
def test_dropout_on_the_stream_is_refused(rate, count):
    """Without a rate it is no operation; with one only what nothing is dropped from is left."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = x + nn.Dense(WIDTH)(nn.tanh(nn.Dense(WIDTH)(nn.LayerNorm()(x))))
                x = nn.Dropout(rate, deterministic=False)(x)
                x = x + nn.Dense(WIDTH)(nn.tanh(nn.LayerNorm()(x)))
            return nn.Dense(3)(nn.LayerNorm()(x))

    module = Block()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = jax.eval_shape(module.init, keys, X)["params"]
    rngs = {"dropout": jax.random.key(2)}
    members = found(lambda p, x: module.apply({"params": p}, x, rngs=rngs), params, X)
    assert len(members) == count
