"""From which values the arguments of steps are drawn, and which of them are simpler."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

Rng = np.random.Generator


class Domain(Protocol):
    """The values an argument can take."""

    def draw(self, rng: Rng, zeros: float) -> Any:
        """A value; ``zeros`` is the probability that a size is zero."""

    def simplest(self) -> Any:
        """The value that is simpler than all others."""

    def simpler(self, value: Any) -> Iterator[Any]:
        """Values that are simpler than this one, the simplest first."""


@dataclasses.dataclass(frozen=True)
class Among:
    """One of some options, the simplest first."""

    options: Sequence[Any]

    def draw(self, rng: Rng, zeros: float) -> Any:
        del zeros
        return self.options[rng.integers(len(self.options))]

    def simplest(self) -> Any:
        return self.options[0]

    def simpler(self, value: Any) -> Iterator[Any]:
        yield from itertools.takewhile(lambda option: option != value, self.options)


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of an axis: often one, sometimes none, and numbers that divide one another."""

    def draw(self, rng: Rng, zeros: float) -> int:
        if rng.random() < zeros:
            return 0
        return int(rng.choice((1, 1, 2, 2, 3, 4, 4, 5, 6, 8)))

    def simplest(self) -> Any:
        return 2

    def simpler(self, value: int) -> Iterator[int]:
        yield from itertools.takewhile(lambda n: n != value, (2, 1, 3))


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of some axes."""

    fewest: int
    most: int

    def draw(self, rng: Rng, zeros: float) -> tuple[int, ...]:
        count = int(rng.integers(self.fewest, self.most + 1))
        return tuple(Size().draw(rng, zeros) for _ in range(count))

    def simplest(self) -> Any:
        return (2,) * self.fewest

    def simpler(self, value: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(value) > self.fewest:
            yield from (value[:i] + value[i + 1 :] for i in range(len(value)))
        for i, n in enumerate(value):
            yield from ((*value[:i], m, *value[i + 1 :]) for m in Size().simpler(n))


@dataclasses.dataclass(frozen=True)
class Each:
    """One value of a domain for each of some axes."""

    count: int
    domain: Among

    def draw(self, rng: Rng, zeros: float) -> tuple[Any, ...]:
        return tuple(self.domain.draw(rng, zeros) for _ in range(self.count))

    def simplest(self) -> Any:
        return (self.domain.options[0],) * self.count

    def simpler(self, value: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        plainest = (self.domain.options[0],) * self.count
        if value != plainest:
            yield plainest
        for i, v in enumerate(value):
            yield from ((*value[:i], s, *value[i + 1 :]) for s in self.domain.simpler(v))


@dataclasses.dataclass(frozen=True)
class Some:
    """Some of the options, in any order."""

    options: Sequence[Any]
    most: int

    def draw(self, rng: Rng, zeros: float) -> tuple[Any, ...]:
        del zeros
        count = int(rng.integers(0, self.most + 1))
        chosen = rng.choice(len(self.options), size=count, replace=False)
        return tuple(self.options[i] for i in chosen)

    def simplest(self) -> Any:
        return ()

    def simpler(self, value: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        yield from (value[:i] + value[i + 1 :] for i in range(len(value)))


SIZE = Size()
FLAG = Among((False, True))
AXIS = Among((-1, 0, 1, 2))
AXES = Among((1, 2, 4, 3, 8, 6, 5, 7, 15))
"""A set of axes: bit k stands for the k-th axis from the last."""
