"""Trains backpropagation and front contribution side by side and compares them step by step."""

import dataclasses
from collections.abc import Callable, Iterable, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track

from fcjax import check, taps
from fcjax.errors import FrontContributionError
from fcjax.names import path_name
from fcjax.taps import combine, partition
from fcjax.tracing.axes import unbound

# A gradient that is zero in exact arithmetic comes out as the rounding error of the sums that
# cancel. In units of eps times the network's largest gradient, biases before BatchNorm and key
# biases before softmax stayed below 2, and every other leaf of the same networks above 60000, in
# float32. In narrower types the two cannot be told apart, so float32's eps is used there, and no
# entry with a gradient is left out by mistake.
_ROUNDING_UNITS = 64

# What the gradients of an entry have been so far, on either side.
_ZERO, _ROUNDING, _TRUE = 0, 1, 2

_MOST_LEAVES = 10


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far front contribution was from backpropagation, step by step.

    Attributes:
      losses: the loss before each update, under the names `"backprop"` and `"fc"`, each of shape
        `(steps,)`.
      output_deviations: largest difference of the network's outputs in each step, relative to the
        largest output, shape `(steps,)`.
      param_deviations: largest difference of a weight after each update, relative to the largest
        weight of its leaf, shape `(steps,)`. Entries whose gradients so far were rounding errors
        are left out.
      zero_gradient_leaves: paths of the leaves whose gradient never rose above rounding error: a
        bias before BatchNorm, the bias of attention's keys, a leaf that is not used.
        Backpropagation gives them noise, which an optimizer such as Adam scales up to full steps;
        the outputs do not depend on them.
      left_out: for each path of a leaf with such noise how many of its entries have it and how
        many it has. Queries, keys and values that share a bias have it in the keys' third.
      params: the trained parameters, in the network's own structure, under `"backprop"` and `"fc"`.
    """

    losses: dict[str, np.ndarray]
    output_deviations: np.ndarray
    param_deviations: np.ndarray
    zero_gradient_leaves: tuple[str, ...]
    left_out: dict[str, tuple[int, int]]
    params: dict[str, Any] = dataclasses.field(repr=False)

    @property
    def max_output_deviation(self) -> float:
        """Largest relative deviation of an output over all steps."""
        return float(np.max(self.output_deviations))

    @property
    def max_param_deviation(self) -> float:
        """Largest relative deviation of a weight over all steps."""
        return float(np.max(self.param_deviations))

    def plot(self, path: Any = None) -> Any:
        """Draws both losses and both deviations over the steps.

        Args:
          path: where to save the picture; the ending chooses the format. Not saved if `None`.

        Returns:
          The `matplotlib.figure.Figure`.
        """
        from matplotlib.figure import Figure  # here, because importing it takes longer than fcjax

        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(self.losses["backprop"], color="#9ecae1", linewidth=5, label="backprop")
        left.plot(self.losses["fc"], color="#08306b", linewidth=1.2, label="front contribution")
        left.set(xlabel="step", ylabel="loss")
        # A deviation of exactly zero has no place on a logarithmic axis.
        right.semilogy(_positive(self.output_deviations), color="#08306b", label="outputs")
        right.semilogy(_positive(self.param_deviations), color="#d94801", label="parameters")
        right.set(xlabel="step", ylabel="relative deviation")
        for axes in (left, right):
            axes.legend(frameon=False)
            axes.spines[["top", "right"]].set_visible(False)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def __str__(self) -> str:
        header = (
            f"{'step':>6}  {'loss backprop':>14}  {'loss fc':>14}  {'outputs':>9}  {'params':>9}"
        )
        lines = [header, *(self._row(step) for step in _spread(len(self.output_deviations)))]
        lines.append(
            f"largest relative deviation of the outputs:    {self.max_output_deviation:.2e}"
        )
        lines.append(
            f"largest relative deviation of the parameters: {self.max_param_deviation:.2e}"
        )
        return "\n".join([*lines, *self._left_out()])

    def _left_out(self) -> list[str]:
        if not self.left_out:
            return []
        lines = [
            f"  {path}" if count == size else f"  {path}: {count} of {size} entries"
            for path, (count, size) in self.left_out.items()
        ]
        more = [f"  and {len(lines) - _MOST_LEAVES} more"] if len(lines) > _MOST_LEAVES else []
        title = "left out, because their gradient is zero up to rounding:"
        return [title, *lines[:_MOST_LEAVES], *more]

    def _row(self, step: int) -> str:
        losses = "  ".join(f"{self.losses[name][step]:14.8g}" for name in ("backprop", "fc"))
        outputs, params = self.output_deviations[step], self.param_deviations[step]
        return f"{step:6d}  {losses}  {outputs:9.1e}  {params:9.1e}"


def verify(
    fc: Any,
    loss_fn: Callable[[Callable[..., Any], Any, Any], jax.Array],
    batches: Iterable[Any],
    optimizer: optax.GradientTransformation,
) -> Verification:
    r"""Trains the untouched network by backpropagation and `fc` beside it, and compares them.

    Both start from the same parameters. In step $t$, with outputs $y$ and leaves $\theta$, the
    deviations are

    $$\max_i |y^{fc}_i - y^{bp}_i| / \max_i |y^{bp}_i|, \qquad
      \max_{leaves} \max_i |\theta^{fc}_i - \theta^{bp}_i| / \max_i |\theta^{bp}_i|.$$

    Every call of `apply` in the loss is compared, also inside `jax.jit`. A call that runs many
    times, inside `jax.vmap` or `jax.lax.scan`, is compared by the sum of its outputs. Outputs that
    the loss's gradient does not pass through are not seen, and forward-mode differentiation of
    `apply` inside the loss is refused by JAX.

    Args:
      fc: what `front_contribute` returned.
      loss_fn: `loss_fn(apply, params, batch)`, a scalar; it must call the `apply` it is given, as
        `apply(params, ...)`.
      batches: the batches, any pytrees of arrays. One update is made on each; a new shape compiles
        anew.
      optimizer: the optax optimizer that trains both. It is also given `value=`, `grad=` and
        `value_fn=`, which line searches and learning rates by the loss want.

    Returns:
      A `Verification`; print it for a table.

    Raises:
      FrontContributionError: if there are no batches, the loss is not one real number, the loss
        does not call `apply` or not inside the mapped axis that the network names, `fc.params`
        have been donated, or the optimizer is no `optax.GradientTransformation` or wants yet other
        arguments.

    Example:
      >>> import jax.numpy as jnp, optax, fcjax
      >>> params = {"a": jnp.ones((2, 8)), "b": jnp.ones((8, 1))}
      >>> fc = fcjax.front_contribute(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((4, 2)))
      >>> def loss_fn(apply, params, batch):
      ...     return jnp.mean((apply(params, batch) - 1.0) ** 2)
      >>> result = fcjax.verify(fc, loss_fn, [jnp.eye(2)] * 5, optax.sgd(0.01))
      >>> result.max_output_deviation < 1e-5
      True
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise FrontContributionError(
            f"optimizer must be an optax.GradientTransformation, such as optax.adam(1e-3), "
            f"but is a {type(optimizer).__name__}"
        )
    check.kept(
        fc.params,
        "fc.params",
        "verify starts from them: call it before training, or train a copy of them, "
        "jax.tree.map(jnp.copy, fc.params)",
    )
    params = fc.expand(fc.params)
    backprop = _Side(loss_fn, fc.apply_fn, params, optimizer)
    front = _Side(loss_fn, fc.apply, fc.params, optimizer, fc.expand)

    output_deviations, param_deviations, seen = [], [], _never(params)
    for batch in _with_progress(batches):
        if not backprop.losses:
            _check_loss(loss_fn, fc.apply_fn, params, batch)
        output_deviations.append(np.max(_deviations(backprop.step(batch), front.step(batch))))
        seen = _seen(seen, backprop.gradient, front.gradient)
        weights = backprop.full, front.full
        param_deviations.append(np.max(_deviations(*weights, seen), initial=0.0))
    if not output_deviations:
        raise FrontContributionError(
            "batches is empty: verify needs at least one batch to train on"
        )
    noise = {path: (int(np.sum(of == _ROUNDING)), of.size) for path, of in _paths(params, seen)}
    return Verification(
        losses={"backprop": np.array(backprop.losses), "fc": np.array(front.losses)},
        output_deviations=np.array(output_deviations),
        param_deviations=np.array(param_deviations),
        zero_gradient_leaves=tuple(p for p, of in _paths(params, seen) if not np.any(of == _TRUE)),
        left_out={path: found for path, found in noise.items() if found[0]},
        params={"backprop": backprop.params, "fc": fc.expand(front.params)},
    )


