"""Functions of looked-up rows, computed once for each row of the table.

A function that acts on every row alone commutes with the look-up,

    ``f(E[ids]) = f(E)[ids]``,

and the right-hand side costs the vocabulary instead of the tokens. The gradient is the same sum
in another order: the look-up's transpose adds up the cotangents of equal rows before f is
differentiated. A row number outside the table reads one of two further rows, which are what the
look-up as written reads there: f acts on them as on any row, and their cotangents go where the
look-up as written sends them, which for jax's default is nowhere.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from fcjax import compat
from fcjax.expressions.primitives import VIEWS
from fcjax.expressions.written import Written, written
from fcjax.planning import rowwise
from fcjax.planning.contraction import ELEMENTWISE, START, moved
from fcjax.planning.plan import Plan, folds_always, plan
from fcjax.planning.rowwise import Region
from fcjax.rules.lookups import reads_rows
from fcjax.tracing import trace
from fcjax.tracing.trace import Body, Equation, Kind, Value

__all__ = ["planned"]

OUTSIDE = 2
"""Rows that stand for all numbers before the table, and for all behind it."""
MARGIN = 0.05
"""What is hoisted must be cheaper than what it replaces by this fraction."""


def planned(network: Written, objective: Literal["time", "memory"] = "time") -> Plan:
    """The plan of a network, with functions of looked-up rows hoisted if that is cheaper.

    Args:
      network: the network as written.
      objective: what the planner saves.
    """
    inputs = [network.known[value] for value in network.body.inputs]
    found = plan(network, objective)
    for equation in network.body.equations:
        choice = _choice(found.body, equation, found.known)
        if choice is None:
            continue
        other = plan(written(_hoisted(found.body, choice), inputs), objective)
        more = choice.after - choice.before  # for look-ups, which plans do not price
        if folds_always() or other.after.time + more <= found.after.time * (1 + 1e-9):
            found = dataclasses.replace(other, before=found.before)
    return found


# --- how far it pays ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Choice:
    """What is computed on the table.

    Attributes:
      lookup: the gather.
      region: everything that acts on its rows alone.
      equations: those that are hoisted.
      frontier: their results that something else reads, which are looked up instead.
      before: what the look-up as written costs.
      after: what the look-ups of the frontier cost.
    """

    lookup: Equation
    region: Region
    equations: tuple[Equation, ...]
    frontier: tuple[Value, ...]
    before: float
    after: float


def _choice(body: Body, lookup: Equation, known: Mapping[Value, Kind]) -> _Choice | None:
    """The prefix of a look-up's region that is cheapest on the table, if any is."""
    if not _can_move(body, lookup, known):
        return None
    (table, _), out = lookup.values, lookup.outputs[0]
    assert out is not None
    tokens = out.shape[: len(out.shape) - len(table.shape) + 1]
    found = rowwise.region(body, [out], tokens)
    price = _Prices(math.prod(tokens), known)
    slow, fast = (
        [price(e, count) for e in found.equations]
        for count in (price.tokens, table.shape[0] + OUTSIDE)
    )
    before = price.look_up(out)
    choices = [
        _Choice(lookup, found, found.equations[:k], frontier, before, after)
        for k, frontier in _frontiers(body, out, found)
        for after in [sum(price.look_up(v) for v in frontier)]
    ]
    best = min(choices, key=lambda c: _time(c, slow, fast), default=None)
    limit = (1 - MARGIN) * (sum(slow) + before)
    pays = best is not None and (folds_always() or _time(best, slow, fast) <= limit)
    return best if pays else None


def _time(choice: _Choice, slow: Sequence[float], fast: Sequence[float]) -> float:
    """What the region costs if a part of it is hoisted."""
    k = len(choice.equations)
    return sum(fast[:k]) + choice.after + sum(slow[k:])


def _can_move(body: Body, lookup: Equation, known: Mapping[Value, Kind]) -> bool:
    """Whether a look-up of parameters is one whose numbers mean the same for other tables."""
    if not reads_rows(lookup) or len(lookup.values) < 2 or lookup.outputs[0] is None:
        return False
    (table, numbers), out = lookup.values, lookup.outputs[0]
    assert out is not None
    count = len(numbers.shape) - 1
    last = tuple(range(count, len(out.shape)))
    return (
        known[table].of != "data"
        and count > 0
        and math.prod(out.shape) > 0
        and jnp.issubdtype(numbers.aval.dtype, jnp.signedinteger)
        and lookup.source.params["dimension_numbers"].offset_dims == last
        and not any(compat.is_placed(v.aval) for v in (table, numbers, out))
    )


