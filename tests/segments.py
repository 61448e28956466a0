"""Networks with linear segments that are wider than what backpropagation can reach of them.

Every builder is registered under its function's name, as in `zoo`; `build(name)` makes it in
float64, with its initial values as they are: orthogonality and balance are what the rules look for.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import zoo
from flax import nnx
from zoo import rows, sequences, squared_error, tokens_of

TOKENS = 16


@dataclass(frozen=True)
class Segments(zoo.Network):
    """A network, and how small it becomes.

    count: the expected number of trained weights, for optimizers that need no rho; None if nothing
        can be reduced.
    rho: the same for optimizers that need it, where that differs.
    data: the training inputs that `front_contribute` is given, or None.
    """

    count: int | None = None
    rho: int | None = None
    data: Any = None


_BUILDERS: dict[str, tuple[Callable, int | None, int | None]] = {}


def segments(count: int | None, rho: int | None = None):
    """Register a builder of `(apply_fn, params, batch)` and optionally a loss and data."""

    def register(builder):
        _BUILDERS[builder.__name__] = (builder, count, rho or count)
        return builder

    return register


def names() -> list[str]:
    """Every network's name, in order of registration."""
    return list(_BUILDERS)


@functools.cache
def build(name: str) -> Segments:
    """Build one network."""
    builder, count, rho = _BUILDERS[name]
    apply_fn, params, batch, *more = builder()
    loss, data = (*more, *[squared_error, None][len(more) :])
    params = zoo.cast(params, jnp.float64)
    return Segments(name, apply_fn, params, batch, loss, count, rho, data)


def size(params) -> int:
    """The number of weights of a pytree."""
    return sum(np.size(leaf) for leaf in jax.tree.leaves(params))


# --- initial values --------------------


def normal(*shapes, seed=0, scale=1.0):
    """Random arrays that keep the variance of their rows' images near one."""
    rng = np.random.default_rng(seed)
    return [scale * rng.standard_normal(s) / np.sqrt(s[-2] if len(s) > 1 else 9) for s in shapes]


def orthogonal(n, m=None, seed=0):
    """A matrix of shape (n, m) with orthonormal rows or columns."""
    m = n if m is None else m
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((max(n, m), min(n, m))))[0]
    return q if n >= m else q.T


def balanced(*sizes, seed=0):
    """A chain of matrices with `W_j^T W_j = W_{j+1} W_{j+1}^T`."""
    rank = min(sizes)
    bases = [orthogonal(n, rank, seed=seed + i) for i, n in enumerate(sizes)]
    root = np.diag(np.linspace(1.0, 0.5, rank))
    return [a @ root @ b.T for a, b in itertools.pairwise(bases)]


def deep(middle, n_in=12, width=128, n_out=3):
    """First and last layers drawn at random around given middle ones."""
    first, last = normal((n_in, width), (width, n_out), scale=0.7)
    return [first, *middle, last]


def chain(params, x):
    """The product of all matrices."""
    return functools.reduce(jnp.matmul, params, x)


def pair(params, x):
    """Two dense layers with biases."""
    return (x @ params["w"] + params["b"]) @ params["v"] + params["c"]


def dense_pair(n_in, hidden, n_out, seed=0):
    """Parameters of `pair`, none of them zero."""
    shapes = {"w": (n_in, hidden), "b": (hidden,), "v": (hidden, n_out), "c": (n_out,)}
    return dict(zip(shapes, normal(*shapes.values(), seed=seed), strict=True))


# --- the table of the documentation --------------------


@segments(225)
def wide_pair():
    """Two layers, drawn at random: 12 + 3 of 128 directions."""
    return chain, normal((12, 128), (128, 3)), rows(12, 3, TOKENS)


@segments(675, rho=752)
def orthogonal_middles():
    """Three layers of 128 with orthogonal matrices between them."""
    return chain, deep([orthogonal(128, seed=i) for i in (1, 2)]), rows(12, 3, TOKENS)


