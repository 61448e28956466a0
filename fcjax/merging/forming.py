"""A recipe with everything in it that is the same for every call multiplied out.

    ``x W_1 W_2 + b_1 W_2 + b_2``  becomes  ``x Z + c``

with ``Z`` and ``c`` new leaves. What a new leaf is made of is a recipe too, so it is computed
like anything else, at the precision at which weights are multiplied among themselves.
"""

import dataclasses
import itertools
import math
from collections import ChainMap
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from fcjax.expressions.terms import Expr, Factor, Label, Leaf, Term
from fcjax.merging import pointwise
from fcjax.merging.ahead import digest
from fcjax.merging.diagonals import Identity, absorbed
from fcjax.planning.contraction import Order, members
from fcjax.planning.grids import Place, Taps
from fcjax.planning.kernels import has_taps
from fcjax.planning.parts import (
    Convolution,
    Linear,
    MeanSquare,
    Part,
    Product,
    Recipe,
    computed_over,
)
from fcjax.planning.recipes import recipe
from fcjax.running.evaluate import evaluate
from fcjax.running.named import ordered
from fcjax.running.weights import weight_of
from fcjax.tracing.trace import Value

__all__ = ["Formed", "Kernel", "Lowered", "lowered", "operations"]


@dataclasses.dataclass(frozen=True, eq=False)
class Formed:
    """An array that is made once, of leaves that are known ahead.

    Attributes:
      value: what it is called in the expressions that read it.
      recipe: what it is.
      less_mean: its axes over which the mean is subtracted.
      is_sum: whether it is added to the result, as a bias is.
    """

    value: Value
    recipe: Recipe
    less_mean: tuple[int, ...]
    is_sum: bool

    @property
    def leaves(self) -> list[Value]:
        """The values it is made of."""
        return [v for v in self.recipe.expr.leaves if not isinstance(v, Identity)]

    def compute(self, env: Mapping[Any, Array]) -> Array:
        """The array, given those that it is made of."""
        identities = {v: v.array() for v in self.recipe.expr.leaves if isinstance(v, Identity)}
        read = ChainMap(identities, env)  # type: ignore[arg-type]  # nothing is written to it
        made = evaluate(self.recipe, read, {})
        if self.less_mean:
            made = made - made.mean(self.less_mean, keepdims=True)
        return made.astype(self.value.aval.dtype)

    def identity(self, leaves: Mapping[Value, str]) -> str:
        """A name for it, equal for equal computations; ``leaves`` names what it is made of."""
        expr = self.recipe.expr
        leaves = {v: v.name if isinstance(v, Identity) else leaves[v] for v in expr.leaves}
        numbers = {label: i for i, label in enumerate(itertools.chain(*expr.dims))}
        terms = sorted(_term_name(term, dict(numbers), leaves) for term in expr.terms)
        return digest(terms, expr.shape, self.less_mean, str(self.value.aval.dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """The kernel of a convolution, made once.

    Attributes:
      value: what it is called in the expressions that read it.
      part: the convolution.
      expr: the value that it is part of.
    """

    value: Value
    part: Convolution
    expr: Expr
    is_sum: bool = False

    @property
    def leaves(self) -> list[Value]:
        """The values it is made of."""
        return [f.leaf.var for weight in self.part.weights for f in weight.term.factors]

    def compute(self, env: Mapping[Any, Array]) -> Array:
        """The array, given those that it is made of."""
        order = tuple(itertools.chain(*_kernel_axes(self.part)))
        made = ordered(weight_of(self.part, env, self.expr), order)
        return made.reshape(self.value.shape).astype(self.value.aval.dtype)

    def identity(self, leaves: Mapping[Value, str]) -> str:
        """A name for it, equal for equal computations; ``leaves`` names what it is made of."""
        names = []
        for weight, place in zip(self.part.weights, self.part.places, strict=True):
            numbers = {label: i for i, label in enumerate(self.part.weight_labels)}
            for x in itertools.chain(*([x for x, _ in taps.steps] for taps in place.taps)):
                numbers.setdefault(x, len(numbers))
            for x in itertools.chain(*place.diagonal):
                numbers.setdefault(x, len(numbers))
            taps = [([(numbers[x], by) for x, by in t.steps], t.low, t.every) for t in place.taps]
            diagonal = [(numbers[x], numbers[y]) for x, y in place.diagonal]
            names.append((_term_name(weight.term, numbers, leaves), taps, diagonal))
        sizes = [label.size for label in self.part.weight_labels]
        return digest("kernel", sorted(map(repr, names)), sizes, str(self.value.aval.dtype))


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A recipe over data, formed arrays, and leaves that are read as they are.

    Attributes:
      recipe: the recipe.
      formed: the formed arrays that it reads.
    """

    recipe: Recipe
    formed: tuple[Formed | Kernel, ...]


def lowered(recipe: Recipe, space: int = 0) -> Lowered:
    """Multiplies out what does not change from call to call.

    Args:
      recipe: how to compute a value.
      space: if it was written by convolutions alone, how many axes of space they have.
    """
    lowering = _Lowering(recipe.expr)
    made = lowering.parts(recipe.parts)
    if space:
        made = tuple(pointwise.convolved(part, recipe.expr, space) for part in made)
    terms = tuple(itertools.chain.from_iterable(_terms(part) for part in made))
    expr = dataclasses.replace(recipe.expr, terms=terms)
    return Lowered(dataclasses.replace(recipe, expr=expr, parts=made), tuple(lowering.formed))


def operations(recipe: Recipe) -> int:
    """How many operations on data the recipe takes, additions included."""
    inside = 0
    for part in recipe.parts:
        if isinstance(part, Product):
            scaled = part.term.scale != 1.0 and bool(part.term.factors)
            inside += max(len(part.term.factors) - 1, 0) + len(part.term.windows) + scaled
        elif isinstance(part, Convolution):
            inside += 1 + len(part.windows)
        else:
            inside += 1 + len(getattr(part, "row_scales", ()))
    return inside + max(len(recipe.parts) - 1, 0)


# --- one recipe ---------------------------------------------------------------------------------


class _Lowering:
    """Rewrites the parts of one recipe and collects what has to be formed for them."""

    def __init__(self, expr: Expr) -> None:
        self.expr = expr
        self.formed: list[Formed | Kernel] = []

    def parts(self, given: Sequence[Part]) -> tuple[Part, ...]:
        """The parts, constants last and added up where they have the same axes."""
        made: list[Part] = []
        for part in absorbed(given, self.expr):
            if _is_sum(part):
                continue
            if isinstance(part, Product):
                keep = computed_over(part.term, self.expr.free)
                made.append(self.product(part, keep))
            elif isinstance(part, Linear):
                made.append(self.linear(part))
            elif isinstance(part, Convolution):
                made.append(self.convolution(part))
            else:
                assert isinstance(part, MeanSquare)  # no others are planned for inference
                made.append(dataclasses.replace(part, weight=self.weight(part)))
        sums: dict[frozenset[Label], list[Term]] = {}
        for term in self.expr.terms:
            if all(map(_is_ahead, term.factors)) and (not term.windows or has_taps(term)):
                sums.setdefault(term.labels & self.expr.free, []).append(term)
        numbers = [t for t in sums.get(frozenset(), ()) if not t.factors and not t.windows]
        arrays = [[t for t in terms if t not in numbers] for terms in sums.values()]
        arrays = sorted(filter(None, arrays), key=_size)
        for i, terms in enumerate(arrays):
            made.append(self.sum((*terms, *numbers) if i == 0 else terms))
        return (*made, *(Product(t, 0) for t in numbers if not arrays))

    def sum(self, terms: Sequence[Term]) -> Product:
        """What is added to the result, as one array."""
        if len(terms) == 1 and _is_plain(terms[0], self.expr.free):
            return Product(terms[0], 0)
        present = frozenset().union(*(t.labels for t in terms)) & self.expr.free
        labels = [x for x in itertools.chain(*self.expr.dims) if x in present]
        return Product(Term(1.0, (self.leaf(terms, labels, is_sum=True),)), 0)

    def linear(self, part: Linear) -> Linear:
        """Rows times one array."""
        terms = [w.term for w in part.weights]
        if not all(_is_constant(w) and not w.term.windows for w in part.weights):
            keep = frozenset(part.weight_labels)
            weights = tuple(self.product(w, keep) for w in part.weights)
            return dataclasses.replace(part, weights=weights)
        inside = frozenset(part.weight_labels)
        if len(terms) == 1 and _is_plain(terms[0], inside) and not part.centre_weight:
            return part
        factor = self.leaf(terms, part.weight_labels, part.centre_weight)
        weight = Product(Term(1.0, (factor,)), 0)
        return dataclasses.replace(part, weights=(weight,), centre_weight=frozenset())

    def convolution(self, part: Convolution) -> Convolution:
        """A convolution with one array."""
        terms = [w.term for w in part.weights]
        if not all(_is_ahead(f) for t in terms for f in t.factors):
            return part
        axes = _kernel_axes(part)
        shape = tuple(math.prod(label.size for label in axis) for axis in axes)
        dtype = self.stored(terms)
        value = Value(jax.core.ShapedArray(shape, dtype))
        self.formed.append(Kernel(value, part, self.expr))
        leaf = Leaf(value, "param", shape, dtype, trainable=False)
        weight = Product(Term(1.0, (Factor(leaf, axes, (None,) * len(axes)),)), 0)
        taps = tuple(Taps(((g.tap, 1),) if g.tap is not None else (), 0) for g in part.grids)
        order = tuple(itertools.chain(*axes))
        return dataclasses.replace(
            part, weights=(weight,), places=(Place(taps, ()),), weight_labels=order
        )

    def weight(self, part: MeanSquare) -> Product:
        """The weight of a mean square, as one array."""
        term = part.weight.term
        inside = frozenset(part.weight_labels)
        if not _is_constant(part.weight) or _is_plain(term, inside) or term.windows:
            return part.weight
        labels = [x for x in part.weight_labels if x in term.labels]
        return Product(Term(1.0, (self.leaf([term], labels),)), 0)

    def product(self, part: Product, keep: frozenset[Label]) -> Product:
        """A term with each of its largest products of weights as one array.

        Args:
          part: the term and its order.
          keep: the labels over which it is computed.
        """
        term = part.term
        if not term.factors:
            return part
        windows = frozenset().union(*(w.labels for w in term.windows))
        groups, order = _grouped(part.order, term, keep | windows, self.expr)
        weights = [i for i, group in enumerate(groups) if all(_is_ahead(f) for f in group.factors)]
        scaled = min(weights, key=lambda i: groups[i].size, default=None)
        if not _scale_is_fixed(term, self.expr):
            scaled = None
        factors = [
            self.group(group, term.scale if i == scaled else 1.0) for i, group in enumerate(groups)
        ]
        left = term.scale if scaled is None else 1.0
        return Product(Term(left, tuple(factors), term.windows), order)

    def group(self, group: "_Group", scale: float) -> Factor:
        """Factors that are multiplied first, times a number, as one factor."""
        known = all(map(_is_ahead, group.factors))
        if not known or _is_plain(Term(scale, group.factors), frozenset(group.labels)):
            return group.factors[0]
        return self.leaf([Term(scale, group.factors)], group.labels)

    def leaf(
        self,
        terms: Sequence[Term],
        labels: Iterable[Label],
        less_mean: frozenset[Label] = frozenset(),
        *,
        is_sum: bool = False,
    ) -> Factor:
        """A new array over ``labels``."""
        labels = tuple(labels)
        dims = tuple((label,) for label in labels)
        stored = self.stored(terms)
        wide = jnp.result_type(stored, *(f.leaf.dtype for term in terms for f in term.factors))
        expr = Expr(dims, tuple(terms), wide, lax.Precision.HIGHEST)
        value = Value(jax.core.ShapedArray(expr.shape, stored))
        axes = tuple(i for i, label in enumerate(labels) if label in less_mean)
        self.formed.append(Formed(value, recipe(expr), axes, is_sum))
        leaf = Leaf(value, "param", expr.shape, stored, trainable=False)
        return Factor(leaf, dims, (None,) * len(dims))

    def stored(self, terms: Sequence[Term]) -> Any:
        """The dtype of what is made of terms; a product may leave the range of float16."""
        multiplied = any(len(term.factors) > 1 for term in terms)
        narrow = self.expr.dtype == jnp.float16 and multiplied
        return jnp.dtype(jnp.float32 if narrow else self.expr.dtype)


@dataclasses.dataclass(frozen=True)
class _Group:
    """A single factor, or factors that are all known ahead.

    Attributes:
      factors: what is multiplied.
      labels: the axes of the result.
    """

    factors: tuple[Factor, ...]
    labels: tuple[Label, ...]

    @property
    def size(self) -> int:
        """The number of entries of the result."""
        return math.prod(label.size for label in self.labels)


def _grouped(
    order: Order, term: Term, keep: frozenset[Label], expr: Expr
) -> tuple[list[_Group], Order]:
    """The largest products of factors that are known ahead, and the order on these."""
    groups: list[_Group] = []
    place = {label: i for i, label in enumerate(itertools.chain(*expr.dims))}

    def visit(order: Order, needed: frozenset[Label]) -> Order:
        inside = tuple(term.factors[k] for k in sorted(members(order)))
        if isinstance(order, int) or all(_is_ahead(f) for f in inside):
            labels = dict.fromkeys(x for f in inside for x in itertools.chain(*f.axes))
            kept = [x for x in labels if x in needed]
            groups.append(_Group(inside, tuple(sorted(kept, key=lambda x: place.get(x, -1)))))
            return len(groups) - 1
        # rows first: then the result has the layout of a dense layer's
        rows = [any(term.factors[k].is_data for k in members(half)) for half in order]
        first, second = order if rows[0] or not rows[1] else order[::-1]
        return (
            visit(first, needed | _labels(second, term)),
            visit(second, needed | _labels(first, term)),
        )

    return groups, visit(order, keep)


def _is_ahead(factor: Factor) -> bool:
    return not factor.is_data and factor.leaf.invariant


def _is_constant(part: Product) -> bool:
    return all(_is_ahead(f) for f in part.term.factors)


def _is_sum(part: Part) -> bool:
    """Whether a part is added to the value, the same for every call."""
    if isinstance(part, Product):
        return _is_constant(part) and not part.term.windows
    if not isinstance(part, Convolution) or (part.rows is not None and not _is_ahead(part.rows)):
        return False
    return all(_is_ahead(f) for w in part.weights for f in w.term.factors)


def _is_plain(term: Term, inside: frozenset[Label]) -> bool:
    """Whether a term is one leaf on labels inside of these, with nothing to be computed."""
    alone = len(term.factors) == 1 and term.scale == 1.0 and not term.windows
    return alone and term.labels <= inside


def _scale_is_fixed(term: Term, expr: Expr) -> bool:
    """Whether a term's number can be trusted not to count rows or positions, as a mean does."""
    known = frozenset().union(*(f.labels for f in term.factors if _is_ahead(f)))
    return term.labels - expr.free <= known


def _kernel_axes(part: Convolution) -> tuple[tuple[Label, ...], ...]:
    """The axes of a kernel as a convolution takes it: taps, channels read, channels made."""
    taps = [g.tap for g in part.grids if g.tap is not None]
    rows = part.rows.labels if part.rows is not None else frozenset[Label]()
    read = [x for x in part.weight_labels if x in rows.union(part.ones)]
    summed = tuple(x for x in read if x not in part.kept)
    groups = tuple(x for x in read if x in part.kept)
    made = tuple(x for x in part.weight_labels if x not in (*taps, *read))
    return (*((x,) for x in taps), summed, (*groups, *made))


def _size(terms: Sequence[Term]) -> int:
    return min(sum(f.leaf.size for f in term.factors) for term in terms)


def _labels(order: Order, term: Term) -> frozenset[Label]:
    return frozenset().union(*(term.factors[k].labels for k in members(order)))


def _terms(part: Part) -> tuple[Term, ...]:
    """What a part reads, as terms."""
    if isinstance(part, Product):
        return (part.term,)
    if isinstance(part, Linear):
        data = (part.rows, *part.row_scales)
        return tuple(Term(1.0, (*data, *w.term.factors)) for w in part.weights)
    if isinstance(part, Convolution):
        read = (part.rows,) if part.rows is not None else ()
        return tuple(Term(1.0, (*read, *w.term.factors)) for w in part.weights)
    assert isinstance(part, MeanSquare)
    rows = Term(part.scale, (part.rows, part.rows, *part.weight.term.factors))
    return (rows,)


def _term_name(term: Term, numbers: dict[Label, int], leaves: Mapping[Any, str]) -> str:
    """Factors in order of their names, labels numbered as they appear behind those of the axes."""
    factors = sorted(term.factors, key=lambda f: (leaves[f.leaf.var], repr(f.slices)))
    named: list[Hashable] = [term.scale]
    for factor in factors:
        axes = tuple(
            (tuple((numbers.setdefault(label, len(numbers)), label.size) for label in axis), view)
            for axis, view in zip(factor.axes, factor.slices, strict=True)
            if axis or view is not None
        )
        centred = tuple(sorted(numbers.setdefault(x, len(numbers)) for x in factor.centred))
        named.append((leaves[factor.leaf.var], axes, centred))
    windows = sorted(
        (sorted((numbers.setdefault(x, len(numbers)), by, x.size) for x, by in w.steps), w.offset)
        for w in term.windows
    )
    return repr((named, windows))
