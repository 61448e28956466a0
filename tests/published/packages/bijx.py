"""Networks of bijx, made for flows on lattices."""

from __future__ import annotations

from typing import Any

import bijx.nn.nets
from flax import nnx as flax_nnx

from ..adapters import nnx
from ..models import Made, model, numbers


@model("circular ConvNet")
def convnet(dtype: Any, train: bool) -> Made:
    made = bijx.nn.nets.ConvNet(2, 3, hidden_channels=[6, 6], rngs=flax_nnx.Rngs(0))
    return nnx(made, numbers(3, 6, 6, 2))


@model("residual MLP")
def resnet(dtype: Any, train: bool) -> Made:
    return nnx(bijx.nn.nets.ResNet(6, 3, width=12, depth=2, rngs=flax_nnx.Rngs(0)), numbers(5, 6))
