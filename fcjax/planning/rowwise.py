"""Equations that act on each row of an array alone, and how they run on another number of rows.

The first axes of a value number its rows, as the batch and the position do behind a look-up
``table[ids]``: the *tokens*. An equation acts on rows if it does the same to every one of them and
mixes none: arithmetic, sums over the other axes, products of the other axes with something that
all rows share. On ``n`` rows it runs with the token axes ``(1, ..., 1, n)``, so that every number
of an axis in its parameters stays what it was.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fcjax import compat
from fcjax.tracing import trace
from fcjax.tracing.trace import Atom, Body, Equation, Value

__all__ = ["Region", "region", "run"]

ENTRYWISE = frozenset(
    {"add", "add_any", "sub", "mul", "div", "neg", "max", "min", "abs", "sign", "square", "sqrt",
     "rsqrt", "cbrt", "integer_pow", "pow", "exp", "exp2", "expm1", "log", "log1p", "sin", "cos",
     "tanh", "logistic", "erf", "erfc", "select_n", "eq", "ne", "lt", "le", "gt", "ge", "and", "or",
     "not", "convert_element_type", "copy", "copy_p", "stop_gradient", "clamp", "is_finite"}
)  # fmt: skip
REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_prod"})


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Everything in a body that acts on the rows of some of its values alone.

    Attributes:
      tokens: the sizes of the token axes.
      equations: those that act on rows, in order.
      repeated: equations that give something all rows share the token axes, by what they make.
    """

    tokens: tuple[int, ...]
    equations: tuple[Equation, ...]
    repeated: Mapping[Value, Equation]

    @property
    def makes(self) -> set[Value]:
        """What the equations compute."""
        return {v for e in self.equations for v in e.outputs if v is not None}


def region(
    body: Body,
    start: Iterable[Value],
    tokens: tuple[int, ...],
    checked: frozenset[str] = frozenset(),
) -> Region:
    """Follows rows through a body as far as equations act on each alone.

    Args:
      body: the equations.
      start: values whose first axes are ``tokens``.
      tokens: the sizes of the token axes.
      checked: functions with derivatives of their own that are being followed already: the
        derivative usually calls the function again.
    """
    rows = set(start)
    behind, found, repeated = set(rows), list[Equation](), dict[Value, Equation]()
    for equation in body.equations:
        made = [v for v in equation.outputs if v is not None]
        if behind.isdisjoint(equation.values):
            if _repeats(equation, len(tokens)):
                repeated[made[0]] = equation
            continue
        behind.update(made)
        seen = _Seen(rows, behind, repeated, tokens, checked)
        if seen.acts_on_rows(equation):
            found.append(equation)
            rows.update(made)
    return Region(tokens, tuple(found), repeated)


def _is_float(value: Value) -> bool:
    return jnp.issubdtype(value.aval.dtype, jnp.floating)


