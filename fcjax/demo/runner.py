"""Runs the demo from the data to the tables and the picture."""

import dataclasses
from pathlib import Path

from rich.console import Console

from fcjax.demo.compare import Step, Training, measure, train
from fcjax.demo.picture import picture
from fcjax.demo.table import step_table, weight_table
from fcjax.demo.tasks import collapsed_tasks, reduced_tasks


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much the demo does.

    Attributes:
      steps: updates of each training.
      repeats: rounds of each timing.
      timing_batch: rows of the timed batch, or `None` for each network's own number.
    """

    steps: int = 200
    repeats: int = 25
    timing_batch: int | None = None


def run(
    output: str | Path, effort: Effort, console: Console
) -> tuple[list[tuple[Training, Step]], list[Training]]:
    """Trains all networks both ways, prints the tables and saves the picture.

    Args:
      output: where to save the picture; the ending chooses the format.
      effort: how long to train and to measure.
      console: where to print.

    Returns:
      The networks whose step was timed, and those that trained fewer weights, in the order of the
      tables.
    """
    timed = _timed(effort, console)
    reduced = _reduced(effort, console)
    console.print(step_table(timed))
    console.print(weight_table(reduced))
    picture(timed, reduced).savefig(output, dpi=160)
    console.print(f"picture: {output}")
    return timed, reduced


def _timed(effort: Effort, console: Console) -> list[tuple[Training, Step]]:
    results = []
    for task in collapsed_tasks():
        if effort.timing_batch is not None:
            task = dataclasses.replace(task, timing_batch=effort.timing_batch)
        console.print(
            f"[bold]{task.name}[/], {task.optimizer_name}: {effort.steps} steps both ways, "
            f"then {effort.repeats} timed rounds on {task.timing_batch} images"
        )
        results.append((train(task, effort.steps), measure(task, effort.repeats)))
    return results


def _reduced(effort: Effort, console: Console) -> list[Training]:
    results = []
    for task in reduced_tasks():
        console.print(
            f"[bold]{task.name}[/], {task.optimizer_name}: {effort.steps} steps both ways"
        )
        results.append(train(task, effort.steps))
    return results
