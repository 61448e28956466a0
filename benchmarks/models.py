"""The networks that the benchmarks measure, each with the bar it must reach.

A prediction is written down here before anything is measured, so that a result can contradict it.
"""

import dataclasses
import functools
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


def decoded(params: list[Array], code: Array) -> Array:
    """A decoder: a pointwise map, then thrice relu, nearest upsampling and a 3x3 kernel."""
    x = convolve(code, params[0])
    for kernel in params[1:]:
        count, height, width, channels = x.shape
        up = (count, 2 * height, 2 * width, channels)
        x = convolve(jax.image.resize(nn.relu(x), up, "nearest"), kernel)
    return x


def by_phases(x: Array, kernel: Array) -> Array:
    """A 3x3 kernel over upsampled rows as 2x2 kernels of four phases over the rows themselves.

    In place 2 p + q - 1 a kernel's entry k stands on row p + t - 1 where ``2 t + u = q + k``.
    """
    along = [[[(q + k) // 2 == t for t in (0, 1)] for q in (0, 1)] for k in (0, 1, 2)]
    place = jnp.asarray(along, x.dtype)
    phases = jnp.einsum("abcf,apy,bqx->yxcpqf", kernel, place, place, precision="highest")
    wide = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    made = jax.lax.conv_general_dilated(
        wide,
        phases.reshape(2, 2, x.shape[-1], -1),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    count, height, width, _ = made.shape
    made = made.reshape(count, height, width, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return made.reshape(count, 2 * height, 2 * width, -1)[:, 1:-1, 1:-1]


def decoded_by_phases(params: list[Array], code: Array) -> Array:
    """The same decoder without upsampled activations."""
    x = convolve(code, params[0])
    for kernel in params[1:]:
        x = by_phases(nn.relu(x), kernel)
    return x


def upsample() -> Network:
    """32 codes of 8 x 8 x 128 to images of 64 x 64 x 3."""
    params = [conv_kernel(4, 1, 1, 128, 128)]
    widths = (128, 64, 32, 3)
    params += [conv_kernel(5 + i, 3, 3, *pair) for i, pair in enumerate(itertools.pairwise(widths))]
    return Network(
        "upsample",
        decoded,
        params,
        normal(1, 32, 8, 8, 128),
        normal(3, 32, 64, 64, 3),
        squared_error,
        Bar(speedup=1.3, memory=1.0, residuals=True, limit=1.1),
        prediction=1.6,
        limit=decoded_by_phases,
    )


class ConvNext(nn.Module):
    """ConvNeXt blocks: depthwise 7x7, LayerNorm, pointwise up, gelu, pointwise down, LayerScale."""

    blocks: int = 2

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        width = x.shape[-1]
        for i in range(self.blocks):
            h = nn.LayerNorm()(nn.Conv(width, (7, 7), feature_group_count=width)(x))
            h = nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(h)))
            x = x + self.param(f"scale_{i}", nn.initializers.constant(0.1), (width,)) * h
        return x


def conv_next() -> Network:
    """ConvNeXt blocks on 16 images of 16 x 16."""
    x = normal(1, 16, 16, 16, 96)
    module = ConvNext()
    params = module.init(jax.random.key(0), x)["params"]
    return Network(
        "convnext",
        lambda p, x: module.apply({"params": p}, x),
        params,
        x,
        normal(3, *x.shape),
        squared_error,
        Bar(residuals=True),
        prediction=1.02,
    )


# --- pre-norm feed-forward blocks -----------------------------------------------------------------


class FeedForward(nn.Module):
    """Residual blocks: norm, dense, gelu, dense; read out through a last norm if ``head``."""

    norm: type[nn.Module]
    blocks: int
    expansion: int
    head: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        width = x.shape[-1]
        for i in range(self.blocks):
            h = self.norm(name=f"norm_{i}")(x)
            h = nn.gelu(nn.Dense(width * self.expansion, name=f"in_{i}")(h))
            x = x + nn.Dense(width, name=f"out_{i}")(h)
        return nn.Dense(width, name="head")(self.norm(name="norm")(x)) if self.head else x


def feed_forward(
    name: str, module: FeedForward, memory: float, speedup: float = 1.0, prediction: float = 1.1
) -> Network:
    """Pre-norm blocks on 8192 tokens of width 256."""
    x = normal(1, 8192, 256)
    return Network(
        name,
        lambda params, x: module.apply({"params": params}, x),
        perturbed(jax.jit(module.init)(jax.random.key(0), x)["params"]),
        x,
        normal(3, *x.shape),
        squared_error,
        Bar(speedup=speedup, memory=memory, residuals=True),
        prediction,
    )


# --- small language models ------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention of ``heads`` heads."""

    heads: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        width = x.shape[-1]
        project = functools.partial(nn.DenseGeneral, use_bias=self.use_bias)
        q, k, v = (project((self.heads, width // self.heads), name=name)(x) for name in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (width // self.heads) ** 0.5
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        weights = nn.softmax(jnp.where(causal, scores, -1e9))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return project(width, axis=(-2, -1), name="out")(mixed)


class Gpt(nn.Module):
    """A pre-LayerNorm decoder with gelu, its head tied to its embedding."""

    vocabulary: int = 512
    width: int = 256
    blocks: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, ids: Array) -> Array:  # noqa: D102
        embed = nn.Embed(self.vocabulary, self.width)
        positions = self.param("positions", nn.initializers.normal(), (ids.shape[1], self.width))
        x = embed(ids) + positions
        for _ in range(self.blocks):
            x = x + Attention(self.heads)(nn.LayerNorm()(x))
            h = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(h)
        return embed.attend(nn.LayerNorm()(x))


class SwiGlu(nn.Module):
    """A pre-RMSNorm decoder with gated feed-forward layers and no biases, its head untied."""

    vocabulary: int = 512
    width: int = 256
    blocks: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, ids: Array) -> Array:  # noqa: D102
        x = nn.Embed(self.vocabulary, self.width)(ids)
        dense = functools.partial(nn.Dense, use_bias=False)
        for _ in range(self.blocks):
            x = x + Attention(self.heads, use_bias=False)(nn.RMSNorm()(x))
            h = nn.RMSNorm()(x)
            h = nn.silu(dense(2 * self.width)(h)) * dense(2 * self.width)(h)
            x = x + dense(self.width)(h)
        return dense(self.vocabulary)(nn.RMSNorm()(x))


def language_model(name: str, module: nn.Module, prediction: float) -> Network:
    """32 sequences of 128 tokens; each token is predicted from those before it."""
    ids = jax.random.randint(jax.random.key(1), (32, 129), 0, 512)
    return Network(
        name,
        lambda params, ids: module.apply({"params": params}, ids),
        perturbed(jax.jit(module.init)(jax.random.key(0), ids[:, :-1])["params"]),
        ids[:, :-1],
        ids[:, 1:],
        cross_entropy,
        Bar(memory=1.0, residuals=True),
        prediction,
    )


# --- a linear map, a norm, a linear map -----------------------------------------------------------


class WideNorm(nn.Module):
    """LayerNorm of a product sixteen times wider than its input, and a product back."""

    hidden: int = 1024

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        h = nn.LayerNorm()(nn.Dense(self.hidden, name="in")(x))
        return nn.Dense(x.shape[-1], name="out")(h)


def folded_wide_norm(params: PyTree, x: Array) -> Array:
    """``x Z / std + c``; every variance from one 64 x 64 matrix, which cancels in float32."""
    kernel, bias = params["in"]["kernel"], params["in"]["bias"]
    kernel, bias = kernel - kernel.mean(1, keepdims=True), bias - bias.mean()
    gain, shift = params["LayerNorm_0"]["scale"], params["LayerNorm_0"]["bias"]
    out = params["out"]["kernel"]
    square = jnp.sum((x @ (kernel @ kernel.T) + 2 * kernel @ bias) * x, -1) + bias @ bias
    scale = jax.lax.rsqrt(square / kernel.shape[1] + 1e-6)[:, None]
    scaled = gain[:, None] * out
    return (x @ (kernel @ scaled) + bias @ scaled) * scale + shift @ out + params["out"]["bias"]


def wide_norm() -> Network:
    """64-1024-64, 16384 rows."""
    x, module = normal(1, 16384, 64), WideNorm()
    return Network(
        "wide-norm",
        lambda params, x: module.apply({"params": params}, x),
        perturbed(jax.jit(module.init)(jax.random.key(0), x)["params"]),
        x,
        normal(3, *x.shape),
        squared_error,
        Bar(speedup=8.0, memory=8.0, residuals=True),
        prediction=15.0,
        limit=folded_wide_norm,
    )


# --- a frozen weight beside a trainable one, and recurrences --------------------------------------


def low_rank_adapters(params: list[dict[str, Array]], x: Array) -> Array:
    """Frozen dense layers with a trainable low-rank branch beside each."""
    for layer in params:
        frozen = jax.lax.stop_gradient(layer["frozen"])
        x = nn.relu(x @ frozen + x @ layer["down"] @ layer["up"])
    return x


def adapters(name: str, width: int, rank: int, rows: int, prediction: float) -> Network:
    """Two adapted layers."""
    layers = [
        {
            "frozen": w,
            "down": normal(7 + i, width, rank) / width**0.5,
            "up": normal(9 + i, rank, width),
        }
        for i, w in enumerate(kernels((width,) * 3))
    ]
    x, target = normal(1, rows, width), normal(3, rows, width)
    return Network(name, low_rank_adapters, layers, x, target, squared_error, Bar(), prediction)


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
        Bar(speedup=10.0),
        prediction=16.0,
        limit=hoisted_recurrence,
    )


class Cell(nn.Module):
    """``h <- a h + x_t B1 B2``, the sum of all states read through two more layers."""

    @nn.compact
    def __call__(self, h: Array, x: Array) -> tuple[Array, Array]:  # noqa: D102
        width = x.shape[-1]
        inside = nn.Dense(width, use_bias=False)(nn.Dense(16 * width, use_bias=False)(x))
        h = self.param("decay", nn.initializers.constant(0.9), (width,)) * h + inside
        return h, nn.Dense(width)(nn.Dense(16 * width)(h))


def scanned_cells() -> Network:
    """A linear recurrent layer under ``nn.scan``: width 64 through 1024, 64 rows, 128 steps."""
    scanned = nn.scan(
        Cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1
    )()
    batch = normal(1, 64, 128, 64)
    params = jax.jit(scanned.init)(jax.random.key(0), jnp.zeros_like(batch[:, 0]), batch)
    return Network(
        "recurrent-flax",
        lambda params, x: scanned.apply(params, jnp.zeros_like(x[:, 0]), x)[1],
        params,
        batch,
        normal(3, 64, 128, 64),
        squared_error,
        Bar(speedup=10.0),
        prediction=14.0,
    )


def state_space(params: dict[str, Array], x: Array) -> Array:
    """``s <- a s + x_t B1 B2``, ``y_t = s C1 C2``; ``x`` has shape (rows, steps, width)."""

    def step(s: Array, x_t: Array) -> tuple[Array, Array]:
        s = params["a"] * s + x_t @ params["b1"] @ params["b2"]
        return s, s @ params["c1"] @ params["c2"]

    return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1))[1]


def hoisted_state_space(params: dict[str, Array], x: Array) -> Array:
    """The same, with both products of matrices formed once, outside the loop."""
    b, c = params["b1"] @ params["b2"], params["c1"] @ params["c2"]

    def step(s: Array, x_t: Array) -> tuple[Array, Array]:
        s = params["a"] * s + x_t @ b
        return s, s @ c

    return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1))[1]


