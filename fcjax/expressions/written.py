"""The network as written, as expressions: which values are computed, and from what.

Most values of a body are only steps on the way to another value and exist inside its expression.
Those that something non-linear reads, products, and values with several readers are *roots*: they
are computed, and what reads them sees them as leaves.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from fcjax import compat
from fcjax.compat import Literal as Number
from fcjax.expressions import terms
from fcjax.expressions.primitives import RULES, VIEWS, has_precision, precision_of
from fcjax.expressions.terms import Expr, Unrepresentable
from fcjax.planning.kernels import has_taps
from fcjax.tracing import trace
from fcjax.tracing.trace import Atom, Body, Equation, Kind, Value

__all__ = ["Written", "handed_over", "is_numeric", "is_view", "written"]

Kinds = Callable[[Body, Sequence[Kind]], dict[Value, Kind]]


PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "reduce_window_sum"})
"""Primitives whose operands are computed in the network as written."""
WHOLE = frozenset({"pad", "concatenate"})
"""Primitives that copy their operands, so that a repeated value is computed before them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """A body as it is written, and the bodies inside it.

    Attributes:
      body: the equations.
      known: what each value depends on.
      roots: the values that are computed, with their expressions over roots and leaves.
      hard: the values that must exist as arrays: results, and what boundaries read.
      boundaries: the equations that are no sums of einsum terms.
      nested: for the numbers of equations with bodies of their own, those.
      runs: how often the body runs in one training step.
      forced: roots that their equations no longer compute, because their shapes were reduced.
      less_mean: roots that stand for what they are less its mean over an axis; see ``streams``.
    """

    body: Body
    known: dict[Value, Kind]
    roots: dict[Value, Expr]
    hard: frozenset[Value]
    boundaries: frozenset[Equation]
    nested: dict[int, tuple["Written", ...]]
    runs: float = 1
    forced: frozenset[Value] = frozenset()
    less_mean: Mapping[Value, int] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def products(self) -> dict[Value, Expr]:
        """The boundaries that are products of two activations, such as attention's scores."""
        return {
            value: _product(equation, self.known)
            for equation in self.body.equations
            if equation in self.boundaries and _multiplies_activations(equation, self.known)
            for value in equation.outputs
            if value is not None
        }

    @functools.cached_property
    def computed(self) -> dict[Value, Expr]:
        """Roots and products of two activations, in the order of the body."""
        found = self.roots | self.products
        position = {v: i for i, e in enumerate(self.body.equations) for v in e.outputs}
        return dict(sorted(found.items(), key=lambda item: position[item[0]]))

    @functools.cached_property
    def entrywise(self) -> frozenset[Value]:
        """The values that must exist even if products of activations are computed otherwise."""
        linear = {e for e in self.boundaries if not self.products.keys().isdisjoint(e.outputs)}
        read = {v for e in self.boundaries - linear for v in e.values}
        read.update(a for a in self.body.outputs if isinstance(a, Value))
        return self.hard - {v for e in linear for v in e.values} | read

    @functools.cached_property
    def has_forced(self) -> bool:
        """Whether any root is forced, here or in a nested body."""
        return bool(self.forced) or any(w.has_forced for ws in self.nested.values() for w in ws)


def written(
    body: Body, inputs: Sequence[Kind], runs: float = 1, kinds: Kinds = trace.kinds
) -> Written:
    """Reads a body.

    Args:
      body: the equations.
      inputs: what each input of the body depends on.
      runs: how often the body runs in one training step; with ``math.inf`` bodies inside it do too,
        and products of what is the same in every run are free.
      kinds: finds out what each value depends on.
    """
    known = kinds(body, inputs)
    reader = _Reader(body, known)
    nested = {}
    for i, equation in enumerate(body.equations):
        inner = trace.nested_bodies(equation, known)
        if inner:
            nested[i] = tuple(
                written(
                    trace.flatten(b.jaxpr), b.kinds, runs if math.isinf(runs) else b.runs, kinds
                )
                for b in inner
            )
    return Written(
        body, known, reader.roots, frozenset(reader.hard), frozenset(reader.boundaries), nested,
        runs,
    )  # fmt: skip


