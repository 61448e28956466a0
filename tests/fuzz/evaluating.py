"""Evaluates functions; everything that is compared goes through ``values_of``.

Compiling takes most of the time of a random program. Where all floating numbers are double a jaxpr
is evaluated by numpy instead.
"""

from __future__ import annotations

import contextlib
import contextvars
import io
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from fcjax.numbers import interpreter

FAST_TO_COMPILE = {
    "xla_backend_optimization_level": 1,
    "xla_llvm_disable_expensive_passes": True,
}
"""At level 0 sums that are computed twice round twice, so that the gradient of a maximum, which
looks for it, divides by zero, also as written."""
Way = Literal["fast", "in double", "compiled"]

_way = contextvars.ContextVar[Way]("way", default="fast")


@contextlib.contextmanager
def evaluating(way: Way) -> Iterator[None]:
    """Evaluates everything by numpy in double precision, or everything as compiled."""
    token = _way.set(way)
    try:
        yield
    finally:
        _way.reset(token)


def values_of(fn: Callable[..., Any], *args: Any) -> Any:
    """What ``fn(*args)`` returns, as numpy arrays.

    Args:
      fn: a function that JAX can trace.
      *args: pytrees of arrays.
    """
    way = _way.get()
    if way == "in double":
        return interpreter.values_of(fn, *args)
    if way == "fast" and not narrow_types(jax.make_jaxpr(fn)(*args)):
        with contextlib.suppress(interpreter.Unevaluated):
            found, shapes = interpreter.values_of(fn, *args), jax.eval_shape(fn, *args)
            return jax.tree.map(lambda x, like: np.asarray(x).astype(like.dtype), found, shapes)
    return compiled(fn, *args)


def compiled(fn: Callable[..., Any], *args: Any) -> Any:
    """The values by XLA."""
    with contextlib.redirect_stdout(io.StringIO()):  # networks may print
        found = executable(fn, *args)(*args)
        jax.effects_barrier()
    return jax.tree.map(np.asarray, found)


def executable(fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """The function compiled for arguments like these."""
    return jax.jit(fn).lower(*args).compile(FAST_TO_COMPILE)


def narrow_types(jaxpr: Any) -> set[Any]:
    """The floating types below double in which a jaxpr computes anything."""
    opened = getattr(jaxpr, "jaxpr", jaxpr)
    found = {v.aval.dtype for v in opened.invars if is_narrow(v.aval)}
    for eqn in opened.eqns:
        found |= {v.aval.dtype for v in eqn.outvars if is_narrow(v.aval)}
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inner, (ClosedJaxpr, Jaxpr)):
                    found |= narrow_types(inner)
    return found


def is_narrow(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", np.dtype(bool))
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 64
