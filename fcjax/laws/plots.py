"""Pictures of conservation laws along backpropagation."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcjax.errors import FrontContributionError
from fcjax.laws.conservation import ConservationLaws, conservation_laws

__all__ = ["drifts", "plot_drift"]

RATES = (0.1, 0.05, 0.025, 0.0125)
TOTAL = 5.0
BLUES = ("#9ecae1", "#4292c6", "#2171b5", "#08306b")
SHOWN = 12


def drifts(
    laws: ConservationLaws,
    loss: Callable[[Any], jax.Array],
    params: Any,
    learning_rate: float,
    steps: int,
) -> np.ndarray[Any, Any]:
    """The values of all laws before each step of gradient descent and after the last.

    Args:
      laws: the laws.
      loss: a function of the parameters.
      params: the initial parameters.
      learning_rate: of plain gradient descent.
      steps: the number of steps.

    Returns:
      an array of shape ``(steps + 1, number of laws)``.
    """

    def step(p: Any, _: None) -> tuple[Any, jax.Array]:
        gradients = jax.grad(loss, allow_int=True)(p)
        moved = jax.tree.map(
            lambda w, g: w - learning_rate * g if jnp.issubdtype(w.dtype, jnp.inexact) else w,
            p,
            gradients,
        )
        return moved, laws.values(p)

    last, values = jax.jit(lambda p: jax.lax.scan(step, p, length=steps))(params)
    return np.concatenate([values, np.asarray(laws.values(last))[None]])


def plot_drift(
    apply_fn: Callable[..., Any],
    params: Any,
    *example_args: Any,
    rates: Sequence[float] = RATES,
    total: float = TOTAL,
    path: Any = None,
) -> Any:
    """Draws law values and their drift along gradient descent, for several learning rates.

    The network learns a fixed random target from random inputs: a law holds for any loss and data.

    Args:
      apply_fn: a pure function ``apply_fn(params, *args)`` that returns one array.
      params: any pytree of arrays.
      *example_args: arrays or ``jax.ShapeDtypeStruct``; floating ones are replaced by noise.
      rates: the learning rates.
      total: the learning rate times the number of steps, the same for all.
      path: where to save the picture; the ending chooses the format. Not saved if `None`.

    Returns:
      The `matplotlib.figure.Figure`.

    Raises:
      FrontContributionError: if the network has no laws, or returns something else than one array.
    """
    laws = conservation_laws(apply_fn, params, *example_args)
    if not len(laws):
        raise FrontContributionError(f"nothing to draw: {laws}")
    inputs, loss = _problem(apply_fn, params, example_args)
    runs = {
        rate: drifts(laws, lambda p: loss(p, *inputs), params, rate, round(total / rate))
        for rate in rates
    }
    return _figure(runs, len(laws), path)


def _problem(
    apply_fn: Callable[..., Any], params: Any, example_args: Sequence[Any]
) -> tuple[list[Any], Callable[..., jax.Array]]:
    rng = np.random.default_rng(0)

    def noise(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(x.shape), x.dtype)
        return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

    inputs = [jax.tree.map(noise, x) for x in example_args]
    output = jax.eval_shape(apply_fn, params, *inputs)
    if not hasattr(output, "shape"):
        raise FrontContributionError(
            f"a picture needs a network that returns one array, not a {type(output).__name__}"
        )
    target = jnp.asarray(rng.standard_normal(output.shape), output.dtype)

    def loss(p: Any, *inputs: Any) -> jax.Array:
        return jnp.mean((apply_fn(p, *inputs) - target) ** 2)

    return inputs, loss


def _figure(runs: dict[float, np.ndarray[Any, Any]], count: int, path: Any) -> Any:
    from matplotlib.figure import Figure  # here, because importing it takes longer than fcjax

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    largest = max(runs)
    moves = np.max(np.abs(runs[largest] - runs[largest][0]), axis=0)
    shown = np.argsort(-moves)[:SHOWN]
    time = np.arange(len(runs[largest])) * largest
    left.plot(time, runs[largest][:, shown], linewidth=1.2)
    left.set(xlabel="learning rate x steps", ylabel=f"law values, learning rate {largest:g}")
    left.set_title(f"the {len(shown)} laws of {count:,} that move most", fontsize=10)
    ends = {}
    for color, (rate, values) in zip(BLUES * len(runs), sorted(runs.items())[::-1], strict=False):
        drift = np.max(np.abs(values - values[0]), axis=1)
        ends[rate] = drift.max()
        middle.plot(np.arange(len(values)) * rate, drift, color=color, label=f"{rate:g}")
    middle.set(xlabel="learning rate x steps", ylabel="largest drift of a law")
    middle.set_ylim(0, 1.5 * max(ends.values()) or None)
    middle.legend(frameon=False, title="learning rate", ncols=2, loc="upper left")
    right.loglog(list(ends), list(ends.values()), "o-", color="#08306b", label="largest drift")
    right.loglog(list(ends), [ends[largest] * rate / largest for rate in ends], "--",
                 color="#d94801", label="proportional to the rate")  # fmt: skip
    right.set(xlabel="learning rate", ylabel="largest drift at the same total time")
    right.set_xticks(list(ends), [f"{rate:g}" for rate in ends], minor=False)
    right.set_xticks([], minor=True)
    right.legend(frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