def _repeats(equation: Equation, count: int) -> bool:
    """Whether an equation only repeats something along token axes that it does not have."""
    if equation.name != "broadcast_in_dim" or len(equation.inputs) != 1:
        return False
    params = equation.source.params
    shape = equation.source.invars[0].aval.shape  # type: ignore[attr-defined]
    places = zip(params["broadcast_dimensions"], shape, strict=True)
    return params.get("sharding") is None and all(p >= count or size == 1 for p, size in places)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What is known of the values so far.

    Attributes:
      rows: values with token axes.
      behind: everything that depends on them.
      repeated: values that are the same for all rows, on token axes.
      tokens: the sizes of the token axes.
      checked: see ``region``.
    """

    rows: set[Value]
    behind: set[Value]
    repeated: Mapping[Value, Equation]
    tokens: tuple[int, ...]
    checked: frozenset[str]

    def acts_on_rows(self, equation: Equation) -> bool:
        rule = ACTS_ON_ROWS.get(equation.name)
        if rule is None or equation.source.effects:
            return False
        params = equation.source.params
        by_hand = any(params.get(key) is not None for key in ("sharding", "out_sharding"))
        if by_hand or not self.rows.issuperset(self.behind.intersection(equation.values)):
            return False
        return rule(self, equation)

    def has_rows(self, atom: Atom) -> bool:
        return atom in self.rows

    def fits_rows(self, atom: Atom) -> bool:
        """Whether an operand has rows, or is one and the same for all of them."""
        if not isinstance(atom, Value):
            return not jnp.shape(atom.val)
        if atom in self.rows or atom in self.repeated:
            return True
        shared = all(size == 1 for size in atom.shape[: len(self.tokens)])
        return atom not in self.behind and shared


# --- one rule for each kind of primitive --------------------------------------------------------


def _entrywise(seen: _Seen, equation: Equation) -> bool:
    return all(seen.fits_rows(atom) for atom in equation.inputs)


def _reduction(seen: _Seen, equation: Equation) -> bool:
    return min(equation.source.params["axes"], default=len(seen.tokens)) >= len(seen.tokens)


def _product(seen: _Seen, equation: Equation) -> bool:
    """Features of the rows times something that all rows share."""
    (contracted, _), batch = equation.source.params["dimension_numbers"]
    rows, other = equation.inputs
    shared = isinstance(other, Value) and other not in seen.behind
    inside = min(contracted, default=0) >= len(seen.tokens)
    return seen.has_rows(rows) and shared and inside and not any(batch)


def _broadcast(seen: _Seen, equation: Equation) -> bool:
    params, count = equation.source.params, len(seen.tokens)
    kept = tuple(params["broadcast_dimensions"][:count]) == tuple(range(count))
    return kept and tuple(params["shape"][:count]) == seen.tokens


def _reshape(seen: _Seen, equation: Equation) -> bool:
    params, count = equation.source.params, len(seen.tokens)
    return params["dimensions"] is None and tuple(params["new_sizes"][:count]) == seen.tokens


def _squeeze(seen: _Seen, equation: Equation) -> bool:
    return min(equation.source.params["dimensions"], default=0) >= len(seen.tokens)


def _transpose(seen: _Seen, equation: Equation) -> bool:
    count = len(seen.tokens)
    return tuple(equation.source.params["permutation"][:count]) == tuple(range(count))


def _slice(seen: _Seen, equation: Equation) -> bool:
    params, count = equation.source.params, len(seen.tokens)
    whole = tuple(params["limit_indices"][:count]) == seen.tokens
    starts, strides = params["start_indices"][:count], (params["strides"] or ())[:count]
    return whole and not any(starts) and all(stride == 1 for stride in strides)


def _split(seen: _Seen, equation: Equation) -> bool:
    return equation.source.params["axis"] >= len(seen.tokens)


def _concatenate(seen: _Seen, equation: Equation) -> bool:
    inside = equation.source.params["dimension"] >= len(seen.tokens)
    rows = all(a in seen.rows or a in seen.repeated for a in equation.inputs)
    return inside and rows


def _custom(seen: _Seen, equation: Equation) -> bool:
    """A function with a derivative of its own, if it and the derivative act on rows."""
    values = [a for a in equation.inputs if isinstance(a, Value)]
    if len(values) < len(equation.inputs) or not all(a in seen.rows for a in values):
        return False
    if equation.source.params.get("num_consts") or not all(_is_float(v) for v in values):
        return False
    called = f"{equation.source.params.get('name')}: {equation.source.params['call_jaxpr']}"
    if called in seen.checked:
        return True
    checked = seen.checked | {called}
    return all(
        _all_on_rows(body, seen.tokens, checked)
        for body in (_inner(equation), _derivative(equation))
    )


def _all_on_rows(body: Body, tokens: tuple[int, ...], checked: frozenset[str]) -> bool:
    found = region(body, body.inputs, tokens, checked)
    acting = {*found.equations, *found.repeated.values()}
    rows = found.makes | set(body.inputs)
    return (
        not body.constants and acting.issuperset(body.equations) and rows.issuperset(body.outputs)
    )


ACTS_ON_ROWS: dict[str, Callable[[_Seen, Equation], bool]] = {
    **dict.fromkeys(ENTRYWISE, _entrywise),
    **dict.fromkeys(REDUCTIONS, _reduction),
    "dot_general": _product,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "custom_jvp_call": _custom,
}


def _inner(equation: Equation) -> Body:
    return trace.flatten(equation.source.params["call_jaxpr"])


def _derivative(equation: Equation) -> Body:
    """The user's rule: from values and tangents to results and theirs."""

    def both(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        return jax.jvp(lambda *xs: compat.bind(equation.source, xs), primals, tangents)

    avals = [jax.ShapeDtypeStruct(v.shape, v.aval.dtype) for v in equation.values]
    return trace.flatten(jax.make_jaxpr(both)(avals, avals))


# --- on another number of rows ------------------------------------------------------------------


def run(
    equations: Iterable[Equation], env: dict[Value, Any], tokens: tuple[int, ...], count: int
) -> None:
    """Evaluates equations that act on rows, and what they share, on ``count`` rows.

    Args:
      equations: in an order in which they can be computed.
      env: arrays of the values they read; what they make is added.
      tokens: the sizes of the token axes in the equations.
      count: the number of rows, on token axes ``(1, ..., 1, count)`` in ``env``.
    """
    new = (*(1,) * (len(tokens) - 1), count)
    for equation in equations:
        values = [env[a] if isinstance(a, Value) else a.val for a in equation.inputs]
        if equation.name == "custom_jvp_call":
            results = _run_custom(equation, values, tokens, count)
        else:
            results = compat.bind(_resized(equation, tokens, new), values)
        env.update((v, x) for v, x in zip(equation.outputs, results, strict=True) if v is not None)


SHAPES = {"broadcast_in_dim": "shape", "reshape": "new_sizes", "slice": "limit_indices"}
"""The parameters that say how many rows there are."""


def _resized(equation: Equation, tokens: tuple[int, ...], new: tuple[int, ...]) -> Any:
    key = SHAPES.get(equation.name)
    source = equation.source
    if key is None or tuple(source.params[key][: len(tokens)]) != tokens:
        return source
    sizes = (*new, *source.params[key][len(tokens) :])
    return source.replace(params={**source.params, key: sizes})


def _run_custom(
    equation: Equation, values: Sequence[Any], tokens: tuple[int, ...], count: int
) -> list[Any]:
    """The function and its own derivative, both on ``count`` rows."""
    inner, derivative = _inner(equation), _derivative(equation)

    def evaluated(body: Body, inputs: Sequence[Any]) -> list[Any]:
        env = dict(body.constants) | dict(zip(body.inputs, inputs, strict=True))
        run(body.equations, env, tokens, count)
        return [env[a] if isinstance(a, Value) else a.val for a in body.outputs]

    def function(*xs: Any) -> list[Any]:
        return evaluated(inner, xs)

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        results = evaluated(derivative, [*primals, *tangents])
        return results[: len(results) // 2], results[len(results) // 2 :]

    function.__name__ = equation.source.params.get("name", "function")
    custom = jax.custom_jvp(function)
    custom.defjvp(rule)
    return list(custom(*values))
