"""Closed forms of matrix chains under gradient flow, on plain arrays.

Along ``W_1 W_2 ... W_N`` gradient flow conserves ``W_{j+1} W_{j+1}^T - W_j^T W_j``, whatever the
loss. If these gaps are multiples of the identity, ``Z = W_1 ... W_N`` determines the singular
values of every factor, ``s_j^2 = t + c_j`` with ``prod_j (t + c_j) = sigma^2``, and moves by

    ``dZ/dt = - sum_j (prod_{k<j} S_k^2)_U  G  (prod_{k>j} S_k^2)_V``

in the singular bases of Z, where G is the gradient by Z. For c = 0 this is the preconditioner of
Arora, Cohen and Hazan 2018, ``sum_j (Z Z^T)^{(j-1)/N} G (Z^T Z)^{(N-j)/N}``.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["Gauge", "factors", "gaps", "gauge", "gradient_norms", "product", "rebalanced"]

Array = Any

NEWTON_STEPS = 30
"""Newton's method for the smallest singular value runs from above on a convex function."""


# --- laws -----------------------------------------------------------------------------------------


def gaps(chain: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """The laws of a matrix chain, as far as they are multiples of the identity.

    Args:
      chain: matrices ``W_j`` of shape ``(h_{j-1}, h_j)``.

    Returns:
      The offsets ``c_j >= 0``, shape ``(N,)``, by which the squared singular values of the factors
      exceed those of the smallest, and the violation: the largest Frobenius norm of
      ``W_{j+1} W_{j+1}^T - W_j^T W_j`` less its multiple of the identity, relative to that of
      the larger of its two parts.

    Example:
      >>> offsets, violation = gaps([np.eye(2), 2 * np.eye(2)])
      >>> offsets.tolist(), violation
      ([0.0, 3.0], 0.0)
    """
    chain = [np.asarray(factor, np.float64) for factor in chain]
    steps, violations = [], []
    for before, after in itertools.pairwise(chain):
        low, high = before.T @ before, after @ after.T
        gap = high - low
        step = np.trace(gap) / len(gap)
        size = max(np.linalg.norm(low), np.linalg.norm(high), np.finfo(float).tiny)
        steps.append(step)
        violations.append(float(np.linalg.norm(gap - step * np.eye(len(gap))) / size))
    offsets = np.concatenate([[0.0], np.cumsum(steps)])
    return offsets - offsets.min(), max(violations)


def rebalanced(chain: Sequence[np.ndarray], rank: int) -> list[np.ndarray]:
    """Balanced factors of the same shapes with the same product, from its singular values.

    ``W_1 = U S Q_1^T, ..., W_N = Q_{N-1} S V^T`` with ``S = Sigma^{1/N}`` and hidden bases that are
    as close to the given factors as orthonormal ones can be.

    Example:
      >>> chain = rebalanced([np.eye(2), 4 * np.eye(2)], 2)
      >>> np.round(chain[0], 6).tolist(), np.round(chain[1], 6).tolist()
      ([[2.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 2.0]])
    """
    chain = [np.asarray(factor, np.float64) for factor in chain]
    U, sizes, Vt = np.linalg.svd(functools.reduce(np.matmul, chain), full_matrices=False)
    S = np.diag(sizes[:rank] ** (1 / len(chain)))
    bases = [U[:, :rank]]
    for factor in chain[:-1]:
        left, _, right = np.linalg.svd(factor.T @ bases[-1], full_matrices=False)
        bases.append(left @ right)
    bases.append(Vt[:rank].T)
    return [a @ S @ b.T for a, b in itertools.pairwise(bases)]


# --- the product ----------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def product(Z: Array, offsets: Array, rank: int) -> Array:
    """The product of a matrix chain, whose gradient is that of training its factors.

    The value is Z, cut to its ``rank`` largest singular values if a hidden width is smaller than
    both its axes. The derivative is multiplied by the preconditioner of the module's docstring,
    which is symmetric: ``jax.grad`` of a loss of this value, taken as a gradient, moves Z as
    gradient descent on the factors does. Forward mode, ``vmap`` and ``jit`` work. The derivative of
    the preconditioner is taken to be zero, since it is the gradient of nothing.

    Args:
      Z: the trained product, shape ``(in, out)``.
      offsets: ``c_j``, shape ``(N,)``, see ``gaps``; all zero for a balanced chain.
      rank: the smallest width, ``in`` and ``out`` included.

    Example:
      >>> Z, G = jnp.diag(jnp.array([1.0, 4.0])), jnp.eye(2)
      >>> loss = lambda Z: jnp.vdot(G, product(Z, jnp.zeros(2), 2))
      >>> jnp.round(jax.grad(loss)(Z), 4).tolist()
      [[2.0, 0.0], [0.0, 8.0]]
    """
    if rank == min(Z.shape):
        return Z
    modes = _modes(Z, rank)
    return _dot(_dot(modes.U, modes.U.T), Z) if Z.shape[0] <= Z.shape[1] else (
        _dot(Z, _dot(modes.U, modes.U.T))
    )  # fmt: skip


@product.defjvp
def _product_jvp(
    rank: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    Z, offsets = primals
    modes = _modes(lax.stop_gradient(Z), rank)
    weights = _weights(modes.sizes, _ordered(offsets, Z))
    if Z.shape[0] > Z.shape[1]:
        tangent = _preconditioned(tangents[0].T, modes, weights).T
    else:
        tangent = _preconditioned(tangents[0], modes, weights)
    return product(Z, offsets, rank), tangent


@dataclasses.dataclass(frozen=True)
class _Modes:
    """Singular values and bases of a matrix with at least as many columns as rows.

    Attributes:
      U: left singular vectors as columns.
      sizes: the singular values.
      V: right singular vectors as columns, zero where the singular value is.
    """

    U: Array
    sizes: Array
    V: Array


def _modes(Z: Array, rank: int) -> _Modes:
    """From one eigendecomposition of the smaller Gram matrix of Z.

    The singular values are the lengths of ``Z^T u``, which are accurate to the rounding of the
    largest, where the roots of the eigenvalues only are to the root of it.
    """
    Z = Z if Z.shape[0] <= Z.shape[1] else Z.T
    _, U = jnp.linalg.eigh(_dot(Z, Z.T), symmetrize_input=False)
    U = U[:, U.shape[1] - rank :]
    images = _dot(Z.T, U)
    sizes = jnp.linalg.norm(images, axis=0)
    return _Modes(U, sizes, jnp.where(sizes > 0, images / jnp.where(sizes > 0, sizes, 1), 0))


def _ordered(offsets: Array, Z: Array) -> Array:
    return offsets if Z.shape[0] <= Z.shape[1] else offsets[::-1]


@dataclasses.dataclass(frozen=True)
class _Weights:
    """By what the preconditioner multiplies each pair of singular directions.

    Attributes:
      before: the squared singular values of ``W_1 ... W_{j-1}``, shape ``(N, rank)``.
      after: those of ``W_{j+1} ... W_N``.
    """

    before: Array
    after: Array

    @property
    def inner(self) -> Array:
        """The sum over the factors but the first and the last, shape ``(rank, rank)``."""
        return jnp.einsum("ja,jb->ab", self.before[1:-1], self.after[1:-1])


def _weights(sizes: Array, offsets: Array) -> _Weights:
    squares = _squares(sizes, offsets)
    ones = jnp.ones_like(squares[:1])
    before = jnp.concatenate([ones, jnp.cumprod(squares[:-1], axis=0)])
    after = jnp.concatenate([jnp.cumprod(squares[:0:-1], axis=0)[::-1], ones])
    return _Weights(before, after)


def _squares(sizes: Array, offsets: Array) -> Array:
    """The squared singular values ``t + c_j`` of all factors, with product ``sizes^2``.

    ``sum_j log(exp(tau) + c_j)`` is convex and increasing in ``tau = log t``, so Newton's method
    from the upper bound ``t = sizes^{2/N}`` descends to the root. For c = 0 that is the root.
    """
    count = offsets.shape[0]
    tiny = float(jnp.finfo(sizes.dtype).tiny)
    target = 2 * jnp.log(jnp.maximum(sizes, tiny**0.25))
    column = offsets.astype(sizes.dtype)[:, None]

    def step(_: int, tau: Array) -> Array:
        t = jnp.exp(tau)
        value = jnp.sum(jnp.log(t + column), axis=0) - target
        return tau - value / jnp.sum(t / (t + column), axis=0)

    def solved(tau: Array) -> Array:
        return lax.fori_loop(0, NEWTON_STEPS, step, tau)

    tau = lax.cond(jnp.any(offsets > 0), solved, lambda tau: tau, target / count)
    return jnp.exp(tau) + column


def _preconditioned(G: Array, modes: _Modes, weights: _Weights) -> Array:
    """``sum_j (prod_{k<j} S_k^2)_U G (prod_{k>j} S_k^2)_V``, the identity at both ends.

    In a matrix with all left directions the first factor's term stays in the singular bases.
    """
    U, V = modes.U, modes.V
    rows = _dot(U.T, G)
    inner, first, last = weights.inner, weights.after[0], weights.before[-1]
    whole = U.shape[0] == U.shape[1]
    if whole:
        inner = inner + first[None, :]
    made = _dot(U, _dot(inner * _dot(rows, V), V.T) + last[:, None] * rows)
    return made if whole else made + _dot(_dot(G, V) * first, V.T)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def gradient_norms(Z: Array, moved: Array, offsets: Array, rank: int) -> Array:
    """The sum of the squared gradients of all factors, from the gradient that Z is given.

    With ``moved = P(G)``, that sum is ``<G, P(G)>``.

    Example:
      >>> Z, G = jnp.diag(jnp.array([1.0, 4.0])), jnp.eye(2)
      >>> moved = jax.grad(lambda Z: jnp.vdot(G, product(Z, jnp.zeros(2), 2)))(Z)
      >>> float(jnp.round(gradient_norms(Z, moved, jnp.zeros(2), 2), 4))
      10.0
    """
    modes = _modes(Z, rank)
    weights = _weights(modes.sizes, _ordered(offsets, Z))
    moved = moved if Z.shape[0] <= Z.shape[1] else moved.T
    rows, columns = _dot(modes.U.T, moved), _dot(moved, modes.V)
    core = _dot(rows, modes.V)
    first, last = weights.after[0], weights.before[-1]
    both = weights.inner + first[None, :] + last[:, None]
    right = jnp.maximum(jnp.sum(rows**2, 1) - jnp.sum(core**2, 1), 0) / last
    left = jnp.maximum(jnp.sum(columns**2, 0) - jnp.sum(core**2, 0), 0) / first
    return jnp.sum(core**2 / both) + jnp.sum(right) + jnp.sum(left)


# --- back to the factors --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gauge:
    """The singular bases of all factors of a chain at one time, each with orthonormal columns.

    Attributes:
      bases: for every width, ends included, an array of shape ``(h_j, rank)``.
    """

    bases: tuple[Array, ...]


def gauge(chain: Sequence[np.ndarray], rank: int) -> Gauge:
    """The singular bases of a chain whose gaps are multiples of the identity, of full ``rank``.

    Example:
      >>> [basis.shape for basis in gauge([np.eye(3)[:, :2], np.eye(2)], 2).bases]
      [(3, 2), (2, 2), (2, 2)]
    """
    chain = [np.asarray(factor, np.float64) for factor in chain]
    U, _, Vt = np.linalg.svd(functools.reduce(np.matmul, chain), full_matrices=False)
    bases = [U[:, :rank]]
    for factor in chain[:-1]:
        image = factor.T @ bases[-1]
        bases.append(image / np.linalg.norm(image, axis=0))
    return Gauge((*bases, Vt[:rank].T))


def factors(Z: Array, offsets: Array, rank: int, initial: Gauge) -> list[Array]:
    """Factors with the product Z and the same gaps, in hidden bases taken from the initial ones.

    The product and the laws determine every factor up to orthogonal changes of the hidden bases,
    which no function of the network sees. Gradient flow does turn these bases; by how much depends
    on the whole path and is not tracked. Returned are ``W_j = Q_{j-1} S_j Q_j^T`` with the initial
    hidden bases, turned together by the rotation that brings the initial end bases closest to
    those of Z (orthogonal Procrustes): at the initial Z, the initial factors.

    Example:
      >>> chain = [2 * np.eye(2), 2 * np.eye(2)]
      >>> made = factors(4 * jnp.eye(2), jnp.zeros(2), 2, gauge(chain, 2))
      >>> jnp.round(made[0], 4).tolist()
      [[2.0, 0.0], [0.0, 2.0]]
    """
    U, sizes, Vt = jnp.linalg.svd(Z, full_matrices=False)
    U, V = U[:, :rank], Vt[:rank].T
    roots = jnp.sqrt(_squares(sizes[:rank], offsets))
    start, *hidden, end = (jnp.asarray(basis, Z.dtype) for basis in initial.bases)
    left, _, right = jnp.linalg.svd(_dot(start.T, U) + _dot(end.T, V))
    turn = _dot(left, right)
    bases = [U, *(_dot(basis, turn) for basis in hidden), V]
    return [_dot(a * root, b.T) for a, b, root in zip(bases, bases[1:], roots, strict=False)]
