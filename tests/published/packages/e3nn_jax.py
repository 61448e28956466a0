"""The E(3) equivariant network of the Tetris example of e3nn-jax."""

from __future__ import annotations

from typing import Any

import e3nn_jax as e3nn
import flax.linen
import jax
import numpy as np

from ..adapters import linen
from ..models import Made, model, numbers

NODES = 4
SENDERS, RECEIVERS = (i.astype(np.int32) for i in np.nonzero(~np.eye(NODES, dtype=bool)))


class Layer(flax.linen.Module):
    """One message to every other point, and a gate."""

    target: str

    @flax.linen.compact
    def __call__(self, features: Any, offsets: Any) -> Any:
        target = e3nn.Irreps(self.target)
        harmonics = e3nn.spherical_harmonics([1, 2], offsets, True)
        sent = e3nn.flax.Linear(features.irreps, name="linear_up")(features)[SENDERS]
        messages = e3nn.concatenate([sent, e3nn.tensor_product(sent, harmonics)]).regroup()
        received = e3nn.scatter_sum(messages, dst=RECEIVERS, output_size=NODES) / 2.0
        gates = (
            target.filter(keep="0e+0o").regroup() + f"{target.filter(drop='0e+0o').num_irreps}x0e"
        )
        gated = e3nn.flax.Linear((gates + target.filter(drop="0e+0o")).regroup())(received)
        return e3nn.flax.Linear(target)(e3nn.gate(gated, even_act=jax.nn.gelu))


class Points(flax.linen.Module):
    """A graph network on points."""

    @flax.linen.compact
    def __call__(self, places: Any) -> Any:
        features = e3nn.IrrepsArray("0e", places[:, :1] * 0 + 1)
        offsets = e3nn.IrrepsArray("1o", places[RECEIVERS] - places[SENDERS])
        for target in ("4x0e+3x1o", "2x0e+1x1o"):
            features = Layer(target)(features, offsets)
        return features.array


@model("Tetris", batched=False)
def tetris(dtype: Any, train: bool) -> Made:
    return linen(Points(), numbers(NODES, 3))
