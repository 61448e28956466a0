"""Tracing a network that names axes which are mapped outside of it.

``axis_name`` of a batch normalisation, ``psum``, ``all_gather``: they mean something only inside
``jax.vmap(..., axis_name=...)``, ``jax.pmap`` or ``jax.shard_map``. A call there finds the axes
bound and is planned for their sizes. ``front_contribute`` is usually called outside; there each
unknown axis is bound to size 2, as the plan for two devices is that for any number above one. What
cannot be traced with two is traced with one, which is enough to see the structure.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

__all__ = ["make_jaxpr", "unbound"]

SEVERAL = 2
UNBOUND = re.compile(r"unbound axis name: (\w+)")


def make_jaxpr(
    fn: Callable[..., Any], avals: Sequence[Any], *, anywhere: bool
) -> tuple[Any, Any, dict[str, int]]:
    """``jax.make_jaxpr``, also for functions that name axes.

    Args:
      fn: the function to trace.
      avals: its arguments.
      anywhere: whether names of axes that are not bound here may stand for axes of some size.

    Returns:
      the jaxpr, the shapes of the results, and the sizes that axes are taken to have.

    Raises:
      NameError: for a name that is not bound, unless ``anywhere``.
    """
    bound: dict[str, int] = {}
    size = SEVERAL
    while True:
        trace = jax.make_jaxpr(fn, axis_env=list(bound.items()), return_shape=True)
        try:
            return (*trace(*avals), bound)
        except NameError as error:
            name = unbound(error)
            if not anywhere or name is None or name in bound:
                raise
            bound[name] = size
        except Exception:
            if not bound or size == 1:
                raise
            size = 1
            bound = dict.fromkeys(bound, size)


def unbound(error: Exception) -> str | None:
    """The axis that a ``NameError`` of jax is about, None if it is about something else."""
    found = UNBOUND.search(str(error))
    return found[1] if found else None
