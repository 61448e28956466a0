"""From a function to a flat list of equations, and what each value depends on."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from fcjax import compat
from fcjax.compat import JaxprEqn
from fcjax.expressions.terms import Leaf
from fcjax.tracing.repeats import KNOWN, repeated, repetition

__all__ = [
    "ARITHMETIC",
    "INLINED",
    "REMAT",
    "Body",
    "Equation",
    "Kind",
    "Value",
    "flatten",
    "inlinable",
    "kinds",
    "nested_bodies",
]

INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"})
"""Calls that only group equations; custom derivatives, remat and loops mean more than that."""
ARITHMETIC = frozenset(
    {"add", "sub", "mul", "div", "neg", "sqrt", "rsqrt", "square", "pow", "integer_pow", "exp",
     "log", "max", "min", "convert_element_type"}
)  # fmt: skip
"""What is computed while tracing where it is applied to known numbers, such as sqrt(depth)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """One array of the traced network; identity is what tells two values apart."""

    aval: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of every axis."""
        return tuple(self.aval.shape)


Atom = Value | compat.Literal


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One application of a primitive.

    Attributes:
      source: the equation as jax traced it: primitive, parameters and avals.
      inputs: what it is applied to here; literals are numbers known while tracing.
      outputs: the values it makes; None where nobody wants them.
    """

    source: JaxprEqn
    inputs: tuple[Atom, ...]
    outputs: tuple[Value | None, ...]

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.source.primitive.name

    @property
    def values(self) -> list[Value]:
        """The inputs that are no literals."""
        return [atom for atom in self.inputs if isinstance(atom, Value)]


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """A function as a list of equations, calls inlined.

    Attributes:
      inputs: one value for each argument.
      constants: arrays the function closes over, with their values.
      equations: in an order in which they can be computed.
      outputs: the results.
      rows: values whose rows take the place of data, each with the table they are the rows of, see
        ``hoisting``.
    """

    inputs: tuple[Value, ...]
    constants: tuple[tuple[Value, Any], ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Atom, ...]
    rows: Mapping[Value, Value] = dataclasses.field(default_factory=dict)


REMAT = frozenset({"remat2", "checkpoint"})
"""Calls whose values are computed anew for the backward pass."""


def flatten(jaxpr: Any, inlined: frozenset[str] = INLINED) -> Body:
    """Inlines every plain call of a (closed) jaxpr, giving each inlining values of its own."""
    opened, consts = compat.open_jaxpr(jaxpr)
    builder = _Builder(inlined)
    inputs = [Value(var.aval) for var in opened.invars]
    names: dict[Any, Atom] = dict(zip(opened.invars, inputs, strict=True))
    outputs = builder.inline(opened, consts, names)
    return Body(
        tuple(inputs), tuple(builder.constants.values()), tuple(builder.equations), tuple(outputs)
    )


