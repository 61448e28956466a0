"""Flow folds of gains: one number for each hidden unit that the weights around it determine.

If a network computes the same when slice k of its parameters is multiplied by ``c^q``, with a
charge q for each (``symmetries.py``), gradient flow conserves ``sum q |slice_k|^2``. A parameter g
with one entry for each unit then follows from the others,

    ``g_k^2 = c_k + sum (-q / q_g) |slice_k|^2``,

for as long as it does not reach zero: for ever, if all other charges are of the opposite sign and
``c_k >= 0``. Such are the gain of a normalisation in front of dense layers, a scale of channels
behind one, and the output weights of a homogeneous net with a scalar output (Du, Hu and Lee 2018).
"""

import dataclasses
from collections.abc import Iterator, Sequence, Set
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fcjax.expressions.written import Written
from fcjax.laws import symmetries
from fcjax.laws.invariance import invariant
from fcjax.laws.units import Place, Symmetry
from fcjax.rules.flow_folds import (
    Fixed,
    Leaves,
    described,
    enumerated,
    fitted,
    largest_difference,
    vanished,
)

__all__ = ["SIGN", "GainFold", "beside", "gain_folds", "gains"]

Array = Any

SIGN = 1e-5
"""How far below zero a constant may be, relative to the squared gain, to count as zero."""


