"""Runs a traced function on numpy arrays, equation by equation, without compiling it.

On small arrays numpy is about as quick as a compiled program, and compiling takes longer than
hundreds of runs. What numpy does not compute as JAX does is left to JAX itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fcjax import compat
from fcjax.compat import JaxprEqn
from fcjax.registry import registering
from fcjax.tracing import trace
from fcjax.tracing.trace import INLINED, Atom, Value

__all__ = ["interpreted"]

Array = Any
Compute = Callable[..., Array]

CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})
"""Calls with derivatives of their own, which values do not depend on."""
PLAIN = frozenset(map(np.dtype, (bool, np.int32, np.int64, np.uint32, np.float32, np.float64)))
"""The dtypes in which numpy and JAX compute alike."""


def interpreted(jaxpr: Any) -> Callable[..., list[Array]]:
    """A function of arrays that computes what a closed jaxpr does, up to rounding.

    Args:
      jaxpr: what ``jax.make_jaxpr`` returns.

    Returns:
      A function of one array for each input, which returns a list of the outputs: numpy arrays of
      the dtypes that were traced, and JAX's own arrays of other dtypes than floats of 32 and 64
      bits, integers and bools.

    Example:
      >>> import jax
      >>> run = interpreted(jax.make_jaxpr(lambda x: (jnp.sum(x * x), x > 1))(np.float32([0, 0])))
      >>> run(np.float32([1, 2]))
      [array(5., dtype=float32), array([False,  True])]
    """
    body = trace.flatten(jaxpr, INLINED | CUSTOM)
    slots = _Slots()
    inputs = [slots.of(value) for value in body.inputs]
    for value, array in body.constants:
        slots.initial[slots.of(value)] = _plain(array, value.aval.dtype)
    steps = [
        (_operation(e.source), [slots.of(a) for a in e.inputs], [slots.of(v) for v in e.outputs])
        for e in body.equations
    ]
    outputs = [slots.of(atom) for atom in body.outputs]

    def run(*arrays: Array) -> list[Array]:
        held = list(slots.initial)
        for slot, value, array in zip(inputs, body.inputs, arrays, strict=True):
            held[slot] = _plain(array, value.aval.dtype)
        with np.errstate(all="ignore"):
            for compute, read, made in steps:
                results = compute(*[held[slot] for slot in read])
                for slot, result in zip(made, results, strict=True):
                    held[slot] = result
        return [held[slot] for slot in outputs]

    return run


class _Slots:
    """Where each array of a program is held while it runs."""

    def __init__(self) -> None:
        self.initial: list[Array] = []
        self._of: dict[Value, int] = {}

    def of(self, atom: Atom | None) -> int:
        """The slot of a value; a new one for a number and for a result that nobody reads."""
        if isinstance(atom, Value) and atom in self._of:
            return self._of[atom]
        if isinstance(atom, Value):
            self._of[atom] = len(self.initial)
        self.initial.append(_number(atom) if isinstance(atom, compat.Literal) else None)
        return len(self.initial) - 1


def _number(literal: Any) -> Array:
    return np.asarray(literal.val, literal.aval.dtype)


def _plain(array: Array, dtype: Any) -> Array:
    return np.asarray(array, dtype) if dtype in PLAIN else array


# --- one equation -------------------------------------------------------------------------------


def _operation(eqn: JaxprEqn) -> Callable[..., list[Array]]:
    """What an equation computes: by numpy if that is the same, else by JAX."""
    dtypes = [aval.dtype for aval in _avals(eqn.outvars)]
    if PLAIN.issuperset(dtypes) and PLAIN.issuperset(a.dtype for a in _avals(eqn.invars)):
        if eqn.primitive.name in CONTROL and eqn.params.get("length") != 0:
            return CONTROL[eqn.primitive.name](eqn.params)
        compute = _by_numpy(eqn)
        if compute is not None:
            return lambda *arrays: [np.asarray(compute(*arrays), dtypes[0])]
    return lambda *arrays: [
        _plain(result, dtype)
        for result, dtype in zip(compat.bind(eqn, arrays), dtypes, strict=True)
    ]


def _avals(atoms: Sequence[Any]) -> list[Any]:
    return [atom.aval for atom in atoms]


def _by_numpy(eqn: JaxprEqn) -> Compute | None:
    """What computes one result of plain arrays, None if numpy does not do it as JAX does."""
    name = eqn.primitive.name
    if name in ENTRYWISE:
        return ENTRYWISE[name]
    if name in FLOATING and jnp.issubdtype(_avals(eqn.invars)[0].dtype, np.floating):
        return FLOATING[name]
    return RULES[name](eqn) if name in RULES else None


ENTRYWISE: dict[str, Compute] = {
    "abs": np.abs, "add": np.add, "add_any": np.add, "and": np.bitwise_and, "copy": np.asarray,
    "copy_p": np.asarray, "eq": np.equal, "ge": np.greater_equal, "gt": np.greater,
    "is_finite": np.isfinite, "le": np.less_equal, "lt": np.less, "max": np.maximum,
    "min": np.minimum, "mul": np.multiply, "ne": np.not_equal, "neg": np.negative,
    "not": np.invert, "or": np.bitwise_or, "rem": np.fmod, "stop_gradient": np.asarray,
    "sub": np.subtract,
}  # fmt: skip
FLOATING: dict[str, Compute] = {
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high), "div": np.divide,
    "cos": np.cos, "exp": np.exp, "log": np.log, "pow": np.power, "rsqrt": lambda x: 1 / np.sqrt(x),
    "sign": np.sign, "sqrt": np.sqrt, "square": np.square,
}  # fmt: skip
"""What is the same for floats alone: integers are divided in another way."""

RULES: dict[str, Callable[[JaxprEqn], Compute | None]] = {}
"""For primitives with parameters, from an equation to what computes it."""
rule = registering(RULES, "numpy rule")


@rule("integer_pow")
def _power(eqn: JaxprEqn) -> Compute:
    exponent = eqn.params["y"]
    return lambda x: x**exponent


@rule("select_n")
def _select(eqn: JaxprEqn) -> Compute:
    if _avals(eqn.invars)[0].dtype == np.bool_:
        return lambda which, *cases: np.where(which, cases[-1], cases[0])
    return lambda which, *cases: np.choose(which, cases, mode="clip")


@rule("convert_element_type")
def _convert(eqn: JaxprEqn) -> Compute | None:
    (before, after) = (aval.dtype for aval in _avals([*eqn.invars, *eqn.outvars]))
    if jnp.issubdtype(before, np.floating) and jnp.issubdtype(after, np.integer):
        return None  # out of range numpy wraps round, and JAX takes the nearest
    return lambda x: x.astype(after)


@rule("reshape", "squeeze", "expand_dims")
def _reshape(eqn: JaxprEqn) -> Compute | None:
    if eqn.params.get("dimensions") is not None and eqn.primitive.name == "reshape":
        return None
    (result,) = _avals(eqn.outvars)
    return lambda x: x.reshape(result.shape)


@rule("broadcast_in_dim")
def _broadcast(eqn: JaxprEqn) -> Compute:
    shape, axes = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    sizes = dict(zip(axes, _avals(eqn.invars)[0].shape, strict=True))
    long = tuple(sizes.get(axis, 1) for axis in range(len(shape)))

    def spread(x: Array) -> Array:
        made = np.empty(shape, x.dtype)
        made[...] = x.reshape(long)
        return made

    return spread


@rule("transpose")
def _transpose(eqn: JaxprEqn) -> Compute:
    return lambda x: x.transpose(eqn.params["permutation"])


@rule("slice")
def _slice(eqn: JaxprEqn) -> Compute:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    index = tuple(map(slice, starts, limits, eqn.params["strides"] or [None] * len(starts)))
    return lambda x: x[index]


@rule("concatenate")
def _concatenate(eqn: JaxprEqn) -> Compute:
    return lambda *parts: np.concatenate(parts, axis=eqn.params["dimension"])


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or")
def _reduce(eqn: JaxprEqn) -> Compute | None:
    over = {"sum": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and,
            "or": np.bitwise_or}[eqn.primitive.name.removeprefix("reduce_")]  # fmt: skip
    x, result = _avals([*eqn.invars, *eqn.outvars])
    if 0 in x.shape and over.identity is None:
        return None
    return lambda x: over.reduce(x, axis=tuple(eqn.params["axes"]), dtype=result.dtype)


@rule("dot_general")
def _dot(eqn: JaxprEqn) -> Compute:
    """A product of matrices for each index of the axes that both operands keep."""
    (sum_a, sum_b), (both_a, both_b) = eqn.params["dimension_numbers"]
    a, b = (aval.shape for aval in _avals(eqn.invars))
    own_a = [axis for axis in range(len(a)) if axis not in {*sum_a, *both_a}]
    own_b = [axis for axis in range(len(b)) if axis not in {*sum_b, *both_b}]
    count, inner = math.prod(a[i] for i in both_a), math.prod(a[i] for i in sum_a)
    rows, columns = math.prod(a[i] for i in own_a), math.prod(b[i] for i in own_b)
    (result,) = _avals(eqn.outvars)

    def product(x: Array, y: Array) -> Array:
        left = x.transpose(*both_a, *own_a, *sum_a).reshape(count, rows, inner)
        right = y.transpose(*both_b, *sum_b, *own_b).reshape(count, inner, columns)
        return np.matmul(left, right, dtype=result.dtype).reshape(result.shape)

    return product


# --- loops and branches -------------------------------------------------------------------------


def _branching(params: dict[str, Any]) -> Callable[..., list[Array]]:
    branches = [interpreted(branch) for branch in params["branches"]]
    return lambda which, *arrays: branches[np.clip(which, 0, len(branches) - 1)](*arrays)


def _scanned(params: dict[str, Any]) -> Callable[..., list[Array]]:
    """A loop of a fixed number of runs."""
    run = interpreted(params["jaxpr"])
    num_consts, num_carry = compat.scan_layout(params)
    order = range(params["length"])[:: -1 if params["reverse"] else 1]

    def loop(*arrays: Array) -> list[Array]:
        fixed, rest = arrays[:num_consts], arrays[num_consts:]
        carry, streams = list(rest[:num_carry]), rest[num_carry:]
        made = []
        for i in order:
            results = run(*fixed, *carry, *(stream[i] for stream in streams))
            carry, outputs = results[:num_carry], results[num_carry:]
            made.append(outputs)
        stacked = map(np.stack, zip(*made[:: 1 if order.step > 0 else -1], strict=True))
        return [*carry, *stacked]

    return loop


CONTROL = {"cond": _branching, "scan": _scanned}