@segments(675, rho=752)
def orthogonal_in_float32():
    """The same, orthogonal to the rounding of float32 only."""
    middles = [np.float32(orthogonal(128, seed=i)) for i in (1, 2)]
    params = [np.float32(w) for w in deep(middles)]
    return chain, params, rows(12, 3, TOKENS)


@segments(63)
def balanced_chain():
    """Five layers in balance, which reach the 3 directions of their product."""
    return chain, balanced(12, 128, 128, 128, 3), rows(12, 3, TOKENS)


@segments(None)
def random_chain():
    """Deep and drawn at random: everything is reached."""
    return chain, normal((8, 24), (24, 24), (24, 3)), rows(8, 3, TOKENS)


# --- segments inside networks --------------------


@segments(867)
def three_biased_segments():
    """Three pairs with biases, 3,670 weights, with relu between them; one has a residual."""
    params = [dense_pair(5, 96, 5), dense_pair(5, 72, 14, seed=1), dense_pair(14, 64, 3, seed=2)]

    def apply_fn(params, x):
        x = jax.nn.relu(x + pair(params[0], x))
        x = jax.nn.relu(pair(params[1], x))
        return pair(params[2], x)

    return apply_fn, params, rows(5, 3, TOKENS)


@segments(59)
def zero_biases():
    """A pair as Flax initialises it: the biases move within what the weights reach."""
    params = dense_pair(4, 40, 3) | {"b": np.zeros(40), "c": np.zeros(3)}
    return pair, params, rows(4, 3, TOKENS)


@segments(5 * 18 + 18 * 5 + 5 * 18 + 18 * 3)
def identity_edges():
    """A linear residual stream, which is one space before and behind its branch."""
    params = normal((5, 48), (48, 5), (5, 48), (48, 3))

    def apply_fn(params, x):
        h = jax.nn.relu(x) @ params[0]
        return jnp.tanh((h + 0.3 * (h @ params[1] @ params[2])) @ params[3])

    return apply_fn, params, rows(5, 3, TOKENS)


@segments(4 * 17 + 4 * 17 + 17 * 5 + 17 * 4 + 4 * 3)
def parallel_branches():
    """Two writers and two readers of one space, one behind a non-linear function."""
    params = dict(zip("abcde", normal((4, 64), (4, 64), (64, 5), (64, 4), (4, 3)), strict=True))

    def apply_fn(params, x):
        h = x @ params["a"] - 0.5 * jnp.tanh(x) @ params["b"]
        return jnp.sum(jnp.sin(h @ params["c"]), axis=-1, keepdims=True) + (
            jax.nn.gelu(h @ params["d"]) @ params["e"]
        )

    return apply_fn, params, rows(4, 3, TOKENS)


@segments(9 * 9)
def constant_scales():
    """Constant numbers inside a segment."""
    params = normal((5, 30), (30, 4))
    return lambda p, x: -((x / 2) @ p[0] * 3.0) @ p[1] * 0.5, params, rows(5, 4, TOKENS)


@segments(None)
def scaled_rows():
    """A factor for every row, which is a product of two inputs."""
    params = normal((5, 30), (30, 4))
    return lambda p, x: jnp.cos(x[:, :1]) * (x @ p[0]) @ p[1], params, rows(5, 4, TOKENS)


@segments(None)
def scaled_channels():
    """A constant scale of every hidden channel, which makes the channels differ."""
    scale = np.linspace(0.5, 1.5, 40)
    params = normal((5, 40), (40, 3))
    return lambda p, x: (x @ p[0] * scale) @ p[1], params, rows(5, 3, TOKENS)


@segments(None)
def gained_channels():
    """A trained gain inside a segment."""
    params = [*normal((5, 40), (40, 3)), np.linspace(0.5, 1.5, 40)]
    return lambda p, x: (x @ p[0] * p[2]) @ p[1], params, rows(5, 3, TOKENS)


@segments(None)
def sliced_channels():
    """Something that reads a part of the hidden channels."""
    params = normal((5, 40), (40, 3), (5, 3))
    return lambda p, x: x @ p[0] @ p[1] + jnp.tanh((x @ p[0])[:, :3]), params, rows(5, 3, TOKENS)


