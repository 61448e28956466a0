"""Residual networks of jax-resnet; the mutable collection says whether they train."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax_resnet
from flax import linen as nn

from ..adapters import linen
from ..models import Made, model, numbers


def add(name: str, make: Callable[..., nn.Module], **sizes: Any) -> None:
    """Adds a network of two stages."""

    @model(name, trains=True)
    def made(dtype: Any, train: bool) -> Made:
        net = make(stage_sizes=[1, 1], n_classes=5, hidden_sizes=(8, 16), **sizes)
        return linen(net, numbers(4, 16, 16, 3), mutable=train)


add("ResNet-D", jax_resnet.ResNet, block_cls=jax_resnet.ResNetDBlock,
    stem_cls=jax_resnet.ResNetDStem)  # fmt: skip
add("ResNeXt", jax_resnet.ResNet,
    block_cls=functools.partial(
        jax_resnet.ResNetBottleneckBlock, groups=2, base_width=32))  # fmt: skip
add("ResNeSt", jax_resnet.ResNet, block_cls=jax_resnet.ResNeStBottleneckBlock,
    stem_cls=jax_resnet.ResNetDStem)  # fmt: skip