def diagonal_state_space() -> Network:
    """64 states, inputs and outputs through 1024 hidden units, 64 rows, 128 steps."""
    names = ("b1", "b2", "c1", "c2")
    params = dict(zip(names, kernels((64, 1024, 64, 1024, 64)), strict=True))
    return Network(
        "state-space",
        state_space,
        {"a": jnp.linspace(0.5, 0.95, 64), **params},
        normal(1, 64, 128, 64),
        normal(3, 128, 64, 64),
        squared_error,
        Bar(speedup=10.0),
        prediction=16.0,
        limit=hoisted_state_space,
    )


# --- attention ------------------------------------------------------------------------------------


def attention(params: dict[str, Array], x: Array) -> Array:
    """One head, wider than the stream; ``x`` has shape (sequences, tokens, width)."""
    queries, keys, values = (x @ params[name] for name in "qkv")
    scores = jnp.einsum("bik,bjk->bij", queries, keys) / queries.shape[-1] ** 0.5
    return jnp.einsum("bij,bjk->bik", nn.softmax(scores), values) @ params["o"]


def folded_attention(params: dict[str, Array], x: Array) -> Array:
    """The same, queries multiplied with keys and values with outputs first."""
    scores = jnp.einsum("bik,bjk->bij", x @ (params["q"] @ params["k"].T), x)
    mixed = nn.softmax(scores / params["q"].shape[-1] ** 0.5)
    return jnp.einsum("bij,bjk->bik", mixed, x @ (params["v"] @ params["o"]))


