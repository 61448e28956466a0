"""Random programs of a family."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import zlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from .domains import Domain
from .network import written
from .ops import OPS
from .programs import Program, Step, Steps, live
from .weights import GENERAL
from .writing import Array, Inapplicable, Writer

TRIES = 12
"""How many operations and operands are tried for one step."""
INPUTS = {"i": "ids", "m": "flags", "n": "number"}
"""Which input is added for an operand of a kind that there is none of."""


@dataclasses.dataclass(frozen=True)
class Palette:
    """What the programs of a family are made of.

    Attributes:
      begins: the inputs that they begin with, and how often.
      ops: their operations, and how often.
      lengths: the smallest and the largest number of operations.
      settings: what their checks need beside the network.
      zeros: how often the size of an axis is zero.
      general: how often weights are read in another form, or begin otherwise.
    """

    begins: Mapping[str, float]
    ops: Mapping[str, float]
    lengths: tuple[int, int] = (2, 6)
    settings: Mapping[str, Domain] = dataclasses.field(default_factory=dict)
    zeros: float = 0.0
    general: Mapping[str, float] = dataclasses.field(default_factory=dict)


def program(name: str, palette: Palette, seed: int) -> Program:
    """The random program of a seed."""
    rng = np.random.default_rng((zlib.crc32(name.encode()), seed))
    while True:
        drawn = live(_Drawer(palette, rng).program(seed))
        try:
            written(drawn)
        except Inapplicable:  # nothing left that has weights
            continue
        return drawn


class _Drawer:
    """Draws one program, writing it on the way."""

    def __init__(self, palette: Palette, rng: np.random.Generator) -> None:
        self.palette = palette
        self.rng = rng
        self.names = (f"v{i}" for i in itertools.count())

    def program(self, seed: int) -> Program:
        writer, steps = Writer(), []
        while not steps:
            with contextlib.suppress(Inapplicable):
                steps.append(self._add(writer, self._pick(self.palette.begins), ()))
        low, high = self.palette.lengths
        steps += self._steps(writer, int(self.rng.integers(low, high + 1)))
        last = [s.name for s in steps if writer.values[s.name].floats][-1:] or [steps[-1].name]
        outputs = [steps[-1].name] if self.rng.random() < 0.7 else last
        arrays = [s.name for s in steps if writer.values[s.name].number is None]
        if self.rng.random() < 0.2:
            outputs.append(str(self.rng.choice(arrays)))
        settings = {n: d.draw(self.rng, 0.0) for n, d in self.palette.settings.items()}
        return Program(tuple(steps), tuple(dict.fromkeys(outputs)), settings, seed)

    def _body(self, writer: Writer) -> Steps:
        """The steps of a function; it returns the last of them."""
        return tuple(self._steps(writer, int(self.rng.integers(0, 4))))

    def _steps(self, writer: Writer, count: int) -> list[Step]:
        steps: list[Step] = []
        for _ in range(count):
            for _ in range(TRIES):
                values = dict(writer.values)
                try:
                    steps += self._step(writer, self._pick(self.palette.ops))
                    break
                except Inapplicable:
                    writer.values = values
        return steps

    def _step(self, writer: Writer, op: str) -> list[Step]:
        """A step of an operation, behind the inputs that it needs."""
        steps, operands = [], []
        for position, kind in enumerate(OPS[op].operands):
            fitting = [n for n, x in writer.values.items() if _fits(kind, x)]
            if kind in INPUTS and (not fitting or self.rng.random() < 0.3):
                if writer.outer is not None:
                    raise Inapplicable
                steps.append(self._add(writer, INPUTS[kind], ()))
                operands.append(steps[-1].name)
                continue
            if not fitting:
                raise Inapplicable
            latest = position == 0 and self.rng.random() < 0.85
            operands.append(fitting[-1] if latest else str(self.rng.choice(fitting)))
        steps.append(self._add(writer, op, tuple(operands)))
        return steps

    def _add(self, writer: Writer, op: str, operands: tuple[str, ...]) -> Step:
        args = {n: d.draw(self.rng, self.palette.zeros) for n, d in OPS[op].domains.items()}
        for name, often in self.palette.general.items():
            if self.rng.random() < often:
                args[name] = GENERAL[name].draw(self.rng, 0.0)
        step = Step(next(self.names), op, operands, args)
        return writer.add(step, self._body)

    def _pick(self, weights: Mapping[str, float]) -> str:
        shares = np.array(list(weights.values()))
        return str(self.rng.choice(list(weights), p=shares / shares.sum()))


def _fits(kind: str, x: Array) -> bool:
    """Whether a value is of the kind that an operand must be."""
    if kind == "n":
        return x.number is not None
    if kind == "m":
        return x.number is None and x.dtype == jnp.bool_
    if kind == "i":
        return x.number is None and bool(jnp.issubdtype(x.dtype, jnp.integer))
    return x.number is None and (x.floats or x.dtype != jnp.bool_)
