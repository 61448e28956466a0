"""Tables of which the training data read only some rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_hoisting import PARAMS, READINGS
from training import relative_deviation, updated

import fcjax

COUNT = 40
IDS = np.random.default_rng(0).integers(0, 20, (5, 8)).astype(np.int32)
OUTSIDE = IDS.copy()
OUTSIDE[0, 1], OUTSIDE[2, 3], OUTSIDE[3, 3] = COUNT, 10**6, -COUNT - 1
TABLE = jnp.asarray(np.random.default_rng(1).standard_normal((COUNT, 4)))
HEADS = {
    "nothing to collapse": lambda p, h: jnp.tanh(h),
    "a layer": lambda p, h: jnp.tanh(h @ p["a"]),
    "a segment": lambda p, h: jnp.tanh(h @ p["a"] @ p["b"]),
}


def trained(apply, params, ids, optimizer):
    """The parameters after five steps; tokens that read as NaN do not count."""

    @jax.jit
    def step(params, state):
        loss = lambda p: jnp.nansum(apply(p, ids) ** 2)  # noqa: E731
        return updated(optimizer, jax.grad(loss)(params), state, params)

    state = optimizer.init(params)
    for _ in range(5):
        params, state = step(params, state)
    return params


CASES = [(reading, "nothing to collapse") for reading in READINGS]
CASES += [("index", "a layer"), ("fill", "a segment")]


@pytest.mark.parametrize("ids", [IDS, OUTSIDE], ids=["inside", "outside"])
@pytest.mark.parametrize(("reading", "head"), CASES)
def test_rows_that_are_never_read_are_not_trained_whatever_follows(reading, head, ids):
    params = jax.tree.map(lambda x: jnp.asarray(x, float), {**PARAMS, "table": TABLE})

    def apply_fn(p, ids):
        return jnp.cumsum(HEADS[head](p, READINGS[reading](p["table"], ids)), axis=1)

    optimizer = optax.adam(1e-2)
    fc = fcjax.front_contribute(apply_fn, params, ids, optimizer=optimizer, data=ids)
    assert fc.params["table"].shape[0] < COUNT / 2 + 1
    found = fc.expand(trained(fc.apply, fc.params, ids, optimizer))
    expected = trained(apply_fn, params, ids, optimizer)
    for name, value in expected.items():
        np.testing.assert_array_equal(np.isnan(found[name]), np.isnan(value))
    found, expected = jax.tree.map(jnp.nan_to_num, (found, expected))
    assert relative_deviation(found, expected, floor=1e-3) < 1e-9


def test_a_weight_without_columns_behind_a_look_up():
    params = {"table": jnp.ones((3, 2)), "w": jnp.ones((0, 2))}
    fn = lambda p, i: p["table"][i] @ p["w"].T  # noqa: E731
    fc = fcjax.front_contribute(fn, params, jnp.array([0, 2]))
    assert fc.apply(fc.params, jnp.array([1, 1, 0])).shape == (3, 0)
