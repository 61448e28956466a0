"""Neural operators of NeoJAX."""

from __future__ import annotations

from typing import Any

import jax
from neojax.models import FNO, TFNO

from ..adapters import equinox
from ..models import Made, model, numbers


def add(name: str, kind: Any, **sizes: Any) -> None:
    """Adds an operator on a plane."""

    @model(name)
    def made(dtype: Any, train: bool) -> Made:
        net = kind(
            jax.random.key(0), in_channels=2, out_channels=3, hidden_channels=8, n_layers=1,
            modes=(4, 4), **sizes,
        )  # fmt: skip
        call = lambda net, x: jax.vmap(lambda x: net(x, inference=True))(x)  # noqa: E731
        return equinox(net, numbers(2, 2, 8, 8), call=call)


add("FNO with channel MLPs", FNO)
add("Tucker FNO", TFNO, ranks=3)
