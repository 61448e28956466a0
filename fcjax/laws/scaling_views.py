"""How results scale where a primitive arranges the entries of an array anew."""

from collections.abc import Iterable, Sequence

import numpy as np

from fcjax.laws.scaling import Axis, Reading, boundary, register, result, shape_of
from fcjax.tracing.trace import Atom, Equation, Value

__all__ = ["drop", "keep"]


def keep(reading: Reading, taken: Atom, pairs: Sequence[tuple[int, int]], made: Value) -> None:
    """The result's axes are those of the operand, by pairs (of the result, of the operand)."""
    if reading.is_zero(taken):
        reading.zeros.add(made)
    if not isinstance(taken, Value):
        return
    for new, old in pairs:
        reading.same((made, new), (taken, old))
        if (taken, old) in reading.level:
            reading.level.add((made, new))


def drop(reading: Reading, value: Value, kept: Iterable[int], *, level: bool = False) -> None:
    """The other axes of an array do not scale."""
    for axis in set(range(len(value.shape))) - set(kept):
        reading.zero((value, axis))
        if level:
            reading.level.add((value, axis))


@register("transpose")
def _transpose(reading: Reading, equation: Equation) -> None:
    order = equation.source.params["permutation"]
    keep(reading, equation.inputs[0], list(enumerate(order)), result(equation))


@register("squeeze")
def _squeeze(reading: Reading, equation: Equation) -> None:
    (taken,) = equation.inputs
    gone = equation.source.params["dimensions"]
    kept = [axis for axis in range(len(shape_of(taken))) if axis not in gone]
    keep(reading, taken, list(enumerate(kept)), result(equation))
    if isinstance(taken, Value):
        drop(reading, taken, kept)


@register("broadcast_in_dim")
def _broadcast(reading: Reading, equation: Equation) -> None:
    taken, made = equation.inputs[0], result(equation)
    where = equation.source.params["broadcast_dimensions"]
    shape = shape_of(taken)
    pairs = [(new, old) for old, new in enumerate(where) if shape[old] == made.shape[new]]
    keep(reading, taken, pairs, made)
    if not reading.is_zero(taken):
        drop(reading, made, [new for new, _ in pairs], level=True)
    if isinstance(taken, Value):
        drop(reading, taken, [old for _, old in pairs])


@register("reshape", "expand_dims")
def _reshape(reading: Reading, equation: Equation) -> None:
    taken, made = equation.inputs[0], result(equation)
    if equation.source.params.get("dimensions") is not None or 0 in made.shape:
        boundary(reading, equation)
        return
    if reading.is_zero(taken):
        reading.zeros.add(made)
    elif isinstance(taken, Value):
        reshape(reading, taken, made)
    else:
        reading.zero_all(made)


