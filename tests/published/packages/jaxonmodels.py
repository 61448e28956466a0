"""Networks of jaxonmodels."""

from __future__ import annotations

from typing import Any

import jax
from jaxonmodels.models.mamba import Mamba

from ..adapters import equinox
from ..models import Made, below, model


@model("Mamba")
def mamba(dtype: Any, train: bool) -> Made:
    net = Mamba(n_embd=8, n_dims=24, n_layers=1, d_state=4, key=jax.random.key(0))
    return equinox(net, below(24, 2, 7), call=lambda net, x: jax.vmap(net)(x))
