"""What the planner takes and declines: the structure of plans, with prices in force."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcjax
from fcjax.expressions.written import written
from fcjax.measure import residual_bytes
from fcjax.planning.parts import Linear, MeanSquare, RowSquare
from fcjax.planning.plan import always_fold, folds_always, plan
from fcjax.tracing import trace
from fcjax.transform import DATA, PARAM

TOKENS = 4096


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def planned(fn, params, data, **options):
    """The plan of ``fn(*params, *data)`` for arrays of these shapes."""
    jaxpr = jax.make_jaxpr(fn)(*params, *data)
    kinds = [PARAM] * len(params) + [DATA] * len(data)
    return plan(written(trace.flatten(jaxpr), kinds), **options)


def gone(found):
    """The shapes of the values that are no longer computed."""
    return sorted(v.shape for c in found.changes if c.taken for v in c.gone)


def named(found, primitive):
    """The outputs of all equations of a primitive."""
    return [e.outputs[0] for e in found.body.equations if e.name == primitive]


def weights(*widths):
    return [shape(*ends) for ends in itertools.pairwise(widths)]


def chain(*arguments):
    *ws, x = arguments
    return functools.reduce(jnp.matmul, ws, x)


def centred(x, axis):
    return x - x.mean(axis, keepdims=True)


def batch_norm(y):
    """Training mode, without gain and bias."""
    return centred(y, 0) * jax.lax.rsqrt(jnp.square(centred(y, 0)).mean(0) + 1e-5)


def layer_norm(x):
    return centred(x, -1) * jax.lax.rsqrt(jnp.square(centred(x, -1)).mean(-1, keepdims=True) + 1e-5)


# --- linear segments ---


def test_chain_loses_its_hidden_activations():
    found = planned(chain, weights(784, 1024, 1024, 10), [shape(TOKENS, 784)])
    assert gone(found) == [(TOKENS, 1024)] * 2
    assert list(found.recipes) == [found.body.outputs[0]]
    assert found.after.time < 0.1 * found.before.time


def test_only_the_segments_between_activations_are_collapsed():
    def fn(a, b, c, d, x):
        return jnp.tanh(x @ a @ b) @ c @ d

    found = planned(fn, weights(64, 512, 64, 512, 8), [shape(TOKENS, 64)])
    assert gone(found) == [(TOKENS, 512)] * 2
    assert len(found.recipes) == 2


def test_residual_branch_is_part_of_the_effective_weight():
    def fn(a, b, c, x):
        return (x + x @ a @ b) @ c

    found = planned(fn, [*weights(64, 512, 64), shape(64, 8)], [shape(TOKENS, 64)])
    (how,) = found.recipes.values()
    (part,) = how.parts
    assert isinstance(part, Linear)
    assert (TOKENS, 512) in gone(found)
    assert len(part.weights) == 2


def test_parallel_branches_are_one_product():
    def fn(*arguments):
        *ws, x = arguments
        return sum(x @ a @ b for a, b in zip(ws[::2], ws[1::2], strict=True))

    found = planned(fn, weights(64, 256, 64) * 3, [shape(TOKENS, 64)])
    (how,) = found.recipes.values()
    (part,) = how.parts
    assert isinstance(part, Linear)
    assert len(part.weights) == 3
    assert gone(found).count((TOKENS, 256)) == 3


def test_low_rank_bottleneck_is_left_alone():
    found = planned(chain, weights(512, 16, 512), [shape(TOKENS, 512)])
    assert found.is_trivial
    assert [c.taken for c in found.changes] == [False]
    assert found.changes[0].after.time >= found.changes[0].before.time
    assert found.after == found.before


def test_low_rank_bottleneck_is_folded_when_asked_for():
    with always_fold():
        found = planned(chain, weights(512, 16, 512), [shape(TOKENS, 512)])
    assert gone(found) == [(TOKENS, 16)]
    assert not folds_always()


def test_the_batch_decides():
    few, many = (
        planned(chain, weights(256, 256, 256), [shape(tokens, 256)]) for tokens in (16, 65536)
    )
    assert few.is_trivial
    assert not many.is_trivial


# --- normalisations ---


def test_batch_norm_branches_are_one_product_of_the_rows():
    def fn(a, b, g, h, x):
        return jnp.tanh(batch_norm(x @ a) * g + batch_norm(x @ b) * h)

    params = [shape(16, 64), shape(16, 64), shape(64), shape(64)]
    found = planned(fn, params, [shape(TOKENS, 16)])
    for product in named(found, "dot_general"):
        assert product in {v for c in found.changes if c.taken for v in c.gone}
    parts = [part for how in found.recipes.values() for part in how.parts]
    assert sum(isinstance(part, MeanSquare) for part in parts) == 2
    (rows,) = [p for p in parts if isinstance(p, Linear) and len(p.weights) > 1]
    assert len(rows.weights) == 2


def test_contracting_batch_norm_is_declined():
    def fn(a, x):
        return jnp.tanh(batch_norm(x @ a))

    found = planned(fn, [shape(512, 16)], [shape(TOKENS, 512)])
    (product,) = named(found, "dot_general")
    assert product not in {v for c in found.changes if c.taken for v in c.gone}
    assert any(product in c.gone for c in found.changes if not c.taken)


def test_layer_norm_before_dense_defers_its_scale():
    def fn(a, x):
        return layer_norm(x) @ a

    found = planned(fn, [shape(256, 256)], [shape(TOKENS, 256)])
    how = found.recipes[found.body.outputs[0]]
    (part,) = how.parts
    assert isinstance(part, Linear)
    assert part.centre_weight
    assert len(part.row_scales) == 1
    assert (TOKENS, 256) in gone(found)


def test_layer_norm_before_an_activation_stays():
    found = planned(lambda g, x: jnp.tanh(layer_norm(x) * g), [shape(256)], [shape(TOKENS, 256)])
    assert (TOKENS, 256) not in gone(found)


def rms_norm(x):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


def row_squares(found):
    return [p for how in found.recipes.values() for p in how.parts if isinstance(p, RowSquare)]


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_wide_product_in_front_of_a_norm_is_never_formed(norm):
    def fn(a, b, c, x):
        return norm(x @ a + b) @ c

    found = planned(fn, [shape(64, 1024), shape(1024), shape(1024, 64)], [shape(TOKENS, 64)])
    (part,) = row_squares(found)
    assert len(part.shifts) == 1
    assert (TOKENS, 1024) in gone(found)
    assert not any(1024 in v.shape and TOKENS in v.shape for v in found.recipes)
    assert found.after.time < 0.2 * found.before.time
    assert found.after.held < 0.1 * found.before.held


def test_branches_in_front_of_a_norm_are_one_wide_product():
    def fn(a, b, c, d, x):
        return layer_norm(x @ a + x @ b @ c) @ d

    found = planned(fn, [shape(16, 512), *weights(16, 16, 512, 8)], [shape(TOKENS, 16)])
    (part,) = row_squares(found)
    assert len(part.inner.weights) == 2
    assert not any(v.shape == (TOKENS, 512) for v in found.recipes)


@pytest.mark.parametrize(("width", "dtype"), [(64, jnp.float32), (1024, jnp.bfloat16)])
def test_narrow_products_and_half_precision_keep_the_product_of_a_norm(width, dtype):
    def fn(a, c, x):
        return layer_norm(x @ a) @ c

    arrays = [jax.ShapeDtypeStruct(s, dtype) for s in ((64, width), (width, 64), (TOKENS, 64))]
    with always_fold():
        found = planned(fn, arrays[:2], arrays[2:])
    assert row_squares(found) == []
    (product, _) = named(found, "dot_general")
    assert product not in {v for c in found.changes if c.taken for v in c.gone}


def test_norm_of_a_sum_of_two_products_of_different_rows_stays():
    def fn(a, b, c, x):
        return layer_norm(x @ a + jnp.tanh(x) @ b) @ c

    with always_fold():
        found = planned(fn, [*[shape(16, 64)] * 2, shape(64, 8)], [shape(TOKENS, 16)])
    assert row_squares(found) == []


def test_scale_of_the_channels_folds_back_into_the_weights():
    """LayerScale: what it scales is not kept for its gradient."""

    def fn(params, x):
        h = jnp.tanh(x @ params["a"])
        return jnp.tanh(x + params["g"] * (h @ params["b"] + params["c"])) @ params["d"]

    sizes = {"a": (64, 64), "g": (64,), "b": (64, 64), "c": (64,), "d": (64, 8)}
    params = {name: jnp.ones(size, jnp.float32) for name, size in sizes.items()}
    x = jnp.ones((TOKENS, 64), jnp.float32)
    fc = fcjax.front_contribute(fn, params, x)
    assert gone(fc.plan) == [(TOKENS, 64)]
    (how,) = fc.plan.recipes.values()
    assert {len(t.factors) for t in how.expr.terms} == {1, 2, 3}
    assert residual_bytes(fc.apply, params, x) <= residual_bytes(fn, params, x) - 0.9 * x.nbytes


# --- numbers known while tracing ---


def test_a_quotient_by_the_square_root_of_the_depth_is_a_scale():
    """As Flax's attention writes it: a product of weights goes through it."""

    def fn(a, b, x):
        depth = jnp.sqrt(64).astype(x.dtype)
        return jnp.tanh(x @ a / depth @ b)

    found = planned(fn, weights(64, 512, 8), [shape(TOKENS, 64)])
    assert gone(found) == [(TOKENS, 512)]
    assert named(found, "sqrt") == []
    (how,) = found.recipes.values()
    assert [term.scale for term in how.expr.terms] == [0.125]