class Attention(nn.Module):
    """Attention with heads far wider than the model, all maps with biases."""

    @nn.compact
    def __call__(self, x):
        h = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=80)(x)
        return nn.Dense(3)(jnp.tanh(x + h))


@segments(743)
def attention():
    """Query meets key and value meets output, per head, in spaces of 40."""
    batch = sequences(4, 3, batch_size=4, length=5)
    apply_fn, params = zoo.linen(Attention(), batch)
    return apply_fn, zoo.off_initial(params), batch


@segments(2 * (2 * 4 * 20 + 2 * 20) + (2 * 4 * 18 + 2 * 18) + 2 * 18 * 4 + 4 + 4 * 3 + 3)
def masked_attention():
    """The same with biases in all maps and a causal mask, written out."""
    heads = dict.fromkeys(("query", "key", "value"), (4, 2, 40))
    shapes = heads | {f"{name}_bias": (2, 40) for name in heads}
    shapes |= {"out": (2, 40, 4), "out_bias": (4,), "head": (4, 3), "head_bias": (3,)}
    params = dict(zip(shapes, normal(*shapes.values()), strict=True))

    def apply_fn(params, x):
        query, key, value = (
            jnp.einsum("bti,ihk->bthk", x, params[name]) + params[f"{name}_bias"] for name in heads
        )
        scores = jnp.einsum("bthk,bshk->bhts", query * 40**-0.5, key)
        weights = jax.nn.softmax(jnp.where(jnp.tri(5, dtype=bool), scores, -1e9))
        mixed = jnp.einsum("bhts,bshk->bthk", weights, value)
        hidden = jnp.einsum("bthk,hko->bto", mixed, params["out"]) + params["out_bias"]
        return jnp.tanh(x + hidden) @ params["head"] + params["head_bias"]

    return apply_fn, params, sequences(4, 3, batch_size=4, length=5)


@segments(3 * 4 * 8 + 8 + 8 * 3)
def linear_attention():
    """Keys meet values over the tokens, then queries meet the result; no softmax in between."""
    shapes = {"q": (4, 40), "k": (4, 40), "v": (4, 40), "o": (40, 3), "b": (1, 40)}
    params = dict(zip(shapes, normal(*shapes.values(), scale=0.5), strict=True))

    def apply_fn(params, x):
        memory = jnp.einsum("bsk,bsv->bkv", x @ params["k"], x @ params["v"] + params["b"])
        mixed = jnp.einsum("btk,bkv->btv", x @ params["q"], memory)
        return jnp.tanh(mixed @ params["o"])

    return apply_fn, params, sequences(4, 3, batch_size=4, length=5)


@segments(2 * 6 * 12)
def squared_products():
    """Contractions over two shared spaces close a cycle, so the smaller one keeps its entries."""
    params = normal((6, 30), (6, 30))

    def apply_fn(params, x):
        a, b = (jnp.einsum("n,km->nkm", jnp.sin(x[:, i]), p) for i, p in enumerate(params))
        return jnp.einsum("nkm,nkm->n", a, b)[:, None]

    return apply_fn, params, rows(4, 1, TOKENS)


@segments(2 * 16 * (4 + 1 + 3))
def mixed_heads():
    """Value and output maps per head, with a constant mixture of positions in between."""
    mix = np.random.default_rng(9).dirichlet(np.ones(5), (2, 5))
    params = dict(zip("vbo", normal((4, 2, 40), (2, 40), (2, 40, 3)), strict=True))

    def apply_fn(params, x):
        value = jnp.einsum("bsi,ihk->bshk", x, params["v"]) + params["b"]
        return jnp.tanh(jnp.einsum("hts,bshk,hko->bto", mix, value, params["o"]))

    return apply_fn, params, sequences(4, 3, batch_size=4, length=5)


@segments(2 * (4 * 8) + 4 * 4 + 4 * 3)
def bilinear_scores():
    """Two maps that meet each other only, between tokens."""
    params = dict(zip("qkvo", normal((4, 40), (4, 40), (4, 4), (4, 3)), strict=True))

    def apply_fn(params, x):
        scores = jnp.einsum("btk,bsk->bts", x @ params["q"], x @ params["k"])
        return jax.nn.softmax(scores) @ (x @ params["v"]) @ params["o"]

    return apply_fn, params, sequences(4, 3, batch_size=4, length=5)


