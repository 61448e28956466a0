"""State space models of long-range-models."""

from __future__ import annotations

import functools
from typing import Any

import long_range_models

from ..adapters import linen
from ..models import Made, below, model, numbers


@model("S5")
def s5(dtype: Any, train: bool) -> Made:
    layer = functools.partial(long_range_models.S5Layer, state_dim=8, conj_sym=True)
    inner = long_range_models.S4Module(dim=8, depth=1, sequence_layer=layer)
    return linen(long_range_models.SequenceModel(inner, num_tokens=20), below(20, 3, 10))


@model("LRU")
def lru(dtype: Any, train: bool) -> Made:
    layer = functools.partial(long_range_models.LRULayer, state_dim=8)
    inner = long_range_models.S4Module(dim=8, depth=1, sequence_layer=layer)
    made = long_range_models.ContinuousSequenceModel(inner, out_dim=5, pool=True)
    return linen(made, numbers(3, 10, 4))
