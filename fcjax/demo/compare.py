"""Trains and measures one network both ways.

Trained in float64, so that only rounding error is left of a difference; timed in float32, as one
would train.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcjax.demo.models import Task
from fcjax.measure import Memory, Timings, compare_steps, memory_of
from fcjax.transform import front_contribute
from fcjax.verify import Verification, verify

NAMES = ("backprop", "fc")
Digits = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the demo shows about one network; dictionaries are keyed by `NAMES`.

    Attributes:
      task: the network.
      verification: the two trainings.
      accuracy: share of the test images that are classified correctly after training.
      weights: number of trainable weights.
      timings: seconds of a training step.
      memory: what the compiled training step needs.
      rules: how each leaf of the parameters is treated, as in `fc.report`.
    """

    task: Task
    verification: Verification
    accuracy: dict[str, float]
    weights: dict[str, int]
    timings: Timings
    memory: dict[str, Memory]
    rules: tuple[str, ...]


def compare(task: Task, train: Digits, test: Digits, steps: int, repeats: int) -> Comparison:
    """Trains `task` both ways for `steps` updates, and times `repeats` steps of each.

    Args:
      task: the network.
      train: images of shape `(n, 64)` in [0, 1], and labels of shape `(n,)`.
      test: the same, for the accuracy.
      steps: number of updates.
      repeats: rounds of the timing.

    Returns:
      A `Comparison`.
    """
    apply_fn, params = task.init()
    verification, accuracy = _train(task, apply_fn, params, train, test, steps)
    batch = _draw(np.random.default_rng(1), train, task.timing_batch, jnp.float32)
    fc = front_contribute(apply_fn, params, batch[0], optimizer=task.optimizer)
    compiled = {
        "backprop": _compiled_step(apply_fn, params, task.optimizer, batch),
        "fc": _compiled_step(fc.apply, fc.params, task.optimizer, batch),
    }
    return Comparison(
        task=task,
        verification=verification,
        accuracy=accuracy,
        weights={"backprop": _count(params), "fc": _count(fc.params)},
        timings=compare_steps(compiled, (batch,), repeats),
        memory={name: memory_of(step.func) for name, step in compiled.items()},
        rules=tuple(row.rule for row in fc.report),
    )


def _train(task, apply_fn, params, train, test, steps) -> tuple[Verification, dict[str, float]]:
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        batches = [_draw(generator, train, 256, jnp.float64) for _ in range(steps)]
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        fc = front_contribute(apply_fn, params, batches[0][0], optimizer=task.optimizer)
        verification = verify(fc, cross_entropy, batches, task.optimizer)
        predict = jax.jit(lambda trained: jnp.argmax(apply_fn(trained, test[0]), axis=-1))
        accuracy = {
            name: float(np.mean(predict(verification.params[name]) == test[1])) for name in NAMES
        }
        return verification, accuracy


def cross_entropy(apply: Any, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean cross-entropy of the logits `apply(params, images)`."""
    images, labels = batch
    logits = apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _compiled_step(apply, params, optimizer, batch):
    """A compiled training step, bound to its parameters and its optimizer's state."""

    @jax.jit
    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(lambda p: cross_entropy(apply, p, batch))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    return functools.partial(step.lower(params, state, batch).compile(), params, state)


def _draw(generator, digits: Digits, size: int, dtype) -> tuple[jax.Array, jax.Array]:
    """A batch drawn with replacement."""
    chosen = generator.integers(len(digits[0]), size=size)
    return jnp.asarray(digits[0][chosen], dtype), jnp.asarray(digits[1][chosen])


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
