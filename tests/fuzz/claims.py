"""What fcjax claims of a network. A claim raises AssertionError where it does not hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fcjax

from .measures import is_float, some


def gap(a, b):
    """The largest difference of two pytrees, relative to each leaf of b; infinite if one is."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max((gap_of_leaf(np.asarray(x), np.asarray(y)) for x, y in pairs), default=0.0)


def gap_of_leaf(x, y):
    if not np.array_equal(np.isfinite(x), np.isfinite(y)):
        return np.inf
    finite = np.isfinite(y)
    size = max(np.max(np.abs(y[finite]), initial=0), 1e-3)
    return float(np.max(np.abs(x[finite] - y[finite]), initial=0) / size)


def expands_and_reduces(optimizer, **options):
    """``expand`` and ``reduce`` are inverse, and ``expand`` begins at the given weights."""

    def claim(f, p, args):
        fc = fcjax.front_contribute(f, p, *args, optimizer=optimizer, **options)
        full = fc.expand(fc.params)
        assert jax.tree.map(jnp.shape, full) == jax.tree.map(jnp.shape, p), "shapes"
        assert options.get("rebalance") or gap(full, p) < 1e-10, "expand is not what was given"
        assert gap(f(full, *args), f(p, *args)) < 1e-9, "expand has another function"
        moved = jax.tree.map(lambda w: w * 1.01, fc.params)
        assert gap(f(fc.expand(moved), *args), fc.apply(moved, *args)) < 1e-9, "expand after a step"
        assert gap(fc.reduce(fc.expand(moved)), moved) < 1e-9, "reduce after expand"

    return claim


# --- gradient flow ---


def descended(apply, args, expand=lambda params: params):
    """``run(params, rate, steps)``: plain SGD; the weights, all weights, and the outputs."""

    def loss(params):
        outputs = [x for x in jax.tree.leaves(apply(params, *args)) if is_float(x)]
        return sum(jnp.mean((x - some(x)) ** 2) for x in outputs)

    def run(params, rate, steps):
        move = lambda w, g: w - rate * g  # noqa: E731
        step = lambda _, p: jax.tree.map(move, p, jax.grad(loss)(p))  # noqa: E731
        moved = jax.lax.fori_loop(0, steps, step, params)
        return moved, expand(moved), apply(moved, *args)

    return jax.jit(run)


def norm(tree):
    return float(np.sqrt(sum(np.sum(np.abs(x) ** 2) for x in jax.tree.leaves(tree))))


def follows_the_flow(**options):
    """Over a fixed time the deviation from SGD falls with the learning rate, and nothing breaks."""

    def claim(f, p, args):
        fc = fcjax.front_contribute(f, p, *args, optimizer=optax.sgd(0.01), **options)
        full = fc.expand(fc.params)
        as_written = descended(f, args)
        slope = norm(jax.tree.map(jnp.subtract, as_written(full, 1e-6, 1)[0], full)) / 1e-6
        if not slope > 0:
            return  # nothing moves
        time, folded = min(0.3 * norm(full) / slope, 3.0), descended(fc.apply, args, fc.expand)
        wanted = {n: as_written(full, time / n, n)[2] for n in (8, 32, 128)}
        if not gap(wanted[8], wanted[128]) < 0.1:
            return  # the largest rate is no flow
        deviations = []
        for steps in wanted:
            moved, expanded, found = folded(fc.params, time / steps, steps)
            assert gap(as_written(expanded, 0.0, 0)[2], found) < 1e-8, "expand has another function"
            if fc.check(moved):
                return  # it says so
            deviations.append(gap(found, wanted[steps]))
        assert deviations[-1] < max(0.5 * max(deviations[:-1]), 1e-9), (
            f"no convergence as the rate falls: {deviations}"
        )

    return claim


# --- laws and certificates ---


def laws_hold(f, p, args):
    """The derivative of each law along the gradient of any loss is zero."""
    laws = fcjax.conservation_laws(f, p, *args)
    str(laws), laws.certificate()

    floats = {name: w for name, w in p.items() if is_float(w)}

    def loss(floats):
        outputs = [x for x in jax.tree.leaves(f(p | floats, *args)) if is_float(x)]
        return sum((jnp.sum(jnp.real(x * some(x))) for x in outputs), 0.0)

    @jax.jit
    def along(floats):
        gradient = jax.grad(loss)(floats)
        change = jax.jvp(lambda w: laws.values(p | w), (floats,), (gradient,))[1]
        return gradient, change

    if not has_gradient(loss, floats):
        return
    gradient, change = along(floats)
    scale = norm(floats) * norm(gradient)
    off = np.max(np.abs(change), initial=0) > 1e-11 * scale
    assert not (np.isfinite(scale) and off), f"a law changes: {change} of {scale}"


def keeps_laws(**options):
    """However what is left is trained under the radial closure, no law of a unit changes."""

    def claim(f, p, args):
        fc = fcjax.front_contribute(f, p, *args, optimizer=optax.sgd(0.01), **options)
        full, moved = fc.expand(fc.params), jax.tree.map(lambda w: w * 1.02, fc.params)
        if not any(row.exactness == "approximate" for row in fc.report) or fc.check(moved):
            return
        laws = fcjax.conservation_laws(f, full, *args)
        of_units = np.array(["entry" not in name for name in laws.names], bool)
        change = np.asarray(laws.drift(full, fc.expand(moved)))[of_units]
        off = np.max(np.abs(change), initial=0) > 1e-9 * norm(full) ** 2
        assert not off, f"a law changes: {change}"

    return claim


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
        jax.jit(jax.jacobian(laws_at))([leaves[i] for i in laws._hidden])
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
