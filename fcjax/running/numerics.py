"""The numerical closed forms that plain autodiff would compute wastefully, on plain arrays.

All are ``custom_jvp`` functions: forward mode, Hessians and ``vmap`` keep working, reverse mode
transposes the tangents below, and their order decides what is saved for the backward pass.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.scipy.linalg import solve_triangular

__all__ = ["centred_square_sum", "differentiated_apart", "row_square_sum", "scaled_product"]

HIGHEST = jax.lax.Precision.HIGHEST


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _tangent(parts: Sequence[Array], value: Array) -> Array:
    """The sum of the tangents of a value, in its dtype."""
    if not parts:
        return jnp.zeros_like(value)
    return functools.reduce(jnp.add, parts).astype(value.dtype)


# --- a product whose rows are scaled afterwards -------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def scaled_product(
    rows: Array, scales: tuple[Array, ...], weight: Array, precision: jax.lax.Precision | None
) -> Array:
    r"""``(rows @ weight)`` with every row scaled after the product.

    .. math:: y_{nk} = \Bigl(\prod_i s_{i,n}\Bigr) \sum_e x_{ne} z_{ek}

    Scaling after the product means that the scaled rows are never written out; the tangent scales
    first, so that only ``rows``, ``scales`` and ``weight`` are saved for the backward pass.

    Args:
      rows: shape ``(*batch, e)`` (any leading axes).
      scales: arrays of shape ``(*batch,)``, or anything that broadcasts against it.
      weight: shape ``(e, *k)``.
      precision: of the product; static.

    Returns:
      shape ``(*batch, *k)``.
    """
    return _scaled(_dot(rows, weight, precision), scales)


def _scaled(x: Array, scales: Sequence[Array]) -> Array:
    """Multiplies along the leading axes."""
    wide = [s.reshape(s.shape + (1,) * (x.ndim - s.ndim)) for s in scales]
    return functools.reduce(jnp.multiply, wide, x)


def _dot(a: Array, b: Array, precision: Any) -> Array:
    return jnp.tensordot(a, b, axes=1, precision=precision)


def _scaled_product_jvp(precision, primals, tangents):
    rows, scales, weight = primals
    d_rows, d_scales, d_weight = tangents
    product = scaled_product(rows, scales, weight, precision)
    parts = []
    moved = [] if _is_zero(d_rows) else [_scaled(d_rows, scales)]
    for i, d_scale in enumerate(d_scales):
        if not _is_zero(d_scale):
            moved.append(_scaled(rows, (*scales[:i], d_scale, *scales[i + 1 :])))
    if moved:
        parts.append(_dot(functools.reduce(jnp.add, moved), weight, precision))
    if not _is_zero(d_weight):
        parts.append(_scaled(_dot(rows, d_weight, precision), scales))
    tangent = _tangent(parts, product)
    return product, tangent


scaled_product.defjvp(_scaled_product_jvp, symbolic_zeros=True)


# --- a product whose weights are differentiated term by term ------------------------------------

OfRows = Callable[[Array, Sequence[Array]], Array]


def differentiated_apart(
    merged: OfRows, apart: OfRows, rows: Array, weights: Sequence[Array]
) -> Array:
    r"""``merged(rows, weights)``, its derivative by the weights taken from ``apart``.

    .. math:: y = x (W + A B), \qquad
        dy = dx\, (W + A B) + (x\, dA) B + (x A)\, dB

    Both are the same function; forward and towards the rows one product is cheapest, towards the
    factors of a low-rank branch beside a frozen weight each product by itself is (RunLoRA, Cherniuk
    et al. 2023, https://arxiv.org/abs/2312.03415).

    Args:
      merged: linear in its first argument.
      apart: the same function.
      rows: the first argument of both.
      weights: the second.

    Returns:
      what ``merged`` returns.
    """

    @jax.custom_jvp
    def product(rows: Array, weights: list[Array]) -> Array:
        return merged(rows, weights)

    def product_jvp(primals, tangents):
        (x, ws), (dx, dws) = primals, tangents
        y = product(x, ws)
        parts = [] if _is_zero(dx) else [merged(dx, ws)]
        moving = [i for i, d in enumerate(dws) if not _is_zero(d)]

        def moved(*some: Array) -> Array:
            given = dict(zip(moving, some, strict=True))
            return apart(x, [given.get(i, w) for i, w in enumerate(ws)])

        if moving:
            some, changes = [ws[i] for i in moving], [dws[i] for i in moving]
            parts.append(jax.jvp(moved, some, changes)[1])
        return y, _tangent(parts, y)

    product.defjvp(product_jvp, symbolic_zeros=True)
    return product(rows, list(weights))


# --- the sum of squares of centred products -----------------------------------------------------


@jax.custom_jvp
def centred_square_sum(x: Array, z: Array) -> Array:
    r"""The sum of squares of the centred product, without forming the product.

    .. math:: v_k = \sum_n \Bigl(\sum_e (x_{ne} - \bar x_e) z_{ek}\Bigr)^2

    The variance that a batch normalisation of ``x @ z`` needs. Plain second moments of x would
    cancel where a column of z points along a direction in which x varies little, so the moments
    are taken of x in coordinates that make them nearly the identity: the value is as accurate as
    from the product, at the price of two products of x with itself. The gradient by such a column
    keeps two digits fewer than the product's would.

    Args:
      x: shape ``(n, e)``.
      z: shape ``(e, k)``.

    Returns:
      shape ``(k,)``.
    """
    return _moments(x, z)[0]


def _moments(x: Array, z: Array) -> tuple[Array, Array, Array, Array]:
    """Returns ``v``; ``L^T``, the coordinates; ``M L^T z``, M the moments in them; means of x.

    With ``G = (x - mean)^T (x - mean)`` and ``L L^T = G`` shifted by more than its rounding,
    ``(x - mean) L^-T`` has moments M near the identity, so ``v = |L^T z|^2_M`` cannot cancel.
    """
    mean = jnp.mean(x, axis=0)
    shifted = x - mean
    gram = _matmul(shifted.T, shifted)
    shift = 8 * x.shape[1] * jnp.finfo(x.dtype).eps * jnp.max(jnp.diagonal(gram))
    safe = jnp.where(shift > 0, shift, 1.0)  # a constant x has no moments at all
    upper, inverse = _coordinates(gram + safe * jnp.eye(x.shape[1], dtype=x.dtype))
    near_identity = _matmul(shifted, inverse.T)
    tz = _matmul(upper, z)
    mtz = _matmul(_matmul(near_identity.T, near_identity), tz)
    return jnp.sum(tz * mtz, axis=0), upper, mtz, mean


def _coordinates(gram: Array) -> tuple[Array, Array]:
    """Returns ``L^T`` and ``L^-1`` for ``L L^T = gram``.

    On the CPU by elimination in a compiled loop: the threads of a LAPACK call keep spinning after
    it and made the whole step 30% slower.
    """
    return jax.lax.platform_dependent(gram, cpu=_eliminated, default=_factorised)


def _eliminated(gram: Array) -> tuple[Array, Array]:
    width = gram.shape[0]
    rows = jnp.arange(width)

    def eliminate(j: Array, both: Array) -> Array:
        pivot = jax.lax.rsqrt(both[j, j])
        below = jnp.where(rows > j, both[:, j] * pivot, 0.0)
        row = both[j] * pivot
        return (both - jnp.outer(below, row)).at[j].set(row)

    both = jnp.concatenate([gram, jnp.eye(width, dtype=gram.dtype)], axis=1)
    both = jax.lax.fori_loop(0, width, eliminate, both)
    return jnp.triu(both[:, :width]), both[:, width:]


def _factorised(gram: Array) -> tuple[Array, Array]:
    lower = jnp.linalg.cholesky(gram)
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return lower.T, solve_triangular(lower, eye, lower=True)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=HIGHEST)


def _centred_square_sum_jvp(primals, tangents):
    (x, z), (dx, dz) = primals, tangents
    v, upper, mtz, mean = _moments(x, z)
    parts = []
    if not _is_zero(dz):
        parts.append(2.0 * jnp.sum(mtz * _matmul(upper, dz), axis=0))
    if not _is_zero(dx):
        # x^T dx less the means: saves x, which the network holds anyway, not the shifted copy
        cross = _matmul(x.T, dx) - jnp.outer(mean, jnp.sum(dx, axis=0))
        parts.append(2.0 * jnp.sum(z * _matmul(cross, z), axis=0))
    tangent = _tangent(parts, v)
    return v, tangent


centred_square_sum.defjvp(_centred_square_sum_jvp, symbolic_zeros=True)


# --- the sum of squares of each row of a product ------------------------------------------------


@jax.custom_jvp
def row_square_sum(x: Array, weight: Array) -> Array:
    r"""The squared norm of each row of a product, without forming the product.

    .. math:: v_n = \sum_c \Bigl(\sum_e x_{ne} w_{ec} + b_c\Bigr)^2
                  = \sum_j \Bigl(\sum_e x_{ne} t_{ej} + t_{bj}\Bigr)^2,
              \qquad T T^T = N N^T, \quad N = \binom{w}{b}

    The statistic that a layer or root-mean-square normalisation of ``x @ w + b`` needs, for a
    product that is much wider than ``x``. With a triangular T it is a sum of squares of ``e + 1``
    terms and as accurate as from the product, also where the product is small; ``x N N^T x^T``
    would cancel there. The derivative by x needs only ``N N^T``, that by N only the second moments
    of x, so that T is never differentiated (it has no derivative where N has not full rank) and
    nothing of the size of x is saved but x. Where all rows lie in a direction in which N is small,
    the derivative by N errs by the rounding of those moments, and keeps fewer digits.

    Args:
      x: shape ``(*batch, e)``.
      weight: shape ``(e, c)``, or ``(e + 1, c)`` with the bias b as its last row.

    Returns:
      shape ``(*batch,)``.
    """
    return jnp.sum(jnp.square(_affine(x, _triangle(weight))), axis=-1)


def _affine(x: Array, weight: Array) -> Array:
    """``x @ w``, plus b if ``weight`` has a last row more."""
    width = x.shape[-1]
    product = _matmul(x, weight[:width])
    return product + weight[width] if len(weight) > width else product


def _triangle(weight: Array) -> Array:
    """A T with ``T T^T = weight @ weight.T``, for any rank; a narrow weight is one itself."""
    if weight.shape[1] <= weight.shape[0]:
        return weight
    return jax.lax.platform_dependent(weight, cpu=_orthogonalised, default=_by_qr)


def _orthogonalised(weight: Array) -> Array:
    """By Gram-Schmidt in a compiled loop, whose T is as accurate as Householder's.

    Reference:
      Bjorck 1967, Solving linear least squares problems by Gram-Schmidt orthogonalization.
    """
    rows = jnp.arange(len(weight))

    def orthogonalise(j: Array, both: tuple[Array, Array]) -> tuple[Array, Array]:
        left, triangle = both
        norm = jnp.linalg.norm(left[j])
        unit = left[j] / jnp.where(norm > 0, norm, 1.0)
        column = jnp.where(rows >= j, _matmul(left, unit), 0.0)
        return left - jnp.outer(column, unit), triangle.at[:, j].set(column)

    start = weight, jnp.zeros((len(weight),) * 2, weight.dtype)
    return jax.lax.fori_loop(0, len(weight), orthogonalise, start)[1]


def _by_qr(weight: Array) -> Array:
    return jnp.linalg.qr(weight.T, mode="r").T


def _row_square_sum_jvp(primals, tangents):
    (x, weight), (dx, dw) = primals, tangents
    value = row_square_sum(x, weight)
    width = x.shape[-1]
    parts = []
    if not _is_zero(dx):
        gram = _matmul(weight, weight[:width].T)
        parts.append(jnp.sum(x * _matmul(dx, gram[:width]), axis=-1))
        if len(weight) > width:
            parts.append(_matmul(dx, gram[width]))
    if not _is_zero(dw):
        cross = _matmul(weight, dw.T)
        parts.append(jnp.sum(x * _matmul(x, cross[:width, :width]), axis=-1))
        if len(weight) > width:
            parts.append(_matmul(x, cross[:width, width] + cross[width, :width]))
            parts.append(jnp.broadcast_to(cross[width, width], value.shape))
    tangent = 2.0 * _tangent(parts, value)
    return value, tangent


row_square_sum.defjvp(_row_square_sum_jvp, symbolic_zeros=True)
