"""Which axes of which arrays count the same thing, found by unification.

Every axis of every array has a *dim*. Two axes that an equation indexes together are one dim. A dim
can be a product of dims (an axis that a reshape splits) or a sum of dims (a concatenation, an
axis that is sliced). Where two such descriptions of one dim have no common refinement the dim is
*opaque*: nothing is claimed about it.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

__all__ = ["Dim", "Dims", "Form", "Opened"]

Kind = Literal["product", "sum"]


@dataclasses.dataclass(frozen=True, eq=False)
class Dim:
    """What an axis counts; identity is what tells two apart."""

    size: int


@dataclasses.dataclass(frozen=True)
class Opened:
    """A change of the view of an array: a part of an axis, or an axis split into several.

    Attributes:
      axis: the axis.
      sizes: the sizes that it is split into; empty if only a part of it is taken.
      part: the range that is taken.
    """

    axis: int
    sizes: tuple[int, ...] = ()
    part: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Form:
    """A dim made of others, in order: an axis of a reshape, or the parts of a concatenation."""

    kind: Kind
    parts: tuple[Dim, ...]


class Dims:
    """Dims that are found to be one, and what they are made of.

    Example:
      >>> dims, flat, heads = Dims(), Dim(12), Dim(3)
      >>> dims.describe(flat, Form("product", (heads, Dim(4))))
      >>> dims.describe(flat, Form("product", (Dim(3), Dim(2), Dim(2))))
      >>> [leaf.size for leaf in dims.leaves(flat)]
      [3, 2, 2]
      >>> dims.describe(flat, Form("sum", (Dim(6), Dim(6))))
      >>> dims.is_opaque(flat)
      True
    """

    def __init__(self) -> None:
        self._parent: dict[Dim, Dim] = {}
        self._forms: dict[Dim, Form] = {}
        self._opaque: set[Dim] = set()

    def find(self, dim: Dim) -> Dim:
        """The representative of all dims that are this one."""
        path = []
        while dim in self._parent:
            path.append(dim)
            dim = self._parent[dim]
        for passed in path:
            self._parent[passed] = dim
        return dim

    def unify(self, a: Dim, b: Dim) -> None:
        """Makes two dims of one size the same."""
        root, other = self.find(a), self.find(b)
        if root is other:
            return
        self._parent[other] = root
        if other in self._opaque:
            self._opaque.add(root)
        form = self._forms.pop(other, None)
        if form is not None:
            self.describe(root, form)

    def describe(self, dim: Dim, form: Form) -> None:
        """Says what a dim is made of; parts of a product have at least two elements."""
        root = self.find(dim)
        known = self._forms.setdefault(root, form)
        if known is form or root in self._opaque:
            return
        if known.kind != form.kind or not self._refine(form.kind, known.parts, form.parts):
            self._opaque.add(self.find(root))

    def _refine(self, kind: Kind, first: Sequence[Dim], second: Sequence[Dim]) -> bool:
        """Unifies two descriptions part by part, cutting the larger part where they differ."""
        a, b = list(first), list(second)
        while a and b:
            left, right = a.pop(0), b.pop(0)
            if left.size == right.size:
                self.unify(left, right)
                continue
            small, large, rest = (left, right, b) if left.size < right.size else (right, left, a)
            if kind == "product" and large.size % small.size:
                return False
            left_over = large.size // small.size if kind == "product" else large.size - small.size
            rest.insert(0, Dim(left_over))
            self.describe(large, Form(kind, (small, rest[0])))
        return True

    def is_opaque(self, dim: Dim) -> bool:
        """Whether nothing is known about the dim."""
        return self.find(dim) in self._opaque

    def form(self, dim: Dim) -> Form | None:
        """What a dim is made of, if it is made of others."""
        root = self.find(dim)
        return None if root in self._opaque else self._forms.get(root)

    def leaves(self, dim: Dim) -> list[Dim]:
        """The dims without parts that a dim is made of, in order."""
        form = self.form(dim)
        if form is None:
            return [self.find(dim)]
        found = [leaf for part in form.parts for leaf in self.leaves(part)]
        sizes = [part.size for part in form.parts]
        assert dim.size == (math.prod(sizes) if form.kind == "product" else sum(sizes))
        return found

    def _numbered(self, form: Form, wanted: Sequence[int]) -> Iterator[tuple[Dim, list[int], int]]:
        """The parts, with the wanted leaves that each has, counted from its own first leaf."""
        first = 0
        for part in form.parts:
            count = len(self.leaves(part))
            yield part, [k - first for k in wanted if first <= k < first + count], first
            first += count

    def extent(self, dim: Dim, wanted: Sequence[int]) -> int:
        """How many indices of a dim stand at all of some leaves: none at two that are stacked."""
        form = self.form(dim)
        if form is None or not wanted:
            return dim.size
        parts = list(self._numbered(form, wanted))
        if form.kind == "product":
            return math.prod(self.extent(part, inner) for part, inner, _ in parts)
        met = [(part, inner) for part, inner, _ in parts if inner]
        return self.extent(*met[0]) if len(met) == 1 else 0

    def open(
        self, dim: Dim, position: int, wanted: Sequence[int]
    ) -> tuple[list[Opened], list[int]]:
        """Opens an axis until some leaves of its dim, which coexist, are axes.

        Args:
          dim: what the axis counts.
          position: the number of the axis.
          wanted: the leaves, in ascending order.

        Returns:
          The views to take, and the numbers of the axes that are then the leaves.
        """
        form = self.form(dim)
        if form is None or not wanted:
            return [], [position] * len(wanted)
        views: list[Opened] = []
        found: list[int] = []
        if form.kind == "product":
            views.append(Opened(position, tuple(part.size for part in form.parts)))
        start = 0
        for part, inner, _ in self._numbered(form, wanted):
            if inner and form.kind == "sum":
                views.append(Opened(position, part=(start, start + part.size)))
            opened, at = self.open(part, position, inner)
            views += opened
            found += at
            position += (form.kind == "product") + sum(len(v.sizes) - 1 for v in opened if v.sizes)
            start += part.size
        return views, found
