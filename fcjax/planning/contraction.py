"""In which order to multiply the factors of a term, and what a training step pays for it.

Prices are analytic and in floating-point operations: a product costs its multiply-adds or, if
larger, the traffic of its operands at ``BYTE`` operations a byte (``NEAR`` in a cache), and the
start of an operation; forward once, and once more for every operand that a gradient flows to.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

from fcjax.expressions.terms import Label

__all__ = [
    "Cost",
    "Operand",
    "Order",
    "backward",
    "begun",
    "measure",
    "members",
    "moved",
    "pair",
    "price",
    "search",
    "written",
]

BYTE = 16.0
"""Operations that a device does in the time it moves one byte to or from memory."""
NEAR, CACHE = 4.0, 65536
"""The same for arrays of up to so many bytes, which stay in a core's cache: six networks of
benchmarks/never_slower.py with normalised rows that small took 1% to 10% more time without it."""
START = 3e4
"""Operations that a device does in the time it takes to begin one on arrays. It decides for tiny
networks only; on a CPU, from those of benchmarks/never_slower.py."""
VECTOR = 0.25
"""The part of ``START`` that a product with a vector takes: the compiler fuses it with others."""
ELEMENTWISE = 4.0
"""Operations that one fused elementwise operation counts as."""
SINGLE = 4
"""Bytes of the widest number with which operations take no longer: of float64 a processor computes
half as many at once."""
WIDENED = 1e9
"""How much dearer a product counts for inference that repeats data for every entry of a weight, as
a matrix for each example: other orders do what it does on the data, which have fewer entries."""
EXHAUSTIVE = 6
"""Up to so many operands every order is tried; longer terms are chains or ordered greedily."""

Order = int | tuple["Order", "Order"]
"""The number of an operand, or a pair of orders whose results are multiplied."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one training step pays.

    Attributes:
      time: operations, memory traffic converted at ``BYTE``.
      flops: multiply-adds counted twice, forward and backward.
      held: bytes written for the backward pass.
    """

    time: float = 0.0
    flops: float = 0.0
    held: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.time + other.time, self.flops + other.flops, self.held + other.held)

    def __mul__(self, by: float) -> "Cost":
        return Cost(self.time * by, self.flops * by, self.held * by)


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array as far as its price is concerned.

    Attributes:
      labels: one for each of its axes.
      trainable: whether a gradient flows to it.
      once: whether it is formed once for all runs of the body that uses it.
      itemsize: bytes of an element.
      fused: whether it is an entrywise product of data, which is written only where a product with
        another array needs it.
    """

    labels: frozenset[Label]
    trainable: bool
    once: bool
    itemsize: int
    fused: bool = False

    @functools.cached_property
    def bytes(self) -> float:
        """The size in memory."""
        return size(self.labels) * self.itemsize

    def traffic(self, runs: float) -> float:
        """What reading it costs in each of ``runs`` runs of the body.

        What is formed once and for all costs nothing: a weight has one entry for each product that
        a row takes, so its traffic would say nothing new and make plans depend on the rows.
        """
        return 0.0 if self.once and math.isinf(runs) else moved(self.bytes, runs)


def moved(size: float, runs: float = 1) -> float:
    """What moving an array of so many bytes costs.

    With ``runs=math.inf`` as much for a small one: all prices then grow with the rows alike.
    """
    return size * (NEAR if size <= CACHE and not math.isinf(runs) else BYTE)


def begun(runs: float = 1) -> float:
    """What it costs to begin an operation; nothing with ``runs=math.inf``, as for ``moved``."""
    return 0.0 if math.isinf(runs) else START


def size(labels: frozenset[Label]) -> float:
    """The number of elements of an array with these axes."""
    return float(math.prod(label.size for label in labels))


def measure(cost: Cost, runs: float) -> float:
    """What an order is chosen by: time, or operations where weights are formed for good."""
    return cost.flops if math.isinf(runs) else cost.time


def written(result: Operand, runs: float = 1) -> Cost:
    """Writing a value forward, and its cotangent backward where there is one."""
    passes = 1 + result.trainable
    return Cost(
        time=moved(result.bytes, runs) * passes, held=result.bytes if result.trainable else 0.0
    )


