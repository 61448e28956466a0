"""Jaxprs evaluated by numpy, against jax: values, derivatives, arrays that repeat themselves."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fcjax.numbers.interpreter import Interpreter, Unevaluated, values_of
from fcjax.numbers.periodic import STEP, Numbers, Run

CONV = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
IDS = jnp.array([[0, 3, 5, 7], [-1, 2, 11, 1]])


def scanned(x, w):
    def body(carry, row):
        carry = jnp.tanh(carry + row @ w)
        return carry, carry.sum()

    return lax.scan(body, jnp.zeros(4), x, reverse=True)


def looped(x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2.0), (0, x))[1]


# For each function the shapes of its arguments.
PROGRAMS = {
    "arithmetic": (lambda a, b: (a + b) * (a - 2.0) / (3.0 + b * b), (4, 6), (1, 6)),
    "powers": (lambda a: a**3 + (a * a + 1) ** 0.5 + (a * a + 1) ** -1.5 + a**0, (4, 6)),
    "general power": (lambda a, b: (a * a + 0.5) ** b, (4, 6), (4, 6)),
    "exponentials": (lambda a: jnp.exp(a) + jnp.exp2(a) + jnp.expm1(a), (4, 6)),
    "logarithms": (lambda a: jnp.log(a * a) + jnp.log1p(a * a), (4, 6)),
    "roots": (lambda a: jnp.sqrt(a * a + 1) + lax.rsqrt(a * a + 1) + jnp.cbrt(a), (4, 6)),
    "angles": (lambda a: jnp.sin(a) + jnp.cos(a) * jnp.tan(a / 4) + jnp.arctan(a), (4, 6)),
    "hyperbolic": (lambda a: jnp.sinh(a) + jnp.cosh(a) + jnp.arcsinh(a) + jnp.tanh(a), (4, 6)),
    "activations": (lambda a: jax.nn.relu(a) + jax.nn.gelu(a) + jax.nn.silu(a), (4, 6)),
    "error function": (lambda a: lax.erf(a) + lax.erfc(a), (4, 6)),
    "pieces": (lambda a, b: jnp.maximum(a, b) + jnp.abs(a) + jnp.clip(a, -0.5, 0.5), (4, 6), (6,)),
    "where": (lambda a, b: jnp.where(a > b, a, 2 * b) + jnp.minimum(a, 0.3), (4, 6), (4, 6)),
    "rounding": (lambda a: jnp.floor(a) + jnp.ceil(a) + jnp.round(a) + jnp.sign(a), (4, 6)),
    "remainders": (lambda a: jnp.mod(a, 0.7) + lax.rem(a, 0.3), (4, 6)),
    "stopped": (lambda a: a * lax.stop_gradient(a), (4, 6)),
    "softmax": (lambda a: jax.nn.softmax(a, -1) + jax.nn.logsumexp(a, 0), (4, 6)),
    "norm": (lambda a: (a - a.mean(0)) * lax.rsqrt(a.var(0) + 1e-3), (8, 6)),
    "reductions": (lambda a: a.sum(1) + a.max(1) + a.min(1) + a.prod(1), (4, 6)),
    "means": (lambda a: a.mean() + a.sum((0, 2)), (4, 6, 8)),
    "cumulative": (lambda a: jnp.cumsum(a, 1) + lax.cumsum(a, 0, reverse=True), (4, 6)),
    "cumulative products": (lambda a: jnp.cumprod(a, 1), (4, 6)),
    "product": (lambda a, b: a @ b, (8, 6), (6, 4)),
    "batched product": (lambda a, b: jnp.einsum("bij,bjk->bki", a, b), (3, 8, 6), (3, 6, 4)),
    "product of one batch": (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (1, 8, 6), (1, 6, 4)),
    "double contraction": (lambda a, b: jnp.tensordot(a, b, 2), (8, 4, 6), (4, 6, 3)),
    "outer product": (lambda a, b: jnp.einsum("i,j->ij", a, b), (8,), (6,)),
    "inner product": (lambda a, b: a @ b, (9,), (9,)),
    "merged axes": (lambda a: a.reshape(24, 8) @ a.reshape(48, 4)[:8], (4, 6, 8)),
    "split axes": (lambda a: a.reshape(2, 2, 3, 2).sum(1), (4, 6)),
    "regrouped axes": (lambda a: a.reshape(6, 4) * 2.0, (4, 6)),
    "ones": (lambda a: a.reshape(1, 4, 1, 6, 1).squeeze(2)[0, :, None], (4, 6)),
    "transposes": (lambda a: a.transpose(2, 0, 1) + a.mean(1).T[:, :, None], (4, 6, 8)),
    "broadcasts": (lambda a: jnp.broadcast_to(a[:, None], (4, 3, 6)) * a[None, 0], (4, 6)),
    "slices": (lambda a: a[1:, ::2] + a[:3, 1::2], (4, 6)),
    "joined": (lambda a, b: jnp.concatenate([a, b, a[:, :1]], 1), (4, 6), (4, 8)),
    "joined with constants": (lambda a: jnp.concatenate([a, jnp.ones((4, 2))], 1), (4, 6)),
    "stacked": (lambda a, b: jnp.stack([a, b, 2 * a], 1), (4, 6), (4, 6)),
    "split": (lambda a: sum(jnp.split(a, [2, 4], 1)), (4, 6)),
    "tiled": (lambda a: jnp.tile(a, (2, 3)) + jnp.repeat(jnp.repeat(a, 2, 0), 3, 1), (4, 6)),
    "padded": (lambda a: jnp.pad(a, ((1, 2), (0, 3))), (4, 6)),
    "padded inside": (lambda a: lax.pad(a, 1.5, ((1, -1, 1), (-2, 3, 0))), (4, 6)),
    "padded to nothing": (lambda a: lax.pad(a, 0.0, ((-3, -1, 0), (0, 0, 2))), (4, 6)),
    "wrapped": (lambda a: jnp.pad(a, ((1, 2), (3, 0)), mode="wrap"), (4, 6)),
    "reflected": (lambda a: jnp.pad(a, ((1, 2), (3, 0)), mode="reflect"), (4, 6)),
    "rolled": (lambda a: jnp.roll(a, (1, 2), (0, 1)) + a[::-1], (4, 6)),
    "rows": (lambda a: a[jnp.array([0, 2, 5, -1])], (6, 4)),
    "rows outside": (lambda a: jnp.take(a, IDS, axis=0, mode="clip"), (6, 4)),
    "rows filled": (lambda a: jnp.take(a, IDS, axis=0, fill_value=0.5), (6, 4)),
    "columns": (lambda a: jnp.take(a, IDS % 4, axis=1), (6, 4)),
    "entries": (lambda a: a[jnp.arange(4), IDS[0] % 6], (4, 6)),
    "along an axis": (lambda a: jnp.take_along_axis(a, jnp.argsort(a, 1), 1), (4, 6)),
    "rows of each": (lambda a: jax.vmap(lambda t, i: t[i])(a, IDS[0] % 6), (4, 6)),
    "dynamic slice": (lambda a: lax.dynamic_slice(a, (1, IDS[1, 0]), (2, 3)), (4, 6)),
    "dynamic update": (lambda a, b: lax.dynamic_update_slice(a, b, (3, 1)), (4, 6), (2, 3)),
    "set": (lambda a: a.at[1].set(3.0).at[:, 2].multiply(2.0), (4, 6)),
    "segment sum": (lambda a: jax.ops.segment_sum(a, jnp.array([0, 1, 1, 4]), 3), (4, 6)),
    "added at": (lambda a, b: a.at[IDS].add(b), (6, 4), (2, 4, 4)),
    "largest at": (lambda a, b: a.at[jnp.array([1, 1, 3])].max(b), (6, 4), (3, 4)),
    "sorted": (lambda a: jnp.sort(a, 1), (4, 6)),
    "convolution": (lambda a, k: CONV(a, k, (1, 1), "SAME"), (2, 5, 6, 4), (3, 3, 4, 6)),
    "strided": (lambda a, k: CONV(a, k, (2, 3), ((1, 0), (2, 1))), (2, 5, 6, 4), (3, 2, 4, 6)),
    "dilated": (
        lambda a, k: CONV(a, k, (1, 1), ((1, 1), (0, 2)), (2, 1), (1, 2)),
        (2, 5, 6, 4), (3, 2, 4, 6),
    ),
    "pointwise": (lambda a, k: CONV(a, k, (1, 1), "VALID"), (4, 5, 6, 4), (1, 1, 4, 6)),
    "grouped": (
        lambda a, k: CONV(a, k, (1, 1), "SAME", feature_group_count=2), (2, 5, 6, 4), (3, 3, 2, 6)
    ),
    "groups of examples": (
        lambda a, k: CONV(a, k, (1, 1), "SAME", batch_group_count=2), (4, 5, 6, 4), (3, 3, 4, 6)
    ),
    "transposed convolution": (
        lambda a, k: lax.conv_transpose(a, k, (2, 2), "SAME"), (2, 5, 6, 4), (3, 3, 4, 6)
    ),
    "channels first": (
        lambda a, k: lax.conv_general_dilated(a, k, (1,), "SAME"), (2, 4, 6), (5, 4, 3)
    ),
    "average pooling": (
        lambda a: lax.reduce_window(a, 0.0, lax.add, (1, 2, 3, 1), (1, 2, 1, 1), "VALID"),
        (2, 5, 6, 4),
    ),
    "max pooling": (
        lambda a: lax.reduce_window(a, -jnp.inf, lax.max, (1, 2, 3, 1), (1, 2, 1, 1), "SAME"),
        (2, 5, 6, 4),
    ),
    "scan": (scanned, (5, 3), (3, 4)),
    "while": (looped, (4, 6)),
    "cond": (lambda a: lax.cond(a.sum() > 0, jnp.sin, lambda x: 2 * x, a), (4, 6)),
    "associative scan": (lambda a: lax.associative_scan(jnp.multiply, a), (5, 3)),
    "checkpoint": (lambda a, b: jax.checkpoint(lambda x: jnp.tanh(x @ b))(a), (4, 6), (6, 3)),
    "cholesky": (lambda a: jnp.linalg.cholesky(a @ a.T + jnp.eye(4)), (4, 6)),
    "random numbers": (lambda a: a + jax.random.normal(jax.random.key(0), a.shape), (4, 6)),
    "rounded": (
        lambda a: a.astype(jnp.bfloat16).astype(a.dtype) + lax.reduce_precision(a, 5, 10), (4, 6)
    ),
    "complex": (
        lambda a, b: jnp.abs((a + 1j * b) * jnp.exp(1j * a)) + jnp.imag(a * 1j), (4,), (4,)
    ),
    "of nothing": (lambda a: (a[:0] @ jnp.ones((6, 2))).sum() + a.sum(), (4, 6)),
    "of no rows": (lambda a: jnp.concatenate([a, a[:0]]).reshape(24), (4, 6)),
}  # fmt: skip
BY_JAX = ("sorted", "along an axis", "cholesky", "random numbers", "rounded")
NOT_ANALYTIC = ("complex", "rounding")


def arguments(name):
    rng = np.random.default_rng(0)
    _, *shapes = PROGRAMS[name]
    return [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]


def relative(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    errors = [
        np.max(np.abs(np.asarray(a) - np.asarray(b)), initial=0)
        / max(np.max(np.abs(b), initial=0), 1)
        for a, b in pairs
    ]
    return max(errors)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_evaluated_as_by_jax(name):
    fn, *_ = PROGRAMS[name]
    args = arguments(name)
    found, expected = values_of(fn, *args), fn(*args)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)
    assert relative(found, expected) < 1e-13


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_are_evaluated_as_by_jax(name):
    fn, *_ = PROGRAMS[name]
    args = arguments(name)

    def loss(*args):
        return sum(jnp.sum(jnp.sin(out)) for out in jax.tree.leaves(fn(*args)))

    if name == "while":  # has no reverse mode
        return
    gradient = jax.grad(loss, argnums=tuple(range(len(args))))
    assert relative(values_of(gradient, *args), gradient(*args)) < 1e-11


def periodic(array, periods, name, run):
    """Numbers of which every axis repeats itself after one of ``periods``, and the whole array."""
    array = np.asarray(array)
    cut = array[tuple(slice(0, n) for n in periods)]
    sources = tuple(frozenset({(name, axis)}) for axis in range(array.ndim))
    numbers = Numbers(cut, array.shape, array.dtype, sources, run)
    whole = cut
    for axis, size in enumerate(array.shape):
        whole = np.take(whole, np.arange(size) % cut.shape[axis], axis)
    return numbers, whole


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PROGRAMS)
def test_arrays_that_repeat_themselves_are_evaluated_as_if_written_out(name, seed):
    fn, *_ = PROGRAMS[name]
    rng, run = np.random.default_rng(seed), Run()
    args = arguments(name)
    sizes = [[rng.choice([1, n, *range(1, n + 1)]) for n in x.shape] for x in args]
    pairs = [periodic(x, n, i, run) for i, (x, n) in enumerate(zip(args, sizes, strict=True))]
    numbers, whole = zip(*pairs, strict=True)
    whole = map(jnp.asarray, whole)
    jaxpr = jax.make_jaxpr(fn)(*args)
    found = [x.full() for x in Interpreter(run).evaluate(jaxpr, numbers)]
    assert relative(found, jax.tree.leaves(fn(*whole))) < 1e-12


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in (*BY_JAX, *NOT_ANALYTIC)])
def test_imaginary_parts_are_derivatives(name):
    fn, *_ = PROGRAMS[name]
    args = arguments(name)
    tangents = [np.random.default_rng(1).standard_normal(x.shape) for x in args]
    moved = [
        Numbers(np.asarray(x) + 1j * STEP * d, x.shape, x.dtype, (frozenset(),) * x.ndim, Run())
        for x, d in zip(args, tangents, strict=True)
    ]
    found = Interpreter(Run()).evaluate(jax.make_jaxpr(fn)(*args), moved)
    derivatives = [np.imag(x.full()) / STEP for x in found]
    _, expected = jax.jvp(fn, args, tangents)
    assert relative(derivatives, jax.tree.leaves(expected)) < 1e-11


POSITIONAL = {
    "slices": {(0, 0), (0, 1)},
    "product": set(),
    "norm": set(),
    "joined": {(0, 1), (1, 1)},
    "convolution": {(0, 1), (0, 2), (1, 0), (1, 1)},
    "pointwise": {(1, 0), (1, 1)},
    "cumulative": {(0, 0), (0, 1)},
    "means": set(),
    "rolled": {(0, 0), (0, 1)},
}


@pytest.mark.parametrize("name", POSITIONAL)
def test_axes_whose_positions_matter_are_noted(name):
    fn, *_ = PROGRAMS[name]
    args, run = arguments(name), Run()
    numbers = [periodic(x, (1,) * x.ndim, i, run)[0] for i, x in enumerate(args)]
    Interpreter(run).evaluate(jax.make_jaxpr(fn)(*args), numbers)
    assert run.looked_at == POSITIONAL[name]


def test_few_turns_of_a_loop_are_enough_to_compare_it():
    fn, *_ = PROGRAMS["scan"]
    args = arguments("scan")
    _, rows = Interpreter(Run(), turns=2).evaluate(jax.make_jaxpr(fn)(*args), args)
    assert np.count_nonzero(rows.full()) == 2
    np.testing.assert_allclose(rows.full()[3:], fn(*args)[1][3:], rtol=1e-12)


def test_a_callback_has_no_numbers():
    def fn(x):
        return jax.pure_callback(lambda v: v, x, x)

    with pytest.raises(Unevaluated, match="pure_callback"):
        values_of(fn, jnp.ones(3))


def test_numbers_that_only_jax_holds_are_left_to_jax():
    def fn(key):
        return jax.random.normal(jax.random.split(key)[1], (3,))

    key = jax.random.key(3)
    np.testing.assert_allclose(values_of(fn, key), fn(key), rtol=1e-15)
