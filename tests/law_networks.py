"""Networks with the number of conservation laws that they have, counted by hand, and random ones.

A builder takes a random generator and returns `(apply_fn, params, args, count)`. Widths are random
and differ, so that no count is right by accident.
"""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fcjax.laws import symmetries
from fcjax.tracing import trace
from fcjax.transform import DATA, PARAM

RELUS = {
    "relu": jax.nn.relu,
    "leaky relu": lambda z: jax.nn.leaky_relu(z, 0.2),
    "abs": jnp.abs,
    "maximum": lambda z: jnp.maximum(z, 0),
    "where": lambda z: jnp.where(z > 0, z, 0),
    "squared relu": lambda z: jnp.square(jax.nn.relu(z)),
    "x relu(x)": lambda z: z * jax.nn.relu(z),
    "under jit": jax.jit(jax.nn.relu),
}


def width(rng):
    return int(rng.integers(2, 7))


def widths(rng, count):
    return [int(w) for w in rng.choice(np.arange(2, 9), count, replace=False)]


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape) / np.sqrt(max(shape[0], 1)))


def matrix(n):
    return n * (n + 1) // 2


def noise(rng, shapes):
    """Parameters of some shapes, none of them at an initial zero or one."""
    return jax.tree.map(lambda p: normal(rng, *p.shape), shapes)


