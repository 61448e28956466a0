"""Matrix chains: which are found, and that the rewritten network reads only their product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcjax.expressions.written import written
from fcjax.rules.products import matrix_chains, with_products
from fcjax.tracing import trace
from fcjax.transform import DATA, PARAM

X = np.ones((6, 4))
SQUARE = np.ones((4, 4))
stop = jax.lax.stop_gradient
tanh = jnp.tanh


def network(fn, *params):
    flat = trace.flatten(jax.make_jaxpr(fn)(*params, X))
    return written(flat, [PARAM] * len(params) + [DATA])


def found(fn, *params):
    return [
        [f"{leaf}^T" if turned else str(leaf) for leaf, turned in
         zip(chain.leaves, chain.turned, strict=True)]
        for chain in matrix_chains(network(fn, *params), len(params))
    ]  # fmt: skip


FOUND = {
    "two": (lambda a, b, x: x @ a @ b, 2, [["0", "1"]]),
    "weights first": (lambda a, b, c, x: x @ (a @ (b @ c)), 3, [["0", "1", "2"]]),
    "in another order": (lambda a, b, c, x: tanh(x @ c @ a) @ b, 3, [["2", "0"]]),
    "transposed": (lambda a, b, x: x @ a.T @ b, 2, [["0^T", "1"]]),
    "scaled": (lambda a, b, x: 2 * (x @ a) @ (3 * b), 2, [["0", "1"]]),
    "biased": (lambda a, b, c, x: x @ a @ b + c[0], 3, [["0", "1"]]),
    "residual": (lambda a, b, x: x + x @ a @ b, 2, [["0", "1"]]),
    "used twice": (lambda a, b, x: tanh(tanh(x @ a @ b) @ a @ b), 2, [["0", "1"]]),
    "used both ways": (lambda a, b, x: x @ a @ b + x @ (a @ b).T, 2, [["0", "1"]]),
    "trace": (lambda a, b, x: x * jnp.trace(a @ b), 2, [["0", "1"]]),
    "vmap": (lambda a, b, x: jax.vmap(lambda x: x @ a @ b)(x), 2, [["0", "1"]]),
    "einsum": (lambda a, b, x: jnp.einsum("nd,dh,ho->no", x, a, b), 2, [["0", "1"]]),
    "two chains": (
        lambda a, b, c, d, x: tanh(x @ a @ b) @ c @ d, 4, [["0", "1"], ["2", "3"]],
    ),
    "past the longest term": (
        lambda *w: jax.lax.stop_gradient(0.0) + w[-1] @ w[0] @ w[1] @ w[2] @ w[3] @ w[4] @ w[5]
        @ w[6] @ w[7] @ w[8] @ w[9] @ w[10] @ w[11] @ w[12] @ w[13] @ w[14] @ w[15] @ w[16],
        17, [[str(i) for i in range(17)]],
    ),
}  # fmt: skip

NOT_FOUND = {
    "norm": (lambda a, b, x: (x @ a @ b, jnp.sum(a**2)), 2),
    "product with a norm": (lambda a, b, x: (x @ a @ b) * jnp.linalg.norm(a), 2),
    "returned": (lambda a, b, x: (x @ a @ b, a), 2),
    "hidden values returned": (lambda a, b, x: (x @ a @ b, x @ a), 2),
    "hidden row sums": (lambda a, b, x: (x @ a @ b, jnp.sum(x @ a, -1)), 2),
    "constant between": (lambda a, b, x: x @ a @ jnp.diag(jnp.arange(4.0)) @ b, 2),
    "gain between": (lambda a, b, c, x: (x @ a) * c[0] @ b, 3),
    "bias between": (lambda a, b, c, x: (x @ a + c[0]) @ b, 3),
    "data between": (lambda a, b, x: (x @ a * x.sum(-1, keepdims=True)) @ b, 2),
    "activation between": (lambda a, b, x: tanh(x @ a) @ b, 2),
    "residual inside": (lambda a, b, x: (x + x @ a) @ b, 2),
    "shared factor": (lambda a, b, c, x: tanh(x @ a @ b) + tanh(x @ a @ c), 3),
    "both orders": (lambda a, b, x: x @ a @ b + x @ b @ a, 2),
    "tied": (lambda a, x: x @ a @ a, 1),
    "tied and turned": (lambda a, x: x @ a @ a.T, 1),
    "a part": (lambda a, b, x: (x @ a)[:, :2] @ b[:2], 2),
    "no gradient": (lambda a, b, x: x @ stop(a) @ b, 2),
    "half a gradient": (lambda a, b, x: x @ a @ b + x @ stop(a) @ b, 2),
    "remat": (lambda a, b, x: jax.checkpoint(lambda x: tanh(x @ a @ b))(x), 2),
    "loop": (
        lambda a, b, x: jax.lax.scan(lambda h, _: (tanh(h @ a @ b), None), x, length=3)[0], 2,
    ),
    "heads": (
        lambda a, b, x: jnp.einsum(
            "nhk,hko->no", jnp.einsum("nd,dhk->nhk", x, a.reshape(4, 2, 2)), b.reshape(2, 2, 4)
        ),
        2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    fn, count, wanted = FOUND[name]
    assert found(fn, *[SQUARE] * count) == wanted


@pytest.mark.parametrize("name", NOT_FOUND)
def test_not_found(name):
    fn, count = NOT_FOUND[name]
    assert found(fn, *[SQUARE] * count) == []


@pytest.mark.parametrize("name", FOUND)
def test_only_products_are_read(name):
    fn, count, _ = FOUND[name]
    read = network(fn, *[SQUARE] * count)
    chains = matrix_chains(read, count)
    made = with_products(read, chains, [str(i) for i in range(count)])
    folded = {read.body.inputs[leaf] for chain in chains for leaf in chain.leaves}
    leaves = {v for expr in made.roots.values() for v in expr.leaves}
    products = {made.body.inputs[chain.leaves[-1]] for chain in chains}
    assert leaves.isdisjoint(folded)
    assert products <= leaves
    assert made.forced


def test_products_have_the_outer_shape():
    first, second = np.ones((4, 5)), np.ones((3, 5))
    read = network(lambda a, b, x: x @ a @ b.T, first, second)
    (chain,) = matrix_chains(read, 2)
    made = with_products(read, [chain], ["0", "1"])
    assert made.body.inputs[1].shape == (4, 3)
