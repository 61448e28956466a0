"""Loops whose bodies are merged: what is formed for them is an input of the loop.

Weights that are the same in every run are loop constants; those of stacked layers are formed for
all layers at once and sliced by the loop.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import jax
from jax import Array, lax

from fcjax import compat
from fcjax.expressions.written import handed_over
from fcjax.merging.ahead import digest
from fcjax.merging.kept import Kept, Merging
from fcjax.running.program import Program
from fcjax.tracing import trace
from fcjax.tracing.trace import Atom, Body, Equation, Kind, Value

__all__ = ["Loop", "OfLoop", "merged_loop"]


@dataclasses.dataclass(frozen=True, eq=False)
class OfLoop:
    """An array that is made once for a loop, for all its runs or for each.

    Attributes:
      value: what it is called outside the loop.
      inner: the merged body, with nothing kept but this array.
      given: what it is made of, by the number of the input of the body: the value outside, and
        whether it is sliced.
      is_sum: whether it is added to a result, as a bias is.
    """

    value: Value
    inner: Merging
    given: Mapping[int, tuple[Value, bool]]
    is_sum: bool

    @property
    def leaves(self) -> list[Value]:
        """The values it is made of."""
        return [value for value, _ in self.given.values()]

    def compute(self, env: Mapping[Any, Array]) -> Array:
        """The array, given those that it is made of."""
        constants = [array for _, array in self.inner.before.constants]
        count = len(self.inner.before.inputs)

        def one(arrays: Mapping[int, Array]) -> Array:
            return self.inner.arrays([arrays.get(i) for i in range(count)], constants)[0]

        arrays = {i: env[value] for i, (value, _) in self.given.items()}
        axes = {i: 0 if sliced else None for i, (_, sliced) in self.given.items()}
        return jax.vmap(one, in_axes=(axes,))(arrays) if 0 in axes.values() else one(arrays)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop with a merged body.

    Attributes:
      equations: what takes the place of the loop.
      constants: arrays that the equations read.
      kept: what is formed for it.
    """

    equations: tuple[Equation, ...]
    constants: tuple[tuple[Value, Any], ...]
    kept: tuple[Kept, ...]


@dataclasses.dataclass(frozen=True)
class _Input:
    """An input of the merged body.

    Attributes:
      atom: what it is outside.
      role: whether it stays the same, is carried, or is a slice.
    """

    atom: Atom
    role: str


def merged_loop(
    equation: Equation,
    known: Mapping[Value, Kind],
    identities: Mapping[Value, str],
    sources: Mapping[Value, frozenset[str]],
    merge: Callable[[Body, Sequence[str], Set[str], Sequence[int]], Merging],
) -> Loop | None:
    """Merges the body of a scan; None if there is nothing to form.

    Args:
      equation: the scan.
      known: what the values outside depend on.
      identities: names of the values outside that are no data.
      sources: what these are made of.
      merge: merges a body whose first inputs are parameters, given their names, the identities of
        those that are kept as they are, and how often each is stored.
    """
    body = trace.flatten(equation.source.params["jaxpr"], trace.INLINED | trace.REMAT)
    handed = {v: _Input(a, role) for v, a, role in handed_over(equation, body)}
    fixed = [v for v, i in handed.items() if i.role != "carry" and _is_fixed(i.atom, known)]
    rest = tuple(v for v in body.inputs if v not in fixed)
    body = dataclasses.replace(body, inputs=(*fixed, *rest))
    outside = [(handed[v].atom, handed[v].role == "slice") for v in fixed]
    given = tuple((a, sliced) for a, sliced in outside if isinstance(a, Value))
    names = [f"{identities[a]} {'slice' if sliced else 'whole'}" for a, sliced in given]
    own = [digest("input", name) for name in names]
    raw = {name for name, (a, _) in zip(own, given, strict=True) if not known[a].invariant}
    runs = equation.source.params["length"]
    inner = merge(body, names, raw, [runs if sliced else 1 for _, sliced in given])
    made = {
        k.value: _kept(k, inner, dict(zip(own, given, strict=True)), sources, runs)
        for k in inner.kept
        if k.value not in handed
    }
    if not made:
        return None
    inputs = [
        handed[v] if v in handed else _Input(made[v].value, _role(made[v], v))
        for v in inner.plan.body.inputs
    ]
    return _rebuilt(equation, inner, inputs, tuple(made.values()))


def _is_fixed(atom: Atom, known: Mapping[Value, Kind]) -> bool:
    return isinstance(atom, Value) and known[atom].of != "data"


def _kept(
    one: Kept, inner: Merging, given: Mapping[str, tuple[Value, bool]],
    sources: Mapping[Value, frozenset[str]], runs: int,
) -> Kept:  # fmt: skip
    """What the body keeps, as something that is kept outside."""
    places = {name: i for i, name in enumerate(given)}
    used = {places[name]: given[name] for name in one.sources if name in places}
    sliced = any(is_slice for _, is_slice in used.values())
    length = (runs,) if sliced else ()
    value = Value(one.value.aval.update(shape=(*length, *one.value.shape)))
    is_sum = one.formed is not None and one.formed.is_sum
    made = OfLoop(value, dataclasses.replace(inner, kept=(one,)), used, is_sum)
    outside = frozenset[str]().union(*(sources.get(v, ()) for v in made.leaves))
    return Kept(value, f"{one.identity} {length}", outside | (one.sources - places.keys()), made)


def _role(kept: Kept, value: Value) -> str:
    return "slice" if len(kept.value.shape) > len(value.shape) else "same"


def _rebuilt(
    equation: Equation, inner: Merging, inputs: Sequence[_Input], kept: tuple[Kept, ...]
) -> Loop:
    """The loop over the merged body, traced into equations."""
    params = equation.source.params
    carried = compat.scan_layout(params)[1]
    constants = [array for _, array in inner.plan.body.constants]
    program = Program(inner.plan)
    roles = [i.role for i in inputs]

    def run(*arrays: Array) -> list[Array]:
        def body(carry: Sequence[Array], xs: Sequence[Array]) -> tuple[list[Array], list[Array]]:
            of = {"carry": iter(carry), "slice": iter(xs), "same": iter(same)}
            outputs = program([next(of[role]) for role in roles], constants, {})
            return outputs[:carried], outputs[carried:]

        start, sliced, same = (
            [x for x, role in zip(arrays, roles, strict=True) if role == wanted]
            for wanted in ("carry", "slice", "same")
        )
        carry, ys = lax.scan(
            body, start, sliced, params["length"], params["reverse"], params["unroll"]
        )
        return [*carry, *ys]

    flat = trace.flatten(jax.make_jaxpr(run)(*(_aval(i.atom) for i in inputs)))
    atoms: dict[Any, Any] = dict(zip(flat.inputs, (i.atom for i in inputs), strict=True))
    made = zip(flat.outputs, equation.outputs, strict=True)
    atoms |= {inside: value for inside, value in made if value is not None}
    return Loop(tuple(_renamed(e, atoms) for e in flat.equations), flat.constants, kept)


def _aval(atom: Atom) -> Any:
    return atom.aval


def _renamed(equation: Equation, atoms: Mapping[Value, Any]) -> Equation:
    inputs = tuple(atoms.get(a, a) if isinstance(a, Value) else a for a in equation.inputs)
    outputs = tuple(None if v is None else atoms.get(v, v) for v in equation.outputs)
    return Equation(equation.source, inputs, outputs)
