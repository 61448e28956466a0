"""Decides by experiment whether an optimizer follows gradient flow as SGD does.

The laws of ``flows.py`` hold along gradient flow. Training keeps them up to the learning rate if
every update is one and the same linear function of the gradients so far, for all entries of all
leaves that a law ties together: SGD, with momentum, with Nesterov's, with a schedule. As in
``equivariance.py`` nothing is inferred from what an optimizer is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcjax.equivariance import operations

__all__ = ["follows_flow"]

_TOLERANCE = 1e-6  # optax.MultiSteps accumulates in float32
_STEPS = 32
_SCALES = tuple(10.0**exponent for exponent in range(-4, 5))
_SIZES = (3, 4, 5)


def follows_flow(
    optimizer: optax.GradientTransformation,
    structure: jax.tree_util.PyTreeDef,
    shapes: Sequence[tuple[int, ...]],
    groups: Sequence[Sequence[int]],
    folded: frozenset[int],
) -> list[str | None]:
    """Why an optimizer does not follow gradient flow on groups of leaves.

    Args:
      optimizer: the optax optimizer.
      structure: the structure of the full tree, with None for what is not trained.
      shapes: the shapes of its leaves.
      groups: the numbers of the leaves that are to move alike.
      folded: the leaves that the reduced tree has not.

    Returns:
      For each group None if it does, else the reason, as a part of a sentence.

    Example:
      >>> structure = jax.tree.structure({"a": 0, "b": 0})
      >>> shapes, groups = [(8, 8), (8, 8)], [[0, 1]]
      >>> follows_flow(optax.sgd(0.1, momentum=0.9), structure, shapes, groups, frozenset({0}))
      [None]
      >>> follows_flow(optax.adam(1e-3), structure, shapes, groups, frozenset({0}))
      ['its updates are not proportional to the size of the gradients']
    """
    try:
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            seen = _Seen(optimizer, structure, shapes, folded)
            return [seen.fault(group) for group in groups]
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        reason = f"it could not be run on this tree: {type(error).__name__}: {first_line}"
        return [reason] * len(groups)


class _Seen:
    """The updates that an optimizer makes of a few streams of gradients, leaf by leaf.

    Attributes:
      idle: those of zero gradients.
      pattern: a fixed array for each leaf.
      steady: those of the pattern times a number for each step.
      scaled: the same, of gradients of several sizes, each divided by its size.
      elsewhere: the same from other weights.
      other: those of gradients that change their directions.
      both: those of the sum of the last two streams.
      reduced: those of the steady stream on the reduced tree.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        structure: jax.tree_util.PyTreeDef,
        shapes: Sequence[tuple[int, ...]],
        folded: frozenset[int],
    ) -> None:
        small = [_small(shape) for shape in shapes]
        kept = [i for i in range(len(shapes)) if i not in folded]
        self.depends_on_sizes = _depends_on_sizes(optimizer, structure, shapes, small)
        full = _Run(optimizer, structure, list(range(len(shapes))), small)
        reduced = _Run(optimizer, structure, kept, small)
        numbers = 1.0 + _random((_STEPS,), 0)
        self.pattern = [_random(shape, 1, i) for i, shape in enumerate(small)]
        steady = [np.multiply.outer(numbers, pattern) for pattern in self.pattern]
        other = [_random((_STEPS, *shape), 2, i) for i, shape in enumerate(small)]
        self.idle = full(3, [np.zeros_like(g) for g in steady])
        self.steady = full(3, steady)
        self.scaled = [_divided(full(3, [s * g for g in steady]), s) for s in _SCALES]
        self.elsewhere = full(4, steady)
        self.other = full(3, other)
        self.both = full(3, [a + b for a, b in zip(steady, other, strict=True)])
        self.reduced = reduced(3, steady)

    def fault(self, group: Sequence[int]) -> str | None:
        """What is wrong with a group of leaves."""
        size = max(np.max(np.abs(self.steady[i])) for i in group)
        if not np.isfinite(size) or size == 0:
            return "it does not move them, or not by finite steps"
        if any(np.max(np.abs(self.idle[i])) > _TOLERANCE * size for i in group):
            return (
                "it moves weights whose gradient is zero, as weight decay does, which shrinks the "
                "constants of the laws"
            )
        wrong = {
            "its updates are not proportional to the size of the gradients": self._by_size(group),
            "its updates depend on the weights": _gap(self.elsewhere, self.steady, group),
            "its updates are not linear in the gradients": self._by_sum(group),
            "it treats entries or leaves of one chain differently": self._by_entry(group),
            "it moves the survivor differently without the folded leaves": self._by_tree(group),
            "it treats leaves differently at their real sizes": float(self.depends_on_sizes),
        }
        return next((reason for reason, gap in wrong.items() if not gap <= _TOLERANCE), None)

    def _by_size(self, group: Sequence[int]) -> float:
        return max(_gap(scaled, self.steady, group) for scaled in self.scaled)

    def _by_sum(self, group: Sequence[int]) -> float:
        added = [a + b for a, b in zip(self.steady, self.other, strict=True)]
        return _gap(self.both, added, group)

    def _by_entry(self, group: Sequence[int]) -> float:
        """How far the updates are from the pattern times one number a step for all leaves."""
        first = self.pattern[group[0]]
        numbers = self.steady[group[0]].reshape(_STEPS, -1) @ first.ravel() / np.sum(first**2)
        alike = [np.multiply.outer(numbers, pattern) for pattern in self.pattern]
        return _gap(self.steady, alike, group)

    def _by_tree(self, group: Sequence[int]) -> float:
        left = [i for i in group if self.reduced[i] is not None]
        return _gap(self.reduced, self.steady, left)


