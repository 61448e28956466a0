"""Elementwise chains: parameters that a network reads only through their elementwise product.

Multiply u by c > 0 and divide v by c, element by element. If the network does not notice, then
``u * dL/du = v * dL/dv`` for every loss. From equal magnitudes both gradients then have equal
magnitudes, and an optimizer that acts on each element and commutes with changes of sign keeps
``u = s * v`` with fixed signs s for ever: it is enough to train v.

Activations that scale as their input does under c > 0, such as relu, may stand in between. What is
not known to scale, such as relu6, the sum with a bias or a max pooling, is taken to notice.
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcjax import compat
from fcjax.expressions import algebra, layout, terms
from fcjax.expressions.primitives import VIEWS
from fcjax.expressions.terms import Expr, Factor, Term, Unrepresentable
from fcjax.expressions.written import Written
from fcjax.tracing import trace
from fcjax.tracing.trace import Atom, Body, Equation, Value

__all__ = ["Chain", "chains", "in_order", "is_relu", "mismatch", "signs"]

Array = np.ndarray[Any, Any]

HOMOGENEOUS = frozenset({"abs", "max", "min", "select_n"})
"""Their result scales by c > 0 if all their operands do."""
COMPARISONS = frozenset({"sign", "gt", "ge", "lt", "le", "eq", "ne"})
"""Their result does not change if all their operands scale by c > 0."""
ROUNDING = 4
"""Magnitudes that differ by at most this many eps of their dtype count as equal."""

TIED = (
    "an elementwise factor that is multiplied by itself, which trains differently from two factors "
    "of equal magnitude; give every factor a parameter of its own to fold all but one away"
)
APART = (
    "an elementwise factor, but not all factors of its product are read through this product "
    "alone; read them together everywhere to fold all but one away"
)


@dataclasses.dataclass(frozen=True)
class Chain:
    """Parameters of one shape of which one determines the others, up to fixed signs.

    Attributes:
      survivor: the number of the parameter that is trained, the last on the way to the output.
      followers: the numbers of those that follow it, in the order in which they are read.
    """

    survivor: int
    followers: tuple[int, ...]


def chains(network: Written, count: int) -> tuple[tuple[Chain, ...], dict[int, str]]:
    """Finds the elementwise chains of a network, by structure alone.

    Args:
      network: the network as written; the first ``count`` inputs are the parameters.
      count: the number of parameters.

    Returns:
      The chains, and for parameters that are multiplied elementwise but belong to no chain, why.

    Example:
      >>> import jax
      >>> from fcjax.tracing import trace
      >>> from fcjax.tracing.trace import Kind
      >>> from fcjax.expressions.written import written
      >>> kinds = [Kind("param", trainable=True)] * 2 + [Kind("data", trainable=False)]
      >>> jaxpr = jax.make_jaxpr(lambda u, v, x: jax.nn.relu(x * u) * v)(*[np.ones(3)] * 3)
      >>> chains(written(trace.flatten(jaxpr), kinds), 2)
      ((Chain(survivor=1, followers=(0,)),), {})
    """
    inputs = network.body.inputs[:count]
    parameters = {
        value: number
        for number, value in enumerate(inputs)
        if network.known[value].of == "param" and network.known[value].trainable
    }
    reading = _Reading(network, parameters.keys())
    groups: dict[Any, list[int]] = {}
    for value in in_order(network.body, parameters.keys()):
        if reading.places[value]:
            same = (*_array(value.aval), frozenset(reading.places[value].items()))
            groups.setdefault(same, []).append(parameters[value])
    found = tuple(Chain(last, tuple(rest)) for *rest, last in groups.values() if rest)
    folded = {number for chain in found for number in (chain.survivor, *chain.followers)}
    refused = {
        number: TIED if reading.is_tied(value) else APART
        for value, number in parameters.items()
        if value in reading.multiplied and number not in folded
    }
    return found, refused


def signs(survivor: Array, follower: Array) -> Array | None:
    """The signs by which a follower is its survivor.

    An element that is zero in both has the sign 1. It stays zero in backpropagation too: every
    gradient in a chain is a multiple of the other factors.

    Returns:
      An array of 1 and -1 with ``follower == signs * survivor`` up to rounding, of the follower's
      dtype; None if any magnitude differs.

    Example:
      >>> signs(np.array([1.0, -2.0, 0.0]), np.array([1.0, 2.0, 0.0]))
      array([ 1., -1.,  1.])
    """
    rounding = ROUNDING * float(jax.numpy.finfo(follower.dtype).eps)
    if not mismatch(survivor, follower) <= rounding:
        return None
    differ = np.sign(survivor) * np.sign(follower) < 0
    return np.where(differ, -1, 1).astype(follower.dtype)


def mismatch(survivor: Array, follower: Array) -> float:
    """The largest difference of magnitudes, relative to the larger; nan if any is not finite.

    Example:
      >>> mismatch(np.array([1.0, -2.0]), np.array([-1.0, 1.5]))
      0.25
    """
    a, b = (np.abs(np.asarray(array, np.float64)) for array in (survivor, follower))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    larger = np.maximum(a, b)
    return float(np.max(np.abs(a - b) / np.where(larger > 0, larger, 1), initial=0.0))


# --- where parameters are read ------------------------------------------------------------------


Place = tuple[int, terms.Dims, tuple[tuple[int, int, int] | None, ...]]
"""The number of a product, the labels of a factor's axes in it, and the part that stands there."""


