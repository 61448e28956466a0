"""Decides by experiment whether an optimizer lets weights be left out of training.

Two trees that describe the same weights are trained side by side on the same random gradients: the
full one, and one without the weights that are left out. The optimizer serves if it moves both
alike. What counts is its behaviour on the very tree that it will see, because masks, labels and
norms over several leaves depend on it, so nothing is inferred from what an optimizer is called.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcjax.compat import ClosedJaxpr, Jaxpr, Literal, open_jaxpr
from fcjax.names import path_name

__all__ = [
    "Change",
    "Follows",
    "Shrinks",
    "Stays",
    "Verdict",
    "equivariance",
    "experiment",
    "operations",
]

# optax.MultiSteps accumulates in float32, and measures 1e-7; what breaks a rule measures 1e-4 and
# more.
_TOLERANCE = 1e-6

# Clipping hides below its threshold and saturates above it, so the gradients have many scales.
_SCALES = tuple(10.0**exponent for exponent in range(-4, 5))

# RAdam changes its rule at its sixth update, and optax.MultiSteps makes an update of several steps:
# so steps are counted that move the weights, and if these are too few there is a longer attempt.
_STEPS = 32
_ROUNDS = 16
_MOVES = 16

# Decay has to be seen in a norm that is compared with 1, even if it is weak.
_REST_SIZE = 1e3

# Adafactor treats a leaf differently if two of its axes are as long as this. If small stand-ins are
# not treated as the real leaves are, longer ones are tried, up to so many entries in a tree.
_THRESHOLD = 128
_LARGEST_TREE = 500_000

_BY_SIZE = "it treats leaves differently at their real sizes"

# An optimizer that returns new weights minus old ones returns their rounding error too, in units
# of eps times the largest weight.
_ROUNDING_UNITS = 16


@dataclasses.dataclass(frozen=True)
class Stays:
    """A leaf that both trees have.

    Attributes:
      shape: the leaf's shape.
    """

    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Shrinks:
    """A leaf that is trained in smaller coordinates.

    Its gradient vanishes outside the product of one subspace per compressed axis.

    Attributes:
      shape: the leaf's shape in the full tree.
      axes: for each axis, whether it is compressed.
      rest: whether the leaf is non-zero where every compressed axis is outside its subspace.
      aligned: whether the subspaces are spanned by coordinate axes.
      depth: the number of leading axes, each slice along which has subspaces of its own.
    """

    shape: tuple[int, ...]
    axes: tuple[bool, ...]
    rest: bool
    aligned: bool = False
    depth: int = 0


@dataclasses.dataclass(frozen=True)
class Follows:
    """A leaf that equals another one up to the signs of its elements, and so does its gradient.

    Attributes:
      survivor: the number of the other leaf, which stays.
    """

    survivor: int


Change = Stays | Shrinks | Follows


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
    orthogonal = _tried(optimizer, _layers(), restored=False)
    sign = _tried(optimizer, _chains(), restored=True)
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
      The verdict. No exception of the optimizer passes.

    Example:
      >>> import jax, optax
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
    verdict = _tried(optimizer, _stand_ins(structure, changes, rho), restored=True, changes=changes)
    if verdict.reason == _BY_SIZE:
        larger = _stand_ins(structure, changes, rho, past=_THRESHOLD)
        if larger.size <= _LARGEST_TREE:
            return _tried(optimizer, larger, restored=True, changes=changes)
    return verdict


def _tried(
    optimizer: optax.GradientTransformation,
    pair: _Pair,
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
        # On the CPU, where many small operations are quick, and where float64 is at home.
        with jax.enable_x64(True), jax.default_device(_cpu()):
            verdict = _judged(_trained(optimizer, pair), pair, restored)
            if verdict.exact and changes and _depends_on_sizes(optimizer, pair, changes):
                return Verdict(False, np.inf, _BY_SIZE)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        reason = f"it could not be run on this tree: {type(error).__name__}: {first_line}"
        return Verdict(False, np.inf, reason)
    return verdict


def _cpu() -> jax.Device | None:
    """The CPU, or the default device where jax is told not to use the CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _judged(seen: _Seen, pair: _Pair, restored: bool) -> Verdict:
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


