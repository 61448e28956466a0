"""Networks that dm-haiku brings along, and its recurrent core."""

from __future__ import annotations

from typing import Any

import haiku as hk

from ..adapters import haiku
from ..models import Made, model, numbers

IMAGES = numbers(4, 16, 16, 3)


@model("Haiku ResNet", trains=True)
def resnet(dtype: Any, train: bool) -> Made:
    def net(x: Any) -> Any:
        sizes = {"blocks_per_group": (1, 1, 1, 1), "channels_per_group": (8, 8, 16, 16)}
        return hk.nets.ResNet(num_classes=5, **sizes)(x, is_training=train or hk.running_init())

    return haiku(net, IMAGES)


@model("Haiku ResNet v2", trains=True)
def resnet_v2(dtype: Any, train: bool) -> Made:
    def net(x: Any) -> Any:
        sizes = {"blocks_per_group": (1, 1, 1, 1), "channels_per_group": (8, 8, 16, 16)}
        made = hk.nets.ResNet(num_classes=5, **sizes, resnet_v2=True, bottleneck=False)
        return made(x, is_training=train or hk.running_init())

    return haiku(net, IMAGES)


@model("MobileNet v1", trains=True)
def mobilenet(dtype: Any, train: bool) -> Made:
    def net(x: Any) -> Any:
        made = hk.nets.MobileNetV1(strides=(1, 2, 1), channels=(8, 16, 16), num_classes=5)
        return made(x, is_training=train or hk.running_init())

    return haiku(net, IMAGES)


@model("Haiku LSTM", batched=False)
def lstm(dtype: Any, train: bool) -> Made:
    def net(x: Any) -> Any:
        core = hk.DeepRNN([hk.Linear(12), hk.LSTM(16), hk.Linear(8), hk.GRU(8), hk.Linear(5)])
        return hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0]

    return haiku(net, numbers(6, 4, 10))