@dataclasses.dataclass(frozen=True, eq=False)
class GainFold:
    """A gain that the weights around it determine.

    Attributes:
      gain: where the units stand in the gain, all of whose entries they are.
      others: where they stand in the other parameters.
      constants: ``c_k``, shape ``units``.
      signs: the signs of the gain, in its own shape.
      decays: whether rho is trained along.
    """

    gain: Place
    others: tuple[Place, ...]
    constants: np.ndarray
    signs: np.ndarray
    decays: bool = False

    rule = "fold"
    exactness = "flow"
    symbol = "g"
    trained_shape = ()

    @property
    def leaves(self) -> tuple[int, ...]:
        """The gain."""
        return (self.gain.leaf,)

    @property
    def folded(self) -> tuple[int, ...]:
        """The gain."""
        return self.leaves

    @property
    def sources(self) -> tuple[int, ...]:
        """The parameters around it."""
        return tuple(place.leaf for place in self.others)

    def fixed(self) -> dict[str, Any]:
        """The constants and signs."""
        return {"constants": jnp.asarray(self.constants), "signs": jnp.asarray(self.signs)}

    def _squares(self, trained: Leaves, constants: Array) -> Array:
        """The squared gain of every unit."""
        return constants + sum(
            float(-place.charge / self.gain.charge)
            * jnp.sum(place.rows(jnp.asarray(trained[place.leaf])) ** 2, axis=-1)
            for place in self.others
        )

    def expand(self, trained: Leaves, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """The gain."""
        squares = self._squares(trained, fixed["constants"] * rho**2)
        roots = jnp.sqrt(jnp.maximum(squares, 0)).astype(fixed["signs"].dtype)
        return {self.gain.leaf: self.gain.scaled(fixed["signs"], roots)}

    def running(self, trained: Leaves, rho: Array, fixed: Fixed) -> dict[int, Array]:
        """The gain, through which no gradient flows: the others move by partial derivatives."""
        return lax.stop_gradient(self.expand(trained, rho, fixed))

    def reduce(self, full: Leaves, fixed: Fixed) -> tuple[dict[int, Array], Array]:
        """Nothing but rho."""
        own = jnp.sum(self.gain.rows(jnp.asarray(full[self.gain.leaf])) ** 2, axis=-1)
        return {}, fitted(own - self._squares(full, jnp.zeros(())), fixed["constants"])

    def lost(self, full: Leaves, back: Leaves) -> float:
        """The largest difference of an entry of the gain."""
        return largest_difference(self.leaves, full, back)

    def broken(self, trained: Leaves, rho: float, fixed: Fixed, names: Sequence[str]) -> str:
        """Units whose gain has reached zero, or decay that has left nothing."""
        name = names[self.gain.leaf]
        squares = np.asarray(self._squares(trained, self.constants * rho**2))
        if not np.isfinite(squares).all():
            return f"{enumerated(self.sources, names)} are not finite"
        gone = int(np.sum(squares < 0))
        if gone:
            return (
                f"{gone} of {squares.size} entries of {name} have reached zero, where their signs "
                f"may change: the squares that the laws leave them are down to {squares.min():.2g}"
            )
        return vanished(rho, name)

    def drift(self, trained: Leaves, gradient: Leaves, rho: Array, fixed: Fixed) -> Array:
        """The largest ``sum |q| |gradient_k|^2``; the gain's gradient follows from the others'."""
        gain = self.gain.rows(self.expand(trained, rho, fixed)[self.gain.leaf])[..., 0]
        total, along = jnp.zeros(()), jnp.zeros(())
        for place in self.others:
            rows, moved = place.rows(trained[place.leaf]), place.rows(gradient[place.leaf])
            total += float(abs(place.charge)) * jnp.sum(moved**2, axis=-1)
            along += float(place.charge) * jnp.sum(rows * moved, axis=-1)
        own = along / (float(self.gain.charge) * jnp.where(gain == 0, 1, gain))
        return jnp.max(total + float(abs(self.gain.charge)) * own**2, initial=0.0)

    def shown(self, names: Sequence[str], label: str) -> dict[int, str]:
        """What the gain is."""
        return {self.gain.leaf: label}

    def formula(self, names: Sequence[str], label: str) -> list[str]:
        """``g = gain = +-sqrt(|W|^2 + c)``, with the range of the constants."""
        squares = " + ".join([*(self._term(place, names) for place in self.others), "c"])
        name = names[self.gain.leaf]
        rho = f"; {name} is trained as rho, by whose square decay shrinks c" if self.decays else ""
        return [
            f"{label} = {name} = +-sqrt({squares.replace('+ -', '- ')}), unit by unit",
            f"    c {described(self.constants)}{rho}",
        ]

    def _term(self, place: Place, names: Sequence[str]) -> str:
        factor = float(-place.charge / self.gain.charge)
        sign, size = "-" if factor < 0 else "", abs(factor)
        return f"{sign}{'' if size == 1 else f'{size:g} '}|{names[place.leaf]}|^2"

    def law(self, names: Sequence[str]) -> str:
        """The law of a unit."""
        shifts = [p.leaf for p in self.others if (p.charge > 0) == (self.gain.charge > 0)]
        until = (
            f", until {enumerated(shifts, names)} takes an entry to zero, which fc.check tells"
            if shifts
            else ""
        )
        return (
            "gradient flow conserves its square less those of the weights of its unit in "
            f"{enumerated(self.sources, names)}, which determine it{until}; never updated"
        )


# --- which gains --------------------------------------------------------------------------------


def gain_folds(
    network: Written, leaves: Sequence[Any], names: Sequence[str], taken: Set[int]
) -> Iterator[tuple[int, GainFold | str]]:
    """Finds the gains of a network that the weights around them determine.

    Args:
      network: the network as written.
      leaves: the initial values of the parameters.
      names: their names.
      taken: leaves that are folded in another way, and so neither are gains nor determine any.

    Yields:
      The number of each gain with its fold, or with the reason why its values do not allow it.
    """
    kinds = [network.known[value] for value in network.body.inputs]
    folded, used = set(taken), set(taken)
    for symmetry in invariant(network.body, symmetries.find(network.body, kinds), leaves):
        among = [place.leaf for place in symmetry.places]
        if not folded.isdisjoint(among) or not symmetry.is_untied:
            continue
        candidates = [
            _fold(place, symmetry, leaves, names)
            for place in gains(symmetry, leaves)
            if place.leaf not in used
        ]
        made = [fold for _, fold in candidates if isinstance(fold, GainFold)]
        if made:
            chosen = min(made, key=lambda fold: len(beside(fold.gain, symmetry)))
            folded.add(chosen.gain.leaf)
            used.update(among)
            yield chosen.gain.leaf, chosen
        else:
            yield from candidates


def gains(symmetry: Symmetry, leaves: Sequence[Any]) -> list[Place]:
    """The places with one entry for each unit, unless a matrix stands on the same side."""
    count = int(np.prod(symmetry.units))
    single = [p for p in symmetry.places if not p.views and np.size(leaves[p.leaf]) == count]
    return [gain for gain in single if all(p in single for p in beside(gain, symmetry))]


def beside(gain: Place, symmetry: Symmetry) -> list[Place]:
    """The other places whose charge has the sign of the gain's."""
    return [p for p in symmetry.places if p is not gain and (p.charge > 0) == (gain.charge > 0)]


def _fold(
    gain: Place, symmetry: Symmetry, leaves: Sequence[Any], names: Sequence[str]
) -> tuple[int, GainFold | str]:
    """The fold of a gain, or why its initial values do not allow it."""
    others = tuple(place for place in symmetry.places if place is not gain)
    arrays = [np.asarray(leaves[place.leaf]) for place in symmetry.places]
    name, around = names[gain.leaf], enumerated([place.leaf for place in others], names)
    if len({array.dtype for array in arrays}) > 1 or arrays[0].dtype not in (
        np.float32, np.float64
    ):  # fmt: skip
        return gain.leaf, f"{name} and {around} are not all float32 or all float64"
    dtype = arrays[0].dtype
    made = GainFold(gain, others, np.zeros(symmetry.units, dtype), np.sign(leaves[gain.leaf]))
    own = np.sum(np.asarray(gain.rows(jnp.asarray(leaves[gain.leaf]))) ** 2, axis=-1)
    constants = own - np.asarray(made._squares(leaves, np.zeros(())))
    low = constants < -SIGN * own
    if low.any() or not own.all():
        zeros = int(np.sum(own == 0))
        return gain.leaf, (
            f"could follow {around} along gradient flow where its square exceeds those of the "
            f"weights of its unit there, but in {int(low.sum())} of {own.size} units it does not, "
            f"by up to {max(-float(constants.min()), 0.0):.2g}"
            + (f", and in {zeros} it is zero" if zeros else "")
            + "; pass rebalance=True, or initialise it larger"
        )
    constants = np.maximum(constants, 0)
    return gain.leaf, dataclasses.replace(made, constants=constants.astype(dtype))
