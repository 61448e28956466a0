"""What is compared of two networks. A network has ``apply``, ``params`` and perhaps ``expand``."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from .evaluating import values_of


def is_float(x):
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def of_floats(net, args):
    """The network as a function of its floating arrays, and these.

    It returns the floating outputs, and the others. Integers and Python numbers stay as they are.
    """
    leaves, structure = jax.tree.flatten((net.params, args))
    chosen = [i for i, leaf in enumerate(leaves) if is_float(leaf)]

    def call(given):
        filled = list(leaves)
        for i, leaf in zip(chosen, given, strict=True):
            filled[i] = leaf
        params, filled_args = jax.tree.unflatten(structure, filled)
        outputs = jax.tree.leaves(net.apply(params, *filled_args))
        return [x for x in outputs if is_float(x)], [x for x in outputs if not is_float(x)]

    return call, [leaves[i] for i in chosen]


def some(tree):
    """Fixed numbers between -1 and 1 in the shapes of arrays."""
    return jax.tree.map(
        lambda x: jnp.cos(1 + 3 * jnp.arange(x.size)).reshape(x.shape).astype(x.dtype), tree
    )


def value_and_gradient(net, args):
    """Outputs, and the gradient of their product with fixed numbers."""
    call, leaves = of_floats(net, args)

    def both(leaves):
        out, pull, others = jax.vjp(call, leaves, has_aux=True)
        return {"value": (out, others), "gradient": pull(some(out))[0]}

    return values_of(both, leaves)


def value_and_tangent(net, args):
    """Outputs, and their derivative along fixed numbers."""
    call, leaves = of_floats(net, args)

    def both(leaves):
        out, tangent, others = jax.jvp(call, (leaves,), (some(leaves),), has_aux=True)
        return {"value": (out, others), "tangent": tangent}

    return values_of(both, leaves)


def values(net, args):
    """Outputs alone."""
    call, leaves = of_floats(net, args)
    return values_of(lambda leaves: {"value": call(leaves)}, leaves)


def values_at(rows):
    """Outputs for the arguments, and for as many rows of them as are given."""

    def measure(net, args):
        return {"example": values(net, args), "resized": values(net, resized(args, rows))}

    return measure


def resized(args, rows):
    """Arguments with another batch size: that of the first array with the most axes."""
    arrays = [a for a in args if np.ndim(a)]
    batch = max((np.shape(a) for a in arrays), key=len, default=(None,))[0]
    return tuple(
        np.resize(a, (rows, *np.shape(a)[1:])) if np.ndim(a) and len(a) == batch else a
        for a in args
    )


# --- derivatives ---


def loss_of(call):
    """A number that depends on all outputs, with derivatives of all orders."""

    def loss(leaves):
        outputs, _ = call(leaves)
        parts = [p for x in outputs for p in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
        return sum((jnp.sum(jnp.sin(p) * some(p)).astype(jnp.float64) for p in parts), 0.0)

    return loss


def stacked(leaves):
    """Two versions of arrays along a new first axis."""
    return [jnp.stack([x, x * 1.25]) for x in leaves]


def scanned_gradient(loss):
    """Gradients added up by a loop."""

    def total(leaves):
        step = lambda sums, x: (jax.tree.map(jnp.add, sums, jax.grad(loss)(x)), None)  # noqa: E731
        return lax.scan(step, [jnp.zeros_like(x) for x in leaves], stacked(leaves))[0]

    return total


def hessian_vector(loss):
    return lambda leaves: jax.jvp(jax.grad(loss), (leaves,), (some(leaves),))[1]


def gradient_of_tangent(loss):
    return jax.grad(lambda leaves: jax.jvp(loss, (leaves,), (some(leaves),))[1])


DERIVATIVES = {
    "grad": lambda loss: jax.grad(loss),
    "jit": lambda loss: jax.jit(jax.value_and_grad(loss)),
    "linearize": lambda loss: lambda leaves: jax.linearize(loss, leaves)[1](some(leaves)),
    "jvp": lambda loss: lambda leaves: jax.jvp(loss, (leaves,), (some(leaves),)),
    "vmap of grad": lambda loss: lambda leaves: jax.vmap(jax.grad(loss))(stacked(leaves)),
    "vmap of jvp": lambda loss: (
        lambda leaves: jax.vmap(lambda x: jax.jvp(loss, (x,), (some(x),)))(stacked(leaves))
    ),
    "hessian vector": hessian_vector,
    "vmap of hessian vector": lambda loss: (
        lambda leaves: jax.vmap(hessian_vector(loss))(stacked(leaves))
    ),
    "gradient of tangent": gradient_of_tangent,
    "checkpoint": lambda loss: jax.grad(jax.checkpoint(loss)),
    "scan": scanned_gradient,
    "gradient of gradient": lambda loss: jax.grad(
        lambda leaves: sum(jnp.sum(jnp.abs(g) ** 2) for g in jax.grad(loss)(leaves))
    ),
    "jacobian": lambda loss: lambda leaves: jax.jacfwd(loss)(leaves),
}


def derivative(name):
    """One of ``DERIVATIVES``."""

    def measure(net, args):
        call, leaves = of_floats(net, args)
        return values_of(lambda x: {"derivative": DERIVATIVES[name](loss_of(call))(x)}, leaves)

    return measure


# --- training ---


def trained(optimizer, steps=10):
    """Losses, outputs and full parameters of some steps."""

    def measure(net, args):
        def loss(params):
            call, leaves = of_floats(types.SimpleNamespace(apply=net.apply, params=params), args)
            return sum(jnp.mean(jnp.abs(x - some(x)) ** 2) for x in call(leaves)[0])

        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        def run(params):
            (params, _), losses = lax.scan(step, (params, optimizer.init(params)), length=steps)
            return {"loss": losses, "parameters": net.expand(params)}

        found = values_of(run, net.params)
        if not all(np.all(np.abs(x) < 1e8) for x in jax.tree.leaves(found)):
            raise FloatingPointError("training diverges")
        return found

    return measure