@segments(6 * 6)
def tied_autoencoder():
    """Encoder W, decoder W transposed."""
    params = {"w": 0.5 * normal((6, 40))[0]}
    return lambda p, x: jnp.tanh(x) @ p["w"] @ p["w"].T, params, rows(6, 6, TOKENS)


@segments(None)
def tied_square():
    """A square matrix that is used twice: both of its axes are one space, reached in full."""
    params = dict(zip("awb", normal((4, 20), (20, 20), (20, 3)), strict=True))
    return lambda p, x: x @ p["a"] @ p["w"] @ p["w"] @ p["b"], params, rows(4, 3, TOKENS)


class Blocks(nn.Module):
    """Pairs with biases and a residual, as a linen module."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(x + nn.Dense(x.shape[-1])(nn.Dense(40)(x)))
        return nn.Dense(3)(nn.Dense(30)(x))


@segments(135)
def linen_blocks():
    """A linen module with its own initial values, biases zero."""
    batch = rows(4, 3, TOKENS)
    return *zoo.linen(Blocks(), batch), batch


class NnxBlocks(nnx.Module):
    """Pairs around relu."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(4, 40, rngs=rngs), nnx.Linear(40, 4, rngs=rngs)
        self.out = nnx.Sequential(nnx.Linear(4, 30, rngs=rngs), nnx.Linear(30, 3, rngs=rngs))

    def __call__(self, x):
        return self.out(nnx.relu(self.down(self.up(x))))


@segments(135)
def nnx_blocks():
    """Flax NNX."""
    return zoo.from_nnx(NnxBlocks(nnx.Rngs(0)), rows(4, 3, TOKENS))


@segments(152)
def equinox_blocks():
    """Equinox layers (their kernels are transposed) mapped over rows."""
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = [(4, 40), (40, 4), (4, 30), (30, 3)]
    layers = [eqx.nn.Linear(a, b, key=k) for (a, b), k in zip(sizes, keys, strict=True)]
    layers.insert(2, eqx.nn.Lambda(jax.nn.gelu))
    params, static = eqx.partition(eqx.nn.Sequential(layers), eqx.is_array)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, rows(4, 3, TOKENS)


@segments(344)
def rematerialised():
    """Pairs inside jax.checkpoint, one around the other's half."""
    params = normal((4, 40), (40, 4), (4, 40), (40, 3))

    @jax.checkpoint
    def block(up, down, x):
        return jnp.tanh(x @ up @ down)

    def apply_fn(p, x):
        return jax.checkpoint(lambda w, h: h @ w)(p[2], block(p[0], p[1], x)) @ p[3]

    return apply_fn, params, rows(4, 3, TOKENS)


@segments(192)
def cond_inside():
    """Branches that read different pairs, and one pair that both read."""
    params = dict(zip("abcdef", normal(*[(4, 40), (40, 4)] * 3), strict=True))

    def apply_fn(params, x):
        def first(h):
            return jnp.tanh(h @ params["a"] @ params["b"]) @ params["c"] @ params["d"]

        def second(h):
            return jnp.sin(h @ params["c"] @ params["d"])

        h = jax.lax.cond(x[0, 0] > 0, first, second, x)
        return h @ params["e"] @ params["f"]

    return apply_fn, params, rows(4, 4, TOKENS)


@segments(3 * 2 * 4 * 8 + 3 * 8)
def scanned_layers():
    """Stacked layers, of which the first reach 8 directions and the last 4 or fewer."""
    up, down = normal((3, 4, 40), (3, 40, 4))
    up[2], down[2] = balanced(4, 40, 4)
    params = {"up": up, "down": down, "bias": np.zeros((3, 40))}

    def apply_fn(params, x):
        def layer(h, p):
            return jnp.tanh(h + (h @ p["up"] + p["bias"]) @ p["down"]), None

        return jax.lax.scan(layer, x, params)[0]

    return apply_fn, params, rows(4, 4, TOKENS)


