"""Evaluates functions; everything that is compared goes through ``values_of``."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

FAST_TO_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def values_of(fn: Callable[..., Any], *args: Any) -> Any:
    """What ``fn(*args)`` returns, as numpy arrays.

    Args:
      fn: a function that JAX can trace.
      *args: pytrees of arrays.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # networks may print
        compiled = jax.jit(fn).lower(*args).compile(FAST_TO_COMPILE)
        found = compiled(*args)
        jax.effects_barrier()
    return jax.tree.map(np.asarray, found)
