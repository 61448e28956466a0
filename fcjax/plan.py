"""Which values to compute as they are written and which to express through others, by price.

The values of a body fall into *roots*, which are computed, and the rest, which exist only inside
the expressions of roots. The plan starts from the network as written: products, values that
something non-linear reads and values with several readers are roots. Then it takes roots away as
long as the price of a training step falls: a hidden activation that is expressed through its
input makes the product of its weights, a normalised value that is expressed through its input
folds the gain forward. What does not pay by a margin is left exactly as it was written.
"""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any, Literal

import numpy as np

from fcjax import expressions as ex
from fcjax import trace
from fcjax.compat import Literal as Number
from fcjax.contraction import Cost
from fcjax.expressions import Expr, Unrepresentable
from fcjax.parts import Recipe, recipe
from fcjax.primitives import RULES, VIEWS
from fcjax.trace import Body, Equation, Kind, Value

__all__ = ["Change", "Plan", "always_fold", "plan"]

MARGIN = 0.02
"""A rewrite must be cheaper than what it replaces by this fraction, the model's own doubt."""
SAFE_MARGIN = 0.005
"""The same for a rewrite with no more products than the original, which can only save traffic."""
TIE = 0.01
"""A rewrite that holds clearly less for the backward pass may be predicted this much slower."""
CLEARLY_LESS = 0.95
SLOWEST = 2.0
"""Under ``objective="memory"`` a rewrite may cost this many times the time of the original."""
PASSES = 8

_always = contextvars.ContextVar("always", default=False)


@contextlib.contextmanager
def always_fold() -> Iterator[None]:
    """Takes every rewrite that can be represented, whatever it costs.

    For tests: small networks whose products do not pay then exercise the folded path too.

    Example:
      >>> from fcjax.plan import always_fold
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
    runs: int

    @functools.cached_property
    def is_trivial(self) -> bool:
        """Whether nothing is computed differently, here or in a nested body."""
        inner = itertools.chain.from_iterable(self.nested.values())
        return not self.recipes and all(p.is_trivial for p in inner)


def plan(
    body: Body, inputs: Sequence[Kind], objective: Literal["time", "memory"] = "time", runs: int = 1
) -> Plan:
    """Plans how to compute a body.

    Args:
      body: the equations.
      inputs: what each input of the body depends on.
      objective: what a rewrite must save.
      runs: how often the body runs in one training step.
    """
    known = trace.kinds(body, inputs)
    written = _AsWritten(body, known)
    search = _Search(written.roots, written.hard, objective, runs)
    search.run()
    nested = {}
    for i, equation in enumerate(body.equations):
        inner = trace.nested_bodies(equation, known)
        if inner:
            nested[i] = tuple(
                plan(trace.flatten(b.jaxpr), b.kinds, objective, b.runs) for b in inner
            )
    changes = search.changes()
    taken = {root for change in changes if change.taken for root in change.roots}
    recipes = {root: search.recipes[root] for root in taken}
    plans = list(itertools.chain.from_iterable(nested.values()))
    fixed = _boundary_cost(written.boundaries, known)
    before = sum((how.cost for how in search.base.values()), fixed)
    saved = [(c.before, c.after) for c in changes if c.taken]
    after = before + sum((b * -1.0 + a for b, a in saved), Cost())
    return Plan(
        body, known, recipes, nested, tuple(changes), written.roots,
        frozenset(written.boundaries),
        sum((p.before * p.runs for p in plans), before),
        sum((p.after * p.runs for p in plans), after),
        runs,
    )  # fmt: skip


def _boundary_cost(boundaries: Iterable[Equation], known: dict[Value, Kind]) -> Cost:
    """What products that are boundaries pay, such as attention scores; the same in any plan."""
    total = Cost()
    for equation in boundaries:
        (value, *_) = equation.outputs
        if equation.name == "dot_general" and value is not None:
            (contracted, _), _ = equation.source.params["dimension_numbers"]
            shape = _aval(equation.source.invars[0]).shape
            work = 2.0 * _size(value) * float(np.prod([shape[i] for i in contracted]))
            passes = 1 + sum(known[v].trainable for v in equation.values)
            total = total + Cost(work * passes, work * passes)
    return total


# --- the network as written ---------------------------------------------------------------------


class _AsWritten:
    """The network as written: which values are computed, and from what.

    Attributes:
      roots: the values that are computed, with their expressions over roots and leaves.
      hard: the values that must exist as arrays: results, and what boundaries read.
      boundaries: the equations that are no sums of einsum terms.
    """

    def __init__(self, body: Body, known: dict[Value, Kind]) -> None:
        self.known = known
        self.readers, self.operands = _count_readers(body), _operands(body)
        self.seen: dict[Value, Expr] = {}
        self.roots: dict[Value, Expr] = {}
        self.boundaries = {e for e in body.equations if not _has_rule(e)}
        self.hard = {atom for atom in body.outputs if isinstance(atom, Value)}
        self.hard.update(v for e in self.boundaries for v in e.values)
        for equation in body.equations:
            if equation not in self.boundaries:
                self._read(equation)
        position = {v: i for i, e in enumerate(body.equations) for v in e.outputs}
        self.roots = dict(sorted(self.roots.items(), key=lambda item: position[item[0]]))

    def _read(self, equation: Equation) -> None:
        """Applies the equation's rule; if it fails the equation is a boundary too."""
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
            if made_value in self.hard or _is_cut(made_value, expr, self.readers, self.operands):
                self._compute(made_value)

    def _operand(self, atom: Value | Number) -> Expr:
        if not isinstance(atom, Value):
            return Expr((), (ex.Term(float(atom.val), ()),), _aval(atom).dtype)
        if atom not in self.seen:
            self.seen[atom] = ex.of_leaf(self.known[atom].leaf(atom))
        return self.seen[atom]

    def _compute(self, value: Value) -> None:
        """Makes a value a root, which later equations read as a leaf."""
        expr = self.seen.pop(value, None)
        if expr is not None and value not in expr.leaves:
            self.roots[value] = expr


