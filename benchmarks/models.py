"""The networks that the benchmarks measure, each with the bar it must reach.

A prediction is written down here before anything is measured, so that a result can contradict it.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

PyTree = Any
EPSILON = 1e-5  # Flax's BatchNorm


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a network must reach.

    Attributes:
      speedup: smallest ratio of backprop's time to the folded time. The default asks for a step
        that is never slower; the spread of the measurement (A/A) is allowed for.
      memory: smallest ratio of backprop's temporary bytes to the folded ones.
      residuals: whether fewer bytes must be saved for the backward pass.
      limit: largest ratio to the hand-written limit, in time and in temporary bytes.
    """

    speedup: float = 1.0
    memory: float | None = None
    residuals: bool = False
    limit: float | None = None


@dataclasses.dataclass(frozen=True)
class Network:
    """One network and the batch it is measured on.

    Attributes:
      name: what ``--only`` takes.
      apply_fn: the network, ``apply_fn(params, x) -> y``.
      params: its parameters.
      batch: the inputs ``x``, rows first.
      target: what ``loss`` compares with.
      loss: ``loss(y, target) -> scalar``.
      bar: what must be reached.
      prediction: the speedup over backprop that was expected before measuring.
      limit: the same function folded by hand, or None.
      gradients: relative gradient difference that is still rounding.
    """

    name: str
    apply_fn: Callable[[PyTree, Array], Array]
    params: PyTree
    batch: Array
    target: Array
    loss: Callable[[Array, Array], Array]
    bar: Bar
    prediction: float
    limit: Callable[[PyTree, Array], Array] | None = None
    gradients: float = 1e-4


# --- losses and data ------------------------------------------------------------------------------


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean cross entropy of integer labels."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared_error(y: Array, target: Array) -> Array:
    """Mean squared error."""
    return jnp.mean((y - target) ** 2)


def rectified_error(y: Array, target: Array) -> Array:
    """Mean squared error behind a ReLU."""
    return squared_error(nn.relu(y), target)


def normal(seed: int, *shape: int) -> Array:
    """Standard normal values."""
    return jax.random.normal(jax.random.key(seed), shape)


def perturbed(params: PyTree) -> PyTree:
    """Parameters moved off their initial values, so that no gain is 1 and no bias is 0."""
    leaves, structure = jax.tree.flatten(params)
    moved = [leaf + 0.05 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, moved)


# --- chains of dense layers -----------------------------------------------------------------------


def kernels(widths: tuple[int, ...]) -> list[Array]:
    """Kernels of shape ``(in, out)`` with variance ``1 / in``."""
    pairs = itertools.pairwise(widths)
    return [normal(i, *pair) / pair[0] ** 0.5 for i, pair in enumerate(pairs)]


def chain(params: list[Array], x: Array) -> Array:
    """``x W_1 ... W_N``, layer by layer."""
    for kernel in params:
        x = x @ kernel
    return x


def collapsed_chain(params: list[Array], x: Array) -> Array:
    """``x (W_1 (W_2 ... W_N))``: the weights are multiplied first, from the narrow end."""
    effective = params[-1]
    for kernel in reversed(params[:-1]):
        effective = kernel @ effective
    return x @ effective


def linear(name: str, widths: tuple[int, ...], rows: int, bar: Bar, prediction: float) -> Network:
    """A linear chain; a classifier if it ends in ten outputs."""
    classifies = widths[-1] == 10
    target = jnp.arange(rows) % 10 if classifies else normal(100, rows, widths[-1])
    return Network(
        name,
        chain,
        kernels(widths),
        normal(99, rows, widths[0]),
        target,
        cross_entropy if classifies else squared_error,
        bar,
        prediction,
        collapsed_chain,
    )


def relu_mlp(params: list[Array], x: Array) -> Array:
    """An ordinary ReLU network: nothing in it folds."""
    for kernel in params[:-1]:
        x = nn.relu(x @ kernel)
    return x @ params[-1]


def plain_relu() -> Network:
    """784-512-512-10 at batch 1024."""
    return Network(
        "relu-mlp",
        relu_mlp,
        kernels((784, 512, 512, 10)),
        normal(99, 1024, 784),
        jnp.arange(1024) % 10,
        cross_entropy,
        Bar(),
        prediction=1.0,
    )


# --- BatchNorm in training mode -------------------------------------------------------------------


def batch_norm(name: str) -> nn.BatchNorm:
    """BatchNorm with the statistics of the batch."""
    return nn.BatchNorm(use_running_average=False, name=name)


