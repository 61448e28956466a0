"""Tracing a network that names axes which are mapped outside of it.

``axis_name`` of a batch normalisation, ``psum``, ``all_gather``: they mean something only inside
``jax.vmap(..., axis_name=...)``, ``jax.pmap`` or ``jax.shard_map``. A call there finds the axes
bound and is planned for their sizes. ``front_contribute`` is usually called outside; there each
unknown axis is bound to size 1, which is enough to see the structure: statistics over the axis are
leaves of the expressions in any case.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

__all__ = ["make_jaxpr", "unbound"]

UNBOUND = re.compile(r"unbound axis name: (\w+)")


def make_jaxpr(
    fn: Callable[..., Any], avals: Sequence[Any], *, anywhere: bool
) -> tuple[Any, Any, tuple[str, ...]]:
    """``jax.make_jaxpr``, also for functions that name axes.

    Args:
      fn: the function to trace.
      avals: its arguments.
      anywhere: whether names of axes that are not bound here may stand for axes of size 1.

    Returns:
      the jaxpr, the shapes of the results, and the names that stand for axes of size 1.

    Raises:
      NameError: for a name that is not bound, unless ``anywhere``.
    """
    bound: dict[str, int] = {}
    while True:
        trace = jax.make_jaxpr(fn, axis_env=list(bound.items()), return_shape=True)
        try:
            return (*trace(*avals), tuple(bound))
        except NameError as error:
            name = unbound(error)
            if not anywhere or name is None or name in bound:
                raise
            bound[name] = 1


def unbound(error: Exception) -> str | None:
    """The axis that a ``NameError`` of jax is about, None if it is about something else."""
    found = UNBOUND.search(str(error))
    return found[1] if found else None
