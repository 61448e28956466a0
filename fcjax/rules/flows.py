"""Closed forms of elementwise chains under gradient flow, on plain arrays.

Of the factors of ``w_1 * w_2 * ... * w_L`` gradient flow conserves every ``w_l^2 - w_m^2``,
whatever the loss. With u the factor of smallest magnitude, element by element,
``w_l^2 = u^2 + c_l`` with ``c_l >= 0``, so that no folded factor ever changes its sign. The
survivor moves by its *partial* derivative, with the folded factors held fixed. The derivative of
the closed form itself would follow another trajectory, and nothing here lets it through.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["effective", "factors", "survivor"]

Array = Any

TIE = 4
"""Magnitudes that differ by at most this many eps of their dtype count as equal."""


def survivor(chain: Sequence[Array]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The factor of smallest magnitude, element by element, and what determines the others by it.

    Args:
      chain: the factors, arrays of one shape and dtype.

    Returns:
      The survivor u, of that shape; the constants ``c_l = w_l^2 - u^2``, zero where the magnitudes
      are equal up to rounding, of shape ``(L, *shape)``; and signs of the same shape. Where
      ``c_l > 0`` they are the signs of the factors, which never change; where ``c_l = 0`` they say
      whether the factor is u or -u, which stays true at every step, not only under the flow.

    Example:
      >>> u, constants, signs = survivor([np.array([1.0, 3.0]), np.array([-2.0, 0.5])])
      >>> u.tolist(), constants.tolist(), signs.tolist()
      ([1.0, 0.5], [[0.0, 8.75], [3.0, 0.0]], [[1.0, 1.0], [-1.0, 1.0]])
    """
    stacked = np.stack([np.asarray(factor) for factor in chain])
    sizes = np.abs(stacked)
    smallest = np.argmin(sizes, axis=0)[None]
    u = np.take_along_axis(stacked, smallest, axis=0)
    least = np.abs(u)
    rounding = TIE * float(jnp.finfo(stacked.dtype).eps)
    equal = sizes - least <= rounding * sizes
    constants = np.where(equal, 0.0, (sizes - least) * (sizes + least))
    own = np.where(stacked < 0, -1.0, 1.0)
    signs = np.where(equal, own * np.where(u < 0, -1.0, 1.0), own)
    dtype = stacked.dtype
    return u[0], constants.astype(dtype), signs.astype(dtype)


def factors(u: Array, constants: Array, signs: Array) -> Array:
    """All factors ``w_l = sign_l sqrt(u^2 + c_l)`` of an elementwise chain, shape ``(L, *shape)``.

    Example:
      >>> import jax
      >>> u, constants, signs = survivor([np.array([3.0]), np.array([-5.0])])
      >>> factors(jnp.asarray(u), constants, signs).ravel().tolist()
      [3.0, -5.0]
    """
    return _signs_now(u, constants, signs) * _magnitudes(u, constants)


def effective(u: Array, constants: Array, signs: Array) -> tuple[Array, Array]:
    """The chain with the magnitudes of all its factors moved into the last one.

    ``w_1 * ... * w_L`` equals ``s_1 * ... * s_{L-1} * p`` with signs and ``p = s_L prod |w_l|``,
    and so it does with positively homogeneous activations in between. The derivative of p by u is
    the partial one, with the folded factors held fixed.

    Returns:
      The signs of all factors but the last, which carry no gradient, and p.

    Example:
      >>> import jax
      >>> u, constants, signs = survivor([np.array([3.0]), np.array([-5.0])])
      >>> kept, p = effective(jnp.asarray(u), constants, signs)
      >>> kept.tolist(), p.tolist()
      ([[1.0]], [-15.0])
      >>> float(jax.grad(lambda u: effective(u, constants, signs)[1].sum())(jnp.asarray(u))[0])
      -5.0
    """
    fixed = lax.stop_gradient(u)
    now = _signs_now(fixed, constants, signs)
    follows = constants == 0
    is_survivor = follows & (jnp.cumsum(follows, axis=0) == 1)
    others = jnp.prod(jnp.where(is_survivor, 1.0, _magnitudes(fixed, constants)), axis=0)
    slope = now[-1] * _sign(fixed) * others
    return now[:-1], slope.astype(u.dtype) * u


def _sign(u: Array) -> Array:
    return jnp.where(u < 0, -1.0, 1.0).astype(u.dtype)


def _signs_now(u: Array, constants: Array, signs: Array) -> Array:
    return jnp.where(constants == 0, signs * _sign(u), signs)


def _magnitudes(u: Array, constants: Array) -> Array:
    return jnp.where(constants == 0, jnp.abs(u), jnp.sqrt(u * u + constants))
