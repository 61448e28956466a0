"""Which values to compute as they are written and which to express through others, by price.

The values of a body fall into *roots*, which are computed, and the rest, which exist only inside
the expressions of roots. The plan starts from the network as written: products, values that
something non-linear reads and values with several readers are roots. Then it takes roots away as
long as the price of a training step falls: a hidden activation that is expressed through its
input makes the product of its weights, a normalised value that is expressed through its input
folds the gain forward. Once more it starts from the network with the means taken off its residual
streams (``streams.py``). What does not pay by a margin is left exactly as it was written.
"""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Literal

from fcjax.clusters import Clusters
from fcjax.expressions import algebra
from fcjax.expressions.terms import Expr, Unrepresentable
from fcjax.expressions.written import Written, is_numeric, is_view
from fcjax.planning.contraction import START, Cost
from fcjax.planning.parts import Recipe
from fcjax.planning.phases import in_phases
from fcjax.planning.recipes import recipe
from fcjax.planning.squares import square_in
from fcjax.planning.streams import centred
from fcjax.tracing.trace import Body, Equation, Kind, Value

__all__ = ["Change", "Plan", "Refutation", "always_fold", "plan"]

MARGIN = 0.02
"""A rewrite must be cheaper than what it replaces by this fraction, the model's own doubt."""
SAFE_MARGIN = 0.005
"""The same for a rewrite with no more products than the original, which can only save traffic."""
TIE = 0.01
"""A rewrite that holds clearly less for the backward pass may be predicted this much slower."""
CLEARLY_LESS = 0.95
SLOWEST = 2.0
"""Under ``objective="memory"`` a rewrite may cost this many times the time of the original."""
CENTRED = 0.05
"""By how much streams less their mean must be cheaper: a GPT of 4 blocks for which 3% were
predicted took 2% longer, a stack of 6 blocks for which 18% were took 12% less."""
MEANS = 4.0
"""Operations that taking the mean off what writes a stream begins, with their derivatives."""
PASSES = 8

Objective = Literal["time", "memory"]

_always = contextvars.ContextVar("always", default=False)


@contextlib.contextmanager
def always_fold() -> Iterator[None]:
    """Takes every rewrite that can be represented, whatever it costs.

    For tests: small networks whose products do not pay then exercise the folded path too.

    Example:
      >>> from fcjax.planning.plan import always_fold
      >>> with always_fold():
      ...     pass  # front_contribute(...) here folds all it can
    """
    token = _always.set(True)
    try:
        yield
    finally:
        _always.reset(token)


def folds_always() -> bool:
    """Whether ``always_fold`` is in force; part of what a plan depends on."""
    return _always.get()


@dataclasses.dataclass(frozen=True)
class Change:
    """Roots whose computation a rewrite changed together, or would have.

    Attributes:
      roots: the values that are computed differently.
      gone: the values that are no longer computed.
      before: what the training step paid for all of them.
      after: what it pays now.
      taken: whether the rewrite is part of the plan.
    """

    roots: tuple[Value, ...]
    gone: tuple[Value, ...]
    before: Cost
    after: Cost
    taken: bool


