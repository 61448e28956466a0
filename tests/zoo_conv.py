"""Convolutional networks that the tests train with and without front contribution.

Every builder takes the number of channels; all else is as in `zoo`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import zoo
from flax import nnx
from zoo import with_extra

CHANNELS, SIZE, IMAGES = 3, 6, 4

_registry = zoo.Registry()
network, names, build = _registry.network, _registry.names, _registry.build


def images(channels, size=SIZE, count=IMAGES):
    """Batches of images and of targets of the same shape."""

    def batch(rng):
        x = rng.standard_normal((count, size, size, channels))
        return (x,), np.sin(x @ np.random.default_rng(2).standard_normal((channels, channels)))

    return batch


def filled(shapes):
    """Parameters of these shapes, drawn so that kernels keep the variance of what they read."""
    rng = np.random.default_rng(3)

    def fill(path, leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 25
        around = 1.0 if path[-1].key in ("scale", "var") else 0.0
        return around + rng.standard_normal(leaf.shape) / fan_in**0.5

    return jax.tree_util.tree_map_with_path(fill, shapes)


def shapes_of(module, batch):
    """The shapes of a linen module's variables; nothing is compiled."""
    (x,), _ = batch(np.random.default_rng(0))
    return jax.eval_shape(module.init, jax.random.key(0), x)


def linen(module, batch):
    """Apply function and parameters of a linen module without state."""
    params = filled(shapes_of(module, batch)["params"])
    return lambda params, x: module.apply({"params": params}, x), params


def batch_norm(module, batch):
    """Apply function with the statistics as an argument, which returns updated ones."""
    variables = filled(shapes_of(module, batch))

    def apply_fn(params, stats, x):
        return module.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])

    extended = with_extra(batch, variables["batch_stats"])
    return apply_fn, variables["params"], extended, zoo.first_squared_error


def conv(channels, size, **options):
    """A convolution with a square kernel, without bias unless asked for."""
    return nn.Conv(channels, (size, size), **({"use_bias": False} | options))


# --- parallel branches --------------------


class RepVgg(nn.Module):
    """Blocks of 3x3, 1x1 and identity, each with BatchNorm or none, added before relu."""

    norm: Callable
    blocks: int = 2

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        for _ in range(self.blocks):
            wide = self.norm()(conv(channels, 3)(x))
            x = nn.relu(wide + self.norm()(conv(channels, 1)(x)) + self.norm()(x))
        return x


def no_norm():
    """Nothing in place of a norm."""
    return lambda x: x


def frozen(module, batch):
    """A network with running statistics that it closes over."""
    variables = filled(shapes_of(module, batch))
    stats = jax.tree.map(np.abs, variables["batch_stats"])

    def apply_fn(params, x):
        fixed = jax.tree.map(lambda s: s.astype(x.dtype), stats)
        return module.apply({"params": params, "batch_stats": fixed}, x)

    return apply_fn, variables["params"], batch, zoo.squared_error


training = functools.partial(nn.BatchNorm, use_running_average=False)
inference = functools.partial(nn.BatchNorm, use_running_average=True)


@network
def rep_vgg(channels=CHANNELS):
    """RepVGG blocks without BatchNorm."""
    batch = images(channels)
    return *linen(RepVgg(no_norm), batch), batch


@network
def rep_vgg_batch_norm(channels=CHANNELS):
    """RepVGG blocks in training mode: the moments of the input serve its pointwise branches."""
    return batch_norm(RepVgg(training), images(channels))


@network
def rep_vgg_inference(channels=CHANNELS):
    """RepVGG blocks with running statistics: one kernel each."""
    return frozen(RepVgg(inference), images(channels))


class DiverseBranches(nn.Module):
    """DBB: 3x3, 1x1, 1x1 then 3x3, 1x1 then average pooling."""

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        y = conv(channels, 3, use_bias=True)(x) + conv(channels, 1)(x)
        y = y + conv(channels, 3)(conv(2 * channels, 1)(x))
        pooled = nn.avg_pool(conv(channels, 1)(x), (3, 3), padding=((1, 1), (1, 1)))
        return nn.relu(y + pooled)


@network
def diverse_branches(channels=CHANNELS):
    """A diverse branch block, without norms."""
    batch = images(channels)
    return *linen(DiverseBranches(), batch), batch


class AcNet(nn.Module):
    """Square and two flat kernels, added."""

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        flat = nn.Conv(c, (1, 3), use_bias=False)(x) + nn.Conv(c, (3, 1), use_bias=False)(x)
        return nn.relu(conv(c, 3, use_bias=True)(x) + flat)


