"""Union-find, with sides: which things belong together, and on which of two sides each stands."""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

__all__ = ["Clusters"]

T = TypeVar("T", bound=Hashable)


class Clusters(Generic[T]):
    """Sets of things that grow together.

    Example:
      >>> clusters = Clusters("abcd")
      >>> clusters.join("a", "b", opposite=True)
      >>> clusters.join("b", "c", opposite=True)
      >>> clusters.groups()
      [['a', 'b', 'c'], ['d']]
      >>> [clusters.side(x) for x in "abc"]
      [False, True, False]
    """

    def __init__(self, things: Iterable[T] = ()) -> None:
        self._parent: dict[T, tuple[T, bool]] = {thing: (thing, False) for thing in things}
        self._torn: set[T] = set()

    def add(self, thing: T) -> None:
        """Puts a thing into a set of its own, unless it is known."""
        self._parent.setdefault(thing, (thing, False))

    def find(self, thing: T) -> T:
        """The representative of the thing's set."""
        return self._find(thing)[0]

    def side(self, thing: T) -> bool:
        """Whether the thing stands opposite to the representative of its set."""
        return self._find(thing)[1]

    def _find(self, thing: T) -> tuple[T, bool]:
        path = []
        flipped = False
        while self._parent[thing][0] != thing:
            path.append((thing, flipped))
            thing, step = self._parent[thing]
            flipped ^= step
        for passed, before in path:
            self._parent[passed] = (thing, flipped ^ before)
        return thing, flipped

    def join(self, a: T, b: T, *, opposite: bool = False) -> None:
        """Puts two things into one set, on one side or on opposite sides."""
        self.add(a)
        self.add(b)
        (root_a, side_a), (root_b, side_b) = self._find(a), self._find(b)
        differ = side_a ^ side_b ^ opposite
        if root_a != root_b:
            self._parent[root_b] = (root_a, differ)
            if root_b in self._torn:
                self._torn.add(root_a)
        elif differ:
            self._torn.add(root_a)

    def is_torn(self, thing: T) -> bool:
        """Whether the thing's set was joined inconsistently, so that its sides mean nothing."""
        return self.find(thing) in self._torn

    def groups(self) -> list[list[T]]:
        """The sets, in the order in which their first members became known."""
        found: dict[T, list[T]] = {}
        for thing in self._parent:
            found.setdefault(self.find(thing), []).append(thing)
        return list(found.values())