def _trained(optimizer: optax.GradientTransformation, pair: _Pair) -> _Seen:
    """Trains the two trees at every scale of the gradients, up to the first that parts them."""
    run = _training(optimizer, pair)
    results = []
    for scale in _SCALES:
        results.append(run(scale))
        if np.max(results[-1][0]) > _TOLERANCE:
            break
    drift, stray, moves = (np.array(rows) for rows in zip(*results, strict=True))
    return _Seen(drift.max(axis=0), stray.max(axis=0), moves.max(axis=0))


def _training(optimizer: optax.GradientTransformation, pair: _Pair):
    """`run(scale)`: trains on gradients of this scale, and returns what `_Seen` holds."""

    def step(trees, gradients):
        both = [_updated(optimizer, g, *tree) for g, tree in zip(gradients, trees, strict=True)]
        return [tree for _, tree in both], [updates for updates, _ in both]

    @jax.jit
    def begin(weights, gradients):
        trees = [(tree, optimizer.init(tree)) for tree in weights]
        later, _ = jax.eval_shape(step, trees, jax.tree.map(lambda g: g[0], gradients))
        # Some optimizers start in float32 what they continue in the weights' dtype.
        return jax.tree.map(lambda now, then: jnp.asarray(now).astype(then.dtype), trees, later)

    @jax.jit
    def train(trees, gradients, scale):
        return jax.lax.scan(step, trees, jax.tree.map(lambda g: scale * g, gradients))

    gradients = pair.gradients(_STEPS)
    start = begin(pair.weights(), gradients)

    def run(scale: float) -> tuple[np.ndarray, ...]:
        trees = start
        drift = stray = moves = np.zeros(len(pair.leaves))
        for _ in range(_ROUNDS):
            trees, (full, reduced) = train(trees, gradients, scale)
            drifts, strays, more = pair.compared(full, reduced, trees[0][0])
            drift, stray = np.maximum(drift, drifts), np.maximum(stray, strays)
            moves = moves + more
            if all(moves[n] >= _MOVES for n in pair.concerned):
                break
        return drift, stray, moves

    return run


def _updated(optimizer, gradient, weights, state):
    updates, state = optimizer.update(gradient, state, weights)
    return updates, (optax.apply_updates(weights, updates), state)


