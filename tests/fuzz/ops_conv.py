"""Convolutions along one to three axes, pooling, upsampling; channels first or last."""

from __future__ import annotations

import math
from typing import Any

from .domains import AXIS, FLAG, SIZE, Among, Each
from .registry import op
from .writing import Array, Context

LAST = Among((True, False))
"""Whether channels come last."""
KERNEL = Each(3, Among((1, 2, 3)))
STRIDES = Each(3, Among((1, 2, 3)))
DILATIONS = Each(3, Among((1, 1, 1, 2)))
LOW, HIGH = (Each(3, Among((0, 1, 2, -1))) for _ in range(2))
PADDING = Among(("VALID", "SAME", "explicit"))


def spatial(b: Context, x: Array) -> int:
    """The number of axes between those of the batch and the channels."""
    b.need(3 <= x.ndim <= 5)
    return x.ndim - 2


def channels(x: Array, last: bool) -> int:
    return x.shape[-1 if last else 1]


def grid(x: Array, last: bool) -> tuple[int, ...]:
    return x.shape[1:-1] if last else x.shape[2:]


def numbers(d: int, last: bool, *, kernel_last: bool) -> tuple[str, str, str]:
    """Dimension numbers, such as ("NHWC", "HWIO", "NHWC")."""
    space = "DHW"[3 - d :]
    rows = f"N{space}C" if last else f"NC{space}"
    return rows, f"{space}IO" if kernel_last else f"OI{space}", rows


def kernel(b: Context, d: int, sizes: Any, n_in: int, n_out: int, kernel_last: bool) -> str:
    taps = tuple(sizes[:d])
    return b.weight(*taps, n_in, n_out) if kernel_last else b.weight(n_out, n_in, *taps)


def along(x: Array, last: bool, fill: Any, values: Any) -> tuple[Any, ...]:
    """Values for the axes of space, and ``fill`` for the others."""
    inner = tuple(values[: x.ndim - 2])
    return (fill, *inner, fill) if last else (fill, fill, *inner)


def pads(padding: str, d: int, low: Any, high: Any) -> str:
    if padding != "explicit":
        return f'"{padding}"'
    return str(list(zip(low[:d], high[:d], strict=True)))


@op(
    features=SIZE,
    taps=KERNEL,
    strides=STRIDES,
    padding=PADDING,
    low=LOW,
    high=HIGH,
    dilations=DILATIONS,
    spread=DILATIONS,
    groups=Among((1, 1, 2, "depthwise")),
    last=LAST,
    kernel_last=LAST,
    biased=FLAG,
)
def convolved(
    b, x, *, features, taps, strides, padding, low, high, dilations, spread, groups, last,
    kernel_last, biased,
):  # fmt: skip
    d, n = spatial(b, x), channels(x, last)
    count = n if groups == "depthwise" else groups
    b.need(count and n % count == 0)
    cut = padding == "explicit" and min(*low, *high) < 0
    b.need(not cut or min(x.shape) > 2)  # XLA aborts where nothing is left, jaxlib 0.10.1
    out = features * count
    extra = f", lhs_dilation={spread[:d]}" if set(spread[:d]) != {1} else ""
    extra += f", rhs_dilation={dilations[:d]}" if set(dilations[:d]) != {1} else ""
    extra += f", feature_group_count={count}" if count != 1 else ""
    text = (
        f"lax.conv_general_dilated({x}, {kernel(b, d, taps, n // count, out, kernel_last)}, "
        f"{strides[:d]}, {pads(padding, d, low, high)}, "
        f"dimension_numbers={numbers(d, last, kernel_last=kernel_last)}{extra})"
    )
    return f"{text} + {_bias(b, out, d, last)}" if biased else text


def _bias(b: Context, n: int, d: int, last: bool) -> str:
    return b.weight(n) if last else b.weight(n, *[1] * d)


