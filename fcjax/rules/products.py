"""Matrix chains: runs of parameters that a network only reads through their product.

Between two factors of a linear segment stands a hidden space (``spaces.hidden``) that nothing reads
entry by entry. If exactly two parameters stand on it, no bias, no branch and no tied use, they are
only ever read multiplied. Runs of such parameters are found here, and the network is rewritten so
that it reads their product ``Z = W_1 ... W_N`` as one parameter.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import jax

from fcjax.errors import FrontContributionError
from fcjax.expressions import algebra, terms
from fcjax.expressions.terms import Expr, Factor, Term
from fcjax.expressions.written import Written
from fcjax.rules.fold import in_order
from fcjax.rules.rewrite import replaced
from fcjax.spaces.hidden import Space, Spaces, find
from fcjax.tracing.trace import Body, Value

__all__ = ["MatrixChain", "matrix_chains", "with_products"]

Joint = tuple[int, int]
"""An axis of a parameter, by their numbers."""


@dataclasses.dataclass(frozen=True)
class MatrixChain:
    """Matrices that are only read through their product.

    Attributes:
      leaves: the numbers of the parameters from the input to the output, at least two.
      turned: for each whether it is stored transposed, of shape ``(out, in)``.
    """

    leaves: tuple[int, ...]
    turned: tuple[bool, ...]


def matrix_chains(network: Written, count: int) -> tuple[MatrixChain, ...]:
    """Finds the matrix chains of a network, by structure alone.

    Args:
      network: the network as written; the first ``count`` inputs are the parameters.
      count: the number of parameters.

    Returns:
      The chains, each as long as possible.

    Example:
      >>> import numpy as np
      >>> from fcjax.tracing import trace
      >>> from fcjax.tracing.trace import Kind
      >>> from fcjax.expressions.written import written
      >>> kinds = [Kind("param", trainable=True)] * 2 + [Kind("data", trainable=False)]
      >>> jaxpr = jax.make_jaxpr(lambda a, b, x: x @ a @ b.T)(*[np.ones((3, 3))] * 3)
      >>> matrix_chains(written(trace.flatten(jaxpr), kinds), 2)
      (MatrixChain(leaves=(0, 1), turned=(False, True)),)
    """
    across = dict(_joints(network, find(network, count), count))
    order = in_order(network.body, network.body.inputs[:count])
    rank = {value: i for i, value in enumerate(order)}
    found = []
    for leaf, axis in across:
        if (leaf, 1 - axis) in across:
            continue
        joints = _followed(leaf, axis, across)
        first, last = (rank[network.body.inputs[end]] for end in (joints[0][0], joints[-1][0]))
        if first < last:
            chain = MatrixChain(
                tuple(i for i, _ in joints), tuple(entry == 1 for _, entry in joints)
            )
            found.append(_directed(chain, network))
    return tuple(found)


def _directed(chain: MatrixChain, network: Written) -> MatrixChain:
    """The chain from the end that meets data; where none or both do, as it is read."""
    made = with_products(network, [chain], [""] * len(network.body.inputs))
    ends = {made.body.inputs[chain.leaves[-1]]: (0, 1)}
    votes = 0
    for value, expr in made.roots.items():
        for term in expr.terms:
            for factor in term.factors:
                if factor.leaf.var in ends:
                    entry, leaving = (factor.axes[i] for i in ends[factor.leaf.var])
                    votes += _meets(entry, term, expr) - _meets(leaving, term, expr)
        if len(expr.terms) == 1 and len(expr.terms[0].factors) == 1:
            (factor,) = expr.terms[0].factors
            axes = [factor.axes[i] for i in ends.get(factor.leaf.var, ())]
            if axes and set(axes) <= set(expr.dims):  # a view, which others read in its place
                ends[value] = (expr.dims.index(axes[0]), expr.dims.index(axes[1]))
    if votes >= 0:
        return chain
    return MatrixChain(chain.leaves[::-1], tuple(not turned for turned in chain.turned[::-1]))


def _meets(axis: terms.Axis, term: Term, expr: Expr) -> bool:
    """Whether an axis of a factor is contracted with data."""
    data = frozenset().union(*(f.labels for f in term.factors if f.is_data))
    return bool(axis) and set(axis) <= data - expr.free


def _followed(leaf: int, leaving: int, across: Mapping[Joint, Joint]) -> list[Joint]:
    """The factors of a chain that starts with a leaf, each with the axis by which it is entered."""
    chain = [(leaf, 1 - leaving)]
    while (chain[-1][0], 1 - chain[-1][1]) in across:
        chain.append(across[chain[-1][0], 1 - chain[-1][1]])
    return chain


def _joints(network: Written, spaces: Spaces, count: int) -> Iterator[tuple[Joint, Joint]]:
    """For an axis on a space of two matrices the axis that it meets there, both ways."""
    inputs = network.body.inputs[:count]
    handed = {v for e in network.boundaries for v in e.values}
    chainable = {
        i
        for i, value in enumerate(inputs)
        if len(value.shape) == 2 and value not in handed and network.known[value].trainable
    }
    for space in spaces.found:
        ends = _ends(space, spaces)
        if ends is not None and {leaf for leaf, _ in ends} <= chainable:
            yield ends
            yield ends[1], ends[0]


def _ends(space: Space, spaces: Spaces) -> tuple[Joint, Joint] | None:
    """The two axes that a space is, if it is a whole axis of two parameters and nothing else."""
    if space.source is not None or not space.sided or space.depth or len(space.places) != 2:
        return None
    first, second = space.places
    if first.leaf == second.leaf or first.reads == second.reads:
        return None
    axes = []
    for place in (first, second):
        owners = [axis for axis, sizes in enumerate(spaces.splits[place.leaf]) for _ in sizes]
        axis = owners[place.piece]
        if len(spaces.splits[place.leaf][axis]) != 1:
            return None
        axes.append((place.leaf, axis))
    return axes[0], axes[1]


# --- the network with products as parameters ----------------------------------------------------


def with_products(network: Written, chains: Sequence[MatrixChain], names: Sequence[str]) -> Written:
    """The network that reads each chain's product, in the place of its last factor.

    The products have shape ``(in, out)``. The other factors stay inputs that nothing reads.

    Args:
      network: the network as written, for any call.
      chains: the chains whose products are trained.
      names: the names of the parameters, for messages.

    Raises:
      FrontContributionError: if this call reads a factor of a chain by itself.
    """
    writer = _Writer(network, chains)
    roots = {v: e for v, e in writer.roots() if not writer.is_open(e)}
    changed = {v for v, e in roots.items() if e is not network.roots[v]}
    _refuse_open(network, writer, roots, chains, names)
    body = network.body
    made = Body(
        tuple(writer.products.get(v, v) for v in body.inputs),
        body.constants,
        tuple(replaced(e, writer.products) for e in body.equations),
        body.outputs,
    )
    known = network.known | {new: network.known[old] for old, new in writer.products.items()}
    return dataclasses.replace(
        network, body=made, known=known, roots=roots, forced=network.forced | changed
    )


def _refuse_open(
    network: Written,
    writer: "_Writer",
    roots: Mapping[Value, Expr],
    chains: Sequence[MatrixChain],
    names: Sequence[str],
) -> None:
    """Checks that what is left of the network reads no factor.

    Raises:
      FrontContributionError: naming the factors of the chain.
    """
    needed = {a for a in network.body.outputs if isinstance(a, Value)}
    needed.update(v for e in network.boundaries for v in e.values)
    needed.update(v for expr in roots.values() for v in expr.leaves)
    gone = needed & ({v for v in network.roots if v not in roots} | writer.parts.keys())
    if gone:
        listed = ", ".join(names[leaf] for chain in chains for leaf in chain.leaves)
        raise FrontContributionError(
            f"this call reads the hidden spaces between {listed} in another way than the example "
            "arguments of front_contribute did, so that it cannot run on their product. Make fc "
            "with such a call as the example, or use apply_fn(fc.expand(params), ...) for it."
        )


@dataclasses.dataclass(frozen=True)
class _Part:
    """A run of neighbouring factors of a chain, and the axes by which it is entered and left."""

    chain: int
    first: int
    last: int
    entry: int
    exit: int


class _Writer:
    """Multiplies neighbouring factors in every expression.

    Attributes:
      parts: what the leaves of expressions are, for factors and for products of a few of them.
      products: for the last factor of each chain, the product of all.
    """

    def __init__(self, network: Written, chains: Sequence[MatrixChain]) -> None:
        self.network = network
        self.chains = chains
        self.parts: dict[Value, _Part] = {}
        self.products: dict[Value, Value] = {}
        self.partial: dict[tuple[int, int, int], Value] = {}
        for number, chain in enumerate(chains):
            for place, (leaf, turned) in enumerate(zip(chain.leaves, chain.turned, strict=True)):
                value = network.body.inputs[leaf]
                self.parts[value] = _Part(number, place, place, int(turned), 1 - turned)
            self.products[value] = self._value(number, 0, len(chain.leaves) - 1)

    def _value(self, chain: int, first: int, last: int) -> Value:
        """The product of a run of factors, as a value of its own."""
        if (chain, first, last) not in self.partial:
            ends = [self._end(chain, first, 0), self._end(chain, last, 1)]
            dtype = self.network.body.inputs[self.chains[chain].leaves[last]].aval.dtype
            made = Value(jax.core.ShapedArray(tuple(ends), dtype))
            self.partial[chain, first, last] = made
            if last - first + 1 < len(self.chains[chain].leaves):
                self.parts[made] = _Part(chain, first, last, 0, 1)
        return self.partial[chain, first, last]

    def _end(self, chain: int, place: int, axis: int) -> int:
        leaf, turned = self.chains[chain].leaves[place], self.chains[chain].turned[place]
        return self.network.body.inputs[leaf].shape[1 - axis if turned else axis]

    def is_open(self, expr: Expr) -> bool:
        """Whether an expression reads anything less than a whole product."""
        return any(leaf in self.parts for leaf in expr.leaves)

    def roots(self) -> Iterator[tuple[Value, Expr]]:
        """All roots with neighbouring factors multiplied, also across roots."""
        made: dict[Value, Expr] = {}
        for value, expr in self.network.roots.items():
            inner = [v for v in expr.leaves if v in made and self.is_open(made[v])]
            for v in inner:
                expr = algebra.substitute(expr, v, made[v])
            made[value] = self._multiplied(expr) if self.is_open(expr) else expr
            yield value, made[value]

    def _multiplied(self, expr: Expr) -> Expr:
        terms = tuple(self._shortened(term, expr) for term in expr.terms)
        return dataclasses.replace(expr, terms=terms)

    def _shortened(self, term: Term, expr: Expr) -> Term:
        factors = list(term.factors)
        while (pair := self._neighbours(factors, expr)) is not None:
            before, after = pair
            factors = [f for f in factors if f is not before and f is not after]
            factors.append(self._joined(before, after))
        return dataclasses.replace(term, factors=tuple(factors))

    def _neighbours(self, factors: Sequence[Factor], expr: Expr) -> tuple[Factor, Factor] | None:
        for before, after in itertools.permutations(factors, 2):
            a, b = (self.parts.get(f.leaf.var) for f in (before, after))
            if a is None or b is None or a.chain != b.chain or a.last + 1 != b.first:
                continue
            meeting = before.axes[a.exit]
            if meeting == after.axes[b.entry] and expr.free.isdisjoint(meeting):
                return before, after
        return None

    def _joined(self, before: Factor, after: Factor) -> Factor:
        a, b = self.parts[before.leaf.var], self.parts[after.leaf.var]
        value = self._value(a.chain, a.first, b.last)
        leaf = dataclasses.replace(after.leaf, var=value, shape=value.shape)
        ends = ((before, a.entry), (after, b.exit))
        return Factor(leaf, tuple(f.axes[i] for f, i in ends), tuple(f.slices[i] for f, i in ends))