@network
def ac_net(channels=CHANNELS):
    """ACNet's asymmetric block."""
    batch = images(channels)
    return *linen(AcNet(), batch), batch


class MobileOne(nn.Module):
    """Depthwise branches, then pointwise branches."""

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        x = nn.relu(sum(conv(c, s, feature_group_count=c)(x) for s in (3, 3, 1)) + x)
        return nn.relu(conv(c, 1)(x) + conv(c, 1)(x) + x)


@network
def mobile_one(channels=CHANNELS):
    """A MobileOne block without norms."""
    batch = images(channels)
    return *linen(MobileOne(), batch), batch


# --- chains --------------------


class ExpandNet(nn.Module):
    """1x1 to four times the channels, 3x3, 1x1 back, twice."""

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        for _ in range(2):
            x = nn.relu(conv(c, 1, use_bias=True)(conv(4 * c, 3)(conv(4 * c, 1)(x))))
        return x


@network
def expand_net(channels=CHANNELS):
    """ExpandNet blocks."""
    batch = images(channels)
    return *linen(ExpandNet(), batch), batch


@network
def expand_net_valid(channels=CHANNELS):
    """Spatial kernels in a row that read no padding, with biases between, and one with stride."""
    batch = images(channels)
    layers = [
        conv(4 * channels, 3, use_bias=True),
        conv(4 * channels, 3, padding="VALID", use_bias=True),
        conv(channels, 1, strides=2, use_bias=True),
    ]  # fmt: skip
    apply_fn, params = linen(nn.Sequential(layers), batch)
    return apply_fn, params, batch, pooled_error


def pooled_error(outputs, target):
    """Squared error of means over space."""
    return jnp.mean((jnp.mean(outputs, (1, 2)) - jnp.mean(target, (1, 2))) ** 2)


@network
def do_conv(channels=CHANNELS):
    """DO-Conv: kernels that are products of a depthwise factor and a kernel."""
    rng = np.random.default_rng(4)
    params = {
        "depthwise": np.eye(9)[None] + 0.1 * rng.standard_normal((channels, 9, 9)),
        "kernel": rng.standard_normal((channels, 9, channels)) / (9 * channels) ** 0.5,
    }

    def apply_fn(params, x):
        kernel = jnp.einsum("cab,cbo->aco", params["depthwise"], params["kernel"])
        kernel = kernel.reshape(3, 3, x.shape[-1], -1)
        return nn.relu(
            jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )

    return apply_fn, params, images(channels)


@network
def pooled(channels=CHANNELS):
    """A convolution before average pooling, pointwise maps before global pooling."""

    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.avg_pool(conv(channels, 3)(x), (2, 2), (2, 2)))
            return nn.Dense(3)(jnp.mean(conv(4 * channels, 1)(x), (1, 2)))

    batch = images(channels)
    return *linen(Pooled(), batch), batch, lambda y, target: jnp.mean((y - 0.1) ** 2)


# --- networks with norms --------------------


class Bottleneck(nn.Module):
    """ResNet's bottleneck with a projection of the shortcut."""

    norm: Callable

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        h = nn.relu(self.norm()(conv(c, 1)(x)))
        h = nn.relu(self.norm()(conv(c, 3, strides=2)(h)))
        return nn.relu(self.norm()(conv(4 * c, 1)(h)) + self.norm()(conv(4 * c, 1, strides=2)(x)))


@network
def res_net_bottleneck(channels=CHANNELS):
    """ResNet's bottleneck in training mode."""
    apply_fn, params, batch, _ = batch_norm(Bottleneck(training), images(channels))
    return apply_fn, params, batch, lambda y, target: jnp.mean(y[0] ** 2)


@network
def res_net_bottleneck_inference(channels=CHANNELS):
    """ResNet's bottleneck with running statistics."""
    apply_fn, params, batch, _ = frozen(Bottleneck(inference), images(channels))
    return apply_fn, params, batch, lambda y, target: jnp.mean(y**2)


class Inverted(nn.Module):
    """MobileNetV2's bottleneck."""

    norm: Callable

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        h = nn.relu(self.norm()(conv(6 * c, 1)(x)))
        h = nn.relu(self.norm()(conv(6 * c, 3, feature_group_count=6 * c)(h)))
        return x + self.norm()(conv(c, 1)(h))


@network
def inverted_bottleneck(channels=CHANNELS):
    """MobileNetV2's bottleneck in training mode."""
    return batch_norm(Inverted(training), images(channels))


@network
def inverted_bottleneck_inference(channels=CHANNELS):
    """MobileNetV2's bottleneck with running statistics."""
    return frozen(Inverted(inference), images(channels))