def test_a_number_passed_to_a_call_is_a_scale():
    def fn(a, b, x):
        half = jax.jit(lambda y, by: y * by)
        return half(x @ a, np.float32(0.5)) @ b

    found = planned(fn, weights(64, 512, 8), [shape(TOKENS, 64)])
    assert gone(found) == [(TOKENS, 512)]


def test_random_numbers_are_those_of_the_network_as_written():
    """They are made of bits by sums that cancel, in float32; not a digit may change."""
    key = np.asarray([1, 2], np.uint32)

    def noise(key):
        return jax.random.normal(jax.random.wrap_key_data(key), (64, 8), jnp.float32)

    def fn(params, key):
        return noise(key), (noise(key) @ params[0] @ params[1]).sum()

    with always_fold():
        fc = fcjax.front_contribute(fn, [jnp.ones((8, 16)), jnp.ones((16, 2))], key)
        found, _ = jax.jit(fc.apply)(fc.params, key)
    assert not fc.plan.is_trivial
    assert np.array_equal(found, jax.jit(noise)(key))


# --- the objective ---


def batch_norm_block(a, g, x):
    return jnp.maximum(batch_norm(x @ a) * g, 0.0)


@pytest.mark.parametrize(("width", "out"), [(256, 256), (128, 64)])
def test_memory_takes_what_time_declines(width, out):
    params, data = [shape(width, out), shape(out)], [shape(8 * TOKENS, width)]
    time, memory = (
        planned(batch_norm_block, params, data, objective=objective)
        for objective in ("time", "memory")
    )
    (product,) = named(memory, "dot_general")
    assert product in {v for c in memory.changes if c.taken for v in c.gone}
    assert product not in {v for c in time.changes if c.taken for v in c.gone}
    assert memory.after.held < 0.9 * time.after.held
    assert time.after.time < memory.after.time <= 2.0 * memory.before.time


