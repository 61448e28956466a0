"""Which parameters stand before the final layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from fcjax import compat
from fcjax.tracing import trace
from fcjax.tracing.trace import Body, Equation, Kind, Value

__all__ = ["hidden_leaves"]

LAYERS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"})
PRODUCTS = LAYERS | {"mul", "div"}
"""What multiplies each entry counts too: a gain is a layer."""


def hidden_leaves(body: Body, kinds: Sequence[Kind], count: int) -> list[int]:
    """The numbers of the trainable parameters that stand before the final layer.

    These are the ones that anything behind them multiplies with further parameters, in loops and
    branches too. Where the network multiplies two parameters with each other the first stands
    before the second; a parameter that only scales another one is part of its layer.

    Args:
      body: the network; its first ``count`` inputs are the parameters.
      kinds: what each of its inputs is.
      count: the number of parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> kinds = [Kind("param", True), Kind("param", True), Kind("data", False)]
      >>> jaxpr = jax.make_jaxpr(lambda v, w, x: jnp.tanh(x @ v) @ w)(*[jnp.eye(2)] * 3)
      >>> hidden_leaves(trace.flatten(jaxpr), kinds, 2)
      [0]
    """
    made = [
        _Made(frozenset([i] if i < count and kind.trainable else []), kind.of == "data")
        for i, kind in enumerate(kinds)
    ]
    before: set[int] = set()
    _walk(body, made, before)
    return sorted(before)


@dataclasses.dataclass(frozen=True)
class _Made:
    """What a value is made of.

    Attributes:
      leaves: the trainable parameters.
      data: whether anything else has a part in it that is not known before training.
    """

    leaves: frozenset[int] = frozenset()
    data: bool = False

    def __or__(self, other: _Made) -> _Made:
        return _Made(self.leaves | other.leaves, self.data or other.data)


def _together(made: Sequence[_Made]) -> _Made:
    return _Made(frozenset().union(*(m.leaves for m in made)), any(m.data for m in made))


def _walk(body: Body, inputs: Sequence[_Made], before: set[int]) -> list[_Made]:
    """What the results of a body are made of; notes what stands before something else."""
    known = dict(zip(body.inputs, inputs, strict=True))

    def read(atom: Any) -> _Made:
        return known.get(atom, _Made()) if isinstance(atom, Value) else _Made()

    for equation in body.equations:
        operands = [read(atom) for atom in equation.inputs]
        if equation.name in PRODUCTS:
            before |= _multiplied(equation, *operands[:2])
        results = _results(equation, operands, before)
        known.update((v, m) for v, m in zip(equation.outputs, results, strict=True) if v)
    return [read(atom) for atom in body.outputs]


def _multiplied(equation: Equation, one: _Made, other: _Made) -> frozenset[int]:
    """The parameters that a product puts further ones behind."""
    if one.data and other.leaves and not other.data:
        return one.leaves
    if other.data and one.leaves and not one.data and equation.name != "div":
        return other.leaves
    if one.data or other.data or not other.leaves:
        return frozenset()
    if equation.name in LAYERS:
        return one.leaves
    shapes = {atom.aval.shape for atom in equation.inputs[:2]}  # type: ignore[union-attr]
    return one.leaves - other.leaves if len(shapes) == 1 else frozenset()


def _results(equation: Equation, operands: list[_Made], before: set[int]) -> list[_Made]:
    found = [
        _last_turn(inner, operands[first:], carried, before)
        for inner, first, carried in _bodies(equation)
    ]
    if not found:
        return [_together(operands)] * len(equation.outputs)
    return [_together(results) for results in zip(*found, strict=True)]


def _last_turn(body: Body, inputs: list[_Made], carried: slice, before: set[int]) -> list[_Made]:
    """What the results of a body are made of once it has run as often as changes anything."""
    while True:
        results = _walk(body, inputs, before)
        state = inputs[carried]
        again = [a | b for a, b in zip(state, results[: len(state)], strict=True)]
        if again == state:
            return results
        inputs = [*inputs[: carried.start], *again, *inputs[carried.stop :]]


def _bodies(equation: Equation) -> Iterator[tuple[Body, int, slice]]:
    """The bodies inside an equation, from which operand on they begin, and what they carry."""
    params = equation.source.params
    if equation.name == "scan":
        consts, carry = compat.scan_layout(params)
        if params["length"]:
            carried = slice(consts, consts + carry if params["length"] > 1 else consts)
            yield trace.flatten(params["jaxpr"]), 0, carried
    elif equation.name == "while":
        first, consts = params["cond_nconsts"], params["body_nconsts"]
        carried = slice(consts, len(equation.inputs) - first)
        yield trace.flatten(params["body_jaxpr"]), first, carried
    elif equation.name == "cond":
        for branch in params["branches"]:
            yield trace.flatten(branch), 1, slice(0, 0)
    else:
        for jaxpr in params.values():
            inputs = getattr(compat.open_jaxpr(jaxpr)[0], "invars", None)
            if inputs is not None and len(inputs) == len(equation.inputs):
                yield trace.flatten(jaxpr), 0, slice(0, 0)
                return