def _frontiers(body: Body, out: Value, region: Region) -> Iterator[tuple[int, tuple[Value, ...]]]:
    """For every number of hoisted equations, the values that something else reads."""
    last: dict[Value, float] = {}
    for i, equation in enumerate(region.equations):
        last.update(dict.fromkeys(equation.values, i))
    inside = set(region.equations)
    elsewhere = [v for e in body.equations if e not in inside for v in e.values]
    results = [a for a in body.outputs if isinstance(a, Value)]
    last |= dict.fromkeys([*elsewhere, *results], math.inf)
    made = [out]
    for k, equation in enumerate(region.equations, 1):
        made = [v for v in (*made, *equation.outputs) if v is not None and last.get(v, -1) >= k]
        yield k, tuple(made)


@dataclasses.dataclass(frozen=True)
class _Prices:
    """What equations that act on rows cost, in the units of ``contraction``.

    Attributes:
      tokens: the number of rows that are looked up.
      known: what each value depends on.
    """

    tokens: int
    known: Mapping[Value, Kind]

    def __call__(self, equation: Equation, count: int) -> float:
        """An equation on ``count`` rows."""
        if equation.name in VIEWS:
            return 0.0
        sizes = [math.prod(v.shape) for v in (*equation.outputs, *equation.values) if v is not None]
        if equation.name != "dot_general":
            return 2 * ELEMENTWISE * max(sizes) * count / self.tokens
        made, rows, weight = sizes
        share = count / self.tokens
        work = 2.0 * made * self._summed(equation) * share
        itemsize = equation.source.outvars[0].aval.dtype.itemsize  # type: ignore[attr-defined]
        traffic = sum(moved(itemsize * n) for n in (made * share, rows * share, weight))
        passes = 1 + sum(self.known[v].trainable for v in equation.values)
        return max(work, traffic) * passes

    def _summed(self, equation: Equation) -> int:
        """How many products are added up for an entry of the result."""
        (_, contracted), _ = equation.source.params["dimension_numbers"]
        return math.prod(equation.values[1].shape[i] for i in contracted)

    def look_up(self, value: Value) -> float:
        """Reading rows for every token, and adding their cotangents up."""
        traffic = moved(math.prod(value.shape) * value.aval.dtype.itemsize)
        return (traffic + START) * (1 + 2 * self.known[value].trainable)


# --- the body with it ---------------------------------------------------------------------------


def _hoisted(body: Body, choice: _Choice) -> Body:
    """The body, computing on the table what ``choice`` says and looking up the frontier."""
    table, numbers = choice.lookup.values
    (out,) = choice.lookup.outputs
    wanted = [v for v in choice.frontier if v is not out]
    count, *columns = table.shape
    count += OUTSIDE
    rows = _value((*(1,) * (len(choice.region.tokens) - 1), count, *columns), table)
    places = Value(jax.core.ShapedArray(numbers.shape, jnp.promote_types(numbers.aval.dtype, "i4")))
    shared = _shared(choice)
    features = [v.shape[len(choice.region.tokens) :] for v in wanted]
    results = [_value((count, *f), v) for f, v in zip(features, wanted, strict=True)]
    new = [
        *_traced(_with_rows_outside(choice.lookup, rows.shape), [table, numbers], [rows, places]),
        *_traced(_on_table(choice, wanted, shared), [rows, *shared], results),
        *itertools.chain.from_iterable(
            _traced(functools.partial(_read, choice.lookup), [result, places], [v])
            for v, result in zip(wanted, results, strict=True)
        ),
    ]
    gone = {*choice.equations, *([] if out in choice.frontier else [choice.lookup])}
    kept = [e for e in body.equations if e not in gone]
    return dataclasses.replace(
        body, equations=tuple(_in_order([*new, *kept])), rows={**body.rows, rows: table}
    )


def _value(shape: tuple[int, ...], like: Value) -> Value:
    return Value(jax.core.ShapedArray(shape, like.aval.dtype))


