"""Networks of NanoDL."""

from __future__ import annotations

from typing import Any

import nanodl

from ..adapters import linen
from ..models import Made, below, model, numbers


@model("MLP-Mixer", trains=True)
def mixer(dtype: Any, train: bool) -> Made:
    made = nanodl.Mixer(
        patch_size=(4, 4), num_layers=2, hidden_dim=16, num_heads=2, feedforward_dim=16,
        dropout=0.1, n_outputs=5,
    )  # fmt: skip
    return linen(made, numbers(3, 16, 16, 3), training=train)


@model("dense GAT", batched=False)
def gat(dtype: Any, train: bool) -> Made:
    made = nanodl.GAT(nfeat=6, nhid=8, nclass=3, dropout_rate=0.5, alpha=0.2, nheads=2)
    return linen(made, numbers(9, 6), below(2, 9, 9))
