"""Many trainings by one optimizer side by side, on numpy arrays and without compiling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from fcjax.tracing.interpret import interpreted

__all__ = ["Trainings", "in_float64"]

Tree = Any


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """On the CPU, where many small operations are quick, and where float64 is at home.

    Example:
      >>> import jax.numpy as jnp
      >>> with in_float64():
      ...     print(jnp.ones(()).dtype)
      float64
    """
    with jax.enable_x64(True), jax.default_device(_cpu()):
        yield


def _cpu() -> jax.Device | None:
    """The CPU, or the default device where jax is told not to use the CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


class Trainings:
    """Trainings by one optimizer that do not know of each other.

    Every leaf has a leading axis of trainings, which the optimizer does not see.

    Attributes:
      weights: the weights after the steps so far.

    Raises:
      TypeError: if the optimizer's state has other types after each step.

    Example:
      >>> import numpy as np
      >>> two = Trainings(optax.sgd(0.5), {"w": np.ones((2, 3))})
      >>> two.step({"w": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 4.0]])})["w"].tolist()
      [[-0.5, -0.0, -0.0], [-0.0, -0.0, -2.0]]
      >>> two.weights["w"].tolist()
      [[0.5, 1.0, 1.0], [1.0, 1.0, -1.0]]
    """

    def __init__(self, optimizer: optax.GradientTransformation, weights: Tree) -> None:
        def update(weights: Tree, state: Tree, gradients: Tree) -> tuple[Tree, Tree, Tree]:
            updates, state = optimizer.update(gradients, state, weights)
            return optax.apply_updates(weights, updates), state, updates

        init, _ = _side_by_side(optimizer.init, weights)
        state = init(weights)
        self._update, (_, later, _) = _side_by_side(update, weights, state, weights)
        if _types(later) != _types(state):
            # some optimizers start in float32 what they continue in the weights' dtype
            state = jax.tree.map(_as_type, state, later)
            self._update, (_, again, _) = _side_by_side(update, weights, state, weights)
            if _types(again) != _types(later):
                raise TypeError("its state has other types after every step")
        self._start = weights, state
        self.begin()

    def begin(self) -> None:
        """Goes back to the weights that were given."""
        self.weights, self._state = self._start

    def step(self, gradients: Tree) -> Tree:
        """One step of each training; returns the updates."""
        self.weights, self._state, updates = self._update(self.weights, self._state, gradients)
        return updates


def _side_by_side(function: Callable[..., Tree], *trees: Tree) -> tuple[Callable[..., Tree], Tree]:
    """A function of trees for many trainings at once, and the types of its results."""
    traced, types = jax.make_jaxpr(jax.vmap(function), return_shape=True)(*trees)
    run, structure = interpreted(traced), jax.tree.structure(types)
    return lambda *trees: jax.tree.unflatten(structure, run(*jax.tree.leaves(trees))), types


def _types(tree: Tree) -> Tree:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def _as_type(now: Any, later: Any) -> Any:
    return now if now.dtype == later.dtype else now.astype(later.dtype)
