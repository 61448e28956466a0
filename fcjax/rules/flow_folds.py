"""Flow folds of a network: which leaves others determine along gradient flow, and how.

Each fold is a pair of functions between what is trained and the leaves of the network, built on the
closed forms of ``flows.py`` and ``matrix_flows.py``. The arrays that are fixed before training are
handed in, so that they can be saved and sharded as ``fc.contributions``.

Weight decay multiplies all factors by one number rho over time, and so the constants of their laws
by ``rho^2``. Where the optimizer decays weights, rho is trained along, in the place of the first
folded leaf: it starts at 1, its gradient is zero, and the optimizer does to it what it does to a
weight without gradient.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import lax

from fcjax.rules import flows

__all__ = [
    "Chained",
    "ElementwiseFold",
    "Fixed",
    "FlowFold",
    "Leaves",
    "described",
    "enumerated",
    "fitted",
    "largest_difference",
    "vanished",
]

Array = Any
Leaves = Sequence[Array]
Fixed = Mapping[str, Array]


class FlowFold(Protocol):
    """What every fold offers. Sequences of arrays are of all leaves of the tree, by number.

    Attributes:
      rule: the rule, as the report calls it.
      exactness: when the result is backpropagation's, likewise.
    """

    rule: str
    exactness: str

    @property
    def leaves(self) -> tuple[int, ...]:
        """The leaves that are folded or change their meaning; the last one names the fold."""

    @property
    def folded(self) -> tuple[int, ...]:
        """Those of them that are folded away."""

    @property
    def sources(self) -> tuple[int, ...]:
        """Further leaves, trained as they are, that determine the folded ones."""

    @property
    def trained_shape(self) -> tuple[int, ...]:
        """The shape in which a leaf that changes its meaning is trained."""

    @property
    def decays(self) -> bool:
        """Whether rho is trained along, in the place of the first folded leaf."""

    def fixed(self) -> dict[str, Any]:
        """The arrays that are computed before training."""

    def running(self, trained: Leaves, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """What the network is given for the leaves."""

    def expand(self, trained: Leaves, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """The original leaves."""

    def reduce(self, full: Leaves, fixed: Fixed) -> tuple[dict[int, Array], Array]:
        """The trained leaves and rho."""

    def lost(self, full: Leaves, back: Leaves) -> float:
        """How much of full leaves is lost when they are reduced, relative to their size."""

    def broken(self, trained: Leaves, rho: float, fixed: Fixed, names: Sequence[str]) -> str:
        """Why the closed form is no longer valid; nothing if it is."""

    def drift(self, trained: Leaves, gradient: Leaves, rho: Array, fixed: Fixed) -> Array:
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


class Chained:
    """A fold of factors, of which one survives in the place of the last one."""

    leaves: tuple[int, ...]
    sources: tuple[int, ...] = ()
    rule = "fold"
    exactness = "flow"

    @property
    def survivor(self) -> int:
        """The leaf in whose place the survivor is trained."""
        return self.leaves[-1]

    @property
    def folded(self) -> tuple[int, ...]:
        """The other factors."""
        return self.leaves[:-1]


# --- elementwise chains -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class ElementwiseFold(Chained):
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
    def trained_shape(self) -> tuple[int, ...]:
        """That of every factor."""
        return tuple(self.constants.shape[1:])

    def fixed(self) -> dict[str, Any]:
        """The constants and signs."""
        return {"constants": jnp.asarray(self.constants), "signs": jnp.asarray(self.signs)}

    def running(self, trained: Leaves, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """Signs for all factors but the last, which carries all magnitudes."""
        constants = fixed["constants"] * lax.stop_gradient(rho) ** 2
        now, product = flows.effective(trained[self.survivor], constants, fixed["signs"])
        return {**dict(zip(self.leaves[:-1], now, strict=True)), self.survivor: product}

    def expand(self, trained: Leaves, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """All factors."""
        made = flows.factors(trained[self.survivor], fixed["constants"] * rho**2, fixed["signs"])
        return dict(zip(self.leaves, made, strict=True))

    def reduce(self, full: Leaves, fixed: Fixed) -> tuple[dict[int, Array], Array]:
        """The element of whichever factor survives there, and rho from the differences."""
        constants = fixed["constants"]
        is_survivor = (constants == 0) & (jnp.cumsum(constants == 0, axis=0) == 1)
        stacked = jnp.stack([full[leaf] for leaf in self.leaves])
        u = jnp.sum(jnp.where(is_survivor, stacked * fixed["signs"], 0), axis=0)
        return {self.survivor: u}, fitted(stacked**2 - u**2, constants)

    def lost(self, full: Leaves, back: Leaves) -> float:
        """The largest difference of a factor."""
        return largest_difference(self.leaves, full, back)

    def broken(self, trained: Leaves, rho: float, fixed: Fixed, names: Sequence[str]) -> str:
        """Only numbers that are not finite break it: no folded factor can change its sign."""
        if not np.isfinite(trained[self.survivor]).all():
            return f"{names[self.survivor]} is not finite"
        return vanished(rho, names[self.leaves[0]])

    def drift(self, trained: Leaves, gradient: Leaves, rho: Array, fixed: Fixed) -> Array:
        """The largest squared gradient of an element: those of the other factors are smaller."""
        return jnp.max(gradient[self.survivor] ** 2, initial=0.0)

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
            *(f"    c{i + 1} {described(constants)}" for i, constants in enumerate(ordered)),
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
            f"{enumerated(self.leaves, names)}, element by element; the smallest of them is "
            f"trained in the place of {names[self.survivor]}"
        )


def described(constants: np.ndarray) -> str:
    """The shape and the range of an array."""
    shape = "x".join(map(str, constants.shape)) or "1"
    return f"[{shape}] in {constants.min(initial=np.inf):.3g} .. {constants.max(initial=0):.3g}"


# --- for all folds ---


def enumerated(leaves: Sequence[int], names: Sequence[str]) -> str:
    """The names of some leaves, those in the middle left out if they are many."""
    listed = [names[leaf] for leaf in leaves]
    if len(listed) > MOST_NAMES:
        listed = [*listed[:2], f"{len(listed) - 3} more", listed[-1]]
    return ", ".join(listed)


MOST_NAMES = 5


def largest_difference(leaves: Sequence[int], full: Leaves, back: Leaves) -> float:
    """The largest difference of an entry of some leaves, relative to the largest of its leaf."""
    pairs = [(np.asarray(full[i]), np.asarray(back[i])) for i in leaves]
    sizes = [np.max(np.abs(a), initial=np.finfo(a.dtype).tiny) for a, _ in pairs]
    return max(
        float(np.max(np.abs(a - b), initial=0.0) / s)
        for (a, b), s in zip(pairs, sizes, strict=True)
    )


def fitted(differences: Array, constants: Array) -> Array:
    """The rho by whose square constants have shrunk to differences; 1 if all are zero."""
    size = jnp.sum(constants**2)
    square = jnp.sum(differences * constants) / jnp.where(size > 0, size, 1)
    return jnp.where(size > 0, jnp.sqrt(jnp.maximum(square, 0)), 1).astype(constants.dtype)


def vanished(rho: float, name: str) -> str:
    """Whether decay has left so little of the constants that rounding takes over."""
    if rho > LEAST_RHO:
        return ""
    return f"weight decay has shrunk rho in {name} to {rho:.1g}, which leaves nothing of the laws"


LEAST_RHO = 1e-4