class _Builder:
    """Collects the equations and constants of nested jaxprs."""

    def __init__(self, inlined: frozenset[str]) -> None:
        self.inlined = inlined
        self.equations: list[Equation] = []
        self.constants: dict[int, tuple[Value, Any]] = {}
        self.fixed: dict[Value, Equation] = {}
        self.evaluated: dict[Value, Any] = {}

    def inline(self, jaxpr: Any, consts: Iterable[Any], names: dict[Any, Atom]) -> list[Atom]:
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            names[var] = self.constants.setdefault(id(const), (Value(var.aval), const))[0]

        def read(atom: Any) -> Atom:
            return atom if isinstance(atom, compat.Literal) else names[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            inner = inlinable(eqn, self.inlined)
            if inner is not None:
                opened, inner_consts = compat.open_jaxpr(inner)
                own: dict[Any, Atom] = dict(zip(opened.invars, inputs, strict=True))
                outputs = self.inline(opened, inner_consts, own)
                names.update(zip(eqn.outvars, outputs, strict=True))
                continue
            eqn = _with_numbers(eqn, inputs)
            number = _number(eqn)
            if number is not None:
                names[eqn.outvars[0]] = number
                continue
            repeat = self._repeat(eqn, inputs)
            if repeat is not None:
                opened, _ = compat.open_jaxpr(repeat)
                own = dict(zip(opened.invars, inputs[:1], strict=True))
                names.update(zip(eqn.outvars, self.inline(opened, (), own), strict=True))
                continue
            made = tuple(None if compat.is_dropped(v) else Value(v.aval) for v in eqn.outvars)
            names.update((v, m) for v, m in zip(eqn.outvars, made, strict=True) if m is not None)
            self.equations.append(Equation(eqn, tuple(inputs), made))
            if eqn.primitive.name in KNOWN and all(self._is_fixed(atom) for atom in inputs):
                self.fixed |= {v: self.equations[-1] for v in made if v is not None}
        return [read(atom) for atom in jaxpr.outvars]

    def _is_fixed(self, atom: Atom) -> bool:
        return isinstance(atom, compat.Literal) or atom in self.fixed

    def _value(self, atom: Atom) -> Any:
        """What depends on nothing, computed now."""
        if isinstance(atom, compat.Literal):
            return atom.val
        if atom not in self.evaluated:
            equation = self.fixed[atom]
            values = [self._value(a) for a in equation.inputs]
            self.evaluated[atom] = compat.bind(equation.source, values)[0]
        return self.evaluated[atom]

    def _repeat(self, eqn: JaxprEqn, inputs: Sequence[Atom]) -> Any | None:
        """A gather as a repetition of its rows, if it is one."""
        if eqn.primitive.name != "gather" or not self._is_fixed(inputs[1]):
            return None
        if compat.is_placed(eqn.invars[0].aval):
            return None
        with jax.ensure_compile_time_eval():
            found = repetition(eqn, np.asarray(self._value(inputs[1])))
        return found and repeated(eqn.invars[0].aval, *found)


def _with_numbers(eqn: JaxprEqn, inputs: Sequence[Atom]) -> JaxprEqn:
    """The equation, with the numbers that it is given here in the place of variables."""
    pairs = list(zip(eqn.invars, inputs, strict=True))
    if not any(isinstance(a, compat.Literal) and a is not var for var, a in pairs):
        return eqn
    return eqn.replace(invars=[a if isinstance(a, compat.Literal) else var for var, a in pairs])


def _number(eqn: JaxprEqn) -> compat.Literal | None:
    """The result of an equation whose inputs are all numbers, by jax's own arithmetic."""
    known = eqn.primitive.name in ARITHMETIC and not eqn.effects
    if not known or not all(isinstance(atom, compat.Literal) for atom in eqn.invars):
        return None
    aval: Any = eqn.outvars[0].aval
    if aval.shape:
        return None
    with jax.ensure_compile_time_eval():
        (value,) = compat.bind(eqn, [a.val for a in eqn.invars if isinstance(a, compat.Literal)])
    return compat.Literal(np.asarray(value)[()], aval)


def inlinable(eqn: JaxprEqn, inlined: frozenset[str] = INLINED) -> Any | None:
    """The jaxpr of a call that can be inlined, else None."""
    if eqn.primitive.name not in inlined:
        return None
    shardings = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    if any(type(s).__name__ != "UnspecifiedValue" for s in shardings):
        return None  # the user places these arrays
    return eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")


# --- what a value depends on --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a value depends on; see ``expressions.terms.Leaf``."""

    of: Literal["param", "data", "const"]
    trainable: bool
    invariant: bool = True

    def leaf(self, value: Value) -> Leaf:
        """The value as a leaf of expressions."""
        return Leaf(value, self.of, value.shape, value.aval.dtype, self.trainable, self.invariant)


CONSTANT = Kind("const", trainable=False)


def kinds(body: Body, inputs: Sequence[Kind]) -> dict[Value, Kind]:
    """What every value of ``body`` depends on, given it for the inputs."""
    known = dict(zip(body.inputs, inputs, strict=True))
    known |= {value: CONSTANT for value, _ in body.constants}
    for equation in body.equations:
        joined = joint([known[v] for v in equation.values])
        for value in equation.outputs:
            if value is not None:
                known[value] = dataclasses.replace(
                    joined, trainable=joined.trainable and _differentiable(equation, value)
                )
            if value is not None and value in body.rows:
                known[value] = dataclasses.replace(known[value], of="data", invariant=False)
    return known


def joint(inputs: Sequence[Kind]) -> Kind:
    """What a function of several values depends on."""
    of = [kind.of for kind in inputs]
    return Kind(
        "data" if "data" in of else "param" if "param" in of else "const",
        trainable=any(kind.trainable for kind in inputs),
        invariant=all(kind.invariant for kind in inputs),
    )


def _differentiable(equation: Equation, value: Value) -> bool:
    is_float = jax.numpy.issubdtype(value.aval.dtype, np.inexact)
    return is_float and equation.name != "stop_gradient"


# --- bodies inside equations --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inner:
    """A jaxpr inside an equation.

    Attributes:
      jaxpr: the jaxpr.
      kinds: what its inputs depend on.
      runs: how often it runs in one evaluation of the equation.
    """

    jaxpr: Any
    kinds: tuple[Kind, ...]
    runs: int = 1


def nested_bodies(equation: Equation, known: dict[Value, Kind]) -> tuple[Inner, ...]:
    """The bodies of a scan, cond or remat, which are analysed by themselves; else nothing."""
    of = [known[a] if isinstance(a, Value) else CONSTANT for a in equation.inputs]
    params = equation.source.params
    if equation.source.effects:
        return ()
    if equation.name in REMAT:
        return (Inner(params["jaxpr"], tuple(of)),)
    if equation.name == "cond":
        return tuple(Inner(branch, tuple(of[1:])) for branch in params["branches"])
    if equation.name == "scan":
        return (_scan_body(of, params),)
    return ()


def _scan_body(of: Sequence[Kind], params: dict[str, Any]) -> Inner:
    """Loop constants stay the same between runs, carries are data, slices of inputs change."""
    num_consts, num_carry = compat.scan_layout(params)
    constants = [dataclasses.replace(kind, invariant=True) for kind in of[:num_consts]]
    trainable = any(kind.trainable for kind in of)
    carries = [Kind("data", trainable, invariant=False)] * num_carry
    slices = [dataclasses.replace(kind, invariant=False) for kind in of[num_consts + num_carry :]]
    runs = max(params["length"], 1)  # prices are per run, also of a loop that never runs
    return Inner(params["jaxpr"], (*constants, *carries, *slices), runs)