def _with_rows_outside(
    lookup: Equation, shape: tuple[int, ...]
) -> Callable[[Array, Array], list[Array]]:
    """The table with what numbers outside of it read, and for each number where its row is now.

    The further rows are read as the look-up reads: clipped, filled, with its own transpose. Where
    no number is outside they are rows of the table, so that no NaN meets a cotangent of zero.
    """

    def extended(table: Array, numbers: Array) -> list[Array]:
        count = table.shape[0]
        wide = numbers.astype(jnp.promote_types(numbers.dtype, jnp.int32))
        ends = jnp.stack([jnp.minimum(wide.min(), 0), jnp.maximum(wide.max(), count - 1)])
        (outside,) = _read(lookup, table, ends[:, None], **_as_written(lookup))
        places = jnp.where(wide < 0, count, jnp.where(wide < count, wide, count + 1))
        return [jnp.concatenate([table, outside]).reshape(shape), places]

    return extended


def _as_written(lookup: Equation) -> dict[str, Any]:
    """What a look-up does outside its table."""
    return {key: lookup.source.params[key] for key in ("mode", "fill_value")}


def _shared(choice: _Choice) -> list[Value]:
    """What the hoisted equations read besides rows: parameters, mostly."""
    inside = {v for e in choice.equations for v in e.outputs} | set(choice.lookup.outputs)
    read = dict.fromkeys(v for e in choice.equations for v in e.values if v not in inside)
    repeated = choice.region.repeated
    sources = itertools.chain.from_iterable(
        repeated[v].values if v in repeated else [v] for v in read
    )
    return list(dict.fromkeys(sources))


def _on_table(
    choice: _Choice, wanted: Sequence[Value], shared: Sequence[Value]
) -> Callable[..., list[Array]]:
    """The hoisted equations as a function of the table's rows and what is shared."""
    (out,) = choice.lookup.outputs
    tokens = choice.region.tokens
    read = {v for e in choice.equations for v in e.values}
    repeated = [e for v, e in choice.region.repeated.items() if v in read]

    def compute(rows: Array, *others: Array) -> list[Array]:
        env: dict[Any, Any] = {out: rows, **dict(zip(shared, others, strict=True))}
        count = rows.shape[len(tokens) - 1]
        rowwise.run([*repeated, *choice.equations], env, tokens, count)
        return [env[v].reshape(count, *v.shape[len(tokens) :]) for v in wanted]

    return compute


def _read(
    lookup: Equation, table: Array, numbers: Array, *,
    mode: Any = lax.GatherScatterMode.PROMISE_IN_BOUNDS, fill_value: Any = None,
) -> list[Array]:  # fmt: skip
    """The look-up of whole rows of another table, whose numbers may come in any order."""
    count = numbers.ndim - 1
    params = lookup.source.params
    changed = {
        "dimension_numbers": params["dimension_numbers"]._replace(
            offset_dims=tuple(range(count, count + table.ndim - 1))
        ),
        "slice_sizes": (1, *table.shape[1:]),
        "unique_indices": False,
        "indices_are_sorted": False,
        "mode": mode,
        "fill_value": fill_value,
    }
    return [lax.gather_p.bind(table, numbers, **{**params, **changed})]


def _traced(
    fn: Callable[..., list[Array]], inputs: Sequence[Value], outputs: Sequence[Value]
) -> list[Equation]:
    """The equations of a function between values that exist already."""
    avals = [jax.ShapeDtypeStruct(v.shape, v.aval.dtype) for v in inputs]
    body = trace.flatten(jax.make_jaxpr(fn)(*avals))
    names: dict[Any, Any] = dict(zip(body.inputs, inputs, strict=True))
    names |= dict(zip(body.outputs, outputs, strict=True))
    return [
        Equation(
            e.source,
            tuple(names.get(a, a) if isinstance(a, Value) else a for a in e.inputs),
            tuple(names.get(v, v) for v in e.outputs),
        )
        for e in body.equations
    ]


def _in_order(equations: Sequence[Equation]) -> Iterator[Equation]:
    """The equations, each behind those that it reads from; effects stay in order."""
    missing = {v for e in equations for v in e.outputs}
    left = list(equations)
    while left:
        waiting: list[Equation] = []
        for equation in left:
            after = equation.source.effects and any(e.source.effects for e in waiting)
            if after or not missing.isdisjoint(equation.values):
                waiting.append(equation)
            else:
                missing.difference_update(equation.outputs)
                yield equation
        left = waiting
