"""What each jax primitive does to expressions: one small rule a primitive, in one registry.

A rule takes the expressions of the operands (None where an operand is no float array) and the
equation, and returns the expression of its output. It raises ``Unrepresentable`` where the result
is no sum of einsum terms; a primitive without a rule is a boundary, never a guess.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from fcjax.compat import JaxprEqn, Literal
from fcjax.expressions import algebra, layout, like_terms, windowed
from fcjax.expressions.terms import Expr, Unrepresentable
from fcjax.registry import registering

__all__ = ["RULES", "VIEWS", "has_precision", "precision_of", "register"]

Rule = Callable[[Sequence[Expr], JaxprEqn], Expr | list[Expr]]
RULES: dict[str, Rule] = {}
VIEWS = frozenset(
    {"reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "split", "copy",
     "copy_p", "convert_element_type", "pad"}
)  # fmt: skip
"""Primitives that only look at their operand differently, so that nothing is gained by a cut."""


register = registering(RULES, "rule")


def _number(atom: Any) -> float | None:
    """The value of a scalar known while tracing, else None."""
    if isinstance(atom, Literal) and not getattr(atom.val, "shape", ()):
        return float(atom.val)
    return None


@register("add", "add_any")
def _add(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    return algebra.add(*_same_shape(operands))


@register("sub")
def _sub(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    a, b = _same_shape(operands)
    return algebra.add(a, algebra.scale(b, -1.0))


@register("neg")
def _neg(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    return algebra.scale(operands[0], -1.0)


@register("mul")
def _mul(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    for atom, other in zip(eqn.invars, reversed(operands), strict=True):
        number = _number(atom)
        if number is not None:
            return algebra.scale(other, number)
    return algebra.multiply(*_same_shape(operands))


@register("div")
def _div(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    number = _number(eqn.invars[1])
    if number is None or number == 0.0:
        raise Unrepresentable("a quotient by something that is no constant")
    return algebra.scale(operands[0], 1.0 / number)


@register("square")
def _square(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    return algebra.multiply(operands[0], operands[0])


@register("integer_pow")
def _integer_pow(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    power = eqn.params["y"]
    if not 1 <= power <= 4:
        raise Unrepresentable(f"a power of {power}")
    result = operands[0]
    for _ in range(power - 1):
        result = algebra.multiply(result, operands[0])
    return result


def _same_shape(operands: Sequence[Expr]) -> tuple[Expr, Expr]:
    """Repeats axes of size 1 and scalars, as arithmetic in jax does."""
    a, b = operands
    rank = max(len(a.dims), len(b.dims))
    shape = tuple(map(max, *((1,) * (rank - len(e.dims)) + e.shape for e in (a, b))))
    wide = [layout.broadcast(e, shape, range(rank - len(e.dims), rank)) for e in (a, b)]
    return wide[0], wide[1]


@register("reshape", "squeeze", "expand_dims")
def _reshape(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    if eqn.params.get("dimensions") is not None and eqn.primitive.name == "reshape":
        raise Unrepresentable("a reshape that also transposes")
    shape: Sequence[int] = eqn.params.get("new_sizes") or eqn.outvars[0].aval.shape  # type: ignore[attr-defined]
    return layout.reshape(operands[0], shape)


@register("transpose")
def _transpose(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    return layout.transpose(operands[0], eqn.params["permutation"])


@register("broadcast_in_dim")
def _broadcast_in_dim(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    return layout.broadcast(operands[0], eqn.params["shape"], eqn.params["broadcast_dimensions"])


@register("convert_element_type")
def _convert(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    if _is_zero(operands[0]):  # an integer in the source, such as what jnp.pad pads with
        return dataclasses.replace(operands[0], dtype=eqn.params["new_dtype"])
    return layout.cast(operands[0], eqn.params["new_dtype"])


@register("copy", "copy_p")
def _copy(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    return operands[0]


@register("slice")
def _slice(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    result = operands[0]
    strides = eqn.params["strides"] or (1,) * len(result.dims)
    views = zip(eqn.params["start_indices"], eqn.params["limit_indices"], strides, strict=True)
    for axis, (start, limit, stride) in enumerate(views):
        result = windowed.slice_axis(result, axis, start, limit, stride)
    return result


@register("split")
def _split(operands: Sequence[Expr], eqn: JaxprEqn) -> list[Expr]:
    ends = list(itertools.accumulate(eqn.params["sizes"]))
    axis = eqn.params["axis"]
    return [
        windowed.slice_axis(operands[0], axis, end - size, end)
        for size, end in zip(eqn.params["sizes"], ends, strict=True)
    ]


@register("concatenate")
def _concatenate(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    return windowed.concatenate(operands, eqn.params["dimension"])


@register("reduce_sum")
def _reduce_sum(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    return algebra.reduce_sum(operands[0], eqn.params["axes"])


@register("dot_general")
def _dot_general(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    contracting, batch = eqn.params["dimension_numbers"]
    lhs, rhs = _of_one_dtype(operands, eqn)
    result = algebra.contract(lhs, rhs, contracting, batch)
    return like_terms.at_least(result, precision_of(eqn))


def _of_one_dtype(operands: Sequence[Expr], eqn: JaxprEqn) -> list[Expr]:
    """The operands of a product in its dtype: jax also multiplies narrow weights with wide data."""
    made: Any = eqn.outvars[0].aval
    floats = all(jnp.issubdtype(operand.dtype, jnp.floating) for operand in operands)
    if not floats or not all(layout.holds(made.dtype, operand.dtype) for operand in operands):
        raise Unrepresentable("a product that accumulates in another dtype")
    return [layout.cast(operand, made.dtype) for operand in operands]


def has_precision(eqn: JaxprEqn) -> bool:
    """Whether a product says how precise it is by ``lax.Precision``, not by an algorithm."""
    asked = eqn.params.get("precision")
    return asked is None or all(isinstance(p, lax.Precision) for p in _pair_of(asked))


def precision_of(eqn: JaxprEqn) -> lax.Precision | None:
    """The precision that a product asks for, the higher one if it asks for two."""
    asked = eqn.params.get("precision")
    if not has_precision(eqn):
        raise Unrepresentable(f"a product with the algorithm {asked}")
    return None if asked is None else max(_pair_of(asked), key=lambda p: p.value)


def _pair_of(asked: Any) -> tuple[Any, ...]:
    return asked if isinstance(asked, tuple) else (asked,)


# --- windows ------------------------------------------------------------------------------------


def _is_zero(expr: Expr) -> bool:
    return all(term.scale == 0.0 for term in expr.terms)


@register("conv_general_dilated")
def _convolution(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    """Unfolds the axes of space, then contracts taps and channels with the kernel."""
    specs = eqn.params["dimension_numbers"]
    rows, kernel = map(layout.transpose, _of_one_dtype(operands, eqn), specs[:2])
    rows, groups = _grouped(rows, eqn)
    count = rows.shape[0]
    out, channels, *taps = kernel.shape
    kernel = layout.reshape(kernel, (groups, out // groups, channels, *taps))
    places: Sequence[int] = [eqn.outvars[0].aval.shape[i] for i in specs[2][2:]]  # type: ignore[attr-defined]
    for axis, made in enumerate(places):
        rows = windowed.unfold(
            rows, 3 + axis, made, taps[axis],
            spread=eqn.params["lhs_dilation"][axis], stride=eqn.params["window_strides"][axis],
            dilation=eqn.params["rhs_dilation"][axis], offset=-eqn.params["padding"][axis][0],
        )  # fmt: skip
    n = len(places)
    summed = ((2, *range(3 + n, 3 + 2 * n)), (2, *range(3, 3 + n)))
    made_of = algebra.contract(rows, kernel, summed, ((1,), (0,)))  # groups, count, *places, out
    made_of = layout.transpose(made_of, (1, 0, 2 + n, *range(2, 2 + n)))
    result = layout.reshape(made_of, (count, out, *places))
    result = layout.transpose(result, [specs[2].index(i) for i in range(2 + n)])
    return like_terms.at_least(result, precision_of(eqn))


def _grouped(rows: Expr, eqn: JaxprEqn) -> tuple[Expr, int]:
    """Rows of shape ``(count, groups, channels, *space)``, grouped by channels or by examples."""
    groups, of_examples = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
    count, channels, *space = rows.shape
    if of_examples == 1:
        return layout.reshape(rows, (count, groups, channels // groups, *space)), groups
    rows = layout.reshape(rows, (of_examples, count // of_examples, channels, *space))
    return layout.transpose(rows, (1, 0, *range(2, len(rows.dims)))), of_examples


@register("reduce_window_sum")
def _pooled(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    result = operands[0]
    rank = len(result.dims)
    for axis, made in enumerate(eqn.outvars[0].aval.shape):  # type: ignore[attr-defined]
        result = windowed.unfold(
            result, axis, made, eqn.params["window_dimensions"][axis],
            spread=eqn.params["base_dilation"][axis], stride=eqn.params["window_strides"][axis],
            dilation=eqn.params["window_dilation"][axis], offset=-eqn.params["padding"][axis][0],
        )  # fmt: skip
    return algebra.reduce_sum(result, range(rank, 2 * rank))


@register("pad")
def _pad(operands: Sequence[Expr], eqn: JaxprEqn) -> Expr:
    if not _is_zero(operands[1]):
        raise Unrepresentable("padding with something else than zeros")
    result = operands[0]
    sizes: Sequence[int] = eqn.outvars[0].aval.shape  # type: ignore[attr-defined]
    for axis, (low, _, inside) in enumerate(eqn.params["padding_config"]):
        result = windowed.unfold(
            result, axis, sizes[axis], 1, spread=1 + int(inside), offset=-int(low)
        )
    return layout.reshape(result, sizes)
