"""What fcjax claims of conservation laws, certificates and strict networks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import fcjax

from .claims import norm
from .evaluating import values_of
from .measures import is_float, some


def laws_hold(f, p, args):
    """The derivative of each law along the gradient of any loss is zero."""
    laws = fcjax.conservation_laws(f, p, *args)
    str(laws), laws.certificate()

    floats = {name: w for name, w in p.items() if is_float(w)}

    def loss(floats):
        outputs = [x for x in jax.tree.leaves(f(p | floats, *args)) if is_float(x)]
        return sum((jnp.sum(jnp.real(x * some(x))) for x in outputs), 0.0)

    def along(floats):
        gradient = jax.grad(loss)(floats)
        change = jax.jvp(lambda w: laws.values(p | w), (floats,), (gradient,))[1]
        return gradient, change

    if not has_gradient(loss, floats):
        return
    gradient, change = values_of(along, floats)
    if not is_derivative(gradient, loss, floats, 1e3 * rounding(f, p, args)):
        return
    scale = norm(floats) * max(norm(gradient), 1e-3)  # what cancels leaves rounding
    off = np.max(np.abs(change), initial=0) > rounding(f, p, args) * scale
    assert not (np.isfinite(scale) and off), f"a law changes: {change} of {scale}"


def rounding(f, p, args):
    """How far a law may be off, relative to its size: more where anything is in float32."""
    return 1e-5 if "f32[" in str(jax.make_jaxpr(f)(p, *args)) else 1e-11


def is_derivative(gradient, loss, params, close):
    """Whether a gradient is the derivative: for rows that stand in no table JAX leaves it out."""
    direction = some(params)
    try:
        slope = values_of(lambda p, t: jax.jvp(loss, (p,), (t,))[1], params, direction)
    except TypeError:
        return True  # a rule for the backward pass alone
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    expected = sum(np.sum(np.real(g * t)) for g, t in pairs)
    return bool(abs(slope - expected) <= close * (norm(gradient) * norm(direction) + 1e-3))


def has_gradient(loss, params):
    """Whether JAX differentiates a loss backwards."""
    try:
        jax.eval_shape(jax.grad(loss), params)
    except ValueError:
        return False
    return True


def rank_is_right(f, p, args):
    """The certificate's rank is that of the laws' derivatives by the hidden weights."""
    laws = fcjax.conservation_laws(f, p, *args)
    determined, hidden = laws.rank()
    leaves = jax.tree.leaves(p)
    assert hidden == sum(leaves[i].size for i in laws._hidden), "hidden weights miscounted"
    structure = jax.tree.structure(p)

    def laws_at(chosen):
        filled = dict(enumerate(leaves)) | dict(zip(laws._hidden, chosen, strict=True))
        return laws.values(jax.tree.unflatten(structure, [filled[i] for i in range(len(leaves))]))

    by = (
        values_of(jax.jacobian(laws_at), [leaves[i] for i in laws._hidden])
        if len(laws) and hidden
        else []
    )
    matrix = np.concatenate([np.asarray(j).reshape(len(laws), -1) for j in by], 1) if by else None
    rank = 0 if matrix is None or not matrix.size else np.linalg.matrix_rank(matrix, rtol=1e-9)
    assert determined == rank or not laws.certificate().exact, f"rank: {determined}, not {rank}"


def strict_is_honest(**options):
    """``strict=True`` passes only where no trained weight stands before another."""

    def claim(f, p, args):
        from .hidden import in_front

        try:
            fc = fcjax.front_contribute(f, p, *args, strict=True, **options)
        except fcjax.NotFoldableError:
            return
        trained = {name for name, leaf in fc.params.items() if leaf is not None}
        left = in_front(f, p, args, trained)
        assert not left, f"strict passes, but in front of a layer train: {left}"

    return claim


def hidden_weights_are_counted(f, p, args):
    """What stands before a layer counts as hidden."""
    from .hidden import in_front

    _, hidden = fcjax.conservation_laws(f, p, *args).rank()
    left = in_front(f, p, args, {name for name, leaf in p.items() if is_float(leaf)})
    assert hidden or not any(p[name].size for name in left), (
        f"no weights are hidden, but in front of a layer train: {left}"
    )
