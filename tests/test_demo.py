"""The demo's networks: what is folded in each, and how the tables show it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import fcjax
from fcjax.demo import models
from fcjax.demo.compare import train
from fcjax.demo.table import weight_table
from fcjax.demo.tasks import collapsed_tasks, reduced_tasks

WIDTHS = (6, 16, 16, 3)
COLLAPSED = {task.name: task for task in collapsed_tasks()}
REDUCED = {task.name: task for task in reduced_tasks()}


def transformed(task, dtype):
    apply_fn, params = task.network()
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    inputs = jnp.asarray(task.problem.train[0][: task.batch], dtype)
    return fcjax.front_contribute(apply_fn, params, inputs, **task.options)


@pytest.mark.parametrize(
    ("name", "collapsed"),
    [
        ("linear blocks", 12),
        ("BatchNorm branches", 24),
        ("pre-norm transformer", 21),
        ("ReLU classifier", 0),
    ],
)
def test_what_collapses(name, collapsed):
    # In float32, as it is timed; float64 also takes the square of a sum apart.
    rules = [row.rule for row in transformed(COLLAPSED[name], jnp.float32).report]
    assert rules.count("collapse") == collapsed


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("wide blocks", (340_106, 56_376)),
        ("linear, orthogonal", (34_688, 675)),
        ("linear, balanced", (34_688, 63)),
        ("diagonal net", (600, 200)),
        ("few samples", (144_131, 30_979)),
    ],
)
def test_how_many_weights_are_trained(name, weights):
    fc = transformed(REDUCED[name], jnp.float64)
    trees = (fc.expand(fc.params), fc.params)
    assert tuple(sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in trees) == weights


def test_initial_kernels():
    for kernel in models.orthogonal(WIDTHS):
        short = kernel if kernel.shape[0] <= kernel.shape[1] else kernel.T
        np.testing.assert_allclose(short @ short.T, np.eye(len(short)), atol=1e-12)
    for inner, outer in itertools.pairwise(models.balanced(WIDTHS)):
        np.testing.assert_allclose(inner.T @ inner, outer @ outer.T, atol=1e-12)


def test_training_and_its_table():
    training = train(REDUCED["linear, balanced"], steps=3)
    assert training.state == training.weights
    assert training.verification.max_output_deviation < 1e-12
    assert training.verification.max_param_deviation < 1e-12
    assert training.score["fc"] == training.score["backprop"]
    console = Console(width=80)
    with console.capture() as printed:
        console.print(weight_table([training] * 5))
    assert "34,688" in printed.get()
    assert "…" not in printed.get()
