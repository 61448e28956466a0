"""Functions inside a network: loops, branches, checkpoints, vmap; each calls steps of its own."""

from __future__ import annotations

import dataclasses

from .domains import AXIS, FLAG, Among
from .ops_dense import fitted
from .registry import op
from .writing import Array, Context

COUNT = Among((2, 1, 3, 0))


def same(x: Array):
    """Returns what a function makes in the shape and type of its argument."""

    def returned(b: Context, y: Array) -> str:
        b.need(y.floats and x.floats and y.size * x.size <= 2000)
        text = fitted(b, y, x.shape)
        return f"({text}).astype({x.alias})" if y.dtype != x.dtype or "@" in text else text

    return returned


def row(b: Context, x: Array, axis: int) -> Array:
    """An entry of x along an axis."""
    at = b.axis(x, axis)
    return dataclasses.replace(x, shape=x.shape[:at] + x.shape[at + 1 :])


@op(kind=Among(("checkpoint", "jit", "named_call")))
def called(b, x, *, kind):
    """Steps inside a function of their own."""
    inner = b.function(x)
    wrap = {"checkpoint": "jax.checkpoint", "jit": "jax.jit", "named_call": "jax.named_call"}
    return f"{wrap[kind]}({inner.name})({x})"


@op(axis=AXIS, out=AXIS, members=FLAG)
def mapped(b, x, *, axis, out, members):
    """vmap over any axis, with or without weights of its own for each entry."""
    at = b.axis(x, axis)
    b.need(x.shape[at])
    inner = b.function(row(b, x, axis), stack=x.shape[at] if members else None)
    if members:
        return f"jax.vmap({inner.name}, ({at}, 0))({x}, {inner.stack})"
    return f"jax.vmap({inner.name}, {at}, {0 if out == -1 else out})({x})"


SYNCHRONISED = (
    'h - lax.pmean(h, "i")', 'h * lax.rsqrt(lax.pmean(h**2, "i") + 0.1)', 'lax.psum(h, "i") + h',
    'lax.all_gather(h, "i").sum(0)',
)  # fmt: skip


@op(axis=AXIS, form=Among(SYNCHRONISED))
def synchronised(b, x, *, axis, form):
    """Statistics over a mapped axis by its name."""
    at = b.axis(x, axis)
    b.need(x.shape[at])
    return f'jax.vmap(lambda h: {form}, {at}, {at}, axis_name="i")({x})'


@op(width=Among((2, 1, 3)))
def ensemble(b, x, *, width):
    """vmap over weights alone."""
    inner = b.function(x, stack=width)
    return f"jax.vmap({inner.name}, (None, 0))({x}, {inner.stack})"


@op(batches=Among((0, 1, 2)))
def microbatched(b, x, *, batches):
    """lax.map over the first axis."""
    inner = b.function(row(b, x, 0))
    size = f", batch_size={batches}" if batches else ""
    return f"lax.map({inner.name}, {x}{size})"


@op(count=COUNT, stacked=Among((True, False)), unroll=Among((1, 2)))
def layers(b, x, *, count, stacked, unroll):
    """A scan over layers."""
    first = "" if stacked else "_"
    given = dataclasses.replace(x)
    inner = b.function(
        given, returns=lambda c, y: f"{same(x)(c, y)}, None", stack=count if stacked else None
    )
    if stacked:
        return f"lax.scan({inner.name}, {x}, {inner.stack}, {count}, unroll={unroll})[0]"
    wrapped = f"lambda h{first}, _: {inner.name}(h{first})"
    return f"lax.scan({wrapped}, {x}, None, {count}, unroll={unroll})[0]"


@op(axis=Among((0,)), reverse=FLAG, keeps=Among((True, False)))
def over_time(b, x, *, axis, reverse, keeps):
    """A recurrent network over the first axis; its state is added to the input."""
    b.need(x.ndim >= 1 and x.shape[axis])
    at = row(b, x, 0)
    name = f"{b.step.name}_h"
    inner = b.function(at, returns=same(at))
    step = f"lambda h, x: (({inner.name}(h + x),) * 2)"
    b.lines.append(f"{name}, {name}s = lax.scan({step}, 0 * {x}[0], {x}, reverse={reverse})")
    return f"{name}s" if keeps else f"1.0 * {name}"


@op(count=COUNT, form=Among(("fori", "while", "dynamic")))
def loop(b, x, *, count, form):
    inner = b.function(x, returns=same(x))
    if form == "fori":
        return f"lax.fori_loop(0, {count}, lambda _, h: {inner.name}(h), {x})"
    bound = f"{count}" if form == "while" else f"{count} + ({x}.sum() > 0)"
    condition = f"lambda s: s[0] < {bound}"
    return f"lax.while_loop({condition}, lambda s: (s[0] + 1, {inner.name}(s[1])), (0, {x}))[1]"


@op(form=Among(("cond", "switch", "select")), of=Among(("sum", "true", "false")))
def branched(b, x, *, form, of):
    """Two functions, one of which is taken."""
    left = b.function(x, returns=same(x))
    right = b.function(x, returns=same(x))
    test = {"sum": f"{x}.sum() > 0", "true": "True", "false": "False"}[of]
    if form == "cond":
        return f"lax.cond({test}, {left.name}, {right.name}, {x})"
    if form == "switch":
        return f"lax.switch(({test}) * 1, [{left.name}, {right.name}], {x})"
    return f"jnp.where({test}, {left.name}({x}), {right.name}({x}))"


@op(scale=Among(("", "0.5 * ")))
def residual(b, x, *, scale):
    """A block beside an identity."""
    inner = b.function(x, returns=same(x))
    return f"{x} + {scale}{inner.name}({x})"


@op()
def called_twice(b, x):
    """One function with the same weights, called on its own result."""
    inner = b.function(x, returns=same(x))
    return f"{inner.name}({inner.name}({x}))"