def handed_over(
    equation: Equation, inner: Body
) -> list[tuple[Value, Atom, Literal["same", "carry", "slice"]]]:
    """What the inputs of a body inside an equation are outside.

    The value itself, a carry that starts with it, or its slices along the first axis.
    """
    outside = equation.inputs[1:] if equation.name == "cond" else equation.inputs
    consts = len(outside)
    carry = 0
    if equation.name == "scan":
        consts, carry = compat.scan_layout(equation.source.params)
    roles: list[Literal["same", "carry", "slice"]] = [
        "same" if k < consts else "carry" if k < consts + carry else "slice"
        for k in range(len(outside))
    ]
    return list(zip(inner.inputs, outside, roles, strict=True))


class _Reader:
    """Applies the rules of the primitives in order; see ``Written`` for what it collects."""

    def __init__(self, body: Body, known: dict[Value, Kind]) -> None:
        self.known = known
        self.readers, self.operands = _count_readers(body), _operands(body)
        self.copied = _copied(body)
        self.scaled = _scaled(body, known)
        self.made_of_params = _made_of_params(body, known)
        self.seen: dict[Value, Expr] = {}
        self.roots: dict[Value, Expr] = {}
        self.boundaries = {
            e
            for e in body.equations
            if not _has_rule(e) or not body.rows.keys().isdisjoint(e.outputs) or self._shifts(e)
        }
        self.hard = {atom for atom in body.outputs if isinstance(atom, Value)}
        self.hard.update(v for e in self.boundaries for v in e.values)
        for equation in body.equations:
            if equation not in self.boundaries:
                self._read(equation)
        position = {v: i for i, e in enumerate(body.equations) for v in e.outputs}
        self.roots = dict(sorted(self.roots.items(), key=lambda item: position[item[0]]))

    def _read(self, equation: Equation) -> None:
        """Applies the equation's rule; if it fails the equation is a boundary too."""
        self._cut_products(equation)
        operands = [self._operand(atom) for atom in equation.inputs]
        try:
            made = RULES[equation.name](operands, equation.source)
        except Unrepresentable:
            self.boundaries.add(equation)
            self.hard.update(equation.values)
            for value in equation.values:
                self._compute(value)
            return
        for made_value, expr in zip(equation.outputs, _listed(made), strict=True):
            if made_value is None:
                continue
            self.seen[made_value] = expr
            scaled = made_value in self.scaled and expr.has_data and _is_product(expr)
            repeated = made_value in self.copied and _repeats(expr)
            cut = repeated or scaled or _is_cut(made_value, expr, self.readers, self.operands)
            if made_value in self.hard or cut:
                self._compute(made_value)

    def _shifts(self, equation: Equation) -> bool:
        """Whether a number, or a constant to constants, is added to what no parameter is part of.

        Nothing is gained by looking through such a sum, and it may cancel: random numbers,
        ``(bits - 1) * 2 - 1``, and masks, ``s - 1e9 * (1 - m)``, would lose their last digits.
        """
        if equation.name not in ("add", "sub"):
            return False
        data = [v for v in equation.values if self.known[v].of != "const"]
        if not data:
            return True
        alone = len(data) == 1 and data[0] not in self.made_of_params
        alone = alone and not self.known[data[0]].trainable  # what a loop carries, for one
        added = [a for a in equation.inputs if a not in data]
        numbers = all(math.prod(a.aval.shape) == 1 for a in added)  # type: ignore[union-attr]
        return alone and bool(added) and numbers

    def _cut_products(self, equation: Equation) -> None:
        """Makes roots of products that are summed, joined, or added where one could do for both."""
        made = [v for v in equation.values if v in self.seen and _is_linear_product(self.seen[v])]
        if equation.name in ("add", "add_any", "sub") and len(equation.values) == 2:
            one, other = equation.values
            alike = self._see_the_same(one, other)
            made = [
                v for v in made if alike or (_has_taps(self.seen[v]) and self._reads(one, other))
            ]
        elif equation.name not in ("reduce_sum", "concatenate"):
            return
        for value in made:
            self._compute(value)

    def _see_the_same(self, one: Value, other: Value) -> bool:
        """Whether products of the same data are in both values, directly or through one root."""
        data = [
            set().union(*(_data(e) for e in self._through_roots(v) if _is_linear_product(e)))
            for v in (one, other)
        ]
        return not data[0].isdisjoint(data[1])

    def _reads(self, one: Value, other: Value) -> bool:
        """Whether one of two values is made of data that the other one is, through one root."""
        data = [set().union(*map(_data, self._through_roots(v))) for v in (one, other)]
        return not data[0].isdisjoint(data[1])

    def _through_roots(self, value: Value) -> list[Expr]:
        expr = self._operand(value)
        return [expr, *(self.roots[leaf] for leaf in expr.leaves if leaf in self.roots)]

    def _operand(self, atom: Value | Number) -> Expr:
        if not isinstance(atom, Value):
            return Expr((), (terms.Term(float(atom.val), ()),), atom.aval.dtype)  # type: ignore[attr-defined]
        if atom not in self.seen:
            self.seen[atom] = terms.of_leaf(self.known[atom].leaf(atom))
        return self.seen[atom]

    def _compute(self, value: Value) -> None:
        """Makes a value a root, which later equations read as a leaf."""
        expr = self.seen.pop(value, None)
        if expr is not None and value not in expr.leaves:
            self.roots[value] = expr