class Branches(nn.Module):
    """A sum of parallel linear branches, each behind its own BatchNorm."""

    hidden: int = 256

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        width = x.shape[-1]
        deep = nn.Dense(self.hidden, use_bias=False, name="deep_in")(x)
        deep = nn.Dense(width, use_bias=False, name="deep_out")(deep)
        plain = nn.Dense(width, use_bias=False, name="plain")(x)
        return (
            batch_norm("bn_deep")(deep) + batch_norm("bn_plain")(plain) + batch_norm("bn_skip")(x)
        )


def folded_branches(params: PyTree, x: Array) -> Array:
    """``x Z + c`` with one effective weight; every variance comes from one covariance of ``x``."""
    mean = x.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / x.shape[0]
    weights = {
        "bn_deep": params["deep_in"]["kernel"] @ params["deep_out"]["kernel"],
        "bn_plain": params["plain"]["kernel"],
        "bn_skip": jnp.eye(x.shape[1]),
    }
    effective, shift = jnp.zeros_like(covariance), jnp.zeros_like(mean)
    for name, weight in weights.items():
        variance = jnp.sum(weight * (covariance @ weight), 0)
        scaled = weight * (params[name]["scale"] * jax.lax.rsqrt(variance + EPSILON))
        effective, shift = effective + scaled, shift + params[name]["bias"] - mean @ scaled
    return x @ effective + shift


class InvertedBottleneck(nn.Module):
    """Residual blocks that expand, apply relu6 and project, with BatchNorm behind both maps."""

    blocks: int = 3
    expansion: int = 6

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        width = x.shape[-1]
        for i in range(self.blocks):
            h = nn.Dense(width * self.expansion, use_bias=False, name=f"expand_{i}")(x)
            h = nn.relu6(batch_norm(f"bn_expand_{i}")(h))
            h = nn.Dense(width, use_bias=False, name=f"project_{i}")(h)
            x = x + batch_norm(f"bn_project_{i}")(h)
        return x


def with_batch_statistics(module: nn.Module, x: Array) -> tuple[Callable[..., Array], PyTree]:
    """A pure ``apply_fn`` of a module with BatchNorm in training mode, and its parameters."""
    variables = jax.jit(module.init)(jax.random.key(0), x)
    statistics = variables["batch_stats"]

    def apply_fn(params: PyTree, x: Array) -> Array:
        variables = {"params": params, "batch_stats": statistics}
        return module.apply(variables, x, mutable=["batch_stats"])[0]

    return apply_fn, perturbed(variables["params"])


def batch_norm_branches() -> Network:
    """Three branches of 64 features, 16384 rows."""
    x = normal(1, 16384, 64) @ normal(2, 64, 64) / 8 + 0.5
    apply_fn, params = with_batch_statistics(Branches(), x)
    return Network(
        "batchnorm-branches",
        apply_fn,
        params,
        x,
        normal(3, *x.shape),
        rectified_error,
        Bar(speedup=4.0, memory=2.5),
        prediction=6.4,
        limit=folded_branches,
    )


def inverted_bottleneck() -> Network:
    """32-192-32, 3 blocks, 16384 tokens."""
    x = normal(1, 16384, 32)
    apply_fn, params = with_batch_statistics(InvertedBottleneck(), x)
    return Network(
        "inverted-bottleneck",
        apply_fn,
        params,
        x,
        normal(3, *x.shape),
        squared_error,
        Bar(speedup=1.1),
        prediction=1.28,
        gradients=1e-3,  # a value at the kink of relu6 can fall on its other side
    )


# --- convolutions ---------------------------------------------------------------------------------


