"""Networks for physics of foundax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import foundax
import jax

from ..adapters import equinox
from ..models import Made, model, numbers


def add(name: str, make: Callable[..., Any], *inputs: Any, **sizes: Any) -> None:
    """Adds a network; its inputs are a batch."""

    @model(name)
    def made(dtype: Any, train: bool) -> Made:
        net = make(key=jax.random.key(0), **sizes)
        call = lambda net, *inputs: jax.vmap(lambda *inputs: net(*inputs))(*inputs)  # noqa: E731
        return equinox(net, *inputs, call=call)


add("DeepONet", foundax.deeponet, numbers(3, 10), numbers(3, 4, 2), n_sensors=10, coord_dim=2,
    basis_functions=8, hidden_dim=12, n_layers=2)  # fmt: skip
add("PointNet", foundax.pointnet, numbers(3, 6, 4), in_features=4, output_dim=2,
    hidden_dims=[8, 8, 8, 4, 4, 4, 8, 8, 8])  # fmt: skip
add("foundax UNet", foundax.unet2d, numbers(2, 8, 8, 1), depth=2, wf=2)
