"""The command ``python -m tests.published``."""

from __future__ import annotations

import argparse
import os
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.pop("FCJAX_RAISE_REFUTED", None)  # a refuted rewrite is a line of the table
warnings.simplefilter("ignore")  # the packages' own


def main() -> int:
    """Checks models, prints a table, and returns how many fail."""
    from rich.console import Console

    from . import models
    from .checks import checked
    from .table import line, table

    parser = argparse.ArgumentParser(prog="python -m tests.published")
    parser.add_argument("models", nargs="*", help="names of models or packages; all by default")
    parser.add_argument("--list", action="store_true", help="list the models")
    options = parser.parse_args()
    models.load()
    chosen = models.chosen(options.models)
    if options.list:
        print("\n".join(f"{m.name} ({m.package})" for m in chosen))
        return 0
    rows = []
    for model in chosen:
        rows.append(checked(model))
        print(line(rows[-1]), flush=True)
    Console(width=280).print(table(rows))
    return sum(bool(row.failures) for row in rows)


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
