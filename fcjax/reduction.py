"""Which parameters are trained, in which coordinates, and how the others follow from them.

The rules "fold" and "compress" propose, the experiment with the user's optimizer decides.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcjax import fold
from fcjax.compress import Compression, compression
from fcjax.equivariance import Change, Follows, Shrinks, Stays, Verdict, experiment
from fcjax.errors import FrontContributionError
from fcjax.spaces import Spaces, find
from fcjax.subspaces import Basis, Reached, made_with, outside, reach, span, used
from fcjax.trace import Value
from fcjax.written import Written

__all__ = ["Reduction", "Tree", "nothing", "reduction"]

OUTSIDE = 10.0
"""How far inputs may leave the span of the data, in units of their tolerance."""
ELSEWHERE = 1e-4
"""How much of a parameter may be lost when it is reduced, relative to its largest entry."""

Array = Any
Contributions = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tree:
    """The user's parameters.

    Attributes:
      structure: their structure.
      paths: the name of each leaf.
      leaves: their initial values.
      trained: which of them are floating-point numbers, and so trained.
    """

    structure: Any
    paths: tuple[str, ...]
    leaves: tuple[Any, ...]
    trained: tuple[bool, ...]

    @property
    def frozen(self) -> tuple[Any, ...]:
        """The leaves that are not trained."""
        return tuple(x for x, t in zip(self.leaves, self.trained, strict=True) if not t)


@dataclasses.dataclass(frozen=True, eq=False)
class Reduction:
    """How the trained parameters and the original ones determine each other.

    Attributes:
      tree: the original parameters.
      followers: for each leaf that is folded away, the leaf it follows and with which signs.
      compression: the leaves that are trained in the coordinates of reachable spaces.
      reasons: why leaves were reduced, or why they could not be.
    """

    tree: Tree
    followers: Mapping[int, tuple[int, np.ndarray[Any, Any]]]
    compression: Compression | None
    reasons: Mapping[int, str]

    @property
    def is_trivial(self) -> bool:
        """Whether every leaf is trained as it is."""
        return not self.followers and self.compression is None

    def rule(self, leaf: int) -> tuple[str, str] | None:
        """The rule that changes a leaf's shape, and for which optimizers it is exact."""
        if leaf in self.followers:
            return "fold", "sign"
        if self.compression is not None and leaf in self.compression.shapes:
            return "compress", self.compression.exactness
        return None

    def reduced_shape(self, leaf: int) -> tuple[int, ...] | None:
        """The shape in which a leaf is trained, None if it is not."""
        if leaf in self.followers or not self.tree.trained[leaf]:
            return None
        if self.compression is not None and leaf in self.compression.shapes:
            return self.compression.reduced_shape(leaf)
        return tuple(np.shape(self.tree.leaves[leaf]))

    @functools.cached_property
    def contributions(self) -> Contributions:
        """The arrays that are fixed before training, under the names of the leaves."""
        names = self.tree.paths
        dtypes = [jnp.result_type(leaf) for leaf in self.tree.leaves]
        signs = {names[k]: jnp.asarray(by, dtypes[k]) for k, (_, by) in self.followers.items()}
        if self.compression is None:
            return {"signs": signs, "bases": {}, "rests": {}}
        found = self.compression.spaces.found
        bases = {
            str(number): jnp.asarray(array, dtypes[found[number].places[0].leaf])
            for number, array in self.compression.padded().items()
        }
        rests = {names[k]: jnp.asarray(a, dtypes[k]) for k, a in self.compression.rests.items()}
        return {"signs": signs, "bases": bases, "rests": rests}

    def running(self, leaves: Sequence[Array], contributions: Contributions) -> list[Array]:
        """What the network in reduced coordinates is given: followers from their survivors.

        A survivor moves by its partial derivative, as in backpropagation, so no gradient flows
        back to it through its followers.
        """
        made = list(leaves)
        for leaf, (survivor, _) in self.followers.items():
            signs = contributions["signs"][self.tree.paths[leaf]]
            made[leaf] = jax.lax.stop_gradient(signs * leaves[survivor])
        return made

    def sources_in(self, inputs: Sequence[Value]) -> Sequence[Value]:
        """Which inputs of the reduced network are bases; they come last."""
        count = len(self.compression.sources) if self.compression is not None else 0
        return inputs[len(inputs) - count :]

    def sources(self, contributions: Contributions) -> list[Array]:
        """The bases through which parameters meet inputs, in the order of their spaces."""
        if self.compression is None:
            return []
        return [contributions["bases"][str(n)][0] for n in self.compression.sources]

    def refuse_outside(self, arguments: Sequence[Array]) -> None:
        """Checks that inputs, where their values are known, lie in the span of the data.

        Raises:
          FrontContributionError: if the reduced network would silently ignore a part of them.
        """
        for number in self.compression.sources if self.compression is not None else ():
            assert self.compression is not None
            space = self.compression.spaces.found[number]
            assert space.source is not None
            array = arguments[space.source.argument]
            if isinstance(array, (jax.core.Tracer, jax.ShapeDtypeStruct)):
                continue
            rows = space.source.rows(np.asarray(array))
            away = outside(rows, self.compression.bases[number][0])
            if away > OUTSIDE * made_with(rows):
                names = ", ".join(sorted({self.tree.paths[p.leaf] for p in space.places}))
                raise FrontContributionError(
                    f"argument {space.source.argument} leaves the span of data= by {away:.1g} of "
                    f"its size, where {names} was not trained. Pass data= that spans all inputs, "
                    "or use apply_fn(fc.expand(params), ...) for such inputs."
                )

    def refuse_elsewhere(self, leaves: Sequence[Array], reduced: Sequence[Array]) -> None:
        """Checks that full parameters, where known, are what the reduced ones expand to.

        Raises:
          FrontContributionError: if reducing them lost anything.
        """
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            return
        for leaf, back in enumerate(self.expand(reduced, self.contributions)):
            if self.rule(leaf) is None:
                continue
            wide, again = np.asarray(leaves[leaf], np.float64), np.asarray(back, np.float64)
            lost = np.max(np.abs(wide - again), initial=0.0)
            if not lost <= ELSEWHERE * np.max(np.abs(wide), initial=0.0):
                raise FrontContributionError(
                    f"full parameter {self.tree.paths[leaf]} cannot be reached by training the "
                    f"reduced ones: {lost:.1g} of it would be lost. Call front_contribute again "
                    "with these parameters."
                )

    def expand(self, leaves: Sequence[Array], contributions: Contributions) -> list[Array]:
        """All original leaves."""
        full = self.running(leaves, contributions)
        for leaf in self.compression.shapes if self.compression is not None else ():
            full[leaf] = self._changed(leaf, leaves[leaf], contributions, back=True)
        return full

    def reduce(self, leaves: Sequence[Array], contributions: Contributions) -> list[Array]:
        """The trained leaves, None for the others."""
        kept = [x if t else None for x, t in zip(leaves, self.tree.trained, strict=True)]
        for leaf in self.followers:
            kept[leaf] = None
        for leaf in self.compression.shapes if self.compression is not None else ():
            kept[leaf] = self._changed(leaf, leaves[leaf], contributions, back=False)
        return kept

    def _changed(
        self, leaf: int, array: Array, contributions: Contributions, *, back: bool
    ) -> Array:
        assert self.compression is not None
        bases = {int(n): basis for n, basis in contributions["bases"].items()}
        rest = contributions["rests"].get(self.tree.paths[leaf])
        way = self.compression.expand if back else self.compression.reduce
        return way(leaf, array, bases, rest)


