"""The networks of the demo: ordinary Flax modules, and two plain functions."""

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Network = tuple[Callable[..., jax.Array], Any]
"""A pure function `apply_fn(params, inputs)`, and its first parameters."""
PIXELS = 64
ROWS = 8
CLASSES = 10


class LinearBlocks(nn.Module):
    """Every layer over-parameterised by a chain of wider ones with nothing between them."""

    wider: tuple[int, ...]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of shape `(batch, 10)` for images of shape `(batch, 64)`."""
        hidden = images
        for width in (*self.wider, 128):
            hidden = nn.Dense(width)(hidden)
        hidden = nn.relu(hidden)
        for width in (*self.wider, CLASSES):
            hidden = nn.Dense(width)(hidden)
        return hidden


class BatchNormBranches(nn.Module):
    """Blocks that sum parallel branches, each widened and normalised over the batch."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of shape `(batch, 10)` for images of shape `(batch, 64)`."""
        hidden = images
        for _ in range(2):
            hidden = nn.relu(sum(self._branch(hidden) for _ in range(3)))
        return nn.Dense(CLASSES)(hidden)

    def _branch(self, inputs: jax.Array) -> jax.Array:
        wide = nn.Dense(256, use_bias=False)(inputs)
        wide = nn.BatchNorm(use_running_average=False)(wide)
        return nn.Dense(PIXELS, use_bias=False)(wide)


class RowTransformer(nn.Module):
    """A pre-norm transformer whose tokens are the eight rows of an image."""

    width: int = 64

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of shape `(batch, 10)` for images of shape `(batch, 64)`."""
        tokens = nn.Dense(self.width)(images.reshape(-1, ROWS, PIXELS // ROWS))
        tokens += self.param("positions", nn.initializers.normal(0.02), (ROWS, self.width))
        for _ in range(2):
            normed = nn.LayerNorm()(tokens)
            tokens += nn.MultiHeadDotProductAttention(num_heads=4)(normed, normed)
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(tokens)))
            tokens += nn.Dense(self.width)(hidden)
        return nn.Dense(CLASSES)(nn.LayerNorm()(tokens).mean(axis=1))


class ReluClassifier(nn.Module):
    """An ordinary network with a non-linearity after every layer, where nothing can be folded."""

    hidden: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Logits of shape `(batch, classes)` for inputs of shape `(batch, features)`."""
        hidden = inputs
        for width in self.hidden:
            hidden = nn.relu(nn.Dense(width)(hidden))
        return nn.Dense(self.classes)(hidden)


def flax_network(model: nn.Module, features: int) -> Network:
    """A Flax module as a pure function, and its first parameters."""
    with jax.enable_x64(False):  # the same float32 values, whoever asks
        # This generator compiles in half the time of the default one.
        key = jax.random.key(0, impl="unsafe_rbg")
        variables = jax.jit(model.init)(key, jnp.zeros((2, features), jnp.float32))
    state = {name: value for name, value in variables.items() if name != "params"}

    def apply_fn(params, inputs):
        # BatchNorm normalises with the batch at hand, so its running averages can be dropped.
        outputs, _ = model.apply({"params": params, **state}, inputs, mutable=list(state))
        return outputs

    return apply_fn, variables["params"]


def deep_linear(kernels: Callable[..., list[np.ndarray]]) -> Network:
    """`x W_1 W_2 W_3 W_4` for inputs `x` of shape `(batch, 12)`, and 3 outputs."""

    def apply_fn(params, inputs):
        for kernel in params:
            inputs = inputs @ kernel
        return inputs

    return apply_fn, kernels((12, 128, 128, 128, 3))


def orthogonal(widths: tuple[int, ...]) -> list[np.ndarray]:
    """Kernels between layers of these widths, each with orthonormal rows or columns."""
    generator = np.random.default_rng(0)
    return [_orthonormal(generator, *pair) for pair in itertools.pairwise(widths)]


def balanced(widths: tuple[int, ...]) -> list[np.ndarray]:
    """Kernels where `W_j.T @ W_j == W_(j+1) @ W_(j+1).T`, whose product is Gaussian."""
    generator, depth = np.random.default_rng(0), len(widths) - 1
    product = generator.normal(size=(widths[0], widths[-1])) / widths[0] ** 0.5
    left, values, right = np.linalg.svd(product, full_matrices=False)
    frames = [_orthonormal(generator, width, len(values)) for width in widths[1:-1]]
    pairs = itertools.pairwise((left, *frames, right.T))
    return [(inward * values ** (1 / depth)) @ outward.T for inward, outward in pairs]


def _orthonormal(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    left, _, right = np.linalg.svd(generator.normal(size=(rows, columns)), full_matrices=False)
    return left @ right


def diagonal(features: int, magnitude: float) -> Network:
    """`x @ (u * v * w)` for inputs `x` of shape `(batch, features)`, at first with `u = v = w`."""

    def apply_fn(params, inputs):
        return inputs @ (params["u"] * params["v"] * params["w"])

    return apply_fn, {name: np.full(features, magnitude) for name in "uvw"}