def _depends_on_sizes(
    optimizer: optax.GradientTransformation, pair: _Pair, changes: Sequence[Change]
) -> bool:
    """Whether the optimizer computes something else at the real sizes than at the stand-ins'.

    It may choose by a leaf's size what to do with it, as Adafactor does, and as labels may. Numbers
    in the program tell as well, but they may also be a harmless mean over a leaf: they count only
    if leaves change their sizes.
    """
    resized = any(isinstance(change, Shrinks) for change in changes)
    stand_ins = [leaf.shape for leaf in jax.tree.leaves(pair.weights()[0])]
    programs = []
    for shapes in (_shapes(changes), stand_ins):
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


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A full tree and its reduced tree, made of one block of numbers per leaf that both have."""

    structure: jax.tree_util.PyTreeDef
    leaves: Sequence[_Leaf]

    @property
    def names(self) -> list[str]:
        tree = jax.tree.unflatten(self.structure, range(len(self.leaves)))
        return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

    @property
    def concerned(self) -> list[int]:
        """The numbers of the leaves that shrink or are followed."""
        followed = {leaf.survivor for leaf in self.leaves if isinstance(leaf, _Copy)}
        return sorted(followed | {n for n, leaf in self._trained if leaf.shrinks})

    @property
    def size(self) -> int:
        """The number of entries of the full tree, without the copies."""
        return sum(leaf.rest.size for _, leaf in self._trained)

    def weights(self) -> tuple[Any, Any]:
        """The full and the reduced tree of weights."""
        blocks = {n: _random((1, *leaf.core), seed=(n, 0)) for n, leaf in self._trained}
        return jax.tree.map(lambda leaf: leaf[0], self._trees(blocks, weights=True))

    def gradients(self, steps: int) -> tuple[Any, Any]:
        """The full and the reduced tree of gradients, with a leading axis of steps.

        They have a part that persists, because some optimizers (Prodigy) sit still without, and
        sizes around 1 that vary from step to step.
        """
        sizes = 10.0 ** np.random.default_rng(0).uniform(-0.5, 0.5, size=steps)
        blocks = {}
        for n, leaf in self._trained:
            directions = _random(leaf.core, seed=(n, 1)) + _random((steps, *leaf.core), seed=(n, 2))
            blocks[n] = sizes.reshape(-1, *[1] * len(leaf.core)) * directions
        return self._trees(blocks, weights=False)

    def compared(self, full: Any, reduced: Any, weights: Any) -> tuple[np.ndarray, ...]:
        """Compares some steps' updates of the two trees.

        Args:
          full: updates of the full tree, with a leading axis of steps.
          reduced: updates of the reduced tree.
          weights: the full tree's weights after these steps.

        Returns:
          For each leaf the drift, the stray and how often it moved, as in `_Seen`.
        """
        full, weights = _arrays(full), _arrays(weights)
        numbers = [n for n, _ in self._trained]
        reduced = dict(zip(numbers, _arrays(reduced), strict=True))
        if not all(np.all(np.isfinite(x)) for x in (*full, *weights, *reduced.values())):
            return np.full(len(full), np.inf), np.full(len(full), np.inf), np.zeros(len(full), int)
        rows = []
        for n, leaf in enumerate(self.leaves):
            noise = _ROUNDING_UNITS * np.finfo(float).eps * _size(weights[n])
            other = full[leaf.survivor] if isinstance(leaf, _Copy) else reduced[n]
            drift, size, stray, whole = leaf.differences(full[n], other)
            moves = np.sum(size > noise)
            rows.append((_relative(drift, size, noise), _relative(stray, whole, noise), moves))
        return tuple(np.array(column) for column in zip(*rows, strict=True))

    @property
    def _trained(self) -> list[tuple[int, _Embedded]]:
        return [(n, leaf) for n, leaf in enumerate(self.leaves) if isinstance(leaf, _Embedded)]

    def _trees(self, blocks: dict[int, np.ndarray], *, weights: bool) -> tuple[Any, Any]:
        embedded = {n: leaf.full(blocks[n], weights) for n, leaf in self._trained}
        reduced = {n: leaf.reduced(blocks[n], weights) for n, leaf in self._trained}
        full = [
            leaf.signs * embedded[leaf.survivor] if isinstance(leaf, _Copy) else embedded[n]
            for n, leaf in enumerate(self.leaves)
        ]
        return (
            jax.tree.unflatten(self.structure, full),
            jax.tree.unflatten(self.structure, [reduced.get(n) for n in range(len(full))]),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Embedded:
    """A leaf that both trees have, in coordinates of which the first ones are trained.

    Its methods take and return arrays with a leading axis of steps.

    Attributes:
      bases: for each axis, orthogonal matrices whose first columns span the subspace of each slice
        along the leading axes, or `None`.
      core: the shape of the trained block.
      rest: the untouched block in these coordinates, zero elsewhere, of the full shape.
      rho: whether the reduced leaf has the additional coordinates.
    """

    bases: tuple[np.ndarray | None, ...]
    core: tuple[int, ...]
    rest: np.ndarray
    rho: bool

    @property
    def shrinks(self) -> bool:
        return self.core != self.rest.shape

    @property
    def astray(self) -> str:
        """What is wrong if the updates outside the block are not what is restored."""
        if self._has_rho:
            return "it does not move untouched weights in proportion to their norm"
        return "it moves weights whose gradient is zero"

    def full(self, block: np.ndarray, weights: bool) -> np.ndarray:
        """The leaf of the full tree, as weights or as gradients."""
        inside = _padded(block, self.rest.shape)
        return self._turned(inside + self.rest if weights else inside, back=False)

    def reduced(self, block: np.ndarray, weights: bool) -> np.ndarray:
        """The leaf of the reduced tree, as weights or as gradients."""
        more = [self.rho and basis is not None for basis in self.bases]
        padded = _padded(block, [size + one for size, one in zip(self.core, more, strict=True)])
        if weights and self._has_rho:
            padded[self._corner] = self._norm
        return padded

    def differences(self, full: np.ndarray, reduced: np.ndarray) -> tuple[np.ndarray, ...]:
        """Compares the updates of the full and of the reduced leaf.

        The unused coordinates of the reduced leaf, which nothing is restored from, must not move.

        Returns:
          For each step the difference in the trained block, the block's size, the difference of
          the rest from what is restored, and the leaf's size.
        """
        core = (slice(None), *(slice(size) for size in self.core))
        turned = self._turned(full, back=True)
        drift = _sizes(turned[core] - reduced[core])
        size = np.maximum(_sizes(turned[core]), _sizes(reduced[core]))
        whole = np.maximum(_sizes(turned), _sizes(reduced))
        off, unused = turned.copy(), reduced.copy()
        off[core] = unused[core] = 0.0
        if self._has_rho:
            off -= np.multiply.outer(reduced[self._corner] / self._norm, self.rest)
            unused[self._corner] = 0.0
        return drift, size, np.maximum(_sizes(off), _sizes(unused)), whole

    @property
    def _corner(self) -> tuple[Any, ...]:
        return (slice(None), *(-1 for _ in self.core))

    @property
    def _norm(self) -> float:
        return float(np.linalg.norm(self.rest))

    @property
    def _has_rho(self) -> bool:
        return self.rho and self._norm > 0

    def _turned(self, x: np.ndarray, *, back: bool) -> np.ndarray:
        for axis, basis in enumerate(self.bases, start=1):
            if basis is not None:
                moved = np.moveaxis(x, axis, -1)
                slices = moved.reshape(len(x), len(basis), -1, moved.shape[-1])
                turned = slices @ (basis if back else basis.transpose(0, 2, 1))
                x = np.moveaxis(turned.reshape(moved.shape), -1, axis)
        return x


@dataclasses.dataclass(frozen=True, eq=False)
class _Copy:
    """A leaf that only the full tree has: another leaf times signs."""

    survivor: int
    signs: np.ndarray

    @property
    def astray(self) -> str:
        """What is wrong if the updates are not the survivor's."""
        return "it parts folded weights from the ones that they follow"

    def differences(self, full: np.ndarray, survivor: np.ndarray) -> tuple[np.ndarray, ...]:
        """As `_Embedded.differences`; all of this leaf is restored."""
        size = _sizes(survivor)
        return np.zeros_like(size), size, _sizes(full - self.signs * survivor), size


