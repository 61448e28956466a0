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

from fcjax.errors import FrontContributionError
from fcjax.names import path_name

# A gradient that is zero in exact arithmetic comes out as the rounding error of the sums that
# cancel. In units of eps times the network's largest gradient, biases before BatchNorm and key
# biases before softmax stayed below 2, and every other leaf of the same networks above 60000, in
# float32. In narrower types the two cannot be told apart, so float32's eps is used there, and no
# leaf with a gradient is left out by mistake.
_ROUNDING_UNITS = 64


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far front contribution was from backpropagation, step by step.

    Attributes:
      losses: the loss before each update, under the names `"backprop"` and `"fc"`, each of shape
        `(steps,)`.
      output_deviations: largest difference of the network's outputs in each step, relative to the
        largest output, shape `(steps,)`.
      param_deviations: largest difference of a weight after each update, relative to the largest
        weight of its leaf, shape `(steps,)`. The leaves in `zero_gradient_leaves` are left out.
      zero_gradient_leaves: paths of the leaves whose gradient never rose above rounding error: a
        bias before BatchNorm, the bias of attention's keys, a leaf that is not used.
        Backpropagation gives them noise, which an optimizer such as Adam scales up to full steps;
        the outputs do not depend on them.
      params: the trained parameters, in the network's own structure, under `"backprop"` and `"fc"`.
    """

    losses: dict[str, np.ndarray]
    output_deviations: np.ndarray
    param_deviations: np.ndarray
    zero_gradient_leaves: tuple[str, ...]
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
        if self.zero_gradient_leaves:
            lines.append("left out, because their gradient is zero up to rounding:")
            lines.extend(f"  {path}" for path in self.zero_gradient_leaves)
        return "\n".join(lines)

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
      optimizer: the optax optimizer that trains both.

    Returns:
      A `Verification`; print it for a table.

    Raises:
      FrontContributionError: if there are no batches, the loss is not one real number, the loss
        does not call `apply`, or the optimizer is no `optax.GradientTransformation`.

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
    params = fc.expand(fc.params)
    backprop = _Side(loss_fn, fc.apply_fn, params, optimizer)
    front = _Side(loss_fn, fc.apply, fc.params, optimizer)
    expand = jax.jit(fc.expand)

    output_deviations, param_deviations = [], []
    for batch in _with_progress(batches):
        if not backprop.losses:
            _check_loss(loss_fn, fc.apply_fn, params, batch)
        output_deviations.append(np.max(_deviations(backprop.step(batch), front.step(batch))))
        expanded = _partition(expand(front.params))[0]
        param_deviations.append(_deviations(backprop.trainable_leaves, jax.tree.leaves(expanded)))
    if not output_deviations:
        raise FrontContributionError(
            "batches is empty: verify needs at least one batch to train on"
        )

    is_noise = _noise_leaves(np.array(backprop.gradient_scales), params)
    paths = [path_name(p) for p, _ in _leaves(params)]
    return Verification(
        losses={"backprop": np.array(backprop.losses), "fc": np.array(front.losses)},
        output_deviations=np.array(output_deviations),
        param_deviations=np.max(np.array(param_deviations)[:, ~is_noise], axis=1, initial=0.0),
        zero_gradient_leaves=tuple(
            path for path, noise in zip(paths, is_noise, strict=True) if noise
        ),
        params={"backprop": backprop.params, "fc": fc.expand(front.params)},
    )


class _Side:
    """One of the two trainings: parameters, optimizer state, and what was seen so far."""

    def __init__(self, loss_fn, apply, params, optimizer):
        self._trainable, self._frozen = _partition(params)
        self._state = optimizer.init(self._trainable)
        self._step = jax.jit(_training_step(loss_fn, apply, optimizer))
        self.losses: list[float] = []
        self.gradient_scales: list[np.ndarray] = []  # per step, the largest gradient of each leaf

    @property
    def trainable_leaves(self) -> list[jax.Array]:
        return jax.tree.leaves(self._trainable)

    @property
    def params(self) -> Any:
        return _combine(self._trainable, self._frozen)

    def step(self, batch: Any) -> list[jax.Array]:
        """One update; returns the network's outputs before it."""
        self._trainable, self._state, loss, outputs, scales = self._step(
            self._trainable, self._frozen, self._state, batch
        )
        self.losses.append(float(loss))
        self.gradient_scales.append(np.asarray(scales))
        return outputs


