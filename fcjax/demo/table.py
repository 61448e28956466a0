"""The demo's tables."""

from collections.abc import Sequence

from rich.table import Table

from fcjax.demo.compare import NAMES, Step, Training

_MIB = 2.0**20


def step_table(results: Sequence[tuple[Training, Step]]) -> Table:
    """What a step costs: one column for each network, as a rich table that fits 80 characters."""
    return _table(
        "Cheaper steps: every weight trained, through products of them",
        "Digits. Accuracy and deviation: trained in float64 on the same batches. Step and memory: "
        "float32, the whole training step. Faster: backprop / fc, above 1 is faster. A/A: how far "
        "backprop measured against itself departs from 1.",
        [training.task.name for training, _ in results],
        _STEP_ROWS,
        [_step_column(*result) for result in results],
    )


def weight_table(trainings: Sequence[Training]) -> Table:
    """What is trained: one column for each network, as a rich table that fits 80 characters."""
    return _table(
        "Fewer weights: the same training in the coordinates that it reaches",
        "Trained in float64 on the same batches. Deviations are relative, from backprop: of the "
        "outputs in every step, and of the full weights that fc.expand gives after it. Test: share "
        "of correct classes, or mean squared error. Set-up: front_contribute.",
        [training.task.name for training in trainings],
        _WEIGHT_ROWS,
        [_weight_column(training) for training in trainings],
    )


def _table(title, caption, names, rows, columns) -> Table:
    result = Table(title=title, caption=caption)
    result.add_column(no_wrap=True)
    result.add_column(no_wrap=True)
    for name in names:
        result.add_column(name.replace(" ", "\n"), justify="right")
    for (heading, name), *cells in zip(rows, *columns, strict=True):
        result.add_row(heading, name, *cells)
    return result


_STEP_ROWS = (
    ("folded", "leaves"),
    ("accuracy", "backprop"),
    ("", "fc"),
    ("deviation", "outputs"),
    ("step, ms", "backprop"),
    ("", "fc"),
    ("faster", "medians"),
    ("", "best"),
    ("", "A/A"),
    ("temp MiB", "backprop"),
    ("", "fc"),
    ("all MiB", "backprop"),
    ("", "fc"),
)


def _step_column(training: Training, step: Step) -> list[str]:
    """A network's cells, in the order of `_STEP_ROWS`."""
    timings, folded = step.timings, sum(rule != "train" for rule in training.rules)
    return [
        f"{folded} of {len(training.rules)}" if folded else "none",
        *(training.score[name] for name in NAMES),
        f"{training.verification.max_output_deviation:.1e}",
        *(f"{1e3 * timings.median(name):.1f}" for name in NAMES),
        f"{timings.ratio('fc'):.2f}x",
        f"{timings.best_ratio('fc'):.2f}x",
        f"±{timings.aa_spread:.2f}",
        *(f"{step.memory[name].temp / _MIB:.1f}" for name in NAMES),
        *(f"{step.memory[name].total / _MIB:.1f}" for name in NAMES),
    ]


_WEIGHT_ROWS = (
    ("weights", "backprop"),
    ("", "fc"),
    ("", "fewer"),
    ("optimizer", "backprop"),
    ("state", "fc"),
    ("deviation", "outputs"),
    ("", "weights"),
    ("test", "backprop"),
    ("", "fc"),
    ("set-up", "seconds"),
)


def _weight_column(training: Training) -> list[str]:
    """A network's cells, in the order of `_WEIGHT_ROWS`."""
    return [
        *(f"{training.weights[name]:,}" for name in NAMES),
        f"{training.weights['backprop'] / training.weights['fc']:.1f}x",
        *(f"{training.state[name]:,}" for name in NAMES),
        f"{training.verification.max_output_deviation:.0e}",
        f"{training.verification.max_param_deviation:.0e}",
        *(training.score[name] for name in NAMES),
        f"{training.setup_seconds:.1f}",
    ]
