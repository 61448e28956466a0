"""What written programs may call beside JAX; printed along with those that do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def orthogonal(w):
    """Orthonormal rows or columns."""
    u, _, v = np.linalg.svd(w, full_matrices=False)
    return u @ v


def rotated(x, frequencies):
    """Rotary position embedding of x, shape (..., positions, 2 * frequencies)."""
    angles = jnp.arange(x.shape[-2])[:, None] * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def apart(count):
    """The distances of positions."""
    return jnp.abs(jnp.subtract.outer(jnp.arange(count), jnp.arange(count)))


@jax.custom_jvp
def straight_through(x):
    """Rounds to quarters; its derivative is that of the identity."""
    return jnp.round(4 * x) / 4


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return straight_through(*primals), tangents[0]


@jax.custom_vjp
def reversed_gradient(x):
    """The identity, with twice the negated gradient."""
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-2 * g,))


@jax.custom_vjp
def clipped_gradient(x, w):
    """x @ w; the gradient by w is clipped."""
    return x @ w


def _clipped_backward(saved, g):
    x, w = saved
    by_w = jnp.tensordot(x, g, (range(x.ndim - 1),) * 2)
    return g @ w.T, jnp.clip(by_w, -0.5, 0.5)


clipped_gradient.defvjp(lambda x, w: (x @ w, (x, w)), _clipped_backward)


@jax.custom_jvp
def doubled_tangent(x):
    """x times 0.5, with the derivative one."""
    return 0.5 * x


doubled_tangent.defjvps(lambda t, _, x: t)


def quantised(x, dtype=jnp.bfloat16):
    """x as a narrower type keeps it."""
    return x.astype(dtype).astype(x.dtype)


def linear_recurrence(a, b, axis):
    """y[t] = a[t] y[t - 1] + b[t], by ``associative_scan``."""
    combine = lambda l, r: (l[0] * r[0], r[0] * l[1] + r[1])  # noqa: E731
    return lax.associative_scan(combine, (a, b), axis=axis)[1]