@segments(1944)
def recurrent():
    """A recurrence whose state is a linear space, carried by a scan."""
    v = orthogonal(40, 1)
    params = {
        "in": normal((4, 40))[0], "state": 0.5 * (np.eye(40) - 2 * v @ v.T),
        "out": normal((40, 3))[0], "up": normal((4, 30))[0], "down": normal((30, 4))[0],
    }  # fmt: skip

    def apply_fn(params, x):
        def step(state, x_t):
            state = (
                state @ params["state"]
                + jnp.tanh(x_t @ params["up"] @ params["down"]) @ (params["in"])
            )
            return state, state @ params["out"]

        start = jnp.zeros((x.shape[0], 40), x.dtype)
        return jnp.swapaxes(jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1))[1], 0, 1)

    return apply_fn, params, sequences(4, 3, batch_size=4, length=5)


@segments(3 * (4 + 2) * 18)
def mapped_over_params():
    """An ensemble of three pairs, mapped over their parameters."""
    params = normal((3, 4, 64), (3, 64, 2))

    def apply_fn(params, x):
        members = jax.vmap(lambda up, down: jnp.tanh(x @ up @ down))(*params)
        return jnp.mean(members, axis=0)

    return apply_fn, params, rows(4, 2, TOKENS)


def images(channels, size=6, n_out=3, batch_size=8):
    """Batches of images: x (batch_size, size, size, channels), target (batch_size, n_out)."""

    def batch(rng):
        x = rng.standard_normal((batch_size, size, size, channels))
        return (x,), zoo.teach(x.mean(axis=(1, 2)), n_out)

    return batch


