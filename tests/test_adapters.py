"""A low-rank branch beside another weight: which products are formed in which pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from training import relative_deviation

import fcjax
from fcjax.planning.parts import Linear

ROWS, WIDTH, RANK = 1024, 192, 32


def adapted(params, x, *, frozen):
    """Two layers ``x W + x A B``, with relu."""
    for w, a, b in params:
        x = jax.nn.relu(x @ (jax.lax.stop_gradient(w) if frozen else w) + x @ a @ b)
    return x


def adapters(width=WIDTH):
    shapes = ((width, width), (width, RANK), (RANK, width))
    return [zoo.weights(*shapes) for _ in range(2)]


def parts(fc):
    return [part for how in fc.plan.recipes.values() for part in how.parts]


@pytest.mark.parametrize("frozen", [True, False])
def test_each_pass_has_its_own_order(frozen):
    """One product forward and towards the input; the branch by itself beside a frozen weight."""
    apply_fn = functools.partial(adapted, frozen=frozen)
    params = adapters()
    x = np.random.default_rng(0).standard_normal((ROWS, WIDTH))
    fc = fcjax.front_contribute(apply_fn, params, x)
    assert all(isinstance(part, Linear) and len(part.weights) == 2 for part in parts(fc))
    assert [len(part.apart) for part in parts(fc)] == ([2, 2] if frozen else [0, 0])
    assert fc.plan.after.flops < fc.plan.before.flops
    gradients = [
        jax.jit(jax.value_and_grad(lambda p, x, f=f: jnp.sum(jnp.sin(f(p, x))), (0, 1)))(params, x)
        for f in (fc.apply, apply_fn)
    ]
    assert relative_deviation(*gradients, floor=1e-6) < 1e-11
    if frozen:
        assert all(not np.any(w) for w, _, _ in gradients[0][1][0])
    tangents = [
        jax.jit(lambda p, x, f=f: jax.jvp(f, (p, x), (p, x))[1])(params, x)
        for f in (fc.apply, apply_fn)
    ]
    assert relative_deviation(*tangents) < 1e-11


def test_second_derivatives_through_separate_orders():
    apply_fn = functools.partial(adapted, frozen=True)
    params = adapters(6)
    x = np.random.default_rng(0).standard_normal((ROWS, 6))
    fc = fcjax.front_contribute(apply_fn, params, x)
    assert any(part.apart for part in parts(fc))

    def product(f):
        gradient = jax.grad(lambda p: jnp.sum(jnp.sin(f(p, x))))
        return jax.jit(lambda p: jax.jvp(gradient, (p,), (p,))[1])(params)

    assert relative_deviation(product(fc.apply), product(apply_fn)) < 1e-10


def test_under_vmap_and_with_few_rows():
    apply_fn = functools.partial(adapted, frozen=True)
    params = adapters()
    x = np.random.default_rng(0).standard_normal((2, ROWS, WIDTH))
    fc = fcjax.front_contribute(apply_fn, params, x[0])
    found, expected = (
        jax.jit(jax.vmap(jax.grad(lambda p, x, f=f: jnp.sum(f(p, x) ** 2)), (None, 0)))(params, x)
        for f in (fc.apply, apply_fn)
    )
    assert relative_deviation(found, expected, floor=1e-6) < 1e-11
    few = fcjax.front_contribute(apply_fn, params, x[0, :8])
    assert not any(isinstance(part, Linear) for part in parts(few))


def test_in_a_loop_the_effective_weight_is_formed_once():
    """There its cotangent is accumulated, so the factors are not differentiated in every run."""
    (layer, _) = adapters()

    def apply_fn(params, xs):
        return jax.lax.map(lambda x: jnp.tanh(adapted([params], x, frozen=True)), xs)

    xs = jax.ShapeDtypeStruct((16, 512, WIDTH), jnp.float64)
    fc = fcjax.front_contribute(apply_fn, layer, xs)
    ((inner,),) = fc.plan.nested.values()
    assert not any(
        p.apart for how in inner.recipes.values() for p in how.parts if hasattr(p, "apart")
    )
