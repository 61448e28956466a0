"""Neural operators and image networks of PDEquinox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pdequinox

from ..adapters import equinox
from ..models import Made, model, numbers


def add(name: str, make: Callable[..., Any], dims: int, **sizes: Any) -> None:
    """Adds a network on a periodic grid."""

    @model(name)
    def made(dtype: Any, train: bool) -> Made:
        net = make(dims, 2, 3, key=jax.random.key(0), **sizes)
        return equinox(net, numbers(3, 2, *[16] * dims), call=lambda net, x: jax.vmap(net)(x))


add("FNO", pdequinox.arch.ClassicFNO, 1, hidden_channels=8, num_modes=4, num_blocks=2)
add("classic UNet", pdequinox.arch.ClassicUNet, 1, hidden_channels=6, num_levels=2)
add("modern UNet", pdequinox.arch.ModernUNet, 2, hidden_channels=4, num_levels=1, num_blocks=1)
add("dilated ResNet", pdequinox.arch.DilatedResNet, 1, hidden_channels=6, num_blocks=1)