class ConvNext(nn.Module):
    """Depthwise 7x7, LayerNorm, an MLP of pointwise maps with a channel scale, residual."""

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        h = nn.LayerNorm()(conv(c, 7, feature_group_count=c, use_bias=True)(x))
        h = nn.Dense(c)(nn.gelu(nn.Dense(4 * c)(h)))
        return x + self.param("gamma", nn.initializers.constant(0.1), (c,)) * h


@network
def conv_next(channels=CHANNELS):
    """A ConvNeXt block."""
    batch = images(channels)
    return *linen(ConvNext(), batch), batch


class UNet(nn.Module):
    """One level: down by a strided convolution, up by a transposed one, joined."""

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        x = nn.relu(conv(c, 3, use_bias=True)(x))
        low = nn.relu(conv(2 * c, 3, strides=2, use_bias=True)(x))
        up = conv(c, 1)(nn.ConvTranspose(c, (2, 2), strides=(2, 2))(low))
        return conv(c, 3, use_bias=True)(jnp.concatenate([x, up], axis=-1))


@network
def u_net(channels=CHANNELS):
    """A U-Net whose transposed convolution meets what follows by phases."""
    batch = images(channels)
    return *linen(UNet(), batch), batch


class Decoder(nn.Module):
    """A code of half the size, then nearest upsampling and two 3x3 convolutions."""

    @nn.compact
    def __call__(self, x):
        count, *sides, c = x.shape
        code = nn.relu(conv(4 * c, 3, strides=2, use_bias=True)(x))
        up = jax.image.resize(code, (count, *sides, 4 * c), "nearest")
        h = nn.relu(conv(2 * c, 3, use_bias=True)(up))
        return conv(c, 3, use_bias=True)(h)


@network
def decoder(channels=CHANNELS):
    """A decoder with nearest upsampling, whose kernel meets the code by phases."""
    batch = images(channels)
    return *linen(Decoder(), batch), batch


class Circular(nn.Module):
    """A pointwise map to more channels, then circular kernels of two sizes and a pointwise one."""

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        h = conv(4 * c, 1, use_bias=True)(x)
        branches = [conv(c, s, padding="CIRCULAR", use_bias=True)(h) for s in (3, 5, 1)]
        return nn.relu(sum(branches))


@network
def circular(channels=CHANNELS):
    """Parallel circular kernels behind an expansion: one kernel."""
    batch = images(channels)
    return *linen(Circular(), batch), batch


@network
def tied_autoencoder(channels=CHANNELS):
    """A linear code made and read by one kernel, its channels exchanged."""
    kernel = np.random.default_rng(5).standard_normal((2, 2, channels, 4 * channels))
    numbers = ("NHWC", "HWIO", "NHWC")

    def apply_fn(params, x):
        code = jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), [(1, 1), (1, 1)], dimension_numbers=numbers
        )
        back = jnp.swapaxes(params["kernel"], 2, 3)
        return jax.lax.conv_general_dilated(code, back, (1, 1), "VALID", dimension_numbers=numbers)

    return apply_fn, {"kernel": 0.3 * kernel / channels**0.5}, images(channels)


# --- nnx --------------------


class NnxRep(nnx.Module):
    """A RepVGG block with training-mode BatchNorm, and an ExpandNet block."""

    def __init__(self, c, rngs):
        self.wide = nnx.Conv(c, c, (3, 3), use_bias=False, rngs=rngs)
        self.point = nnx.Conv(c, c, (1, 1), use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(c, rngs=rngs) for _ in range(3)])
        self.up = nnx.Conv(c, 4 * c, (1, 1), use_bias=False, rngs=rngs)
        self.space = nnx.Conv(4 * c, 4 * c, (3, 3), rngs=rngs)
        self.down = nnx.Conv(4 * c, c, (1, 1), rngs=rngs)

    def __call__(self, x):
        branches = (self.wide(x), self.point(x), x)
        x = nnx.relu(sum(norm(b) for norm, b in zip(self.norms, branches, strict=True)))
        return self.down(self.space(self.up(x)))


@network
def nnx_rep(channels=CHANNELS):
    """Flax NNX: branches with BatchNorm, then an expanded kernel."""
    model = NnxRep(channels, nnx.Rngs(0))
    graph, params, stats, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)

    def apply_fn(params, stats, x):
        own = jax.tree.map(lambda s: s, stats)  # the model moves its statistics in place
        return nnx.merge(graph, params, own, rest)(x)

    return apply_fn, params, with_extra(images(channels), zoo.cast(stats, jnp.float64))
