"""Runs the demo from the data to the table and the picture."""

import dataclasses
from pathlib import Path

import numpy as np
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fcjax.demo.compare import Comparison, Digits, compare
from fcjax.demo.models import tasks
from fcjax.demo.picture import picture
from fcjax.demo.table import table


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much the demo does.

    Attributes:
      steps: updates of each training.
      repeats: rounds of each timing.
      timing_batch: images in the timed batch, or `None` for each network's own number.
    """

    steps: int = 200
    repeats: int = 25
    timing_batch: int | None = None


def run(output: str | Path, effort: Effort, console: Console) -> list[Comparison]:
    """Trains the four networks both ways, prints the table and saves the picture.

    Args:
      output: where to save the picture; the ending chooses the format.
      effort: how long to train and to measure.
      console: where to print.

    Returns:
      The comparisons, in the order of the table.
    """
    train, test = _digits()
    comparisons = []
    for task in tasks():
        if effort.timing_batch is not None:
            task = dataclasses.replace(task, timing_batch=effort.timing_batch)
        console.print(
            f"[bold]{task.name}[/], {task.optimizer_name}: {effort.steps} steps both ways, "
            f"then {effort.repeats} timed rounds on {task.timing_batch} images"
        )
        comparisons.append(compare(task, train, test, effort.steps, effort.repeats))
    console.print(table(comparisons))
    picture(comparisons).savefig(output, dpi=160)
    console.print(f"picture: {output}")
    return comparisons


def _digits() -> tuple[Digits, Digits]:
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images / 16.0, labels.astype(np.int32), test_size=360, random_state=0, stratify=labels
    )
    train_images, test_images, train_labels, test_labels = split
    return (train_images, train_labels), (test_images, test_labels)
