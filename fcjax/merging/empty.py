"""Values without entries, as for a batch of size 0: there is nothing to compute.

They are made of nothing, so that what is computed of them needs no parameter in front of them, and
a call with such sizes reads no other arrays than one with rows.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fcjax.tracing import trace
from fcjax.tracing.trace import Body, Equation, Value

__all__ = ["without_empty"]


def without_empty(body: Body) -> Body:
    """The body with arrays without entries in the place of what would compute them."""
    equations = [step for e in body.equations for step in (_empty(e) if _is_empty(e) else (e,))]
    return dataclasses.replace(body, equations=tuple(equations))


def _is_empty(equation: Equation) -> bool:
    """Whether all that an equation makes has no entries."""
    made = [v for v in equation.outputs if v is not None]
    numbers = all(not jnp.issubdtype(v.aval.dtype, jax.dtypes.extended) for v in made)
    nothing = all(math.prod(v.shape) == 0 for v in made)
    return bool(made) and nothing and numbers and not equation.source.effects


def _empty(equation: Equation) -> Sequence[Equation]:
    made = [v for v in equation.outputs if v is not None]
    avals = [v.aval for v in made]
    flat = trace.flatten(jax.make_jaxpr(lambda: [jnp.zeros(a.shape, a.dtype) for a in avals])())
    of: dict[Value, Value] = dict(zip(flat.outputs, made, strict=True))  # type: ignore[arg-type]
    return [
        Equation(e.source, e.inputs, tuple(v and of.get(v, v) for v in e.outputs))
        for e in flat.equations
    ]
