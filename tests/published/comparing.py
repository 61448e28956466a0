"""What is compared, and what of a deviation rounding explains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from .models import PyTree, is_float

EXACT = 1e-9
"""By how much of its largest entry an array may be off in double precision."""
ROUNDINGS = 100
"""How many times what rounding all weights differently changes may be off beside that."""
STEPS = 10


def some(tree: PyTree) -> PyTree:
    """Fixed numbers between -1 and 1 in the shapes of arrays."""
    return jax.tree.map(
        lambda x: jnp.cos(1 + 3 * jnp.arange(x.size)).reshape(x.shape).astype(x.dtype), tree
    )


def floats(outputs: PyTree) -> list[Any]:
    return [x for x in jax.tree.leaves(outputs) if is_float(x)]


# --- what is computed ---


def outputs(apply: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The floating outputs."""
    return lambda params, *inputs: floats(apply(params, *inputs))


def gradient(apply: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """A projection of all floating outputs, and its gradient by the parameters."""

    def projection(params: PyTree, *inputs: Any) -> Any:
        return sum(jnp.vdot(some(x), x).real for x in floats(apply(params, *inputs)))

    return jax.value_and_grad(projection)


def trained(apply: Callable[..., PyTree], expand: Callable[[PyTree], PyTree]) -> Any:
    """Losses of some steps of Adam, and the full parameters behind them."""
    optimizer = optax.adam(1e-3)

    def loss(params: PyTree, *inputs: Any) -> Any:
        return sum(jnp.mean(jnp.abs(x - some(x)) ** 2) for x in floats(apply(params, *inputs)))

    def run(params: PyTree, *inputs: Any) -> tuple[Any, PyTree]:
        def step(carry: Any, _: None) -> Any:
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, *inputs)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        start = params, optimizer.init(params)
        (params, _), losses = lax.scan(step, start, length=STEPS)
        return losses, expand(params)

    return run


# --- how far two results are apart ---


def deviation(
    actual: PyTree, expected: PyTree, own: Callable[[], list[float]], exact: float, floor: float
) -> float:
    """The largest deviation of an array, as a fraction of what is allowed.

    Args:
      actual: arrays.
      expected: arrays of the same structure.
      own: the errors that the arrays have anyway; asked for only where it matters.
      exact: what is allowed of an array's largest entry.
      floor: what is allowed of the largest entry of all.
    """
    pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    sizes = [largest(b) for _, b in pairs]
    found = [apart(a, b) for a, b in pairs]
    allowed = [exact * size + floor * max(sizes) for size in sizes]
    if any(d > limit for d, limit in zip(found, allowed, strict=True)):
        allowed = [limit + error for limit, error in zip(allowed, own(), strict=True)]
    return max(
        d / limit if limit else float(d > 0) for d, limit in zip(found, allowed, strict=True)
    )


def errors(actual: PyTree, expected: PyTree, factor: float = 1.0) -> list[float]:
    """The deviations of arrays, times a factor."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return [factor * apart(a, b) for a, b in pairs]


def rounded(params: PyTree) -> PyTree:
    """Parameters whose last digits are different."""
    eps = np.finfo(np.float64).eps
    return jax.tree.map(lambda x: x * (1 + eps * some(x)) if is_float(x) else x, params)


def apart(a: Any, b: Any) -> float:
    """The largest difference of two arrays; infinite where one of them is not finite."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return np.inf
    off = np.abs(np.where(a == b, 0, a - b))
    return float(np.max(np.where(np.isnan(off), np.inf, off), initial=0.0))


def largest(x: Any) -> float:
    return float(np.max(np.abs(x), initial=0.0))