def _count_readers(body: Body) -> dict[Value, int]:
    count: dict[Value, int] = {}
    for equation in body.equations:
        for value in set(equation.values):
            count[value] = count.get(value, 0) + 1
    return count


def _has_rule(equation: Equation) -> bool:
    avals = [_aval(out) for out in equation.source.outvars]
    floats = all(np.dtype(a.dtype).kind == "f" or a.dtype.name == "bfloat16" for a in avals)
    return floats and equation.name in RULES and not _sharded_by_hand(equation)


def _sharded_by_hand(equation: Equation) -> bool:
    """Whether the equation says how its result is laid out over devices."""
    params = equation.source.params
    return any(params.get(key) is not None for key in ("out_sharding", "sharding"))


def _listed(made: Expr | list[Expr]) -> list[Expr]:
    return made if isinstance(made, list) else [made]


def _is_cut(value: Value, expr: Expr, readers: dict[Value, int], operands: set[Value]) -> bool:
    """Whether the network as written computes this value and reads it back."""
    if _is_view(expr):
        return False
    if value in operands:
        return expr.has_data or _is_product(expr)
    if not expr.has_data or readers.get(value, 0) < 2:
        return False
    largest = max(f.leaf.size for t in expr.terms for f in t.factors if f.is_data)
    return _is_product(expr) or 2 * _size(value) > largest


def _is_view(expr: Expr) -> bool:
    """Whether an expression only looks at one leaf, without arithmetic."""
    (term, *more) = expr.terms or (None,)
    if term is None or more or len(term.factors) != 1 or term.windows or term.scale != 1.0:
        return False
    return term.labels <= expr.free and not term.factors[0].centred


def _is_product(expr: Expr) -> bool:
    return any(len(t.factors) > 1 and not t.labels <= expr.free for t in expr.terms)


