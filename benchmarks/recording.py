"""Where results go: a JSON and a Markdown file for each script, machine and jax version."""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from fcjax.measure import Timings

FOLDER = Path(__file__).parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    default = f"{jax.default_backend()}-{os.cpu_count()}cores"
    made.add_argument(
        "--machine", default=default, help="description of this machine, for file names"
    )
    made.add_argument("--quick", action="store_true", help="fewer repeats, nothing written")
    return made


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if os.isatty(1) else 200).print(table)


def noise(timings: Timings, twin: str) -> float:
    """Largest departure from 1 of the baseline's ratios with itself, compiled once or twice."""
    ratios = (timings.ratio(twin), timings.best_ratio(twin))
    return max(timings.aa_spread, *(abs(ratio - 1.0) for ratio in ratios))


def record(
    script: str,
    machine: str,
    results: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str],
    as_row: Callable[[Any], list[str]],
) -> Path:
    """Writes results, beside those of other networks that an earlier run measured.

    Args:
      script: name of the benchmark.
      machine: description of the machine.
      results: numbers by name of the network.
      columns: headings of the Markdown table.
      as_row: makes one row of strings from one entry of `results`.

    Returns:
      The path of the Markdown file.
    """
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{script}-{machine}-jax{jax.__version__}.json"
    earlier = json.loads(path.read_text())["results"] if path.exists() else {}
    merged = {**earlier, **results}
    header = {"script": script, "machine": machine, "jax": jax.__version__}
    path.write_text(json.dumps({**header, "results": merged}, indent=1) + "\n")
    lines = [
        f"# {script} on {machine}, jax {jax.__version__}",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(as_row(r)) + " |" for r in merged.values()),
    ]
    markdown = path.with_suffix(".md")
    markdown.write_text("\n".join(lines) + "\n")
    return markdown