def _array(aval: Any) -> tuple[tuple[int, ...], Any]:
    return aval.shape, aval.dtype


class _Reading:
    """Takes out of every value the parameters by which all of it scales; notes where others stand.

    A value that scales elementwise with u is u times a rest, and the rest does not change when u
    is multiplied by c > 0. Whoever reads the value reads both. A parameter stands where it cannot
    be taken out, and where something that is not known to scale reads a value that scales with it.

    Attributes:
      places: how often each parameter stands in each place.
      multiplied: the parameters that are elementwise factors of a product of parameters.
    """

    def __init__(self, network: Written, parameters: Iterable[Value]) -> None:
        self.known = network.known
        self.places: dict[Value, Counter[Place]] = {value: Counter() for value in parameters}
        self.multiplied: set[Value] = set()
        self.numbers = itertools.count()
        # what has been taken out, a product of parameters; zero, which scales with all, is no term
        self.scales = {value: terms.of_leaf(self.known[value].leaf(value)) for value in self.places}
        for equation in network.body.equations:
            if equation in network.boundaries:
                self._read_boundary(equation)
            for value in equation.outputs:
                if value is not None and value in network.roots:
                    self._define(value, self._take_out(self._substituted(network.roots[value])))
        for atom in network.body.outputs:
            self._read_whole(atom)

    def _substituted(self, expr: Expr) -> Expr:
        """An expression with the values that it reads replaced by their scales and rests."""
        for value in expr.leaves:
            if value in self.places or value not in self.scales:
                continue
            scale = self.scales[value]
            # each rest is a leaf of its own, so that terms of different values never cancel
            rest = self.known[value].leaf(Value(value.aval))
            factor = Factor(rest, scale.dims, (None,) * len(scale.dims))
            terms = tuple(Term(1.0, (factor, *t.factors)) for t in scale.terms)
            try:
                expr = algebra.substitute(expr, value, dataclasses.replace(scale, terms=terms))
            except Unrepresentable:
                self._read_whole(value)
        return expr

    def _take_out(self, expr: Expr) -> Expr:
        """The factors that all terms share elementwise; the others stand here."""
        terms = [t for t in expr.terms if t.scale != 0.0]
        counts = [Counter(f for f in t.factors if f.leaf.var in self.places) for t in terms]
        spread = [Counter({f: n for f, n in c.items() if f.labels <= expr.free}) for c in counts]
        shared = functools.reduce(Counter.__and__, spread) if spread else Counter()
        for term, count in zip(terms, counts, strict=True):
            self._note(count - shared)
            if term.degree or not expr.has_data:  # else it is a bias times a gain
                self._note_multiplied(count)
        product = (Term(1.0, tuple(shared.elements())),) if terms else ()
        return Expr(expr.dims, product, expr.dtype)

    def _define(self, value: Value, scale: Expr) -> None:
        if all(term.factors for term in scale.terms):
            self.scales[value] = scale

    def _read_boundary(self, equation: Equation) -> None:
        try:
            scale = self._scale_of(equation)
        except Unrepresentable:
            scale = None
        if scale is None:
            for atom in equation.inputs:
                self._read_whole(atom)
            return
        (value,) = equation.outputs
        taken = self._take_out(scale)
        if value is not None and equation.name not in COMPARISONS:
            self._define(value, taken)

    def _scale_of(self, equation: Equation) -> Expr | None:
        """How the result of a boundary scales with its operands, None if that is not known."""
        operands = equation.inputs[1:] if equation.name == "select_n" else equation.inputs
        if equation.name == "mul":
            return functools.reduce(algebra.multiply, self._wide(operands))
        scales = any(v in self.scales for v in equation.values)
        is_activation = scales and is_relu(equation)  # which takes a while
        is_number = equation.name == "convert_element_type" and not equation.values
        if equation.name in HOMOGENEOUS | COMPARISONS or is_activation or is_number:
            return functools.reduce(algebra.add, self._wide(operands))  # as their sum would
        return None

    def _wide(self, atoms: Sequence[Atom]) -> list[Expr]:
        """What has been taken out of operands, scalars repeated as arithmetic in jax does."""
        scales = [self._scale(atom) for atom in atoms]
        shape = max((s.shape for s in scales), key=len)
        return [
            layout.broadcast(s, shape, range(len(shape) - len(s.dims), len(shape))) for s in scales
        ]

    def _scale(self, atom: Atom) -> Expr:
        if isinstance(atom, Value) and atom in self.scales:
            return self.scales[atom]
        is_zero = isinstance(atom, compat.Literal) and not np.any(atom.val)
        aval: Any = atom.aval
        return Expr(terms.fresh_dims(aval.shape), () if is_zero else (Term(1.0, ()),), aval.dtype)

    def _read_whole(self, atom: Atom) -> None:
        if isinstance(atom, Value) and atom in self.scales:
            for term in self.scales[atom].terms:
                self._note(Counter(term.factors))

    def _note(self, factors: Counter[Factor]) -> None:
        number = next(self.numbers)
        for factor, times in factors.items():
            assert not factor.centred  # only data is, see ``deviations.recentre``
            self.places[factor.leaf.var][number, factor.axes, factor.slices] += times

    def _note_multiplied(self, factors: Counter[Factor]) -> None:
        views: dict[Any, list[Value]] = {}
        for factor in factors.elements():
            same = (*_array(factor.leaf), factor.axes, factor.slices)
            views.setdefault(same, []).append(factor.leaf.var)
        self.multiplied.update(*(together for together in views.values() if len(together) > 1))

    def is_tied(self, value: Value) -> bool:
        """Whether a parameter is multiplied by itself wherever it stands."""
        times = self.places[value].values()
        return bool(times) and min(times) > 1


