"""Decides by experiment whether an optimizer lets weights be left out of training.

Two trees that describe the same weights are trained side by side on the same random gradients: the
full one, and one without the weights that are left out. The optimizer serves if it moves both
alike. What counts is its behaviour on the very tree that it will see, because masks, labels and
norms over several leaves depend on it, so nothing is inferred from what an optimizer is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcjax.compat import ClosedJaxpr, Jaxpr, Literal, open_jaxpr
from fcjax.rules.pairs import Pair
from fcjax.rules.remembering import remembered
from fcjax.rules.stand_ins import Change, Shrinks, chains, layers, real_shapes, stand_ins
from fcjax.rules.trainings import Trainings, in_float64

__all__ = ["Verdict", "equivariance", "experiment", "operations"]

# optax.MultiSteps accumulates in float32, and measures 1e-7; what breaks a rule measures 1e-4 and
# more.
_TOLERANCE = 1e-6

# Clipping hides below its threshold and saturates above it, so the gradients have many scales.
_SCALES = tuple(10.0**exponent for exponent in range(-4, 5))
_TOGETHER = 3

# RAdam changes its rule at its sixth update, and optax.MultiSteps makes an update of several steps:
# so steps are counted that move the weights, and if these are too few there is a longer attempt.
_STEPS = 32
_ROUNDS = 16
_MOVES = 16

# Adafactor treats a leaf differently if two of its axes are as long as this. If small stand-ins are
# not treated as the real leaves are, longer ones are tried, up to so many entries in a tree.
_THRESHOLD = 128
_LARGEST_TREE = 500_000

_BY_SIZE = "it treats leaves differently at their real sizes"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether an optimizer lets a tree be reduced.

    Attributes:
      exact: whether the reduced tree, and what is restored from it, reproduce the full tree.
      deviation: the largest relative deviation of an update; `inf` if the optimizer could not be
        run.
      reason: the reason, as a part of a sentence.
    """

    exact: bool
    deviation: float
    reason: str


def equivariance(optimizer: optax.GradientTransformation) -> frozenset[str]:
    """The ways in which an optimizer lets weights be left out of training, found by experiment.

    Trained are a tree of a few layers and its reduced counterpart, with random gradients of scales
    from 1e-4 to 1e4, in float64 whatever the precision that jax is set to. The classes are

    - `"orthogonal"`: a weight matrix `W` whose gradient is `S_a G S_b^T`, with orthonormal columns
      in `S_a` and `S_b`, moves in these coordinates as `S_a^T W S_b` does with the gradient `G`,
      although `W` has other, non-zero components. Such are SGD with momentum, Nesterov, decoupled
      decay, and clipping by the global norm before the decay.
    - `"sign"`: leaves that are equal up to signs, with gradients equal up to the same signs, stay
      so, and one of them moves as it does without the others. Such are the elementwise optimizers
      that commute with a change of sign (SGD, Adam, Lion), and those with norms of single leaves.

    Args:
      optimizer: the optax optimizer. One that cannot be run on gradients and weights alone, as it
        wants the loss, is in no class. A change of its rule after more than about 30 updates is
        not seen.

    Returns:
      A subset of `{"orthogonal", "sign"}`.

    Example:
      >>> import optax
      >>> sorted(equivariance(optax.sgd(0.1)))
      ['orthogonal', 'sign']
      >>> sorted(equivariance(optax.adam(1e-3)))
      ['sign']
    """
    orthogonal = _tried(optimizer, layers(), restored=False)
    sign = _tried(optimizer, chains(), restored=True)
    verdicts = {"orthogonal": orthogonal, "sign": sign}
    return frozenset(name for name, verdict in verdicts.items() if verdict.exact)


