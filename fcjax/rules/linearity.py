"""Decides by experiment whether an optimizer follows gradient flow as SGD does.

Conservation laws hold along gradient flow, and shrink under weight decay. Training keeps
them up to the learning rate if every update is one and the same linear function of the gradients
so far and of the leaf's own values, for all entries of all leaves that a law ties together: SGD,
with momentum, with Nesterov's, with decay, with a schedule. As in ``equivariance.py`` nothing is
inferred from what an optimizer is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcjax.rules.equivariance import operations
from fcjax.rules.remembering import remembered
from fcjax.rules.trainings import Trainings, in_float64

__all__ = ["Flow", "follows_flow"]

_TOLERANCE = 1e-6  # optax.MultiSteps accumulates in float32
_STEPS = 32
_SCALES = tuple(10.0**exponent for exponent in range(-4, 5))
_SIZES = (3, 4, 5)
_BY_SIZE = "it treats leaves differently at their real sizes"


Group = tuple[Sequence[int], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Flow:
    """Whether an optimizer follows gradient flow on a group of leaves.

    Attributes:
      fault: why it does not, as a part of a sentence; None if it does.
      decays: whether it shrinks the leaves, all by the same factor.
    """

    fault: str | None
    decays: bool = False


def follows_flow(
    optimizer: optax.GradientTransformation,
    structure: jax.tree_util.PyTreeDef,
    shapes: Sequence[tuple[int, ...]],
    groups: Sequence[Group],
) -> list[Flow]:
    """Whether an optimizer follows gradient flow on groups of leaves.

    The reduced tree has None for the folded leaves of all groups, and if the optimizer decays
    weights a scalar in the place of the first of each group, which must shrink as the group does.

    Args:
      optimizer: the optax optimizer.
      structure: the structure of the full tree, with None for what is not trained.
      shapes: the shapes of its leaves.
      groups: the numbers of the leaves that are to move alike, those that are folded away and
        those that are kept.

    Returns:
      The verdict on each group, remembered as in ``equivariance.py``.

    Example:
      >>> structure = jax.tree.structure({"a": 0, "b": 0})
      >>> shapes, groups = [(8, 8), (8, 8)], [([0], [1])]
      >>> follows_flow(optax.sgd(0.1, momentum=0.9), structure, shapes, groups)
      [Flow(fault=None, decays=False)]
      >>> follows_flow(optax.adam(1e-3), structure, shapes, groups)[0].fault
      'its updates are not proportional to the size of the gradients'
    """
    hashable = tuple((tuple(folded), tuple(kept)) for folded, kept in groups)
    return list(_follows_flow(optimizer, structure, tuple(shapes), hashable))


@remembered
def _follows_flow(
    optimizer: optax.GradientTransformation,
    structure: jax.tree_util.PyTreeDef,
    shapes: tuple[tuple[int, ...], ...],
    groups: tuple[Group, ...],
) -> tuple[Flow, ...]:
    try:
        with in_float64(), np.errstate(all="ignore"):
            seen = _Seen(optimizer, structure, [_small(shape) for shape in shapes], groups)
            faults = [seen.fault(group) for group in groups]
            if None in faults and _depends_on_sizes(optimizer, structure, shapes):
                faults = [fault or _BY_SIZE for fault in faults]
            return tuple(Flow(fault, seen.decays) for fault in faults)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        reason = f"it could not be run on this tree: {type(error).__name__}: {first_line}"
        return (Flow(reason),) * len(groups)


class _Seen:
    """The updates that an optimizer makes of a few streams of gradients, leaf by leaf.

    Attributes:
      weights: the initial weights.
      pattern: a fixed array for each leaf.
      idle: the updates for zero gradients.
      steady: those for the pattern times a number for each step, less the idle ones.
      scaled: the same for gradients of several sizes, each divided by its size.
      elsewhere: the same from other weights.
      other: those for gradients that change their directions.
      both: those for the sum of the last two streams.
      reduced: those of the reduced tree for the steady stream, idle ones included.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        structure: jax.tree_util.PyTreeDef,
        shapes: Sequence[tuple[int, ...]],
        groups: Sequence[Group],
    ) -> None:
        self.weights, self.pattern, away = (_patterns(shapes, seed) for seed in (1, 2, 4))
        steady, other = _steady(self.pattern), _patterns([(_STEPS, *shape) for shape in shapes], 3)
        none = [0.0 * g for g in steady]
        both = [a + b for a, b in zip(steady, other, strict=True)]
        scaled = [[scale * g for g in steady] for scale in _SCALES]
        streams = [(self.weights, stream) for stream in (none, steady, other, both, *scaled)]
        idle, *moved, away_idle, away_steady = _updates(
            optimizer, structure, [*streams, (away, none), (away, steady)]
        )
        self.idle, (self.steady, self.other, self.both, *scaled) = (
            idle,
            [_less(u, idle) for u in moved],
        )
        self.scaled = [
            [u / scale for u in updates] for scale, updates in zip(_SCALES, scaled, strict=True)
        ]
        self.elsewhere = _less(away_steady, away_idle)
        self.decays = any(np.any(self.idle[i]) for both in groups for i in (*both[0], *both[1]))
        self.reduced = self._reduced(optimizer, structure, groups, steady)

    def _reduced(
        self,
        optimizer: optax.GradientTransformation,
        structure: jax.tree_util.PyTreeDef,
        groups: Sequence[Group],
        steady: Sequence[Any],
    ) -> list[Any]:
        """The updates of the reduced tree; None for what it has not."""
        weights, gradients = list[Any](self.weights), list[Any](steady)
        for folded, _ in groups:
            for i in folded:
                weights[i] = gradients[i] = None
            if self.decays:
                weights[folded[0]], gradients[folded[0]] = np.ones(()), np.zeros(_STEPS)
        return _updates(optimizer, structure, [(weights, gradients)])[0]

    def fault(self, both: Group) -> str | None:
        """What is wrong with a group of leaves."""
        group = (*both[0], *both[1])
        size = max(np.max(np.abs(self.steady[i])) for i in group)
        if not np.isfinite(size) or size == 0:
            return "it does not move them, or not by finite steps"
        wrong = {
            "its updates are not proportional to the size of the gradients": self._by_size(group),
            "its updates are not linear in the gradients": self._by_sum(group),
            "its updates are not linear in the weights": _gap(self.elsewhere, self.steady, group),
            "it moves weights whose gradient is zero, and not all by the same factor": (
                self._by_decay(group)
            ),
            "it treats entries or leaves of one chain differently": self._by_entry(group),
            "it moves the survivor differently without the folded leaves": self._by_tree(both),
        }
        return next((reason for reason, gap in wrong.items() if not gap <= _TOLERANCE), None)

    def _by_size(self, group: Sequence[int]) -> float:
        return max(_gap(scaled, self.steady, group) for scaled in self.scaled)

    def _by_sum(self, group: Sequence[int]) -> float:
        added = [a + b for a, b in zip(self.steady, self.other, strict=True)]
        return _gap(self.both, added, group)

    def _by_entry(self, group: Sequence[int]) -> float:
        """How far the updates are from the pattern times one number a step for all leaves."""
        return _gap(self.steady, _multiples(self.steady, self.pattern, group), group)

    def _by_decay(self, group: Sequence[int]) -> float:
        """How far the idle updates are from one factor a step for all leaves."""
        if not self.decays:
            return 0.0
        return _gap(self.idle, _multiples(self.idle, self.weights, group), group)

    def _by_tree(self, both: Group) -> float:
        """How far the updates of the reduced tree are from those of the full one."""
        folded, kept = both
        full = [u + v for u, v in zip(self.steady, self.idle, strict=True)]
        gap = _gap(self.reduced, full, kept)
        if not self.decays:
            return gap
        factors = _multiples(self.idle, self.weights, kept, of=np.ones(()))
        return max(gap, _gap([self.reduced[folded[0]]], [factors], [0]))


