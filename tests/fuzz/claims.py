"""What fcjax claims of a network. A claim raises AssertionError where it does not hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fcjax

from .evaluating import executable, values_of
from .measures import is_float, some


def gap(a, b, least=1e-3):
    """The largest difference of two pytrees, relative to each leaf of b; infinite if one is.

    Leaves of smaller entries than ``least`` count as of that size.
    """
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max((gap_of_leaf(np.asarray(x), np.asarray(y), least) for x, y in pairs), default=0.0)


def gap_of_leaf(x, y, least):
    if not np.array_equal(np.isfinite(x), np.isfinite(y)):
        return np.inf
    finite = np.isfinite(y)
    size = max(np.max(np.abs(y[finite]), initial=0), least)
    return float(np.max(np.abs(x[finite] - y[finite]), initial=0) / size)


def expands_and_reduces(optimizer, **options):
    """``expand`` and ``reduce`` are inverse, and neither changes the function."""

    def claim(f, p, args):
        fc = fcjax.front_contribute(f, p, *args, optimizer=optimizer, **options)
        consistent(fc, p, args, rebalanced=options.get("rebalance"))

    return claim


def consistent(fc, p, args, *, rebalanced=False):
    """Asserts that a network and the full weights that it stands for agree, now and later."""

    def run(params):
        full = fc.expand(params)
        return full, fc.apply_fn(full, *args), fc.apply(params, *args)

    moved = jax.tree.map(lambda w: w * 1.01, fc.params)
    (begun, first, _), (full, written, folded) = (values_of(run, q) for q in (fc.params, moved))
    assert jax.tree.map(jnp.shape, begun) == jax.tree.map(jnp.shape, p), "shapes"
    # Laws determine squares: of a weight that is small beside the others half the digits are lost.
    closed = any(row.exactness == "approximate" for row in fc.report)
    digits, least = (1e-7, max(norm(p), 1e-3)) if closed else (1e-10, 1e-3)
    assert rebalanced or gap(begun, p, least) < digits, "expand is not what was given"
    wanted, beside = (
        values_of(lambda p: fc.apply_fn(p, *args), q)
        for q in (p, jax.tree.map(lambda w: w + digits * least if is_float(w) else w, p))
    )
    allowed = 10 * (digits + gap(beside, wanted) * closed)
    assert gap(first, wanted) < allowed, "expand has another function"
    assert gap(folded, written) < 1e-9, "expand after a step has another function"
    assert gap(fc.reduce(full), moved) < 1e-9, "reduce after expand is not what was given"


# --- gradient flow ---


def follows_the_flow(**options):
    """Over a fixed time the deviation from SGD falls with the learning rate, and nothing breaks."""

    def claim(f, p, args):
        fc = fcjax.front_contribute(f, p, *args, optimizer=optax.sgd(0.01), **options)
        consistent(fc, p, args, rebalanced=options.get("rebalance"))
        if fc.plan.is_trivial and len(jax.tree.leaves(fc.params)) == len(jax.tree.leaves(p)):
            return
        full = fc.expand(fc.params)
        as_written, folded = descended(f, full, args), descended(fc.apply, fc.params, args)
        slope = norm(jax.tree.map(jnp.subtract, as_written(full, 1e-6, 1)[0], full)) / 1e-6
        if not slope > 0:
            return  # nothing moves
        time = min(0.3 * norm(full) / slope, 3.0)
        wanted = {n: as_written(full, time / n, n)[1] for n in (8, 32, 128)}
        off, size = norm(jax.tree.map(np.subtract, wanted[8], wanted[128])), norm(wanted[128])
        if not off < 0.1 * size:
            return  # the largest rate is no flow
        moved = {n: folded(fc.params, time / n, n) for n in wanted}
        if any(fc.check(params) for params, _ in moved.values()):
            return  # it says so
        deviations = [gap(moved[n][1], wanted[n]) for n in wanted]
        # where a law leaves little of a square, half the digits of its root are lost
        falls = deviations[-1] < max(0.5 * max(deviations[:-1]), 1e-7)
        assert falls, f"no convergence as the rate falls: {deviations}"

    return claim


def descended(apply, params, args):
    """``run(params, rate, steps)``: plain SGD; the weights, and the outputs."""

    def loss(params):
        outputs = [x for x in jax.tree.leaves(apply(params, *args)) if is_float(x)]
        return sum(jnp.mean((x - some(x)) ** 2) for x in outputs)

    def run(params, rate, steps):
        move = lambda w, g: w - rate * g  # noqa: E731
        step = lambda _, p: jax.tree.map(move, p, jax.grad(loss)(p))  # noqa: E731
        moved = jax.lax.fori_loop(0, steps, step, params)
        return moved, apply(moved, *args)

    return executable(run, params, 0.1, 1)


def norm(tree):
    return float(np.sqrt(sum(np.sum(np.abs(x) ** 2) for x in jax.tree.leaves(tree))))


def closes(**options):
    """However what is left is trained under the radial closure, no law of a unit changes."""

    def claim(f, p, args):
        fc = fcjax.front_contribute(
            f, p, *args, optimizer=optax.sgd(0.01), exactness="approximate", **options
        )
        consistent(fc, p, args, rebalanced=options.get("rebalance"))
        full, moved = fc.expand(fc.params), jax.tree.map(lambda w: w * 1.02, fc.params)
        if not any(row.exactness == "approximate" for row in fc.report) or fc.check(moved):
            return
        if not any(np.any(x) for x in jax.tree.leaves(fc.apply(moved, *args))):
            return  # nothing trains a network that is zero
        laws = fcjax.conservation_laws(f, full, *args)
        of_units = np.array(["entry" not in name for name in laws.names], bool)
        change = np.asarray(laws.drift(full, fc.expand(moved)))[of_units]
        off = np.max(np.abs(change), initial=0) > 1e-9 * norm(full) ** 2
        assert not off, f"a law changes: {change}"

    return claim