def convolve(x: Array, kernel: Array) -> Array:
    """A SAME convolution, channels last."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def conv_kernel(seed: int, *shape: int) -> Array:
    """A kernel of shape ``(height, width, in, out)`` with the variance that keeps that of rows."""
    return normal(seed, *shape) / (shape[0] * shape[1] * shape[2]) ** 0.5


def expanded(params: list[Array], x: Array) -> Array:
    """An ExpandNet block: 1x1 to more channels, 3x3, 1x1 back."""
    for kernel in params:
        x = convolve(x, kernel)
    return x


def contracted(params: list[Array], x: Array) -> Array:
    """The same with its three kernels multiplied into one."""
    wide, middle, narrow = params
    return convolve(x, wide[0, 0] @ middle @ narrow[0, 0])


def expand_net() -> Network:
    """32-128-128-32 channels, 32 images of 16 x 16."""
    x = normal(1, 32, 16, 16, 32)
    params = [
        conv_kernel(4, 1, 1, 32, 128),
        conv_kernel(5, 3, 3, 128, 128),
        conv_kernel(6, 1, 1, 128, 32),
    ]
    return Network(
        "expandnet",
        expanded,
        params,
        x,
        normal(3, *x.shape),
        rectified_error,
        Bar(speedup=5.0, limit=1.1),
        prediction=7.6,
        limit=contracted,
    )


def rep_blocks(params: list[dict[str, Array]], x: Array) -> Array:
    """RepVGG blocks without BatchNorm: relu of 3x3, 1x1 and identity, added."""
    for block in params:
        x = nn.relu(convolve(x, block["3x3"]) + convolve(x, block["1x1"]) + x)
    return x


def merged_blocks(params: list[dict[str, Array]], x: Array) -> Array:
    """The same with one kernel a block."""
    for block in params:
        middle = block["1x1"][0, 0] + jnp.eye(x.shape[-1])
        x = nn.relu(convolve(x, block["3x3"].at[1, 1].add(middle)))
    return x


def rep_vgg(channels: int = 64, blocks: int = 3) -> Network:
    """64 channels, 3 blocks, 32 images of 16 x 16."""
    x = normal(1, 32, 16, 16, channels)
    params = [
        {
            "3x3": conv_kernel(4 + i, 3, 3, channels, channels) / 3,
            "1x1": conv_kernel(40 + i, 1, 1, channels, channels) / 3,
        }
        for i in range(blocks)
    ]
    return Network(
        "repvgg",
        rep_blocks,
        params,
        x,
        normal(3, *x.shape),
        squared_error,
        Bar(speedup=1.1, limit=1.1),
        prediction=1.3,
        limit=merged_blocks,
    )


class MobileBottleneck(nn.Module):
    """Residual blocks of MobileNetV2: expand, depthwise 3x3, project, BatchNorm behind each."""

    blocks: int = 2
    expansion: int = 6

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        width = x.shape[-1]
        hidden = width * self.expansion
        for i in range(self.blocks):
            h = nn.Conv(hidden, (1, 1), use_bias=False, name=f"expand_{i}")(x)
            h = nn.relu6(batch_norm(f"bn_expand_{i}")(h))
            h = nn.Conv(
                hidden, (3, 3), feature_group_count=hidden, use_bias=False, name=f"space_{i}"
            )(h)
            h = nn.relu6(batch_norm(f"bn_space_{i}")(h))
            h = nn.Conv(width, (1, 1), use_bias=False, name=f"project_{i}")(h)
            x = x + batch_norm(f"bn_project_{i}")(h)
        return x


class ResidualBottleneck(nn.Module):
    """Residual blocks of ResNet-50: 1x1 down, 3x3, 1x1 up, BatchNorm behind each."""

    blocks: int = 2

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        width = x.shape[-1]
        sizes = ((width // 4, 1), (width // 4, 3), (width, 1))
        for i in range(self.blocks):
            h = x
            for j, (channels, size) in enumerate(sizes):
                h = nn.Conv(channels, (size, size), use_bias=False, name=f"conv_{i}_{j}")(h)
                h = batch_norm(f"bn_{i}_{j}")(h)
                h = nn.relu(h) if j < 2 else h
            x = nn.relu(x + h)
        return x


def with_batch_norm(name: str, module: nn.Module, channels: int) -> Network:
    """An ordinary convolutional network on 16 images of 16 x 16."""
    x = normal(1, 16, 16, 16, channels)
    apply_fn, params = with_batch_statistics(module, x)
    return Network(
        name,
        apply_fn,
        params,
        x,
        normal(3, *x.shape),
        squared_error,
        Bar(),
        prediction=1.05,
        gradients=1e-3,  # a value at the kink of relu6 can fall on its other side
    )


# --- pre-norm feed-forward blocks -----------------------------------------------------------------


class FeedForward(nn.Module):
    """Residual blocks: norm, dense, gelu, dense."""

    norm: type[nn.Module]
    blocks: int
    expansion: int

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        width = x.shape[-1]
        for i in range(self.blocks):
            h = self.norm(name=f"norm_{i}")(x)
            h = nn.gelu(nn.Dense(width * self.expansion, name=f"in_{i}")(h))
            x = x + nn.Dense(width, name=f"out_{i}")(h)
        return x


def feed_forward(name: str, module: FeedForward, memory: float) -> Network:
    """Pre-norm blocks on 8192 tokens of width 256."""
    x = normal(1, 8192, 256)
    return Network(
        name,
        lambda params, x: module.apply({"params": params}, x),
        perturbed(jax.jit(module.init)(jax.random.key(0), x)["params"]),
        x,
        normal(3, *x.shape),
        squared_error,
        Bar(memory=memory, residuals=True),
        prediction=1.1,
    )


# --- a frozen weight beside a trainable one, and a recurrence -------------------------------------


def low_rank_adapters(params: list[dict[str, Array]], x: Array) -> Array:
    """Frozen dense layers with a trainable low-rank branch beside each."""
    for layer in params:
        frozen = jax.lax.stop_gradient(layer["frozen"])
        x = nn.relu(x @ frozen + x @ layer["down"] @ layer["up"])
    return x


def adapters(width: int = 512, rank: int = 8, rows: int = 4096) -> Network:
    """Two adapted layers of width 512."""
    layers = [
        {
            "frozen": w,
            "down": normal(7 + i, width, rank) / width**0.5,
            "up": normal(9 + i, rank, width),
        }
        for i, w in enumerate(kernels((width,) * 3))
    ]
    x, target = normal(1, rows, width), normal(3, rows, width)
    return Network(
        "lora", low_rank_adapters, layers, x, target, squared_error, Bar(), prediction=1.0
    )


def recurrence(params: dict[str, Array], x: Array) -> Array:
    """``h <- tanh(h A B + x_t)``, 128 steps; ``x`` has shape (rows, steps, width)."""

    def step(h: Array, x_t: Array) -> tuple[Array, None]:
        return nn.tanh(h @ params["in"] @ params["out"] + x_t), None

    return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1))[0]


def hoisted_recurrence(params: dict[str, Array], x: Array) -> Array:
    """The same, with ``A B`` multiplied once, outside the loop."""
    effective = params["in"] @ params["out"]

    def step(h: Array, x_t: Array) -> tuple[Array, None]:
        return nn.tanh(h @ effective + x_t), None

    return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1))[0]


def recurrent() -> Network:
    """Width 64 through 1024 hidden units, 64 rows, 128 steps."""
    first, second = kernels((64, 1024, 64))
    return Network(
        "recurrent",
        recurrence,
        {"in": first, "out": second},
        normal(1, 64, 128, 64),
        normal(3, 64, 64),
        squared_error,
        Bar(),
        prediction=16.0,
        limit=hoisted_recurrence,
    )


# --- all of them ----------------------------------------------------------------------------------

WIDE = (784, 1024, 1024, 1024, 1024, 10)

NETWORKS: dict[str, Callable[[], Network]] = {
    "linear-784-4096": lambda: linear(
        "linear-784-4096", WIDE, 4096, Bar(speedup=25.0, limit=1.1), 38.0
    ),
    "linear-784-256": lambda: linear("linear-784-256", WIDE, 256, Bar(), 2.8),
    "linear-256-4096": lambda: linear(
        "linear-256-4096", (256, 1024, 1024, 256), 4096, Bar(speedup=8.0), 11.0
    ),
    "batchnorm-branches": batch_norm_branches,
    "inverted-bottleneck": inverted_bottleneck,
    "layernorm-ff": lambda: feed_forward(
        "layernorm-ff", FeedForward(nn.LayerNorm, blocks=4, expansion=4), memory=1 / 0.95
    ),
    "rmsnorm-ff": lambda: feed_forward(
        "rmsnorm-ff", FeedForward(nn.RMSNorm, blocks=6, expansion=1), memory=1 / 0.85
    ),
    "bottleneck-512": lambda: linear("bottleneck-512", (512, 128, 128, 512), 8192, Bar(), 1.0),
    "square-256": lambda: linear("square-256", (256,) * 5, 256, Bar(), 1.0),
    "relu-mlp": plain_relu,
    "lora": adapters,
    "expandnet": expand_net,
    "repvgg": rep_vgg,
    "mobile-bottleneck": lambda: with_batch_norm("mobile-bottleneck", MobileBottleneck(), 16),
    "resnet-bottleneck": lambda: with_batch_norm("resnet-bottleneck", ResidualBottleneck(), 128),
    "recurrent": recurrent,
}
"""Every network by name; each is built only when it is measured."""
