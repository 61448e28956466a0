"""State space models of mamba2-jax."""

from __future__ import annotations

import types
from typing import Any

import jax.numpy as jnp
import mamba2_jax
from flax import nnx as flax_nnx
from mamba2_jax import modeling

from ..adapters import nnx
from ..models import Made, below, model, numbers

# It casts to single precision here and there, which would be all that double precision shows.
modeling.jnp = types.SimpleNamespace(**{**vars(jnp), "float32": jnp.float64})

SIZES = {"hidden_size": 16, "state_size": 8, "head_dim": 8, "chunk_size": 4, "num_hidden_layers": 2}


@model("Mamba 2")
def language(dtype: Any, train: bool) -> Made:
    config = mamba2_jax.Mamba2Config(vocab_size=40, **SIZES, residual_in_fp32=False)
    made = mamba2_jax.Mamba2ForCausalLM(config, rngs=flax_nnx.Rngs(0))
    return nnx(made, below(40, 3, 12))


@model("Mamba 2 forecaster")
def forecaster(dtype: Any, train: bool) -> Made:
    made = mamba2_jax.Mamba2Forecaster(
        input_dim=3, d_model=16, n_layers=1, d_state=8, headdim=8, chunk_size=4,
        forecast_horizon=4, rngs=flax_nnx.Rngs(0),
    )  # fmt: skip
    return nnx(made, numbers(3, 8, 3))
