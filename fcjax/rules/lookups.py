"""Embedding tables of which the training inputs only read some rows.

Rows that are never read have no gradient. They are left out of training, and the numbers of the
rows are looked up in a table before the rows are.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fcjax import compat
from fcjax.expressions.written import Written
from fcjax.tracing.trace import Body, Equation, Value

__all__ = ["Lookup", "find", "reads_rows", "replaced", "rows_read"]

ENTRYWISE = frozenset(
    {"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "select_n", "sign", "clamp", "max",
     "min", "add", "sub", "mul", "div", "rem", "neg", "convert_element_type", "copy", "reshape",
     "broadcast_in_dim", "squeeze", "expand_dims", "slice", "transpose"}
)  # fmt: skip
"""What may be done to the numbers of rows: nothing that would mix those of different examples."""


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup:
    """One reading of rows of a table.

    Attributes:
      leaf: the number of the parameter.
      equation: the gather.
      argument: the number of the argument that holds the numbers of the rows, None for constants.
      steps: the equations that compute what the gather reads from it.
    """

    leaf: int
    equation: Equation
    argument: int | None
    steps: tuple[Equation, ...]


def find(network: Written, count: int) -> dict[int, tuple[Lookup, ...]]:
    """The parameters that are only read row by row, with their readings.

    Args:
      network: the network as written; the first ``count`` inputs are the parameters.
      count: the number of parameters.
    """
    body = network.body
    made = {v: e for e in body.equations for v in e.outputs if v is not None}
    results = {a for a in body.outputs if isinstance(a, Value)}
    found = {}
    for leaf, value in enumerate(body.inputs[:count]):
        readers = [e for e in body.equations if value in e.values]
        lookups = [_lookup(leaf, value, e, body, made, count) for e in readers]
        if lookups and value not in results and all(lookups):
            found[leaf] = tuple(lookup for lookup in lookups if lookup is not None)
    return found


def reads_rows(equation: Equation) -> bool:
    """Whether an equation is a gather of whole rows of a table, numbered by its second input."""
    table = equation.inputs[0] if equation.name == "gather" else None
    if not isinstance(table, Value):
        return False
    numbers = equation.source.params["dimension_numbers"]
    whole = equation.source.params["slice_sizes"] == (1, *table.shape[1:])
    plain = (numbers.collapsed_slice_dims, numbers.start_index_map) == ((0,), (0,))
    return whole and plain and not numbers.operand_batching_dims


def _lookup(
    leaf: int,
    value: Value,
    equation: Equation,
    body: Body,
    made: Mapping[Value, Equation],
    count: int,
) -> Lookup | None:
    """The reading that an equation is, or None if it is anything else."""
    if not reads_rows(equation) or equation.inputs[0] is not value:
        return None
    read = equation.inputs[1]
    steps = list(_steps(read, made)) if isinstance(read, Value) else []
    known = {v for v, _ in body.constants} | {v for e in steps for v in e.outputs}
    start = {v for e in (equation, *steps) for v in e.values} - known - {value}
    arguments = {v: i for i, v in enumerate(body.inputs[count:])}
    if not all(e.name in ENTRYWISE for e in steps) or len(start) > 1 or not start <= set(arguments):
        return None
    argument = arguments[start.pop()] if start else None
    return Lookup(leaf, equation, argument, tuple(steps))


def _steps(atom: Any, made: Mapping[Value, Equation]) -> Iterator[Equation]:
    """The equations that compute a value, in order."""
    seen: dict[Equation, None] = {}

    def visit(value: Any) -> None:
        equation = made.get(value) if isinstance(value, Value) else None
        if equation is not None and equation not in seen:
            for operand in equation.inputs:
                visit(operand)
            seen[equation] = None

    visit(atom)
    yield from seen


def rows_read(
    lookups: Sequence[Lookup], body: Body, data: Mapping[int, Any], count: int
) -> np.ndarray[Any, Any] | None:
    """The rows of a table that the data read; None if they are not known.

    Args:
      lookups: all readings of the table.
      body: the equations they belong to.
      data: training inputs by the numbers of their arguments.
      count: the number of parameters.
    """
    read: set[int] = set()
    for lookup in lookups:
        if lookup.argument is not None and lookup.argument not in data:
            return None
        numbers = _numbers(lookup, body, count)
        if lookup.argument is None:
            read.update(np.unique(numbers(None)).tolist())
            continue
        size = body.inputs[count + lookup.argument].shape[0]
        for batch in _batches(np.asarray(data[lookup.argument]), size):
            read.update(np.unique(numbers(batch)).tolist())
    last = _table(lookups[0]).shape[0] - 1
    if all(_fills(lookup) for lookup in lookups):  # what is outside is no row
        read = {row for row in read if 0 <= row <= last}
    return np.asarray(sorted({min(max(row, 0), last) for row in read}), np.int32)


def _fills(lookup: Lookup) -> bool:
    return lookup.equation.source.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP


def _table(lookup: Lookup) -> Value:
    table = lookup.equation.inputs[0]
    assert isinstance(table, Value)
    return table


def _batches(array: np.ndarray[Any, Any], size: int) -> Iterator[np.ndarray[Any, Any]]:
    """The examples in batches of one size; the last repeats some."""
    for start in range(0, len(array), size):
        yield np.take(array, range(start, start + size), axis=0, mode="wrap")


def _numbers(lookup: Lookup, body: Body, count: int) -> Callable[[Any], Any]:
    """The numbers of the rows that a batch reads."""

    @jax.jit
    def numbers(batch: Any) -> Any:
        env = dict(body.constants)
        if lookup.argument is not None:
            value = body.inputs[count + lookup.argument]
            env[value] = jnp.asarray(batch, value.aval.dtype)
        for equation in lookup.steps:
            values = [env[a] if isinstance(a, Value) else a.val for a in equation.inputs]
            made = compat.bind(equation.source, values)
            env |= {v: x for v, x in zip(equation.outputs, made, strict=True) if v is not None}
        read = lookup.equation.inputs[1]
        return env[read] if isinstance(read, Value) else read.val

    return numbers


def replaced(lookup: Lookup, table: Value, places: Value) -> Equation:
    """The reading from a table with fewer rows.

    A row that is not there reads as NaN, so that an input the data did not hold cannot go unseen.
    A number outside of the whole table reads, and passes its cotangent on, as it does there.

    Args:
      lookup: the reading of the whole table.
      table: the rows that are there.
      places: for each row of the whole table where it is now, a number too large if it is not.
    """
    params = lookup.equation.source.params
    numbers, sizes, mode = (params[k] for k in ("dimension_numbers", "slice_sizes", "mode"))
    fill = np.nan if params["fill_value"] is None else params["fill_value"]

    @jax.jit
    def read(table: Any, places: Any, rows: Any) -> Any:
        inside = ((rows >= 0) & (rows < places.shape[0]))[..., 0]
        now = jnp.take(places, rows, mode="clip")
        made = lax.gather(table, now, numbers, sizes, mode="fill", fill_value=np.nan)
        beside = tuple(i for i in range(made.ndim) if i in numbers.offset_dims)
        inside = jnp.expand_dims(inside, beside)
        if mode == lax.GatherScatterMode.FILL_OR_DROP:
            return jnp.where(inside, made, fill)
        if mode == lax.GatherScatterMode.PROMISE_IN_BOUNDS:
            return jnp.where(inside, made, lax.stop_gradient(made))
        return made

    rows: Any = lookup.equation.inputs[1]
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in (table, places, rows)]
    (source,) = compat.open_jaxpr(jax.make_jaxpr(read)(*avals))[0].eqns
    return Equation(source, (table, places, rows), lookup.equation.outputs)