def experiment(
    optimizer: optax.GradientTransformation,
    structure: jax.tree_util.PyTreeDef,
    changes: Sequence[Change],
    *,
    rho: bool,
) -> Verdict:
    """Trains stand-ins of a full tree and of its reduced tree, and compares them.

    The stand-ins have the user's structure and numbers of axes, and a few entries an axis. An
    optimizer whose program is another one at the real sizes is refused, and so is one that hardly
    moves a leaf that shrinks or is followed, as its rule does not show.

    Args:
      optimizer: the optax optimizer.
      structure: the structure of the full tree. The reduced tree has `None` for what follows.
      changes: what becomes of each leaf, in the order of flattening.
      rho: whether the reduced leaves have one more coordinate on every compressed axis, zero but
        for the last entry of all, which holds the norm of the leaf's untouched block. The block is
        then restored in proportion to it; without, at its initial value.

    Returns:
      The verdict. No exception of the optimizer passes. It is remembered, as an optimizer is a pure
      function.

    Example:
      >>> import jax, optax
      >>> from fcjax.rules.stand_ins import Shrinks, Stays
      >>> structure = jax.tree.structure({"kernel": 0, "bias": 0})
      >>> changes = [Stays((8,)), Shrinks((32, 8), (True, False), rest=True)]
      >>> experiment(optax.sgd(0.1), structure, changes, rho=False).exact
      True
      >>> decay = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1))
      >>> experiment(decay, structure, changes, rho=False).reason
      'it moves weights whose gradient is zero'
      >>> experiment(decay, structure, changes, rho=True).exact
      True
    """
    return _experiment(optimizer, structure, tuple(changes), rho)


@remembered
def _experiment(
    optimizer: optax.GradientTransformation,
    structure: jax.tree_util.PyTreeDef,
    changes: tuple[Change, ...],
    rho: bool,
) -> Verdict:
    verdict = _tried(optimizer, stand_ins(structure, changes, rho), restored=True, changes=changes)
    if verdict.reason == _BY_SIZE:
        larger = stand_ins(structure, changes, rho, past=_THRESHOLD)
        if larger.size <= _LARGEST_TREE:
            return _tried(optimizer, larger, restored=True, changes=changes)
    return verdict


def _tried(
    optimizer: optax.GradientTransformation,
    pair: Pair,
    *,
    restored: bool,
    changes: Sequence[Change] = (),
) -> Verdict:
    """The verdict on one pair of trees.

    Args:
      optimizer: the optimizer.
      pair: the two trees.
      restored: whether what the reduced tree leaves out counts too.
      changes: what the leaves stand in for, if they are stand-ins.
    """
    try:
        with in_float64():
            verdict = _judged(_trained(optimizer, pair), pair, restored)
            if verdict.exact and changes and _depends_on_sizes(optimizer, pair, changes):
                return Verdict(False, np.inf, _BY_SIZE)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        reason = f"it could not be run on this tree: {type(error).__name__}: {first_line}"
        return Verdict(False, np.inf, reason)
    return verdict


