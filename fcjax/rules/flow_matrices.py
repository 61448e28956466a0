"""Flow folds of matrix chains: their product is trained in the place of the last factor."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fcjax.rules import matrix_flows
from fcjax.rules.flow_folds import Chained, Fixed, Leaves, enumerated, fitted, vanished
from fcjax.rules.products import MatrixChain

__all__ = ["MatrixFold", "resolution"]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixFold(Chained):
    """A matrix chain; its product is trained.

    Attributes:
      chain: the factors.
      offsets: by how much the squared singular values of each exceed those of the smallest.
      rank: the smallest width.
      gauge: the singular bases of the initial factors.
      trained_shape: the shape of the product.
      determinant: the sign of the initial determinant; zero if it may change, or there is none.
      dtype: the dtype of the factors.
      decays: whether rho is trained along; trained is then the product over ``rho^(N-1)``, which
        decays as a single factor does.
    """

    chain: MatrixChain
    offsets: np.ndarray
    rank: int
    gauge: matrix_flows.Gauge
    trained_shape: tuple[int, ...]
    determinant: float
    dtype: Any
    decays: bool = False

    @property
    def leaves(self) -> tuple[int, ...]:  # type: ignore[override]
        """The factors."""
        return self.chain.leaves

    def fixed(self) -> dict[str, Any]:
        """The offsets and the initial singular bases."""
        bases = tuple(jnp.asarray(basis, self.dtype) for basis in self.gauge.bases)
        return {"offsets": jnp.asarray(self.offsets, self.dtype), "bases": bases}

    def running(self, trained: Leaves, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """The product; the factors are not read, and zero stands for them."""
        product, offsets = self._product(trained, lax.stop_gradient(rho), fixed)
        if self.decays:  # what rho^(N-1) divides out of the product, its gradient loses twice
            given = trained[self.survivor]
            slower = lax.stop_gradient(rho) ** (1 - len(self.leaves))
            moved = slower * (given - lax.stop_gradient(given))
            product = lax.stop_gradient(product) + moved
        product = matrix_flows.product(product, offsets, self.rank)
        return {**dict.fromkeys(self.leaves, jnp.zeros((), self.dtype)), self.survivor: product}

    def _product(self, trained: Leaves, rho: Array, fixed: Fixed) -> tuple[Array, Array]:
        """The product of the factors and the offsets, as far as they have decayed."""
        shrunk = rho ** (len(self.leaves) - 1)
        return trained[self.survivor] * shrunk, fixed["offsets"] * rho**2

    def expand(self, trained: Leaves, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """Factors with this product and the same laws, see ``matrix_flows.factors``."""
        product, offsets = self._product(trained, rho, fixed)
        made = matrix_flows.factors(product, offsets, self.rank, matrix_flows.Gauge(fixed["bases"]))
        stored = [a.T if t else a for a, t in zip(made, self.chain.turned, strict=True)]
        return dict(zip(self.leaves, stored, strict=True))

    def reduce(self, full: Leaves, fixed: Fixed) -> tuple[dict[int, Array], Array]:
        """The product of the factors over ``rho^(N-1)``, and rho from the gaps.

        A balanced chain has no gaps; it may decay to any rho, and 1 is chosen.
        """
        given = self.upright(full)
        norms = jnp.stack([jnp.sum(factor**2) for factor in given])
        steps = jnp.diff(norms) / jnp.asarray([len(f) for f in given[1:]], norms.dtype)
        offsets = jnp.concatenate([jnp.zeros(1, norms.dtype), jnp.cumsum(steps)])
        rho = fitted(offsets - offsets[int(np.argmin(self.offsets))], fixed["offsets"])
        rho = rho if self.decays else jnp.ones_like(rho)
        return {self.survivor: functools.reduce(_dot, given) / rho ** (len(given) - 1)}, rho

    def upright(self, full: Leaves) -> list[Array]:
        """The factors with their input axes first."""
        return [
            full[leaf].T if turned else full[leaf]
            for leaf, turned in zip(self.leaves, self.chain.turned, strict=True)
        ]

    def lost(self, full: Leaves, back: Leaves) -> float:
        """How far the laws are from the initial ones; hidden bases carry no function."""
        given, made = ([np.asarray(x) for x in self.upright(tree)] for tree in (full, back))
        (offsets, violation), (kept, _) = matrix_flows.gaps(given), matrix_flows.gaps(made)
        size = max(float(np.linalg.norm(factor, 2) ** 2) for factor in given)
        return max(violation, float(np.max(np.abs(offsets - kept))) / size)

    def broken(self, trained: Leaves, rho: float, fixed: Fixed, names: Sequence[str]) -> str:
        """A singular value that has come to zero, or a determinant that has changed its sign."""
        name, product = names[self.survivor], np.asarray(trained[self.survivor], np.float64)
        if not np.isfinite(product).all():
            return f"{name} is not finite"
        sizes = np.linalg.svd(product, compute_uv=False)
        least = float(sizes[self.rank - 1] / max(sizes[0], np.finfo(float).tiny))
        if self.determinant and np.linalg.slogdet(product)[0] != self.determinant:
            return (
                f"the determinant of the product in {name} has changed its sign: gradient flow "
                "never lets a singular value of a balanced chain pass zero"
            )
        if least < resolution(self.dtype):
            return (
                f"the smallest singular value of the product in {name} is {least:.1g} of the "
                f"largest, below the {resolution(self.dtype):.1g} that {np.dtype(self.dtype).name} "
                "resolves"
            )
        if self.rank < len(sizes) and sizes[self.rank] > sizes[self.rank - 1] / 2:
            return (
                f"the product in {name} has left the matrices of rank {self.rank}: its next "
                f"singular value is {sizes[self.rank] / sizes[self.rank - 1]:.1g} of the last"
            )
        return vanished(rho, names[self.leaves[0]])

    def drift(self, trained: Leaves, gradient: Leaves, rho: Array, fixed: Fixed) -> Array:
        """The sum of the squared norms of the gradients of all factors."""
        product, offsets = self._product(trained, rho, fixed)
        moved = gradient[self.survivor] * rho ** (len(self.leaves) - 1)
        return matrix_flows.gradient_norms(product, moved, offsets, self.rank)

    symbol = "W_eff"

    def shown(self, names: Sequence[str], label: str) -> dict[int, str]:
        """The product in the last place."""
        return {self.survivor: label}

    def formula(self, names: Sequence[str], label: str) -> list[str]:
        """``W_eff = W1 W2 W3``, and what the laws say of its factors."""
        product = " ".join(
            f"{names[leaf]}{'^T' if turned else ''}"
            for leaf, turned in zip(self.leaves, self.chain.turned, strict=True)
        )
        sizes, least = "x".join(map(str, self.trained_shape)), min(self.trained_shape)
        roots = f"s_j = sigma({label})^(1/{len(self.leaves)})"
        if self.offsets.any():
            listed = ", ".join(f"{c:.3g}" for c in self.offsets)
            roots = f"s_j = sqrt(t + c_j), prod_j s_j = sigma({label}), c = {listed}"
        return [
            f"{label} = {product} [{sizes}], trained in the place of {names[self.survivor]}",
            f"    singular values of the factors: {roots}",
            f"    a step pays for one eigendecomposition of {least} x {least}",
        ]

    def law(self, names: Sequence[str]) -> str:
        """The matrix law."""
        return (
            "gradient flow conserves W_(j+1) W_(j+1)^T - W_j^T W_j along "
            f"{enumerated(self.leaves, names)}, so that their product determines how it moves; "
            f"it is trained in the place of {names[self.survivor]}"
        )


def resolution(dtype: Any) -> float:
    """The least share of the largest singular value that a smaller one may have: the root of eps.

    Below, one eigendecomposition of a Gram matrix does not tell singular directions apart. At this
    limit the gradient is wrong by up to 3e-3 of its size in float32, for a chain of 16.
    """
    return float(jnp.finfo(dtype).eps) ** 0.5


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
