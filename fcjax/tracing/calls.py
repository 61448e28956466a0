"""The arguments of one call of a network."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fcjax import compat
from fcjax.numbers.drawing import Draw, apart, settled
from fcjax.numbers.interpreter import Interpreter, Unevaluated
from fcjax.numbers.periodic import Numbers
from fcjax.tracing import axes
from fcjax.tracing.trace import Value

__all__ = ["Call", "Calls"]

NUMBERS = (int, float, complex)
"""Python numbers that are data; a bool is a flag, which may be compared by ``is``."""
INTEGERS = (-3, 13)
"""At which Python's arithmetic is compared too: its powers are fractions, and never too large."""
CLOSE = 1e-6
"""By how much, relative to their size, results may be off by rounding."""


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of a call, arrays apart from what is fixed while tracing.

    Attributes:
      arrays: the array arguments in flattening order.
      static: the structure and everything in it that is no array.
    """

    arrays: tuple[Any, ...]
    static: tuple[Any, tuple[Any, ...]]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """Tells arrays (or shapes that stand for them) from everything else."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = (Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
        return cls._marked(structure, leaves, [isinstance(x, arrays) for x in leaves])

    @classmethod
    def _marked(cls, structure: Any, leaves: Sequence[Any], is_array: Sequence[bool]) -> "Call":
        marked = tuple((a, None if a else x) for x, a in zip(leaves, is_array, strict=True))
        arrays = tuple(x for x, a in zip(leaves, is_array, strict=True) if a)
        return cls(arrays, (structure, marked))

    @property
    def is_symbolic(self) -> bool:
        """Whether any size is a symbol, as for ``jax.export``."""
        return any(jax.export.is_symbolic_dim(size) for x in self.arrays for size in x.shape)

    @property
    def shapes(self) -> "Call":
        """The call with shapes in the place of arrays."""
        arrays = (
            jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=jax.typeof(x).weak_type)
            for x in self.arrays
        )
        return dataclasses.replace(self, arrays=tuple(arrays))

    @property
    def key(self) -> Hashable:
        """Equal for calls that trace alike."""
        return tuple(map(jax.typeof, self.arrays)), self.static

    @property
    def numbers(self) -> frozenset[int]:
        """The places, among all leaves, of Python numbers."""
        _, marked = self.static
        return frozenset(
            i for i, (is_array, x) in enumerate(marked) if not is_array and _is_number(x)
        )

    def with_arrays_at(self, places: Iterable[int]) -> "Call":
        """The call with the Python numbers at some places as weakly typed arrays, as in ``jit``."""
        structure, marked = self.static
        given, places = iter(self.arrays), frozenset(places)
        leaves = [next(given) if is_array else x for is_array, x in marked]
        leaves = [jnp.asarray(x) if i in places else x for i, x in enumerate(leaves)]
        return self._marked(
            structure, leaves, [a or i in places for i, (a, _) in enumerate(marked)]
        )

    def with_other_ints(self, places: Iterable[int]) -> Iterator["Call"]:
        """The call with other integers in the place of some Python integers, if there are any."""
        structure, marked = self.static
        ints = frozenset(i for i in places if type(marked[i][1]) is int)
        for other in INTEGERS if ints else ():
            leaves = tuple((a, other if i in ints else x) for i, (a, x) in enumerate(marked))
            yield dataclasses.replace(self, static=(structure, leaves))

    def rebuild(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other arrays in place of ``self.arrays``."""
        structure, marked = self.static
        given = iter(arrays)
        return jax.tree.unflatten(structure, [next(given) if a else x for a, x in marked])

    def bind(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn(first, *args, **kwargs)`` as a function of ``first`` and the array arguments."""

        def bound(first: Any, *arrays: Any) -> Any:
            args, kwargs = self.rebuild(arrays)
            return fn(first, *args, **kwargs)

        return bound

    def flattened(self, fn: Callable[..., Any], structure: Any) -> Callable[..., Any]:
        """``bind(fn)`` as a function of the leaves of ``first``, a pytree of this structure."""
        bound, count = self.bind(fn), structure.num_leaves

        def flat(*inputs: Any) -> Any:
            return bound(jax.tree.unflatten(structure, inputs[:count]), *inputs[count:])

        return flat


def _is_number(x: Any) -> bool:
    if type(x) is int:
        limits = jnp.iinfo(jnp.result_type(int))
        return bool(limits.min <= x <= limits.max)
    return type(x) in NUMBERS


# --- Python numbers -----------------------------------------------------------------------------


class Calls:
    """The calls of one network, and which of their Python numbers are data.

    All are, as for ``jax.jit``, so that another value needs no other plan: except those that the
    network needs as they are, because it branches on them, makes shapes of them or asks for their
    type. Those are found by tracing: with arrays in their place it fails, or returns other shapes,
    dtypes or values, or has a loop of unknown length, which has no derivative.
    """

    def __init__(self, apply_fn: Callable[..., Any], structure: Any, avals: Sequence[Any]) -> None:
        self._apply_fn = apply_fn
        self._structure = structure
        self._avals = avals
        self._needed: dict[Hashable, frozenset[int]] = {}
        self._settled: set[Hashable] = set()

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call, its Python numbers among the arrays as far as they are data."""
        given = Call.of(args, kwargs)
        numbers = given.numbers
        if not numbers:
            return given
        every = given.with_arrays_at(numbers)
        kind = every.key
        needed = self._needed.get(kind, frozenset())
        call = given.with_arrays_at(numbers - needed) if needed else every
        if call.key not in self._settled:
            call = given.with_arrays_at(self._data(given, numbers - needed))
            self._needed[kind] = call.numbers
            self._settled.add(call.key)
        return call

    def _data(self, given: Call, candidates: frozenset[int]) -> frozenset[int]:
        """Those of the candidates that may be arrays, together."""
        written = self._traced(given)
        if written is None:  # whoever traces it next says what is wrong
            return frozenset()
        if self._is_same(written, given, candidates):
            return candidates
        taken = frozenset[int]()
        for number in sorted(candidates):
            if self._is_same(written, given, taken | {number}):
                taken |= {number}
        return taken

    def _is_same(self, written: "_Traced", given: Call, places: frozenset[int]) -> bool:
        """Whether the network is the same with arrays in the place of some numbers."""
        made = self._traced(given.with_arrays_at(places))
        if made is None or made.kind != written.kind:
            return False
        if made.loops:
            return True
        others = [(self._traced(other), other) for other in given.with_other_ints(places)]
        pairs = [(written, given), *((w, o) for w, o in others if w and w.kind == written.kind)]
        return all(_agree(w, made, self._inputs(call, places)) for w, call in pairs)

    def _inputs(self, given: Call, places: frozenset[int]) -> list[Any]:
        """For each input of the network the number that is one; None for arrays."""
        _, marked = given.static
        among = [x if i in places else None for i, (a, x) in enumerate(marked) if a or i in places]
        return [None] * len(self._avals) + among

    def _traced(self, call: Call) -> "_Traced | None":
        """What must not depend on whether numbers are arrays; None if the call fails to trace."""
        flat = call.flattened(self._apply_fn, self._structure)
        try:
            jaxpr, shapes, _ = axes.make_jaxpr(flat, [*self._avals, *call.arrays], anywhere=True)
        except Exception:  # of any kind: apply_fn is the user's
            return None
        results, structure = jax.tree.flatten(shapes)
        loops = _loops(jaxpr)
        kind = structure, tuple((x.shape, x.dtype) for x in results), loops
        return _Traced(jaxpr, kind, loops)


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A network as traced: its equations, what it returns, and how many loops of unknown length."""

    jaxpr: Any
    kind: Hashable
    loops: int


def _agree(written: _Traced, made: _Traced, inputs: Sequence[Any]) -> bool:
    """Whether two networks compute the same, on random numbers.

    They do not if the network asks for the type of a number.

    Args:
      written: the network with numbers.
      made: the network with arrays in their place.
      inputs: for each input of the latter its number; None for an array.
    """
    variables = [Value(v.aval) for v in compat.open_jaxpr(made.jaxpr)[0].invars]

    def holds(draw: Draw) -> bool:
        interpreter = Interpreter(draw.run)
        pairs = list(zip(variables, inputs, strict=True))
        arrays = [draw(v) if x is None else np.asarray(x, v.aval.dtype) for v, x in pairs]
        others = [array for array, (_, x) in zip(arrays, pairs, strict=True) if x is None]
        results = (
            interpreter.evaluate(written.jaxpr, others),
            interpreter.evaluate(made.jaxpr, arrays),
        )
        numbers = [(a, b) for a, b in zip(*results, strict=True) if isinstance(a, Numbers)]
        return all(apart(a, b)[0] <= CLOSE for a, b in numbers)

    try:
        return bool(settled(holds))
    except Unevaluated:
        return True


def _loops(jaxpr: Any) -> int:
    """The number of loops of unknown length."""
    equations = compat.open_jaxpr(jaxpr)[0].eqns
    inside = (body for eqn in equations for body in compat.inner_jaxprs(eqn))
    return sum(eqn.primitive.name == "while" for eqn in equations) + sum(map(_loops, inside))
