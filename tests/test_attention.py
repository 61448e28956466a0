"""Products of two activations: projections are multiplied through them where that pays."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from training import relative_deviation

import fcjax
from fcjax.planning.plan import always_fold
from fcjax.tracing import trace


def attention(params, x, *, heads=1, bias=False):
    """Softmax attention with separate projections, width of a head at the end of each."""
    q, k, v = (jnp.einsum("...td,dhk->...thk", x, params[name]) for name in "qkv")
    if bias:
        q, k, v = q + params["bq"], k + params["bk"], v + params["bv"]
    scores = jax.nn.softmax(jnp.einsum("...ihk,...jhk->...hij", q, k) / 4.0)
    mixed = jnp.einsum("...hij,...jhk->...ihk", scores, v)
    return jnp.einsum("...ihk,hkd->...id", mixed, params["o"])


def projections(width, inside, heads=1, *, bias=False):
    shapes = dict.fromkeys("qkv", (width, heads, inside)) | {"o": (heads, inside, width)}
    if bias:
        shapes |= {f"b{name}": (heads, inside) for name in "qkv"}
    return dict(zip(shapes, zoo.weights(*shapes.values()), strict=True))


def gradients(apply_fn, params, x):
    loss = lambda p, x: jnp.sum(jnp.sin(apply_fn(p, x)))  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)


def tokens(*shape):
    return np.random.default_rng(3).standard_normal(shape)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_heads_wider_than_the_stream_collapse(heads, bias):
    params, x = projections(8, 128, heads, bias=bias), tokens(4, 64, 8)
    apply_fn = functools.partial(attention, heads=heads, bias=bias)
    fc = fcjax.front_contribute(apply_fn, params, x)
    assert {row.rule for row in fc.report} == {"collapse"}
    assert fc.plan.after.flops < fc.plan.before.flops / 3
    found, expected = (gradients(f, params, x) for f in (fc.apply, apply_fn))
    assert relative_deviation(found, expected, floor=1e-3) < 1e-11


def test_follows_backprop_for_200_steps_of_adam():
    params, x = projections(4, 32, 2, bias=True), tokens(3, 16, 4)
    apply_fn = functools.partial(attention, heads=2, bias=True)
    fc = fcjax.front_contribute(apply_fn, params, x)
    assert any(row.rule == "collapse" for row in fc.report)
    optimizer = optax.adam(1e-2)

    def trained(apply):
        def step(carry, _):
            p, state = carry
            loss, grads = jax.value_and_grad(lambda p: jnp.mean((apply(p, x) - jnp.sin(x)) ** 2))(p)
            updates, state = optimizer.update(grads, state, p)
            return (optax.apply_updates(p, updates), state), loss

        carry, losses = jax.lax.scan(step, (params, optimizer.init(params)), None, 200)
        return losses, apply(carry[0], x)

    found, expected = (jax.jit(functools.partial(trained, f))() for f in (fc.apply, apply_fn))
    assert expected[0][-1] < expected[0][0] / 2
    assert relative_deviation(found, expected) < 1e-9


def test_ordinary_heads_stay_as_written_and_the_report_has_the_price():
    params, x = projections(32, 8, 4), tokens(4, 64, 32)
    fc = fcjax.front_contribute(functools.partial(attention, heads=4), params, x)
    assert fc.plan.after.flops == fc.plan.before.flops
    products = {value for equation in fc.plan.boundaries for value in equation.outputs}
    assert products.isdisjoint(fc.plan.recipes)
    reasons = {row.path: row.reason for row in fc.report}
    assert "could be multiplied with" in reasons["q"]
    assert "times the layers as written" in reasons["v"]


def test_flax_attention_in_every_form():
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=12)
    x = tokens(2, 6, 5)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    leaves, structure = jax.tree.flatten(shapes)
    drawn = [np.random.default_rng(i).standard_normal(leaf.shape) for i, leaf in enumerate(leaves)]
    params = jax.tree.unflatten(structure, drawn)
    with always_fold():
        fc = fcjax.front_contribute(module.apply, params, x)
        found = gradients(fc.apply, params, x)
    assert {row.rule for row in fc.report} == {"collapse"}
    expected = gradients(module.apply, params, x)
    assert relative_deviation(found, expected, floor=1e-3) < 1e-11
    tangent = jax.tree.map(jnp.sin, params)
    forward = [
        jax.jvp(lambda p, f=f: f(p, x), (params,), (tangent,)) for f in (fc.apply, module.apply)
    ]
    assert relative_deviation(*forward) < 1e-11


def kernel_attention(params, x):
    """Attention without softmax, keys and values first: moments of the same tokens."""
    q, k, v = (x @ params[name] for name in "qkv")
    return q @ (jnp.swapaxes(k, -1, -2) @ v) / 512


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_moments_of_the_same_tokens_are_not_taken_in_narrow_floats(dtype):
    """``k^T v = K^T (x^T x) V`` cancels where K points along a direction in which x is small."""
    params = dict(zip("qkv", zoo.weights((8, 64), (8, 64), (8, 64)), strict=True))
    params, x = jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, tokens(4, 512, 8)))
    fc = fcjax.front_contribute(kernel_attention, params, x)
    collapsed = {row.path for row in fc.report if row.rule == "collapse"}
    assert ({"k", "v"} <= collapsed) == (dtype == jnp.float64)
    tolerance = 1e-11 if dtype == jnp.float64 else 1e-4
    found, expected = (gradients(f, params, x) for f in (fc.apply, kernel_attention))
    assert relative_deviation(found, expected, floor=1e-3) < tolerance


def test_products_at_another_precision_keep_it():
    def apply_fn(params, x):
        scores = jnp.matmul(x @ params["q"], (x @ params["k"]).T, precision="highest")
        return jnp.tanh(scores)

    params, x = dict(zip("qk", zoo.weights((4, 64), (4, 64)), strict=True)), tokens(32, 4)
    fc = fcjax.front_contribute(apply_fn, params, x)
    assert {row.rule for row in fc.report} == {"collapse"}
    traced = trace.flatten(jax.make_jaxpr(fc.apply)(params, x))
    products = [e.source for e in traced.equations if e.name == "dot_general"]
    asked = {e.params["precision"] for e in products}
    assert len(products) == 3
    assert asked == {(jax.lax.Precision.HIGHEST,) * 2}


def test_merge_multiplies_the_projections_of_wide_heads():
    params, x = projections(8, 64), tokens(4, 16, 8)
    merged = fcjax.merge(attention, params, x)
    assert merged.flops[1] < merged.flops[0] / 2
    assert merged.weights[1] < merged.weights[0]
    assert relative_deviation(merged.apply(merged.params, x), attention(params, x)) < 1e-10
