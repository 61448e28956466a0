"""Which weights stand in front of a layer, from the equations as JAX traces them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from fcjax import compat

LAYERS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")

Taint = frozenset[tuple[str, bool]]
"""The weights that a value depends on, and whether by an earlier run of a loop; "" is data."""


def in_front(f: Any, p: dict[str, Any], args: tuple[Any, ...], trained: set[str]) -> set[str]:
    """The trained weights that something behind them multiplies by further trained weights."""
    arrays = [a for a in args if hasattr(a, "dtype")]

    def call(p: Any, arrays: Any) -> Any:
        given = iter(arrays)
        return f(p, *(next(given) if hasattr(a, "dtype") else a for a in args))

    jaxpr = jax.make_jaxpr(call)(p, arrays).jaxpr
    taints = [frozenset({(name, False)} if name in trained else ()) for name in sorted(p)]
    found: set[str] = set()
    _walk(jaxpr, [*taints, *[frozenset({("", False)})] * len(arrays)], found)
    return found


def _walk(jaxpr: Jaxpr, taints: list[Taint], found: set[str]) -> list[Taint]:
    known: dict[Any, Taint] = dict(zip(jaxpr.invars, taints, strict=True))
    read = lambda v: frozenset() if isinstance(v, Literal) else known.get(v, frozenset())  # noqa: E731
    for eqn in jaxpr.eqns:
        given = [read(v) for v in eqn.invars]
        made = _equation(eqn, given, found)
        known.update(zip(eqn.outvars, made, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _equation(eqn: Any, given: list[Taint], found: set[str]) -> list[Taint]:
    together = frozenset().union(*given)
    for inner in _bodies(eqn):
        if len(inner.invars) <= len(given):
            operands = given[len(given) - len(inner.invars) :]
            made = _walk(inner, operands, found)
            if again := _next_run(eqn, operands, made):
                made += _walk(inner, again, found)
            if eqn.primitive.name == "scan":
                together = frozenset()  # what a loop carries may be forgotten by its body
            together |= frozenset().union(*made)
    if eqn.primitive.name in (*LAYERS, "mul"):
        _product(eqn.primitive.name, given, found)
    return [together] * len(eqn.outvars)


def _next_run(eqn: Any, operands: list[Taint], made: list[Taint]) -> list[Taint]:
    """The operands of a loop's second run, which reads what the first has made."""
    if eqn.primitive.name == "scan" and eqn.params["length"] > 1:
        begin, count = compat.scan_layout(eqn.params)
    elif eqn.primitive.name == "while":
        begin, count = eqn.params["body_nconsts"], len(made)
    else:
        return []
    earlier = (frozenset((name, name != "") for name, _ in taint) for taint in made[:count])
    carried = [a | b for a, b in zip(operands[begin:], earlier, strict=False)]
    return [*operands[:begin], *carried, *operands[begin + len(carried) :]]


def _product(name: str, given: list[Taint], found: set[str]) -> None:
    for one, other in (given[:2], given[1::-1]):
        of_weights = other and ("", False) not in other
        if of_weights and (("", False) in one or name in LAYERS):
            found.update(n for n, _ in one - other if n)


def _bodies(eqn: Any) -> Iterator[Jaxpr]:
    if eqn.params.get("length") == 0:
        return  # a loop that never runs multiplies nothing
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (ClosedJaxpr, Jaxpr)):
                yield getattr(item, "jaxpr", item)