class _Side:
    """One of the two trainings.

    Attributes:
      losses: the loss before each update so far.
      full: the trainable leaves of the full parameters.
      gradient: the last gradient by them, as far as it is known by what is trained.
    """

    def __init__(self, loss_fn, apply, params, optimizer, expand=lambda params: params):
        self._trainable, self._frozen = partition(params)
        self._state = optimizer.init(self._trainable)
        self._step = jax.jit(_training_step(loss_fn, apply, optimizer, expand))
        self.losses: list[float] = []
        self.full: list[jax.Array] = []
        self.gradient: list[jax.Array] = []

    @property
    def params(self) -> Any:
        """What is trained, and what is not."""
        return combine(self._trainable, self._frozen)

    def step(self, batch: Any) -> list[jax.Array]:
        """One update; returns the network's outputs before it."""
        self._trainable, self._state, loss, outputs, self.full, self.gradient = self._step(
            self._trainable, self._frozen, self._state, batch
        )
        self.losses.append(float(loss))
        return outputs


def _training_step(loss_fn, apply, optimizer, expand):
    optimizer = optax.with_extra_args_support(optimizer)

    def step(trainable, frozen, state, batch):
        def full(trainable):
            return jax.tree.leaves(partition(expand(combine(trainable, frozen)))[0])

        def loss_of(trainable, given):
            called = taps.tapped(apply, iter(given))
            return loss_fn(called, combine(trainable, frozen), batch)

        def value_fn(trainable):
            return loss_fn(apply, combine(trainable, frozen), batch)

        slots = taps.slots(loss_fn, apply, combine(trainable, frozen), batch)
        loss, (gradient, outputs) = jax.value_and_grad(loss_of, argnums=(0, 1))(trainable, slots)
        _, of_full = jax.jvp(full, (trainable,), (gradient,))
        updates, state = _updates(optimizer, gradient, state, trainable, loss, value_fn)
        trainable = optax.apply_updates(trainable, updates)
        return trainable, state, loss, jax.tree.leaves(outputs), full(trainable), of_full

    return step