_Leaf = _Embedded | _Copy


def _embedded(
    sizes: Sequence[tuple[int, int]],
    *,
    rest: bool = False,
    aligned: bool = False,
    rho: bool = False,
    depth: int = 0,
) -> _Embedded:
    """A leaf with axes of these sizes, full and reduced."""
    shape = tuple(full for full, _ in sizes)
    untouched = np.zeros(shape)
    if rest and any(full > reduced for full, reduced in sizes):
        outside = tuple(slice(reduced if full > reduced else 0, None) for full, reduced in sizes)
        untouched[outside] = _REST_SIZE * _random(shape)[outside]
    count = math.prod(shape[:depth])
    bases = tuple(
        np.stack([_basis(full, aligned, seed) for seed in range(count)]) if full > reduced else None
        for full, reduced in sizes
    )
    return _Embedded(bases, tuple(reduced for _, reduced in sizes), untouched, rho)


def _copy(survivor: int, shape: Sequence[int], number: int) -> _Copy:
    return _Copy(survivor, np.sign(_random(shape, seed=(number,))))


def _basis(size: int, aligned: bool, seed: int) -> np.ndarray:
    if aligned:
        return np.eye(size)[np.random.default_rng((seed, size)).permutation(size)]
    return np.linalg.qr(_random((size, size), seed=(seed,)))[0]


def _random(shape: Sequence[int], seed: Sequence[int] = ()) -> np.ndarray:
    return np.random.default_rng((*seed, *shape)).normal(size=shape)


