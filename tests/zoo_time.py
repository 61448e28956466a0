"""Recurrences and autoencoders; importing this adds them to the zoo."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from zoo import (
    WIDE,
    from_nnx,
    linen,
    network,
    rows,
    sequences,
    squared_error,
    teach,
)

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


@network
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


@network
def state_space():
    """A diagonal state-space layer under nnx.scan."""
    return from_nnx(StateSpace(nnx.Rngs(0)), sequences(3, 3, length=6))


# --- autoencoders --------------------


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


@network
def variational_autoencoder():
    """A variational autoencoder with dense pairs around its latent space."""

    def batch(rng):
        x = teach(rng.standard_normal((16, 2)), 6)
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


@network
def nonlinear_tied_autoencoder():
    """Weights tied across a non-linear operation."""
    return from_nnx(TiedAutoencoder(nnx.Rngs(0)), rows(6, 6, 16))
