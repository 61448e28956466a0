"""Which flow folds a network allows: structure, initial values and the optimizer's experiment."""

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np

from fcjax.expressions.written import Written
from fcjax.rules import flows, fold, matrix_flows
from fcjax.rules.flow_folds import ElementwiseFold, FlowFold
from fcjax.rules.flow_gains import GainFold, gain_folds
from fcjax.rules.flow_matrices import MatrixFold, resolution
from fcjax.rules.linearity import Flow, follows_flow
from fcjax.rules.products import MatrixChain, matrix_chains
from fcjax.rules.radial import RadialFold, radial_fold
from fcjax.rules.reduction import Tree

Fold = ElementwiseFold | MatrixFold | GainFold

__all__ = ["BALANCED", "Proposals", "flow_chains", "flow_folds", "unasked"]

BALANCED = 1e-5
"""How far the laws of a matrix chain may be from multiples of the identity, relative to the larger
of their two parts. The fold deviates from backpropagation by about as much."""

UNASKED = (
    "could be folded under gradient flow; pass optimizer=, such as optax.sgd(1e-2), since only "
    "SGD and its kind keep the laws"
)


RADIAL_UNASKED = (
    "could follow the final layer by an approximation, the radial closure; pass optimizer= too, to "
    "say that weights may be removed"
)


@dataclasses.dataclass(frozen=True)
class Proposals:
    """The folds that are taken, and why others are not.

    Attributes:
      folds: the folds.
      reasons: for leaves of chains that are not folded, why.
    """

    folds: tuple[FlowFold, ...]
    reasons: Mapping[int, str]


def unasked(network: Written, tree: Tree, exactness: str) -> dict[int, str]:
    """The leaves that could be folded if the optimizer were known, with that reason."""
    chains = [chain for _, chain in flow_chains(network, len(tree.paths))]
    reasons = dict.fromkeys((leaf for leaves in chains for leaf in leaves), UNASKED)
    if exactness == "approximate":
        found = radial_fold(network, tree.leaves, tree.paths)
        if isinstance(found, RadialFold):
            reasons |= dict.fromkeys(found.folded, RADIAL_UNASKED)
    return reasons


def flow_chains(
    network: Written, count: int
) -> list[tuple[fold.Chain | MatrixChain, tuple[int, ...]]]:
    """All chains with their leaves in order."""
    elementwise, _ = fold.chains(network, count)
    return [
        *((chain, (*chain.followers, chain.survivor)) for chain in elementwise),
        *((chain, chain.leaves) for chain in matrix_chains(network, count)),
    ]


def flow_folds(network: Written, tree: Tree, optimizer: Any, taken: Set[int]) -> Proposals:
    """The folds that hold under gradient flow.

    Args:
      network: the network as written.
      tree: the parameters.
      optimizer: the optax transformation that will train.
      taken: leaves that are folded in another way.
    """
    proposed: list[Fold] = []
    reasons: dict[int, str] = {}
    for chain, leaves in flow_chains(network, len(tree.paths)):
        if taken.isdisjoint(leaves):
            made = _proposal(chain, leaves, tree)
            if isinstance(made, str):
                reasons |= dict.fromkeys(leaves, made)
            else:
                proposed.append(made)
    chained = taken | {leaf for made in proposed for leaf in made.leaves}
    for leaf, found in gain_folds(network, tree.leaves, tree.paths, chained):
        if isinstance(found, str):
            reasons.setdefault(leaf, found)
        else:
            proposed.append(found)
    verdicts = _verdicts(proposed, tree, optimizer)
    for made, verdict in zip(proposed, verdicts, strict=True):
        if verdict.fault is not None:
            reason = f"could be folded under gradient flow, but with this optimizer {verdict.fault}"
            reasons |= dict.fromkeys(made.leaves, reason)
    folds = tuple(
        dataclasses.replace(made, decays=verdict.decays)
        for made, verdict in zip(proposed, verdicts, strict=True)
        if verdict.fault is None
    )
    reasons |= {leaf: made.law(tree.paths) for made in folds for leaf in made.leaves}
    return Proposals(folds, reasons)


def _verdicts(proposed: Sequence[Fold], tree: Tree, optimizer: Any) -> list[Flow]:
    if not proposed:
        return []
    numbers = [i for i, trained in enumerate(tree.trained) if trained]
    kept = [x if t else None for x, t in zip(tree.leaves, tree.trained, strict=True)]
    structure = jax.tree.structure(jax.tree.unflatten(tree.structure, kept))
    shapes = [tuple(np.shape(tree.leaves[i])) for i in numbers]
    groups = [_group(made, numbers) for made in proposed]
    return follows_flow(optimizer, structure, shapes, groups)


