"""Reshapes, transpositions, slices, repetitions, and statistics over any axes."""

from __future__ import annotations

import itertools
import math

import jax.numpy as jnp

from .domains import AXES, AXIS, FLAG, SIZE, Among
from .ops_dense import against
from .registry import op
from .weights import typed

# --- layout ---


@op(axis=AXIS)
def merged(b, x, *, axis):
    """Two neighbouring axes as one."""
    b.need(x.ndim >= 2)
    at = axis % (x.ndim - 1)
    shape = (*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])
    return f"{x}.reshape({shape})"


@op(axis=AXIS, factor=SIZE)
def split(b, x, *, axis, factor):
    """An axis as two."""
    at = b.axis(x, axis)
    b.need(factor and x.shape[at] % factor == 0)
    shape = (*x.shape[:at], x.shape[at] // factor, factor, *x.shape[at + 1 :])
    return f"{x}.reshape({shape})"


@op(last=SIZE)
def refolded(b, x, *, last):
    """All axes merged and split anew, across what the old ones meant."""
    b.need(x.ndim and last and x.size % last == 0)
    return f"{x}.reshape(-1, {last})"


@op(form=Among(("{}.reshape(-1)", "{0}.reshape({0}.shape[0], -1)")))
def flattened(b, x, *, form):
    b.need(x.ndim and x.size)
    return form.format(x)


@op(at=Among((0, -1, 1)))
def inserted(b, x, *, at):
    b.need(at <= x.ndim)
    return f"jnp.expand_dims({x}, {at})"


@op()
def squeezed(b, x):
    b.need(1 in x.shape)
    return f"jnp.squeeze({x}, {x.shape.index(1)})"


@op(number=Among(tuple(range(24))))
def transposed(b, x, *, number):
    b.need(x.ndim >= 2)
    orders = list(itertools.islice(itertools.permutations(range(x.ndim)), 1, None))
    return f"{x}.transpose({orders[number % len(orders)]})"


# --- parts and repetitions ---


@op(axis=AXIS, start=Among((None, 1, -2, 0)), stop=Among((None, -1, 2, 1)), by=Among((1, 2, -1, 3)))
def sliced(b, x, *, axis, start, stop, by):
    at = b.axis(x, axis)
    bounds = ":".join("" if n is None else str(n) for n in (start, stop))
    return f"{x}[{':, ' * at}{bounds}:{by}]"


@op(axis=AXIS, which=Among((0, -1, 1)))
def indexed(b, x, *, axis, which):
    at = b.axis(x, axis)
    b.need(-x.shape[at] <= which < x.shape[at])
    return f"{x}[{':, ' * at}{which}]"


@op(axis=AXIS, which=Among((0, 1)))
def half(b, x, *, axis, which):
    at = b.axis(x, axis)
    b.need(x.shape[at] % 2 == 0)
    return f"jnp.split({x}, 2, {at})[{which}]"


@op(count=SIZE, behind=FLAG)
def broadcast(b, x, *, count, behind):
    if behind:
        return f"jnp.broadcast_to({x}[..., None], {(*x.shape, count)})"
    return f"jnp.broadcast_to({x}, {(count, *x.shape)})"


@op(axis=AXIS, count=Among((2, 1, 3)), form=Among(("repeat", "tile")))
def repeated(b, x, *, axis, count, form):
    at = b.axis(x, axis)
    if form == "repeat":
        return f"jnp.repeat({x}, {count}, {at})"
    times = tuple(count if i == at else 1 for i in range(x.ndim))
    return f"jnp.tile({x}, {times})"


@op(axis=AXIS, by=Among((1, 0, -1, 2, "size", 7)))
def rolled(b, x, *, axis, by):
    at = b.axis(x, axis)
    return f"jnp.roll({x}, {x.shape[at] if by == 'size' else by}, {at})"


@op(axis=AXIS)
def flipped(b, x, *, axis):
    return f"jnp.flip({x}, {b.axis(x, axis)})"


WRAPPED = (
    "[{0}, {0}[{1}:1]]", "[{0}[{1}-1:], {0}]", "[{0}, {0}[{1}:0]]", "[{0}[{1}1:], {0}[{1}:1]]",
    "[{0}, {0}]", "[{0}[{1}-1:], {0}, {0}[{1}:1]]",
)  # fmt: skip


@op(axis=AXIS, form=Among(WRAPPED))
def wrapped(b, x, *, axis, form):
    """A value joined with parts of itself."""
    at = b.axis(x, axis)
    return f"jnp.concatenate({form.format(x, ':, ' * at)}, {at})"


PADDINGS = ("constant", "edge", "wrap", "reflect", "symmetric", "mean", "linear_ramp")


@op(axis=AXIS, low=Among((1, 0, 2)), high=Among((1, 0, 2, 3)), mode=Among(PADDINGS))
def padded(b, x, *, axis, low, high, mode):
    at = b.axis(x, axis)
    widths = tuple((low, high) if i == at else (0, 0) for i in range(x.ndim))
    return f'jnp.pad({x}, {widths}, mode="{mode}")'


# --- statistics ---


REDUCTIONS = ("mean", "sum", "max", "min", "std", "var", "prod")


@op(over=AXES, kind=Among(REDUCTIONS), keepdims=FLAG)
def reduced(b, x, *, over, kind, keepdims):
    return f"{x}.{kind}({b.axes(x, over)}, keepdims={keepdims})"


CENTRED = (
    "{x} - {x}.mean({axes}, keepdims=True)",
    "{x} - {x}.sum({axes}, keepdims=True) / {n}",
    "{x} - 0.5 * {x}.mean({axes}, keepdims=True)",
    "{x} + {x}.mean({axes}, keepdims=True)",
    "{x} - {x}.mean()",
)


@op(over=AXES, form=Among(CENTRED))
def centred(b, x, *, over, form):
    axes = b.axes(x, over)
    count = math.prod(x.shape[axis] for axis in axes)
    return form.format(x=x, axes=axes, n=max(count, 1))


ROOTS = {
    "rsqrt": "{y} * lax.rsqrt({v} + {eps})",
    "sqrt": "{y} / jnp.sqrt({v} + {eps})",
    "power": "{y} * ({v} + {eps}) ** -0.5",
    "reciprocal": "{y} * (1 / jnp.sqrt({v} + {eps}))",
    "product": "{y} / ({v} + {eps})",
}
SQUARES = {
    "square": "({y} ** 2).mean({axes}, keepdims=True)",
    "itself": "({y} * {y}).mean({axes}, keepdims=True)",
    "sum": "({y} * {y}).sum({axes}, keepdims=True)",
    "var": "{y}.var({axes}, keepdims=True)",
    "one pass": "(({y} ** 2).mean({axes}, keepdims=True) - {y}.mean({axes}, keepdims=True) ** 2)",
    "abs": "jnp.abs({y}).mean({axes}, keepdims=True)",
    "einsum": "jnp.einsum('...a,...a->...', {y}, {y})[..., None]",
}


@op(
    over=AXES,
    centred=FLAG,
    square=Among(tuple(SQUARES)),
    root=Among(tuple(ROOTS)),
    eps=Among((0.1, 1e-3, 1e-5)),
    on=Among((0, 1, 2, 4, 3)),
    shifted=FLAG,
)
def normalised(b, x, *, over, centred, square, root, eps, on, shifted):
    """A normalisation of any kind, over any axes, with a gain and a shift on any."""
    axes = b.axes(x, over)
    y = f"{b.step.name}_y"
    b.lines.append(f"{y} = {x} - {x}.mean({axes}, keepdims=True)" if centred else f"{y} = {x}")
    squares = SQUARES[square].format(y=y, axes=axes)
    text = ROOTS[root].format(y=y, v=squares, eps=eps)
    text = f"({text}) * {b.weight(*against(x, on))}" if on else text
    return f"{text} + {b.weight(*against(x, on or 1))}" if shifted else text


@op(groups=Among((2, 1, 3)), gained=FLAG)
def normalised_in_groups(b, x, *, groups, gained):
    """GroupNorm over the last axis."""
    b.need(x.ndim and x.shape[-1] % groups == 0)
    y = f"{b.step.name}_y"
    b.lines.append(f"{y} = {x}.reshape(*{x.shape[:-1]}, {groups}, -1)")
    b.lines.append(f"{y} = {y} - {y}.mean(-1, keepdims=True)")
    b.lines.append(f"{y} = {y} * lax.rsqrt(({y} ** 2).mean(-1, keepdims=True) + 1e-3)")
    text = f"{y}.reshape({x.shape})"
    return f"{text} * {b.weight(x.shape[-1])}" if gained else text


@op(axis=AXIS, statistics=Among(("weights", "constants", "float32")))
def normalised_by_statistics(b, x, *, axis, statistics):
    """BatchNorm as evaluated: with running statistics, perhaps in another type."""
    at = b.axis(x, axis)
    shape = tuple(n if i == at else 1 for i, n in enumerate(x.shape))[at:]
    dtype = jnp.dtype("float32") if statistics == "float32" else b.dtype
    mean, var = (
        b.weight(*shape)
        if statistics == "weights"
        else b.constant(typed(f"normal({shape})", shape, dtype), shape, dtype)
        for _ in range(2)
    )
    return f"({x} - {mean}) * lax.rsqrt({var} ** 2 + 0.1) * {b.weight(*shape)} + {b.weight(*shape)}"
