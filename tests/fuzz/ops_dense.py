"""Dense layers, in the forms in which networks write them, and arithmetic between values."""

from __future__ import annotations

import math
import re

from .domains import AXES, AXIS, FLAG, SIZE, Among
from .registry import op
from .writing import Array, Context

LETTERS = "abcdefgh"


def swapped(letters: str, at: int, new: str) -> str:
    return letters[:at] + new + letters[at + 1 :]


PRODUCTS = {
    "matmul": "{x} @ {w}",
    "dot": "jnp.dot({x}, {w})",
    "einsum": 'jnp.einsum("...a,ab->...b", {x}, {w})',
    "tensordot": "jnp.tensordot({x}, {w}, 1)",
    "highest": 'jnp.matmul({x}, {w}, precision="highest")',
}


@op(width=SIZE, form=Among(tuple(PRODUCTS)), bias=FLAG)
def dense(b, x, *, width, form, bias):
    b.need(x.ndim)
    text = PRODUCTS[form].format(x=x, w=b.weight(x.shape[-1], width))
    return f"{text} + {b.weight(width)}" if bias else text


@op(width=SIZE)
def dense_transposed(b, x, *, width):
    b.need(x.ndim)
    return f"{x} @ {b.weight(width, x.shape[-1])}.T"


@op()
def vector(b, x):
    """A head with one output and no axis for it."""
    b.need(x.ndim)
    return f"{x} @ {b.weight(x.shape[-1])}"


@op(axis=AXIS, width=SIZE, left=FLAG)
def dense_over(b, x, *, axis, width, left):
    """A layer over any axis."""
    at, letters = b.axis(x, axis), LETTERS[: x.ndim]
    shape = (width, x.shape[at]) if left else (x.shape[at], width)
    weight = f"z{letters[at]}" if left else f"{letters[at]}z"
    into = swapped(letters, at, "z")
    return f'jnp.einsum("{letters},{weight}->{into}", {x}, {b.weight(*shape)})'


@op(axis=AXIS, width=SIZE)
def dense_moved(b, x, *, axis, width):
    at = b.axis(x, axis)
    product = f"jnp.tensordot({x}, {b.weight(x.shape[at], width)}, ({at}, 0))"
    return f"jnp.moveaxis({product}, -1, {at})"


@op(width=SIZE, heads=SIZE)
def dense_general(b, x, *, width, heads):
    b.need(x.ndim)
    return f"jnp.tensordot({x}, {b.weight(x.shape[-1], heads, width)}, 1)"


@op(width=SIZE, count=Among((2, 3)))
def dense_joint(b, x, *, width, count):
    """Sums over several axes at once."""
    b.need(x.ndim >= count)
    return f"jnp.tensordot({x}, {b.weight(*x.shape[-count:], width)}, {count})"


@op(width=SIZE)
def dense_each(b, x, *, width):
    """Weights of its own for each entry of an axis."""
    b.need(x.ndim >= 2)
    return f'jnp.einsum("...ab,abc->...ac", {x}, {b.weight(*x.shape[-2:], width)})'


COMPOSED = {
    "(a @ c)": ("nm", "mk"),
    "a @ c": ("nm", "mk"),
    "(a + c)": ("nk", "nk"),
    "a @ c + {x} @ d": ("nm", "mk", "nk"),
    "(a * c)": ("nk", "k"),
    "(a * c)@ d": ("nm", "m", "mk"),
    "(a / jnp.sqrt(1 + (a**2).sum(0)))": ("nk",),
    "(a - a.mean(0))": ("nk",),
    "a @ a.T": ("nm",),
    "a @ a.T @ c": ("nm", "nk"),
    "jnp.concatenate([a, c], 1)": ("nm", "nk"),
    "jnp.concatenate([a, a], 1)": ("nk",),
    "jnp.stack([a, c], 1).sum(1)": ("nk", "nk"),
    "a[:, ::2]": ("nk",),
    "a[::-1]": ("nk",),
    "jnp.tril(a)": ("nk",),
    "jnp.diag(a)": ("n",),
    "jnp.outer(a, c)": ("n", "k"),
    "jnp.kron(a, c)": ("n1", "1k"),
    "jnp.exp(a)": ("nk",),
    "(a @ c) @ (d @ e)": ("nm", "mk", "kk", "kn"),
    "jnp.where(a > 0, a, 0)": ("nk",),
    "jnp.roll(a, 1, 0)": ("nk",),
    "jnp.linalg.solve(jnp.eye({n}) + a @ a.T, c)": ("nm", "nk"),
    "jnp.cumsum(a, 0)": ("nk",),
    "a.at[0].set(0)": ("nk",),
    "a.reshape({n}, -1)": ("nmk",),
}


@op(width=SIZE, inner=SIZE, form=Among(tuple(COMPOSED)))
def dense_composed(b, x, *, width, inner, form):
    """A matrix that is made of several weights."""
    b.need(x.ndim)
    sizes = {"n": x.shape[-1], "k": width, "m": inner, "1": 1}
    weights = {
        name: b.weight(*(sizes[s] for s in shape))
        for name, shape in zip("acde", COMPOSED[form], strict=False)
    }
    text = form.format(x=x, n=x.shape[-1])
    alone = r"(?<![\w.\"])[acde](?![\w\"])"
    return f"{x} @ " + re.sub(alone, lambda found: weights[found.group()], text)