def test_narrow_batch_norm_pays_in_time_too():
    """Second moments of 64 columns are cheaper than the traffic of the product they replace."""
    found = planned(batch_norm_block, [shape(64, 64), shape(64)], [shape(8 * TOKENS, 64)])
    assert gone(found).count((8 * TOKENS, 64)) >= 1
    assert found.after.time < found.before.time


def test_memory_never_doubles_the_time():
    found = planned(chain, weights(512, 4, 512), [shape(TOKENS, 512)], objective="memory")
    assert found.after.time <= 2.0 * found.before.time


# --- bodies in loops ---


def recurrent(a, b, h, xs):
    """A linear recurrence through a narrow product, with an activation in every step."""

    def step(h, x):
        h = jnp.tanh(h @ a @ b + x)
        return h, h

    return jax.lax.scan(step, h, xs)


def dots(jaxpr):
    """The number of matrix products of a jaxpr outside loops, and in the bodies of its loops."""
    outside, inside = 0, 0
    for equation in jaxpr.eqns:
        subs = [
            trace.compat.open_jaxpr(p)[0] for p in equation.params.values() if hasattr(p, "eqns")
        ]
        counts = [dots(sub) for sub in subs]
        outside += equation.primitive.name == "dot_general"
        if equation.primitive.name == "scan":
            inside += sum(map(sum, counts))
        else:
            outside += sum(c[0] for c in counts)
            inside += sum(c[1] for c in counts)
    return outside, inside


def test_recurrent_product_is_formed_before_the_loop():
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.standard_normal(s) / 8, jnp.float32) for s in ((32, 256), (256, 32))]
    h, xs = jnp.ones((64, 32), jnp.float32), jnp.ones((128, 64, 32), jnp.float32)

    def fn(params, h, xs):
        return recurrent(*params, h, xs)

    fc = fcjax.front_contribute(fn, params, h, xs)
    assert dots(jax.make_jaxpr(fn)(params, h, xs)) == (0, 2)
    assert dots(jax.make_jaxpr(fc.apply)(params, h, xs)) == (1, 1)


def test_body_of_a_loop_is_planned_for_all_its_runs():
    """Folding pays only because the product is formed once for all steps."""
    params, h = weights(32, 64, 32), shape(8, 32)
    plans = [planned(recurrent, params, [h, shape(steps, 8, 32)]) for steps in (1, 1000)]
    ((alone,),), ((often,),) = (p.nested.values() for p in plans)
    assert alone.is_trivial
    assert not often.is_trivial
    assert often.runs == 1000
    assert plans[1].after.time < plans[1].before.time


# --- nothing to fold ---


NOTHING = {
    "one layer": (lambda w, x: x @ w, [shape(64, 8)]),
    "a layer and an activation": (lambda w, x: jnp.tanh(x @ w), [shape(64, 8)]),
    "activations between layers": (
        lambda a, b, x: jnp.tanh(x @ a) @ b,
        [shape(64, 512), shape(512, 8)],
    ),
    "a layer with a bias": (lambda w, b, x: x @ w + b, [shape(64, 8), shape(8)]),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_fold_is_trivial(name):
    fn, params = NOTHING[name]
    found = planned(fn, params, [shape(TOKENS, 64)])
    assert found.is_trivial
    assert not any(c.taken for c in found.changes)
    assert found.after == found.before


def test_trivial_plans_run_the_function_as_written():
    calls = []

    def fn(w, x):
        calls.append(x.shape)
        return jnp.tanh(x @ w)

    w, x = jnp.ones((4, 2)), jnp.ones((3, 4))
    fc = fcjax.front_contribute(fn, w, x)
    before = len(calls)
    fc.apply(w, x)
    fc.apply(w, x)
    assert len(calls) == before + 2
