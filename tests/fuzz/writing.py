"""Writes a program as Python, step by step, and finds the shapes of its values on the way.

What is written is what runs: a network is made by executing its text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import io_callback

from . import helpers
from .dtypes import DTYPES, alias
from .programs import Step, Steps
from .registry import OPS
from .weights import GENERAL, sourced

LARGEST = 600
"""Values with more entries than this are not drawn: nothing shows that smaller ones do not."""


class Inapplicable(Exception):  # noqa: N818 (nothing has gone wrong)
    """An operation that does not take these operands."""


@dataclasses.dataclass(frozen=True)
class Array:
    """A value as operations see it: the text that stands for it, and what it is.

    A Python number has a ``number``.
    """

    text: str
    shape: tuple[int, ...]
    dtype: Any
    number: float | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def floats(self) -> bool:
        return bool(jnp.issubdtype(self.dtype, jnp.inexact))

    @property
    def alias(self) -> str:
        return alias(self.dtype)


@dataclasses.dataclass(frozen=True)
class Function:
    """A function inside the network: its name, and the weights of each of its calls."""

    name: str
    stack: str


def globals_of() -> dict[str, Any]:
    """What the text of a program may name."""
    known = {"jax": jax, "jnp": jnp, "np": np, "lax": lax, "optax": optax}
    known["io_callback"] = io_callback
    named = {name: jnp.dtype(full) for name, full in DTYPES.items()}
    return known | named | vars(helpers)


class Tables:
    """What the functions of a program share: weights, constants and inputs."""

    def __init__(self) -> None:
        self.weights: dict[str, str] = {}
        self.constants: dict[str, str] = {}
        self.inputs: dict[str, str] = {}
        self.shapes: dict[str, tuple[tuple[int, ...], Any]] = {}

    def add(self, table: dict[str, str], letter: str, text: str, shape: Any, dtype: Any) -> str:
        """A new array under a new name."""
        name = f"{letter}{len(table)}"
        table[name] = text
        self.shapes[name] = (tuple(shape), dtype)
        return name

    def struct(self, names: Sequence[str]) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(*self.shapes[name]) for name in names}


class Writer:
    """Writes one function.

    Attributes:
      tables: weights, constants and inputs of the program.
      values: the variables that can be read here.
      lines: what is written.
      stack: for a function that is called several times, each time with weights of its own, how
        often, and the names of those weights.
    """

    def __init__(self, outer: Writer | None = None, stack: int | None = None, name: str = "p"):
        self.outer = outer
        self.tables: Tables = outer.tables if outer is not None else Tables()
        self.values: dict[str, Array] = dict(outer.values) if outer is not None else {}
        self.lines: list[str] = []
        self.stack = stack
        self.name = name
        self.stacked: dict[str, str] = {}

    # --- the arrays of the program ---

    def weight(self, text: Callable[[Any], str], shape: tuple[int, ...], dtype: Any) -> str:
        """A new weight, made by ``text``; in a stacked function one for each call."""
        tables = self.tables
        if self.outer is None:
            return f'p["{tables.add(tables.weights, "w", text(shape), shape, dtype)}"]'
        if self.stack is None:
            return self.outer.weight(text, shape, dtype)
        given = self.outer.weight(text, (self.stack, *shape), dtype)
        name = f"w{len(self.tables.weights) - 1}"
        self.stacked[name] = given
        return f'{self.name}["{name}"]'

    # --- values ---

    def add(self, step: Step, draw: Callable[[Writer], Steps] | None = None) -> Step:
        """Writes a step.

        Args:
          step: the step; its bodies are drawn if ``draw`` is given.
          draw: draws the steps of a function.

        Returns:
          the step with its bodies.

        Raises:
          Inapplicable: if the operation does not take these operands.
        """
        context = Context(self, step, draw)
        operands = [self.values[name] for name in step.of]
        with _refused():
            text = OPS[step.op].write(context, *operands, **context.args)
            self.define(step.name, text, context.lines)
        return dataclasses.replace(step, bodies=tuple(context.bodies), args=context.used())

    def define(self, name: str, text: str, before: Sequence[str] = ()) -> None:
        """Writes ``name = text`` and finds what it is; a variable is not written again."""
        if text in self.values:
            self.values[name] = self.values[text]
            return
        struct = self._shape_of(text, before)
        if struct.size > LARGEST or len(struct.shape) > 6:
            raise Inapplicable
        self.values[name] = Array(name, struct.shape, struct.dtype)
        self.lines += [*before, f"{name} = {text}"]

    def _shape_of(self, text: str, before: Sequence[str]) -> Any:
        mentioned = set(re.findall(r"\w+", " ".join([*before, text])))
        known = {n: v for n, v in self._structs().items() if n in mentioned}
        numbers = {n: v.number for n, v in self.values.items() if v.number is not None}
        source = "\n".join([*before, f"_ = {text}"])

        def run(arrays: dict[str, Any]) -> Any:
            space = {**_globals(), **numbers, **arrays}
            exec(_compiled(source), space)
            return space["_"]

        return jax.eval_shape(run, known)

    def _structs(self) -> dict[str, Any]:
        """The arrays that text written here may name."""
        found: dict[str, Any] = {
            n: jax.ShapeDtypeStruct(v.shape, v.dtype)
            for n, v in self.values.items() if v.number is None
        }  # fmt: skip
        found["p"] = self.tables.struct(list(self.tables.weights))
        found["c"] = self.tables.struct(list(self.tables.constants))
        writer: Writer | None = self
        while writer is not None and writer.outer is not None:
            if writer.stack is not None:
                found[writer.name] = {
                    n: jax.ShapeDtypeStruct(self._slice(writer, n), self.tables.shapes[n][1])
                    for n in writer.stacked
                }
            writer = writer.outer
        return found

    def _slice(self, writer: Writer, name: str) -> tuple[int, ...]:
        depth = 0
        inner: Writer | None = writer
        while inner is not None:
            depth += inner.stack is not None
            inner = inner.outer
        return self.tables.shapes[name][0][depth:]


class Context:
    """What an operation is given beside its operands: weights, constants and functions."""

    def __init__(self, writer: Writer, step: Step, draw: Any) -> None:
        self.writer = writer
        self.step = step
        self.lines: list[str] = []
        self.bodies: list[Steps] = []
        self._draw = draw
        self._general = {n: step.args[n] for n in GENERAL if n in step.args}
        self.args = {n: v for n, v in step.args.items() if n not in GENERAL}
        self._read: set[str] = set()
        first = writer.values[step.of[0]] if step.of else None
        self.dtype = first.dtype if first is not None and first.floats else jnp.dtype("float64")

    def need(self, condition: Any) -> None:
        """Raises unless the operation takes these operands."""
        if not condition:
            raise Inapplicable

    def used(self) -> dict[str, Any]:
        """The step's arguments, less general ones that were not asked for."""
        return self.args | {n: v for n, v in self._general.items() if n in self._read}

    def general(self, name: str) -> Any:
        self._read.add(name)
        return self._general.get(name, GENERAL[name].options[0])

    # --- arrays ---

    def weight(self, *shape: int, dtype: Any = None, init: str | None = None) -> str:
        """Text for a weight, as the step's ``source`` and ``init`` say."""
        return sourced(self, shape, jnp.dtype(self.dtype if dtype is None else dtype), init)

    def constant(self, text: str, shape: tuple[int, ...], dtype: Any) -> str:
        """Text for an array that is closed over."""
        tables = self.writer.tables
        return f'c["{tables.add(tables.constants, "c", text, shape, dtype)}"]'

    def input(
        self, text: str, shape: tuple[int, ...], dtype: Any, number: float | None = None
    ) -> str:
        """Text for an argument of the network, which is named as the step."""
        self.need(self.writer.outer is None)
        name = self.step.name
        self.writer.tables.inputs[name] = text if number is not None else f"jnp.asarray({text})"
        self.writer.values[name] = Array(name, tuple(shape), jnp.dtype(dtype), number)
        return name

    # --- axes ---

    def axis(self, x: Array, number: int) -> int:
        self.need(x.ndim)
        return number % x.ndim

    def axes(self, x: Array, bits: int) -> tuple[int, ...]:
        """The axes of x in a set of ``domains.AXES``."""
        found = tuple(i for i in range(x.ndim) if bits >> (x.ndim - 1 - i) & 1)
        self.need(found)
        return found

    # --- functions ---

    def function(
        self,
        *operands: Array,
        returns: Callable[[Context, Array], str] = lambda b, y: y.text,
        stack: int | None = None,
        first: str = "",
    ) -> Function:
        """Writes a function whose steps are the step's next body.

        Args:
          *operands: what it is called with.
          returns: the text that it returns, from its last value.
          stack: the number of calls, if each has weights of its own; they are its last argument.
          first: an argument in front that nothing reads.
        """
        number = len(self.bodies)
        name = f"{self.step.name}_{'fgh'[number]}"
        inner = Writer(self.writer, stack, f"{name}_w")
        names = [f"{name}{i}" for i in range(len(operands))]
        for own, x in zip(names, operands, strict=True):
            inner.values[own] = Array(own, x.shape, x.dtype)
        if self._draw is not None:
            steps = self._draw(inner)
        else:
            steps = tuple(inner.add(step) for step in self.step.bodies[number])
        self.bodies.append(steps)
        result = inner.values[steps[-1].name if steps else names[0]]
        ending = Context(inner, dataclasses.replace(self.step, of=(result.text,)), None)
        returned = returns(ending, result)
        self._read |= ending._read
        arguments = [first] * bool(first) + names + [inner.name] * (stack is not None)
        body = [*inner.lines, *ending.lines, f"return {returned}"]
        self.lines += [f"def {name}({', '.join(arguments)}):", *(f"    {x}" for x in body)]
        given = ", ".join(f'"{n}": {t}' for n, t in inner.stacked.items())
        return Function(name, f"{{{given}}}" if stack is not None else "None")


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """What JAX refuses is inapplicable."""
    try:
        yield
    except (Inapplicable, KeyboardInterrupt):
        raise
    except Exception as error:
        raise Inapplicable from error


@functools.cache
def _globals() -> dict[str, Any]:
    return globals_of()


@functools.lru_cache(maxsize=4096)
def _compiled(source: str) -> Any:
    return compile(source, "<step>", "exec")