# --- activations --------------------------------------------------------------------------------


def is_relu(equation: Equation) -> bool:
    """Whether an equation is relu in jax's own form, with the derivative that it has there.

    A custom derivative may be any other, such as a straight-through estimator's.
    """
    if equation.name != "custom_jvp_call" or len(equation.inputs) != 1:
        return False
    x = jax.ShapeDtypeStruct(*_array(equation.inputs[0].aval))
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return False  # integers have no derivative
    return _formulas(equation.source, x) == _relu_formulas(x)


@functools.cache
def _relu_formulas(x: jax.ShapeDtypeStruct) -> tuple[Any, Any]:
    (relu,) = trace.flatten(jax.make_jaxpr(jax.nn.relu)(x)).equations
    return _formulas(relu.source, x)


def _formulas(eqn: compat.JaxprEqn, x: jax.ShapeDtypeStruct) -> tuple[Any, Any]:
    """What a function with a custom derivative computes, and its derivative."""

    def derivative(x: Any, tangent: Any) -> Any:
        return jax.jvp(lambda x: compat.bind(eqn, [x]), (x,), (tangent,))[1]

    return _formula(eqn.params["call_jaxpr"]), _formula(jax.make_jaxpr(derivative)(x, x))


def _formula(jaxpr: Any) -> list[Any]:
    """What a function computes from each element of its inputs, in nested tuples.

    Two elementwise functions with equal formulas are equal. The shape of a broadcast number is
    left out, since ``vmap`` changes it; anything else that is not elementwise stays in.
    """
    body = trace.flatten(jaxpr)
    made: dict[Any, Any] = {value: ("input", i) for i, value in enumerate(body.inputs)}
    made |= {value: ("constant", value) for value, _ in body.constants}

    def read(atom: Atom) -> Any:
        return made[atom] if isinstance(atom, Value) else float(atom.val)

    for equation in body.equations:
        operands = [read(atom) for atom in equation.inputs]
        operation = (equation.name, str(equation.source.params))
        if equation.name == "broadcast_in_dim" and isinstance(operands[0], float):
            made[equation.outputs[0]] = operands[0]
        else:
            made |= {v: (*operation, i, *operands) for i, v in enumerate(equation.outputs)}
    return [read(atom) for atom in body.outputs]


def in_order(body: Body, parameters: Iterable[Value]) -> list[Value]:
    """The parameters in the order in which anything but a view reads them."""
    viewed = {value: value for value in parameters}
    entered: dict[Value, int] = {}
    for position, equation in enumerate(body.equations):
        for value in equation.values:
            if value not in viewed:
                continue
            if equation.name in VIEWS:
                viewed |= {made: viewed[value] for made in equation.outputs if made is not None}
            else:
                entered.setdefault(viewed[value], position)
    return sorted(entered, key=entered.__getitem__)
