"""Attention, look-ups with any row numbers, scatters, and mixtures of experts."""

from __future__ import annotations

from .domains import AXIS, FLAG, SIZE, Among
from .ops_dense import fitted
from .registry import op
from .writing import Array, Context

# --- look-ups ---

LOOKUPS = {
    "index": "{e}[{i}]",
    "take": "jnp.take({e}, {i}, axis=0)",
    "clip": 'jnp.take({e}, {i}, axis=0, mode="clip")',
    "fill": 'jnp.take({e}, {i}, axis=0, mode="fill")',
    "fill 0": 'jnp.take({e}, {i}, axis=0, mode="fill", fill_value=0)',
    "fill 0.5": 'jnp.take({e}, {i}, axis=0, mode="fill", fill_value=0.5)',
    "wrap": 'jnp.take({e}, {i}, axis=0, mode="wrap")',
    "get": "{e}.at[{i}].get()",
    "get clip": '{e}.at[{i}].get(mode="clip")',
    "get fill 0": '{e}.at[{i}].get(mode="fill", fill_value=0)',
    "get fill 0.5": '{e}.at[{i}].get(mode="fill", fill_value=0.5)',
    "get drop": '{e}.at[{i}].get(mode="drop", fill_value=jnp.nan)',
    "in bounds": '{e}.at[jnp.clip({i}, 0, {n} - 1)].get(mode="promise_in_bounds")',
    "modulo": "{e}[{i} % {n}]",
    "not wrapped": '{e}.at[{i}].get(mode="fill", fill_value=0, wrap_negative_indices=False)',
    "one hot": "jax.nn.one_hot({i}, {n}, dtype={t}) @ {e}",
    "columns": "{e}.T[:, {i}]",
    "along": "jnp.take_along_axis({e}, {i}.reshape(-1, 1), axis=0)",
    "along clip": 'jnp.take_along_axis({e}, {i}.reshape(-1, 1), axis=0, mode="clip")',
    "vmap": "jax.vmap(lambda row: {e}[row])({i}.reshape(-1))",
    "slice": "jax.vmap(lambda row: lax.dynamic_slice({e}, (row, 0), (1, {w})))({i}.reshape(-1))",
    "row": "jax.vmap(lambda row: lax.dynamic_index_in_dim({e}, row, 0))({i}.reshape(-1))",
}


@op(rows=Among((3, 4, 1, 2, 5)), width=SIZE, form=Among(tuple(LOOKUPS)))
def looked_up(b, i, *, rows, width, form):
    """Rows of a table of weights."""
    e = b.weight(rows, width)
    return LOOKUPS[form].format(e=e, i=i, n=rows, w=width, t="f64")


@op(form=Among(tuple(LOOKUPS)))
def looked_up_in(b, x, i, *, form):
    """Rows of a value."""
    b.need(x.ndim == 2 and x.shape[0])
    return LOOKUPS[form].format(e=x, i=i, n=x.shape[0], w=x.shape[1], t=x.alias)


@op(axis=AXIS, mode=Among(("clip", "fill", "wrap")))
def taken(b, x, i, *, axis, mode):
    at = b.axis(x, axis)
    return f"jnp.take({x}, {i}, axis={at}, mode={mode!r})"


@op(mode=Among(("", ', mode="clip"', ', mode="fill", fill_value=0')))
def looked_up_by_batch(b, x, i, *, mode):
    """For each entry of the first axis rows of its own."""
    b.need(x.ndim >= 2 and i.ndim >= 1 and x.shape[0] == i.shape[0])
    return f"jax.vmap(lambda rows, at: rows.at[at].get({mode[2:]}))({x}, {i})"


@op(form=Among(("add", "set", "max", "segments", "mul", "vmap")), rows=Among((3, 1, 5)))
def scattered(b, x, i, *, form, rows):
    """Rows added up where row numbers say, as messages in a graph."""
    b.need(x.ndim >= 1 and i.ndim == 1 and i.shape[0] == x.shape[0])
    shape = (rows, *x.shape[1:])
    if form == "segments":
        return f"jax.ops.segment_sum({x}, {i}, {rows})"
    if form == "vmap":
        return f"jax.vmap(lambda row, at: jnp.zeros({shape}).at[at].add(row))({x}, {i}).sum(0)"
    return f"jnp.ones({shape}, {x}.dtype).at[{i}].{form}({x})"


@op(axis=AXIS, size=Among((1, 2)), form=Among(("slice", "update", "index")))
def placed(b, x, i, *, axis, size, form):
    """A part of a value at a computed place, read or written."""
    at = b.axis(x, axis)
    b.need(x.shape[at] >= size and i.size == 1)
    place = f"{i}.reshape(())"
    if form == "index":
        return f"lax.dynamic_index_in_dim({x}, {place}, {at}, keepdims=False)"
    part = f"lax.dynamic_slice_in_dim({x}, {place}, {size}, {at})"
    if form == "slice":
        return part
    return f"lax.dynamic_update_slice_in_dim({x}, 2 * {part}, {place} + 1, {at})"