def linen(rng, module, *args):
    """A linen module as a function, and parameters."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    return lambda p, *args: module.apply({"params": p}, *args), noise(rng, shapes)


def dense_chain(rng):
    """Plain dense layers with a random activation behind each."""
    sizes = widths(rng, 4)
    acts = [list(RELUS.values())[i] for i in rng.integers(0, len(RELUS), 2)]
    params = [{"w": normal(rng, a, b), "b": normal(rng, b)} for a, b in itertools.pairwise(sizes)]

    def apply(p, x):
        for layer, act in zip(p[:-1], acts, strict=True):
            x = act(x @ layer["w"] + layer["b"])
        return x @ p[-1]["w"] + p[-1]["b"]

    return apply, params, (normal(rng, 5, sizes[0]),), sizes[1] + sizes[2]


def linear_chain(rng):
    """Linear layers, each between two of which any mixing is a symmetry."""
    a, b, c, d = widths(rng, 4)
    params = [normal(rng, a, b), normal(rng, b, c), normal(rng, c, d), normal(rng, c)]

    def apply(p, x):
        return (-(x @ p[0]) @ p[1] * 0.5 + p[3]) @ p[2]

    return apply, params, (normal(rng, 5, a),), matrix(b) + matrix(c)


def linen_mlp(rng):
    a, b, c, d = widths(rng, 4)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(b)(x))
            x = nn.leaky_relu(nn.Dense(c, use_bias=False)(x))
            return nn.Dense(d)(x)

    x = normal(rng, 5, a)
    return *linen(rng, Net(), x), (x,), b + c


def nnx_mlp(rng):
    a, b, c, d = widths(rng, 4)

    def model():
        rngs = nnx.Rngs(0)
        one, two, three = (nnx.Linear(i, o, rngs=rngs) for i, o in ((a, b), (b, c), (c, d)))
        return nnx.Sequential(one, nnx.relu, two, three)

    graph, params = nnx.split(nnx.eval_shape(model), nnx.Param)
    x = normal(rng, 5, a)
    return lambda p, x: nnx.merge(graph, p)(x), noise(rng, params), (x,), b + matrix(c)


def linear_stream(rng):
    """Residual blocks on a stream that nothing non-linear reads: one matrix for the stream."""
    a, d, h, k, out = widths(rng, 5)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(d)(x)
            for inner in (h, k):
                x = x + nn.Dense(d)(nn.relu(nn.Dense(inner)(x)))
            return nn.Dense(out)(x)

    x = normal(rng, 5, a)
    return *linen(rng, Net(), x), (x,), matrix(d) + h + k


def relu_stream(rng):
    """Residual layers with a relu behind the sum, beside a branch that is concatenated."""
    a, d, h, out = widths(rng, 4)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(d)(x)
            for _ in range(2):
                y = nn.relu(y + nn.Dense(d)(y))
            return nn.Dense(out)(jnp.concatenate([y, nn.relu(nn.Dense(h)(x))], axis=-1))

    x = normal(rng, 5, a)
    return *linen(rng, Net(), x), (x,), d + h


def convolutions(rng):
    """Convolutions with pooling, and a dense layer that reads the flattened image."""
    a, b, c, d = widths(rng, 4)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.relu(nn.Conv(a, (3, 3))(x)), (2, 2), strides=(2, 2))
            x = nn.relu(nn.Conv(b, (2, 2), padding="VALID")(x))
            x = nn.avg_pool(nn.Conv(c, (1, 1), use_bias=False)(x), (2, 2), strides=(1, 1))
            return nn.Dense(d)(x.reshape(x.shape[0], -1))

    x = normal(rng, 2, 6, 6, 2)
    return *linen(rng, Net(), x), (x,), a + b + matrix(c)


def depthwise(rng):
    """A depthwise convolution, with one or two kernels for each channel."""
    a, d = widths(rng, 2)
    each = int(rng.integers(1, 3))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(a, (1, 1))(x))
            x = nn.relu(nn.Conv(a * each, (3,) * 2, feature_group_count=a)(x))
            return nn.Conv(d, (1, 1))(x).mean(axis=(1, 2))

    x = normal(rng, 2, 4, 4, 3)
    return *linen(rng, Net(), x), (x,), a + a * each


def linear_convolutions(rng):
    """Two linear convolutions: a matrix over channels."""
    a, b = widths(rng, 2)
    params = {
        "one": normal(rng, 3, 3, 2, a),
        "two": normal(rng, 3, 3, a, b),
        "bias": normal(rng, a),
    }

    def apply(p, x):
        for name, bias in (("one", p["bias"]), ("two", 0.0)):
            x = bias + jax.lax.conv_general_dilated(
                x, p[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return x

    return apply, params, (normal(rng, 2, 4, 4, 2),), matrix(a)


def attention(rng):
    """Multi-head attention with biases and a causal mask, read by a linear or a relu layer."""
    heads, size = int(rng.integers(1, 4)), width(rng)
    relu, out, d = bool(rng.integers(2)), width(rng), width(rng)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = nn.make_causal_mask(x[..., 0])
            x = nn.MultiHeadDotProductAttention(heads, qkv_features=heads * size, out_features=d)(
                x, mask=mask
            )
            return nn.Dense(out)(nn.relu(x) if relu else x)

    x = normal(rng, 2, 4, 3)
    count = 2 * heads * matrix(size) + (d if relu else matrix(d))
    return *linen(rng, Net(), x), (x,), count


def nnx_attention(rng):
    heads, size = 2, width(rng)

    def layer():
        return nnx.MultiHeadAttention(heads, 3, heads * size, decode=False, rngs=nnx.Rngs(0))

    graph, params, rest = nnx.split(nnx.eval_shape(layer), nnx.Param, ...)
    x = normal(rng, 2, 4, 3)
    count = 2 * heads * matrix(size)
    return lambda p, x: nnx.merge(graph, p, rest)(x), noise(rng, params), (x,), count


def grouped_queries(rng):
    """Two query heads for each head of keys and values."""
    groups, size = width(rng), width(rng)
    shapes = {"q": (3, 2 * groups, size), "k": (3, groups, size), "v": (3, groups, size)}
    params = {name: normal(rng, *shape) for name, shape in shapes.items()}
    params["o"] = normal(rng, 2 * groups, size, 3)

    def apply(p, x):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        weights = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", q, k))
        return jnp.einsum("bhqs,bshk,hkd->bqd", weights, v, p["o"])

    return apply, params, (normal(rng, 2, 4, 3),), 2 * groups * matrix(size)


def rotary(rng):
    """Rotary embeddings leave the norm of each pair of coordinates, and the values' matrices."""
    heads, half = width(rng), width(rng)
    shapes = dict.fromkeys("qkv", (3, heads, 2 * half))
    params = {name: normal(rng, *shape) for name, shape in shapes.items()}
    params["o"] = normal(rng, heads, 2 * half, 3)
    angles = jnp.arange(4.0)[:, None, None] * jnp.arange(1.0, half + 1)

    def rotated(z):
        a, b = jnp.split(z, 2, axis=-1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def apply(p, x):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", rotated(q), rotated(k)))
        return jnp.einsum("bhqs,bshk,hkd->bqd", weights, v, p["o"])

    return apply, params, (normal(rng, 2, 4, 3),), heads * half + heads * matrix(2 * half)


def gated(rng):
    """SwiGLU, one law a unit, or ReGLU, two; the gate and the branch in one kernel or in two."""
    a, h, out = widths(rng, 3)
    gate, count = [(jax.nn.silu, h), (jax.nn.relu, 2 * h)][int(rng.integers(2))]
    fused = bool(rng.integers(2))
    params = {"gate": normal(rng, a, h), "up": normal(rng, a, h), "down": normal(rng, h, out)}
    if fused:
        params = {"both": normal(rng, a, 2 * h), "down": normal(rng, h, out)}

    def apply(p, x):
        left, right = (
            jnp.split(x @ p["both"], 2, axis=-1) if fused else (x @ p["gate"], x @ p["up"])
        )
        return (gate(left) * right) @ p["down"]

    return apply, params, (normal(rng, 5, a),), count


def norm_gains(rng):
    """Gains and shifts of norms, each read by one or two dense layers."""
    a, d, h, out = widths(rng, 4)
    norm = [nn.LayerNorm, nn.RMSNorm][int(rng.integers(2))]

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(d)(x)
            x = x + nn.Dense(d)(nn.gelu(nn.Dense(h)(norm()(x))))
            x = norm()(x)
            return nn.Dense(out)(x) * jnp.tanh(nn.Dense(out)(x))

    x = normal(rng, 5, a)
    return *linen(rng, Net(), x), (x,), 2 * d


def embedding(rng):
    """Rows of a table, behind which stands a linear or a relu layer."""
    d, h, out = widths(rng, 3)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Dense(out)(nn.relu(nn.Dense(h)(nn.Embed(7, d)(ids))))

    ids = jnp.asarray(rng.integers(0, 7, (4, 3)))
    return *linen(rng, Net(), ids), (ids,), matrix(d) + h


def gains(rng):
    """Trainable scales in front of and behind a relu, and rematerialisation."""
    a, h, out = widths(rng, 3)
    params = {
        "w": normal(rng, a, h), "g": normal(rng, h), "s": normal(rng, h), "v": normal(rng, h, out)
    }  # fmt: skip

    def apply(p, x):
        hidden = jax.checkpoint(lambda w, g: jax.nn.relu(x @ w * g))(p["w"], p["g"])
        return (hidden * p["s"]) @ p["v"]

    return apply, params, (normal(rng, 5, a),), 3 * h


def heads_of_units(rng):
    """DenseGeneral with two output axes: one law for each pair of indices."""
    a, h, k, out = widths(rng, 4)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.DenseGeneral((h, k))(x))
            return nn.DenseGeneral(out, axis=(-2, -1))(x)

    x = normal(rng, 5, a)
    return *linen(rng, Net(), x), (x,), h * k


BUILDERS = [
    dense_chain, linear_chain, linen_mlp, nnx_mlp, linear_stream, relu_stream, convolutions,
    depthwise, linear_convolutions, attention, nnx_attention, grouped_queries, rotary, gated,
    norm_gains, embedding, gains, heads_of_units,
]  # fmt: skip


def build(seed):
    """The network of a number: every kind comes in turn, with other widths each time."""
    rng = np.random.default_rng(seed)
    return BUILDERS[seed % len(BUILDERS)](rng)


def scalar_loss(apply_fn, args, seed=0):
    """A loss that weighs every output differently."""
    rng = np.random.default_rng(seed)

    def loss(p):
        out = apply_fn(p, *args)
        return jnp.sum(jnp.sin(out * rng.standard_normal(out.shape)))

    return loss


def found(apply_fn, params, *args):
    """The symmetries of a network."""
    leaves, structure = jax.tree.flatten(params)
    count = len(leaves)

    def flat(*inputs):
        return apply_fn(jax.tree.unflatten(structure, inputs[:count]), *inputs[count:])

    body = trace.flatten(jax.make_jaxpr(flat)(*leaves, *args))
    return symmetries.find(body, [PARAM] * count + [DATA] * len(args))