def _gap(found: Sequence[Any], wanted: Sequence[Any], group: Sequence[int]) -> float:
    """The largest difference of updates, relative to the largest update."""
    size = max(np.max(np.abs(wanted[i])) for i in group)
    gap = max(np.max(np.abs(found[i] - wanted[i])) for i in group)
    return float(gap / max(size, np.finfo(float).tiny))


def _divided(updates: Sequence[Any], scale: float) -> list[Any]:
    return [u / scale for u in updates]


class _Run:
    """Trains the leaves of a tree that are kept on given gradients."""

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        structure: jax.tree_util.PyTreeDef,
        kept: Sequence[int],
        shapes: Sequence[tuple[int, ...]],
    ) -> None:
        self.kept, self.shapes, self.structure = kept, shapes, structure

        def step(carry: Any, gradient: Any) -> Any:
            weights, state = carry
            updates, state = optimizer.update(gradient, state, weights)
            return (optax.apply_updates(weights, updates), state), updates

        def train(weights: Any, gradients: Any) -> Any:
            start = (weights, optimizer.init(weights))
            later, _ = jax.eval_shape(step, start, jax.tree.map(lambda g: g[0], gradients))
            # some optimizers start in float32 what they continue in the weights' dtype
            start = jax.tree.map(lambda now, then: jnp.asarray(now, then.dtype), start, later)
            return jax.lax.scan(step, start, gradients)[1]

        self.train = jax.jit(train)

    def __call__(self, seed: int, gradients: Sequence[Any]) -> list[Any]:
        """The updates, shape ``(steps, *shape)`` for each leaf, None for those not kept."""
        weights = self._tree([_random(shape, seed, i) for i, shape in enumerate(self.shapes)])
        updates = jax.tree.leaves(self.train(weights, self._tree(gradients)))
        found: list[Any] = [None] * len(self.shapes)
        for i, update in zip(self.kept, updates, strict=True):
            found[i] = np.asarray(update, np.float64)
        return found

    def _tree(self, leaves: Sequence[Any]) -> Any:
        kept = [jnp.asarray(x) if i in self.kept else None for i, x in enumerate(leaves)]
        return jax.tree.unflatten(self.structure, kept)


def _small(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(min(size, _SIZES[axis % 3]) for axis, size in enumerate(shape))


def _random(shape: Sequence[int], *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _depends_on_sizes(
    optimizer: optax.GradientTransformation,
    structure: jax.tree_util.PyTreeDef,
    shapes: Sequence[tuple[int, ...]],
    small: Sequence[tuple[int, ...]],
) -> bool:
    """Whether the optimizer's program is another one at the real sizes."""
    programs = []
    for sizes in (shapes, small):
        leaves = [jax.ShapeDtypeStruct(shape, jnp.float64) for shape in sizes]
        tree = jax.tree.unflatten(structure, leaves)
        traced = jax.make_jaxpr(lambda w, g: optimizer.update(g, optimizer.init(w), w))(tree, tree)
        programs.append(list(operations(traced, numbers=True)))
    return programs[0] != programs[1]