def _padded(x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Zeros after the entries of every axis but the first."""
    return np.pad(x, [(0, 0), *((0, n - m) for m, n in zip(x.shape[1:], shape, strict=True))])


def _arrays(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def _size(x: np.ndarray) -> float:
    return float(np.max(np.abs(x), initial=0.0))


def _sizes(x: np.ndarray) -> np.ndarray:
    """The largest magnitude in each step."""
    return np.max(np.abs(x).reshape(len(x), -1), axis=1, initial=0.0)


def _relative(difference: np.ndarray, size: np.ndarray, noise: float) -> float:
    """The largest relative difference of updates, from both sizes in each step.

    Updates that happen to cancel are compared with the ones shortly before them.
    """
    recent = np.fromiter(itertools.accumulate(size, lambda past, now: max(0.9 * past, now)), float)
    return _size(np.maximum(difference - noise, 0.0) / np.where(recent > 0, recent, 1.0))


def _stand_ins(
    structure: jax.tree_util.PyTreeDef,
    changes: Sequence[Change],
    rho: bool,
    past: int | None = None,
) -> _Pair:
    """Small leaves with as many axes as the real ones, those past a threshold past it as well."""
    leaves: list[_Leaf] = []
    for number, (change, shape) in enumerate(zip(changes, _shapes(changes), strict=True)):
        axes = change.axes if isinstance(change, Shrinks) else (False,) * len(shape)
        sizes = _stand_in_sizes(shape, axes, past or max(shape, default=0) + 1)
        match change:
            case Follows(survivor):
                leaves.append(_copy(survivor, [full for full, _ in sizes], number))
            case Shrinks(_, _, rest, aligned, depth):
                embedded = _embedded(sizes, rest=rest, aligned=aligned, rho=rho, depth=depth)
                leaves.append(embedded)
            case Stays():
                leaves.append(_embedded(sizes))
    return _Pair(structure, leaves)


def _stand_in_sizes(shape: Sequence[int], axes: Sequence[bool], past: int) -> list[tuple[int, int]]:
    """Sizes of stand-ins, full and reduced, for the axes of a leaf of which some are compressed.

    A tall matrix stays tall, since its rule may be another one than a wide one's (Muon). If both
    axes are compressed the order is turned round, so that a rate by the axes' ratio is not missed.
    """
    by_size = sorted(range(len(shape)), key=lambda axis: shape[axis])
    sizes = [(size, size) for size in shape]
    for rank, axis in enumerate(axis for axis in by_size if shape[axis] > 1):
        full = 6 + 2 * rank + (past if shape[axis] >= past else 0)
        kept = min(full, shape[axis])
        sizes[axis] = (full, max(2, 4 - rank)) if axes[axis] else (kept, kept)
    return sizes


def _shapes(changes: Sequence[Change]) -> list[tuple[int, ...]]:
    """The real shapes of the full tree's leaves."""
    sources = [changes[c.survivor] if isinstance(c, Follows) else c for c in changes]
    return [source.shape for source in sources if not isinstance(source, Follows)]


def _layers() -> _Pair:
    """Layers for the orthogonal class, one of them past the sizes at which optimizers change."""
    tree = {
        "dense": {"kernel": _embedded([(6, 6), (9, 4)]), "bias": _embedded([(9, 4)])},
        "inner": {"kernel": _embedded([(9, 4), (11, 3)], rest=True)},
        "conv": {"kernel": _embedded([(3, 3), (8, 5), (7, 2)], rest=True)},
        "wide": {"kernel": _embedded([(140, 20), (132, 132)], rest=True)},
        "scale": _embedded([]),
    }
    leaves, structure = jax.tree.flatten(tree)
    return _Pair(structure, leaves)


def _chains() -> _Pair:
    """Chains of leaves for the sign class, beside layers that no leaf follows."""
    tree = {
        "conv": _embedded([(3, 3), (8, 8), (5, 5)]),
        "dense": {"bias": _embedded([(9, 9)]), "kernel": _embedded([(6, 6), (9, 9)])},
        "gains": [_embedded([(9, 9)]), _copy(3, [9], 1), _copy(3, [9], 2)],
        "scale": _embedded([]),
        "wide": [_embedded([(140, 140), (132, 132)]), _copy(7, [140, 132], 3)],
    }
    leaves, structure = jax.tree.flatten(tree)
    return _Pair(structure, leaves)