def wide_attention() -> Network:
    """A head of width 1024 on a stream of width 64, 32 sequences of 128 tokens."""
    params = {name: normal(i, 64, 1024) / 8 for i, name in enumerate("qkv")}
    params["o"] = normal(3, 1024, 64) / 32
    return Network(
        "wide-attention",
        attention,
        params,
        normal(1, 32, 128, 64),
        normal(3, 32, 128, 64),
        squared_error,
        Bar(speedup=4.0, limit=1.1),
        prediction=8.0,
        limit=folded_attention,
    )


# --- functions of looked-up rows ------------------------------------------------------------------


class OfCharacters(nn.Module):
    """An embedding, LayerNorm, and one dense layer or a feed-forward block on it."""

    feed_forward: bool

    @nn.compact
    def __call__(self, ids: Array) -> Array:  # noqa: D102
        x = nn.Embed(256, 256, name="table")(ids)
        h = nn.LayerNorm(name="norm")(x)
        if not self.feed_forward:
            return nn.Dense(768, name="qkv")(h)
        return x + nn.Dense(256, name="out")(nn.relu(nn.Dense(1024, name="in")(h)))


def folded_characters(feed_forward: bool) -> Callable[[PyTree, Array], Array]:
    """The same function of the table's 256 rows, looked up at the end."""
    module = OfCharacters(feed_forward)

    def apply_fn(params: PyTree, ids: Array) -> Array:
        return jnp.take(module.apply({"params": params}, jnp.arange(256)), ids, axis=0)

    return apply_fn


