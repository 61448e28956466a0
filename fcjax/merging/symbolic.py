"""Programs whose sizes are symbols, as ``jax.export`` asks for, from programs for numbers.

A network is merged for sizes that are numbers. So it is merged for three choices of them, and what
differs between the three programs is written in terms of the symbols:

    shapes ``(211, 16)``, ``(308, 16)``, ``(426, 16)``  are  ``(b, 16)``,

and a number such as 1/211, of a mean, is ``1 / b``. If anything else differs, or no such formula
is found, it is an error.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcjax import compat
from fcjax.errors import FrontContributionError
from fcjax.expressions.primitives import VIEWS
from fcjax.merging import ahead
from fcjax.tracing import trace
from fcjax.tracing.calls import Call
from fcjax.tracing.repeats import KNOWN

__all__ = ["EVEN", "NUMBERS", "Sizes", "check_path", "check_results", "run"]

NUMBERS = ((211, 41), (308, 91), (426, 133))
"""Sizes of the first symbol, and by how much those of further ones are larger; they leave different
remainders, so that no formula fits them by chance."""
EVEN = ((240, 48), (336, 144), (528, 240))
"""The same where many numbers divide all of them, for a network that divides them."""
UNCOUNTED = KNOWN | VIEWS | {"dim_as_value", "dynamic_slice", "gather", "clamp", "not", "or"}
"""Primitives that sizes and what is read at places are computed with."""


class Sizes:
    """Symbols, and three numbers for each of them.

    Attributes:
      symbols: the symbols by name.
      choices: for each of three choices, the number for every name.
      known: the sizes that the network has, by their values, of which no two have the same.
    """

    def __init__(self, call: Call, numbers: Sequence[tuple[int, int]], jaxpr: Any) -> None:
        dims = [d for x in call.arrays for d in x.shape if jax.export.is_symbolic_dim(d)]
        if compat.are_constrained(dims):  # numbers may not fulfil them
            raise FrontContributionError(
                "a merged network is exported for symbolic sizes without constraints; export it "
                "once for each size"
            )
        self.symbols = compat.symbols(dims)
        self.choices = [
            {name: first + k * more for k, name in enumerate(self.symbols)}
            for first, more in numbers
        ]
        self.known: dict[tuple[int, ...], Any] = {}
        for dim in _dims(jaxpr):
            values = self.values(dim)
            same = self.known.setdefault(values, dim)
            if str(same) != str(dim) or len(set(values)) == 1:  # for these numbers alone
                raise _differ([same, dim])

    def values(self, size: Any) -> tuple[int, ...]:
        """What a size is for each choice."""
        return tuple(compat.evaluated(size, choice) for choice in self.choices)

    def calls(self, call: Call) -> list[Call]:
        """The call with numbers in the place of symbols, for each choice."""
        return [
            dataclasses.replace(call, arrays=tuple(_with_numbers(x, c) for x in call.shapes.arrays))
            for c in self.choices
        ]

    def size(self, found: Sequence[int]) -> Any:
        """The size that takes these values: one of the network, or a multiple plus a constant."""
        if len(set(found)) == 1:
            return found[0]
        if tuple(found) in self.known:
            return self.known[tuple(found)]
        for powers, counts in self._products((0, 1, 2)):
            steps = counts[0] - counts[1]
            by = (found[0] - found[1]) // steps if steps else 0
            plus = found[0] - by * counts[0]
            if all(by * n + plus == v for n, v in zip(counts, found, strict=True)):
                return by * _product(self.symbols.values(), powers) + plus
        raise _differ(found)

    def number(self, found: Sequence[float], dtype: Any) -> Any:
        """The number that takes these values: a constant times powers of symbols, or a size."""
        values, close = np.asarray(found, float), 4 * float(jnp.finfo(dtype).eps)
        for powers, counts in self._products((-2, -1, -0.5, 0, 0.5, 1, 2)):
            each = values / np.asarray(counts)
            if np.allclose(each, each[0], rtol=close, atol=0.0):
                return each[0] * _product(self.symbols.values(), powers)
        for power in (1, -1):
            whole = np.rint(values**power)
            if np.allclose(values**power, whole, rtol=close, atol=0.0):
                return jnp.asarray(self.size([*map(int, whole)]), float) ** power
        raise _differ(found)

    def _products(self, powers: Sequence[float]) -> Iterator[tuple[tuple[float, ...], list[Any]]]:
        """Powers for each symbol, small ones first, and the values of their product."""
        every = itertools.product(powers, repeat=len(self.symbols))
        for chosen in sorted(every, key=lambda ps: sum(map(abs, ps))):
            yield chosen, [_product(c.values(), chosen) for c in self.choices]


def _dims(found: Any) -> Iterator[Any]:
    """The symbolic sizes in a jaxpr, or in what a parameter of an equation is."""
    if isinstance(found, (compat.Jaxpr, compat.ClosedJaxpr)):
        body, _ = compat.open_jaxpr(found)
        for equation in body.eqns:
            avals: list[Any] = [v.aval for v in (*equation.invars, *equation.outvars)]
            yield from _dims([aval.shape for aval in avals])
            yield from _dims(list(equation.params.values()))
    elif isinstance(found, (tuple, list)):
        yield from itertools.chain.from_iterable(map(_dims, found))
    elif jax.export.is_symbolic_dim(found):
        yield found


def _with_numbers(array: Any, numbers: dict[str, int]) -> jax.ShapeDtypeStruct:
    return array.update(shape=tuple(compat.evaluated(d, numbers) for d in array.shape))


def _product(sizes: Any, powers: Sequence[float]) -> Any:
    """A product of powers; an array if these of symbols are no whole ones above 0."""
    made: Any = 1
    for size, power in zip(sizes, powers, strict=True):
        if isinstance(size, int) or (isinstance(power, int) and power >= 0):
            made = made * size**power
        else:
            made = made * jnp.asarray(size, float) ** power
    return made


def _differ(found: Sequence[Any]) -> FrontContributionError:
    return FrontContributionError(
        f"the merged network depends on a symbolic size in a way that is not understood "
        f"({found[0]}, {found[1]}, ... for different sizes); export it once for each size"
    )


# --- programs -----------------------------------------------------------------------------------


def run(sizes: Sizes, jaxprs: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """What programs that differ in nothing but their sizes return for arrays of symbolic sizes.

    Args:
      sizes: the symbols.
      jaxprs: the program for each choice of numbers.
      values: its inputs.

    Raises:
      FrontContributionError: if anything differs that is no simple function of the symbols, or if
        jax does not take the program with them.
    """
    try:
        return _run(sizes, jaxprs, values)
    except FrontContributionError:
        raise
    except Exception as error:
        raise FrontContributionError(
            "jax does not take the merged network with symbolic sizes "
            f"({type(error).__name__}: {error}); export it once for each size"
        ) from error


def _run(sizes: Sizes, jaxprs: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    opened = [compat.open_jaxpr(jaxpr) for jaxpr in jaxprs]
    (first, *_) = bodies = [body for body, _ in opened]
    consts = [_same(sizes, each) for each in _together([list(c) for _, c in opened])]
    env = dict(zip((*first.constvars, *first.invars), (*consts, *values), strict=True))

    def read(atoms: Sequence[Any]) -> Any:
        return _number(sizes, atoms) if isinstance(atoms[0], compat.Literal) else env[atoms[0]]

    for equations in _together([body.eqns for body in bodies]):
        operands = [read(atoms) for atoms in _together([e.invars for e in equations])]
        made = _bound(sizes, equations, operands)
        env.update(zip(equations[0].outvars, made, strict=True))
    return [read(atoms) for atoms in _together([body.outvars for body in bodies])]


def _together(found: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """The first of each, the second of each, and so on."""
    if len({len(each) for each in found}) > 1:
        raise _differ(found)
    return zip(*found, strict=True)


def _number(sizes: Sizes, atoms: Sequence[compat.Literal]) -> Any:
    """A number that is written into the programs."""
    values = [a.val for a in atoms]
    if all(np.array_equal(v, values[0], equal_nan=True) for v in values):
        return values[0]
    dtype = atoms[0].aval.dtype  # type: ignore[attr-defined]
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(sizes.size([*map(int, values)]), dtype)
    return jnp.asarray(sizes.number(values, dtype), dtype)


def _bound(
    sizes: Sizes, equations: Sequence[compat.JaxprEqn], operands: Sequence[Any]
) -> list[Any]:
    (first, *_) = equations
    if len({e.primitive.name for e in equations}) > 1:
        raise _differ(equations)
    inner = [trace.inlinable(e) for e in equations]
    if None not in inner:
        return _run(sizes, inner, operands)
    params = {key: _same(sizes, [e.params[key] for e in equations]) for key in first.params}
    return compat.bind(first.replace(params=params), operands)


def _same(sizes: Sizes, found: Sequence[Any]) -> Any:
    """What stands for the same parameter of several equations, or the same constant."""
    (first, *_) = found
    if isinstance(first, (compat.Jaxpr, compat.ClosedJaxpr)):
        return _same_jaxpr(sizes, found)
    if isinstance(first, (tuple, list)):
        made = [_same(sizes, each) for each in _together(found)]
        return type(first)(*made) if hasattr(first, "_fields") else type(first)(made)
    if isinstance(first, int) and not isinstance(first, bool):
        return sizes.size(found)
    if isinstance(first, (jax.Array, np.ndarray)):
        equal = all(x is first or np.array_equal(x, first, equal_nan=True) for x in found)
    else:
        equal = len({ahead.of_param(x) for x in found}) == 1
    if not equal:
        raise _differ(found)
    return first


def _same_jaxpr(sizes: Sizes, found: Sequence[Any]) -> Any:
    bodies = [compat.open_jaxpr(jaxpr)[0] for jaxpr in found]
    avals = [
        jax.ShapeDtypeStruct(
            _same(sizes, [tuple(v.aval.shape) for v in inputs]),
            inputs[0].aval.dtype,
            weak_type=inputs[0].aval.weak_type,
        )
        for inputs in _together([body.invars for body in bodies])
    ]
    made = jax.make_jaxpr(lambda *values: _run(sizes, found, values))(*avals)
    return made if isinstance(found[0], compat.ClosedJaxpr) else compat.open_jaxpr(made)[0]


# --- whether a program for symbols is the same --------------------------------------------------


def check_path(symbolic: Any, numeric: Any) -> None:
    """Checks that a network takes the same operations for symbols as for numbers.

    Arithmetic and views do not count: on sizes they are done while tracing if these are numbers.

    Raises:
      FrontContributionError: if it does not, as where Python code decides by a size.
    """
    if _operations(symbolic) != _operations(numeric):
        raise FrontContributionError(
            "the network decides by a symbolic size what it computes; export it once for each size"
        )


def check_results(sizes: Sizes, symbolic: Any, results: Sequence[Any]) -> None:
    """Checks that results have the sizes that the network says they have.

    Raises:
      FrontContributionError: if they do not.
    """
    avals: list[Any] = [var.aval for var in compat.open_jaxpr(symbolic)[0].outvars]
    for result, aval in zip(results, avals, strict=True):
        if [*map(sizes.values, jnp.shape(result))] != [*map(sizes.values, aval.shape)]:
            raise _differ([jnp.shape(result), aval.shape])


def _operations(jaxpr: Any) -> list[Any]:
    names: list[Any] = []
    for equation in compat.open_jaxpr(jaxpr)[0].eqns:
        inner = [_operations(each) for each in compat.inner_jaxprs(equation)]
        if equation.primitive.name in trace.INLINED:
            names += [name for each in inner for name in each]
        elif equation.primitive.name not in UNCOUNTED:
            names += [equation.primitive.name, *inner]
    return names
