"""Copies and pickles of objects that hold compiled functions."""

import copy
from typing import Any, ClassVar

import jax

__all__ = ["Copied"]


class Copied:
    """An object that is copied and pickled without what can be made anew.

    Attributes:
      anew: the names of attributes that are left out: caches, and what is traced or compiled.
      mutable: the pytrees that a deep copy has copies of; the others never change.
    """

    anew: ClassVar[frozenset[str]]
    mutable: ClassVar[frozenset[str]]

    def begin_anew(self) -> None:
        """Makes the attributes that are left out, or what makes them when they are asked for."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self.anew}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.begin_anew()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = object.__new__(type(self))
        state = self.__getstate__()
        own = {
            name: jax.tree.map(lambda leaf: copy.deepcopy(leaf, memo), state[name])
            for name in self.mutable
        }
        made.__setstate__({**state, **own})
        return made
