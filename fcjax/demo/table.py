"""The demo's table."""

from rich.table import Table

from fcjax.demo.compare import NAMES, Comparison

_MIB = 2.0**20


def table(comparisons: list[Comparison]) -> Table:
    """One column for each network, as a rich table that fits 80 characters."""
    result = Table(
        title="Backpropagation and front contribution on scikit-learn's digits",
        caption="Accuracy and deviation: trained in float64 on the same batches. Step and memory: "
        "float32, the whole training step. Faster: backprop / fc, above 1 is faster. A/A: how far "
        "backprop measured against itself departs from 1.",
    )
    result.add_column(no_wrap=True)
    result.add_column(no_wrap=True)
    for comparison in comparisons:
        result.add_column(comparison.task.name, justify="right")
    for (heading, name), *cells in zip(_ROWS, *map(_column, comparisons), strict=True):
        result.add_row(heading, name, *cells)
    return result


_ROWS = (
    ("folded", "leaves"),
    ("accuracy", "backprop"),
    ("", "fc"),
    ("deviation", "outputs"),
    ("weights", "backprop"),
    ("", "fc"),
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


def _column(comparison: Comparison) -> list[str]:
    """A network's cells, in the order of `_ROWS`."""
    timings, folded = comparison.timings, sum(rule != "train" for rule in comparison.rules)
    return [
        f"{folded} of {len(comparison.rules)}" if folded else "none",
        *(f"{comparison.accuracy[name]:.1%}" for name in NAMES),
        f"{comparison.verification.max_output_deviation:.1e}",
        *(f"{comparison.weights[name]:,}" for name in NAMES),
        *(f"{1e3 * timings.median(name):.1f}" for name in NAMES),
        f"{timings.ratio('fc'):.2f}x",
        f"{timings.best_ratio('fc'):.2f}x",
        f"±{timings.aa_spread:.2f}",
        *(f"{comparison.memory[name].temp / _MIB:.1f}" for name in NAMES),
        *(f"{comparison.memory[name].total / _MIB:.1f}" for name in NAMES),
    ]
