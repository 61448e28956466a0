"""Transformers, experts and other blocks that the tests train with and without front contribution.

Every builder takes the width; all else is as in `zoo`.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import zoo
from flax import nnx
from zoo import (
    first_squared_error,
    from_nnx,
    linen,
    pooled_sequences,
    rows,
    sequences,
    teach,
    tokens_of,
    weights,
)

WIDTH = 8

_registry = zoo.Registry()
network, names, build = _registry.network, _registry.names, _registry.build


# --- transformers --------------------


class Adapted(nn.Module):
    """A dense layer whose kernel is frozen, with a trainable low-rank branch beside it."""

    features: int
    rank: int = 2

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        frozen = self.param("frozen", init, (x.shape[-1], self.features))
        down = self.param("down", init, (x.shape[-1], self.rank))
        up = self.param("up", init, (self.rank, self.features))
        return x @ jax.lax.stop_gradient(frozen) + x @ down @ up


class Block(nn.Module):
    """Pre-norm self-attention, causal or not, and a feed-forward layer."""

    dense: type[nn.Module] = nn.Dense
    causal: bool = True

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        h = nn.LayerNorm(name="norm_1")(x)
        q, k, v = (self.dense(width, name=name)(h) for name in "qkv")
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        heads = (a.reshape(*a.shape[:-1], 2, width // 2) for a in (q, k, v))
        mixed = nn.dot_product_attention(*heads, mask=mask).reshape(x.shape)
        x = x + self.dense(width, name="o")(mixed)
        h = nn.LayerNorm(name="norm_2")(x)
        return x + nn.Dense(width, name="down")(nn.gelu(nn.Dense(2 * width, name="up")(h)))


class Gpt(nn.Module):
    """Tokens and positions, a block, and the embedding again as the readout."""

    width: int
    dense: type[nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(4 * self.width, self.width)
        positions = self.param("positions", nn.initializers.normal(), (ids.shape[1], self.width))
        x = Block(self.dense)(table(ids) + positions)
        return table.attend(nn.LayerNorm()(x))


@network
def gpt_block(width=WIDTH):
    """A GPT with one block and tied embeddings."""
    batch = tokens_of(4 * width, 4 * width, batch_size=3, length=5)
    return *linen(Gpt(width), batch), batch


@network
def gpt_block_with_adapters(width=WIDTH):
    """The same with every projection of the attention frozen beside a low-rank branch (LoRA)."""
    batch = tokens_of(4 * width, 4 * width, batch_size=3, length=5)
    return *linen(Gpt(width, Adapted), batch), batch


class FactorisedEncoder(nn.Module):
    """ALBERT: a narrow embedding mapped to the width, and one block used twice."""

    width: int

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(4 * self.width, self.width // 4 + 1)(ids)
        x = nn.LayerNorm()(nn.Dense(self.width)(x))
        block = Block(causal=False)
        return nn.Dense(3)(block(block(x)))


@network
def factorised_encoder(width=WIDTH):
    """A factorised embedding before blocks that share their weights."""
    batch = tokens_of(4 * width, 3, batch_size=3, length=5)
    return *linen(FactorisedEncoder(width), batch), batch


class VisionTransformer(nn.Module):
    """Patches by a strided convolution, a class token, positions, a block, a readout."""

    width: int

    @nn.compact
    def __call__(self, images):
        patches = nn.Conv(self.width, (3, 3), strides=3, padding="VALID", name="patch")(images)
        x = patches.reshape(images.shape[0], -1, self.width)
        token = self.param("class_token", nn.initializers.normal(), (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(), x.shape[1:])
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(Block(causal=False)(x)[:, 0]))


@network
def vision_transformer(width=WIDTH):
    """A vision transformer with one block."""

    def batch(rng):
        images = rng.standard_normal((4, 6, 6, 3))
        return (images,), teach(images.mean((1, 2)), 3)

    return *linen(VisionTransformer(width), batch), batch


class NnxBlock(nnx.Module):
    """Pre-RMSNorm attention with one map for queries, keys and values, and a feed-forward layer."""

    def __init__(self, width, rngs):
        self.norm_1, self.norm_2 = (nnx.RMSNorm(width, rngs=rngs) for _ in range(2))
        plain = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.qkv, self.out = plain(width, 3 * width), plain(width, width)
        self.up, self.down = plain(width, 2 * width), plain(2 * width, width)

    def __call__(self, x):
        heads = self.qkv(self.norm_1(x)).reshape(*x.shape[:-1], 3, 2, x.shape[-1] // 2)
        q, k, v = (heads[..., i, :, :] for i in range(3))
        x = x + self.out(nnx.dot_product_attention(q, k, v).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


@network
def nnx_transformer_block(width=WIDTH):
    """Flax NNX: a transformer block."""
    return from_nnx(NnxBlock(width, nnx.Rngs(0)), sequences(width, width, 3, 5))


class Mixer(nn.Module):
    """MLP-Mixer: a feed-forward layer over patches, then one over channels."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="patch")(x)
        h = jnp.swapaxes(nn.LayerNorm(name="norm_1")(x), 1, 2)
        h = nn.Dense(x.shape[1], name="down_1")(nn.gelu(nn.Dense(2 * self.width, name="up_1")(h)))
        x = x + jnp.swapaxes(h, 1, 2)
        h = nn.gelu(nn.Dense(2 * self.width, name="up_2")(nn.LayerNorm(name="norm_2")(x)))
        x = x + nn.Dense(self.width, name="down_2")(h)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x).mean(1))


