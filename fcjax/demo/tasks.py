"""What the demo trains: networks, each with what it learns and its optimizer."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import optax

from fcjax.demo import models
from fcjax.demo.models import Network, flax_network
from fcjax.demo.problems import Problem, digits, linear_map, sparse_sum, wines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One network to train both ways.

    Attributes:
      name: what the table and the picture call it.
      network: makes the network, always the same.
      problem: what it learns.
      optimizer_name: what trains it, in words.
      optimizer: what trains it, as an optax transformation.
      options: keywords of `front_contribute`.
      batch: rows of a batch.
    """

    name: str
    network: Callable[[], Network]
    problem: Problem
    optimizer_name: str
    optimizer: optax.GradientTransformation
    options: dict[str, Any]
    batch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedTask(Task):
    """One whose training step is also timed.

    Attributes:
      timing_batch: rows of the batch on which it is timed.
    """

    timing_batch: int


def collapsed_tasks() -> list[TimedTask]:
    """Networks whose step becomes cheaper, whatever trains them, and one where nothing can."""
    adam, momentum, adamw = optax.adam(1e-3), optax.sgd(0.05, 0.9), optax.adamw(2e-3)
    blocks, classifier = models.LinearBlocks((512, 512)), models.ReluClassifier((256, 256), 10)
    return [
        _collapsed("linear blocks", blocks, "Adam", adam, 4096),
        _collapsed("BatchNorm branches", models.BatchNormBranches(), "momentum", momentum, 8192),
        _collapsed("pre-norm transformer", models.RowTransformer(), "AdamW", adamw, 1024),
        _collapsed("ReLU classifier", classifier, "Adam", adam, 4096),
    ]


def _collapsed(name, model, optimizer_name, optimizer, timing_batch) -> TimedTask:
    return TimedTask(
        name=name,
        network=cache(partial(flax_network, model, models.PIXELS)),
        problem=digits(),
        optimizer_name=optimizer_name,
        optimizer=optimizer,
        options={},
        batch=256,
        timing_batch=timing_batch,
    )


def reduced_tasks() -> list[Task]:
    """Networks that train fewer weights, because `front_contribute` knows what trains them."""
    momentum, adam = optax.sgd(0.02, 0.9), optax.adam(2e-2)
    decay = optax.chain(
        optax.trace(0.9), optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(0.05)
    )
    blocks = partial(flax_network, models.LinearBlocks((1024,)), models.PIXELS)
    linear = [partial(models.deep_linear, make) for make in (models.orthogonal, models.balanced)]
    diagonal = partial(models.diagonal, features=200, magnitude=0.2)
    bottles = wines()
    inputs = bottles.train[0]
    relu = partial(flax_network, models.ReluClassifier((256,), 3), inputs.shape[1])
    return [
        _reduced("wide blocks", blocks, digits(), "momentum, decay", decay, 256),
        _reduced("linear, orthogonal", linear[0], linear_map(), "momentum", momentum, 256),
        _reduced("linear, balanced", linear[1], linear_map(), "momentum", momentum, 256),
        _reduced("diagonal net", diagonal, sparse_sum(), "Adam", adam, 64),
        _reduced("few samples", relu, bottles, "momentum", momentum, 64, inputs),
    ]


def _reduced(
    name, network, problem, optimizer_name, optimizer, batch, data: np.ndarray | None = None
) -> Task:
    return Task(
        name=name,
        network=network,
        problem=problem,
        optimizer_name=optimizer_name,
        optimizer=optimizer,
        options={"optimizer": optimizer, "data": data},
        batch=batch,
    )