def _training_step(loss_fn, apply, optimizer):
    def step(trainable, frozen, state, batch):
        def loss_of(trainable, slots):
            tapped = _tapping(apply, iter(slots))
            return loss_fn(tapped, _combine(trainable, frozen), batch)

        slots = _output_slots(loss_fn, apply, _combine(trainable, frozen), batch)
        loss, (gradient, outputs) = jax.value_and_grad(loss_of, argnums=(0, 1))(trainable, slots)
        updates, state = optimizer.update(gradient, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        return trainable, state, loss, jax.tree.leaves(outputs), _scales(gradient)

    return step


# How the outputs get out of the loss. The loss may call `apply` inside jit, remat, vmap or scan,
# where a tracer that is put aside is lost. So each call is given a slot of zeros, and `_tap`
# declares the gradient with respect to the slot to be the output: it comes out with the gradients,
# through any transformation.


@jax.custom_vjp
def _tap(outputs, slot):
    del slot
    return outputs


def _tap_forward(outputs, slot):
    del slot
    return outputs, outputs


def _tap_backward(outputs, cotangents):
    return cotangents, outputs


_tap.defvjp(_tap_forward, _tap_backward)


def _tapping(apply, slots):
    """`apply`, with each call's real-valued outputs tapped into the next slot."""

    def tapped(*args, **kwargs):
        trainable, other = _partition(apply(*args, **kwargs))
        leaves, structure = jax.tree.flatten(trainable)
        return _combine(jax.tree.unflatten(structure, _tap(leaves, next(slots))), other)

    return tapped


def _output_slots(loss_fn, apply, params, batch) -> list[list[jax.Array]]:
    """Zeros of the shapes of the real-valued outputs of every call of `apply` in the loss."""
    calls: list[list[jax.ShapeDtypeStruct]] = []

    def noting(*args, **kwargs):
        outputs = apply(*args, **kwargs)
        leaves = jax.tree.leaves(_partition(outputs)[0])
        calls.append([jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype) for leaf in leaves])
        return outputs

    jax.eval_shape(lambda p, b: loss_fn(noting, p, b), params, batch)
    return [[jnp.zeros(leaf.shape, leaf.dtype) for leaf in call] for call in calls]


def _check_loss(loss_fn, apply, params, batch) -> None:
    called = []

    def noting(*args, **kwargs):
        called.append(True)
        return apply(*args, **kwargs)

    loss = jax.eval_shape(lambda p, b: loss_fn(noting, p, b), params, batch)
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


def _is_trainable(leaf: Any) -> bool:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.inexact)


def _partition(tree: Any) -> tuple[Any, Any]:
    """The tree's inexact leaves and its other leaves, each with `None` in the other's places."""
    trainable = jax.tree.map(lambda leaf: leaf if _is_trainable(leaf) else None, tree)
    other = jax.tree.map(lambda leaf: None if _is_trainable(leaf) else leaf, tree)
    return trainable, other


def _combine(trainable: Any, other: Any) -> Any:
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, other, is_leaf=lambda leaf: leaf is None
    )


def _leaves(params: Any) -> list[tuple[Any, Any]]:
    """The inexact leaves, with their paths."""
    return jax.tree_util.tree_leaves_with_path(_partition(params)[0])


def _scales(tree: Any) -> jax.Array:
    """Largest magnitude in each leaf."""
    return _stacked([jnp.max(jnp.abs(leaf), initial=0.0) for leaf in jax.tree.leaves(tree)])


def _relative(reference: jax.Array, other: jax.Array) -> jax.Array:
    """Largest difference relative to the largest reference value."""
    scale = jnp.max(jnp.abs(reference), initial=0.0)
    # Below this scale a value is compared absolutely, so that zero against rounding error stays
    # small.
    floor = jnp.finfo(reference.dtype).eps
    return jnp.max(jnp.abs(reference - other), initial=0.0) / jnp.maximum(scale, floor)


@jax.jit
def _deviations(reference: list[jax.Array], other: list[jax.Array]) -> jax.Array:
    """The relative deviation of each leaf."""
    return _stacked([_relative(a, b) for a, b in zip(reference, other, strict=True)])


def _stacked(scalars: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.asarray(scalar, jnp.result_type(float)) for scalar in scalars])


def _noise_leaves(gradient_scales: np.ndarray, params: Any) -> np.ndarray:
    """Which leaves never rose above rounding error, from scales of shape `(steps, leaves)`."""
    eps = np.array([float(jnp.finfo(leaf.dtype).eps) for _, leaf in _leaves(params)])
    largest = np.max(gradient_scales, axis=1, keepdims=True)
    threshold = _ROUNDING_UNITS * np.minimum(eps, np.finfo(np.float32).eps) * largest
    return np.all(gradient_scales <= threshold, axis=0)


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