def _group(made: Fold, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
    """The leaves that must move alike, folded and kept, among those that are trained."""
    kept = [leaf for leaf in (*made.leaves, *made.sources) if leaf not in made.folded]
    return [numbers.index(i) for i in made.folded], [numbers.index(i) for i in kept]


# --- validity of the initial values -------------------------------------------------------------


def _proposal(chain: fold.Chain | MatrixChain, leaves: tuple[int, ...], tree: Tree) -> Fold | str:
    """The fold of a chain, or why its initial values do not allow it."""
    arrays = [np.asarray(tree.leaves[leaf]) for leaf in leaves]
    names = [tree.paths[leaf] for leaf in leaves]
    if len({array.dtype for array in arrays}) > 1 or arrays[0].dtype not in (
        np.float32, np.float64
    ):  # fmt: skip
        return f"the factors {', '.join(names)} are not all float32 or all float64"
    if not all(np.isfinite(array).all() for array in arrays):
        return f"the factors {', '.join(names)} have entries that are not finite"
    if isinstance(chain, MatrixChain):
        return _matrix(chain, arrays, names)
    return _elementwise(leaves, arrays, names)


def _elementwise(
    leaves: tuple[int, ...], arrays: Sequence[np.ndarray], names: Sequence[str]
) -> Fold | str:
    u, constants, signs = flows.survivor(arrays)
    zeros = int(np.sum((u == 0) & (constants[-1] != 0)))
    if zeros:
        return (
            f"{zeros} elements of the chain {', '.join(names)} are exactly zero in front of its "
            "last factor, where the gradient of relu is a convention; initialise them away from "
            "zero to fold the chain"
        )
    return ElementwiseFold(leaves, constants, signs)


def _matrix(
    chain: MatrixChain, arrays: Sequence[np.ndarray], names: Sequence[str]
) -> MatrixFold | str:
    upright = [a.T if t else a for a, t in zip(arrays, chain.turned, strict=True)]
    widths = (upright[0].shape[0], *(a.shape[1] for a in upright))
    shape, rank, dtype = (widths[0], widths[-1]), min(widths), arrays[0].dtype
    listed = ", ".join(names)
    if not rank:
        return f"the product of {listed} has no entries"
    if shape[0] * shape[1] > sum(a.size for a in arrays):
        return f"the product of {listed} has more entries than its factors together"
    sizes = np.linalg.svd(_product(upright), compute_uv=False)
    least = float(sizes[rank - 1] / max(sizes[0], np.finfo(float).tiny))
    if least < resolution(dtype):
        return (
            f"the smallest singular value of the product of {listed} is {least:.1g} of the "
            f"largest, below the {resolution(dtype):.1g} that {dtype.name} resolves; initialise "
            "the chain closer to orthogonal"
        )
    offsets = _offsets(upright, widths, listed)
    if isinstance(offsets, str):
        return offsets
    determinant = 0.0
    if shape[0] == shape[1] == rank and np.sum(offsets == 0) > 1:
        determinant = float(np.linalg.slogdet(_product(upright))[0])
    bases = matrix_flows.gauge(upright, rank)
    return MatrixFold(chain, offsets, rank, bases, shape, determinant, dtype)


def _offsets(upright: Sequence[np.ndarray], widths: Sequence[int], listed: str) -> np.ndarray | str:
    """The offsets of a chain whose laws are multiples of the identity, or how far they are not."""
    offsets, violation = matrix_flows.gaps(upright)
    if violation > BALANCED:
        return (
            f"the matrices {listed} are not balanced: W_(j+1) W_(j+1)^T - W_j^T W_j departs from "
            f"a multiple of the identity by {violation:.2g} of its size, and at most "
            f"{BALANCED:.0e} is allowed; pass rebalance=True, or initialise them balanced"
        )
    largest = max(float(np.linalg.norm(a, 2) ** 2) for a in upright)
    offsets = np.where(offsets > BALANCED * largest, offsets, 0.0)
    if offsets.any() and any(h != min(widths) for h in widths[1:-1]):
        return (
            f"the matrices {listed} differ by multiples of the identity of up to "
            f"{offsets.max():.2g}, which determines them only where all hidden widths are the "
            f"smallest width, and the widths are {', '.join(map(str, widths))}; pass "
            "rebalance=True, or initialise them balanced"
        )
    return offsets


def _product(chain: Sequence[np.ndarray]) -> np.ndarray:
    product = np.asarray(chain[0], np.float64)
    for factor in chain[1:]:
        product = product @ factor
    return product