# --- attention ---


def heads_of(b: Context, x: Array, heads: int, width: int) -> str:
    """x by a map to heads, as (..., heads, positions, width)."""
    w = b.weight(x.shape[-1], heads, width)
    return f'jnp.einsum("...td,dhk->...htk", {x}, {w})'


MASKS = {
    "none": "{s}",
    "causal": "jnp.where(jnp.tril(jnp.ones({s}.shape[-2:], bool)), {s}, -jnp.inf)",
    "finite": "jnp.where(jnp.tril(jnp.ones({s}.shape[-2:], bool)), {s}, -1e30)",
    "strict": "jnp.where(jnp.tril(jnp.ones({s}.shape[-2:], bool), -1), {s}, -jnp.inf)",
    "added": "{s} - 1e9 * (1 - jnp.tril(jnp.ones({s}.shape[-2:])))",
    "local": "jnp.where(apart({t}) < 2, {s}, -1e9)",
    "positions": "{s} - 0.5 * apart({t})",
}  # fmt: skip
SCORES = ("softmax", "relu", "linear", "sigmoid", "two softmaxes")


def attended(b: Context, q: str, k: str, v: str, t: int, width: int, mask: str, kind: str) -> str:
    """The values that the scores mix, as (..., heads, positions, width)."""
    s = f"{b.step.name}_s"
    b.lines.append(f"{s} = {q} @ jnp.swapaxes({k}, -1, -2) / {max(width, 1) ** 0.5:.3g}")
    b.lines.append(f"{s} = {MASKS[mask].format(s=s, t=t)}")
    mixed = {
        "softmax": f"jax.nn.softmax({s}, -1) @ {v}",
        "two softmaxes": f"(jax.nn.softmax({s}, -1) - 0.3 * jax.nn.softmax(0.5 * {s}, -1)) @ {v}",
        "relu": f"jax.nn.relu({s}) @ {v}",
        "linear": f"{s} @ {v}",
        "sigmoid": f"jax.nn.sigmoid({s}) @ {v}",
    }
    return mixed[kind]


@op(
    heads=Among((2, 1, 3)),
    shared=Among((1, 2, 3)),
    width=Among((2, 1, 4, 3)),
    mask=Among(tuple(MASKS)),
    kind=Among(SCORES),
    rope=FLAG,
    normed=FLAG,
    out=Among((True, False)),
)
def attention(b, x, *, heads, shared, width, mask, kind, rope, normed, out):
    """Self-attention; ``shared`` heads of queries read the same keys and values."""
    b.need(x.ndim >= 2 and (not rope or width % 2 == 0))
    b.need(kind != "linear" or "inf" not in MASKS[mask])  # times values: NaN in some orders only
    name, t, n = b.step.name, x.shape[-2], heads * shared
    parts = []
    for letter, count in (("q", n), ("k", heads), ("v", heads)):
        y = f"{name}_{letter}"
        b.lines.append(f"{y} = {heads_of(b, x, count, width)}")
        if normed and letter != "v":
            b.lines.append(f"{y} = {y} * lax.rsqrt(({y} ** 2).mean(-1, keepdims=True) + 0.1)")
        if rope and letter != "v":
            b.lines.append(f"{y} = rotated({y}, jnp.exp(-jnp.arange({width // 2}.)))")
        if letter != "q" and shared > 1:
            b.lines.append(f"{y} = jnp.repeat({y}, {shared}, -3)")
        parts.append(y)
    b.lines.append(f"{name}_o = {attended(b, *parts, t, width, mask, kind)}")
    if not out:
        return f"jnp.swapaxes({name}_o, -3, -2)"
    w = b.weight(n, width, x.shape[-1])
    return f'jnp.einsum("...htk,hkd->...td", {name}_o, {w})'


@op(heads=Among((1, 2)), width=Among((2, 1, 4)), kind=Among(SCORES))
def cross_attention(b, x, y, *, heads, width, kind):
    """x asks, y answers."""
    b.need(x.ndim >= 2 and y.ndim >= 2 and x.shape[:-2] == y.shape[:-2])
    q, k, v = (heads_of(b, a, heads, width) for a in (x, y, y))
    mixed = attended(b, f"({q})", f"({k})", f"({v})", 0, width, "none", kind)
    w = b.weight(heads, width, x.shape[-1])
    return f'jnp.einsum("...htk,hkd->...td", {mixed}, {w})'


@op(heads=Among((2, 1)), width=Among((2, 1)), causal=FLAG)
def fused_attention(b, x, *, heads, width, causal):
    """jax.nn.dot_product_attention of one joint projection."""
    b.need(x.ndim == 3)
    y = f"{b.step.name}_y"
    b.lines.append(
        f'{y} = jnp.einsum("btd,dchk->cbthk", {x}, {b.weight(x.shape[-1], 3, heads, width)})'
    )
    return f"jax.nn.dot_product_attention({y}[0], {y}[1], {y}[2], is_causal={causal})"


