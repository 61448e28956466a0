"""Random programs as data: steps with arguments, which can be written, run and shrunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Steps = tuple["Step", ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """One value of a program.

    Attributes:
      name: the variable that holds it.
      op: which operation makes it; see ``ops.OPS``.
      of: the variables that it is made of.
      args: the operation's arguments, each from its domain.
      bodies: the steps of the functions that the operation calls. The arguments of such a function
        are named after the step, and it returns its last value.
    """

    name: str
    op: str
    of: tuple[str, ...] = ()
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bodies: tuple[Steps, ...] = ()


@dataclasses.dataclass(frozen=True)
class Program:
    """A network as steps.

    Attributes:
      steps: its values, in order; those without ``of`` are its inputs.
      outputs: the variables that it returns.
      settings: what the checks need beside the network, such as an optimizer.
      seed: of its weights and inputs.
    """

    steps: Steps
    outputs: tuple[str, ...]
    settings: Mapping[str, Any]
    seed: int


def size(program: Program) -> int:
    """The number of steps, those of bodies included."""
    return sum(1 for _ in every(program.steps))


def every(steps: Steps) -> Iterator[Step]:
    """All steps, those of bodies behind their own."""
    for step in steps:
        yield step
        for body in step.bodies:
            yield from every(body)


def mapped(steps: Steps, change: Callable[[Step], Step | None]) -> Steps:
    """The steps as ``change`` returns them, bodies first, less those for which it returns None."""
    found = []
    for step in steps:
        bodies = tuple(mapped(body, change) for body in step.bodies)
        new = change(dataclasses.replace(step, bodies=bodies))
        if new is not None:
            found.append(new)
    return tuple(found)


def renamed(steps: Steps, names: Mapping[str, str]) -> Steps:
    """The steps with some variables read instead of others."""

    def change(step: Step) -> Step:
        return dataclasses.replace(step, of=tuple(names.get(n, n) for n in step.of))

    return mapped(steps, change)


def without(program: Program, step: Step) -> Program:
    """The program in which whatever reads the step reads the step's first operand."""
    names = {step.name: step.of[0]}
    steps = mapped(program.steps, lambda s: None if s.name == step.name else s)
    outputs = tuple(names.get(n, n) for n in program.outputs)
    return dataclasses.replace(program, steps=renamed(steps, names), outputs=outputs)


def live(program: Program) -> Program:
    """The program without steps that no output depends on."""
    needed = set(program.outputs)
    return dataclasses.replace(program, steps=_live(program.steps, needed))


def _live(steps: Sequence[Step], needed: set[str]) -> Steps:
    found: list[Step] = []
    for step in reversed(steps):
        if step.name in needed:
            found.append(_with_live_bodies(step, needed))
    return tuple(reversed(found))


def _with_live_bodies(step: Step, needed: set[str]) -> Step:
    needed.update(step.of)
    bodies = []
    for body in step.bodies:
        needed.update(s.name for s in body[-1:])
        bodies.append(_live(body, needed))
    return dataclasses.replace(step, bodies=tuple(bodies))