def reshape(reading: Reading, taken: Value, made: Value) -> None:
    """The axes of an array in terms of those of its reshape, group by group."""
    for olds, news in _groups(taken.shape, made.shape):
        if len(olds) == 1 and len(news) == 1:
            keep(reading, taken, [(news[0], olds[0])], made)
        elif len(olds) == 1 and len(news) > 1:
            reading.factor((taken, olds[0]), [(made, axis) for axis in news])
        elif len(news) == 1 and len(olds) > 1:
            reading.factor((made, news[0]), [(taken, axis) for axis in olds])
        else:  # axes of size one that come or go, or a mixture
            reading.zero(*((taken, axis) for axis in olds), *((made, axis) for axis in news))


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of two shapes with equal products, from the last to the first.

    Axes of size one are paired with each other, or stand alone.
    """
    found: list[tuple[list[int], list[int]]] = []
    i, j = len(old) - 1, len(new) - 1
    while i >= 0 or j >= 0:
        single_old, single_new = i >= 0 and old[i] == 1, j >= 0 and new[j] == 1
        if single_old or single_new:
            olds, news = [i] * single_old, [j] * single_new
        else:
            olds, news = [i], [j]
            a, b = old[i], new[j]
            while a != b:
                if a < b:
                    olds.append(olds[-1] - 1)
                    a *= old[olds[-1]]
                else:
                    news.append(news[-1] - 1)
                    b *= new[news[-1]]
        i, j = i - len(olds), j - len(news)
        olds, news = (sorted(axes) for axes in (olds, news))
        if len(olds) > 1 or len(news) > 1:  # axes of size one inside a run have no index
            ones = [k for k in olds if old[k] == 1], [k for k in news if new[k] == 1]
            found += [([k], []) for k in ones[0]] + [([], [k]) for k in ones[1]]
            olds = [k for k in olds if old[k] != 1]
            news = [k for k in news if new[k] != 1]
        found.append((olds, news))
    return found


@register("slice")
def _slice(reading: Reading, equation: Equation) -> None:
    taken, made = equation.inputs[0], result(equation)
    params = equation.source.params
    if reading.is_zero(taken) or not isinstance(taken, Value):
        keep(reading, taken, [], made)
        return
    strides = params["strides"] or (1,) * len(taken.shape)
    ranges = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for axis, (start, limit, stride) in enumerate(ranges):
        if stride == 1:
            rest = taken.shape[axis] - limit
            reading.stack((taken, axis), [start, (made, axis), rest])
        else:
            reading.zero((taken, axis), (made, axis))


@register("split")
def _split(reading: Reading, equation: Equation) -> None:
    taken, axis = equation.inputs[0], equation.source.params["axis"]
    made = [value for value in equation.outputs if value is not None]
    others = [(k, k) for k in range(len(shape_of(taken))) if k != axis]
    for value in made:
        keep(reading, taken, others, value)
    if isinstance(taken, Value) and not reading.is_zero(taken):
        sizes = zip(equation.outputs, equation.source.params["sizes"], strict=True)
        parts = [size if value is None else (value, axis) for value, size in sizes]
        reading.stack((taken, axis), parts)


@register("concatenate")
def _concatenate(reading: Reading, equation: Equation) -> None:
    made, axis = result(equation), equation.source.params["dimension"]
    parts: list[Axis | int] = []
    for atom in equation.inputs:
        if not isinstance(atom, Value) or reading.is_zero(atom):
            parts.append(shape_of(atom)[axis])
            continue
        parts.append((atom, axis))
        for k in set(range(len(made.shape))) - {axis}:
            reading.same((made, k), (atom, k))
    if all(isinstance(part, int) for part in parts):
        reading.zeros.add(made)
    reading.stack((made, axis), parts)


@register("pad")
def _pad(reading: Reading, equation: Equation) -> None:
    (taken, filler), made = equation.inputs, result(equation)
    if not reading.is_zero(filler) or not isinstance(taken, Value):
        boundary(reading, equation)
        return
    for axis, (low, high, inside) in enumerate(equation.source.params["padding_config"]):
        if low >= 0 and high >= 0 and inside == 0:
            reading.stack((made, axis), [low, (taken, axis), high])
        else:
            reading.zero((made, axis), (taken, axis))


@register("dynamic_slice")
def _dynamic_slice(reading: Reading, equation: Equation) -> None:
    _keep_whole(reading, equation.inputs[0], result(equation))


def _keep_whole(reading: Reading, taken: Atom, made: Value, *, strong: bool = True) -> None:
    """Axes that keep their size are kept; entries of the others are picked or mixed."""
    if not isinstance(taken, Value):
        reading.zero_all(made)
        return
    for axis, size in enumerate(taken.shape):
        if made.shape[axis] == size:
            reading.same((made, axis), (taken, axis), strong=strong)
        else:
            reading.zero((made, axis), (taken, axis))


@register("rev")
def _rev(reading: Reading, equation: Equation) -> None:
    _without(reading, equation.inputs[0], result(equation), equation.source.params["dimensions"])


@register("cumsum")
def _cumsum(reading: Reading, equation: Equation) -> None:
    _without(reading, equation.inputs[0], result(equation), [equation.source.params["axis"]])


def _without(reading: Reading, taken: Atom, made: Value, mixed: Sequence[int]) -> None:
    """All axes are kept but some, along which entries are moved or mixed."""
    kept = [axis for axis in range(len(made.shape)) if axis not in mixed]
    keep(reading, taken, [(axis, axis) for axis in kept], made)
    if isinstance(taken, Value):
        drop(reading, taken, kept)
    drop(reading, made, kept)


@register("gather")
def _gather(reading: Reading, equation: Equation) -> None:
    """Rows of a table: axes that are taken in full are kept, those that are indexed are not."""
    taken, made, params = equation.inputs[0], result(equation), equation.source.params
    fill = params["fill_value"]
    if not isinstance(taken, Value) or not (fill is None or fill == 0 or np.isnan(fill)):
        boundary(reading, equation)
        return
    numbers = params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    windows = [axis for axis in range(len(taken.shape)) if axis not in gone]
    pairs = [
        (new, old)
        for new, old in zip(numbers.offset_dims, windows, strict=True)
        if params["slice_sizes"][old] == taken.shape[old] and old not in numbers.start_index_map
    ]
    keep(reading, taken, pairs, made)
    drop(reading, taken, [old for _, old in pairs])
    drop(reading, made, [new for new, _ in pairs])
