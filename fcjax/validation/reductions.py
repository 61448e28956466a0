"""Networks with fewer weights, against the original ones at the parameters that they stand for.

Both are run, at parameters a little off the initial ones: the outputs must be equal, reducing what
was expanded must give it back, and no output may change, to first order, in a direction that is
not trained: otherwise backpropagation would move there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcjax.numbers.drawing import Draw, apart, moving, settled, slope, still
from fcjax.numbers.interpreter import Interpreter, Unevaluated
from fcjax.numbers.periodic import Numbers
from fcjax.planning.plan import Plan
from fcjax.rules.reduction import Reduction
from fcjax.running.program import Program
from fcjax.tracing.trace import Body

__all__ = ["refuted_reduction"]

MOVED = 0.02
"""How far the parameters are off the initial ones, relative to their size."""
CLOSE = {4: 1e-4, 8: 1e-7}
"""How far results may be apart, relative to their size, by the bytes of the parameters' numbers:
bases and what no basis reaches are kept in the dtype of the parameters."""

Contributions = dict[str, Any]


def refuted_reduction(
    network: Body, plan: Plan, reduction: Reduction, contributions: Contributions,
    arguments: Sequence[Any],
) -> str | None:  # fmt: skip
    """How a network with fewer weights differs from the original; None if it does not.

    Args:
      network: the original network, on its parameters and arguments.
      plan: how the reduced network is computed.
      reduction: how the parameters of both determine each other.
      contributions: what is fixed before training.
      arguments: the example arguments of the network.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in reduction.tree.leaves):
        return None
    check = _Check(network, plan, reduction, contributions, arguments)
    try:
        return settled(check.answer)
    except Unevaluated:
        return None
    except Exception as error:  # of any kind: it must not run
        return f"it fails with {type(error).__name__}: {error}"


