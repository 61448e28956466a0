"""Convolutions of rows with gaps, as upsampling makes them, without a product by zero.

Where ``spread * i = stride * o + taps`` most taps meet a gap between two rows. The places
``o + start = n p + q`` of one phase q all meet the same taps,

    ``y[n p + q - start] = sum_t Z_q[t] x[s p + t + low]``,

so all phases are one ordinary convolution of the rows with n times the channels, interleaved
afterwards. For three taps over rows repeated twice these are 2 phases of 2 taps: along two axes 16
products for each row, where the repeated rows take 36 and the rows with gaps 64.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from fcjax.expressions import windows
from fcjax.expressions.terms import Expr, Label
from fcjax.planning import contraction
from fcjax.planning.contraction import Cost, Operand
from fcjax.planning.grids import Grid, Place, Taps
from fcjax.planning.parts import Convolution, Phases, Recipe
from fcjax.planning.roles import effective_weight

__all__ = ["convolved", "in_phases"]

INTERLEAVING = 4.0
"""How many times the traffic of a result its interleaving takes: on two CPU cores, three taps over
rows repeated twice took 0.8 of the time of the same as written for 32 or 64 channels to as many,
0.7 for 64 to 16, 1.2 for 16 to 64."""

Axis = tuple[Grid, Phases, tuple[Taps, ...]]


def convolved(part: Convolution, expr: Expr, runs: float) -> Cost:
    """What a convolution costs once the products that its kernel is the sum of are formed."""
    weights = [product.term for product in part.weights]
    kernel = effective_weight(weights, part.weight_labels, expr)
    reads = {g.read: g.out for g in part.grids}
    own = (part.rows.labels if part.rows is not None else frozenset[Label]()).union(part.ones)
    trainable = part.rows is not None and part.rows.leaf.trainable
    seen = frozenset(reads.get(x, x) for x in own)
    rows = Operand(seen, trainable, False, np.dtype(expr.dtype).itemsize)
    result, cost = contraction.pair(rows, kernel, part.kept, runs)
    if part.is_assembled:
        cost = cost + contraction.written(kernel, runs) * (1 / runs if kernel.once else 1.0)
    if part.phases:
        whole = result.labels.difference(*((f.made, f.phase) for f in part.phases))
        whole = whole.union(f.out for f in part.phases)
        held = contraction.written(dataclasses.replace(result, labels=whole)).held
        once = contraction.written(result, runs)
        cost = cost + Cost(time=INTERLEAVING * once.time, held=held - once.held)
    return cost


def in_phases(how: Recipe, runs: float) -> Recipe:
    """The recipe with its convolutions of rows with gaps by phases."""
    parts, cost = list(how.parts), how.cost
    for i, part in enumerate(parts):
        if isinstance(part, Convolution) and (other := _by_phases(part)) is not None:
            parts[i] = other
            cost = cost + convolved(other, how.expr, runs)
            cost = cost + convolved(part, how.expr, runs) * -1.0
    return dataclasses.replace(how, parts=tuple(parts), cost=cost)


def _by_phases(part: Convolution) -> Convolution | None:
    """The same convolution, its axes with gaps by phases; None if it has none."""
    if part.rows is None or not part.rows.is_data or all(g.spread == 1 for g in part.grids):
        return None
    axes: list[tuple[Grid, Phases | None, tuple[Taps, ...]]] = []
    for i, grid in enumerate(part.grids):
        taps = tuple(place.taps[i] for place in part.places)
        found = (grid, None, taps) if grid.spread == 1 else _axis(grid, taps)
        if found is None:
            return None
        axes.append(found)
    grids, phases, taps = zip(*axes, strict=True)
    phases = tuple(f for f in phases if f is not None)
    channels = [f.phase for f in phases if f.phase is not None]
    own = [x for x in part.weight_labels if x not in [g.tap for g in part.grids]]
    return dataclasses.replace(
        part,
        grids=grids,
        places=tuple(
            Place(along, place.diagonal)
            for place, along in zip(part.places, zip(*taps, strict=True), strict=True)
        ),
        weight_labels=(*(g.tap for g in grids if g.tap is not None), *channels, *own),
        kept=part.kept.difference(f.out for f in phases).union(channels, (f.made for f in phases)),
        phases=phases,
    )


def _axis(grid: Grid, taps: Sequence[Taps]) -> Axis | None:
    """One axis by phases, begun where the fewest taps do; None if it has one place for each."""
    count = grid.spread // math.gcd(grid.spread, grid.stride)
    starts = {start: _reached(grid, taps, count, start) for start in range(count)}
    if not all(r.size for r in starts.values()):
        return None  # no place meets any row
    start = min(starts, key=lambda s: windows.tap_grid([starts[s]])[2])
    low, dilation, size = windows.tap_grid([starts[start]])
    made = (grid.out.size - 1 + start) // count + 1
    if made == 1:
        return None
    tap, phase = (Label(n) if n > 1 else None for n in (size, count))
    inner = Grid(
        grid.read, Label(made), tap, 1, grid.stride * count // grid.spread, dilation, low
    )  # fmt: skip
    offset = grid.low - grid.stride * start - grid.spread * low
    steps = ((phase, grid.stride),) if phase is not None else ()
    own = tuple(
        Taps(
            (*((x, grid.dilation * by) for x, by in t.steps), *steps),
            grid.dilation * t.low + offset,
            grid.spread * dilation,
        )
        for t in taps
    )
    return inner, Phases(grid.out, inner.out, phase, start), own


def _reached(grid: Grid, taps: Sequence[Taps], count: int, start: int) -> windows.Integers:
    """Which rows the phases meet, counted from the one that belongs to their place."""
    found = [
        windows.values(
            [(count, grid.stride), *((x.size, grid.dilation * by) for x, by in t.steps)],
            grid.dilation * t.low + grid.low - grid.stride * start,
        )
        for t in taps
    ]
    every = np.unique(np.concatenate(found))
    return every[every % grid.spread == 0] // grid.spread
