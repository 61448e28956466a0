"""How far backpropagation leaves the manifold on which flow folds put it, bounded while training.

A step of SGD changes a conserved quantity by the square of the learning rate alone, exactly:

    ``w_l' ^2 - w_m' ^2 = w_l^2 - w_m^2 + eta^2 (g_l^2 - g_m^2)``

and likewise ``W_{j+1} W_{j+1}^T - W_j^T W_j``. With heavy-ball momentum, ``v' = beta v + g``, the
products ``m = w_l v_l - w_m v_m`` no longer vanish but obey
``m' = beta (m - eta (v_l^2 - v_m^2))``, so that the change stays of second order.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from fcjax.errors import FrontContributionError
from fcjax.transform import FrontContribution

__all__ = ["DriftState", "track_drift"]

SAFETY = 2.0
"""The gradients are those of the folded network, which differ from backpropagation's by O(eta)."""


class _Running(NamedTuple):
    """The scalars of one fold: a bound of the velocity, of the products m, and of the drift."""

    velocity: Any
    product: Any
    drift: Any


class DriftState(NamedTuple):
    """State of ``track_drift``.

    Attributes:
      count: the number of steps.
      running: for each fold, under the name of its survivor, three scalars, the last of which is
        the bound.
    """

    count: Any
    running: dict[str, _Running]

    @property
    def drift(self) -> dict[str, Any]:
        """The bound of each fold, by the name of its survivor."""
        return {name: SAFETY * scalars.drift for name, scalars in self.running.items()}


def track_drift(
    fc: FrontContribution, learning_rate: Any, momentum: float = 0.0
) -> optax.GradientTransformation:
    """Bounds how far plain backpropagation would have drifted from the laws that a flow fold uses.

    Put it in front of the optimizer; gradients pass unchanged. What is bounded is the change of the
    conserved quantities along SGD on the untouched network with the same learning rate: for an
    elementwise chain of ``w_l^2 - w_m^2`` in any element, for a matrix chain the Frobenius norm of
    the change of any ``W_{j+1} W_{j+1}^T - W_j^T W_j``. The folded network keeps them. The
    gradients are taken where the folded network is, and the bound is doubled to allow for that: it
    holds once the learning rate is small enough for the two to stay close. It is no bound of the
    outputs; these deviate by the same order of the learning rate. With weight decay and without
    momentum it bounds the change from the shrinking constants.

    Args:
      fc: a network folded with ``exactness="flow"``.
      learning_rate: that of the optimizer, a number or an optax schedule.
      momentum: that of the optimizer, without Nesterov's correction.

    Returns:
      An optax transformation with a :class:`DriftState` of three scalars for each fold. A matrix
      chain costs it one eigendecomposition, which the compiler can share with the gradient's.

    Raises:
      FrontContributionError: if there is no flow fold, or if ``update`` is not given parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax, fcjax
      >>> params, x = [jnp.ones(3), 2 * jnp.ones(3)], jnp.ones((4, 3))
      >>> fc = fcjax.front_contribute(
      ...     lambda p, x: x * p[0] * p[1], params, x, optimizer=optax.sgd(0.1), exactness="flow"
      ... )
      >>> optimizer = optax.chain(fcjax.track_drift(fc, 0.1), optax.sgd(0.1))
      >>> state = optimizer.init(fc.params)
      >>> gradient = jax.grad(lambda p: fc.apply(p, x).mean())(fc.params)
      >>> updates, state = optimizer.update(gradient, state, fc.params)
      >>> {name: round(float(bound), 5) for name, bound in state[0].drift.items()}
      {'1': 0.00889}
    """
    names = list(fc.contributions["flows"])
    if any(row.rule == "radial" for row in fc.report):
        raise FrontContributionError(
            "track_drift bounds how far backpropagation leaves a flow fold's laws; the radial "
            "closure keeps all units' laws and is an approximation all the same"
        )
    if not names:
        raise FrontContributionError(
            "track_drift needs a network with flow folds; the report says why there is none. Pass "
            'exactness="flow" and optimizer= to front_contribute'
        )

    def init(params: Any) -> DriftState:
        zero = jnp.zeros(())
        return DriftState(
            jnp.zeros((), jnp.int32), {name: _Running(zero, zero, zero) for name in names}
        )

    def update(updates: Any, state: DriftState, params: Any = None) -> tuple[Any, DriftState]:
        if params is None:
            raise FrontContributionError(
                "track_drift needs the parameters: call optimizer.update(grads, state, params)"
            )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        squares = fc.law_gradients(params, updates)
        running = {
            name: _step(scalars, squares[name], rate, momentum)
            for name, scalars in state.running.items()
        }
        return updates, DriftState(state.count + 1, running)

    return optax.GradientTransformation(init, update)


def _step(scalars: _Running, square: Any, rate: Any, momentum: float) -> _Running:
    velocity = momentum * scalars.velocity + jnp.sqrt(square)
    grown = rate * velocity**2
    return _Running(
        velocity.astype(scalars.velocity.dtype),
        (momentum * (scalars.product + grown)).astype(scalars.product.dtype),
        (scalars.drift + rate * (2 * scalars.product + grown)).astype(scalars.drift.dtype),
    )
