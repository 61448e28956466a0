"""Which parameters are trained, in which coordinates, and how the others follow from them.

What ``choice.py`` chose of the rules, as functions between the two.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcjax.errors import FrontContributionError
from fcjax.rules.compress import Compression
from fcjax.rules.flow_folds import FlowFold
from fcjax.rules.radial import RadialFold
from fcjax.spaces.subspaces import made_with, outside
from fcjax.tracing.interpret import interpreted
from fcjax.tracing.trace import Value

__all__ = ["Reduction", "Tree", "nothing"]

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
      flows: the chains that are folded along gradient flow.
      deviation: how far the optimizer moved the reduced weights from the full ones in the
        experiment, relative to an update.
      unmoved: the leaves that the optimizer leaves alone; nobody needs their gradients.
    """

    tree: Tree
    followers: Mapping[int, tuple[int, np.ndarray[Any, Any]]]
    compression: Compression | None
    reasons: Mapping[int, str]
    flows: tuple[FlowFold, ...] = ()
    deviation: float = 0.0
    unmoved: frozenset[int] = frozenset()

    @property
    def is_trivial(self) -> bool:
        """Whether every leaf is trained as it is."""
        return not self.followers and not self.flows and self.compression is None

    @functools.cached_property
    def flow_of(self) -> Mapping[int, FlowFold]:
        """For each leaf of a flow fold, that fold."""
        return {leaf: fold for fold in self.flows for leaf in fold.leaves}

    @functools.cached_property
    def folded(self) -> frozenset[int]:
        """The leaves that are folded away."""
        return self.followed - {fold.folded[0] for fold in self.flows if fold.decays}

    @functools.cached_property
    def held(self) -> frozenset[int]:
        """The leaves that folds relate to each other."""
        flows = [(*fold.leaves, *fold.sources) for fold in self.flows]
        survivors = [survivor for survivor, _ in self.followers.values()]
        return frozenset(self.followers).union(survivors, *flows)

    @functools.cached_property
    def followed(self) -> frozenset[int]:
        """The leaves that no gradient flows to."""
        flows = itertools.chain.from_iterable(fold.folded for fold in self.flows)
        return frozenset(self.followers) | frozenset(flows)

    def rule(self, leaf: int) -> tuple[str, str] | None:
        """The rule that changes a leaf's shape, and for which optimizers it is exact."""
        if leaf in self.followers:
            return "fold", "sign"
        if leaf in self.flow_of:
            return self.flow_of[leaf].rule, self.flow_of[leaf].exactness
        if self.compression is not None and leaf in self.compression.shapes:
            return "compress", self.compression.exactness
        return None

    def reduced_shape(self, leaf: int) -> tuple[int, ...] | None:
        """The shape in which a leaf is trained, None if it is not."""
        if leaf in self.folded or not self.tree.trained[leaf]:
            return None
        if leaf in self.flow_of:
            return () if leaf in self.followed else self.flow_of[leaf].trained_shape
        if self.compression is not None and leaf in self.compression.shapes:
            return self.compression.reduced_shape(leaf)
        return tuple(np.shape(self.tree.leaves[leaf]))

    @functools.cached_property
    def contributions(self) -> Contributions:
        """The arrays that are fixed before training, under the names of the leaves."""
        names = self.tree.paths
        dtypes = [jnp.result_type(leaf) for leaf in self.tree.leaves]
        signs = {names[k]: jnp.asarray(by, dtypes[k]) for k, (_, by) in self.followers.items()}
        flows = {names[fold.leaves[-1]]: fold.fixed() for fold in self.flows}
        if self.compression is None:
            return {"signs": signs, "bases": {}, "rests": {}, "places": {}, "flows": flows}
        found = self.compression.spaces.found
        bases = {
            str(number): jnp.asarray(array, dtypes[found[number].places[0].leaf])
            for number, array in self.compression.padded().items()
        }
        rests = {names[k]: jnp.asarray(a, dtypes[k]) for k, a in self.compression.rests.items()}
        places = {names[k]: jnp.asarray(self.compression.places(k)) for k in self.compression.rows}
        return {"signs": signs, "bases": bases, "rests": rests, "places": places, "flows": flows}

    def running(self, leaves: Sequence[Array], contributions: Contributions) -> list[Array]:
        """What the network in reduced coordinates is given: followers from their survivors.

        A survivor moves by its partial derivative, as in backpropagation, so no gradient flows
        back to it through its followers.
        """
        made = list(leaves)
        for leaf, (survivor, _) in self.followers.items():
            signs = contributions["signs"][self.tree.paths[leaf]]
            made[leaf] = jax.lax.stop_gradient(signs * leaves[survivor])
        for fold, fixed in self._flows(contributions):
            found = fold.running(leaves, _rho(fold, leaves), fixed)
            for leaf, array in found.items():
                made[leaf] = array
        return made

    def _flows(self, contributions: Contributions) -> Iterator[tuple[FlowFold, Any]]:
        """The flow folds with what is fixed for each."""
        for fold in self.flows:
            yield fold, contributions["flows"][self.tree.paths[fold.leaves[-1]]]

    def broken(self, leaves: Sequence[Array], contributions: Contributions) -> tuple[str, ...]:
        """Why flow folds are no longer valid at some trained leaves."""
        found = [
            fold.broken(leaves, float(_rho(fold, leaves)), fixed, self.tree.paths)
            for fold, fixed in self._flows(contributions)
        ]
        return tuple(reason for reason in found if reason)

    def refreshed(self, leaves: Sequence[Array]) -> dict[str, Any]:
        """What is fixed before training for the radial closure, at other full leaves.

        Raises:
          FrontContributionError: if there is no radial closure.
        """
        found = [fold for fold in self.flows if isinstance(fold, RadialFold)]
        if not found:
            raise FrontContributionError(
                "refresh is for the radial closure, and this network is not folded by it: pass "
                'exactness="approximate" and optimizer=; the report says if anything is in its way'
            )
        return {self.tree.paths[fold.survivor]: fold.fixed_at(leaves) for fold in found}

    def law_gradients(
        self, leaves: Sequence[Array], gradients: Sequence[Array], contributions: Contributions
    ) -> dict[str, Array]:
        """By how much a step changes the laws of each flow fold, over its squared rate."""
        return {
            self.tree.paths[fold.leaves[-1]]: fold.drift(
                leaves, gradients, _rho(fold, leaves), fixed
            )
            for fold, fixed in self._flows(contributions)
        }

    def sources_in(self, inputs: Sequence[Value]) -> Sequence[Value]:
        """Which inputs of the reduced network are bases and places of rows; they come last."""
        taken = self.compression
        count = len(taken.sources) + len(taken.rows) if taken is not None else 0
        return inputs[len(inputs) - count :]

    def sources(self, contributions: Contributions) -> list[Array]:
        """The bases through which parameters meet inputs, and the places of rows of tables."""
        if self.compression is None:
            return []
        bases = [contributions["bases"][str(n)][0] for n in self.compression.sources]
        names = [self.tree.paths[leaf] for leaf in self.compression.rows]
        return [*bases, *(contributions["places"][name] for name in names)]

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
        restored = self.expand(reduced, self.contributions)
        for fold in self.flows:
            lost = fold.lost(leaves, restored)
            if not lost <= ELSEWHERE:
                names = ", ".join(self.tree.paths[leaf] for leaf in fold.leaves)
                raise FrontContributionError(
                    f"full parameters {names} are not on the manifold of the initial ones, on "
                    f"which gradient flow stays: their conserved quantities differ by {lost:.1g} "
                    "of their size. Call front_contribute again with these parameters."
                )
        for leaf, back in enumerate(restored):
            if self.rule(leaf) is None or leaf in self.flow_of:
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
        for fold, fixed in self._flows(contributions):
            found = fold.expand(leaves, _rho(fold, leaves), fixed)
            for leaf, array in found.items():
                full[leaf] = array
        for leaf in self.compression.shapes if self.compression is not None else ():
            full[leaf] = self._changed(leaf, leaves[leaf], contributions, back=True)
        return full

    def reduce(self, leaves: Sequence[Array], contributions: Contributions) -> list[Array]:
        """The trained leaves, None for the others."""
        kept = [x if t else None for x, t in zip(leaves, self.tree.trained, strict=True)]
        for fold, fixed in self._flows(contributions):
            made, rho = fold.reduce(leaves, fixed)
            for leaf, array in {**made, **({fold.folded[0]: rho} if fold.decays else {})}.items():
                kept[leaf] = array
        for leaf in self.folded:
            kept[leaf] = None
        for leaf in self.compression.shapes if self.compression is not None else ():
            kept[leaf] = self._changed(leaf, leaves[leaf], contributions, back=False)
        return kept

    def start(self) -> list[Array]:
        """The trained leaves before training.

        They are computed without compiling, unless the user has placed the leaves on devices.
        """
        leaves, fixed = self.tree.leaves, self.contributions
        if self.is_trivial or any(isinstance(x, jax.Array) and x.committed for x in leaves):
            return self.reduce(leaves, fixed)
        traced, types = jax.make_jaxpr(self.reduce, return_shape=True)(leaves, fixed)
        made = interpreted(traced)(*jax.tree.leaves((leaves, fixed)))
        reduced = jax.tree.unflatten(jax.tree.structure(types), [*map(jnp.asarray, made)])
        return [
            new if new is None or self.rule(leaf) else leaves[leaf]
            for leaf, new in enumerate(reduced)
        ]

    def _changed(
        self, leaf: int, array: Array, contributions: Contributions, *, back: bool
    ) -> Array:
        assert self.compression is not None
        bases = {int(n): basis for n, basis in contributions["bases"].items()}
        rest = contributions["rests"].get(self.tree.paths[leaf])
        way = self.compression.expand if back else self.compression.reduce
        return way(leaf, array, bases, rest)


def _rho(fold: FlowFold, leaves: Sequence[Array]) -> Array:
    """By how much weight decay has shrunk the factors of a fold."""
    if fold.decays:
        return leaves[fold.folded[0]]
    (first, *_) = (*fold.sources, fold.leaves[-1])
    return np.ones((), leaves[first].dtype)


def nothing(tree: Tree, reasons: Mapping[int, str] | None = None) -> Reduction:
    """Every leaf trained as it is."""
    return Reduction(tree, {}, None, reasons or {})