@op(width=Among((2, 1, 3)))
def linear_attention(b, x, *, width):
    """Moments of keys and values, which queries read."""
    b.need(x.ndim >= 2)
    q, k, v = (f"({x} @ {b.weight(x.shape[-1], width)})" for _ in range(3))
    return f"{q} @ (jnp.swapaxes({k}, -1, -2) @ {v})"


# --- positions and gates ---


@op()
def positions(b, x):
    """Learned positions."""
    b.need(x.ndim >= 2)
    return f"{x} + {b.weight(*x.shape[-2:])}"


@op(hidden=SIZE, kind=Among(("silu", "gelu", "none")))
def gated(b, x, *, hidden, kind):
    """A gated unit and its output."""
    b.need(x.ndim)
    n, y = x.shape[-1], b.step.name
    gate, value = (f"{x} @ {b.weight(n, hidden)}" for _ in range(2))
    b.lines.append(f"{y}_g = {gate}")
    gate = f"{y}_g" if kind == "none" else f"jax.nn.{kind}({y}_g)"
    return f"({gate} * ({value})) @ {b.weight(hidden, n)}"


@op(experts=Among((2, 3, 1)), width=SIZE, form=Among(("soft", "top", "gather", "scatter")))
def experts(b, x, *, experts, width, form):
    """A mixture of experts, routed in one of four ways."""
    b.need(x.ndim == 2 and x.size)
    n, name = x.shape[-1], b.step.name
    b.lines.append(f"{name}_r = {x} @ {b.weight(n, experts)}")
    w, s = b.weight(experts, n, width), f"{name}_r"
    if form == "soft":
        return f'jnp.einsum("te,td,edk->tk", jax.nn.softmax({s}), {x}, {w})'
    b.lines.append(f"{name}_v, {name}_i = lax.top_k({s}, 1)")
    if form == "top":
        hot = f"jax.nn.one_hot({name}_i[:, 0], {experts}, dtype={x}.dtype)"
        return f'jnp.einsum("te,td,edk->tk", {hot} * {name}_v, {x}, {w})'
    if form == "gather":
        return f'jnp.einsum("td,tdk->tk", {x}, {w}[{name}_i[:, 0]]) * {name}_v'
    slots = f"jnp.zeros(({experts}, *{x}.shape), {x}.dtype)"
    at = f"{name}_i[:, 0], jnp.arange({x.shape[0]})"
    b.lines.append(f"{name}_s = {slots}.at[{at}].set({x})")
    return f"({name}_s @ {w})[{at}] * {name}_v"


@op(groups=Among((2, 1, 3)), width=SIZE)
def ragged(b, x, *, groups, width):
    """Experts by ``ragged_dot``: the rows of a value in groups of different sizes."""
    b.need(x.ndim == 2 and x.size and width)
    sizes = [x.shape[0] // groups] * (groups - 1)
    sizes = [*sizes, x.shape[0] - sum(sizes)]
    w = b.weight(groups, x.shape[-1], width)
    return f"lax.ragged_dot({x}, {w}, jnp.array({sizes}))"


# --- recurrences ---


@op(axis=AXIS, form=Among(("associative", "cumulative", "convolution")))
def recurrent(b, x, *, axis, form):
    """A linear recurrence with a decay of its own for each channel."""
    at = b.axis(x, axis)
    b.need(x.ndim >= 2)
    decay = f"jax.nn.sigmoid({b.weight(x.shape[-1])})"
    if form == "associative":
        return f"linear_recurrence(jnp.broadcast_to({decay}, {x.shape}), {x}, {at})"
    if form == "cumulative":
        return f"jnp.cumsum({x} * {decay}, {at})"
    t = x.shape[at]
    b.need(at == x.ndim - 2)
    powers = f"jnp.tril({decay}[:, None, None] ** apart({t}))"
    return f'jnp.einsum("dts,...sd->...td", {powers}, {x})'


@op(width=SIZE)
def state_space(b, x, *, width):
    """A layer whose decays depend on the input, by ``associative_scan`` over positions."""
    b.need(x.ndim >= 2)
    n = x.shape[-1]
    decay = f"jax.nn.sigmoid({x} @ {b.weight(n, width)})"
    value = f"{x} @ {b.weight(n, width)}"
    return f"linear_recurrence({decay}, {value}, {x.ndim - 2})"


@op(shape_like=FLAG)
def refitted(b, x, y, *, shape_like):
    """x in the shape of y, by whatever dense map that takes."""
    b.need(x.floats and y.floats and x.size * y.size <= 2000)
    text = fitted(b, x, y.shape)
    return f"{text} + {y}" if shape_like else text
