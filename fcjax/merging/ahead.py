"""What a network computes from its parameters alone, and can therefore compute once, ahead.

Such a value must be the same for every call. One whose shape follows from the arguments, like a
bias repeated for every row, is not: only equations whose result has the shape of something that
is known ahead, or is made entirely of it without growing, count.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcjax import compat
from fcjax.expressions.primitives import VIEWS
from fcjax.tracing import trace
from fcjax.tracing.trace import Body, Equation, Kind, Value

__all__ = [
    "compute",
    "digest",
    "identities",
    "is_ahead",
    "is_look",
    "kinds",
    "of_array",
    "of_param",
    "sources",
]

OF_CALL = frozenset({"iota", "gather", "dynamic_slice", "pad", "concatenate"})
"""Primitives whose result can have the size of a batch or of a sequence."""
LOOKS = (VIEWS - {"convert_element_type"}) | {"stop_gradient", "optimization_barrier"}
"""Primitives that copy nothing worth keeping: what is kept is what they look at."""
SAME = frozenset({"stop_gradient", "copy", "copy_p"})
RESHAPES = frozenset({"reshape", "squeeze", "expand_dims", "broadcast_in_dim"})
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def kinds(body: Body, inputs: Sequence[Kind], raw: Set[str] = frozenset()) -> dict[Value, Kind]:
    """What every value depends on; ``invariant`` says that it can be computed ahead.

    Args:
      body: the equations.
      inputs: what its inputs depend on.
      raw: the identities of constants that are read as they are.
    """
    known = trace.kinds(body, inputs)
    left = [value for value, array in body.constants if raw and of_array(array) in raw]
    known |= {value: Kind("const", trainable=False, invariant=False) for value in left}
    for equation in body.equations:
        for value in equation.outputs:
            if value is not None and known[value].of != "data":
                kind = known[value]
                ahead = _same_in_every_call(equation, value, known)
                known[value] = Kind(kind.of, kind.trainable, ahead)
    return known


def _same_in_every_call(equation: Equation, value: Value, known: Mapping[Value, Kind]) -> bool:
    if equation.name in OF_CALL or equation.source.effects:
        return False
    if equation.name == "broadcast_in_dim" and not _is_same(equation):
        return False
    ahead = [v for v in equation.values if known[v].invariant]
    if any(v.shape == value.shape for v in ahead):
        return True
    return bool(ahead) and len(ahead) == len(equation.values)


def is_ahead(value: Value, known: Mapping[Value, Kind]) -> bool:
    """Whether a value is made of parameters and constants alone and is the same in every call."""
    return known[value].of != "data" and known[value].invariant


def is_look(equation: Equation) -> bool:
    """Whether an equation only looks at an array in another way."""
    return equation.name in LOOKS


# --- which value is which, from one trace to the next -------------------------------------------


def digest(*parts: Any) -> str:
    """A short name for what its arguments print as."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def identities(body: Body, names: Mapping[Value, str]) -> dict[Value, str]:
    """A name for every value that is no data, equal for equal computations up to axes of size 1.

    Args:
      body: the equations.
      names: the names of the inputs that are parameters.
    """
    found = _given(body, names)
    for equation in body.equations:
        for i, value in enumerate(equation.outputs):
            if value is not None and all(v in found for v in equation.values):
                found[value] = _of_equation(equation, i, found)
    return found


def sources(body: Body, names: Mapping[Value, str]) -> dict[Value, frozenset[str]]:
    """The identities of the parameters and constants that each value is made of."""
    found = {value: frozenset({name}) for value, name in _given(body, names).items()}
    for equation in body.equations:
        joined = frozenset[str]().union(*(found.get(v, ()) for v in equation.values))
        found |= {v: joined for v in equation.outputs if v is not None}
    return found


def _given(body: Body, names: Mapping[Value, str]) -> dict[Value, str]:
    parameters = {value: digest("input", name) for value, name in names.items()}
    return parameters | {value: of_array(array) for value, array in body.constants}


def of_array(array: Any) -> str:
    """A name for an array, equal for equal numbers."""
    if isinstance(array, jax.core.Tracer) or jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return digest("constant", id(array))  # without values to compare: the same only as itself
    values = np.asarray(array)
    bytes_ = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
    return digest("constant", values.shape, values.dtype.name, bytes_)


def _of_equation(equation: Equation, output: int, found: Mapping[Value, str]) -> str:
    if _is_same(equation):
        return found[equation.values[0]]
    inputs = [
        found[a] if isinstance(a, Value) else (repr(a.val), str(a.aval)) for a in equation.inputs
    ]
    params = [(key, of_param(value)) for key, value in sorted(equation.source.params.items())]
    ranks = [] if _is_entrywise(equation) else [v.shape for v in equation.values]
    return digest(equation.name, output, inputs, params, ranks)


def _is_entrywise(equation: Equation) -> bool:
    """Whether an equation treats all axes alike, so that those of size 1 make no difference."""
    shapes = {v.shape for v in (*equation.values, *equation.outputs) if v is not None}
    return equation.name in trace.ARITHMETIC and len(shapes) == 1


def _is_same(equation: Equation) -> bool:
    """Whether the result is the input, up to axes of size 1."""
    (result, *_) = equation.outputs
    if equation.name in SAME:
        return True
    if equation.name not in RESHAPES or result is None or len(equation.values) != 1:
        return False
    shapes = [[size for size in v.shape if size != 1] for v in (equation.values[0], result)]
    return shapes[0] == shapes[1]


def of_param(value: Any) -> str:
    """A name for a parameter of an equation, such as a jaxpr with its constants."""
    consts = [of_array(c) for c in getattr(value, "consts", ())]
    return ADDRESS.sub("", f"{value} {consts}")


# --- computing it -------------------------------------------------------------------------------


def compute(body: Body, wanted: Iterable[Value], env: Mapping[Value, Any]) -> dict[Value, Any]:
    """Values of a body as they are written.

    Args:
      body: the equations.
      wanted: the values to compute.
      env: arrays that are known, by value.
    """
    needed = set(wanted)
    steps = []
    for equation in reversed(body.equations):
        if any(v in needed and v not in env for v in equation.outputs):
            steps.append(equation)
            needed.update(equation.values)
    known = dict(env)
    for equation in reversed(steps):
        values = [known[a] if isinstance(a, Value) else a.val for a in equation.inputs]
        results = compat.bind(equation.source, values)
        known |= {v: r for v, r in zip(equation.outputs, results, strict=True) if v is not None}
    return known
