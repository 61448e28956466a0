"""The four networks of the demo, as ordinary Flax modules, each with its optimizer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

PIXELS = 64
ROWS = 8
CLASSES = 10


class LinearBlocks(nn.Module):
    """Every layer over-parameterised by a chain of wider ones with nothing between them."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of shape `(batch, 10)` for images of shape `(batch, 64)`."""
        hidden = images
        for width in (512, 512, 128):
            hidden = nn.Dense(width)(hidden)
        hidden = nn.relu(hidden)
        for width in (512, 512, CLASSES):
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

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of shape `(batch, 10)` for images of shape `(batch, 64)`."""
        hidden = images
        for width in (256, 256):
            hidden = nn.relu(nn.Dense(width)(hidden))
        return nn.Dense(CLASSES)(hidden)


@dataclasses.dataclass(frozen=True)
class Task:
    """One network to train both ways.

    Attributes:
      name: what the table and the picture call it.
      model: the Flax module.
      optimizer: what trains it, in words and as an optax transformation.
      timing_batch: images in the batch on which the step is timed.
    """

    name: str
    model: nn.Module
    optimizer_name: str
    optimizer: optax.GradientTransformation
    timing_batch: int

    def init(self) -> tuple[Callable[..., jax.Array], Any]:
        """The network as a pure function `apply_fn(params, images)`, and its first parameters."""
        variables = jax.jit(self.model.init)(jax.random.key(0), jnp.zeros((2, PIXELS)))
        state = {name: value for name, value in variables.items() if name != "params"}

        def apply_fn(params, images):
            # BatchNorm normalises with the batch at hand, so its running averages can be dropped.
            logits, _ = self.model.apply({"params": params, **state}, images, mutable=list(state))
            return logits

        return apply_fn, variables["params"]


def tasks() -> list[Task]:
    """The demo's networks, in the order in which they are shown."""
    return [
        Task("linear blocks", LinearBlocks(), "Adam", optax.adam(1e-3), 4096),
        Task("BatchNorm branches", BatchNormBranches(), "momentum", optax.sgd(0.05, 0.9), 8192),
        Task("pre-norm transformer", RowTransformer(), "AdamW", optax.adamw(2e-3), 1024),
        Task("ReLU classifier", ReluClassifier(), "Adam", optax.adam(1e-3), 4096),
    ]
