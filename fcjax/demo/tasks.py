"""What the demo trains: networks, each with what it learns and its optimizer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from fcjax.demo import models, problems
from fcjax.demo.models import Network
from fcjax.demo.problems import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One network to train both ways.

    Attributes:
      name: what the table and the picture call it.
      network: makes the network.
      problem: what it learns.
      optimizer_name: what trains it, in words.
      optimizer: what trains it, as an optax transformation.
      batch: rows of a batch.
      known: which of the rules' conditions `front_contribute` is told, as its keywords: the
        optimizer, and the inputs where they span less than their space.
    """

    name: str
    network: Callable[[], Network]
    problem: Problem
    optimizer_name: str
    optimizer: optax.GradientTransformation
    batch: int = 256
    known: tuple[str, ...] = ("optimizer",)

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of `front_contribute`."""
        values = {"optimizer": self.optimizer, "data": self.problem.train[0]}
        return {name: values[name] for name in self.known}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedTask(Task):
    """One whose step is also timed; it is folded for any optimizer.

    Attributes:
      timing_batch: images in the batch on which the step is timed.
    """

    timing_batch: int
    known: tuple[str, ...] = ()


def timed_tasks() -> list[TimedTask]:
    """The networks whose step becomes cheaper, and one where nothing can."""
    adam = optax.adam(1e-3)
    return [
        _timed("linear blocks", models.LinearBlocks((512, 512)), "Adam", adam, 4096),
        _timed(
            "BatchNorm branches", models.BatchNormBranches(), "momentum", optax.sgd(0.05, 0.9), 8192
        ),
        _timed(
            "pre-norm transformer", models.RowTransformer(), "AdamW", optax.adamw(2e-3), 1024
        ),
        _timed("ReLU classifier", models.ReluClassifier((256, 256), 10), "Adam", adam, 4096),
    ]


def _timed(name, model, optimizer_name, optimizer, timing_batch) -> TimedTask:
    return TimedTask(
        name=name,
        network=lambda: models.flax_network(model, models.PIXELS),
        problem=problems.digits(),
        optimizer_name=optimizer_name,
        optimizer=optimizer,
        timing_batch=timing_batch,
    )


def reduced_tasks() -> list[Task]:
    """The networks that train in fewer weights."""
    decaying = optax.chain(
        optax.trace(0.9), optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(0.05)
    )
    blocks, classifier = models.LinearBlocks((1024,)), models.ReluClassifier((256,), 3)
    widths = (12, 128, 128, 128, 3)
    return [
        Task(
            name="wide blocks",
            network=lambda: models.flax_network(blocks, models.PIXELS),
            problem=problems.digits(),
            optimizer_name="momentum, decay",
            optimizer=decaying,
        ),
        *(
            Task(
                name=f"linear, {initial.__name__}",
                network=lambda initial=initial: models.deep_linear(initial(*widths)),
                problem=problems.linear_map(),
                optimizer_name="momentum",
                optimizer=optax.sgd(0.02, 0.9),
            )
            for initial in (models.orthogonal, models.balanced)
        ),
        Task(
            name="diagonal, depth 3",
            network=lambda: models.diagonal(features=200, magnitude=0.2),
            problem=problems.sparse_sum(),
            optimizer_name="Adam",
            optimizer=optax.adam(2e-2),
            batch=64,
        ),
        Task(
            name="more features than samples",
            network=lambda: models.flax_network(classifier, 559),
            problem=problems.wines(),
            optimizer_name="momentum",
            optimizer=optax.sgd(0.01, 0.9),
            batch=64,
            known=("optimizer", "data"),
        ),
    ]