def _multiples(
    updates: Sequence[Any], arrays: Sequence[Any], group: Sequence[int], of: Any = None
) -> Any:
    """What the updates are if they are arrays times one number a step, that of the first leaf."""
    first = arrays[group[0]]
    numbers = updates[group[0]].reshape(_STEPS, -1) @ first.ravel() / np.sum(first**2)
    if of is not None:
        return np.multiply.outer(numbers, of)
    return [np.multiply.outer(numbers, array) for array in arrays]


def _gap(found: Sequence[Any], wanted: Sequence[Any], group: Sequence[int]) -> float:
    """The largest difference of updates, relative to the largest update."""
    size = max(np.max(np.abs(wanted[i])) for i in group)
    gap = max(np.max(np.abs(found[i] - wanted[i])) for i in group)
    return float(gap / size) if size else float(np.where(gap, np.inf, 0.0))


def _updates(
    optimizer: optax.GradientTransformation,
    structure: jax.tree_util.PyTreeDef,
    runs: Sequence[tuple[Sequence[Any], Sequence[Any]]],
) -> list[list[Any]]:
    """Trains the leaves of a tree several times, from weights and on gradients of each time.

    Args:
      optimizer: the optimizer.
      structure: the structure of the tree.
      runs: for each run the weights, and the gradients with a leading axis of steps; None for a
        leaf that is left out of the tree.

    Returns:
      For each run the updates, of the gradients' shapes.
    """
    weights, gradients = (
        jax.tree.unflatten(structure, [_stacked(leaves) for leaves in zip(*lists, strict=True)])
        for lists in zip(*runs, strict=True)
    )
    trainings = Trainings(optimizer, weights)
    steps = [trainings.step(_at(gradients, step)) for step in range(_STEPS)]
    made = zip(*map(jax.tree.leaves, steps), strict=True)
    by_leaf = [
        None if leaf is None else np.stack(next(made), axis=1).astype(np.float64)
        for leaf in runs[0][0]
    ]
    return [[None if x is None else x[run] for x in by_leaf] for run in range(len(runs))]


