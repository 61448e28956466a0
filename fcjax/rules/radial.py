r"""The radial closure: hidden units with frozen directions, whose norms obey the laws.

Gradient flow conserves, for each hidden unit whose activation is homogeneous of degree p,
``|in|^2 - p |out|^2``: the squared norms of its incoming and outgoing weights. Freeze the direction
``V`` of every incoming slice and keep only its norm r. The laws then determine all norms from the
final layer's weights, backwards through the layers,

.. math:: r_l^2 = c_l + p\, (V_{l+1} \circ V_{l+1})\, r_{l+1}^2,

affine in the squares of the final weights, with constants that are computed before training. Only
the final layer is trained, and no backward pass crosses a hidden one. It is not backpropagation:
directions do move there. What it shares with it are the values of all units' laws, exactly. Of the
matrices between linear layers these are the diagonals; the products of two units change.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fcjax.expressions.written import Written
from fcjax.laws import symmetries
from fcjax.laws.invariance import invariant
from fcjax.laws.units import Place, Symmetry
from fcjax.rules.flow_folds import Fixed, Leaves, described, enumerated, largest_difference
from fcjax.tracing.final import hidden_leaves

__all__ = ["RadialFold", "ordered", "radial_fold"]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class RadialFold:
    """All hidden layers of a network, determined by its final layer.

    Attributes:
      layers: the hidden units, from the output to the input.
      survivor: the final layer's weights.
      initial: the initial values of all leaves of the tree.
    """

    layers: tuple[Symmetry, ...]
    survivor: int
    initial: tuple[Any, ...]

    rule = "radial"
    exactness = "approximate"
    sources = ()
    decays = False
    symbol = "W"

    @functools.cached_property
    def folded(self) -> tuple[int, ...]:
        """The hidden weights from the input to the output."""
        hidden = [place.leaf for layer in reversed(self.layers) for place in layer.incoming]
        return tuple(dict.fromkeys(hidden))

    @property
    def leaves(self) -> tuple[int, ...]:
        """All of them, and the final weights."""
        return (*self.folded, self.survivor)

    @property
    def trained_shape(self) -> tuple[int, ...]:
        """That of the final weights."""
        return tuple(np.shape(self.initial[self.survivor]))

    def fixed(self) -> dict[str, Any]:
        """Directions and the constants of the laws, at the initial values."""
        return self.fixed_at(self.initial)

    def fixed_at(self, full: Leaves) -> dict[str, Any]:
        """The same at any values of all leaves; may be traced, to begin anew during training."""
        directions, constants = {}, []
        for layer in self.layers:
            squares = _squares(layer.incoming, full)
            constants.append(squares + _squares(layer.outgoing, full))
            inverse = jnp.where(squares > 0, 1 / jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
            for place in layer.incoming:
                directions[str(place.leaf)] = place.scaled(jnp.asarray(full[place.leaf]), inverse)
        return {"directions": directions, "constants": constants}

    def expand(self, trained: Leaves, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """All weights: directions times norms; a norm that the laws no longer allow is NaN."""
        return self._weights(trained[self.survivor], fixed)

    def _weights(self, final: Array, fixed: Fixed) -> dict[int, Array]:
        weights = {self.survivor: final}
        for layer, squares in self._norms(weights, fixed):
            for place in layer.incoming:
                direction = fixed["directions"][str(place.leaf)]
                weights[place.leaf] = place.scaled(direction, jnp.sqrt(squares))
        return weights

    def _norms(self, weights: dict[int, Array], fixed: Fixed):
        """The squared norms of each layer's units, once the layers behind it are in ``weights``."""
        for layer, constants in zip(self.layers, fixed["constants"], strict=True):
            yield layer, constants - _squares(layer.outgoing, weights)

    def running(self, trained: Leaves, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """The same, with no gradient through the hidden weights."""
        final = trained[self.survivor]
        return {**self._weights(lax.stop_gradient(final), fixed), self.survivor: final}

    def reduce(self, full: Leaves, fixed: Fixed) -> tuple[dict[int, Array], Array]:
        """The final weights."""
        return {self.survivor: full[self.survivor]}, jnp.ones(())

    def lost(self, full: Leaves, back: Leaves) -> float:
        """The largest difference of a weight."""
        return largest_difference(self.leaves, full, back)

    def broken(self, trained: Leaves, rho: float, fixed: Fixed, names: Sequence[str]) -> str:
        """The last layer with a unit whose squared norm the laws make negative."""
        final = trained[self.survivor]
        if not np.isfinite(final).all():
            return f"{names[self.survivor]} is not finite"
        for layer, squares in self._norms(self._weights(final, fixed), fixed):
            gone = int(np.sum(~(np.asarray(squares) >= 0)))
            if gone:
                listed = enumerated([place.leaf for place in layer.incoming], names)
                return (
                    f"the laws leave {gone} of {squares.size} units of {listed} no norm, since the "
                    "layers behind them have shrunk; begin anew from weights that backpropagation "
                    "has trained, see fc.refresh"
                )
        return ""

    def drift(self, trained: Leaves, gradient: Leaves, rho: Array, fixed: Fixed) -> Array:
        """The largest squared gradient of the final layer by a unit; its law's change by SGD."""
        last = [p for layer in self.layers for p in layer.outgoing if p.leaf == self.survivor]
        return jnp.max(_squares(last, {self.survivor: gradient[self.survivor]}) * -1.0, initial=0.0)

    def shown(self, names: Sequence[str], label: str) -> dict[int, str]:
        """The hidden weights are no parameters any more."""
        return {leaf: f"r V({names[leaf]})" for leaf in self.folded}

    def formula(self, names: Sequence[str], label: str) -> list[str]:
        """The closed form of every layer's norms."""
        lines = [f"only {names[self.survivor]} is trained; directions V of hidden weights stay"]
        for layer, constants in zip(self.layers, self.fixed()["constants"], strict=True):
            read = [
                f"{'' if place.charge == -1 else f'{-place.charge} '}|{names[place.leaf]}|^2"
                for place in layer.outgoing
            ]
            within = enumerated([place.leaf for place in layer.incoming], names)
            lines.append(
                f"    {within} = r V with r^2 = c + {' + '.join(read)}, unit by unit; "
                f"c {described(np.asarray(constants))}"
            )
        return lines

    def law(self, names: Sequence[str]) -> str:
        """Why the leaves follow."""
        return (
            f"an approximation: directions stay and norms follow {names[self.survivor]} by the "
            "conservation laws of gradient flow, where backpropagation would turn the directions "
            "too"
        )


def _squares(places: Sequence[Place], weights: Any) -> Array:
    """``sum charge |slice_k|^2`` for each unit k."""
    return sum(
        float(place.charge) * jnp.sum(place.rows(jnp.asarray(weights[place.leaf])) ** 2, axis=-1)
        for place in places
    )


# --- which networks -----------------------------------------------------------------------------


def radial_fold(
    network: Written, leaves: Sequence[Any], names: Sequence[str]
) -> RadialFold | tuple[int, str]:
    """The closure of a network, or a hidden leaf that stands in its way, with the reason.

    Args:
      network: the network as written.
      leaves: the initial values of the parameters.
      names: their names.
    """
    kinds = [network.known[value] for value in network.body.inputs]
    hidden = hidden_leaves(network.body, kinds, len(names))
    found = invariant(network.body, symmetries.find(network.body, kinds), leaves)
    layers = [s for s in found if s.incoming and s.outgoing]
    writers: dict[int, list[Symmetry]] = {}
    for layer in layers:
        for place in layer.incoming:
            writers.setdefault(place.leaf, []).append(layer)
    for leaf in hidden:
        fault = _fault(leaf, writers.get(leaf, []), leaves)
        if fault:
            return leaf, fault
    read = {place.leaf for layer in layers for place in layer.outgoing} - set(hidden)
    sorted_layers = ordered(layers)
    if not hidden:
        return len(names) - 1, "there is no hidden layer"
    if len(read) != 1 or sorted_layers is None:
        cause = "several final layers" if len(read) != 1 else "layers that are tied in a cycle"
        return hidden[0], f"the radial closure needs a chain of layers, and the network has {cause}"
    return RadialFold(sorted_layers, read.pop(), tuple(leaves))


def _fault(leaf: int, writers: Sequence[Symmetry], leaves: Sequence[Any]) -> str:
    """Why a hidden leaf does not follow from the laws of its units; nothing if it does."""
    if np.asarray(leaves[leaf]).dtype not in (np.float32, np.float64):
        return "the radial closure needs float32 or float64"
    places = [place for layer in writers for place in layer.incoming if place.leaf == leaf]
    if len(places) != 1:
        return (
            "the radial closure needs units of a homogeneous activation behind every hidden "
            f"weight, and this one has {'several' if places else 'none'}"
        )
    if any(place.charge != 1 for place in writers[0].incoming) or not writers[0].is_untied:
        return "the radial closure needs the weights of a unit to scale with it once"
    covered = np.prod(writers[0].units) * places[0].rows(np.asarray(leaves[leaf])).shape[-1]
    if covered != np.size(leaves[leaf]):
        return "the radial closure needs all of a hidden weight to belong to units"
    without = int(np.sum(np.asarray(_squares(writers[0].incoming, leaves)) == 0))
    if without:
        return f"the radial closure keeps the directions of weights, and {without} units have none"
    return ""


def ordered(layers: Sequence[Symmetry]) -> tuple[Symmetry, ...] | None:
    """The layers from the output to the input, so that each only needs the norms of earlier ones.

    Returns:
      None if they depend on each other in a cycle, as the branches of a residual stream do.
    """
    written = {place.leaf: i for i, layer in enumerate(layers) for place in layer.incoming}
    done: dict[int, None] = {}
    while len(done) < len(layers):
        ready = [
            i
            for i, layer in enumerate(layers)
            if i not in done
            and all(written[p.leaf] in done for p in layer.outgoing if p.leaf in written)
        ]
        if not ready:
            return None
        done |= dict.fromkeys(ready)
    return tuple(layers[i] for i in done)