def _updates(optimizer, gradient, state, trainable, loss, value_fn):
    """The optimizer's updates, given what line searches and rates by the loss want to know."""
    try:
        return optimizer.update(
            gradient, state, trainable, value=loss, grad=gradient, value_fn=value_fn
        )
    except TypeError as error:
        if "required keyword-only argument" not in str(error):
            raise
        raise FrontContributionError(
            f"the optimizer wants more than the value=, grad= and value_fn= of verify: {error}"
        ) from error


def _check_loss(loss_fn, apply, params, batch) -> None:
    called = []

    def noting(*args, **kwargs):
        called.append(True)
        return apply(*args, **kwargs)

    try:
        loss = jax.eval_shape(lambda p, b: loss_fn(noting, p, b), params, batch)
    except NameError as error:
        if unbound(error) is None:
            raise
        raise FrontContributionError(
            f"the network names the mapped axis {unbound(error)!r}: call apply inside of it in "
            f"loss_fn, as by jax.vmap(..., axis_name={unbound(error)!r}), mapped over as many "
            "devices as in training, since the plan depends on it"
        ) from error
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        found = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", loss)
        raise FrontContributionError(
            "loss_fn(apply, params, batch) must return one real number, but returns "
            f"{found}: take the mean or the sum, and return nothing beside it"
        )
    if not called:
        raise FrontContributionError(
            "loss_fn(apply, params, batch) never calls the apply it is given, so there are no "
            "outputs to compare: call apply(params, ...) in place of the network's own function"
        )


# --- what is compared ---------------------------------------------------------------------------


def _paths(params: Any, leaves: list[Any]) -> list[tuple[str, Any]]:
    """The paths of the inexact leaves, with what is known of each."""
    paths = jax.tree_util.tree_leaves_with_path(partition(params)[0])
    return [(path_name(path), np.asarray(x)) for (path, _), x in zip(paths, leaves, strict=True)]


def _never(params: Any) -> list[jax.Array]:
    leaves = jax.tree.leaves(partition(params)[0])
    return [jnp.full(jnp.shape(leaf), _ZERO, jnp.int8) for leaf in leaves]


@jax.jit
def _seen(
    before: list[jax.Array], backprop: list[jax.Array], front: list[jax.Array]
) -> list[jax.Array]:
    """What the gradients have been so far, after one more step."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(g), initial=0.0) for g in backprop]))
    found = []
    for seen, *both in zip(before, backprop, front, strict=True):
        eps = min(float(jnp.finfo(both[0].dtype).eps), float(jnp.finfo(jnp.float32).eps))
        rounding = _ROUNDING_UNITS * eps * largest
        for gradient in both:
            # what is not finite is no rounding either
            now = jnp.where(jnp.abs(gradient) <= rounding, _ROUNDING, _TRUE)
            seen = jnp.maximum(seen, jnp.where(gradient == 0, _ZERO, now).astype(jnp.int8))
        found.append(seen)
    return found


def _relative(reference: jax.Array, other: jax.Array, counts: Any) -> jax.Array:
    """Largest difference among what counts, relative to the largest reference value."""
    scale = jnp.max(jnp.abs(reference), initial=0.0)
    # Below this scale a value is compared absolutely, so that zero against rounding error stays
    # small.
    floor = jnp.finfo(reference.dtype).eps
    difference = jnp.where(counts, jnp.abs(reference - other), 0.0)
    return jnp.max(difference, initial=0.0) / jnp.maximum(scale, floor)


@jax.jit
def _deviations(
    reference: list[jax.Array], other: list[jax.Array], seen: list[jax.Array] | None = None
) -> jax.Array:
    """The relative deviation of each leaf, without entries whose gradients are rounding errors."""
    counts = [True] * len(reference) if seen is None else [x != _ROUNDING for x in seen]
    rows = zip(reference, other, counts, strict=True)
    return jnp.stack([jnp.asarray(_relative(*row), jnp.result_type(float)) for row in rows])


def _with_progress(batches: Iterable[Any]) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(
        batches,
        description="backprop and fc",
        total=len(batches) if isinstance(batches, Sized) else None,
        console=console,
        disable=not (console.is_terminal or console.is_jupyter),
        transient=True,
    )


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, np.nan)


def _spread(steps: int, rows: int = 8) -> list[int]:
    """At most `rows` step numbers from the first to the last."""
    return sorted({int(step) for step in np.linspace(0, steps - 1, min(steps, rows))})
