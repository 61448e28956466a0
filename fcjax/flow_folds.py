"""Flow folds of a network: which leaves one survivor determines along gradient flow, and how.

Each fold is a pair of functions between the leaf that is trained and the leaves of the network,
built on the closed forms of ``flows.py``. The arrays that are fixed before training are handed in,
so that they can be saved and sharded as ``fc.contributions``.

Weight decay multiplies all factors by one number rho over time, and so the constants of their laws
by ``rho^2``. Where the optimizer decays weights, rho is trained along, in the place of the first
folded leaf: it starts at 1, its gradient is zero, and the optimizer does to it what it does to a
weight without gradient.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import lax

from fcjax import flows
from fcjax.products import MatrixChain

__all__ = ["RESOLVED", "ElementwiseFold", "FlowFold", "MatrixFold"]

Array = Any
Fixed = Mapping[str, Array]

RESOLVED = 4.0
"""How far the smallest singular value must stand above the root of eps, relative to the largest:
below, one eigendecomposition of a Gram matrix does not tell singular directions apart."""


class FlowFold(Protocol):
    """What every fold offers."""

    @property
    def leaves(self) -> tuple[int, ...]:
        """The numbers of all its leaves, in the order in which the network reads them."""

    @property
    def survivor(self) -> int:
        """The leaf in whose place the survivor is trained."""

    @property
    def trained_shape(self) -> tuple[int, ...]:
        """The shape in which the survivor is trained."""

    @property
    def decays(self) -> bool:
        """Whether rho is trained along, in the place of the first leaf."""

    def fixed(self) -> dict[str, Any]:
        """The arrays that are computed before training."""

    def running(self, trained: Array, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """What the network is given for each leaf."""

    def expand(self, trained: Array, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """All leaves."""

    def reduce(self, full: Sequence[Array], fixed: Fixed) -> tuple[Array, Array]:
        """The survivor and rho, from all leaves of the tree."""

    def lost(self, full: Sequence[Array], back: Sequence[Array]) -> float:
        """How much of full leaves is lost when they are reduced, relative to their size."""

    def broken(self, trained: np.ndarray, rho: float, names: Sequence[str]) -> str:
        """Why the closed form is no longer valid at a survivor; nothing if it is."""

    def drift(self, trained: Array, gradient: Array, rho: Array, fixed: Fixed) -> Array:
        """The size of the change of the laws by one step of SGD, over its squared rate."""

    @property
    def symbol(self) -> str:
        """What the effective weight is called."""

    def shown(self, names: Sequence[str], label: str) -> dict[int, str]:
        """What the network reads in the places of the leaves, for people."""

    def formula(self, names: Sequence[str], label: str) -> list[str]:
        """The closed form, for people."""

    def law(self, names: Sequence[str]) -> str:
        """Why the leaves follow, in one sentence."""


# --- elementwise chains -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class ElementwiseFold:
    """An elementwise chain; the factor of smallest magnitude is trained, element by element.

    Attributes:
      leaves: the factors.
      constants: ``w_l^2 - u^2``, shape ``(L, *shape)``.
      signs: see ``flows.survivor``.
      decays: whether rho is trained along.
    """

    leaves: tuple[int, ...]
    constants: np.ndarray
    signs: np.ndarray
    decays: bool = False

    @property
    def survivor(self) -> int:
        """The last factor's place."""
        return self.leaves[-1]

    @property
    def trained_shape(self) -> tuple[int, ...]:
        """That of every factor."""
        return tuple(self.constants.shape[1:])

    def fixed(self) -> dict[str, Any]:
        """The constants and signs."""
        return {"constants": jnp.asarray(self.constants), "signs": jnp.asarray(self.signs)}

    def running(self, trained: Array, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """Signs for all factors but the last, which carries all magnitudes."""
        constants = fixed["constants"] * lax.stop_gradient(rho) ** 2
        now, product = flows.effective(trained, constants, fixed["signs"])
        return {**dict(zip(self.leaves[:-1], now, strict=True)), self.survivor: product}

    def expand(self, trained: Array, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """All factors."""
        made = flows.factors(trained, fixed["constants"] * rho**2, fixed["signs"])
        return dict(zip(self.leaves, made, strict=True))

    def reduce(self, full: Sequence[Array], fixed: Fixed) -> tuple[Array, Array]:
        """The element of whichever factor survives there, and rho from the differences."""
        constants = fixed["constants"]
        is_survivor = (constants == 0) & (jnp.cumsum(constants == 0, axis=0) == 1)
        stacked = jnp.stack([full[leaf] for leaf in self.leaves])
        u = jnp.sum(jnp.where(is_survivor, stacked * fixed["signs"], 0), axis=0)
        return u, _fitted(stacked**2 - u**2, constants)

    def lost(self, full: Sequence[Array], back: Sequence[Array]) -> float:
        """The largest difference of a factor."""
        pairs = [(np.asarray(full[i]), np.asarray(back[i])) for i in self.leaves]
        sizes = [np.max(np.abs(a), initial=np.finfo(a.dtype).tiny) for a, _ in pairs]
        return max(
            float(np.max(np.abs(a - b), initial=0.0) / s)
            for (a, b), s in zip(pairs, sizes, strict=True)
        )

    def broken(self, trained: np.ndarray, rho: float, names: Sequence[str]) -> str:
        """Only numbers that are not finite break it: no folded factor can change its sign."""
        if not np.isfinite(trained).all():
            return f"{names[self.survivor]} is not finite"
        return _vanished(rho, names[self.leaves[0]])

    def drift(self, trained: Array, gradient: Array, rho: Array, fixed: Fixed) -> Array:
        """The largest squared gradient of an element: those of the other factors are smaller."""
        return jnp.max(gradient**2, initial=0.0)

    symbol = "w_eff"

    def shown(self, names: Sequence[str], label: str) -> dict[int, str]:
        """Signs, and all magnitudes in the last place."""
        signs = {leaf: f"sign({names[leaf]})" for leaf in self.leaves}
        return {**signs, self.survivor: f"|{label}| {signs[self.survivor]}"}

    def formula(self, names: Sequence[str], label: str) -> list[str]:
        """``w_eff = w3 * sqrt(w3^2 + c1) * sqrt(w3^2 + c2)``, with the ranges of the constants."""
        name = names[self.survivor]
        ordered = np.sort(self.constants, axis=0)[1:]
        roots = "".join(f" * sqrt({name}^2 + c{i + 1})" for i in range(len(ordered)))
        where = [np.sum(c == 0) for c in self.constants]
        chosen = ", ".join(f"{names[i]} {n}" for i, n in zip(self.leaves, where, strict=True) if n)
        return [
            f"{label} = {' * '.join(names[leaf] for leaf in self.leaves)} = +-{name}{roots}",
            *(f"    c{i + 1} {_described(constants)}" for i, constants in enumerate(ordered)),
            f"    {name} is trained as the smallest factor of each element: {chosen}",
            *self._decay(names),
        ]

    def _decay(self, names: Sequence[str]) -> list[str]:
        if not self.decays:
            return []
        return [f"    {names[self.leaves[0]]} is trained as rho, by whose square decay shrinks c"]

    def law(self, names: Sequence[str]) -> str:
        """The difference of squares."""
        return (
            f"gradient flow conserves the differences of the squares of "
            f"{_enumerated(self.leaves, names)}, element by element; the smallest of them is "
            f"trained in the place of {names[self.survivor]}"
        )


def _described(constants: np.ndarray) -> str:
    shape = "x".join(map(str, constants.shape)) or "1"
    return f"[{shape}] in {constants.min(initial=np.inf):.3g} .. {constants.max(initial=0):.3g}"


# --- matrix chains ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixFold:
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
    gauge: flows.Gauge
    trained_shape: tuple[int, ...]
    determinant: float
    dtype: Any
    decays: bool = False

    @property
    def leaves(self) -> tuple[int, ...]:
        """The factors."""
        return self.chain.leaves

    @property
    def survivor(self) -> int:
        """The last factor's place, in which the product is trained."""
        return self.chain.leaves[-1]

    def fixed(self) -> dict[str, Any]:
        """The offsets and the initial singular bases."""
        bases = tuple(jnp.asarray(basis, self.dtype) for basis in self.gauge.bases)
        return {"offsets": jnp.asarray(self.offsets, self.dtype), "bases": bases}

    def running(self, trained: Array, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """The product; the factors are not read, and zero stands for them."""
        product, offsets = self._product(trained, lax.stop_gradient(rho), fixed)
        if self.decays:  # what rho^(N-1) divides out of the product, its gradient loses twice
            still = lax.stop_gradient(trained)
            slower = lax.stop_gradient(rho) ** (1 - len(self.leaves))
            product = lax.stop_gradient(product) + slower * (trained - still)
        product = flows.matrix_product(product, offsets, self.rank)
        return {**dict.fromkeys(self.leaves, jnp.zeros((), self.dtype)), self.survivor: product}

    def _product(self, trained: Array, rho: Array, fixed: Fixed) -> tuple[Array, Array]:
        """The product of the factors and the offsets, as far as they have decayed."""
        return trained * rho ** (len(self.leaves) - 1), fixed["offsets"] * rho**2

    def expand(self, trained: Array, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """Factors with this product and the same laws, see ``flows.matrix_factors``."""
        product, offsets = self._product(trained, rho, fixed)
        made = flows.matrix_factors(product, offsets, self.rank, flows.Gauge(fixed["bases"]))
        stored = [a.T if t else a for a, t in zip(made, self.chain.turned, strict=True)]
        return dict(zip(self.leaves, stored, strict=True))

    def reduce(self, full: Sequence[Array], fixed: Fixed) -> tuple[Array, Array]:
        """The product of the factors over ``rho^(N-1)``, and rho from the gaps.

        A balanced chain has no gaps; it may decay to any rho, and 1 is chosen.
        """
        given = self.upright(full)
        norms = jnp.stack([jnp.sum(factor**2) for factor in given])
        steps = jnp.diff(norms) / jnp.asarray([len(f) for f in given[1:]], norms.dtype)
        offsets = jnp.concatenate([jnp.zeros(1, norms.dtype), jnp.cumsum(steps)])
        rho = _fitted(offsets - offsets[int(np.argmin(self.offsets))], fixed["offsets"])
        rho = rho if self.decays else jnp.ones_like(rho)
        return functools.reduce(_dot, given) / rho ** (len(given) - 1), rho

    def upright(self, full: Sequence[Array]) -> list[Array]:
        """The factors with their input axes first."""
        return [
            full[leaf].T if turned else full[leaf]
            for leaf, turned in zip(self.leaves, self.chain.turned, strict=True)
        ]

    def lost(self, full: Sequence[Array], back: Sequence[Array]) -> float:
        """How far the laws are from the initial ones; hidden bases carry no function."""
        given, made = ([np.asarray(x) for x in self.upright(tree)] for tree in (full, back))
        (offsets, violation), (kept, _) = flows.gaps(given), flows.gaps(made)
        size = max(float(np.linalg.norm(factor, 2) ** 2) for factor in given)
        return max(violation, float(np.max(np.abs(offsets - kept))) / size)

    def broken(self, trained: np.ndarray, rho: float, names: Sequence[str]) -> str:
        """A singular value that has come to zero, or a determinant that has changed its sign."""
        name = names[self.survivor]
        if not np.isfinite(trained).all():
            return f"{name} is not finite"
        sizes = np.linalg.svd(np.asarray(trained, np.float64), compute_uv=False)
        least = float(sizes[self.rank - 1] / max(sizes[0], np.finfo(float).tiny))
        if self.determinant and np.linalg.slogdet(trained)[0] != self.determinant:
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
        return _vanished(rho, names[self.leaves[0]])

    def drift(self, trained: Array, gradient: Array, rho: Array, fixed: Fixed) -> Array:
        """The sum of the squared norms of the gradients of all factors."""
        product, offsets = self._product(trained, rho, fixed)
        moved = gradient * rho ** (len(self.leaves) - 1)
        return flows.gradient_norms(product, moved, offsets, self.rank)

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
        sizes = "x".join(map(str, self.trained_shape))
        roots = f"s_j = sigma({label})^(1/{len(self.leaves)})"
        if self.offsets.any():
            listed = ", ".join(f"{c:.3g}" for c in self.offsets)
            roots = f"s_j = sqrt(t + c_j), prod_j s_j = sigma({label}), c = {listed}"
        return [
            f"{label} = {product} [{sizes}], trained in the place of {names[self.survivor]}",
            f"    singular values of the factors: {roots}",
        ]

    def law(self, names: Sequence[str]) -> str:
        """The matrix law."""
        return (
            "gradient flow conserves W_(j+1) W_(j+1)^T - W_j^T W_j along "
            f"{_enumerated(self.leaves, names)}, so that their product determines how it moves; "
            f"it is trained in the place of {names[self.survivor]}"
        )


def _enumerated(leaves: Sequence[int], names: Sequence[str]) -> str:
    listed = [names[leaf] for leaf in leaves]
    if len(listed) > MOST_NAMES:
        listed = [*listed[:2], f"{len(listed) - 3} more", listed[-1]]
    return ", ".join(listed)


MOST_NAMES = 5


def _fitted(differences: Array, constants: Array) -> Array:
    """The rho by whose square constants have shrunk to differences; 1 if all are zero."""
    size = jnp.sum(constants**2)
    square = jnp.sum(differences * constants) / jnp.where(size > 0, size, 1)
    return jnp.where(size > 0, jnp.sqrt(jnp.maximum(square, 0)), 1).astype(constants.dtype)


def _vanished(rho: float, name: str) -> str:
    """Whether decay has left so little of the constants that rounding takes over."""
    if rho > LEAST_RHO:
        return ""
    return f"weight decay has shrunk rho in {name} to {rho:.1g}, which leaves nothing of the laws"


LEAST_RHO = 1e-4


def resolution(dtype: Any) -> float:
    """The least share of the largest singular value that a smaller one may have."""
    return RESOLVED * float(jnp.finfo(dtype).eps) ** 0.5


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
