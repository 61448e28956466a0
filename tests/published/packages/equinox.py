"""Layers of Equinox that are networks by themselves."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ..adapters import equinox
from ..models import Made, model, numbers

KEY = jax.random.key(0)


def vmapped(net: Any, *inputs: Any) -> Any:
    """Calls what takes one example with a batch."""
    return jax.vmap(net)(*inputs)


@model("Equinox MLP")
def mlp(dtype: Any, train: bool) -> Made:
    return equinox(eqx.nn.MLP(7, 3, 16, 2, key=KEY), numbers(5, 7), call=vmapped)


@model("Equinox attention")
def attention(dtype: Any, train: bool) -> Made:
    sizes = {"query_size": 10, "key_size": 8, "value_size": 8, "output_size": 6, "key": KEY}
    made = eqx.nn.MultiheadAttention(2, **sizes, use_query_bias=True, use_output_bias=True)
    mask = jnp.tril(jnp.ones((6, 9), bool))
    call = lambda net, q, kv: jax.vmap(lambda q, kv: net(q, kv, kv, mask))(q, kv)  # noqa: E731
    return equinox(made, numbers(3, 6, 10), numbers(3, 9, 8), call=call)


@model("Equinox GRU")
def gru(dtype: Any, train: bool) -> Made:
    cell = eqx.nn.GRUCell(6, 8, key=KEY)
    head = eqx.nn.Linear(8, 3, key=KEY)

    def call(net: Any, x: Any) -> Any:
        cell, head = net
        step = lambda h, x: ((h := cell(x, h)), h)  # noqa: E731
        run = lambda x: lax.scan(step, jnp.zeros(8, x.dtype), x)[1]  # noqa: E731
        return jax.vmap(jax.vmap(head))(jax.vmap(run)(x))

    return equinox((cell, head), numbers(4, 7, 6), call=call)
