"""Image networks of Equimo, for inference, where BatchNorm uses its running statistics."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
from equimo.models.convnext import ConvNeXt
from equimo.models.mobilenet import MobileNetv3
from equimo.models.vit import VisionTransformer

from ..adapters import equinox
from ..models import Made, model, numbers

KEY = jax.random.key(0)


def on_images(net: Any, size: int = 16) -> Made:
    """A network of one image, on a batch."""
    call = lambda net, x: jax.vmap(lambda x: net(x, key=KEY, inference=True))(x)  # noqa: E731
    return equinox(eqx.nn.inference_mode(net), numbers(3, 3, size, size), call=call)


@model("MobileNet v3")
def mobilenet(dtype: Any, train: bool) -> Made:
    layers = [(8, 8, 3, 2, True, "relu"), (8, 16, 3, 1, False, "hard_swish")]
    return on_images(MobileNetv3(3, layers, last_channels=16, num_classes=5, key=KEY))


@model("ConvNeXt")
def convnext(dtype: Any, train: bool) -> Made:
    sizes = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
    net = ConvNeXt(3, **sizes, layer_scale_init_value=0.1, num_classes=5, key=KEY)
    return on_images(net, 32)


@model("Equimo ViT")
def vit(dtype: Any, train: bool) -> Made:
    return on_images(VisionTransformer(
        img_size=16, in_channels=3, dim=16, patch_size=4, num_heads=2, depths=[2],
        num_classes=5, key=KEY,
    ))  # fmt: skip
