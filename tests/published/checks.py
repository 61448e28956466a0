"""What must hold for every published model."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fcjax
from fcjax.measure import memory_of
from fcjax.numbers.interpreter import values_of
from fcjax.planning.plan import always_fold

from .comparing import (
    EXACT,
    ROUNDINGS,
    deviation,
    errors,
    gradient,
    largest,
    outputs,
    rounded,
    trained,
)
from .models import Model, Network, PyTree

DOUBLE, SINGLE = 1e-13, 2e-7
"""What is allowed of the largest entry of all arrays."""
RATIO = 1.01
"""What is allowed of temporaries and operations: the loss that the planner may predict."""
BATCHES = 3, 1


@dataclasses.dataclass
class Row:
    """What was found of one model.

    Attributes:
      model: the model.
      cells: the worst number of each column. Deviations are fractions of what is allowed.
      failures: what does not hold.
    """

    model: Model
    cells: dict[str, float] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)

    def note(self, column: str, value: float, limit: float, where: str = "") -> None:
        """Adds a number, and a failure where it exceeds a limit."""
        self.cells[column] = max(value, self.cells.get(column, 0.0))
        if not value <= limit:
            self.failures.append(f"{column} {where}: {value:.3g}")

    @contextlib.contextmanager
    def catching(self, what: str) -> Iterator[None]:
        """Turns what is raised into a failure."""
        try:
            yield
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{frames.filename.rpartition('/')[2]}:{frames.lineno}"
            first = str(error).split("\n")[0][:200]
            self.failures.append(f"{what}: {type(error).__name__} in {place}: {first}")


def checked(model: Model) -> Row:
    """Makes all checks of a model."""
    row, began = Row(model), time.process_time()
    with row.catching("make"):
        for train in model.modes:
            mode = ("inference", "training")[train]
            with row.catching(f"gradient, {mode}"):
                _gradients(row, model.network("float64", train), mode)
            with row.catching(f"compiled, {mode}"), jax.enable_x64(False):
                _compiled(row, model.network("float32", train), mode)
        with row.catching("Adam"):
            _adam(row, model.network("float64", model.modes[-1]))
        with row.catching("strict"):
            _strict(row, model.network("float64", False))
        with row.catching("laws"):
            _laws(row, model.network("float64", model.modes[-1]))
        network = model.network("float64", False)
        for forced in (False, True):
            with row.catching(f"merge{', forced' * forced}"), _forcing(forced):
                _merged(row, network, model.batched, "merge forced" if forced else "merge")
        with row.catching("merge, compiled"), jax.enable_x64(False):
            _merged_compiled(row, model.network("float32", False))
    jax.clear_caches()
    row.note("all s", time.process_time() - began, np.inf)
    return row


def _forcing(forced: bool) -> Any:
    return always_fold() if forced else contextlib.nullcontext()


# --- front_contribute ---


def _folded(row: Row, network: Network) -> fcjax.FrontContribution:
    began = time.process_time()
    fc = fcjax.front_contribute(network.given_state, network.params, *network.inputs)
    row.note("seconds", time.process_time() - began, 5.0)
    row.note("refuted", len(fc.plan.refuted), 0, "; ".join(r.reason for r in fc.plan.refuted))
    return fc


def _gradients(row: Row, network: Network, mode: str) -> None:
    """In double precision, by the numbers alone."""
    measure = lambda params: values_of(gradient(network.given_state), params, *network.inputs)  # noqa: E731
    expected = measure(network.params)
    own = lambda: errors(measure(rounded(network.params)), expected, ROUNDINGS)  # noqa: E731
    for forced, column in ((False, "f64"), (True, "forced")):
        with _forcing(forced):
            fc = _folded(row, network)
            row.note("rewrites", sum(c.taken for c in fc.plan.changes), np.inf)
            actual = values_of(gradient(fc.apply), fc.params, *network.inputs)
        row.note(column, deviation(actual, expected, own, EXACT, DOUBLE), 1.0, mode)


def _compiled(row: Row, network: Network, mode: str) -> None:
    """In single precision, as compiled, and what the compiled programs need."""
    fc = _folded(row, network)
    exact = values_of(gradient(network.given_state), network.params, *network.inputs)
    written = _Program(gradient(network.given_state), network.params, *network.inputs)
    planned = _Program(gradient(fc.apply), fc.params, *network.inputs)
    _compared(row, ("f32", "temp", "ops"), mode, written, planned, exact)


def _adam(row: Row, network: Network) -> None:
    """Ten steps, with every rewrite forced."""
    run = lambda apply, expand, params: values_of(trained(apply, expand), params, *network.inputs)  # noqa: E731
    plain = lambda params: run(network.given_state, lambda params: params, params)  # noqa: E731
    expected = plain(network.params)
    own = lambda: errors(plain(rounded(network.params)), expected, ROUNDINGS)  # noqa: E731
    with always_fold():
        fc = _folded(row, network)
        actual = run(fc.apply, fc.expand, fc.params)
    row.note("Adam", deviation(actual, expected, own, EXACT, DOUBLE), 1.0)


def _strict(row: Row, network: Network) -> None:
    with contextlib.suppress(fcjax.NotFoldableError):
        fcjax.front_contribute(network.given_state, network.params, *network.inputs, strict=True)
        row.failures.append("strict=True passes")


# --- conservation laws ---


def _laws(row: Row, network: Network) -> None:
    """No law changes along the gradient."""
    args = network.params, *network.inputs
    laws = fcjax.conservation_laws(network.given_state, *args)
    _, direction = values_of(gradient(network.given_state), *args)
    change = jax.jvp(laws.values, (network.params,), (jax.tree.map(jnp.asarray, direction),))[1]
    pairs = zip(jax.tree.leaves(network.params), jax.tree.leaves(direction), strict=True)
    size = sum(np.sum(np.abs(w * g)) for w, g in pairs)
    row.note("laws", len(laws.names), np.inf)
    row.note("drift", largest(change) / (DOUBLE * size), 1.0)


# --- merge ---


def _variables(network: Network) -> tuple[PyTree, PyTree]:
    return network.params, network.state


def _merge(row: Row, network: Network) -> fcjax.Merged:
    began = time.process_time()
    merged = fcjax.merge(network.given_nothing, _variables(network), *network.inputs)
    row.note("merge s", time.process_time() - began, 5.0)
    return merged


def _merged(row: Row, network: Network, batched: bool, column: str) -> None:
    """In double precision, by the numbers alone, for several batch sizes."""
    merged = _merge(row, network)
    if column == "merge":
        row.note("bytes", _bytes(merged.params) / _bytes(_variables(network)), 1.0)
    for inputs in [network.inputs, *(_resized(network.inputs, n) for n in BATCHES if batched)]:
        measure = lambda variables: values_of(outputs(network.given_nothing), variables, *inputs)  # noqa: E731, B023
        expected = measure(_variables(network))
        own = lambda: errors(measure(rounded(_variables(network))), expected, ROUNDINGS)  # noqa: E731, B023
        actual = values_of(outputs(merged.apply), merged.params, *inputs)
        row.note(
            column, deviation(actual, expected, own, EXACT, DOUBLE), 1.0, f"{len(inputs[0])} rows"
        )


def _merged_compiled(row: Row, network: Network) -> None:
    merged = _merge(row, network)
    exact = values_of(outputs(network.given_nothing), _variables(network), *network.inputs)
    written = _Program(outputs(network.given_nothing), _variables(network), *network.inputs)
    planned = _Program(outputs(merged.apply), merged.params, *network.inputs)
    _compared(row, ("merge f32", "merge temp", "merge ops"), "", written, planned, exact)


def _bytes(tree: PyTree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _resized(inputs: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    return tuple(np.resize(x, (rows, *x.shape[1:])) for x in inputs)


# --- compiled programs ---


class _Program:
    """A compiled program: its results, bytes of temporaries and operations."""

    def __init__(self, function: Callable[..., PyTree], *args: Any) -> None:
        compiled = jax.jit(function).lower(*args).compile()
        self.temporaries = memory_of(compiled).temp
        self.operations = compiled.cost_analysis()["flops"]
        self.results = compiled(*args)


def _compared(
    row: Row,
    columns: tuple[str, str, str],
    where: str,
    written: _Program,
    planned: _Program,
    exact: PyTree,
) -> None:
    values, temporaries, operations = columns
    own = lambda: errors(written.results, exact, 2.0)  # noqa: E731
    row.note(values, deviation(planned.results, exact, own, 0.0, SINGLE), 1.0, where)
    row.note(temporaries, planned.temporaries / max(written.temporaries, 1), RATIO, where)
    row.note(operations, planned.operations / max(written.operations, 1.0), RATIO, where)
