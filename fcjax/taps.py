"""The outputs of a network that a loss calls, with the loss's gradient.

The loss may call the network inside jit, remat, vmap or scan, where a tracer that is put aside is
lost. So each call is given a slot of zeros, and ``_tap`` declares the gradient with respect to the
slot to be the output: it comes out with the gradients, through any transformation.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["combine", "partition", "slots", "tapped"]

Loss = Callable[[Callable[..., Any], Any, Any], jax.Array]


@jax.custom_vjp
def _tap(outputs, slot):
    del slot
    return outputs


def _tap_forward(outputs, slot):
    del slot
    return outputs, outputs


def _tap_backward(outputs, cotangents):
    return cotangents, outputs


_tap.defvjp(_tap_forward, _tap_backward)


def tapped(apply: Callable[..., Any], given: Iterator[Any]) -> Callable[..., Any]:
    """``apply``, with each call's real-valued outputs tapped into the next slot."""

    def call(*args, **kwargs):
        trainable, other = partition(apply(*args, **kwargs))
        leaves, structure = jax.tree.flatten(trainable)
        return combine(jax.tree.unflatten(structure, _tap(leaves, next(given))), other)

    return call


def slots(loss_fn: Loss, apply: Callable[..., Any], params: Any, batch: Any) -> list[list[Any]]:
    """Zeros of the shapes of the real-valued outputs of every call of ``apply`` in the loss."""
    calls: list[list[jax.ShapeDtypeStruct]] = []

    def noting(*args, **kwargs):
        outputs = apply(*args, **kwargs)
        leaves = jax.tree.leaves(partition(outputs)[0])
        calls.append([jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype) for leaf in leaves])
        return outputs

    jax.eval_shape(lambda p, b: loss_fn(noting, p, b), params, batch)
    return [[jnp.zeros(leaf.shape, leaf.dtype) for leaf in call] for call in calls]


# --- trees of which only a part is trained ------------------------------------------------------


def _is_trainable(leaf: Any) -> bool:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.inexact)


def partition(tree: Any) -> tuple[Any, Any]:
    """The tree's inexact leaves and its other leaves, each with `None` in the other's places."""
    trainable = jax.tree.map(lambda leaf: leaf if _is_trainable(leaf) else None, tree)
    other = jax.tree.map(lambda leaf: None if _is_trainable(leaf) else leaf, tree)
    return trainable, other


def combine(trainable: Any, other: Any) -> Any:
    """The tree that was partitioned."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, other, is_leaf=lambda leaf: leaf is None
    )
