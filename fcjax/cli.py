"""The command line: `fcjax demo`, and `fcjax inspect`, `laws` and `merge` of `module:function`."""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fcjax.errors import FrontContributionError
from fcjax.laws.conservation import conservation_laws
from fcjax.laws.plots import plot_drift
from fcjax.merging.merge import merge
from fcjax.transform import front_contribute


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: the words after the program's name; those of the process if `None`.

    Returns:
      The exit status: 0, or 1 after an error that was printed to stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except FrontContributionError as error:
        print(f"fcjax: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fcjax", description="Front contribution for JAX: exact backprop, folded networks."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="train nine networks both ways, and compare")
    demo.add_argument("--output", type=Path, default=Path("fcjax-demo.png"), help="the picture")
    demo.add_argument("--steps", type=_positive, help="updates of each training (default 200)")
    demo.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    demo.set_defaults(command=_demo)

    inspect = commands.add_parser("inspect", help="show what folds in a network of yours")
    inspect.add_argument(
        "spec",
        metavar="module:function",
        help="a function without arguments that returns (apply_fn, params, *example_args)",
    )
    inspect.set_defaults(command=_inspect)

    laws = commands.add_parser("laws", help="show what gradient flow conserves in a network")
    laws.add_argument("spec", metavar="module:function", help="as for inspect")
    laws.add_argument("--plot", type=Path, help="a picture of the laws along backpropagation")
    laws.set_defaults(command=_laws)

    merged = commands.add_parser("merge", help="show what is left of a network for inference")
    merged.add_argument("spec", metavar="module:function", help="as for inspect")
    merged.set_defaults(command=_merge)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _demo(options: argparse.Namespace) -> None:
    try:
        from fcjax.demo import Effort, run
    except ModuleNotFoundError as error:
        raise FrontContributionError(
            f"the demo needs {error.name}, which is not installed: pip install 'fcjax[demo]'"
        ) from error
    _require_folder("--output", options.output)
    effort = Effort(steps=5, repeats=3, timing_batch=128) if options.quick else Effort()
    if options.steps is not None:
        effort = dataclasses.replace(effort, steps=options.steps)
    run(options.output, effort, Console())


def _inspect(options: argparse.Namespace) -> None:
    apply_fn, params, *example_args = _network(options.spec)
    print(front_contribute(apply_fn, params, *example_args))


def _laws(options: argparse.Namespace) -> None:
    apply_fn, params, *example_args = _network(options.spec)
    print(conservation_laws(apply_fn, params, *example_args))
    if options.plot is not None:
        _require_folder("--plot", options.plot)
        plot_drift(apply_fn, params, *example_args, path=options.plot)
        print(f"saved {options.plot}")


def _require_folder(option: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise FrontContributionError(f"{option} {path}: the folder {path.parent} does not exist")


def _merge(options: argparse.Namespace) -> None:
    apply_fn, params, *example_args = _network(options.spec)
    print(merge(apply_fn, params, *example_args))


def _network(spec: str) -> tuple[Any, ...]:
    result = _function(spec)()
    if not isinstance(result, tuple) or len(result) < 2 or not callable(result[0]):
        raise FrontContributionError(
            f"{spec}() must return a tuple (apply_fn, params, *example_args), but returns "
            f"a {type(result).__name__}"
        )
    return result


def _function(spec: str) -> Callable[[], Any]:
    module_name, separator, name = spec.partition(":")
    if not (module_name and separator and name):
        raise FrontContributionError(f"{spec!r} is not of the form module:function")
    # A console script does not look in the folder that it is started from.
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise FrontContributionError(
            f"{spec}: there is no module {error.name!r}; start fcjax in the folder that holds it, "
            "or install it"
        ) from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        raise FrontContributionError(f"{spec}: {module_name} has no function {name!r}")
    return function
