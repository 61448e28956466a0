"""Which axes of which parameters stand on one hidden space.

Between two non-linear operations a hidden value ``h = x W_1`` is only ever read through a
contraction ``h W_2``. The hidden axes of ``W_1`` and ``W_2`` then carry one label, and so do
biases, branches that are added, identity edges and tied uses: they form one *space*, in which any
orthonormal change of coordinates leaves the network as it is. Products of two activations are
contractions too: queries meet keys in one space, and the mixing of values leaves theirs alone. An
axis that something reads entry by entry (a non-linear operation, a gain, a slice, an output) is
*pinned*: its coordinates have a meaning.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fcjax.clusters import Clusters
from fcjax.expressions.terms import Expr, Factor, Label, Term
from fcjax.expressions.written import Written, handed_over
from fcjax.tracing.trace import Equation, Value

__all__ = ["Node", "Place", "Source", "Space", "Spaces", "find", "inner_owners"]

Splits = tuple[tuple[int, ...], ...]
"""For each axis of an array, the sizes of the pieces it is split into."""
SLICED = (0,)
"""Stands among the ways in which an axis is split if anything reads a part of it."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A piece of an axis of a parameter (by number) or of a value that is computed."""

    owner: int | Value
    axis: int
    piece: int


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a space stands in a parameter.

    Attributes:
      leaf: the number of the parameter.
      piece: the piece of its axes, numbered through, that the space is.
      reads: on which of two sides of the space it stands: what writes the space and what reads it.
    """

    leaf: int
    piece: int
    reads: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a space of inputs stands in an argument.

    Attributes:
      argument: the number of the array argument.
      splits: how its axes are split.
      pieces: the pieces that the space is made of.
    """

    argument: int
    splits: Splits
    pieces: tuple[int, ...]

    def rows(self, array: Any) -> Any:
        """The inputs as rows of the space, for any size of the first axis of the argument."""
        shape = [array.shape[0]] * len(self.splits[0]) + list(itertools.chain(*self.splits[1:]))
        order = [i for i in range(len(shape)) if i not in self.pieces] + list(self.pieces)
        size = math.prod(shape[i] for i in self.pieces)
        return array.reshape(shape).transpose(order).reshape(-1, size)


@dataclasses.dataclass(frozen=True)
class Space:
    """A hidden space, or one of inputs.

    Attributes:
      dimension: the number of coordinates.
      places: where it stands.
      sided: whether its places fall into writers and readers.
      depth: the number of leading axes, sliced by loops, each slice of which has its own basis.
      source: for a space of inputs, where these stand.
    """

    dimension: int
    places: tuple[Place, ...]
    sided: bool
    depth: int = 0
    source: Source | None = None


@dataclasses.dataclass(frozen=True)
class Spaces:
    """The spaces of a network.

    Attributes:
      splits: for each parameter, how its axes are split.
      found: the spaces.
      at: the number of the space that a node stands on; pinned nodes are left out.
      used: the parameters that anything reads.
    """

    splits: tuple[Splits, ...]
    found: tuple[Space, ...]
    at: Mapping[Node, int]
    used: frozenset[int]


def find(network: Written, count: int, arguments: Sequence[int] = ()) -> Spaces:
    """Finds the spaces of a network.

    Args:
      network: the network as written; the first ``count`` inputs are the parameters.
      count: the number of parameters.
      arguments: the numbers of the array arguments whose values are known to span less than all.
    """
    return _Search(network, count, arguments).spaces()


Owners = Mapping[Value, tuple[int, int]]
"""For a value that is a parameter, or a slice of it in a loop: its number and the axes sliced."""


def _owners_of(network: Written, owners: Owners) -> Iterator[tuple[Written, Owners]]:
    """The body and those inside it, with the parameters that their inputs are."""
    yield network, owners
    for i, bodies in network.nested.items():
        for inner in bodies:
            own = inner_owners(network.body.equations[i], inner, owners)
            yield from _owners_of(inner, own)


def inner_owners(equation: Equation, inner: Written, owners: Owners) -> Owners:
    """The parameters that the inputs of a body inside an equation are."""
    own = {}
    for value, atom, role in handed_over(equation, inner.body):
        if isinstance(atom, Value) and atom in owners and role != "carry":
            leaf, shift = owners[atom]
            own[value] = (leaf, shift + (role == "slice"))
    return own


