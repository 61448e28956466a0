"""Which reductions of a network's weights are taken.

The rules "fold" and "compress" propose; the experiment with the user's optimizer, on the structure
of the user's own tree, decides.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fcjax.errors import FrontContributionError
from fcjax.expressions.written import Written
from fcjax.rules import fold, lookups
from fcjax.rules.balancing import balanced
from fcjax.rules.compress import Compression, compression
from fcjax.rules.equivariance import Verdict, experiment
from fcjax.rules.flow_folds import FlowFold
from fcjax.rules.flow_rules import flow_folds
from fcjax.rules.radial import RadialFold, radial_fold
from fcjax.rules.reduction import Reduction, Tree, nothing
from fcjax.rules.stand_ins import Change, Follows, Shrinks, Stays
from fcjax.rules.unmoved import unmoved
from fcjax.spaces.hidden import Spaces, find
from fcjax.spaces.subspaces import Basis, Reached, reach, span, used

__all__ = ["choose"]

Data = Mapping[int, np.ndarray[Any, Any]]
Followers = dict[int, tuple[int, np.ndarray[Any, Any]]]


def choose(
    network: Written,
    tree: Tree,
    optimizer: Any,
    data: Data,
    example: Sequence[Any],
    *,
    exactness: str = "discrete",
    rebalance: bool = False,
) -> Reduction:
    """The largest reduction that the optimizer allows.

    Args:
      network: the network as written.
      tree: the parameters.
      optimizer: the optax transformation that will train.
      data: the training inputs, by the numbers of their arguments, where these are known.
      example: the arguments the network was traced with.
      exactness: whether folds count that are exact as the learning rate goes to 0 ("flow"), and
        the radial closure, which is an approximation ("approximate").
      rebalance: whether chains may start from balanced parameters.

    Raises:
      FrontContributionError: if the initial values stand at a saddle of a hidden space, or the
        example leaves the span of the data.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in tree.leaves):
        unknown = "its initial values are not known while tracing, so all of it is trained"
        return nothing(tree, dict.fromkeys(range(len(tree.leaves)), unknown))
    given = tree
    if rebalance and not (exactness == "approximate" and _is_radial(network, tree)):
        tree = _rebalanced(network, tree, optimizer, data)
    chooser = _Chooser(network, tree, optimizer, exactness)
    chosen = chooser.chosen(data)
    changed = _changed(given, tree)
    notes = {i: f"{chosen.reasons[i]}; {REBALANCED}" for i in changed if i in chosen.reasons}
    notes |= {i: REBALANCED for i in changed if i not in chosen.reasons}
    chosen = dataclasses.replace(
        chosen, reasons={**chosen.reasons, **notes}, unmoved=unmoved(optimizer, given)
    )
    chosen.refuse_outside(example)
    chooser.refuse_unread(chosen, example)
    return chosen


def _is_radial(network: Written, tree: Tree) -> bool:
    return isinstance(radial_fold(network, tree.leaves, tree.paths), RadialFold)


REBALANCED = "rebalanced before training (the function is the same)"


def _rebalanced(network: Written, tree: Tree, optimizer: Any, data: Data) -> Tree:
    """The parameters with those chains and gains balanced that are then folded."""
    among = frozenset(range(len(tree.leaves)))
    while True:
        made = balanced(network, tree, among)
        held = _Chooser(network, made, optimizer, "flow").chosen(data).held
        if held.issuperset(_changed(tree, made)):
            return made
        among &= held


def _changed(given: Tree, made: Tree) -> list[int]:
    """The leaves that are not as they were given."""
    pairs = enumerate(zip(given.leaves, made.leaves, strict=True))
    return [leaf for leaf, (old, new) in pairs if old is not new]


