"""Published models: a name, the package it comes from, and how to make it at small size."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

MODELS: dict[str, Model] = {}
"""All models by their names, once ``load`` has run."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A model as its package makes it.

    Attributes:
      apply: ``apply(params, state, *inputs)``, which returns any pytree.
      init: makes what is trained, and other arrays that the model brings along, such as running
        statistics.
      inputs: what it is called with.
    """

    apply: Callable[..., PyTree]
    init: Callable[[], tuple[PyTree, PyTree]]
    inputs: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Network:
    """A model with its numbers, all in one floating type."""

    apply: Callable[..., PyTree]
    params: PyTree
    state: PyTree
    inputs: tuple[Any, ...]

    def given_state(self, params: PyTree, *inputs: Any) -> PyTree:
        """The network for training: its state is closed over."""
        return self.apply(params, self.state, *inputs)

    def given_nothing(self, variables: tuple[PyTree, PyTree], *inputs: Any) -> PyTree:
        """The network for ``merge``: parameters and state are one tree."""
        return self.apply(*variables, *inputs)


@dataclasses.dataclass(frozen=True)
class Model:
    """A published model.

    Attributes:
      name: what it is called here.
      package: the package that it comes from.
      make: ``make(dtype, train)`` makes it for a floating type, for training or for inference.
      trains: whether it computes something else in training: dropout, batch statistics.
      batched: whether the first axis of every input is a batch.
    """

    name: str
    package: str
    make: Callable[[Any, bool], Made]
    trains: bool = False
    batched: bool = True

    @property
    def modes(self) -> tuple[bool, ...]:
        """For inference and, if that differs, for training."""
        return (False, True) if self.trains else (False,)

    def network(self, dtype: str, train: bool) -> Network:
        """The network in a floating type, always with the same numbers."""
        made = self.make(jnp.dtype(dtype), train)
        params, state = (as_type(tree, dtype) for tree in self._numbers)
        return Network(made.apply, params, state, as_type(made.inputs, dtype))

    @functools.cached_property
    def _numbers(self) -> tuple[PyTree, PyTree]:
        with jax.enable_x64(False):
            made = self.make(jnp.dtype("float32"), False)
            with jax.default_prng_impl("unsafe_rbg"):  # which compiles faster
                params, state = made.init()
        draw = np.random.default_rng(7)
        return off_initial(params, draw.normal), off_initial(state, draw.uniform)


def model(name: str, **how: Any) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Adds a model to ``MODELS``; its package is the module's name."""

    def add(make: Callable[..., Made]) -> Callable[..., Made]:
        package = make.__module__.rpartition(".")[2].replace("_", "-")
        MODELS[name] = Model(name, package, functools.cache(make), **how)
        return make

    return add


def load() -> None:
    """Imports all modules of ``packages``."""
    from . import packages

    for found in pkgutil.iter_modules(packages.__path__):
        importlib.import_module(f"{packages.__name__}.{found.name}")


def chosen(names: Sequence[str]) -> list[Model]:
    """The models of these names or packages, in this order; all where none is given.

    Raises:
      KeyError: if there is nothing of a name.
    """
    known = MODELS.values()
    found = {name: [m for m in known if name in (m.name, m.package)] for name in names}
    if unknown := [name for name, of in found.items() if not of]:
        raise KeyError(f"no model or package is called {', '.join(unknown)}")
    return [m for of in found.values() for m in of] or list(known)


# --- numbers ---


def is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def as_type(tree: PyTree, dtype: str) -> PyTree:
    """Floats in another type, rounded to single precision in any case."""

    def cast(x: Any) -> Any:
        if not is_float(x):
            return x
        single = np.asarray(x).astype(np.complex64 if jnp.iscomplexobj(x) else np.float32)
        return jnp.asarray(single.astype(np.result_type(dtype, single)))

    return jax.tree.map(cast, tree)


def off_initial(tree: PyTree, draw: Callable[..., Any]) -> PyTree:
    """Moves floats off their initial zeros and ones, so that no bias or gain is trivial.

    Args:
      tree: arrays.
      draw: makes random numbers of a size.
    """
    move = lambda x: np.asarray(x) + 0.05 * draw(size=np.shape(x)) if is_float(x) else x  # noqa: E731
    return jax.tree.map(move, tree)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal random numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def below(limit: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Random integers."""
    return np.random.default_rng(seed).integers(0, limit, shape).astype(np.int32)