def pair(a: Operand, b: Operand, keep: frozenset[Label], runs: float = 1) -> tuple[Operand, Cost]:
    """Multiplies two operands, sums the labels not in ``keep``; ``runs`` is the body's count.

    With ``runs=math.inf`` products of what is formed once are free.
    """
    union = a.labels | b.labels
    once = a.once and b.once
    result = Operand(union & keep, a.trainable or b.trainable, once, max(a.itemsize, b.itemsize))
    passes = 1 + a.trainable + b.trainable
    work, slowness = size(union), max(result.itemsize / SINGLE, 1.0)
    if union <= keep:
        result = dataclasses.replace(result, fused=not once)
        cost = Cost(time=ELEMENTWISE * slowness * work * passes, flops=work * passes)
        if once:
            cost = cost + written(result, runs)
    else:
        traffic = a.traffic(runs) + b.traffic(runs)
        cost = Cost(time=max(2 * work * slowness, traffic) * passes, flops=2 * work * passes)
        for array in (result, *(o for o in (a, b) if o.fused)):
            cost = cost + written(array, runs)
    light = min(len(a.labels), len(b.labels)) < 2
    cost = cost + Cost(time=begun(runs) * passes * (VECTOR if light else 1.0))
    return result, cost * (1 / runs if once else 1.0)


def price(
    order: Order, operands: Sequence[Operand], keep: frozenset[Label], runs: float = 1
) -> tuple[Operand, Cost]:
    """The result of multiplying in the given order, and what all its products cost."""
    if isinstance(order, int):
        return operands[order], Cost()
    outside = [operands[i].labels for i in set(range(len(operands))) - set(members(order))]
    (a, cost_a), (b, cost_b) = (
        price(half, operands, keep.union(*outside, *_labels(other, operands)), runs)
        for half, other in (order, order[::-1])
    )
    result, cost = pair(a, b, keep.union(*outside), runs)
    return result, cost_a + cost_b + cost


def backward(order: Order, operands: Sequence[Operand], keep: frozenset[Label]) -> Cost:
    """What the gradients of operands cost if the last product is only differentiated.

    The products before it are computed; it is not, and its cotangent is written elsewhere.
    """
    result, cost = price(order, operands, keep)
    if isinstance(order, int):
        return cost
    still = [dataclasses.replace(o, trainable=False) for o in operands]
    inner = [
        price(half, still, keep.union(*_labels(other, operands)))
        for half, other in (order, order[::-1])
    ]
    _, last = pair(inner[0][0], inner[1][0], keep)
    cotangent = Cost(time=moved(result.bytes), held=result.bytes)
    return cost + (last + cotangent) * -1.0


def members(order: Order) -> list[int]:
    """The operands that an order multiplies."""
    return [order] if isinstance(order, int) else members(order[0]) + members(order[1])


def _labels(order: Order, operands: Sequence[Operand]) -> list[frozenset[Label]]:
    return [operands[i].labels for i in members(order)]


# --- the search ---------------------------------------------------------------------------------

Best = tuple[float, Order, Operand]


def search(operands: Sequence[Operand], keep: frozenset[Label], runs: float = 1) -> Order:
    """The order of least time: exact for chains and short terms, greedy for the rest.

    A chain that ends in a vector is multiplied from there, by matrix-vector products alone.
    Networks ask for the same orders again and again, in every layer: those found are remembered.
    """
    if len(operands) == 1:
        return 0
    labels = frozenset[Label]().union(*(o.labels for o in operands))
    standing = sorted((tuple(x in o.labels for o in operands), x in keep, x.size) for x in labels)
    kinds = tuple((o.trainable, o.once, o.itemsize) for o in operands)
    return _search(tuple(standing), kinds, runs)


@functools.lru_cache(maxsize=4096)
def _search(
    standing: tuple[tuple[tuple[bool, ...], bool, int], ...],
    kinds: tuple[tuple[bool, bool, int], ...],
    runs: float,
) -> Order:
    """The order for operands, given on which of them each label stands, and whether it is kept."""
    labels = [(Label(size), on, kept) for on, kept, size in standing]
    keep = frozenset(x for x, _, kept in labels if kept)
    operands = [
        Operand(frozenset(x for x, on, _ in labels if on[i]), *kind) for i, kind in enumerate(kinds)
    ]
    chain = _as_chain(operands, keep)
    if chain is not None:
        if len(operands[chain[0]].labels) > 1:
            chain.reverse()
        free = math.isinf(runs) and not all(o.once for o in operands)
        if len(operands[chain[0]].labels) == 1 and not free:
            return _one_by_one(chain)
        return _intervals(operands, keep, runs, chain)
    if len(operands) <= EXHAUSTIVE:
        return _subsets(operands, keep, runs)
    return _greedy(operands, keep, runs)


def _one_by_one(line: Sequence[int]) -> Order:
    order: Order = line[0]
    for k in line[1:]:
        order = (order, k)
    return order


