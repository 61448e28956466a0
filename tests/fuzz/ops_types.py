"""Types, casts, complex numbers, integers, effects, and derivatives that are not JAX's own."""

from __future__ import annotations

from .domains import AXIS, FLAG, SIZE, Among
from .dtypes import alias
from .registry import op

FLOATS = Among(("float64", "float32", "bfloat16", "float16"))


@op(dtype=FLOATS)
def cast(b, x, *, dtype):
    b.need(x.floats and "complex" not in str(x.dtype))
    return f"{x}.astype({alias(dtype)})"


QUANTISED = (
    "quantised({x})", "quantised({x}, jnp.float32)", "quantised({x}, jnp.float16)",
    "quantised({x}, jnp.float8_e4m3fn)", "lax.reduce_precision({x}, 8, 4)",
    "{x} + lax.stop_gradient(quantised({x}) - {x})", "quantised({x}, jnp.int8)",
)  # fmt: skip


@op(form=Among(QUANTISED))
def rounded(b, x, *, form):
    """Fake quantisation of a value."""
    b.need(x.floats and "complex" not in str(x.dtype))
    return form.format(x=x)


@op(width=SIZE, form=Among(QUANTISED))
def dense_rounded(b, x, *, width, form):
    """Two layers with fake quantisation of their weights."""
    b.need(x.ndim)
    w, v = b.weight(x.shape[-1], width), b.weight(width, 2)
    return f"{x} @ {form.format(x=w)} @ {form.format(x=v)}"


COMPLEX = (
    "{x} + 1j * jnp.roll({x}, 1)", "jnp.real({x})", "jnp.imag({x})", "jnp.abs({x}) ** 2",
    "jnp.conj({x})", "jnp.fft.fft({x})", "jnp.fft.ifft({x}).real", "jnp.fft.rfft({x})",
    "lax.complex({x}, {x})", "{x} * 1j", "{x} * (1 + 0.5j)", "jnp.angle({x} + 2)",
)  # fmt: skip


@op(form=Among(COMPLEX))
def complexed(b, x, *, form):
    b.need(x.ndim)
    return form.format(x=x)


STOPPED = (
    "lax.stop_gradient({x})", "{x} - lax.stop_gradient({x})", "straight_through({x})",
    "reversed_gradient({x})", "doubled_tangent({x})", "{x} + lax.stop_gradient(0.5 * {x})",
    "lax.optimization_barrier({x})",
)  # fmt: skip


@op(form=Among(STOPPED))
def own_derivative(b, x, *, form):
    return form.format(x=x)


@op(width=SIZE)
def dense_clipped(b, x, *, width):
    """A layer with a custom backward pass."""
    b.need(x.ndim >= 1)
    return f"clipped_gradient({x}, {b.weight(x.shape[-1], width)})"


EFFECTS = {
    "print": 'jax.debug.print("{{}}", {x}.sum())',
    "ordered": 'jax.debug.print("{{}}", {x}.sum(), ordered=True)',
    "callback": "jax.debug.callback(lambda _: None, {x})",
    "io": "io_callback(lambda _: None, None, {x})",
}
CALLBACKS = {
    "pure": "jax.pure_callback(lambda v: v, lax.stop_gradient({x}), lax.stop_gradient({x}))",
}


@op(kind=Among(tuple(EFFECTS)))
def effect(b, x, *, kind):
    """Something that is seen outside of the network."""
    b.lines.append(EFFECTS[kind].format(x=x))
    return f"1.0 * {x}"


@op()
def computed_outside(b, x):
    return CALLBACKS["pure"].format(x=x)


INTEGERS = (
    "{x} * {i}", "{x} + {i}", "{x} - {i}", "{x} / ({i} ** 2 + 1)", "jnp.where({i} > 0, {x}, 0)",
    "jnp.where({i} > 0, {x}, -{x})", "{x} * ({i} == 1)", "{x} ** ({i} ** 2)",
)  # fmt: skip


@op(form=Among(INTEGERS))
def with_integers(b, x, i, *, form):
    b.need(x.floats)
    return form.format(x=x, i=i)


BOOLEANS = (
    "jnp.where({m}, {x}, 0)",
    "{x} * {m}",
    "jnp.where({m}, {x}, 1)",
    "jnp.where({m}, {x}, jnp.inf)",
)


@op(form=Among(BOOLEANS))
def with_flags(b, x, m, *, form):
    b.need(x.floats)
    return form.format(x=x, m=m)


NUMBERED = (
    "{x} * {n}", "{x} + {n}", "{x} / ({n} + 2)", "{n} - {x}", "{x} * jnp.asarray({n})",
    "{x} * jnp.sin({n})", "jnp.where({n} > 0, {x}, 0)",
)  # fmt: skip


@op(form=Among(NUMBERED))
def with_number(b, x, n, *, form):
    b.need(x.floats)
    return form.format(x=x, n=n)


@op(axis=AXIS, empty=FLAG)
def emptied(b, x, *, axis, empty):
    """No entries along an axis, or one; joined with x again if it has none."""
    at = b.axis(x, axis)
    return f"{x}[{':, ' * at}:{0 if empty else 1}]"


@op(axis=AXIS)
def joined_with_nothing(b, x, *, axis):
    at = b.axis(x, axis)
    return f"jnp.concatenate([{x}[{':, ' * at}:0], {x}, {x}[{':, ' * at}:0]], {at})"


@op(kind=Among(("float", "int", "bool", "argmax", "sign", "compare")))
def discrete(b, x, *, kind):
    """Numbers without a derivative."""
    b.need(x.floats and x.ndim)
    texts = {
        "float": "jnp.floor({x})",
        "int": "jnp.floor({x}).astype(i32)",
        "bool": "{x} > 0",
        "argmax": "jnp.argmax({x}, -1)",
        "sign": "jnp.sign({x})",
        "compare": "({x} > 0).astype(f32)",
    }
    return texts[kind].format(x=x)