@dataclasses.dataclass(frozen=True, eq=False)
class _Use:
    """A term of a root, with the nodes that the labels of its factors stand on.

    Attributes:
      expr: the expression that the term belongs to.
      term: the term.
      nodes: for each label, the factors that carry it (by position) and the node there, or None
        if it is pinned.
      root: for each free label the node of the value itself, or None if it is pinned.
    """

    expr: Expr
    term: Term
    nodes: dict[Label, list[tuple[int, Node | None]]]
    root: dict[Label, Node | None]


class _Search:
    """Joins the nodes that share a label and pins those that are read entry by entry."""

    def __init__(self, network: Written, count: int, arguments: Sequence[int]) -> None:
        self.avals = [v.aval for v in network.body.inputs[:count]]
        parameters = {v: (i, 0) for i, v in enumerate(network.body.inputs[:count])}
        self.bodies = list(_owners_of(network, parameters))
        self.inputs = {network.body.inputs[count + i]: i for i in arguments}
        self.splits: dict[tuple[int | Value, int], set[tuple[int, ...]]] = {}
        self.clusters: Clusters[Node] = Clusters()
        self.pinned: set[Node] = set()
        self.looped: dict[Node, set[int]] = {}
        self.read_whole = {i for i, aval in enumerate(self.avals) if 0 in aval.shape}
        self.entrywise = {value for body, _ in self.bodies for value in body.entrywise}
        for body, owners in self.bodies:
            self._read_splits(body, owners)
        self._pin_cancelled()
        self.uses = [u for body, owners in self.bodies for u in self._read(body, owners)]
        for use in self.uses:
            self._join(use)
        while self._open_cycle():
            pass

    def _pin_cancelled(self) -> None:
        """Pins what cancels to nothing: no term says which axes of other values have its sizes."""
        in_terms = {owner for owner, _ in self.splits}
        for body, owners in self.bodies:
            for equation in body.body.equations:
                made = [body.computed[v] for v in equation.outputs if v in body.computed]
                if made and not any(expr.terms for expr in made):
                    self.entrywise.update(equation.values)
                for value in equation.values:
                    if value in owners and owners[value][0] not in in_terms:
                        self.read_whole.add(owners[value][0])

    # --- how axes are split ---

    def _read_splits(self, body: Written, owners: Owners) -> None:
        for value in _read_whole(body):
            if value in owners:
                self.read_whole.add(owners[value][0])
        for value, expr in body.computed.items():
            for axis, labels in enumerate(expr.dims):
                self._note_split(value, axis, labels)
            for factor in itertools.chain.from_iterable(t.factors for t in expr.terms):
                owner, shift = owners.get(factor.leaf.var, (factor.leaf.var, 0))
                for axis, labels in enumerate(factor.axes):
                    self._note_split(owner, axis + shift, labels)
                    if factor.slices[axis] is not None:
                        self.splits[owner, axis + shift].add(SLICED)

    def _note_split(self, owner: int | Value, axis: int, labels: Sequence[Label]) -> None:
        sizes = tuple(label.size for label in labels)
        self.splits.setdefault((owner, axis), set()).add(sizes)

    def _split(self, leaf: int) -> Splits:
        """The splits of a parameter; an axis that is split in several ways counts as whole."""
        found = []
        for axis, size in enumerate(self.avals[leaf].shape):
            whole = (size,) if size != 1 else ()
            ways = self.splits.get((leaf, axis), {whole})
            found.append(next(iter(ways)) if len(ways) == 1 else whole)
        return tuple(found)

    # --- nodes ---

    def _read(self, body: Written, owners: Owners) -> Iterator[_Use]:
        for value, expr in body.computed.items():
            computed = value not in self.entrywise
            root = {
                label: self._node(value, axis, piece) if computed else None
                for axis, labels in enumerate(expr.dims)
                for piece, label in enumerate(labels)
            }
            for term in expr.terms:
                yield _Use(expr, term, self._nodes(term, body, owners), root)

    def _nodes(
        self, term: Term, body: Written, owners: Owners
    ) -> dict[Label, list[tuple[int, Node | None]]]:
        nodes: dict[Label, list[tuple[int, Node | None]]] = {}
        for k, factor in enumerate(term.factors):
            for axis, labels in enumerate(factor.axes):
                for piece, label in enumerate(labels):
                    node = self._of_factor(factor, axis, piece, body, owners)
                    nodes.setdefault(label, []).append((k, node))
        return nodes

    def _of_factor(
        self, factor: Factor, axis: int, piece: int, body: Written, owners: Owners
    ) -> Node | None:
        var = factor.leaf.var
        if var in owners:
            leaf, shift = owners[var]
            node = self._node(leaf, axis + shift, piece)
            if node is not None:
                self.looped.setdefault(node, set()).add(shift)
            return node
        free = var in body.computed and var not in self.entrywise
        return self._node(var, axis, piece) if free else None

    def _node(self, owner: int | Value, axis: int, piece: int) -> Node | None:
        if owner in self.read_whole or len(self.splits[owner, axis]) > 1:
            return None
        node = Node(owner, axis, piece)
        self.clusters.add(node)
        return node

    # --- joining and pinning ---

    def _join(self, use: _Use) -> None:
        """Applies what one term says about the nodes that share its labels."""
        special = frozenset().union(
            *(w.labels for w in use.term.windows), *(f.centred for f in use.term.factors)
        )
        for label, node in use.root.items():
            carriers = use.nodes.get(label, [])
            self._relate(node, [n for _, n in carriers], label in special)
        for label, carriers in use.nodes.items():
            if label in use.expr.free:
                continue
            (k, first), *others = carriers
            elsewhere = [n for other, n in others if other != k]
            self._relate(first, elsewhere if len(elsewhere) == len(others) else [],
                         label in special, opposite=True)  # fmt: skip

    def _relate(
        self,
        node: Node | None,
        others: Sequence[Node | None],
        special: bool,
        *,
        opposite: bool = False,
    ) -> None:
        """Joins a node with the one other that carries its label, or pins them all."""
        both = [n for n in (node, *others) if n is not None]
        if len(others) == 1 and not special and len(both) == 2:
            self.clusters.join(both[0], both[1], opposite=opposite)
        else:
            self.pinned.update(both)

    def _is_open(self, node: Node | None) -> bool:
        return node is not None and self.clusters.find(node) not in self._closed

    def _open_cycle(self) -> bool:
        """Pins a label that closes a cycle of contractions, as in ``tr(W_1 W_2)``.

        Along a cycle the gradient of a factor is no product of a vector of each of its spaces.
        """
        self._closed = {self.clusters.find(node) for node in self.pinned}
        for use in self.uses:
            linked: Clusters[int] = Clusters(range(len(use.term.factors)))
            for label in sorted(use.nodes, key=lambda x: -x.size):
                carriers = use.nodes[label]
                if label in use.expr.free or not all(self._is_open(n) for _, n in carriers):
                    continue
                (a, node), (b, _) = carriers
                if linked.find(a) == linked.find(b):
                    assert node is not None
                    self.pinned.add(node)
                    return True
                linked.join(a, b)
        return False

    # --- what was found ---

    def spaces(self) -> Spaces:
        splits = [self._split(leaf) for leaf in range(len(self.avals))]
        inputs = self._of_inputs(splits)
        whole = {where for places in inputs.values() for where in places}
        layout = tuple(
            tuple(
                (math.prod(sizes),) if (leaf, axis) in whole else sizes
                for axis, sizes in enumerate(split)
            )
            for leaf, split in enumerate(splits)
        )
        found: list[Space] = []
        at: dict[Node, int] = {}
        for group in self.clusters.groups():
            nodes = [(n, n.owner) for n in group if isinstance(n.owner, int)]
            if nodes and self.clusters.find(group[0]) not in self._closed:
                at.update(dict.fromkeys(group, len(found)))
                found.append(self._hidden(nodes, layout))
        for source, places in inputs.items():
            for leaf, axis in places:
                at |= {Node(leaf, axis, i): len(found) for i in range(len(splits[leaf][axis]))}
            at_pieces = tuple(Place(leaf, _piece(layout[leaf], axis, 0)) for leaf, axis in places)
            found.append(
                Space(math.prod(_sizes(source)), at_pieces, sided=True, depth=0, source=source)
            )
        return Spaces(layout, tuple(found), at, self._used())

    def _used(self) -> frozenset[int]:
        in_expressions = {owner for owner, _ in self.splits if isinstance(owner, int)}
        return frozenset(in_expressions | self.read_whole)

    def _hidden(self, nodes: Sequence[tuple[Node, int]], splits: tuple[Splits, ...]) -> Space:
        first, leaf = nodes[0]
        places = tuple(
            Place(leaf, _piece(splits[leaf], n.axis, n.piece), self.clusters.side(n))
            for n, leaf in nodes
        )
        depths = set().union(*(self.looped[n] for n, _ in nodes))
        return Space(
            splits[leaf][first.axis][first.piece],
            places,
            sided=not self.clusters.is_torn(first),
            depth=depths.pop() if len(depths) == 1 else 0,
        )

    # --- spaces of inputs ---

    def _of_inputs(self, splits: Sequence[Splits]) -> dict[Source, list[tuple[int, int]]]:
        """The axes of parameters that only meet the inputs of one argument, by where in it."""
        met: dict[tuple[int, int], set[Source | None]] = {}
        body, owners = self.bodies[0]
        for expr in body.roots.values():
            for term in expr.terms:
                for k, factor in enumerate(term.factors):
                    if factor.leaf.var not in owners:
                        continue
                    leaf, _ = owners[factor.leaf.var]
                    for axis in range(len(factor.axes)):
                        source = self._source(expr, term, k, axis)
                        met.setdefault((leaf, axis), set()).add(source)
        inside = {leaf for _, owned in self.bodies[1:] for leaf, _ in owned.values()}
        found: dict[Source, list[tuple[int, int]]] = {}
        for (leaf, axis), sources in met.items():
            (source, *more) = sources
            if source is None or more or leaf in inside or leaf in self.read_whole:
                continue
            if splits[leaf][axis] == _sizes(source):
                found.setdefault(source, []).append((leaf, axis))
        return found

    def _source(self, expr: Expr, term: Term, k: int, axis: int) -> Source | None:
        """Where in an argument the labels of a parameter's axis stand, if only there."""
        labels = term.factors[k].axes[axis]
        others = [f for i, f in enumerate(term.factors) if i != k and f.labels & set(labels)]
        special = frozenset().union(*(w.labels for w in term.windows), expr.free)
        if not labels or len(others) != 1 or special & set(labels):
            return None
        (data,) = others
        given = self.inputs.get(data.leaf.var)
        whole = all(view is None for view in (*data.slices, term.factors[k].slices[axis]))
        flat = list(itertools.chain.from_iterable(data.axes))
        if given is None or not whole or data.centred & set(labels) or not set(labels) <= set(flat):
            return None
        own = itertools.chain.from_iterable(term.factors[k].axes)
        if sum(label in labels for label in own) > len(labels):
            return None
        splits = tuple(tuple(label.size for label in axis) for axis in data.axes)
        pieces = tuple(flat.index(label) for label in labels)
        if len(splits[0]) > 1 or min(pieces) < len(splits[0]):
            return None  # the first axis numbers examples
        return Source(given, splits, pieces)


def _sizes(source: Source) -> tuple[int, ...]:
    flat = list(itertools.chain.from_iterable(source.splits))
    return tuple(flat[i] for i in source.pieces)


def _piece(splits: Splits, axis: int, piece: int) -> int:
    """The number of a piece, counted through all axes."""
    return sum(len(s) for s in splits[:axis]) + piece


def _read_whole(body: Written) -> set[Value]:
    """Values that something else than an expression or a nested body reads, or that are results."""
    found = {a for a in body.body.outputs if isinstance(a, Value)}
    for i, equation in enumerate(body.body.equations):
        if equation not in body.boundaries:
            continue
        handed: set[Value] = set()
        for inner in body.nested.get(i, ()):
            for _, atom, role in handed_over(equation, inner.body):
                if isinstance(atom, Value) and role != "carry":
                    handed.add(atom)
                elif isinstance(atom, Value):
                    found.add(atom)
        found.update(set(equation.values) - handed)
    return found