def _needed(operands: Sequence[Operand], inside: frozenset[int], keep: frozenset[Label]):
    return keep.union(*(o.labels for i, o in enumerate(operands) if i not in inside))


def _cheapest(splits: Sequence[tuple[Best, Best]], keep: frozenset[Label], runs: float) -> Best:
    best: Best | None = None
    for (time_a, order_a, a), (time_b, order_b, b) in splits:
        result, cost = pair(a, b, keep, runs)
        time = time_a + time_b + measure(cost, runs)
        if math.isinf(runs) and a.once and b.once and not a.labels & b.labels:
            time = math.inf  # it would save a product entry by entry, and be a matrix for each
        if math.isinf(runs) and a.once != b.once and _widens(b if a.once else a, result):
            time += WIDENED * measure(cost, runs)
        if best is None or time < best[0]:
            best = (time, (order_a, order_b), result)
    assert best is not None
    return best


def _widens(data: Operand, result: Operand) -> bool:
    """Whether a product with a weight only repeats the data along further axes."""
    return data.labels < result.labels


def _as_chain(operands: Sequence[Operand], keep: frozenset[Label]) -> list[int] | None:
    """The operands in line order if each shares bound labels with at most two neighbours."""
    bound = [o.labels - keep for o in operands]
    near = [
        [j for j in range(len(operands)) if j != i and bound[i] & bound[j]]
        for i in range(len(operands))
    ]
    ends = [i for i, n in enumerate(near) if len(n) == 1]
    if len(ends) != 2 or any(len(n) > 2 for n in near):
        return None
    line = [ends[0]]
    while len(line) < len(operands):
        following = [j for j in near[line[-1]] if j not in line[-2:-1] and j not in line]
        if not following:
            return None
        line.append(following[0])
    return line


def _intervals(
    operands: Sequence[Operand], keep: frozenset[Label], runs: float, line: Sequence[int]
) -> Order:
    """Matrix-chain ordering by dynamic programming."""
    best: dict[tuple[int, int], Best] = {
        (i, i + 1): (0.0, k, operands[k]) for i, k in enumerate(line)
    }
    for length in range(2, len(line) + 1):
        for i in range(len(line) - length + 1):
            j = i + length
            needed = _needed(operands, frozenset(line[i:j]), keep)
            splits = [(best[i, m], best[m, j]) for m in range(i + 1, j)]
            best[i, j] = _cheapest(splits, needed, runs)
    return best[0, len(line)][1]


def _subsets(operands: Sequence[Operand], keep: frozenset[Label], runs: float) -> Order:
    """Every order of a short term, by dynamic programming over subsets."""
    everything = range(len(operands))
    best: dict[frozenset[int], Best] = {frozenset({i}): (0.0, i, operands[i]) for i in everything}
    for count in range(2, len(operands) + 1):
        for chosen in itertools.combinations(everything, count):
            whole = frozenset(chosen)
            halves = [
                frozenset((chosen[0], *rest))
                for k in range(count - 1)
                for rest in itertools.combinations(chosen[1:], k)
            ]
            splits = [(best[half], best[whole - half]) for half in halves]
            best[whole] = _cheapest(splits, _needed(operands, whole, keep), runs)
    return best[frozenset(everything)][1]


def _greedy(operands: Sequence[Operand], keep: frozenset[Label], runs: float) -> Order:
    """Multiplies the cheapest pair that shares a label, until one operand is left."""
    left: list[tuple[Order, Operand]] = list(enumerate(operands))
    while len(left) > 1:
        rank: Callable[[tuple[int, int]], tuple[bool, float]] = functools.partial(
            _pair_rank, left, keep, runs
        )
        i, j = min(itertools.combinations(range(len(left)), 2), key=rank)
        result, _ = pair(left[i][1], left[j][1], _needed_of(left, i, j, keep), runs)
        order: Order = (left[i][0], left[j][0])
        left = [entry for k, entry in enumerate(left) if k not in (i, j)] + [(order, result)]
    return left[0][0]


def _needed_of(left, i: int, j: int, keep: frozenset[Label]) -> frozenset[Label]:
    return keep.union(*(o.labels for k, (_, o) in enumerate(left) if k not in (i, j)))


def _pair_rank(left, keep: frozenset[Label], runs: float, ij: tuple[int, int]):
    a, b = left[ij[0]][1], left[ij[1]][1]
    _, cost = pair(a, b, _needed_of(left, *ij, keep), runs)
    return (not a.labels & b.labels, measure(cost, runs))
