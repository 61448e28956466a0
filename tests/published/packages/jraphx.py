"""Graph networks of JraphX."""

from __future__ import annotations

from typing import Any

from flax import nnx as flax_nnx
from jraphx.nn import models

from ..adapters import nnx
from ..models import Made, below, model, numbers

GRAPH = numbers(9, 6), below(9, 2, 20)


def add(name: str, of: str, **options: Any) -> None:
    """Adds a network of two convolutions."""

    @model(name, batched=False)
    def made(dtype: Any, train: bool) -> Made:
        net = getattr(models, of)(6, 8, 2, 3, rngs=flax_nnx.Rngs(0), **options)
        return nnx(net, *GRAPH)


add("GraphSAGE", "GraphSAGE", norm="layer_norm")
add("GIN", "GIN", norm="layer_norm")
