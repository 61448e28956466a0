"""How results scale: arithmetic, maxima, sums and products.

Positive homogeneity of each primitive, as facts (see ``scaling``); a product of two scaling arrays
scales by both, which makes squared activations and gated units come out by themselves.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from fcjax.laws.scaling import ONE, Axis, Reading, boundary, needed, register, result, shape_of
from fcjax.laws.scaling_views import drop
from fcjax.rules.fold import is_relu
from fcjax.tracing.trace import Atom, Body, Equation, Value

__all__ = ["read"]


def read(body: Body, fixed: Iterable[Value], data: Iterable[Value]) -> Reading:
    """The facts of all equations that the results need.

    Args:
      body: the network.
      fixed: inputs that do not scale: data, and parameters that are not trained.
      data: the inputs that are data.
    """
    reading = Reading(data)
    reading.start()
    for value in fixed:
        reading.zero_all(value)
    reading.constants(body)
    results = [a for a in body.outputs if isinstance(a, Value)]
    for equation in needed(body, results):
        reading.apply(equation)
    reading.start()
    for value in results:
        reading.zero_all(reading.named(value))
    return reading


# --- elementwise --------------------------------------------------------------------------------


def _sum_like(reading: Reading, made: Value, operands: Sequence[Atom], *, strong: bool) -> None:
    """The result scales as every operand does; an operand that is zero scales as it likes."""
    operands = [atom for atom in operands if not reading.is_zero(atom)]
    if not operands:
        reading.zeros.add(made)
    for atom in operands:
        shape = shape_of(atom)
        for axis, size in enumerate(made.shape):
            own = axis - len(made.shape) + len(shape)
            if own >= 0 and isinstance(atom, Value) and shape[own] == size:
                reading.same((made, axis), (atom, own), strong=strong)
            else:
                reading.zero((made, axis))
                if own >= 0 and isinstance(atom, Value):
                    reading.zero((atom, own))


def _product_like(reading: Reading, made: Value, operands: Sequence[tuple[Atom, Fraction]]) -> None:
    """The result scales by the product of its operands' factors, each to a power."""
    if any(reading.is_zero(atom) for atom, power in operands if power > 0):
        reading.zeros.add(made)
        return
    for axis, size in enumerate(made.shape):
        factors: dict[Axis, Fraction] = {}
        for atom, power in operands:
            own = axis - len(made.shape) + len(shape_of(atom))
            if not isinstance(atom, Value) or own < 0:
                continue
            if atom.shape[own] != size or (atom, own) in reading.level:
                reading.zero((atom, own))
            else:
                factors[atom, own] = factors.get((atom, own), Fraction(0)) + power
        if factors:
            strong = list(factors.values()) == [ONE]
            reading.relate([((made, axis), -ONE), *factors.items()], strong=strong)
        else:
            reading.zero((made, axis))
            reading.level.add((made, axis))


@register("add", "add_any", "sub")
def _add(reading: Reading, equation: Equation) -> None:
    _sum_like(reading, result(equation), equation.inputs, strong=True)


@register("max", "min")
def _max(reading: Reading, equation: Equation) -> None:
    _sum_like(reading, result(equation), equation.inputs, strong=False)


@register("select_n")
def _select(reading: Reading, equation: Equation) -> None:
    _sum_like(reading, result(equation), equation.inputs[1:], strong=False)


@register("gt", "ge", "lt", "le", "eq", "ne")
def _compare(reading: Reading, equation: Equation) -> None:
    compared = Value(jax.ShapeDtypeStruct(result(equation).shape, float))
    _sum_like(reading, compared, equation.inputs, strong=False)
    for atom in equation.inputs:
        reading.touch(atom)


@register("sign")
def _sign(reading: Reading, equation: Equation) -> None:
    reading.touch(equation.inputs[0])
    reading.zero_all(result(equation))


@register("mul")
def _mul(reading: Reading, equation: Equation) -> None:
    _product_like(reading, result(equation), [(atom, ONE) for atom in equation.inputs])


@register("div")
def _div(reading: Reading, equation: Equation) -> None:
    above, below = equation.inputs
    _product_like(reading, result(equation), [(above, ONE), (below, -ONE)])


POWERS = {"square": Fraction(2), "sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2),
          "cbrt": Fraction(1, 3)}  # fmt: skip


@register(*POWERS)
def _root(reading: Reading, equation: Equation) -> None:
    _product_like(reading, result(equation), [(equation.inputs[0], POWERS[equation.name])])


@register("integer_pow")
def _integer_pow(reading: Reading, equation: Equation) -> None:
    power = Fraction(equation.source.params["y"])
    _product_like(reading, result(equation), [(equation.inputs[0], power)])


@register("pow")
def _pow(reading: Reading, equation: Equation) -> None:
    base, power = equation.inputs
    if isinstance(power, Value):
        boundary(reading, equation)
    else:
        _product_like(reading, result(equation), [(base, Fraction(float(power.val)))])


@register("abs")
def _abs(reading: Reading, equation: Equation) -> None:
    _sum_like(reading, result(equation), equation.inputs, strong=False)


@register("neg", "copy", "copy_p", "name", "reduce_precision")
def _identity(reading: Reading, equation: Equation) -> None:
    _sum_like(reading, result(equation), equation.inputs, strong=True)