def against(x: Array, bits: int) -> tuple[int, ...]:
    """A shape that broadcasts against x: full on some axes, one on the others."""
    kept = [n if bits >> (x.ndim - 1 - i) & 1 else 1 for i, n in enumerate(x.shape)]
    while kept and not bits >> (len(kept) - 1) & 1:
        kept.pop(0)
    return tuple(kept)


@op(on=AXES, negative=FLAG)
def bias(b, x, *, on, negative):
    return f"{x} {'-' if negative else '+'} {b.weight(*against(x, on))}"


@op(on=AXES)
def gain(b, x, *, on):
    return f"{x} * {b.weight(*against(x, on))}"


@op(on=AXES)
def gain_twice(b, x, *, on):
    """Two gains that a network only reads through their product."""
    first, second = b.weight(*against(x, on)), b.weight(*against(x, on))
    return f"{x} * {first} * {second}"


@op(on=AXES)
def divided(b, x, *, on):
    return f"{x} / (1 + {b.weight(*against(x, on))} ** 2)"


@op(form=Among(("{} * {}", "{1} * jnp.exp({0})", "{1} + {0}", "{1} * jax.nn.sigmoid({0})")))
def scalar(b, x, *, form):
    """A weight without axes."""
    return form.format(b.weight(), x)


SCALES = (
    "-{}", "2.0 * {}", "{} / 3.0", "{} * 2", "{} / 4", "1.5 + {}", "1 - {}", "0.5 * {}", "{} + 0",
    "{} * 0.0", "jnp.negative({})", "{} * jnp.sqrt(2.0)", "{} * np.float32(0.1)", "{} / 1",
    "{} * jnp.ones(())", "+{}",
)  # fmt: skip


@op(by=Among(SCALES))
def scaled(b, x, *, by):
    b.need(x.floats)
    return by.format(x)


SUMS = ("{} + {}", "{} - {}", "2 * {} + 0.5 * {}", "{0} + 0.1 * ({1} - {0})", "({} + {}) / 2")


@op(form=Among(SUMS))
def added(b, x, y, *, form):
    b.need(x.floats and y.floats)
    return form.format(x, y)


@op()
def multiplied(b, x, y):
    b.need(x.floats and y.floats)
    return f"{x} * {y}"


@op(turned=FLAG)
def matmul(b, x, y, *, turned):
    b.need(x.ndim >= 1 and y.ndim >= 1 + turned)
    return f"{x} @ jnp.swapaxes({y}, -1, -2)" if turned else f"{x} @ {y}"


@op(axis=AXIS)
def contracted(b, x, y, *, axis):
    """A product of two activations over one axis of both, all others kept apart."""
    at = b.axis(x, axis)
    b.need(x.ndim + y.ndim <= 6 and y.ndim and x.shape[at] == y.shape[-1])
    ours, theirs = LETTERS[: x.ndim], "uvwyz"[: y.ndim - 1] + LETTERS[at]
    out = (ours + theirs).replace(LETTERS[at], "")
    return f'jnp.einsum("{ours},{theirs}->{out}", {x}, {y})'


@op(axis=AXIS, form=Among(("concatenate", "stack")))
def joined(b, x, y, *, axis, form):
    at = b.axis(x, axis)
    return f"jnp.{form}([{x}, {y}], {at})"


@op(width=SIZE)
def outer(b, x, *, width):
    """A new axis, by a weight for each of its entries."""
    return f"{x}[..., None] * {b.weight(width)}"


ACTIVATIONS = {
    "tanh": "jnp.tanh({x})",
    "relu": "jax.nn.relu({x})",
    "sin": "jnp.sin({x})",
    "square": "{x} ** 2",
    "gelu": "jax.nn.gelu({x})",
    "silu": "jax.nn.silu({x})",
    "abs": "jnp.abs({x})",
    "sigmoid": "jax.nn.sigmoid({x})",
    "leaky": "jax.nn.leaky_relu({x}, 0.2)",
    "maximum": "jnp.maximum({x}, 0)",
    "where": "jnp.where({x} > 0, {x}, 0)",
    "clip": "jnp.clip({x}, -1, 1)",
    "itself": "{x} * {x}",
    "bump": "jnp.exp(-({x} ** 2))",
    "softplus": "jax.nn.softplus({x})",
    "softmax": "jax.nn.softmax({x}, -1)",
    "sorted": "jnp.sort({x}, -1)",
    "cumsum": "jnp.cumsum({x}, -1)",
    "cumprod": "jnp.cumprod({x}, -1)",
    "logsumexp": "jax.nn.logsumexp({x}, -1, keepdims=True)",
    "triangle": "jnp.triu({x})",
}


@op(kind=Among(tuple(ACTIVATIONS)))
def activation(b, x, *, kind):
    b.need(x.floats)
    return ACTIVATIONS[kind].format(x=x)


HOMOGENEOUS = ("relu", "abs", "leaky", "maximum", "where", "square", "itself")


@op(kind=Among(HOMOGENEOUS))
def homogeneous(b, x, *, kind):
    return ACTIVATIONS[kind].format(x=x)


def fitted(b: Context, x: Array, shape: tuple[int, ...]) -> str:
    """x in another shape, by a dense map if it has another one."""
    if x.shape == shape:
        return x.text
    if x.shape[:-1] == shape[:-1] and x.ndim:
        return f"{x} @ {b.weight(x.shape[-1], shape[-1])}"
    return f"({x}.reshape(-1) @ {b.weight(x.size, math.prod(shape))}).reshape({shape})"