class _Chooser:
    """Asks the rules for proposals and the optimizer for its verdict on them."""

    def __init__(self, network: Written, tree: Tree, optimizer: Any, exactness: str) -> None:
        self.network = network
        self.tree = tree
        self.optimizer = optimizer
        self.exactness = exactness
        self.flows: tuple[FlowFold, ...] = ()
        self.reasons: dict[int, str] = {}
        self.deviation = 0.0

    def chosen(self, data: Data) -> Reduction:
        """Both rules, or compression alone if the optimizer does not allow them together.

        What is folded along gradient flow is not compressed too, what is compressed follows no
        other weight, and the radial closure leaves nothing to the other rules.
        """
        if self.exactness == "approximate":
            radial = radial_fold(self.network, self.tree.leaves, self.tree.paths)
            if isinstance(radial, RadialFold):
                reasons = dict.fromkeys(radial.leaves, radial.law(self.tree.paths))
                return Reduction(self.tree, {}, None, reasons, (radial,))
            leaf, reason = radial
            self.reasons[leaf] = reason
        followers = self._folds()
        if self.exactness != "discrete":
            self._propose_flows(followers)
        compressed = self._compressed(data)
        if compressed is not None:
            followers = {
                leaf: (survivor, by)
                for leaf, (survivor, by) in followers.items()
                if compressed.shapes.keys().isdisjoint((leaf, survivor))
            }
        both = Reduction(self.tree, followers, compressed, self.reasons, self.flows)
        if followers and compressed is not None:
            verdict = self._verdict(both)
            if not verdict.exact:
                self._refuse_folds(followers, verdict)
                both = dataclasses.replace(both, followers={})
        return dataclasses.replace(both, deviation=self.deviation)

    def _verdict(self, proposed: Reduction) -> Verdict:
        numbers = [i for i, trained in enumerate(self.tree.trained) if trained]
        changes = [_change(proposed, leaf, numbers) for leaf in numbers]
        kept = [x if t else None for x, t in zip(self.tree.leaves, self.tree.trained, strict=True)]
        structure = jax.tree.structure(jax.tree.unflatten(self.tree.structure, kept))
        rho = proposed.compression is not None and proposed.compression.rho
        verdict = experiment(self.optimizer, structure, changes, rho=rho)
        if verdict.exact:
            self.deviation = max(self.deviation, verdict.deviation)
        return verdict

    # --- fold ---

    def _propose_flows(self, followers: Followers) -> None:
        taken = set(followers) | {survivor for survivor, _ in followers.values()}
        proposals = flow_folds(self.network, self.tree, self.optimizer, taken)
        self.flows = proposals.folds
        self.reasons |= proposals.reasons

    def _folds(self) -> Followers:
        """The leaves that follow others, if the optimizer lets them."""
        chains, refused = fold.chains(self.network, len(self.tree.paths))
        self.reasons |= refused
        followers: Followers = {}
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
        self._refuse_folds(followers, verdict)
        return {}

    def _refuse_folds(self, followers: Followers, verdict: Verdict) -> None:
        self.reasons |= {
            leaf: "an elementwise factor that could follow "
            f"{self.tree.paths[survivor]}, but with this optimizer {verdict.reason}"
            for leaf, (survivor, _) in followers.items()
        }

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

    def _compressed(self, data: Data) -> Compression | None:
        """The first of the compressions, from large to small, that the optimizer allows."""
        spaces = find(self.network, len(self.tree.paths), sorted(data))
        self._refuse_infinite(spaces)
        rows = _rows(spaces, data)
        given = {i: span(inputs) for i, inputs in rows.items()}
        reached = reach(spaces, self.tree.leaves, given)
        zeros = {i: used(inputs) for i, inputs in rows.items()}
        smaller = self._smaller(spaces, dict(enumerate(reached.bases)), reached.saddles)
        aligned = self._smaller(spaces, zeros, {})
        reasons: dict[int, str] = {}
        tables = self._tables(data)
        for bases, is_aligned in ((smaller, False), (aligned, True)):
            proposed = compression(spaces, bases, tables, self.tree.leaves)
            for rho in (False, True) if proposed.rests else (False,):
                tried = dataclasses.replace(proposed, rho=rho, aligned=is_aligned)
                if not tried.shapes or not _saves(tried):
                    continue
                verdict = self._verdict(Reduction(self.tree, {}, tried, {}))
                if verdict.exact:
                    self._refuse_saddles(spaces, {} if is_aligned else reached.saddles, reached)
                    self._explain(tried)
                    self._mention_doubt(spaces, frozenset() if is_aligned else reached.unsure)
                    return tried
                reasons |= dict.fromkeys(tried.shapes, verdict.reason)
        self.reasons |= {
            leaf: f"could be trained in fewer coordinates, but with this optimizer {reason}"
            for leaf, reason in reasons.items()
        }
        return None

    def _tables(self, data: Mapping[int, Any]) -> dict[int, np.ndarray[Any, Any]]:
        """The rows that the data read of tables, where these are fewer than all."""
        count = len(self.tree.paths)
        found = {}
        for leaf, readings in lookups.find(self.network, count).items() if data else ():
            rows = lookups.rows_read(readings, self.network.body, data, count)
            if (
                rows is not None
                and self.tree.trained[leaf]
                and (0 < len(rows) < self.tree.leaves[leaf].shape[0] - 1)
            ):
                found[leaf] = rows
        return found

    def refuse_unread(self, chosen: Reduction, example: Sequence[Any]) -> None:
        """Checks that an example, where its values are known, reads rows that the data read.

        Raises:
          FrontContributionError: naming the table.
        """
        kept = chosen.compression.rows if chosen.compression is not None else {}
        abstract = (jax.core.Tracer, jax.ShapeDtypeStruct)
        known = {i: x for i, x in enumerate(example) if not isinstance(x, abstract)}
        count = len(self.tree.paths)
        for leaf, readings in lookups.find(self.network, count).items() if kept else ():
            rows = lookups.rows_read(readings, self.network.body, known, count)
            if leaf in kept and rows is not None and not set(rows) <= set(kept[leaf]):
                raise FrontContributionError(
                    f"the example reads rows of {self.tree.paths[leaf]} that data= does not read; "
                    "pass data= that holds all inputs"
                )

    def _explain(self, taken: Compression) -> None:
        for leaf, rows in taken.rows.items():
            total = taken.shapes[leaf][0]
            self.reasons[leaf] = f"the data read {len(rows)} of its {total} rows"
        for leaf in set(taken.shapes) - set(taken.rows):
            parts = sorted({(taken.size(n), taken.spaces.found[n].dimension)
                            for n in taken.on(leaf).values()})  # fmt: skip
            listed = " and ".join(f"{size} of {dimension}" for size, dimension in parts)
            refused = self.reasons.get(leaf) if self.exactness != "discrete" else None
            self.reasons[leaf] = (
                f"backpropagation reaches {listed} directions of its hidden space"
                f"{f'; {refused}' if refused else ''}"
            )

    def _mention_doubt(self, spaces: Spaces, unsure: frozenset[int]) -> None:
        """Says where the rank depends on the tolerance; such directions are always kept."""
        for leaf in {place.leaf for number in unsure for place in spaces.found[number].places}:
            reason = self.reasons.get(leaf, "backpropagation reaches all of its hidden space")
            self.reasons[leaf] = (
                f"{reason}; some of these directions only by couplings of little more than the "
                "weights' rounding, which initial values made in float64 would settle"
            )

    def _refuse_infinite(self, spaces: Spaces) -> None:
        for leaf in sorted({place.leaf for space in spaces.found for place in space.places}):
            if not np.isfinite(np.asarray(self.tree.leaves[leaf])).all():
                raise FrontContributionError(
                    f"params leaf {self.tree.paths[leaf]} has infinite entries in a linear "
                    "segment; check its initialisation"
                )

    def _smaller(
        self, spaces: Spaces, bases: Mapping[int, Basis | None], saddles: Mapping[int, int]
    ) -> dict[int, Basis]:
        """The bases that are worth taking: of less than all, but not of nothing.

        In half precision no change of coordinates is exact enough to be told from rounding.
        """
        in_flows = {leaf for taken in self.flows for leaf in (*taken.leaves, *taken.sources)}
        return {
            i: basis
            for i, basis in bases.items()
            if basis is not None
            and (basis.rank or i in saddles)
            and basis.rank < spaces.found[i].dimension
            and in_flows.isdisjoint(p.leaf for p in spaces.found[i].places)
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
    depth = max((taken.spaces.found[n].depth for n in taken.on(leaf).values()), default=0)
    return Shrinks(shape, axes, leaf in taken.rests, taken.aligned, depth)


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