@register("convert_element_type")
def _convert(reading: Reading, equation: Equation) -> None:
    (taken,) = equation.source.invars
    before: Any = taken.aval
    numbers = all(jnp.issubdtype(a.dtype, jnp.floating) for a in (before, result(equation).aval))
    if numbers or before.dtype == jnp.bool_ or reading.is_zero(equation.inputs[0]):
        _identity(reading, equation)
    else:
        boundary(reading, equation)


@register("custom_jvp_call")
def _custom(reading: Reading, equation: Equation) -> None:
    if is_relu(equation):
        _sum_like(reading, result(equation), equation.inputs, strong=False)
    else:
        boundary(reading, equation)


# --- sums and maxima ----------------------------------------------------------------------------


@register("reduce_sum", "reduce_max", "reduce_min")
def _reduce(reading: Reading, equation: Equation) -> None:
    taken, made = equation.inputs[0], result(equation)
    if not isinstance(taken, Value):
        reading.zero_all(made)
        return
    gone = equation.source.params["axes"]
    kept = [axis for axis in range(len(taken.shape)) if axis not in gone]
    for new, old in enumerate(kept):
        reading.same((made, new), (taken, old), strong=equation.name == "reduce_sum")
    drop(reading, taken, kept)


@register("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _reduce_window(reading: Reading, equation: Equation) -> None:
    taken, made, params = equation.inputs[0], result(equation), equation.source.params
    if not isinstance(taken, Value):
        reading.zero_all(made)
        return
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    for axis in range(len(made.shape)):
        alone = all(params[name][axis] == 1 for name in names)
        if alone and tuple(params["padding"][axis]) == (0, 0):
            strong = equation.name == "reduce_window_sum"
            reading.same((made, axis), (taken, axis), strong=strong)
        else:
            reading.zero((made, axis), (taken, axis))


# --- products -----------------------------------------------------------------------------------


@register("dot_general")
def _dot_general(reading: Reading, equation: Equation) -> None:
    (lhs, rhs), made = equation.inputs, result(equation)
    if not isinstance(lhs, Value) or not isinstance(rhs, Value):
        boundary(reading, equation)
        return
    (of_lhs, of_rhs), (with_lhs, with_rhs) = equation.source.params["dimension_numbers"]
    for a, b in zip(of_lhs, of_rhs, strict=True):
        reading.relate([((lhs, a), ONE), ((rhs, b), ONE)], strong=True)
    for axis, (a, b) in enumerate(zip(with_lhs, with_rhs, strict=True)):
        terms = [((made, axis), -ONE), ((lhs, a), ONE), ((rhs, b), ONE)]
        reading.relate(terms, strong=False)
    free = [(lhs, k) for k in range(len(lhs.shape)) if k not in (*of_lhs, *with_lhs)]
    free += [(rhs, k) for k in range(len(rhs.shape)) if k not in (*of_rhs, *with_rhs)]
    for axis, source in enumerate(free, len(with_lhs)):
        reading.same((made, axis), source)


@register("conv_general_dilated")
def _conv(reading: Reading, equation: Equation) -> None:
    (lhs, rhs), made, params = equation.inputs, result(equation), equation.source.params
    groups = params["feature_group_count"]
    if params["batch_group_count"] != 1 or not isinstance(lhs, Value) or not isinstance(rhs, Value):
        boundary(reading, equation)
        return
    dims = params["dimension_numbers"]
    channels = [
        (lhs, dims.lhs_spec[1]), (rhs, dims.rhs_spec[0]), (made, dims.out_spec[1])
    ]  # fmt: skip
    if groups > 1:
        channels = [_grouped(reading, value, axis, groups) for value, axis in channels]
    _convolve(reading, channels, dims, groups)


def _grouped(reading: Reading, value: Value, axis: int, groups: int) -> Axis:
    """The array with its channels split into groups; the axis that numbers the groups."""
    shape = list(value.shape)
    shape[axis : axis + 1] = [groups, shape[axis] // groups]
    inner = Value(jax.ShapeDtypeStruct(tuple(shape), value.aval.dtype))
    if value in reading.data:
        reading.data.add(inner)
    for k in range(len(value.shape)):
        if k != axis:
            reading.same((inner, k + (k > axis)), (value, k))
    if shape[axis + 1] == 1:
        reading.zero((inner, axis + 1))
        reading.same((inner, axis), (value, axis))
    else:
        reading.factor((value, axis), [(inner, axis), (inner, axis + 1)])
    return inner, axis


def _convolve(reading: Reading, channels: Sequence[Axis], dims: Any, groups: int) -> None:
    """What a convolution does, on arrays whose channels are split if there are groups."""
    split = groups > 1
    (lhs, of_lhs), (rhs, of_rhs), (made, of_made) = channels

    def moved(axis: int, channel: int) -> int:
        return axis + (split and axis > channel)

    if split:
        reading.start()
        terms = [((made, of_made), -ONE), ((lhs, of_lhs), ONE), ((rhs, of_rhs), ONE)]
        reading.relate(terms, strong=False)
    inputs = (lhs, of_lhs + split), (rhs, moved(dims.rhs_spec[1], of_rhs))
    reading.relate([(axis, ONE) for axis in inputs], strong=True)
    reading.same((made, of_made + split), (rhs, of_rhs + split))
    reading.same((made, moved(dims.out_spec[0], of_made)), (lhs, moved(dims.lhs_spec[0], of_lhs)))
    for value, spec, channel in ((lhs, dims.lhs_spec, of_lhs), (rhs, dims.rhs_spec, of_rhs),
                                 (made, dims.out_spec, of_made)):  # fmt: skip
        reading.zero(*((value, moved(axis, channel)) for axis in spec[2:]))