class Convolutions(nn.Module):
    """Pairs of convolutions, one spatial with bias, relu, pooling, and a dense pair."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (1, 1))(nn.Conv(40, (3, 3))(x)))
        x = nn.relu(nn.Conv(3, (3, 3), padding="VALID")(nn.Conv(64, (1, 1), use_bias=False)(x)))
        return nn.Dense(3)(nn.Dense(40)(x.reshape(x.shape[0], -1)))


@segments(3580)
def convolutions():
    """Channels as hidden spaces, taps as directions; a dense pair behind a reshape."""
    batch = images(2)
    apply_fn, params = zoo.linen(Convolutions(), batch)
    return apply_fn, zoo.off_initial(params), batch


class Heads(nn.Module):
    """DenseGeneral into heads and out of them, as one linear segment."""

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((2, 24))(x)
        return nn.tanh(nn.DenseGeneral(3, axis=(-2, -1))(x))


@segments(227)
def dense_general():
    """Kernels with an axis of heads."""
    batch = sequences(4, 3, batch_size=4, length=5)
    return *zoo.linen(Heads(), batch), batch


@segments(None)
def flattened_heads():
    """A hidden axis that one layer writes whole and another reads in two pieces."""
    params = dict(zip("ab", normal((4, 48), (2, 24, 3)), strict=True))

    def apply_fn(params, x):
        h = (x @ params["a"]).reshape(x.shape[0], 2, 24)
        return jnp.tanh(jnp.einsum("bhk,hko->bo", h, params["b"]))

    return apply_fn, params, rows(4, 3, TOKENS)


@segments(None)
def embedding():
    """A look-up, then a dense pair: 7 words and 4 outputs reach 11 of 40 directions."""
    params = {"table": normal((7, 40))[0], "up": normal((40, 4))[0], "down": normal((4, 3))[0]}

    def apply_fn(params, ids):
        return jnp.tanh(params["table"][ids] @ params["up"]) @ params["down"]

    return apply_fn, params, tokens_of(7, 3, 4, 5)


@segments(49)
def normalised():
    """An RMS norm of a linear hidden space, without gain."""
    params = normal((4, 40), (40, 3))

    def apply_fn(params, x):
        h = jnp.tanh(x) @ params[0]
        return h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-3) @ params[1]

    return apply_fn, params, rows(4, 3, TOKENS)


@segments(81)
def two_heads():
    """Two outputs that read one hidden space."""
    params = dict(zip("abc", normal((4, 40), (40, 3), (40, 2)), strict=True))

    def apply_fn(params, x):
        h = jnp.tanh(x) @ params["a"]
        return {"y": h @ params["b"], "z": jnp.sin(h @ params["c"])}

    def loss(outputs, target):
        return squared_error(outputs["y"], target) + 0.1 * jnp.mean(outputs["z"] ** 2)

    return apply_fn, params, rows(4, 3, TOKENS), loss


@segments(None)
def hidden_output():
    """The hidden value is itself a result."""
    params = normal((4, 40), (40, 3))

    def apply_fn(params, x):
        h = jnp.tanh(x) @ params[0]
        return h @ params[1], h

    def loss(outputs, target):
        return squared_error(outputs[0], target) + 1e-2 * jnp.mean(outputs[1] ** 4)

    return apply_fn, params, rows(4, 3, TOKENS), loss


@segments(None)
def constant_inside():
    """A matrix that apply_fn closes over, inside a segment."""
    constant = normal((40, 40), seed=5)[0]
    params = normal((4, 40), (40, 3))
    return lambda p, x: x @ p[0] @ constant @ p[1], params, rows(4, 3, TOKENS)


@segments(108)
def adapter():
    """A low-rank branch, zero at first, beside a frozen weight."""
    params = {"frozen": normal((6, 6))[0], "a": normal((6, 40))[0], "b": np.zeros((40, 6))}

    def apply_fn(params, x):
        frozen = jax.lax.stop_gradient(params["frozen"])
        return jnp.tanh(x @ frozen + x @ params["a"] @ params["b"])

    return apply_fn, params, rows(6, 6, TOKENS)


# --- training inputs --------------------


def inputs_of_rank(n, rank, n_out, count=64):
    """Batches of rows of a fixed set that spans few directions, and that set."""
    rng = np.random.default_rng(11)
    data = rng.standard_normal((count, rank)) @ rng.standard_normal((rank, n))

    def batch(rng):
        x = data[rng.integers(0, count, TOKENS)]
        return (x,), zoo.teach(x, n_out)

    return batch, data


@segments(56, rho=64)
def inputs_of_low_rank():
    """A relu net on inputs of rank 3 in 40 dimensions."""
    batch, data = inputs_of_rank(40, 3, 3)
    params = [*normal((40, 8)), np.full(8, 0.1), *normal((8, 3))]
    apply_fn = lambda p, x: jax.nn.relu(x @ p[0] + p[1]) @ p[2]  # noqa: E731
    return apply_fn, params, batch, squared_error, data


@segments(152)
def zero_pixels():
    """A relu net on flattened images whose border is zero."""
    inside = np.pad(np.ones((4, 4)), 1).reshape(-1)

    def batch(rng):
        x = rng.standard_normal((TOKENS, 6, 6)) * inside.reshape(6, 6)
        return (x,), zoo.teach(x.reshape(TOKENS, -1), 3)

    params = normal((36, 8), (8, 3))
    data = np.concatenate([batch(np.random.default_rng(i))[0][0] for i in range(4)])
    apply_fn = lambda p, x: jax.nn.relu(x.reshape(-1, 36) @ p[0]) @ p[1]  # noqa: E731
    return apply_fn, params, batch, squared_error, data


# --- two axes of space --------------------


class SpatialPair(nn.Module):
    """Two 3x3 kernels with a bias between, and a 1x1 beside the first, read by the second."""

    @nn.compact
    def __call__(self, x):
        wide = nn.Conv(64, (3, 3), padding="VALID")(x)
        wide = wide + nn.Conv(64, (1, 1), use_bias=False)(x)[:, 1:-1, 1:-1]
        return nn.tanh(nn.Conv(3, (3, 3), padding="VALID", use_bias=False)(wide)).mean((1, 2))


@segments(2304)
def spatial_pair():
    """9 * 2 + 2 written, 9 * 3 read and one bias: 48 of 64 channels."""
    batch = images(2)
    apply_fn, params = zoo.linen(SpatialPair(), batch)
    return apply_fn, zoo.off_initial(params), batch