def _judged(seen: _Seen, pair: Pair, restored: bool) -> Verdict:
    drift, stray = float(np.max(seen.drift)), float(np.max(seen.stray)) if restored else 0.0
    deviation = max(drift, stray)
    idle = [n for n in pair.concerned if seen.moves[n] < _MOVES]
    if not np.isfinite(deviation):
        return Verdict(False, np.inf, "its updates are not finite")
    if drift > _TOLERANCE:
        reason = f"the reduced weights drift from backpropagation's by {drift:.2g}"
    elif stray > _TOLERANCE:
        reason = pair.leaves[int(np.argmax(seen.stray))].astray
    elif idle:
        name, moves = pair.names[idle[0]], seen.moves[idle[0]]
        reason = f"it moves {name} in {moves:.0f} of {_STEPS * _ROUNDS} steps, too few to judge it"
    else:
        return Verdict(True, deviation, "it moves both trees alike")
    return Verdict(False, deviation, reason)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What training showed of each leaf; the attributes are arrays of shape `(leaves,)`.

    Attributes:
      drift: relative difference of the two trees' updates of the trained block.
      stray: relative difference of the other updates from what is restored.
      moves: how many updates of the trained block were above rounding error.
    """

    drift: np.ndarray
    stray: np.ndarray
    moves: np.ndarray


def _trained(optimizer: optax.GradientTransformation, pair: Pair) -> _Seen:
    """Trains the two trees at every scale of the gradients, up to the first that parts them."""
    full, reduced = (Trainings(optimizer, _repeated(w, _TOGETHER)) for w in pair.weights())
    gradients = pair.gradients(_STEPS)
    found: list[np.ndarray] = []
    for scales in np.reshape(_SCALES, (-1, _TOGETHER)):
        found.append(_at(scales, full, reduced, pair, gradients))
        if _parted(found[-1]).any():  # most that part the trees do so at any scale
            break
    seen = np.concatenate(found, axis=2)
    parted = np.flatnonzero(_parted(seen))
    return _Seen(*np.max(seen[:, :, : parted[0] + 1] if len(parted) else seen, axis=2))


def _parted(seen: np.ndarray) -> np.ndarray:
    """The scales at which the reduced weights drift."""
    return np.max(seen[0], axis=0) > _TOLERANCE


def _at(
    scales: np.ndarray, full: Trainings, reduced: Trainings, pair: Pair, gradients: tuple[Any, Any]
) -> np.ndarray:
    """What training at some scales shows of each leaf, of shape `(3, leaves, scales)`."""
    full.begin()
    reduced.begin()

    def step(number: int) -> np.ndarray:
        wide, small = jax.tree.map(lambda g: np.multiply.outer(scales, g[number]), gradients)
        return pair.differences(full.step(wide), reduced.step(small))

    seen = np.zeros((3, len(pair.leaves), len(scales)))
    going = np.ones(len(scales), bool)
    for _ in range(_ROUNDS):
        with np.errstate(all="ignore"):
            found = pair.compared([step(number) for number in range(_STEPS)], full.weights)
        drift, stray, moves = found
        more = [np.maximum(seen[0], drift), np.maximum(seen[1], stray), seen[2] + moves]
        seen = np.where(going, more, seen)
        going = np.any(seen[2, pair.concerned] < _MOVES, axis=0)
        if not going.any():
            break
    return seen


def _repeated(tree: Any, times: int) -> Any:
    return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (times, *leaf.shape)), tree)


def _depends_on_sizes(
    optimizer: optax.GradientTransformation, pair: Pair, changes: Sequence[Change]
) -> bool:
    """Whether the optimizer computes something else at the real sizes than at the stand-ins'.

    It may choose by a leaf's size what to do with it, as Adafactor does, and as labels may. Numbers
    in the program tell as well, but they may also be a harmless mean over a leaf: they count only
    if leaves change their sizes.
    """
    resized = any(isinstance(change, Shrinks) for change in changes)
    stand_ins = [leaf.shape for leaf in jax.tree.leaves(pair.weights()[0])]
    programs = []
    for shapes in (real_shapes(changes), stand_ins):
        leaves = [jax.ShapeDtypeStruct(shape, jnp.float64) for shape in shapes]
        tree = jax.tree.unflatten(pair.structure, leaves)
        traced = jax.make_jaxpr(lambda w, g: optimizer.update(g, optimizer.init(w), w))(tree, tree)
        programs.append(list(operations(traced, numbers=resized)))
    return programs[0] != programs[1]


def operations(jaxpr: Any, *, numbers: bool) -> Iterator[str]:
    """The primitives of a program in their order, and the numbers that are written in it."""
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        yield eqn.primitive.name
        if numbers:
            # Integers are left out: an index from the end is written as one from the start.
            constants = [v.val for v in eqn.invars if isinstance(v, Literal)]
            yield from (
                str(c) for c in constants if jnp.issubdtype(jnp.result_type(c), jnp.floating)
            )
        parts = jax.tree.leaves(eqn.params, is_leaf=_is_program)
        for inner in filter(_is_program, parts):
            yield from operations(inner, numbers=numbers)


def _is_program(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)