@op(features=SIZE, last=LAST, biased=FLAG, as_product=FLAG)
def pointwise(b, x, *, features, last, biased, as_product):
    d, n = spatial(b, x), channels(x, last)
    if as_product:
        letters = "nhwd"[: d + 1]
        ours = f"{letters}c" if last else f"{letters[0]}c{letters[1:]}"
        made = ours.replace("c", "k")
        text = f'jnp.einsum("{ours},ck->{made}", {x}, {b.weight(n, features)})'
    else:
        text = (
            f"lax.conv_general_dilated({x}, {kernel(b, d, (1,) * d, n, features, last)}, "
            f'{(1,) * d}, "VALID", dimension_numbers={numbers(d, last, kernel_last=last)})'
        )
    return f"{text} + {_bias(b, features, d, last)}" if biased else text


@op(
    features=SIZE,
    taps=KERNEL,
    strides=STRIDES,
    padding=Among(("SAME", "VALID")),
    flipped=FLAG,
    last=LAST,
)
def transposed_convolution(b, x, *, features, taps, strides, padding, flipped, last):
    d, n = spatial(b, x), channels(x, last)
    sizes = (features, n) if flipped else (n, features)
    return (
        f"lax.conv_transpose({x}, {kernel(b, d, taps, *sizes, kernel_last=True)}, {strides[:d]}, "
        f'"{padding}", dimension_numbers={numbers(d, last, kernel_last=True)}, '
        f"transpose_kernel={flipped})"
    )


POOLS = {"sum": "0., lax.add", "max": "-jnp.inf, lax.max", "average": "0., lax.add"}


@op(
    kind=Among(("average", "sum", "max")),
    window=Each(3, Among((2, 1, 3, "all"))),
    strides=STRIDES,
    padding=Among(("VALID", "SAME")),
    last=LAST,
)
def pooled(b, x, *, kind, window, strides, padding, last):
    """Windows, up to whole axes; the average counts only what exists."""
    d = spatial(b, x)
    sizes = [n if w == "all" else w for n, w in zip(grid(x, last), window, strict=False)]
    b.need(all(sizes))
    shape, steps = along(x, last, 1, sizes), along(x, last, 1, strides[:d])
    pool = f'lax.reduce_window({{}}, {POOLS[kind]}, {shape}, {steps}, "{padding}")'
    made = f"jnp.ones_like({x})" if padding == "SAME" else None
    text = pool.format(x)
    if kind != "average":
        return text
    return f"{text} / {pool.format(made)}" if made else f"{text} / {math.prod(sizes)}"


UPSAMPLED = ("repeat", "nearest", "broadcast", "linear")


@op(factor=Among((2, 1, 3)), form=Among(UPSAMPLED), last=LAST)
def upsampled(b, x, *, factor, form, last):
    spatial(b, x)
    axes = tuple(range(1, x.ndim - 1)) if last else tuple(range(2, x.ndim))
    into = tuple(n * factor if i in axes else n for i, n in enumerate(x.shape))
    if form in ("nearest", "linear"):
        return f'jax.image.resize({x}, {into}, "{form}")'
    if form == "broadcast":
        shape = tuple(s for i, n in enumerate(x.shape) for s in ((n, 1) if i in axes else (n,)))
        full = tuple(s for i, n in enumerate(x.shape) for s in ((n, factor) if i in axes else (n,)))
        return f"jnp.broadcast_to({x}.reshape({shape}), {full}).reshape({into})"
    text = x.text
    for axis in axes:
        text = f"jnp.repeat({text}, {factor}, {axis})"
    return text


@op(axis=AXIS, factor=Among((2, 1, 3)), by_dilation=FLAG)
def spread_out(b, x, *, axis, factor, by_dilation):
    """Zeros between the entries."""
    at = b.axis(x, axis)
    if by_dilation:
        widths = tuple((0, 0, factor - 1) if i == at else (0, 0, 0) for i in range(x.ndim))
        return f"lax.pad({x}, jnp.zeros((), {x}.dtype), {widths})"
    shape = (*x.shape[: at + 1], factor, *x.shape[at + 1 :])
    mask = f"(jnp.arange({factor}) == 0).reshape({(factor, *[1] * (x.ndim - at - 1))})"
    merged = (*x.shape[:at], x.shape[at] * factor, *x.shape[at + 1 :])
    grown = f"jnp.broadcast_to(jnp.expand_dims({x}, {at + 1}), {shape})"
    return f"({grown} * {mask}).reshape({merged})"


