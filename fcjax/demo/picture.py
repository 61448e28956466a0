"""The demo's picture: the trainings above, time and memory below."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fcjax.demo.compare import Comparison

_BACKPROP = "#f4a582"
_FC = "#08519c"
_MIB = 2.0**20
_STYLE = {"backprop": _BACKPROP, "fc": _FC}
_LABEL = {"backprop": "backpropagation", "fc": "front contribution"}


def picture(comparisons: list[Comparison]) -> Figure:
    """Draws the comparisons: a column for each network's training, and bars for all of them."""
    figure = Figure(figsize=(13, 7.4), layout="constrained", facecolor="white")
    figure.suptitle(
        "Digits, trained by backpropagation and by front contribution: same batches, same outputs",
        fontsize=14,
        fontweight="bold",
    )
    grid = figure.add_gridspec(2, 2 * len(comparisons), height_ratios=(1, 1.05))
    for column, comparison in enumerate(comparisons):
        _training(figure.add_subplot(grid[0, 2 * column : 2 * column + 2]), comparison, column == 0)
    half = len(comparisons)
    _step_times(figure.add_subplot(grid[1, :half]), comparisons)
    _memory(figure.add_subplot(grid[1, half:]), comparisons)
    return figure


def _training(axes: Axes, comparison: Comparison, is_first: bool) -> None:
    losses = comparison.verification.losses
    axes.semilogy(losses["backprop"], color=_BACKPROP, linewidth=6, label=_LABEL["backprop"])
    axes.semilogy(losses["fc"], color=_FC, linewidth=1.4, label=_LABEL["fc"])
    axes.set_title(f"{comparison.task.name}, {comparison.task.optimizer_name}", fontsize=12)
    axes.set_xlabel("step")
    axes.text(
        0.97,
        0.95,
        f"test accuracy {comparison.accuracy['backprop']:.1%} / {comparison.accuracy['fc']:.1%}\n"
        f"largest output deviation {comparison.verification.max_output_deviation:.0e}",
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=9.5,
    )
    if is_first:
        axes.set_ylabel("training loss (float64)")
        axes.legend(loc="lower left", frameon=False, fontsize=9.5)
    _clean(axes)


def _step_times(axes: Axes, comparisons: list[Comparison]) -> None:
    values = {
        name: np.array([1e3 * comparison.timings.median(name) for comparison in comparisons])
        for name in _STYLE
    }
    notes = [
        f"{comparison.timings.ratio('fc'):.2f}x\n(±{comparison.timings.aa_spread:.2f})"
        for comparison in comparisons
    ]
    _bars(axes, comparisons, values, notes)
    axes.set_title("Training step, ms (float32; bold: times faster, ± A/A)", fontsize=12)


def _memory(axes: Axes, comparisons: list[Comparison]) -> None:
    values = {
        name: np.array([_temporary_mib(comparison, name) for comparison in comparisons])
        for name in _STYLE
    }
    notes = [f"{ratio:.2f}x" for ratio in values["backprop"] / values["fc"]]
    _bars(axes, comparisons, values, notes)
    axes.set_title("Temporary memory, MiB (float32; bold: times less)", fontsize=12)


def _temporary_mib(comparison: Comparison, name: str) -> float:
    # At least a KiB: a program without temporaries has no place on a logarithmic axis.
    return max(comparison.memory[name].temp / _MIB, 1 / 1024)


def _bars(axes: Axes, comparisons, values: dict[str, np.ndarray], notes: list[str]) -> None:
    places = np.arange(len(comparisons))
    for shift, name in ((-0.2, "backprop"), (0.2, "fc")):
        bars = axes.bar(places + shift, values[name], 0.38, color=_STYLE[name], label=_LABEL[name])
        axes.bar_label(bars, fmt="%.3g", fontsize=9, padding=2)
    tops = np.maximum(values["backprop"], values["fc"])
    # Networks of very different sizes share the axis.
    axes.set_yscale("log")
    axes.set_ylim(min(v.min() for v in values.values()) / 3, tops.max() * 6)
    for place, top, note in zip(places, tops, notes, strict=True):
        axes.text(
            float(place), top * 1.6, note, ha="center", va="bottom", fontsize=10, fontweight="bold"
        )
    names = [comparison.task.name.replace(" ", "\n") for comparison in comparisons]
    axes.set_xticks(places, names)
    _clean(axes)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