@network
def mlp_mixer(width=WIDTH):
    """One MLP-Mixer layer."""
    batch = pooled_sequences(5, 3, batch_size=4, length=4)
    return *linen(Mixer(width), batch), batch


# --- stacked layers, experts, mapped axes --------------------


class FeedForward(nn.Module):
    """A pre-norm feed-forward layer, as the body of nn.scan."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.gelu(nn.Dense(2 * x.shape[-1], name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(x.shape[-1], name="down")(h), None


class ScannedFeedForward(nn.Module):
    """Three layers with stacked parameters, and a readout."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(FeedForward, variable_axes={"params": 0}, split_rngs={"params": True},
                        length=3)  # fmt: skip
        return nn.Dense(3, name="head")(stack(name="stack")(x, None)[0])


@network
def scanned_feed_forward(width=WIDTH):
    """nn.scan over pre-norm feed-forward layers."""
    batch = rows(width, 3, 16)
    return *linen(ScannedFeedForward(), batch), batch


class NnxFeedForward(nnx.Module):
    """A linear pair before tanh, as a residual."""

    def __init__(self, width, rngs):
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.down(self.up(x)))


class NnxStack(nnx.Module):
    """Three blocks with stacked parameters."""

    def __init__(self, width, rngs):
        made = nnx.vmap(lambda key: NnxFeedForward(width, nnx.Rngs(key)))
        self.blocks = made(jax.random.split(rngs.params(), 3))
        self.out = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(block, x):
            return block(x)

        return self.out(forward(self.blocks, x))


@network
def nnx_scan_over_blocks(width=4):
    """nnx.scan over blocks whose parameters nnx.vmap stacked."""
    return from_nnx(NnxStack(width, nnx.Rngs(0)), rows(width, 3))


class Experts(nn.Module):
    """Linear pairs, weighted by a softmax over all of them."""

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        gates = nn.softmax(nn.Dense(3, name="gate")(x))
        expert = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None,
            axis_size=3,
        )  # fmt: skip
        wide = expert(4 * width, name="up")(x)
        down = self.param("down", nn.initializers.lecun_normal(), (3, 4 * width, width))
        made = jnp.einsum("eth,eho->eto", wide, down)
        mixed = jnp.tanh(jnp.einsum("te,eto->to", gates, made))
        return nn.Dense(3, name="head")(mixed), gates


@network
def mixture_of_experts(width=4):
    """A mixture of experts with dense gating."""
    batch = rows(width, 3, 24)
    return *linen(Experts(), batch), batch, first_squared_error


@network
def batch_norm_over_a_mapped_axis(width=4):
    """Batch normalisation over the rows of all replicas, between linear pairs."""
    up, mid, down = weights((width, 4 * width), (4 * width, width + 1), (width + 1, 3))
    gain, shift = jnp.ones(width + 1), jnp.zeros(width + 1)
    params = {"up": up, "mid": mid, "gain": gain, "shift": shift, "down": down}

    def replica(params, x):
        y = x @ params["up"] @ params["mid"]
        mean = jax.lax.pmean(y.mean(0), "replicas")
        variance = jax.lax.pmean(jnp.square(y - mean).mean(0), "replicas")
        normalised = (y - mean) * jax.lax.rsqrt(variance + 1e-5)
        return jnp.tanh(normalised * params["gain"] + params["shift"]) @ params["down"], mean

    mapped = jax.vmap(replica, (None, 0), axis_name="replicas")
    return mapped, params, sequences(width, 3), first_squared_error