def nothing(tree: Tree, reasons: Mapping[int, str] | None = None) -> Reduction:
    """Every leaf trained as it is."""
    return Reduction(tree, {}, None, reasons or {})


def reduction(
    network: Written, tree: Tree, optimizer: Any, data: Mapping[int, np.ndarray[Any, Any]]
) -> Reduction:
    """The largest reduction that the optimizer allows.

    Args:
      network: the network as written.
      tree: the parameters.
      optimizer: the optax transformation that will train.
      data: the training inputs for arguments that are known to span less than their space.

    Raises:
      FrontContributionError: if the initial values stand at a saddle of a hidden space.
    """
    chooser = _Chooser(network, tree, optimizer)
    return chooser.chosen(data)


class _Chooser:
    """Asks the rules for proposals and the optimizer for its verdict on them."""

    def __init__(self, network: Written, tree: Tree, optimizer: Any) -> None:
        self.network = network
        self.tree = tree
        self.optimizer = optimizer
        self.reasons: dict[int, str] = {}

    def chosen(self, data: Mapping[int, np.ndarray[Any, Any]]) -> Reduction:
        followers = self._folds()
        compressed = self._compressed(data)
        both = Reduction(self.tree, followers, compressed, self.reasons)
        if followers and compressed is not None and not self._verdict(both).exact:
            return dataclasses.replace(both, followers={})
        return both

    def _verdict(self, proposed: Reduction) -> Verdict:
        numbers = [i for i, trained in enumerate(self.tree.trained) if trained]
        changes = [_change(proposed, leaf, numbers) for leaf in numbers]
        kept = [x if t else None for x, t in zip(self.tree.leaves, self.tree.trained, strict=True)]
        structure = jax.tree.structure(jax.tree.unflatten(self.tree.structure, kept))
        rho = proposed.compression is not None and proposed.compression.rho
        return experiment(self.optimizer, structure, changes, rho=rho)

    # --- fold ---

    def _folds(self) -> dict[int, tuple[int, np.ndarray[Any, Any]]]:
        chains, refused = fold.chains(self.network, len(self.tree.paths))
        self.reasons |= refused
        followers: dict[int, tuple[int, np.ndarray[Any, Any]]] = {}
        for chain in chains:
            signs = self._signs(chain)
            followers |= {leaf: (chain.survivor, by) for leaf, by in signs.items()}
        if not followers:
            return {}
        verdict = self._verdict(Reduction(self.tree, followers, None, {}))
        if verdict.exact:
            self.reasons |= {
                leaf: f"equals {self.tree.paths[survivor]} up to signs at every step, as it does "
                "initially; never updated"
                for leaf, (survivor, _) in followers.items()
            }
            return followers
        self.reasons |= {
            leaf: "an elementwise factor that could follow "
            f"{self.tree.paths[survivor]}, but with this optimizer {verdict.reason}"
            for leaf, (survivor, _) in followers.items()
        }
        return {}

    def _signs(self, chain: fold.Chain) -> dict[int, np.ndarray[Any, Any]]:
        """The signs of all followers of a chain; nothing if any magnitude differs."""
        last = np.asarray(self.tree.leaves[chain.survivor])
        signs = {k: fold.signs(last, np.asarray(self.tree.leaves[k])) for k in chain.followers}
        if any(by is None for by in signs.values()):
            name = self.tree.paths[chain.survivor]
            self.reasons |= {
                k: f"an elementwise factor, but its initial magnitudes differ from those of {name} "
                f"by up to {fold.mismatch(last, np.asarray(self.tree.leaves[k])):.1g} of their "
                "size; initialise them with equal magnitudes to fold it away"
                for k in signs
            }
            return {}
        return {leaf: by for leaf, by in signs.items() if by is not None}

    # --- compress ---

    def _compressed(self, data: Mapping[int, np.ndarray[Any, Any]]) -> Compression | None:
        """The first of the compressions, from large to small, that the optimizer allows."""
        spaces = find(self.network, len(self.tree.paths), sorted(data))
        rows = _rows(spaces, data)
        given = {i: span(inputs) for i, inputs in rows.items()}
        reached = reach(spaces, self.tree.leaves, given)
        zeros = {i: used(inputs) for i, inputs in rows.items()}
        smaller = self._smaller(spaces, dict(enumerate(reached.bases)), reached.saddles)
        aligned = self._smaller(spaces, zeros, {})
        reasons: dict[int, str] = {}
        for bases, is_aligned in ((smaller, False), (aligned, True)):
            proposed = compression(spaces, bases, self.tree.leaves)
            for rho in (False, True) if proposed.rests else (False,):
                tried = dataclasses.replace(proposed, rho=rho, aligned=is_aligned)
                if not bases or not _saves(tried):
                    continue
                verdict = self._verdict(Reduction(self.tree, {}, tried, {}))
                if verdict.exact:
                    self._refuse_saddles(spaces, {} if is_aligned else reached.saddles, reached)
                    self._explain(tried)
                    return tried
                reasons |= dict.fromkeys(tried.shapes, verdict.reason)
        self.reasons |= {
            leaf: f"could be trained in fewer coordinates, but with this optimizer {reason}"
            for leaf, reason in reasons.items()
        }
        return None

    def _explain(self, taken: Compression) -> None:
        for leaf in taken.shapes:
            parts = sorted({(taken.size(n), taken.spaces.found[n].dimension)
                            for n in taken.on(leaf).values()})  # fmt: skip
            listed = " and ".join(f"{size} of {dimension}" for size, dimension in parts)
            self.reasons[leaf] = f"backpropagation reaches {listed} directions of its hidden space"

    def _smaller(
        self, spaces: Spaces, bases: Mapping[int, Basis | None], saddles: Mapping[int, int]
    ) -> dict[int, Basis]:
        """The bases that are worth taking: of less than all, but not of nothing.

        In half precision no change of coordinates is exact enough to be told from rounding.
        """
        return {
            i: basis
            for i, basis in bases.items()
            if basis is not None
            and (basis.rank or i in saddles)
            and basis.rank < spaces.found[i].dimension
            and all(
                self.tree.leaves[p.leaf].dtype in (np.float32, np.float64)
                for p in spaces.found[i].places
            )
        }

    def _refuse_saddles(self, spaces: Spaces, saddles: Mapping[int, int], reached: Reached) -> None:
        for number, needed in saddles.items():
            basis = reached.bases[number]
            rank = spaces.found[number].dimension if basis is None else min(basis.ranks)
            names = sorted({self.tree.paths[p.leaf] for p in spaces.found[number].places})
            raise FrontContributionError(
                f"the initial values of {', '.join(names)} stand at a saddle: they reach {rank} of "
                f"the {needed} directions of their hidden space that the layers around it can "
                "use, and backpropagation would find the others by its rounding noise alone. "
                "Initialise them with full rank, or leave optimizer= out, which only collapses."
            )


def _change(proposed: Reduction, leaf: int, numbers: Sequence[int]) -> Change:
    """What happens to a leaf, for the experiment; ``numbers`` are the leaves that are trained."""
    shape = tuple(np.shape(proposed.tree.leaves[leaf]))
    if leaf in proposed.followers:
        return Follows(numbers.index(proposed.followers[leaf][0]))
    taken = proposed.compression
    if taken is None or leaf not in taken.shapes:
        return Stays(shape)
    reduced = taken.reduced_shape(leaf)
    axes = tuple(a != b for a, b in zip(shape, reduced, strict=True))
    return Shrinks(shape, axes, leaf in taken.rests, taken.aligned)


def _rows(spaces: Spaces, arrays: Mapping[int, Any]) -> dict[int, Any]:
    """The inputs of each space of inputs, as rows."""
    return {
        i: space.source.rows(arrays[space.source.argument])
        for i, space in enumerate(spaces.found)
        if space.source is not None and space.source.argument in arrays
    }


def _saves(taken: Compression) -> bool:
    """Whether the coordinate of rho leaves anything to gain."""
    return all(taken.size(n) < taken.spaces.found[n].dimension for n in taken.bases)
