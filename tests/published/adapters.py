"""Modules of the frameworks as networks."""

from __future__ import annotations

from typing import Any

import jax

from .models import Made

DROPOUT = 3
"""The seed of dropout, the same at every call."""


def linen(module: Any, *inputs: Any, mutable: bool = False, **options: Any) -> Made:
    """A Flax linen module.

    Args:
      module: the module.
      *inputs: what it is called with.
      mutable: whether it also returns the state that it changes.
      **options: further arguments of its call.
    """

    def init() -> tuple[Any, Any]:
        rngs = dict.fromkeys(("params", "dropout"), jax.random.PRNGKey(0))
        state = dict(jax.jit(lambda: module.init(rngs, *inputs, **options))())
        return state.pop("params"), state

    def apply(params: Any, state: Any, *inputs: Any) -> Any:
        variables, rngs = {"params": params, **state}, {"dropout": jax.random.key(DROPOUT)}
        changed = list(state) if mutable else False
        return module.apply(variables, *inputs, rngs=rngs, mutable=changed, **options)

    return Made(apply, init, inputs)


def nnx(module: Any, *inputs: Any, **options: Any) -> Made:
    """A Flax NNX module in the mode that was set; it returns its statistics too."""
    from flax import nnx

    for _, part in nnx.iter_graph(module):
        if isinstance(part, nnx.Embed):
            part.dtype = None  # it would round to the type in which it was made
    graph, params, state, others = nnx.split(module, nnx.Param, nnx.BatchStat, ...)

    def apply(params: Any, state: Any, *inputs: Any) -> Any:
        made = nnx.merge(graph, params, state, others)
        return made(*inputs, **options), nnx.state(made, nnx.BatchStat)

    return Made(apply, lambda: (params, state), inputs)


def equinox(module: Any, *inputs: Any, call: Any = lambda net, *inputs: net(*inputs)) -> Made:
    """An Equinox module; ``call(module, *inputs)`` says how it is called, for a batch say."""
    import equinox as eqx

    params, rest = eqx.partition(module, eqx.is_inexact_array)

    def apply(params: Any, state: Any, *inputs: Any) -> Any:
        return call(eqx.combine(params, rest), *inputs)

    return Made(apply, lambda: (params, ()), inputs)


def haiku(function: Any, *inputs: Any) -> Made:
    """A function that calls Haiku modules."""
    import haiku as hk

    transformed = hk.transform_with_state(function)

    def apply(params: Any, state: Any, *inputs: Any) -> Any:
        return transformed.apply(params, state, jax.random.key(DROPOUT), *inputs)

    return Made(apply, lambda: jax.jit(transformed.init)(jax.random.PRNGKey(0), *inputs), inputs)
