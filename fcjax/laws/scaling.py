"""What each jax primitive says about how its result scales when its operands do.

Suppose that every array is multiplied by positive factors along its axes, one for each index. Which
factors of the operands give which factors of the result? A rule answers for one primitive, as facts
about pairs (array, axis): charges, the logarithms of the factors, are related or are zero. Every
rule is a proof for one equation, so a solution for the whole network is a symmetry of it. A
primitive without a rule is answered by zero everywhere around it: a boundary, never a guess.

A fact is *strong* if more than scaling passes: the axis may be mixed by any invertible matrix,
as at the contraction of two linear layers.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcjax.registry import registering
from fcjax.tracing import trace
from fcjax.tracing.trace import Atom, Body, Equation, Value

__all__ = [
    "ONE",
    "RULES",
    "Axis",
    "Factored",
    "Reading",
    "Same",
    "Stacked",
    "Touched",
    "Zero",
    "boundary",
    "needed",
    "register",
    "result",
    "shape_of",
]

Axis = tuple[Value, int]
"""An axis of an array."""


@dataclasses.dataclass(frozen=True)
class Same:
    """Axes with one index, whose charges times these factors add up to zero."""

    terms: tuple[tuple[Axis, Fraction], ...]
    strong: bool


@dataclasses.dataclass(frozen=True)
class Zero:
    """An axis along which nothing may scale."""

    axis: Axis


@dataclasses.dataclass(frozen=True)
class Touched:
    """An axis that is read entry by entry, but in a way that no positive factor changes."""

    axis: Axis


@dataclasses.dataclass(frozen=True)
class Factored:
    """An axis that a reshape splits into others."""

    axis: Axis
    parts: tuple[Axis, ...]


@dataclasses.dataclass(frozen=True)
class Stacked:
    """An axis whose entries are those of others in turn; a number stands for that many unread."""

    axis: Axis
    parts: tuple[Axis | int, ...]


Fact = Same | Zero | Touched | Factored | Stacked
Step = list[Fact]
"""The facts of one equation."""
Rule = Callable[["Reading", Equation], None]
RULES: dict[str, Rule] = {}
ONE = Fraction(1)
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"})
"""Calls of a function that is differentiated as it is written."""


register = registering(RULES, "scaling rule")


def needed(body: Body, results: Iterable[Value]) -> list[Equation]:
    """The equations that some results depend on, in order."""
    wanted = set(results)
    found = []
    for equation in reversed(body.equations):
        if equation.source.effects or any(v in wanted for v in equation.outputs):
            wanted.update(equation.values)
            found.append(equation)
    return found[::-1]


class Reading:
    """Collects facts, one step for an equation.

    Attributes:
      steps: what was found.
      zeros: arrays known to be zero, which scale by anything.
      level: axes along which an array is known to be constant.
      data: arrays that depend on data.
      names: values that are others, handed to or from a call.
      boundaries: the operations about which nothing is known, in order.
    """

    def __init__(self, data: Iterable[Value] = ()) -> None:
        self.data = set(data)
        self.steps: list[Step] = []
        self.zeros: set[Value] = set()
        self.level: set[Axis] = set()
        self.names: dict[Value, Atom] = {}
        self.boundaries: dict[str, None] = {}

    def start(self) -> None:
        """Begins the facts of another equation."""
        self.steps.append([])

    def apply(self, equation: Equation) -> None:
        """Reads one equation, or those of the function it calls."""
        equation = dataclasses.replace(equation, inputs=tuple(map(self.named, equation.inputs)))
        self.start()
        if equation.name in CALLS:
            self._call(equation)
            return
        floats = [v for v in (*equation.values, *equation.outputs) if v is not None]
        if not self.data.isdisjoint(equation.values):
            self.data.update(v for v in equation.outputs if v is not None)
        if any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in floats):
            RULES.get(equation.name, boundary)(self, equation)

    def named(self, atom: Atom) -> Atom:
        """What a value is called outside of the calls that hand it on."""
        return self.names.get(atom, atom) if isinstance(atom, Value) else atom

    def _call(self, equation: Equation) -> None:
        """Reads the body of a call; what goes in and comes out is the same inside and outside."""
        params = equation.source.params
        inner = trace.flatten(params.get("jaxpr") or params["call_jaxpr"])
        self.constants(inner)
        self.names |= zip(inner.inputs, equation.inputs, strict=True)
        for each in needed(inner, [a for a in inner.outputs if isinstance(a, Value)]):
            self.apply(each)
        for atom, made in zip(inner.outputs, equation.outputs, strict=True):
            if made is not None:
                self.names[made] = self.named(atom)

    def constants(self, body: Body) -> None:
        """Arrays that a function closes over do not scale, unless they are zero."""
        for value, array in body.constants:
            self.zero_all(value)
            is_known = not isinstance(array, jax.core.Tracer)
            if is_known and jnp.issubdtype(value.aval.dtype, jnp.inexact) and not np.any(array):
                self.zeros.add(value)

    # --- facts ---

    def same(self, a: Axis, b: Axis, *, strong: bool = True, power: Fraction = ONE) -> None:
        """The first axis scales as the second one to a power."""
        self.relate([(a, -ONE), (b, power)], strong=strong)

    def relate(self, terms: Sequence[tuple[Axis, Fraction]], *, strong: bool) -> None:
        """Charges times factors that add up to zero."""
        self.steps[-1].append(Same(tuple(terms), strong))

    def zero(self, *axes: Axis) -> None:
        """Axes along which nothing may scale."""
        self.steps[-1].extend(map(Zero, axes))

    def zero_all(self, atom: Atom | None) -> None:
        """An array that may not scale at all."""
        if isinstance(atom, Value):
            self.zero(*axes_of(atom))

    def touch(self, atom: Atom) -> None:
        """An array whose signs alone are read."""
        if isinstance(atom, Value):
            self.steps[-1].extend(map(Touched, axes_of(atom)))

    def factor(self, axis: Axis, parts: Sequence[Axis]) -> None:
        """An axis that is a product of others."""
        self.steps[-1].append(Factored(axis, tuple(parts)))

    def stack(self, axis: Axis, parts: Sequence[Axis | int]) -> None:
        """An axis that is made of others in turn; parts of no size are left out."""
        named = [part if isinstance(part, tuple) else int(part) for part in parts]
        kept = [part for part in named if part != 0]
        if len(kept) == 1 and not isinstance(kept[0], int):
            self.same(axis, kept[0])
        else:
            self.steps[-1].append(Stacked(axis, tuple(kept)))

    # --- what is known of values ---

    def is_zero(self, atom: Atom) -> bool:
        """Whether an operand is known to be zero."""
        return atom in self.zeros if isinstance(atom, Value) else not np.any(atom.val)


def shape_of(atom: Atom) -> tuple[int, ...]:
    """The size of every axis of an operand."""
    aval: Any = atom.aval
    return tuple(aval.shape)


def axes_of(value: Value) -> list[Axis]:
    """All axes of an array."""
    return [(value, axis) for axis in range(len(value.shape))]


def result(equation: Equation) -> Value:
    """The one result of an equation that the network needs."""
    (value,) = equation.outputs
    assert value is not None
    return value


def boundary(reading: Reading, equation: Equation) -> None:
    """Nothing is known: nothing around it may scale."""
    reading.boundaries.setdefault(str(equation.source.params.get("name", equation.name)))
    for atom in (*equation.inputs, *equation.outputs):
        reading.zero_all(atom)