def characters(name: str, feed_forward: bool, prediction: float) -> Network:
    """16384 tokens of 256 kinds, width 256."""
    ids = jax.random.randint(jax.random.key(1), (16, 1024), 0, 256)
    module = OfCharacters(feed_forward)
    params = perturbed(jax.jit(module.init)(jax.random.key(0), ids)["params"])
    return Network(
        name,
        lambda params, ids: module.apply({"params": params}, ids),
        params,
        ids,
        normal(3, *ids.shape, 256 if feed_forward else 768),
        squared_error,
        Bar(speedup=3.0),
        prediction=prediction,
        limit=folded_characters(feed_forward),
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
    "layernorm-stack": lambda: feed_forward(
        "layernorm-stack",
        FeedForward(nn.LayerNorm, blocks=6, expansion=1, head=True),
        memory=1 / 0.85,
        speedup=1.05,
        prediction=1.18,
    ),
    "gpt": lambda: language_model("gpt", Gpt(), 1.04),
    "swiglu": lambda: language_model("swiglu", SwiGlu(), 1.02),
    "wide-norm": wide_norm,
    "bottleneck-512": lambda: linear("bottleneck-512", (512, 128, 128, 512), 8192, Bar(), 1.0),
    "square-256": lambda: linear("square-256", (256,) * 5, 256, Bar(), 1.0),
    "relu-mlp": plain_relu,
    "lora": lambda: adapters("lora", 512, 8, 4096, 1.0),
    "lora-256": lambda: adapters("lora-256", 256, 8, 16384, 1.07),
    "expandnet": expand_net,
    "repvgg": rep_vgg,
    "upsample": upsample,
    "convnext": conv_next,
    "mobile-bottleneck": lambda: with_batch_norm("mobile-bottleneck", MobileBottleneck(), 16),
    "resnet-bottleneck": lambda: with_batch_norm("resnet-bottleneck", ResidualBottleneck(), 128),
    "recurrent": recurrent,
    "recurrent-flax": scanned_cells,
    "wide-attention": wide_attention,
    "state-space": diagonal_state_space,
    "embedding-qkv": lambda: characters("embedding-qkv", False, 8.7),
    "embedding-mlp": lambda: characters("embedding-mlp", True, 42.0),
}
"""Every network by name; each is built only when it is measured."""
