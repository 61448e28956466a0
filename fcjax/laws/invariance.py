"""Symmetries that a network on numbers has.

A symmetry moves the parameters without changing what the network computes, so no output has a
derivative in its direction. One evaluation tries all of them together, each by a random amount; one
that a mistake in reading the network made up is found by itself and left out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcjax.laws.units import Place, Symmetry
from fcjax.numbers.drawing import Draw, moving, settled, slope, still
from fcjax.numbers.interpreter import Interpreter, Unevaluated
from fcjax.tracing.trace import Body

__all__ = ["invariant"]

Array = np.ndarray[Any, Any]
MOVED = 0.02
"""How far the parameters are off their values, relative to their size: no bias is zero."""
CLOSE = 1e-6
"""How much of the derivative in any direction is rounding: a cast to float32 leaves 1e-7, one to
bfloat16 4e-3, so what is computed or stored in half precision has no laws."""


def invariant(
    body: Body, symmetries: Sequence[Symmetry], leaves: Sequence[Any]
) -> tuple[Symmetry, ...]:
    """Those symmetries that no output of the network contradicts.

    Args:
      body: the network; its first inputs are the parameters.
      symmetries: what was found by reading it.
      leaves: the parameters; where their values are not known, nothing is left out.
    """
    symmetries = [s for s in symmetries if all(_is_exact(leaves[p.leaf]) for p in s.places)]
    if not symmetries or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return tuple(symmetries)
    check = _Check(body, [_off(leaf) for leaf in leaves])
    try:
        if check.holds(symmetries):
            return tuple(symmetries)
        return tuple(symmetry for symmetry in symmetries if check.holds([symmetry]))
    except Unevaluated:
        return tuple(symmetries)


def _is_exact(leaf: Any) -> bool:
    """Whether a parameter is stored in full precision, so that its gradient does not round more."""
    return bool(jnp.finfo(jnp.result_type(leaf)).eps <= CLOSE)


def _off(leaf: Any) -> Any:
    if jnp.result_type(leaf) not in (jnp.float32, jnp.float64):
        return leaf
    array = np.asarray(leaf)
    size = float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0
    return array + MOVED * (size or 1.0) * np.random.default_rng(0).standard_normal(array.shape)


class _Check:
    """Evaluates the network along directions of its parameters."""

    def __init__(self, body: Body, leaves: Sequence[Array]) -> None:
        self.body = body
        self.leaves = leaves

    def holds(self, symmetries: Sequence[Symmetry]) -> bool:
        """Whether no output changes, to first order, if all these move the parameters."""
        along = self._along(symmetries)
        rng = np.random.default_rng(1)
        beside = {i: by * rng.standard_normal(by.shape) for i, by in along.items()}
        found, usual = (settled(functools.partial(self._slope, by)) for by in (along, beside))
        return bool(found <= CLOSE * usual)

    def _along(self, symmetries: Sequence[Symmetry]) -> dict[int, Array]:
        """How these symmetries move each parameter, by random amounts."""
        moved: dict[int, Array] = {}
        for k, symmetry in enumerate(symmetries):
            by = _amounts(symmetry, k)
            for place in symmetry.places:
                step = _step(place, self.leaves[place.leaf], by)
                moved[place.leaf] = moved.get(place.leaf, 0.0) + step
        return moved

    def _slope(self, by: dict[int, Array], draw: Draw) -> float:
        """The largest derivative of an output."""
        draw.run.rounds = True
        interpreter = Interpreter(draw.run)
        count = len(self.leaves)
        given = [interpreter.whole(x) for x in self.leaves]
        for i, step in by.items():
            given[i] = moving(given[i], step)
        given += [still(draw(value)) for value in self.body.inputs[count:]]
        return max(map(slope, interpreter.results(self.body, given)), default=0.0)


def _amounts(symmetry: Symmetry, seed: int) -> Array:
    """For each block of units a matrix that mixes them, of size 1 where they only scale."""
    blocks, size = symmetry.mixing
    return np.random.default_rng(seed).standard_normal((blocks, size, size))


def _step(place: Place, leaf: Array, by: Array) -> Array:
    """How mixing units moves a parameter: one side by the matrix, the other by its transpose."""
    if place.charge < 0:
        by = by.swapaxes(1, 2)
    rows = place.rows(leaf)
    mixed = np.einsum("bij,bje->bie", by, rows.reshape(*by.shape[:2], rows.shape[-1]))
    step = np.zeros(leaf.size)
    step[place.rows(np.arange(leaf.size).reshape(leaf.shape))] = mixed.reshape(rows.shape)
    return float(place.charge) * step.reshape(leaf.shape)