def _multiplies_activations(equation: Equation, known: dict[Value, Kind]) -> bool:
    concerned = [v for v in (*equation.values, *equation.outputs) if v is not None]
    dtypes = {str(v.aval.dtype) for v in concerned}
    return (
        equation.name == "dot_general"
        and all(0 not in v.shape for v in concerned)
        and [known[v].of for v in equation.values] == ["data", "data"]
        and len(dtypes) == 1
        and has_precision(equation.source)
        and not _sharded_by_hand(equation)
    )


def _product(equation: Equation, known: dict[Value, Kind]) -> Expr:
    """A product of two activations as one term."""
    a, b = (terms.of_leaf(known[v].leaf(v)) for v in equation.values)
    contracting, batch = equation.source.params["dimension_numbers"]
    shared = [(*contracting[side], *batch[side]) for side in (0, 1)]
    b = b.rename(
        {label: a.dims[i] for i, j in zip(*shared, strict=True) for label in b.dims[j]}
    )  # fmt: skip
    free = [
        dim
        for expr, own in zip((a, b), shared, strict=True)
        for i, dim in enumerate(expr.dims)
        if i not in own
    ]
    factors = (*a.terms[0].factors, *b.terms[0].factors)
    dims = (*(a.dims[i] for i in batch[0]), *free)
    return Expr(dims, (terms.Term(1.0, factors),), a.dtype, precision_of(equation.source))


def _count_readers(body: Body) -> dict[Value, int]:
    count: dict[Value, int] = {}
    for equation in body.equations:
        for value in set(equation.values):
            count[value] = count.get(value, 0) + 1
    return count


def _has_rule(equation: Equation) -> bool:
    if equation.name not in RULES or _sharded_by_hand(equation):
        return False
    made: list[Any] = [out.aval for out in equation.source.outvars]
    read: list[Any] = [atom.aval for atom in equation.inputs]
    floats = all(jnp.issubdtype(a.dtype, jnp.floating) for a in made)
    return floats and all(math.prod(a.shape) for a in (*made, *read))  # nothing is not algebra


