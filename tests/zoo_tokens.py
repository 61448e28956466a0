"""Networks over tokens and time, and other architectures; importing this adds them to the zoo."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from zoo import (
    WIDE,
    _teach,
    first_squared_error,
    from_nnx,
    linen,
    network,
    pooled_sequences,
    rows,
    sequences,
    squared_error,
    tokens_of,
    weights,
)

WIDTH = 8


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
    """Pre-norm causal self-attention and a feed-forward layer."""

    dense: type[nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(name="norm_1")(x)
        q, k, v = (self.dense(WIDTH, name=name)(h) for name in "qkv")
        mask = nn.make_causal_mask(x[..., 0])
        heads = (a.reshape(*a.shape[:-1], 2, WIDTH // 2) for a in (q, k, v))
        mixed = nn.dot_product_attention(*heads, mask=mask).reshape(x.shape)
        x = x + self.dense(WIDTH, name="o")(mixed)
        h = nn.LayerNorm(name="norm_2")(x)
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(12, name="up")(h)))


class Gpt(nn.Module):
    """Tokens and positions, a block, and the embedding again as the readout."""

    dense: type[nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(7, WIDTH)
        positions = self.param("positions", nn.initializers.normal(), (ids.shape[1], WIDTH))
        x = Block(self.dense)(table(ids) + positions)
        return table.attend(nn.LayerNorm()(x))


def gpt():
    """A GPT with one block and tied embeddings."""
    batch = tokens_of(7, 7, batch_size=3, length=5)
    return *linen(Gpt(), batch), batch


def gpt_with_adapters():
    """The same with every projection of the attention frozen beside a low-rank branch."""
    batch = tokens_of(7, 7, batch_size=3, length=5)
    return *linen(Gpt(Adapted), batch), batch


class FactorisedEncoder(nn.Module):
    """ALBERT: a narrow embedding mapped to the width, and one block used twice."""

    @nn.compact
    def __call__(self, ids):
        x = nn.LayerNorm()(nn.Dense(WIDTH)(nn.Embed(7, 3)(ids)))
        block = Block()
        return nn.Dense(3)(block(block(x)))


def factorised_encoder():
    """A factorised embedding before blocks that share their weights."""
    batch = tokens_of(7, 3, batch_size=3, length=5)
    return *linen(FactorisedEncoder(), batch), batch


class Mixer(nn.Module):
    """MLP-Mixer: a feed-forward layer over patches, then one over channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH)(x)
        h = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
        h = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(12)(h)))
        x = x + jnp.swapaxes(h, 1, 2)
        x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(1))


def mlp_mixer():
    """One MLP-Mixer layer."""
    batch = pooled_sequences(5, 3, batch_size=4, length=4)
    return *linen(Mixer(), batch), batch


# --- recurrences --------------------


class LinearCell(nn.RNNCellBase):
    """A linear state update through a wide hidden layer."""

    @nn.compact
    def __call__(self, state, x):
        wide = nn.Dense(WIDE, name="up")(state)
        state = nn.Dense(4, name="down")(wide) + nn.Dense(4, name="in")(x)
        return state, state

    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], 4), jnp.float32)

    @property
    def num_feature_axes(self):
        return 1


class LinearRnn(nn.Module):
    """nn.RNN with a linear body, and a readout."""

    @nn.compact
    def __call__(self, x):
        start = jnp.zeros((x.shape[0], 4), x.dtype)
        return nn.Dense(3)(nn.RNN(LinearCell())(x, initial_carry=start))


@network(collapses=None)
def linear_rnn():
    """A linear recurrent network."""
    batch = sequences(3, 3, length=6)
    return *linen(LinearRnn(), batch), batch


class StateSpace(nnx.Module):
    """``s_t = a s_{t-1} + x_t B``, ``y_t = s_t C``, with B and C products of two matrices."""

    def __init__(self, rngs):
        self.a = nnx.Param(jnp.linspace(0.3, 0.9, 4))
        plain = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.b1, self.b2 = nnx.Linear(3, WIDE, rngs=rngs), plain(WIDE, 4)
        self.c1, self.c2 = plain(4, WIDE), plain(WIDE, 3)

    def __call__(self, x):
        @nnx.scan(in_axes=(None, nnx.Carry, 1), out_axes=(nnx.Carry, 1))
        def step(model, state, x_t):
            state = model.a[...] * state + model.b2(model.b1(x_t))
            return state, model.c2(model.c1(state))

        return step(self, jnp.zeros((x.shape[0], 4), x.dtype), x)[1]


@network(collapses=True)
def state_space():
    """A diagonal state-space layer under nnx.scan."""
    return from_nnx(StateSpace(nnx.Rngs(0)), sequences(3, 3, length=6))