def _at(gradients: Any, step: int) -> Any:
    return jax.tree.map(lambda g: g[:, step], gradients)


def _stacked(leaves: Sequence[Any]) -> Any:
    return None if leaves[0] is None else np.stack(leaves)


def _less(updates: Sequence[Any], idle: Sequence[Any]) -> list[Any]:
    return [u - v for u, v in zip(updates, idle, strict=True)]


def _steady(pattern: Sequence[Any]) -> list[Any]:
    """The pattern times a number for each step."""
    numbers = 1.0 + _random((_STEPS,), 0)
    return [np.multiply.outer(numbers, array) for array in pattern]


def _patterns(shapes: Sequence[tuple[int, ...]], seed: int) -> list[np.ndarray]:
    return [_random(shape, seed, i) for i, shape in enumerate(shapes)]


def _small(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(min(size, _SIZES[axis % 3]) for axis, size in enumerate(shape))


def _random(shape: Sequence[int], *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _depends_on_sizes(
    optimizer: optax.GradientTransformation,
    structure: jax.tree_util.PyTreeDef,
    shapes: Sequence[tuple[int, ...]],
) -> bool:
    """Whether the optimizer's program is another one at the real sizes than at small ones."""
    programs = []
    for sizes in (shapes, [_small(shape) for shape in shapes]):
        leaves = [jax.ShapeDtypeStruct(shape, jnp.float64) for shape in sizes]
        tree = jax.tree.unflatten(structure, leaves)
        traced = jax.make_jaxpr(lambda w, g: optimizer.update(g, optimizer.init(w), w))(tree, tree)
        programs.append(list(operations(traced, numbers=True)))
    return programs[0] != programs[1]
