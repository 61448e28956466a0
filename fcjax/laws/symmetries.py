"""Which hidden units of a network can be scaled, or mixed, without changing what it computes.

If a network computes the same when the incoming weights of a hidden unit are multiplied by c > 0
and its outgoing weights divided by c^p, this is a symmetry of every loss. Noether's argument then
gives a law of gradient flow: the gradient is orthogonal to the direction of the symmetry, so
``|in|^2 - p |out|^2`` does not change. Between linear layers any invertible mixing of the units is
a symmetry, and the law is a matrix.

The symmetries are the solutions of the equations that ``scaling`` collects: charges, one for each
axis of each array. A solution whose support is touched only by strong facts is a mixing.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import jax.numpy as jnp

from fcjax.clusters import Clusters
from fcjax.laws import scaling, scaling_rules
from fcjax.laws.charges import Charges
from fcjax.laws.dims import Dim, Dims, Form, Opened
from fcjax.laws.scaling import Axis, Same, Stacked
from fcjax.laws.units import Place, Symmetry
from fcjax.tracing.trace import Body, Kind, Value

__all__ = ["find"]


def find(body: Body, kinds: Sequence[Kind]) -> tuple[Symmetry, ...]:
    """Finds the symmetries of a network, from its input to its output.

    Args:
      body: the network.
      kinds: what each of its inputs is; only trainable parameters take part in symmetries.

    Example:
      >>> import jax
      >>> from fcjax.tracing import trace
      >>> kinds = [Kind("param", True), Kind("param", True), Kind("data", False)]
      >>> net = lambda v, w, x: jax.nn.relu(x @ v) @ w
      >>> shapes = [jnp.ones(s) for s in ((3, 4), (4, 1), (5, 3))]
      >>> (found,) = find(trace.flatten(jax.make_jaxpr(net)(*shapes)), kinds)
      >>> found.mixed, found.units, [(p.leaf, p.axis, int(p.charge)) for p in found.places]
      (0, (4,), [(0, 1, 1), (1, 0, -1)])
    """
    return _Search(body, kinds).symmetries()


@dataclasses.dataclass(frozen=True)
class _Group:
    """A symmetry in terms of nodes.

    Attributes:
      charges: the charges of the nodes in parameters, in order.
      axes: for each of them, the nodes of its array that number the units.
      mixed: how many of these, from the last, may be mixed.
    """

    charges: dict[int, Fraction]
    axes: tuple[tuple[int, ...], ...]
    mixed: int

    def joined(self, other: "_Group") -> "_Group":
        """One group for two of the same units: mixed along both axes if each may be mixed."""
        if self.mixed and other.mixed and len(self.axes[0]) == 2:
            return dataclasses.replace(self, mixed=2)
        return self if self.mixed else other


Node = tuple[Value, int, int]
"""A value, an axis of it, and one of the dims that the axis is made of."""
Solution = Mapping[int, Fraction]


class _Search:
    """From the facts about single equations to the symmetries of the network."""

    def __init__(self, body: Body, kinds: Sequence[Kind]) -> None:
        given = list(zip(body.inputs, kinds, strict=True))
        self.leaves = {v: i for i, (v, k) in enumerate(given) if k.of == "param" and k.trainable}
        fixed = [v for v, _ in given if v not in self.leaves]
        self.reading = scaling_rules.read(body, fixed, [v for v, k in given if k.of == "data"])
        self.steps = self.reading.steps
        self.dims = Dims()
        self.dim_of: dict[Axis, Dim] = {}
        for fact in (fact for step in self.steps for fact in step):
            self._unify(fact)
        self.numbers: dict[Node, int] = {}
        self.nodes: list[Node] = []
        for value, axis in list(self.dim_of):
            for k in range(len(self.dims.leaves(self.dim_of[value, axis]))):
                self.numbers[value, axis, k] = len(self.nodes)
                self.nodes.append((value, axis, k))
        self.charges = Charges(len(self.nodes))
        self.weak: set[int] = set()
        self.touching: dict[int, list[int]] = {}
        self.links: list[list[tuple[int, int]]] = []
        self._collect()

    # --- dims ---

    def _dim(self, axis: Axis) -> Dim:
        if axis not in self.dim_of:
            self.dim_of[axis] = Dim(axis[0].shape[axis[1]])
        return self.dim_of[axis]

    def _unify(self, fact: scaling.Fact) -> None:
        match fact:
            case Same(terms):
                first, *others = (self._dim(axis) for axis, _ in terms)
                for other in others:
                    self.dims.unify(first, other)
            case scaling.Factored(axis, parts):
                self.dims.describe(
                    self._dim(axis), Form("product", tuple(self._dim(p) for p in parts))
                )
            case Stacked(axis, parts):
                made = tuple(Dim(p) if isinstance(p, int) else self._dim(p) for p in parts)
                self.dims.describe(self._dim(axis), Form("sum", made))
            case scaling.Zero(axis) | scaling.Touched(axis):
                self._dim(axis)

    # --- equations between charges ---

    def _numbers(self, axis: Axis) -> list[int]:
        count = len(self.dims.leaves(self._dim(axis)))
        return [self.numbers[(*axis, k)] for k in range(count)]

    def _collect(self) -> None:
        for number, (value, axis, _) in enumerate(self.nodes):
            opaque = self.dims.is_opaque(self.dim_of[value, axis])
            if opaque or not jnp.issubdtype(value.aval.dtype, jnp.floating):
                self.charges.pin(number)
        for position, step in enumerate(self.steps):
            self.links.append([])
            for fact in step:
                self._apply(fact)
            for number in {n for link in self.links[-1] for n in link}:
                self.touching.setdefault(number, []).append(position)

    def _apply(self, fact: scaling.Fact) -> None:
        match fact:
            case Same(terms, strong):
                columns = [self._numbers(axis) for axis, _ in terms]
                for row in zip(*columns, strict=True):
                    self._relate(row, [factor for _, factor in terms], strong)
            case scaling.Zero(axis):
                for number in self._numbers(axis):
                    self.charges.pin(number)
            case scaling.Touched(axis):
                self.weak.update(self._numbers(axis))
            case scaling.Factored(axis, parts) | Stacked(axis, parts):
                self._match(axis, parts)

    def _relate(self, row: Sequence[int], factors: Sequence[Fraction], strong: bool) -> None:
        equation: dict[int, Fraction] = {}
        for number, factor in zip(row, factors, strict=True):
            equation[number] = equation.get(number, Fraction(0)) + factor
        self.charges.add(equation)
        if not strong:
            self.weak.update(row)
        first, *others = row
        self.links[-1] += [(first, other) for other in others]

    def _match(self, axis: Axis, parts: Sequence[Axis | int]) -> None:
        """The dims of an axis are those of its parts in turn; else none of them may scale."""
        left = list(zip(self._numbers(axis), self.dims.leaves(self._dim(axis)), strict=True))
        pairs: list[tuple[int, int]] = []
        fits = not self.dims.is_opaque(self._dim(axis))
        for part in parts:
            if isinstance(part, int):
                while part > 0 and left:
                    part -= left.pop(0)[1].size
                fits &= part == 0
                continue
            leaves = self.dims.leaves(self._dim(part))
            taken, left = left[: len(leaves)], left[len(leaves) :]
            fits &= [leaf for _, leaf in taken] == leaves
            pairs += zip((number for number, _ in taken), self._numbers(part), strict=False)
        if fits and not left:
            for pair in pairs:
                self._relate(pair, (Fraction(1), Fraction(-1)), True)
            return
        for each in (axis, *(part for part in parts if not isinstance(part, int))):
            for number in self._numbers(each):
                self.charges.pin(number)

    # --- symmetries ---

    def symmetries(self) -> tuple[Symmetry, ...]:
        order = {value: i for i, value in enumerate(dict.fromkeys(v for v, *_ in self.nodes))}
        groups = []
        for solution in self.charges.solutions(self._freedom):
            is_read = any(n in self.touching for n in solution)
            if is_read and any(self.nodes[n][0] in self.leaves for n in solution):
                groups.append(self._group(solution, order))
        made = [self._symmetry(group) for group in self._independent(groups)]
        return tuple(symmetry for symmetry in made if symmetry.laws)

    def _freedom(self, number: int) -> float:
        """What depends on data determines the rest, so that laws relate adjacent layers."""
        is_data = self.nodes[number][0] in self.reading.data
        return number - len(self.nodes) * is_data

    def _group(self, solution: Solution, order: Mapping[Value, int]) -> "_Group":
        parameters = [n for n in solution if self.nodes[n][0] in self.leaves]
        parameters.sort(key=lambda n: (order[self.nodes[n][0]], n))
        lead = next((n for n in parameters if solution[n] > 0), parameters[0])
        unit = abs(solution[lead])
        mixing = self._size(lead) > 1 and all(
            abs(charge) == unit and n not in self.weak for n, charge in solution.items()
        )

        def place(column: Sequence[int]) -> tuple[int, int]:
            return self.nodes[column[0]][1:]

        columns = [[c[n] for n in parameters] for c in self._companions(solution)]
        columns = [*sorted(columns, key=place), parameters]
        if not mixing:
            columns.sort(key=place)
        charges = {n: solution[n] / unit for n in parameters}
        return _Group(charges, tuple(zip(*columns, strict=True)), int(mixing))

    def _independent(self, groups: Sequence["_Group"]) -> list["_Group"]:
        """The groups, without those whose laws are sums of the laws of another one."""
        kept: list[_Group] = []
        for group in groups:
            finer = [self._sums_to(other, group) for other in kept]
            coarser = [self._sums_to(group, other) for other in kept]
            equal = [i for i, both in enumerate(zip(finer, coarser, strict=True)) if all(both)]
            if equal:
                kept[equal[0]] = kept[equal[0]].joined(group)
            elif group.mixed or not any(finer):
                pairs = zip(kept, coarser, strict=True)
                kept = [other for other, implied in pairs if other.mixed or not implied]
                kept.append(group)
        return kept

    def _sums_to(self, finer: "_Group", group: "_Group") -> bool:
        """Whether a group of more units gives another one where it is summed over some of them."""
        arrays = [{self.nodes[n][0] for n in each.charges} for each in (finer, group)]
        if arrays[0] != arrays[1]:
            return False
        met = []
        for charge, axes in zip(group.charges.values(), group.axes, strict=True):
            parts = [
                (part, inner)
                for (part, q), inner in zip(finer.charges.items(), finer.axes, strict=True)
                if set(axes) <= set(inner) and q == charge
            ]
            if sum(self._entries(inner) for _, inner in parts) != self._entries(axes):
                return False
            met += [part for part, _ in parts]
        return set(met) == set(finer.charges)

    def _entries(self, numbers: Sequence[int]) -> int:
        """How many entries of an array stand at all of these nodes."""
        value, *_ = self.nodes[numbers[0]]
        wanted: dict[int, list[int]] = {}
        for _, axis, k in (self.nodes[n] for n in numbers):
            wanted.setdefault(axis, []).append(k)
        sizes = dict(enumerate(value.shape))
        sizes |= {
            axis: self.dims.extent(self.dim_of[value, axis], ks) for axis, ks in wanted.items()
        }
        return math.prod(sizes.values())

    def _symmetry(self, group: "_Group") -> Symmetry:
        sizes = [self._size(n) for n in group.axes[0]]
        kept = [i for i, size in enumerate(sizes) if size > 1] or [0]
        places = tuple(
            self._place(charge, [axes[i] for i in kept])
            for charge, axes in zip(group.charges.values(), group.axes, strict=True)
        )
        return Symmetry(tuple(sizes[i] for i in kept), group.mixed, places)

    def _size(self, number: int) -> int:
        value, axis, k = self.nodes[number]
        return self.dims.leaves(self.dim_of[value, axis])[k].size

    def _companions(self, solution: Solution) -> list[dict[int, int]]:
        """Other dims that stand beside the units in every array, so that each has its own group.

        Returns:
          For each such dim, the node beside each node of the solution.
        """
        pairs: Clusters[tuple[int, int]] = Clusters()
        for node in solution:
            for other in self._beside(node):
                pairs.add((node, other))
        broken: set[tuple[int, int]] = set()
        for position in sorted({p for n in solution for p in self.touching.get(n, ())}):
            self._follow(position, solution, pairs, broken)
        gone = {pairs.find(pair) for pair in broken}
        found: list[dict[int, int]] = []
        for group in pairs.groups():
            nodes = [node for node, _ in group]
            alone = len(set(nodes)) == len(nodes) == len(solution)
            if alone and pairs.find(group[0]) not in gone:
                one = dict(group)  # two parts that are stacked are beside a third, not each other
                if all(one[n] in self._beside(earlier[n]) for earlier in found for n in nodes):
                    found.append(one)
        return found

    def _beside(self, node: int) -> list[int]:
        """The other nodes of the same array."""
        value, axis, k = self.nodes[node]
        return [
            self.numbers[value, a, i]
            for a in range(len(value.shape))
            if (value, a) in self.dim_of
            for i in range(len(self.dims.leaves(self.dim_of[value, a])))
            if a != axis or (i != k and self.dims.extent(self.dim_of[value, a], (i, k)))
        ]

    def _follow(
        self,
        position: int,
        solution: Solution,
        pairs: Clusters[tuple[int, int]],
        broken: set[tuple[int, int]],
    ) -> None:
        """Joins what one equation indexes together; what it does not is no companion."""
        linked: Clusters[int] = Clusters()
        for a, b in self.links[position]:
            linked.join(a, b)
        groups = linked.groups()
        at = {n: i for i, group in enumerate(groups) for n in group}
        for group in groups:
            here = [n for n in group if n in solution]
            for n, m in itertools.permutations(here, 2):
                for other in self._beside(n):
                    partners = [p for p in self._beside(m) if p in at and at[p] == at.get(other)]
                    if len(partners) == 1 and other not in solution:
                        pairs.join((n, other), (m, partners[0]))
                    else:
                        broken.add((n, other))

    def _place(self, charge: Fraction, numbers: Sequence[int]) -> Place:
        """Where in a parameter the axes with these nodes stand."""
        value, *_ = self.nodes[numbers[0]]
        wanted: dict[int, list[int]] = {}
        for n in numbers:
            _, axis, k = self.nodes[n]
            wanted.setdefault(axis, []).append(k)
        views: list[Opened] = []
        at: dict[tuple[int, int], int] = {}
        shift = 0
        for axis, leaves in sorted(wanted.items()):
            leaves.sort()
            opened, positions = self.dims.open(self.dim_of[value, axis], axis + shift, leaves)
            at |= {(axis, k): p for k, p in zip(leaves, positions, strict=True)}
            shift += sum(len(view.sizes) - 1 for view in opened if view.sizes)
            views += opened
        axes = tuple(at[self.nodes[n][1:]] for n in numbers)
        return Place(self.leaves[value], charge, value.shape, tuple(views), axes)
