"""Balanced initial values of the same function, for chains and gains that are not balanced.

A change keeps the function by itself. It concerns the leaves of one chain, or those that one
symmetry scales, and is made in all of them or in none.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import jax.numpy as jnp
import numpy as np

from fcjax.expressions.written import Written
from fcjax.laws import symmetries
from fcjax.laws.invariance import invariant
from fcjax.laws.units import Place, Symmetry
from fcjax.rules import fold, matrix_flows
from fcjax.rules.flow_gains import beside, gains
from fcjax.rules.flow_rules import BALANCED, flow_chains
from fcjax.rules.products import MatrixChain
from fcjax.rules.reduction import Tree

__all__ = ["balanced"]

Array = Any
Leaves = Sequence[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class _Change:
    """A change of initial values that keeps the function.

    Attributes:
      leaves: the numbers of the parameters that it is made in.
      arrays: from the values of all leaves to the new ones of these.
    """

    leaves: tuple[int, ...]
    arrays: Callable[[Leaves], Sequence[Array]]


def balanced(network: Written, tree: Tree, among: Set[int]) -> Tree:
    """The parameters with chains and gains replaced by balanced ones that compute the same.

    Elementwise chains get equal magnitudes, the geometric mean of those they have; matrix chains
    factors with equal singular values; units whose gain is too small are scaled.

    Args:
      network: the network as written.
      tree: the parameters.
      among: the numbers of the leaves that may change.
    """
    leaves = list(tree.leaves)
    for change in _changes(network, tree):
        if set(change.leaves) <= among:
            old = [np.asarray(leaves[leaf]) for leaf in change.leaves]
            new = [np.asarray(array) for array in change.arrays(leaves)]
            if any(map(_differ, old, new)):
                for leaf, array in zip(change.leaves, new, strict=True):
                    leaves[leaf] = jnp.asarray(array, tree.leaves[leaf].dtype)
    return dataclasses.replace(tree, leaves=tuple(leaves))


def _differ(old: np.ndarray, new: np.ndarray) -> bool:
    """Whether arrays differ by more than the folds allow for."""
    largest, change = (np.max(np.abs(x), initial=0.0) for x in (old, new - old))
    return bool(change > BALANCED * largest)


def _changes(network: Written, tree: Tree) -> Iterator[_Change]:
    chained: set[int] = set()
    for chain, leaves in flow_chains(network, len(tree.paths)):
        chained.update(leaves)
        if all(np.isfinite(np.asarray(tree.leaves[leaf])).all() for leaf in leaves):
            yield _Change(leaves, functools.partial(_chain, chain, leaves))
    kinds = [network.known[value] for value in network.body.inputs]
    found = symmetries.find(network.body, kinds)
    for symmetry in invariant(network.body, found, tree.leaves):
        leaves = tuple(place.leaf for place in symmetry.places)
        for gain in gains(symmetry, tree.leaves)[:1]:
            if symmetry.is_untied and chained.isdisjoint(leaves):
                yield _Change(leaves, functools.partial(_scaled, gain, symmetry))


def _chain(
    chain: fold.Chain | MatrixChain, numbers: Sequence[int], leaves: Leaves
) -> Sequence[Array]:
    arrays = [np.asarray(leaves[leaf]) for leaf in numbers]
    if isinstance(chain, MatrixChain):
        upright = [a.T if t else a for a, t in zip(arrays, chain.turned, strict=True)]
        rank = min(upright[0].shape[0], *(a.shape[1] for a in upright))
        made = matrix_flows.rebalanced(upright, rank)
        return [a.T if t else a for a, t in zip(made, chain.turned, strict=True)]
    stacked = np.stack(arrays).astype(np.float64)
    if not stacked.all():  # equal magnitudes of a zero product would never move again
        return arrays
    size = np.exp(np.mean(np.log(np.abs(stacked)), axis=0))
    return [np.where(a < 0, -size, size) for a in arrays]


# --- gains --------------------------------------------------------------------------------------


def _scaled(gain: Place, symmetry: Symmetry, leaves: Leaves) -> Sequence[Array]:
    """Unit k multiplied by ``c_k^q`` in every parameter, by the symmetry itself.

    The squared gain then equals the weighted squares of the parameters of opposite charge.
    """
    factors = _factors(gain, symmetry, leaves)
    return [
        place.scaled(jnp.asarray(leaves[place.leaf]), factors ** float(place.charge))
        for place in symmetry.places
    ]


def _factors(gain: Place, symmetry: Symmetry, leaves: Leaves) -> Array:
    """By what each unit is scaled; 1 where its gain is large enough, zero or hard to balance."""
    same_side = beside(gain, symmetry)
    against = [p for p in symmetry.places if p is not gain and p not in same_side]
    own, total = (
        sum(
            float(abs(p.charge)) * jnp.sum(p.rows(jnp.asarray(leaves[p.leaf])) ** 2, axis=-1)
            for p in places
        )
        for places in ([gain], against)
    )
    charges = {p.charge for p in against}
    if len(charges) != 1:
        return jnp.ones(symmetry.units)
    power = 1.0 / (2.0 * float(gain.charge - charges.pop()))
    small = (own < total) & (own > 0)
    return jnp.where(small, (total / jnp.where(small, own, 1)) ** power, 1)
