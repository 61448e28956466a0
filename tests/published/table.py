"""Prints what was found."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .checks import Row

COLUMNS = (
    "rewrites", "f64", "forced", "f32", "Adam", "temp", "ops", "seconds", "refuted",
    "laws", "drift",
    "merge", "merge forced", "merge f32", "bytes", "merge temp", "merge ops", "merge s", "all s",
)  # fmt: skip


def table(rows: Sequence[Row]) -> Table:
    """One line for each model."""
    made = Table("model", "package")
    for column in COLUMNS:
        made.add_column(column, justify="right")
    for row in rows:
        style = "red" if row.failures else None
        made.add_row(
            row.model.name, row.model.package, *(_cell(row, c) for c in COLUMNS), style=style
        )
    return made


def _cell(row: Row, column: str) -> str:
    return f"{row.cells[column]:.3g}" if column in row.cells else ""


def line(row: Row) -> str:
    """One model while others are still to come."""
    cells = ", ".join(f"{c} {_cell(row, c)}" for c in COLUMNS if c in row.cells)
    return "\n".join(
        [
            f"{row.model.name} ({row.model.package}): {cells}",
            *(f"  FAILS {f}" for f in row.failures),
        ]
    )
