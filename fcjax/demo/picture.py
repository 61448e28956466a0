"""The demo's picture: cheaper steps above, fewer weights below, trainings over bars."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from fcjax.demo.compare import NAMES, Step, Training

_MIB = 2.0**20
_STYLE = {"backprop": "#f4a582", "fc": "#08519c"}
_LABEL = {"backprop": "backpropagation", "fc": "front contribution"}


def picture(timed: Sequence[tuple[Training, Step]], reduced: Sequence[Training]) -> Figure:
    """Draws a column for each network's training, and bars for all of them."""
    figure = Figure(figsize=(13, 14.6), layout="constrained", facecolor="white")
    (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, hspace=0.03)
    trainings, steps = zip(*timed, strict=True)
    left, right = _panels(
        upper, trainings, "Cheaper steps: digits, every weight trained, by any optimizer"
    )
    _step_times(left, trainings, steps)
    _memory(right, trainings, steps)
    left, right = _panels(
        lower, reduced, "Fewer weights: the same training, in the coordinates that it reaches"
    )
    _counts(left, reduced, lambda training: training.weights, "Trained weights")
    _counts(right, reduced, lambda training: training.state, "Entries of the optimizer's state")
    return figure


def _panels(figure: SubFigure, trainings: Sequence[Training], title: str) -> tuple[Axes, Axes]:
    """Draws the trainings, and leaves two panels below them for bars."""
    figure.suptitle(title, fontsize=14, fontweight="bold")
    count = len(trainings)
    grid = figure.add_gridspec(2, 2 * count, height_ratios=(1, 1.05))
    for column, training in enumerate(trainings):
        axes = figure.add_subplot(grid[0, 2 * column : 2 * column + 2])
        _training(axes, training, column == 0)
    return figure.add_subplot(grid[1, :count]), figure.add_subplot(grid[1, count:])


def _training(axes: Axes, training: Training, is_first: bool) -> None:
    losses = training.verification.losses
    for name, width in (("backprop", 6.0), ("fc", 1.4)):
        axes.semilogy(losses[name], color=_STYLE[name], linewidth=width, label=_LABEL[name])
    axes.set_title(f"{training.task.name}\n{training.task.optimizer_name}", fontsize=12)
    axes.set_xlabel("step")
    axes.text(
        0.97,
        0.95,
        f"test {training.task.problem.score_name} "
        f"{training.score['backprop']} / {training.score['fc']}\n"
        f"outputs deviate by {training.verification.max_output_deviation:.0e}",
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=9,
    )
    lowest, highest = axes.get_ylim()  # room for these lines above the curves
    axes.set_ylim(lowest, highest * (highest / lowest) ** 0.2)
    if is_first:
        axes.set_ylabel("training loss (float64)")
        axes.legend(loc="lower left", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    _clean(axes)


def _step_times(axes: Axes, trainings: Sequence[Training], steps: Sequence[Step]) -> None:
    values = {name: np.array([1e3 * step.timings.median(name) for step in steps]) for name in NAMES}
    notes = [f"{step.timings.ratio('fc'):.2f}x\n(±{step.timings.aa_spread:.2f})" for step in steps]
    _bars(axes, trainings, values, notes, "%.3g")
    axes.set_title("Training step, ms (float32; bold: times faster, ± A/A)", fontsize=12)


def _memory(axes: Axes, trainings: Sequence[Training], steps: Sequence[Step]) -> None:
    # At least a KiB: a program without temporaries has no place on a logarithmic axis.
    values = {
        name: np.array([max(step.memory[name].temp / _MIB, 1 / 1024) for step in steps])
        for name in NAMES
    }
    notes = [f"{ratio:.2f}x" for ratio in values["backprop"] / values["fc"]]
    _bars(axes, trainings, values, notes, "%.3g")
    axes.set_title("Temporary memory, MiB (float32; bold: times less)", fontsize=12)


def _counts(
    axes: Axes,
    trainings: Sequence[Training],
    counts: Callable[[Training], dict[str, int]],
    title: str,
) -> None:
    values = {name: np.array([counts(training)[name] for training in trainings]) for name in NAMES}
    notes = [f"{ratio:.3g}x" for ratio in values["backprop"] / values["fc"]]
    _bars(axes, trainings, values, notes, "{:,.0f}")
    axes.set_title(f"{title} (bold: times fewer)", fontsize=12)


def _bars(
    axes: Axes,
    trainings: Sequence[Training],
    values: dict[str, np.ndarray],
    notes: list[str],
    number: str,
) -> None:
    places = np.arange(len(trainings))
    for shift, name in ((-0.2, "backprop"), (0.2, "fc")):
        bars = axes.bar(places + shift, values[name], 0.38, color=_STYLE[name], label=_LABEL[name])
        axes.bar_label(bars, fmt=number, fontsize=9, padding=2)
    tops = np.maximum(values["backprop"], values["fc"])
    # Networks of very different sizes share the axis.
    axes.set_yscale("log")
    lowest, highest = min(v.min() for v in values.values()), tops.max()
    axes.set_ylim(lowest / 3, highest * (highest / lowest) ** 0.25 * 4)
    for place, top, note in zip(places, tops, notes, strict=True):
        axes.annotate(
            note, (place, top), (0, 15), textcoords="offset points", ha="center", weight="bold"
        )
    names = [training.task.name.replace(" ", "\n") for training in trainings]
    axes.set_xticks(places, names)
    _clean(axes)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
