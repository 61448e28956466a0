"""Leaves that an optimizer leaves alone, so that nobody needs their gradients.

``optax.masked(optax.set_to_zero(), ...)`` and ``optax.partition`` freeze weights. XLA then removes
what only their gradients need, and a plan that pays for these gradients compares with a step that
nobody runs. Here the optimizer's own program tells which they are: their updates are zeros that
depend on nothing, and no other update and no state depends on their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fcjax.numbers.interpreter import Interpreter
from fcjax.numbers.periodic import Numbers, Run
from fcjax.rules.reduction import Tree
from fcjax.tracing import trace
from fcjax.tracing.trace import Atom, Body, Value

__all__ = ["unmoved"]


def unmoved(optimizer: Any, tree: Tree) -> frozenset[int]:
    """The numbers of the trained leaves that an optimizer never moves and does not look at.

    Args:
      optimizer: the optax transformation.
      tree: the parameters; the optimizer is given those that are trained.
    """
    numbers = [i for i, trained in enumerate(tree.trained) if trained]
    avals = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in tree.leaves]
    given = [aval if t else None for aval, t in zip(avals, tree.trained, strict=True)]
    params = jax.tree.unflatten(tree.structure, given)
    try:
        state = jax.eval_shape(optimizer.init, params)
        jaxpr = jax.make_jaxpr(optimizer.update)(params, state, params)
    except Exception:  # of any kind: it may need more than gradients, such as a value
        return frozenset()
    body = trace.flatten(jaxpr)
    updates, later = body.outputs[: len(numbers)], body.outputs[len(numbers) :]
    from_inputs = _sources(body)
    moved = [atom for atom in updates if not _is_zero(body, atom, from_inputs)]
    read = {v for atom in (*moved, *later) for v in _of(atom, from_inputs)}
    pairs = zip(numbers, updates, body.inputs, strict=False)
    return frozenset(i for i, u, g in pairs if u not in moved and g not in read)


Sources = Mapping[Value, frozenset[Value]]


def _sources(body: Body) -> Sources:
    """The inputs that each value depends on."""
    found = {value: frozenset([value]) for value in body.inputs}
    for equation in body.equations:
        read = frozenset[Value]().union(*(found.get(v, ()) for v in equation.values))
        found.update((v, read) for v in equation.outputs if v is not None)
    return found


def _of(atom: Atom, sources: Sources) -> frozenset[Value]:
    return sources.get(atom, frozenset()) if isinstance(atom, Value) else frozenset()


def _is_zero(body: Body, atom: Atom, sources: Sources) -> bool:
    """Whether a result is zero whatever the inputs are."""
    if not isinstance(atom, Value):
        return not jnp.any(atom.val)
    if _of(atom, sources):
        return False
    env: dict[Any, Any] = dict(body.constants)
    fixed = [e for e in body.equations if not any(_of(v, sources) for v in e.values)]
    Interpreter(Run()).compute(fixed, env)
    made = env[atom]
    return isinstance(made, Numbers) and not made.period.any()