def _sharded_by_hand(equation: Equation) -> bool:
    """Whether the equation says how its result is laid out over devices."""
    params = equation.source.params
    return any(params.get(key) is not None for key in ("out_sharding", "sharding"))


def _listed(made: Expr | list[Expr]) -> list[Expr]:
    return made if isinstance(made, list) else [made]


def _is_cut(value: Value, expr: Expr, readers: dict[Value, int], operands: set[Value]) -> bool:
    """Whether the network as written computes this value and reads it back."""
    if is_view(expr):
        return False
    if value in operands:
        return expr.has_data or _is_product(expr)
    if not expr.has_data or readers.get(value, 0) < 2:
        return False
    largest = max(f.leaf.size for t in expr.terms for f in t.factors if f.is_data)
    return _is_product(expr) or 2 * math.prod(value.shape) > largest


def is_numeric(expr: Expr) -> bool:
    """Whether a value is a sum of data, times numbers."""
    return all(
        len(t.factors) == 1 and t.factors[0].is_data and t.labels <= expr.free and not t.windows
        for t in expr.terms
    )


def is_view(expr: Expr) -> bool:
    """Whether an expression only looks at one leaf, without arithmetic."""
    (term, *more) = expr.terms or (None,)
    if term is None or more or len(term.factors) != 1 or term.scale != 1.0:
        return False
    padded = frozenset().union(*(w.labels for w in term.windows if len(w.steps) == 2))
    return term.labels <= expr.free | padded and not term.factors[0].centred


def _is_linear_product(expr: Expr) -> bool:
    return _is_product(expr) and expr.has_data and all(t.degree < 2 for t in expr.terms)


def _data(expr: Expr) -> set[Any]:
    return {var for var, leaf in expr.leaves.items() if leaf.kind == "data"}


def _has_taps(expr: Expr) -> bool:
    return any(has_taps(term) for term in expr.terms)


def _is_product(expr: Expr) -> bool:
    return any(len(t.factors) > 1 and not t.labels <= expr.free for t in expr.terms)


def _operands(body: Body) -> set[Value]:
    """Values that a product or a pooling reads, directly or through views."""
    found: set[Value] = set()
    for equation in reversed(body.equations):
        views = equation.name in VIEWS and not found.isdisjoint(v for v in equation.outputs if v)
        if views or equation.name in PRODUCTS:
            found.update(equation.values)
    return found


def _copied(body: Body) -> set[Value]:
    """Values that a product reads itself, or that are copied into one that it reads."""
    found: set[Value] = set()
    for equation in reversed(body.equations):
        read = not found.isdisjoint(v for v in equation.outputs if v)
        if equation.name in PRODUCTS or (equation.name in WHOLE and read):
            found.update(equation.values)
    return found


def _repeats(expr: Expr) -> bool:
    """Whether data are repeated along an axis, as in nearest upsampling."""
    merged = {x for axis in expr.dims if len(axis) > 1 for x in axis}
    return expr.has_data and any(not merged <= term.labels for term in expr.terms)


def _made_of_params(body: Body, known: dict[Value, Kind]) -> set[Value]:
    """Values that any parameter has a part in."""
    found = {value for value in body.inputs if known[value].of == "param"}
    for equation in body.equations:
        if not found.isdisjoint(equation.values):
            found.update(v for v in equation.outputs if v is not None)
    return found


def _scaled(body: Body, known: dict[Value, Kind]) -> set[Value]:
    """Values that are multiplied by a parameter, whose gradient needs them."""
    found: set[Value] = set()
    for equation in body.equations:
        if equation.name == "mul":
            for atom, other in zip(equation.inputs, reversed(equation.inputs), strict=True):
                by = known[other] if isinstance(other, Value) else None
                if isinstance(atom, Value) and by and by.of == "param" and by.trainable:
                    found.add(atom)
    return found
