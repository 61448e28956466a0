"""Transformers of attnax."""

from __future__ import annotations

from typing import Any

import attnax
from flax import nnx as flax_nnx

from ..adapters import nnx
from ..models import Made, below, model, numbers

SIZES = {"d_model": 16, "num_heads": 4, "num_layers": 2, "d_ff": 32, "dropout_rate": 0.0}


@model("attnax encoder")
def encoder(dtype: Any, train: bool) -> Made:
    config = attnax.TransformerConfig(vocab_size=40, max_len=16, **SIZES, use_pre_norm=False)
    made = attnax.TransformerEncoder(flax_nnx.Rngs(0), config)
    return nnx(made, below(40, 3, 10), deterministic=True)


@model("attnax decoder")
def decoder(dtype: Any, train: bool) -> Made:
    config = attnax.TransformerConfig(
        vocab_size=40, max_len=16, **SIZES, pos_emb_type="rope", ff_activation="swiglu",
        norm_type="rms", num_kv_heads=2,
    )  # fmt: skip
    made = attnax.TransformerDecoder(flax_nnx.Rngs(0), config)
    return nnx(made, below(40, 3, 10), deterministic=True)


@model("attnax ViT")
def vit(dtype: Any, train: bool) -> Made:
    config = attnax.VisionTransformerConfig(image_size=16, patch_size=4, num_classes=5, **SIZES)
    made = attnax.VisionTransformer(flax_nnx.Rngs(0), config)
    return nnx(made, numbers(3, 16, 16, 3), deterministic=True)