class NnxFeedForward(nnx.Module):
    """A linear pair before tanh, as a residual."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(4, WIDE, rngs=rngs), nnx.Linear(WIDE, 4, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.down(self.up(x)))


class NnxStack(nnx.Module):
    """Three blocks with stacked parameters."""

    def __init__(self, rngs):
        made = nnx.vmap(lambda key: NnxFeedForward(nnx.Rngs(key)))
        self.blocks = made(jax.random.split(rngs.params(), 3))
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(block, x):
            return block(x)

        return self.out(forward(self.blocks, x))


def nnx_scan_over_blocks():
    """nnx.scan over blocks whose parameters nnx.vmap stacked."""
    return from_nnx(NnxStack(nnx.Rngs(0)), rows(4, 3))


# --- autoencoders, experts, mapped axes --------------------


class Vae(nn.Module):
    """A variational autoencoder; the noise comes from a key that is an argument."""

    @nn.compact
    def __call__(self, key, x):
        plain = functools.partial(nn.Dense, use_bias=False)
        h = nn.relu(nn.Dense(8)(x))
        mean, log_scale = plain(2)(plain(WIDE)(h)), plain(2)(h)
        noise = jax.random.normal(jax.random.wrap_key_data(key), mean.shape, jnp.float32)
        z = mean + jnp.exp(log_scale) * noise.astype(mean.dtype)
        return nn.Dense(6)(plain(WIDE)(z)), mean, log_scale


def evidence(outputs, target):
    """Squared error of the reconstruction and the divergence from the normal distribution."""
    y, mean, log_scale = outputs
    divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(2 * log_scale) - 2 * log_scale)
    return squared_error(y, target) + 0.1 * divergence


@network(collapses=True)
def variational_autoencoder():
    """A variational autoencoder with dense pairs around its latent space."""

    def batch(rng):
        x = _teach(rng.standard_normal((16, 2)), 6)
        return (rng.integers(0, 2**32, 2, dtype=np.uint32), x), x

    return *linen(Vae(), batch), batch, evidence


class TiedAutoencoder(nnx.Module):
    """A relu autoencoder whose decoder is the encoder transposed."""

    def __init__(self, rngs):
        self.encoder, self.mix = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(6))

    def __call__(self, x):
        code = nnx.relu(self.mix(self.encoder(x)))
        return code @ self.encoder.kernel[...].T + self.bias[...]


@network(collapses=None)
def nonlinear_tied_autoencoder():
    """Weights tied across a non-linear operation."""
    return from_nnx(TiedAutoencoder(nnx.Rngs(0)), rows(6, 6, 16))


class Experts(nn.Module):
    """Linear pairs, weighted by a softmax over all of them."""

    @nn.compact
    def __call__(self, x):
        gates = nn.softmax(nn.Dense(3)(x))
        expert = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None,
            axis_size=3,
        )  # fmt: skip
        wide = expert(WIDE, name="up")(x)
        down = self.param("down", nn.initializers.lecun_normal(), (3, WIDE, 4))
        made = jnp.einsum("eth,eho->eto", wide, down)
        return nn.Dense(3)(jnp.tanh(jnp.einsum("te,eto->to", gates, made))), gates


def mixture_of_experts():
    """A mixture of experts with dense gating."""
    batch = rows(4, 3, 24)
    return *linen(Experts(), batch), batch, first_squared_error


def batch_norm_over_a_mapped_axis():
    """Batch normalisation over the rows of all replicas, between linear pairs."""
    up, mid, down = weights((4, WIDE), (WIDE, 5), (5, 3))
    params = {"up": up, "mid": mid, "gain": jnp.ones(5), "shift": jnp.zeros(5), "down": down}

    def replica(params, x):
        y = x @ params["up"] @ params["mid"]
        mean = jax.lax.pmean(y.mean(0), "replicas")
        variance = jax.lax.pmean(jnp.square(y - mean).mean(0), "replicas")
        normalised = (y - mean) * jax.lax.rsqrt(variance + 1e-5)
        return jnp.tanh(normalised * params["gain"] + params["shift"]) @ params["down"], mean

    mapped = jax.vmap(replica, (None, 0), axis_name="replicas")
    return mapped, params, sequences(4, 3), first_squared_error


LIGHTER = {
    fn.__name__: fn
    for fn in (
        gpt,
        gpt_with_adapters,
        factorised_encoder,
        mlp_mixer,
        nnx_scan_over_blocks,
        mixture_of_experts,
        batch_norm_over_a_mapped_axis,
    )
}
"""Builders of networks that are slow to compile, so trained by one optimizer instead of six."""