def _operands(body: Body) -> set[Value]:
    """Values that a matrix product reads, directly or through views."""
    found: set[Value] = set()
    for equation in reversed(body.equations):
        views = equation.name in VIEWS and not found.isdisjoint(v for v in equation.outputs if v)
        if views or equation.name == "dot_general":
            found.update(equation.values)
    return found


def _aval(atom: Any) -> Any:
    return atom.aval


def _size(value: Value) -> int:
    return int(np.prod(value.shape, dtype=np.int64))


# --- the search ---------------------------------------------------------------------------------


class _Search:
    """Takes roots away while the price falls.

    Attributes:
      base: the recipes of the network as written.
      recipes: the recipes now, of the roots that are left.
    """

    def __init__(
        self,
        roots: dict[Value, Expr],
        hard: Set[Value],
        objective: Literal["time", "memory"],
        runs: int,
    ) -> None:
        self.hard = hard
        self.objective = objective
        self.runs = runs
        self.order = {value: i for i, value in enumerate(roots)}
        self.base = {value: self._recipe(expr) for value, expr in roots.items()}
        self.recipes = dict(self.base)
        self.readers: dict[Value, set[Value]] = {value: set() for value in roots}
        for value, how in self.recipes.items():
            self._link(value, how)
        self.clusters = _Clusters(roots)
        self.gone: set[Value] = set()
        self.changed: set[Value] = set()
        self.declined: dict[tuple[Value, ...], Change] = {}
        self.tried: dict[tuple[Value, ...], list[Recipe]] = {}

    def _recipe(self, expr: Expr) -> Recipe:
        try:
            return recipe(expr, self.runs)
        except Unrepresentable:  # computed as written, at a price nobody compares with
            return Recipe(expr, (), Cost())

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
        read = [v for v in self.recipes[root].expr.leaves if v in self.recipes]
        return any(self._try(move) for move in _moves(read, self.recipes))

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
        if not self._pays(before, after, for_sure=False):
            roots = tuple(sorted(affected, key=self.order.__getitem__))
            self.declined[move] = Change(roots, move, before, after, taken=False)
            return False
        self._apply(move, gone, new)
        return True

    def _without(self, root: Value, move: Iterable[Value]) -> Recipe:
        expr = self.recipes[root].expr
        for value in sorted(move, key=self.order.__getitem__, reverse=True):
            if value in expr.leaves:
                expr = ex.substitute(expr, value, self.recipes[value].expr)
        return recipe(expr, self.runs)

    def _pays(self, before: Cost, after: Cost, *, for_sure: bool) -> bool:
        if folds_always():
            return True
        margin = SAFE_MARGIN if after.flops <= 1.01 * before.flops else MARGIN
        limit = 1 - margin if for_sure else 1 + 1e-9
        if self.objective == "memory":
            smaller = after.held < limit * before.held
            same = after.held <= before.held and after.time <= limit * before.time
            return (smaller and after.time <= SLOWEST * before.time) or same
        smaller = after.held <= CLEARLY_LESS * before.held
        return after.time <= (1 + TIE if smaller else limit) * before.time

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
        self.clusters.join((*move, *new))

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
        return Change(roots, gone, before, after, self._pays(before, after, for_sure=True))


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


class _Clusters:
    """Union-find over roots."""

    def __init__(self, values: Iterable[Value]) -> None:
        self.parent = {value: value for value in values}

    def find(self, value: Value) -> Value:
        while self.parent[value] is not value:
            self.parent[value] = self.parent[self.parent[value]]
            value = self.parent[value]
        return value

    def join(self, values: Sequence[Value]) -> None:
        first = self.find(values[0])
        for value in values[1:]:
            self.parent[self.find(value)] = first

    def groups(self) -> list[list[Value]]:
        found: dict[Value, list[Value]] = {}
        for value in self.parent:
            found.setdefault(self.find(value), []).append(value)
        return list(found.values())
