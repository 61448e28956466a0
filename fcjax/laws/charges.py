"""Homogeneous linear equations for charges: by how much each thing scales, up to a common factor.

Nearly all equations say that one charge is a multiple of another, so they are solved by
union-find with weights; the few that remain (products of two scaling things) by elimination.
"""

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction

__all__ = ["Charges", "null_space"]

Equation = dict[int, Fraction]
"""Coefficients of charges whose sum is zero."""


class Charges:
    """The solutions of a set of equations between numbered charges.

    Example:
      >>> charges = Charges(4)
      >>> one = Fraction(1)
      >>> charges.add({0: one, 1: -one})
      >>> charges.add({1: one, 2: one, 3: one})
      >>> [{k: int(q) for k, q in sorted(s.items())} for s in charges.solutions(lambda k: k)]
      [{0: 1, 1: 1, 3: -1}, {2: 1, 3: -1}]
    """

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))
        self._weight = [Fraction(1)] * count
        self._zero = [False] * count
        self._pending: list[Equation] = []

    def find(self, thing: int) -> tuple[int, Fraction]:
        """The representative of a charge, and the charge as a multiple of the representative's."""
        path = []
        while self._parent[thing] != thing:
            path.append(thing)
            thing = self._parent[thing]
        weight = Fraction(1)
        for passed in reversed(path):
            weight *= self._weight[passed]
            self._parent[passed], self._weight[passed] = thing, weight
        return thing, weight

    def pin(self, thing: int) -> None:
        """Says that a charge is zero."""
        self._zero[self.find(thing)[0]] = True

    def is_zero(self, thing: int) -> bool:
        """Whether a charge is known to be zero."""
        return self._zero[self.find(thing)[0]]

    def add(self, equation: Mapping[int, Fraction]) -> None:
        """Adds an equation."""
        if not self._apply(dict(equation)):
            self._pending.append(dict(equation))

    def _reduced(self, equation: Equation) -> Equation:
        """The equation between representatives, without what is zero."""
        found: Equation = {}
        for thing, factor in equation.items():
            root, weight = self.find(thing)
            if not self._zero[root]:
                found[root] = found.get(root, Fraction(0)) + factor * weight
        return {root: factor for root, factor in found.items() if factor}

    def _apply(self, equation: Equation) -> bool:
        """Uses an equation, unless it relates three charges or more."""
        match list(self._reduced(equation).items()):
            case []:
                return True
            case [(root, _)]:
                self._zero[root] = True
                return True
            case [(a, of_a), (b, of_b)]:
                self._parent[b], self._weight[b] = a, -of_a / of_b
                return True
        return False

    def _settle(self) -> list[Equation]:
        """Uses pending equations until none gets shorter; returns those left."""
        before = None
        while before != len(self._pending):
            before = len(self._pending)
            self._pending = [e for e in self._pending if not self._apply(e)]
        return [self._reduced(e) for e in self._pending]

    def solutions(self, order: Callable[[int], float]) -> list[Equation]:
        """A basis of all solutions.

        Args:
          order: a number for each charge. Of the charges that determine each other, those with the
            smallest are free: one is 1 in each solution, the others 0.

        Returns:
          The charges of each solution that are not zero.
        """
        left = self._settle()
        members: dict[int, list[int]] = {}
        for thing in range(len(self._parent)):
            if not self.is_zero(thing):
                members.setdefault(self.find(thing)[0], []).append(thing)
        first = {root: min(map(order, things)) for root, things in members.items()}
        roots = sorted(members, key=lambda root: (first[root], root))
        return [
            {
                thing: self.find(thing)[1] * factor
                for root, factor in solution.items()
                for thing in members[root]
            }
            for solution in null_space(left, roots)
        ]


def null_space(equations: Iterable[Equation], unknowns: list[int]) -> list[Equation]:
    """A basis of the solutions of equations; the earliest unknowns are the free ones.

    Example:
      >>> null_space([{0: Fraction(1), 1: Fraction(1), 2: Fraction(-2)}], [0, 1, 2])
      [{0: Fraction(1, 1), 2: Fraction(1, 2)}, {1: Fraction(1, 1), 2: Fraction(1, 2)}]
    """
    position = {unknown: i for i, unknown in enumerate(unknowns)}
    solved: dict[int, Equation] = {}  # the pivot in terms of the others
    for equation in equations:
        row = _substituted(equation, solved)
        if not row:
            continue
        pivot = max(row, key=lambda unknown: position[unknown])
        factor = row.pop(pivot)
        by = {unknown: -coefficient / factor for unknown, coefficient in row.items()}
        solved = {p: _substituted(r, {pivot: by}) for p, r in solved.items()}
        solved[pivot] = by
    basis = {unknown: {unknown: Fraction(1)} for unknown in unknowns if unknown not in solved}
    for pivot, row in solved.items():
        for unknown, coefficient in row.items():
            basis[unknown][pivot] = coefficient
    return list(basis.values())


def _substituted(row: Equation, solved: Mapping[int, Equation]) -> Equation:
    found: Equation = {}
    for unknown, coefficient in row.items():
        for by, factor in solved.get(unknown, {unknown: Fraction(1)}).items():
            found[by] = found.get(by, Fraction(0)) + coefficient * factor
    return {unknown: coefficient for unknown, coefficient in found.items() if coefficient}