@op(factor=Among((2, 1)), last=LAST)
def channels_to_space(b, x, *, factor, last):
    """Pixel shuffle."""
    d, n = spatial(b, x), channels(x, last)
    r = factor
    b.need(n % r**d == 0)
    sizes, batch, rest = grid(x, last), x.shape[0], n // r**d
    out = tuple(r * s for s in sizes)
    if last:
        shape = (batch, *sizes, *[r] * d, rest)
        order = (0, *(j for i in range(d) for j in (1 + i, 1 + d + i)), 1 + 2 * d)
        return f"{x}.reshape({shape}).transpose({order}).reshape({(batch, *out, rest)})"
    shape = (batch, rest, *[r] * d, *sizes)
    order = (0, 1, *(j for i in range(d) for j in (2 + d + i, 2 + i)))
    return f"{x}.reshape({shape}).transpose({order}).reshape({(batch, rest, *out)})"


@op(factor=Among((2, 1)), last=LAST)
def space_to_channels(b, x, *, factor, last):
    """Patches as channels."""
    d, n, r = spatial(b, x), channels(x, last), factor
    sizes, batch = grid(x, last), x.shape[0]
    b.need(all(s % r == 0 for s in sizes))
    parts = [p for s in sizes for p in (s // r, r)]
    small = tuple(s // r for s in sizes)
    if last:
        order = (0, *range(1, 2 * d, 2), *range(2, 2 * d + 1, 2), 2 * d + 1)
        into = (batch, *small, n * r**d)
        return f"{x}.reshape({(batch, *parts, n)}).transpose({order}).reshape({into})"
    order = (0, 1, *range(3, 2 * d + 2, 2), *range(2, 2 * d + 2, 2))
    into = (batch, n * r**d, *small)
    return f"{x}.reshape({(batch, n, *parts)}).transpose({order}).reshape({into})"


@op(axis=AXIS, taps=Among((3, 1, 2)), mode=Among(("wrap", "edge", "reflect", "constant")))
def padded_and_convolved(b, x, *, axis, taps, mode):
    """A convolution along one axis of rows of any kind, with the padding of its mode."""
    at = b.axis(x, axis)
    low, high = (taps - 1) // 2, taps // 2
    widths = tuple((low, high) if i == at else (0, 0) for i in range(x.ndim))
    moved = f"jnp.moveaxis(jnp.pad({x}, {widths}, mode={mode!r}), {at}, -1)"
    y = f"{b.step.name}_y"
    b.lines.append(f"{y} = {moved}")
    rows = f"{y}.reshape(-1, 1, {x.shape[at] + taps - 1})"
    text = f'lax.conv_general_dilated({rows}, {b.weight(1, 1, taps)}, (1,), "VALID")'
    return f"jnp.moveaxis({text}.reshape(*{y}.shape[:-1], {x.shape[at]}), -1, {at})"


@op(window=Among((2, 1, 3)), axis=AXIS, kind=Among(("sum", "max", "patches")))
def windows(b, x, *, window, axis, kind):
    """Sliding windows by slices."""
    at = b.axis(x, axis)
    b.need(x.shape[at] >= window)
    stop = x.shape[at] - window + 1
    parts = [f"{x}[{':, ' * at}{i}:{i + stop}]" for i in range(window)]
    if kind == "patches":
        return f"jnp.stack([{', '.join(parts)}], -1)"
    return " + ".join(parts) if kind == "sum" else f"jnp.max(jnp.stack([{', '.join(parts)}]), 0)"


@op(last=LAST, hidden=SIZE)
def excited(b, x, *, last, hidden):
    """Squeeze and excitation: channels scaled by what their means say."""
    spatial(b, x)
    axes = tuple(range(1, x.ndim - 1)) if last else tuple(range(2, x.ndim))
    n = channels(x, last)
    y = f"{b.step.name}_y"
    b.lines.append(f"{y} = jax.nn.relu({x}.mean({axes}) @ {b.weight(n, hidden)})")
    b.lines.append(f"{y} = jax.nn.sigmoid({y} @ {b.weight(hidden, n)})")
    shape = (x.shape[0], *[1] * (x.ndim - 2), n) if last else (x.shape[0], n, *[1] * (x.ndim - 2))
    return f"{x} * {y}.reshape({shape})"