@dataclasses.dataclass(frozen=True)
class Refutation:
    """A rewrite that numbers refute, so that it is not part of the plan; see ``validation``.

    Attributes:
      values: what it computed.
      leaves: the arrays that it computed these from.
      reason: how it was found to be wrong.
      program: what the network says these values are, as a jaxpr.
    """

    values: tuple[Value, ...]
    leaves: tuple[Value, ...]
    reason: str
    program: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a body is computed.

    Attributes:
      body: the equations as written.
      known: what each value depends on.
      recipes: for each value that is computed differently, how.
      nested: for the numbers of equations with bodies of their own, the plans of those.
      changes: every rewrite that was taken or declined, with its price.
      before: the price of a training step as written.
      after: its price as planned.
      bases: the expressions of the roots of the network as written.
      boundaries: the equations that are no sums of einsum terms.
      runs: how often the body runs in one training step.
      less_mean: values that are computed less their mean over an axis, which nobody sees.
      refuted: rewrites that were declined because numbers refute them.
    """

    body: Body
    known: dict[Value, Kind]
    recipes: dict[Value, Recipe]
    nested: dict[int, tuple["Plan", ...]]
    changes: tuple[Change, ...]
    bases: dict[Value, Expr]
    boundaries: frozenset[Equation]
    before: Cost
    after: Cost
    runs: float
    less_mean: Mapping[Value, int] = dataclasses.field(default_factory=dict)
    refuted: tuple[Refutation, ...] = ()

    def without(self, values: Set[Value]) -> "Plan":
        """The plan without the changes that compute any of these values."""
        taken = [c for c in self.changes if c.taken]
        dropped = [c for c in taken if not values.isdisjoint(c.roots)]
        gone = {root for change in dropped for root in change.roots}
        changes = tuple(
            dataclasses.replace(c, taken=False) if c in dropped else c for c in self.changes
        )
        saved = sum((c.before + c.after * -1.0 for c in dropped), Cost())
        recipes = {v: how for v, how in self.recipes.items() if v not in gone}
        after = self.after + saved
        return dataclasses.replace(self, recipes=recipes, changes=changes, after=after)

    @functools.cached_property
    def is_trivial(self) -> bool:
        """Whether nothing is computed differently, here or in a nested body."""
        inner = itertools.chain.from_iterable(self.nested.values())
        return not self.recipes and all(p.is_trivial for p in inner)


def plan(
    network: Written,
    objective: Objective = "time",
    original: Written | None = None,
    *,
    streams: bool = True,
) -> Plan:
    """Plans how to compute a body.

    Args:
      network: the body as written.
      objective: what a rewrite must save.
      original: the body before its shapes were reduced, if they were, whose price counts as the
        price as written.
      streams: whether residual streams may be kept less their mean.
    """
    originals = original.nested if original is not None else {}
    nested = {
        i: tuple(
            plan(inner, objective, before, streams=streams)
            for inner, before in zip(bodies, originals.get(i, itertools.repeat(None)), strict=False)
        )
        for i, bodies in network.nested.items()
    }
    found = _planned(network, nested, objective, original)
    other = centred(network) if streams and not math.isinf(network.runs) else None
    if other is None:
        return found
    less_means = _planned(other, nested, objective, original or network)
    begun = MEANS * START * len(other.forced - network.forced)
    saves_time = less_means.after.time + begun <= (1 - CENTRED) * found.after.time
    enough = saves_time or objective == "memory" or folds_always()
    pays = _pays(found.after, less_means.after, objective, network.runs, for_sure=True)
    return less_means if enough and pays else found


def _planned(
    network: Written,
    nested: dict[int, tuple[Plan, ...]],
    objective: Objective,
    original: Written | None,
) -> Plan:
    """Plans a body whose nested bodies are planned already."""
    search = _Search(network, objective)
    search.run()
    changes = search.changes()
    taken = {root for change in changes if change.taken for root in change.roots}
    gone = {root for change in changes if change.taken for root in change.gone}
    recipes = {root: search.recipes[root] for root in taken}
    recipes |= {r: search.base[r] for r in network.forced if r not in taken and r not in gone}
    plans = list(itertools.chain.from_iterable(nested.values()))
    fixed = _boundary_cost(network)
    as_given = sum((how.cost for how in search.base.values()), fixed)
    saved = [(c.before, c.after) for c in changes if c.taken]
    after = as_given + sum((b * -1.0 + a for b, a in saved), Cost())
    before = as_given if original is None else _price(original)
    return Plan(
        network.body, network.known, recipes, nested, tuple(changes), network.computed,
        network.boundaries,
        sum((p.before * p.runs for p in plans), before),
        sum((p.after * p.runs for p in plans), after),
        network.runs,
        network.less_mean,
    )  # fmt: skip


def _price(network: Written) -> Cost:
    """What a training step of the body itself pays as written."""
    computed = network.computed.values()
    return sum((_priced(expr, network.runs).cost for expr in computed), _boundary_cost(network))


def _priced(expr: Expr, runs: float) -> Recipe:
    try:
        return recipe(expr, runs, square_in(expr))
    except Unrepresentable:  # computed as written, at a price nobody compares with
        return Recipe(expr, (), Cost())


def _boundary_cost(network: Written) -> Cost:
    """What products that are boundaries pay; the same in any plan."""
    total = Cost()
    products = [e for e in network.boundaries if e.name == "dot_general"]
    for equation in products:
        (value,) = equation.outputs
        if value is not None and value not in network.products:
            (contracted, _), _ = equation.source.params["dimension_numbers"]
            shape = equation.values[0].shape
            work = 2.0 * math.prod(value.shape) * math.prod(shape[i] for i in contracted)
            passes = 1 + sum(network.known[v].trainable for v in equation.values)
            total = total + Cost(work * passes, work * passes)
    return total


# --- the search ---------------------------------------------------------------------------------


class _Search:
    """Takes roots away while the price falls.

    Attributes:
      base: the recipes of the network as written.
      recipes: the recipes now, of the roots that are left.
    """

    def __init__(self, network: Written, objective: Objective) -> None:
        roots, runs = network.computed, network.runs
        self.hard, self.products = network.entrywise, network.products.keys()
        self.objective, self.runs = objective, runs
        self.order = {value: i for i, value in enumerate(roots)}
        self.base = {value: _priced(expr, runs) for value, expr in roots.items()}
        self.recipes = dict(self.base)
        self.readers: dict[Value, set[Value]] = {value: set() for value in roots}
        for value, how in self.recipes.items():
            self._link(value, how)
        self.clusters = Clusters(roots)
        self.gone: set[Value] = set()
        self.changed: set[Value] = set()
        self.declined: dict[tuple[Value, ...], Change] = {}
        self.tried: dict[tuple[Value, ...], list[Recipe]] = {}

    def _link(self, value: Value, how: Recipe) -> None:
        for leaf in how.expr.leaves:
            if leaf in self.readers:
                self.readers[leaf].add(value)

    def run(self) -> None:
        """Tries every move until none is left that pays."""
        for _ in range(PASSES):
            moved = False
            for root in list(self.recipes):
                while root in self.recipes and self._improve(root):
                    moved = True
            if not moved:
                return

    def _improve(self, root: Value) -> bool:
        """Takes the first move among the roots that ``root`` reads; jointly before singly."""
        read = self._read_by(root)
        through = ((v, *self._read_by(v)) for v in read if v in self.products)
        return any(map(self._try, itertools.chain(_moves(read, self.recipes), through)))

    def _read_by(self, value: Value) -> list[Value]:
        return [v for v in self.recipes[value].expr.leaves if v in self.recipes]

    def _try(self, move: tuple[Value, ...]) -> bool:
        """Expresses the values of ``move`` through what they are made of, in all their readers."""
        affected = set().union(*(self.readers[v] for v in move)) - set(move)
        state = [self.recipes[v] for v in sorted({*affected, *move}, key=self.order.__getitem__)]
        if not affected or _identical(self.tried.get(move, []), state):
            return False
        self.tried[move] = state
        try:
            new = {root: self._without(root, move) for root in affected}
        except Unrepresentable:
            return False
        gone = [v for v in move if v not in self.hard]
        before = sum((self.recipes[v].cost for v in (*affected, *gone)), Cost())
        after = sum((how.cost for how in new.values()), Cost())
        views = all(is_view(self.recipes[v].expr) for v in move)
        idle = not views and self._saves_no_work({*affected, *move}, before, after)
        if idle or not _pays(before, after, self.objective, self.runs, for_sure=False):
            if any(map(_multiplies_weights, new.values())):
                roots = tuple(sorted(affected, key=self.order.__getitem__))
                self.declined[move] = Change(roots, move, before, after, taken=False)
            return False
        self._apply(move, gone, new)
        return True

    def _saves_no_work(self, values: Set[Value], before: Cost, after: Cost) -> bool:
        """Whether a product of two activations would be computed otherwise for nothing.

        What is multiplied into its operands must save operations, which a scale does not.
        """
        saved = after.flops < (1 - MARGIN) * before.flops
        return not saved and not self.products.isdisjoint(values) and not folds_always()

    def _is_fused_anyway(
        self, roots: Sequence[Value], gone: Sequence[Value], before: Cost, after: Cost
    ) -> bool:
        """Whether all that is saved is adding up and scaling by numbers.

        The compiler does that where a value is written or read, at no cost.
        """
        if folds_always() or any(_multiplies_weights(self.recipes[root]) for root in roots):
            return False
        made, read = (all(is_numeric(self.base[v].expr) for v in vs) for vs in (roots, gone))
        scaled = made and all(len(self.base[v].expr.terms) == 1 for v in roots)
        same = after.flops >= (1 - MARGIN) * before.flops
        return (made and read) or (same and (scaled or read))

    def _without(self, root: Value, move: Iterable[Value]) -> Recipe:
        expr, square = self.recipes[root].expr, self.recipes[root].square
        for value in sorted(move, key=self.order.__getitem__, reverse=True):
            if value in expr.leaves:
                made = self.recipes[value].expr
                expr = algebra.substitute(expr, value, made)
                square = square and square.substitute(value, made)
        return in_phases(recipe(expr, self.runs, square), self.runs)

    def _apply(
        self, move: tuple[Value, ...], gone: Sequence[Value], new: dict[Value, Recipe]
    ) -> None:
        for root, how in new.items():
            for leaf in self.recipes[root].expr.leaves:
                if leaf in self.readers:
                    self.readers[leaf].discard(root)
            self.recipes[root] = how
            self._link(root, how)
        for value in gone:
            for leaf in self.recipes[value].expr.leaves:
                if leaf in self.readers:
                    self.readers[leaf].discard(value)
            del self.recipes[value]
        self.gone.update(gone)
        self.changed.update(new)
        for value in (*move, *new):
            self.clusters.join(move[0], value)

    def changes(self) -> list[Change]:
        """The rewrites, each a set of roots that depend on one another; declined ones last."""
        taken = [self._change(group) for group in self.clusters.groups() if len(group) > 1]
        return [*taken, *self.declined.values()]

    def _change(self, group: Sequence[Value]) -> Change:
        before = sum((self.base[v].cost for v in group), Cost())
        left = [v for v in group if v in self.recipes]
        after = sum((self.recipes[v].cost for v in left), Cost())
        roots = tuple(v for v in left if v in self.changed)
        gone = tuple(v for v in group if v in self.gone)
        pays = _pays(before, after, self.objective, self.runs, for_sure=True)
        pays = pays and not self._saves_no_work(set(group), before, after)
        pays = pays and not self._is_fused_anyway(roots, gone, before, after)
        return Change(roots, gone, before, after, pays)


def _pays(before: Cost, after: Cost, objective: Objective, runs: float, *, for_sure: bool) -> bool:
    """Whether a rewrite is worth it; ``for_sure`` asks for a margin."""
    if folds_always():
        return True
    if math.isinf(runs) and after.flops > (1 + 1e-9) * before.flops:
        return False
    margin = SAFE_MARGIN if after.flops <= 1.01 * before.flops else MARGIN
    limit = 1 - margin if for_sure else 1 + 1e-9
    if objective == "memory":
        smaller = after.held < limit * before.held
        same = after.held <= before.held and after.time <= limit * before.time
        return (smaller and after.time <= SLOWEST * before.time) or same
    smaller = before.held > 0 and after.held <= CLEARLY_LESS * before.held
    return after.time <= (1 + TIE if smaller else limit) * before.time


def _multiplies_weights(how: Recipe) -> bool:
    """Whether any term is a product of several parameters."""
    return any(sum(not f.is_data for f in term.factors) > 1 for term in how.expr.terms)


def _identical(a: Sequence[Recipe], b: Sequence[Recipe]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _moves(read: Sequence[Value], recipes: dict[Value, Recipe]) -> Iterator[tuple[Value, ...]]:
    """Values that see the same data together first (their terms may merge), then one by one."""
    alike: dict[frozenset[object], list[Value]] = {}
    for value in read:
        leaves = recipes[value].expr.leaves
        data = frozenset(var for var, leaf in leaves.items() if leaf.kind == "data")
        alike.setdefault(data, []).append(value)
    for group in alike.values():
        if len(group) > 1:
            yield tuple(group)
    for value in read:
        yield (value,)
