"""A network as written, with spaces replaced by the smaller ones in which it is trained.

The orthonormal bases cancel wherever two parameters meet on a space, so all that changes are the
sizes of labels; only where a parameter meets the inputs themselves does a basis stay, as a factor.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fcjax.errors import FrontContributionError
from fcjax.expressions.terms import Expr, Factor, Label
from fcjax.expressions.written import Written
from fcjax.rules import lookups
from fcjax.rules.compress import Compression
from fcjax.spaces.hidden import Node, Space, Spaces, find, inner_owners
from fcjax.tracing.trace import CONSTANT, Body, Equation, Value

__all__ = ["replaced", "rewritten"]

Owners = Mapping[Value, tuple[int, int]]


def rewritten(network: Written, compression: Compression, names: Sequence[str]) -> Written:
    """The network in reduced coordinates.

    Its inputs are the reduced parameters, the arguments, the bases of spaces of inputs, and the
    places of the rows of tables.

    Args:
      network: the network as written, for any call.
      compression: what is reduced.
      names: the names of the parameters, for messages.

    Raises:
      FrontContributionError: if this call reads a reduced space entry by entry.
    """
    sources = [compression.spaces.found[n].source for n in compression.sources]
    arguments = {s.argument for s in sources if s is not None}
    spaces = find(network, len(names), sorted(arguments))
    numbers = _matched(spaces, compression, names)
    writer = _Writer(spaces, numbers, compression, network.body.inputs[0].aval.dtype)
    owners = {v: (i, 0) for i, v in enumerate(network.body.inputs[: len(names)])}
    made = _with_tables(writer.body(network, owners), network, compression, names)
    body = dataclasses.replace(made.body, inputs=_with_bases(made.body.inputs, writer, compression))
    known = made.known | dict.fromkeys(writer.bases.values(), CONSTANT)
    return dataclasses.replace(made, body=body, known=known)


def _with_bases(
    inputs: tuple[Value, ...], writer: "_Writer", compression: Compression
) -> tuple[Value, ...]:
    tables = len(compression.rows)
    last = len(inputs) - tables
    return (*inputs[:last], *writer.bases.values(), *inputs[last:])


def _with_tables(
    made: Written, network: Written, compression: Compression, names: Sequence[str]
) -> Written:
    """The network with its readings of whole tables replaced by those of the rows that are kept."""
    found = lookups.find(network, len(names)) if compression.rows else {}
    new: dict[Equation, Equation] = {}
    now = dict(zip(network.body.equations, made.body.equations, strict=True))
    places = []
    for leaf in compression.rows:
        places.append(_value((compression.shapes[leaf][0],), np.int32))
        if leaf not in found and any(network.body.inputs[leaf] in e.values for e in now):
            raise _misread({(leaf, 0)}, names)
        for lookup in found.get(leaf, ()):
            table = made.body.inputs[leaf]
            new[now[lookup.equation]] = lookups.replaced(lookup, table, places[-1])
    if not compression.rows:
        return made
    body = dataclasses.replace(
        made.body,
        inputs=(*made.body.inputs, *places),
        equations=tuple(new.get(e, e) for e in made.body.equations),
    )
    return dataclasses.replace(
        made,
        body=body,
        known=made.known | dict.fromkeys(places, CONSTANT),
        boundaries=frozenset(new.get(e, e) for e in made.boundaries),
    )


def _matched(spaces: Spaces, compression: Compression, names: Sequence[str]) -> dict[int, int]:
    """For each space of this call the reduced space that it is part of."""
    reduced = {
        (place.leaf, place.piece): number
        for number in compression.bases
        for place in compression.spaces.found[number].places
    }
    numbers: dict[int, int] = {}
    met: set[tuple[int, int]] = set()
    for i, space in enumerate(spaces.found):
        places = {(p.leaf, p.piece) for p in space.places}
        on = {reduced.get(place) for place in places}
        if on == {None}:
            continue
        (number, *others) = on
        if others or number is None or not _alike(space, compression.spaces.found[number]):
            raise _misread(places, names)
        numbers[i] = number
        met |= places
    same = [spaces.splits[leaf] == compression.spaces.splits[leaf] for leaf, _ in reduced]
    missing = {
        place
        for place, unchanged in zip(reduced, same, strict=True)
        if place[0] in spaces.used and not (unchanged and place in met)
    }
    if missing:
        raise _misread(missing, names)
    return numbers


def _alike(space: Space, reduced: Space) -> bool:
    if (space.source is None) != (reduced.source is None):
        return False
    if space.source is not None and reduced.source is not None:
        return space.source.argument == reduced.source.argument and space.source.pieces == (
            reduced.source.pieces
        )
    return space.depth >= reduced.depth


def _misread(places: set[tuple[int, int]], names: Sequence[str]) -> FrontContributionError:
    listed = ", ".join(sorted({names[leaf] for leaf, _ in places}))
    return FrontContributionError(
        f"this call reads the hidden space of {listed} in another way than the example arguments "
        "of front_contribute did, so that it cannot run in the reduced coordinates. Make fc with "
        "such a call as the example, or use apply_fn(fc.expand(params), ...) for it."
    )


class _Writer:
    """Replaces labels, leaves and values, body by body.

    Attributes:
      bases: for each reduced space of inputs the value of its basis.
    """

    def __init__(
        self, spaces: Spaces, numbers: Mapping[int, int], compression: Compression, dtype: Any
    ) -> None:
        self.at = {node: numbers[i] for node, i in spaces.at.items() if i in numbers}
        self.compression = compression
        found = compression.spaces.found
        self.bases = {
            number: _value((found[number].dimension, compression.size(number)), dtype)
            for number in compression.sources
        }

    def body(self, network: Written, owners: Owners) -> Written:
        """One body in reduced coordinates, with those inside it."""
        new = {value: self._reduced(value, *owners[value]) for value in owners}
        new |= {value: self._computed(value, expr) for value, expr in network.computed.items()}
        changed = {old: now for old, now in new.items() if now is not old}
        one = _Body(self, owners, changed)
        roots = {new[value]: one.expr(value, expr) for value, expr in network.roots.items()}
        forced = {new[v] for v, expr in network.roots.items() if roots[new[v]] is not expr}
        equations = {e: replaced(e, changed) for e in network.body.equations}
        nested = {}
        for i, bodies in network.nested.items():
            equation = network.body.equations[i]
            nested[i] = tuple(self.body(b, inner_owners(equation, b, owners)) for b in bodies)
        return dataclasses.replace(
            network,
            body=Body(
                tuple(new.get(v, v) for v in network.body.inputs),
                network.body.constants,
                tuple(equations.values()),
                network.body.outputs,
            ),
            known=network.known | {now: network.known[old] for old, now in changed.items()},
            roots=roots,
            boundaries=frozenset(equations[e] for e in network.boundaries),
            nested=nested,
            forced=frozenset(forced | {new[v] for v in network.forced}),
        )

    def _reduced(self, value: Value, leaf: int, shift: int) -> Value:
        """A parameter, or a slice of one, in its reduced shape."""
        if leaf not in self.compression.shapes:
            return value
        return _value(self.compression.reduced_shape(leaf)[shift:], value.aval.dtype)

    def _computed(self, value: Value, expr: Expr) -> Value:
        """A value that is computed, in its reduced shape."""
        shape = tuple(
            math.prod(
                self._size(Node(value, axis, piece), label) for piece, label in enumerate(labels)
            )
            for axis, labels in enumerate(expr.dims)
        )
        return value if shape == value.shape else _value(shape, value.aval.dtype)

    def _size(self, node: Node, label: Label) -> int:
        return self.compression.size(self.at[node]) if node in self.at else label.size


@dataclasses.dataclass(frozen=True)
class _Body:
    """Expressions of one body in reduced coordinates.

    Attributes:
      writer: what is reduced.
      owners: the parameters that inputs of the body are.
      changed: the values whose shape is reduced, by what they were.
    """

    writer: _Writer
    owners: Owners
    changed: Mapping[Value, Value]

    def expr(self, value: Value, expr: Expr) -> Expr:
        """The expression of a value; the same object if nothing in it is reduced."""
        labels: dict[Label, tuple[Label, ...]] = {}
        for owner, shift, dims in self._standing(value, expr):
            for axis, piece, label in _labels(dims):
                number = self.writer.at.get(Node(owner, axis + shift, piece))
                if number is not None and number not in self.writer.bases and label not in labels:
                    size = self.writer.compression.size(number)
                    labels[label] = (Label(size),) if size != 1 else ()
        if not any(leaf in self.changed for leaf in expr.leaves):
            return expr
        renamed = expr.rename(labels)
        terms = tuple(
            dataclasses.replace(
                term, factors=tuple(itertools.chain(*(self._factors(f) for f in term.factors)))
            )
            for term in renamed.terms
        )
        return dataclasses.replace(renamed, terms=terms)

    def _standing(
        self, value: Value, expr: Expr
    ) -> list[tuple[int | Value, int, tuple[tuple[Label, ...], ...]]]:
        """What labels stand on: the owner, the axes sliced off it, and the labels of the others."""
        found: list[tuple[int | Value, int, tuple[tuple[Label, ...], ...]]] = [
            (value, 0, expr.dims)
        ]
        for factor in itertools.chain.from_iterable(t.factors for t in expr.terms):
            owner, shift = self.owners.get(factor.leaf.var, (factor.leaf.var, 0))
            found.append((owner, shift, factor.axes))
        return found

    def _factors(self, factor: Factor) -> list[Factor]:
        """The factor on its reduced leaf, with the bases through which it meets inputs."""
        new = self.changed.get(factor.leaf.var)
        if new is None:
            return [factor]
        leaf = dataclasses.replace(factor.leaf, var=new, shape=new.shape)
        owner, shift = self.owners.get(factor.leaf.var, (factor.leaf.var, 0))
        axes, bases = list(factor.axes), []
        for axis, labels in enumerate(factor.axes):
            number = self.writer.at.get(Node(owner, axis + shift, 0))
            if labels and number in self.writer.bases:
                value = self.writer.bases[number]
                kept = (Label(value.shape[1]),) if value.shape[1] != 1 else ()
                axes[axis] = kept
                basis = CONSTANT.leaf(value)
                bases.append(Factor(basis, (labels, kept), (None, None)))
        return [dataclasses.replace(factor, leaf=leaf, axes=tuple(axes)), *bases]


def _labels(dims: tuple[tuple[Label, ...], ...]) -> Iterator[tuple[int, int, Label]]:
    for axis, labels in enumerate(dims):
        for piece, label in enumerate(labels):
            yield axis, piece, label


def replaced(equation: Equation, changed: Mapping[Value, Value]) -> Equation:
    """An equation that takes and makes the reduced values."""
    inputs = tuple(changed.get(a, a) if isinstance(a, Value) else a for a in equation.inputs)
    outputs = tuple(v if v is None else changed.get(v, v) for v in equation.outputs)
    if inputs == equation.inputs and outputs == equation.outputs:
        return equation
    return Equation(equation.source, inputs, outputs)


def _value(shape: Sequence[int], dtype: Any) -> Value:
    return Value(jax.core.ShapedArray(tuple(shape), dtype))
