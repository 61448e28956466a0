"""A traced function on numpy arrays computes what its compiled program does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fcjax.tracing import interpret, trace
from fcjax.tracing.interpret import interpreted

DTYPES = (np.float32, np.float64)
SHAPES = ((), (0,), (3, 4))


def compared(function, *args):
    """Asserts that a function gives the same on numpy arrays as compiled."""
    traced = jax.make_jaxpr(function)(*args)
    found = interpreted(traced)(*jax.tree.leaves(args))
    wanted = jax.tree.leaves(jax.jit(function)(*args))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        is_float = jnp.issubdtype(b.dtype, np.floating)
        tolerance = 30 * float(jnp.finfo(b.dtype).eps) if is_float else 0
        np.testing.assert_allclose(*(np.asarray(x, float) for x in (a, b)), tolerance, tolerance)


def floats(shape, dtype, seed=0):
    return np.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def entrywise(x, y):
    positive = jnp.abs(x) + 0.5
    return [
        x + y, x - y, x * y, x / y, -x, jnp.maximum(x, y), jnp.minimum(x, y), jnp.sign(x),
        jnp.sqrt(positive), lax.rsqrt(positive), jnp.exp(x), jnp.log(positive), jnp.cos(x), x**2,
        x**3, x**-2, positive**y, lax.pow(positive, jnp.int32(3)), lax.square(x), lax.rem(x, y),
        lax.clamp(-0.5 + 0 * x, x, 0.5 + 0 * y), jnp.clip(x, -0.5, 0.5),
        jnp.where(x > y, x, y), jnp.where(jnp.sum(x) > 0, x, y), lax.stop_gradient(x), jnp.copy(x),
        (x < y) & ~(x == 0) | (x != y), x <= y, x >= y, jnp.isfinite(x / 0), jax.nn.relu(x),
        (x > y).astype(x.dtype), x.astype(np.float32), x.astype(np.float64), (x * 9).astype(int),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_entrywise(shape, dtype):
    compared(entrywise, floats(shape, dtype), floats(shape, dtype, 1))


def test_zeros_infinities_and_nan():
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0])
    compared(entrywise, x[:, None] + np.zeros(6), np.zeros((6, 1)) + x)


def integers(n, m):
    return [
        n + m, n * m, n - m, -n, abs(n), jnp.minimum(n, m), n // m, n % m, lax.rem(n, m), n**2,
        lax.select_n(jnp.clip(n, 0, 2), n, m, n + m), n.astype(float), n > m, n & m, jnp.sign(n),
        jnp.sum(n), jnp.max(n), jnp.any(n > 0), jnp.all(n > 0), lax.div(n, m), n / m,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_integers(dtype):
    compared(integers, np.array([-7, 0, 5, 2**31 - 1], dtype), np.array([3, -2, 5, 4], dtype))


def shaped(x):
    """Views and reductions of an array of shape (a, b, c)."""
    return [
        x.T, jnp.transpose(x, (1, 0, 2)), x.reshape(-1), x.reshape(x.shape[0], -1), x[None],
        x[:, None], jnp.broadcast_to(x, (2, *x.shape)), x[:1], x[:, ::2], x[..., 1:3],
        jnp.squeeze(x[:1], 0), jnp.concatenate([x, x], 1), jnp.sum(x), jnp.sum(x, 1),
        jnp.sum(x, (0, 2)), jnp.mean(x, -1, keepdims=True), jnp.ones(x.shape) * x[..., :1],
        lax.reshape(x, (x.size,), (2, 0, 1)),
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 3), (3, 0, 3)])
def test_views_and_sums(shape):
    compared(shaped, floats(shape, np.float64))
    if 0 not in shape:
        compared(lambda x: [jnp.max(x), jnp.min(x, 0), jnp.max(x, (1, 2))], floats(shape, float))


PRODUCTS = {
    "vectors": ("a,a->", (3,), (3,)),
    "matrices": ("ab,bc->ac", (2, 3), (3, 4)),
    "transposed": ("ab,cb->ca", (2, 3), (4, 3)),
    "outer": ("ab,c->abc", (2, 3), (4,)),
    "of several axes": ("abc,dcb->ad", (2, 3, 4), (5, 4, 3)),
    "for each index": ("nab,bnc->nac", (5, 2, 3), (3, 5, 4)),
    "for each of two": ("nmab,mbnc->nmac", (5, 2, 2, 3), (2, 3, 5, 4)),
    "of nothing": ("ab,bc->ac", (2, 0), (0, 4)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, dtype):
    formula, a, b = PRODUCTS[name]
    compared(lambda x, y: jnp.einsum(formula, x, y), floats(a, dtype), floats(b, dtype, 1))


def test_products_in_a_wider_dtype():
    wide = {"preferred_element_type": np.float64}
    x = floats((9, 9), np.float32)
    compared(lambda x: [jnp.dot(x, x, **wide), jnp.dot(x, x.astype(float))], x)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [0, 1, 4])
def test_loops(length, reverse):
    def run(x, w):
        def body(carry, row):
            return (carry[0] + row @ w, carry[1] + 1), (row * carry[0], row[0] > 0)

        return lax.scan(body, (jnp.zeros(3), 0), x, reverse=reverse)

    compared(run, floats((length, 3), float), floats((3, 3), float))


@pytest.mark.parametrize("which", [-1, 0, 1, 2, 9])
def test_branches(which):
    branches = [lambda x: x, lambda x: 2 * x, lambda x: -x]
    x = floats((3,), float)
    compared(lambda n, x: lax.switch(n, branches, x), np.int32(which), x)
    several = np.clip([which, 0, 1], 0, 2)
    compared(jax.vmap(lambda n: lax.switch(n, branches, x)), several)


@jax.custom_vjp
def twice(x):
    return 2 * x


twice.defvjp(lambda x: (twice(x), None), lambda _, g: (g,))

LEFT_TO_JAX = {
    "half precision": lambda x: [
        x.astype(jnp.bfloat16) * x.astype(jnp.bfloat16),
        x.astype(np.half),
    ],
    "random numbers": lambda x: x + jax.random.normal(jax.random.key(3), x.shape),
    "sorting": lambda x: [jnp.sort(x), jnp.argmax(x, -1), x[jnp.argsort(x[0])]],
    "a loop that ends some time": lambda x: lax.while_loop(
        lambda v: v[0, 0] < 9, lambda v: v + 1, x
    ),
    "a factorisation": lambda x: jnp.linalg.svd(x, compute_uv=False),
    "a foreign derivative": lambda x: twice(x),
    "constants and numbers": lambda x: [x + np.arange(3.0), np.arange(2), 3.0],
}


@pytest.mark.parametrize("name", LEFT_TO_JAX)
def test_what_numpy_does_not_do_is_left_to_jax(name):
    compared(LEFT_TO_JAX[name], floats((3, 3), float))


def test_random_keys_pass_through():
    key, x = jax.random.key(0), np.ones(3)
    run = interpreted(jax.make_jaxpr(lambda k, x: (jax.random.split(k), k, 2 * x))(key, x))
    split, same, twice = run(key, x)
    assert same is key
    assert jnp.array_equal(jax.random.key_data(split), jax.random.key_data(jax.random.split(key)))
    assert isinstance(twice, np.ndarray)


def test_every_rule_is_tested():
    x, n = np.ones((2, 3, 4)), np.ones(4, int)
    traced = [
        jax.make_jaxpr(entrywise)(x, x),
        jax.make_jaxpr(integers)(n, n),
        jax.make_jaxpr(shaped)(x),
        jax.make_jaxpr(lambda x: [jnp.max(x), jnp.min(x), x @ x[0].T])(x),
    ]
    names = {
        e.name for t in traced for e in trace.flatten(t, trace.INLINED | interpret.CUSTOM).equations
    }
    aliases = {"add_any", "copy_p", "expand_dims"}
    known = {*interpret.ENTRYWISE, *interpret.FLOATING, *interpret.RULES}
    assert known - aliases <= names


def test_only_what_is_left_to_jax_is_compiled(caplog):
    x = floats((3, 5, 7), float)
    for function, compiles in ((lambda x: jnp.exp(x) @ x[0].T, False), (jnp.sort, True)):
        run = interpreted(jax.make_jaxpr(function)(x))
        caplog.clear()
        with jax.log_compiles():
            run(x)
        assert ("Compiling" in caplog.text) == compiles