class _Check:
    """Runs both networks on numbers."""

    def __init__(
        self, network: Body, plan: Plan, reduction: Reduction, contributions: Contributions,
        arguments: Sequence[Any],
    ) -> None:  # fmt: skip
        self.network, self.plan, self.reduction = network, plan, reduction
        self.contributions = contributions
        self.arguments = arguments
        dtypes = map(jnp.result_type, reduction.tree.leaves)
        sizes = [d.itemsize for d in dtypes if jnp.issubdtype(d, jnp.floating)]
        self.close = CLOSE[8 if min(sizes, default=8) > 4 else 4]

    def answer(self, draw: Draw) -> str | None:
        """What is wrong, on some numbers."""
        self.interpreter = Interpreter(draw.run)
        given = self._arguments(draw)
        if given is None:
            return None
        reduced = self.reduction.reduce(self._moved(), self.contributions)
        full = self._evaluated(self._expand, reduced)
        back = self._evaluated(self._reduce, full)
        for a, b in zip(back, jax.tree.leaves(reduced), strict=True):
            if apart(a, self.interpreter.whole(b))[0] > self.close:
                return "reducing what was expanded does not give it back"
        expected = self._outputs(full, given)
        for a, b in zip(self._reduced_outputs(reduced, given), expected, strict=True):
            by, _ = apart(a, b)
            if by > self.close:
                return f"an output of the reduced network is off by {by:.1g} of its size"
        return self._moves_elsewhere(reduced, full, given)

    # --- the numbers ---

    def _arguments(self, draw: Draw) -> list[Any] | None:
        """Random arguments, or the examples where these must lie in the span of the data."""
        taken = self.reduction.compression
        values = self.network.inputs[len(self.reduction.tree.leaves) :]
        if taken is None or not (taken.sources or taken.rows):
            return [still(draw(value)) for value in values]
        abstract = (jax.core.Tracer, jax.ShapeDtypeStruct)
        known = not any(isinstance(x, abstract) for x in self.arguments)
        return list(map(self.interpreter.whole, self.arguments)) if known else None

    def _moved(self) -> list[Any]:
        """The original leaves a little off; those of flow folds cannot leave their manifold."""
        rng = np.random.default_rng(0)
        held = {leaf for fold in self.reduction.flows for leaf in (*fold.leaves, *fold.sources)}
        return [
            leaf if i in held or not trained else _off(np.asarray(leaf), rng)
            for i, (leaf, trained) in enumerate(
                zip(self.reduction.tree.leaves, self.reduction.tree.trained, strict=True)
            )
        ]

    # --- what is run ---

    def _expand(self, reduced: Any) -> list[Any]:
        return self.reduction.expand(self._all(reduced), self.contributions)

    def _reduce(self, full: Any) -> list[Any]:
        return jax.tree.leaves(self.reduction.reduce(full, self.contributions))

    def _all(self, reduced: Any) -> list[Any]:
        """Trained and other leaves."""
        frozen = iter(self.contributions["frozen"])
        return [
            leaf if trained else next(frozen)
            for leaf, trained in zip(reduced, self.reduction.tree.trained, strict=True)
        ]

    def _evaluated(self, function: Any, *args: Any) -> list[Any]:
        avals = jax.tree.map(_aval, args, is_leaf=_is_numbers)
        jaxpr = jax.make_jaxpr(function)(*avals)
        return self.interpreter.evaluate(jaxpr, jax.tree.leaves(args, is_leaf=_is_numbers))

    def _outputs(self, full: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        """What the original network returns."""
        return self.interpreter.results(self.network, [*full, *given])

    def _reduced_outputs(self, reduced: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        """What the network returns on the trained parameters."""
        program, reduction = Program(self.plan), self.reduction
        constants = [array for _, array in self.plan.body.constants]

        def run(reduced: Any, *arguments: Any) -> list[Any]:
            running = reduction.running(self._all(reduced), self.contributions)
            sources = reduction.sources(self.contributions)
            return program([*running, *arguments, *sources], constants, {})

        return self._evaluated(run, reduced, *given)

    # --- directions that are not trained ---

    def _moves_elsewhere(
        self, reduced: Sequence[Any], full: Sequence[Any], given: Sequence[Any]
    ) -> str | None:
        away = dict(self._away(reduced, full))
        if not away:
            return None
        moved, beside = (
            [moving(x, by[i]) if i in by else x for i, x in enumerate(full)]
            for by in (away, {i: _random(full[i], i) for i in away})
        )
        found, usual = (self._outputs(leaves, given) for leaves in (moved, beside))
        off, size = (max(map(slope, outputs), default=0.0) for outputs in (found, usual))
        if off > np.sqrt(self.close) * size:
            names = ", ".join(self.reduction.tree.paths[leaf] for leaf in sorted(away))
            return f"backpropagation moves {names} in directions that are not trained"
        return None

    def _away(
        self, reduced: Sequence[Any], full: Sequence[Any]
    ) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """A direction of each reduced leaf that no training of the reduced ones takes."""
        taken = self.reduction.compression
        shrunk = sorted(taken.shapes) if taken is not None else []
        if shrunk:
            yield from zip(shrunk, self._outside(reduced, full, shrunk), strict=True)
        survivors: dict[int, np.ndarray[Any, Any]] = {}
        for leaf, (survivor, signs) in self.reduction.followers.items():
            step = _random(full[leaf], leaf)
            survivors[survivor] = survivors.get(survivor, np.zeros_like(step)) - step
            yield leaf, signs * step
        yield from survivors.items()

    def _outside(
        self, reduced: Sequence[Any], full: Sequence[Any], shrunk: Sequence[int]
    ) -> list[np.ndarray[Any, Any]]:
        """Random directions less what the reduced leaves can move."""

        def rest(reduced: Any, directions: list[Any]) -> list[Any]:
            expand = lambda r: [self._expand(r)[leaf] for leaf in shrunk]  # noqa: E731
            _, pull = jax.vjp(expand, reduced)
            _, reached = jax.jvp(expand, (reduced,), pull(directions))
            return [d - r for d, r in zip(directions, reached, strict=True)]

        directions = [_random(full[leaf], leaf) for leaf in shrunk]
        typed = [d.astype(full[leaf].dtype) for d, leaf in zip(directions, shrunk, strict=True)]
        return [x.full().real for x in self._evaluated(rest, reduced, typed)]


def _off(array: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    wide = array.astype(np.float64)
    size = float(np.sqrt(np.mean(np.square(wide)))) if wide.size else 0.0
    return (wide + MOVED * (size or 1.0) * rng.standard_normal(wide.shape)).astype(array.dtype)


def _is_numbers(x: Any) -> bool:
    return isinstance(x, Numbers)


def _aval(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, Numbers) else jax.typeof(x)


def _random(like: Numbers, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(like.shape)
