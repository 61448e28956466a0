"""Trains and measures one network both ways.

Trained in float64, so that only rounding error is left of a difference; timed in float32, as one
would train.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcjax.demo.problems import Data
from fcjax.demo.tasks import Task, TimedTask
from fcjax.measure import Memory, Timings, compare_steps, memory_of
from fcjax.transform import front_contribute
from fcjax.verify import Verification, verify

NAMES = ("backprop", "fc")


@dataclasses.dataclass(frozen=True)
class Training:
    """One network trained both ways; dictionaries are keyed by `NAMES`.

    Attributes:
      task: the network.
      verification: the two trainings.
      score: how well the trained network does on the test data.
      weights: number of trained weights.
      state: number of entries of the optimizer's state.
      setup_seconds: time of `front_contribute`.
      rules: how each leaf of the parameters is treated, as in `fc.report`.
    """

    task: Task
    verification: Verification
    score: dict[str, str]
    weights: dict[str, int]
    state: dict[str, int]
    setup_seconds: float
    rules: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """What a training step costs.

    Attributes:
      timings: seconds, for each of `NAMES`.
      memory: what the compiled step needs, keyed by `NAMES`.
    """

    timings: Timings
    memory: dict[str, Memory]


def train(task: Task, steps: int) -> Training:
    """Trains a network both ways for `steps` updates, in float64."""
    problem = task.problem
    with jax.enable_x64(True):
        apply_fn, params = task.network()
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        generator = np.random.default_rng(0)
        batches = [_draw(generator, problem.train, task.batch, jnp.float64) for _ in range(steps)]
        started = time.perf_counter()
        fc = front_contribute(apply_fn, params, batches[0][0], **task.options)
        setup_seconds = time.perf_counter() - started
        verification = verify(fc, problem.loss, batches, task.optimizer)
        outputs = jax.jit(lambda trained: apply_fn(trained, problem.test[0]))
        trained = verification.params
        parameters = {"backprop": params, "fc": fc.params}
        return Training(
            task=task,
            verification=verification,
            score={n: problem.score(outputs(trained[n]), problem.test[1]) for n in NAMES},
            weights={n: _count(parameters[n]) for n in NAMES},
            state={n: _count(task.optimizer.init(parameters[n])) for n in NAMES},
            setup_seconds=setup_seconds,
            rules=tuple(row.rule for row in fc.report),
        )


def measure(task: TimedTask, repeats: int) -> Step:
    """Times `repeats` steps of each way, in float32."""
    apply_fn, params = task.network()
    batch = _draw(np.random.default_rng(1), task.problem.train, task.timing_batch, jnp.float32)
    fc = front_contribute(apply_fn, params, batch[0], **task.options)
    compiled = {
        "backprop": _compiled_step(task, apply_fn, params, batch),
        "fc": _compiled_step(task, fc.apply, fc.params, batch),
    }
    return Step(
        timings=compare_steps(compiled, (batch,), repeats),
        memory={name: memory_of(step.func) for name, step in compiled.items()},
    )


def _compiled_step(task, apply, params, batch):
    """A compiled training step, bound to its parameters and its optimizer's state."""

    @jax.jit
    def step(params, state, batch):
        loss_of = functools.partial(task.problem.loss, apply)
        loss, gradient = jax.value_and_grad(loss_of)(params, batch)
        updates, state = task.optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = task.optimizer.init(params)
    return functools.partial(step.lower(params, state, batch).compile(), params, state)


def _draw(generator, data: Data, size: int, dtype) -> tuple[jax.Array, jax.Array]:
    """A batch drawn with replacement."""
    inputs, targets = data
    chosen = generator.integers(len(inputs), size=size)
    return jnp.asarray(inputs[chosen], dtype), jnp.asarray(targets[chosen])


def _count(tree: Any) -> int:
    return sum(np.size(leaf) for leaf in jax.tree.leaves(tree))
