"""Normalising flows of FlowJAX: the logarithm of the density of points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flowjax.bijections
import flowjax.distributions
import flowjax.flows
import jax
import jax.numpy as jnp
import paramax

from ..adapters import equinox
from ..models import Made, model, numbers

POINTS = numbers(5, 4)
SMALL = {"flow_layers": 2, "nn_width": 12}


def add(name: str, make: Callable[..., Any], **sizes: Any) -> None:
    """Adds a flow."""

    @model(name)
    def made(dtype: Any, train: bool) -> Made:
        base = flowjax.distributions.Normal(jnp.zeros(4))
        flow = make(jax.random.key(0), base_dist=base, **sizes)
        call = lambda net, x: paramax.unwrap(net).log_prob(x)  # noqa: E731
        return equinox(flow, POINTS, call=call)


add("coupling flow", flowjax.flows.coupling_flow, **SMALL)
add("spline coupling flow", flowjax.flows.coupling_flow, **SMALL,
    transformer=flowjax.bijections.RationalQuadraticSpline(knots=4, interval=3))  # fmt: skip
add("masked autoregressive flow", flowjax.flows.masked_autoregressive_flow, **SMALL)
add("block neural autoregressive flow", flowjax.flows.block_neural_autoregressive_flow,
    nn_block_dim=4)  # fmt: skip
add("planar flow", flowjax.flows.planar_flow, flow_layers=2)
