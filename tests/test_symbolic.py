"""Networks exported for sizes that are symbols, transformed and merged."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export, lax
from test_corners import normal

import fcjax
from fcjax.errors import FrontContributionError
from fcjax.numbers.interpreter import values_of

EXAMPLE = 2048
SIZES = (1, 7, 130)


def like(tree, **symbols):
    """Shapes whose first size is a symbol, one for each argument."""
    return [
        jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
        for size, x in zip(symbols.values(), tree, strict=True)
    ]


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(8, (1, 1))(x))
        x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2))
        return nn.Dense(3)(nn.Dense(32)(x.reshape(x.shape[0], -1)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = x + nn.Dense(8)(nn.Dense(64)(nn.LayerNorm()(x)))
        return nn.Dense(2)(x.mean(1))


X = normal(EXAMPLE, 4)
WEIGHTS = {"a": normal(4, 64), "b": normal(64, 8), "c": normal(8), "d": normal(8, 1)}


def dense(p, x):
    return jnp.tanh(x @ p["a"] @ p["b"] + p["c"]) @ p["d"]


def normalised(p, x):
    """The number of rows is a number in it, and its square root."""
    z = x @ p["a"] @ p["b"]
    z = (z - z.mean(0)) / jnp.sqrt(z.var(0, ddof=1) + 1e-3)
    return jnp.tanh(z / jnp.sqrt(x.shape[0])) @ p["d"]


def recurrent(p, x):
    step = lambda h, row: (jnp.tanh(h + row @ p["a"] @ p["b"]), h @ p["d"])  # noqa: E731
    return lax.scan(step, p["c"], x)[1]


def flattened(p, x):
    y = (x.reshape(-1, 4) @ p["a"] @ p["b"]).reshape(x.shape[0], 2, 8)
    return jnp.concatenate([y, 2 * y], axis=0) @ p["d"]


NETWORKS = {
    "dense": (dense, WEIGHTS, (4,)),
    "convolutional": (Convolutional().apply, None, (8, 8, 3)),
    "attention": (Block().apply, None, (5, 8)),
    "normalised over the batch": (normalised, WEIGHTS, (4,)),
    "over time": (recurrent, WEIGHTS, (4,)),
    "flattened": (flattened, WEIGHTS, (2, 4)),
}


def network(name):
    apply_fn, params, shape = NETWORKS[name]
    if params is None:
        module = apply_fn.__self__
        params = module.init(jax.random.key(0), jnp.ones((1, *shape)))
        params = jax.tree.map(lambda a: normal(*a.shape) * a.shape[0] ** -0.5, params)
        if "batch_stats" in params:
            params["batch_stats"] = jax.tree.map(jnp.abs, params["batch_stats"])
    return apply_fn, params, shape


transformed = fcjax.front_contribute


@pytest.mark.parametrize("make", [transformed, fcjax.merge], ids=["transformed", "merged"])
@pytest.mark.parametrize("name", NETWORKS)
def test_exported_for_any_batch_size(name, make):
    apply_fn, params, shape = network(name)
    made = make(apply_fn, params, normal(EXAMPLE, *shape))
    (rows,) = export.symbolic_shape("rows")
    exported = export.export(jax.jit(made.apply))(
        made.params, *like([normal(1, *shape)], rows=rows)
    )
    for size in SIZES:
        x = normal(size, *shape, seed=size)
        found, expected = exported.call(made.params, x), values_of(apply_fn, params, x)
        if size > 1 or name != "normalised over the batch":
            assert np.isfinite(expected).all()
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [transformed, fcjax.merge], ids=["transformed", "merged"])
def test_several_symbols(make):
    def pairs(p, x, y):
        return (x @ p["a"] @ p["b"]) @ (y @ p["a"] @ p["b"]).T / (x.shape[0] * y.shape[0])

    made = make(pairs, WEIGHTS, normal(64, 4), normal(48, 4))
    a, b = export.symbolic_shape("a, b")
    args = like([normal(1, 4)] * 2, a=a, b=b)
    exported = export.export(jax.jit(made.apply))(made.params, *args)
    for sizes in ((1, 1), (3, 5), (70, 2)):
        x, y = (normal(size, 4, seed=i) for i, size in enumerate(sizes))
        np.testing.assert_allclose(
            exported.call(made.params, x, y), pairs(WEIGHTS, x, y), rtol=1e-9
        )


def test_gradients_of_fewer_weights_for_any_batch_size():
    x = normal(64, 4)
    fc = fcjax.front_contribute(dense, WEIGHTS, x, optimizer=optax.sgd(0.1))
    assert fc.params["a"].size < WEIGHTS["a"].size
    gradient = jax.grad(lambda p, x: jnp.sum(jnp.sin(fc.apply(p, x))))
    (rows,) = export.symbolic_shape("rows")
    exported = export.export(jax.jit(gradient))(fc.params, *like([x], rows=rows))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
        exported.call(fc.params, x), gradient(fc.params, x),
    )  # fmt: skip


# --- what is refused ---


def exported(apply, params, example):
    (rows,) = export.symbolic_shape("rows")
    return export.export(jax.jit(apply))(params, *like([example], rows=rows))


REFUSED = {
    "by_size": (
        lambda p, x: dense(p, x) if x.shape[0] >= 3000 else jnp.sin(dense(p, x)),
        "Symbolic dimension comparison 'rows' >= '3000' is inconclusive",
    ),
    "by a type": (
        lambda p, x: jnp.sin(dense(p, x)) if type(x.shape[0]) is int else dense(p, x),
        "decides by a symbolic size what it computes",
    ),
    "a size that is the same for even ones": (
        lambda p, x: dense(p, x.reshape(-1, 2, 4).reshape(-1, 4)[: 2 * (x.shape[0] // 2)]),
        "in a way that is not understood|could not be traced|does not take",
    ),
    "a size that is the same for large ones": (
        lambda p, x: dense(p, x) * jnp.log1p(jax.core.min_dim(x.shape[0], 5)),
        "in a way that is not understood",
    ),
    "a part of a constant": (
        lambda p, x: dense(p, x) * jnp.arange(9.0)[: jax.core.min_dim(x.shape[0], 5)].sum(),
        "in a way that is not understood",
    ),
    "a logarithm": (
        lambda p, x: dense(p, x) * np.log(float(x.shape[0])),
        "in a way that is not understood|could not be traced",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_merged_networks_that_depend_on_sizes_otherwise_are_refused(name):
    apply_fn, message = REFUSED[name]
    made = fcjax.merge(apply_fn, WEIGHTS, normal(EXAMPLE, 4))
    with pytest.raises(FrontContributionError, match=message):
        exported(made.apply, made.params, normal(1, 4))


def test_constraints_are_refused():
    made = fcjax.merge(lambda p, x: dense(p, x) * (2 if x.shape[0] < 101 else 3), WEIGHTS, X)
    sizes = export.symbolic_shape("rows, 4", constraints=["rows <= 100"])
    with pytest.raises(FrontContributionError, match="without constraints"):
        export.export(jax.jit(made.apply))(made.params, jax.ShapeDtypeStruct(sizes, X.dtype))


def test_plans_are_made_for_numbers():
    (rows,) = export.symbolic_shape("rows")
    (symbolic,) = like([normal(1, 4)], rows=rows)
    for make in (transformed, fcjax.merge):
        with pytest.raises(FrontContributionError, match="whose sizes are numbers"):
            make(dense, WEIGHTS, symbolic)
    fc = transformed(dense, WEIGHTS, normal(64, 4))
    with pytest.raises(FrontContributionError, match=r"use fc\.apply"):
        exported(lambda p, x: fc.apply_with(p, fc.contributions, x), fc.params, normal(1, 4))


def test_folds_along_gradient_flow_are_exported_expanded():
    params = {"g": jnp.ones(4), "h": 2 * jnp.ones(4)}
    x = normal(64, 4)
    scaled = lambda p, x: x * p["g"] * p["h"]  # noqa: E731
    fc = fcjax.front_contribute(scaled, params, x, optimizer=optax.sgd(0.1), exactness="flow")
    assert {row.exactness for row in fc.report} == {"flow"}
    with pytest.raises(FrontContributionError, match=r"fc\.expand"):
        exported(fc.apply, fc.params, x)
    full = exported(scaled, fc.expand(fc.params), x)
    np.testing.assert_allclose(full.call(fc.expand(fc.params), x), fc.apply(fc.params, x))
