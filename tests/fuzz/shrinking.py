"""Shrinks a program while a check keeps failing in the same way (delta debugging)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .domains import Domain
from .ops import OPS
from .programs import Program, Step, every, live, mapped, renamed, size, without
from .weights import GENERAL
from .writing import Inapplicable

SIMPLEST = ("dense", "gain", "scaled")
"""What other operations of one operand are replaced by."""


def shrunk(
    program: Program,
    settings: Mapping[str, Domain],
    fails: Callable[[Program], bool],
    seconds: float,
) -> Program:
    """The smallest program found that fails.

    Args:
      program: one that fails.
      settings: the domains of its settings.
      fails: whether a program fails in the way that is looked for; it may raise ``Inapplicable``.
      seconds: the time after which the smallest so far is returned.
    """
    end = time.monotonic() + seconds
    tried: set[str] = set()
    smaller = True
    while smaller:
        smaller = False
        for candidate in candidates(program, settings):
            if time.monotonic() > end:
                return program
            if str(candidate) in tried:
                continue
            tried.add(str(candidate))
            if _fails(fails, candidate):
                program, smaller = candidate, True
                break
    return program


def _fails(fails: Callable[[Program], bool], candidate: Program) -> bool:
    try:
        return fails(candidate)
    except Inapplicable:
        return False


def candidates(program: Program, settings: Mapping[str, Domain]) -> Iterator[Program]:
    """Programs that are simpler by one thing, those that leave out most first."""
    yield from _with_fewer_steps(program)
    for change in (_with_other_outputs, _with_bodies_inlined, _with_simpler_steps):
        yield from map(live, change(program))
    yield from _with_simpler_arguments(program)
    yield from _with_earlier_operands(program)
    if program.seed:
        yield dataclasses.replace(program, seed=0)
    for name, value in program.settings.items():
        for simpler in settings[name].simpler(value):
            changed = {**program.settings, name: simpler}
            yield dataclasses.replace(program, settings=changed)


def _with_fewer_steps(program: Program) -> Iterator[Program]:
    """Leaves out runs of steps, half of them first, then single ones."""
    removable = [s for s in every(program.steps) if s.of]
    length = max(len(removable) // 2, 1)
    while length:
        for start in range(0, len(removable), length):
            shorter = program
            for step in reversed(removable[start : start + length]):
                shorter = _without(shorter, step)
            shorter = live(shorter)
            if size(shorter) < size(program):
                yield shorter
        length //= 2


def _without(program: Program, step: Step) -> Program:
    current = [s for s in every(program.steps) if s.name == step.name]
    return without(program, current[0]) if current else program


def _with_other_outputs(program: Program) -> Iterator[Program]:
    if len(program.outputs) > 1:
        for name in program.outputs:
            yield dataclasses.replace(program, outputs=(name,))
    for step in program.steps[:-1]:
        if step.of:
            yield dataclasses.replace(program, outputs=(step.name,))


def _with_bodies_inlined(program: Program) -> Iterator[Program]:
    """Replaces a step by the steps of one of its functions."""
    for step in every(program.steps):
        for number, body in enumerate(step.bodies):
            names = {f"{step.name}_{'fgh'[number]}0": step.of[0]}
            steps = _inlined(program.steps, step.name, renamed(body, names))
            result = {step.name: body[-1].name if body else step.of[0]}
            outputs = tuple(result.get(n, n) for n in program.outputs)
            yield dataclasses.replace(program, steps=renamed(steps, result), outputs=outputs)


def _inlined(steps: tuple[Step, ...], name: str, body: tuple[Step, ...]) -> tuple[Step, ...]:
    found: list[Step] = []
    for step in steps:
        if step.name == name:
            found.extend(body)
        else:
            bodies = tuple(_inlined(b, name, body) for b in step.bodies)
            found.append(dataclasses.replace(step, bodies=bodies))
    return tuple(found)


def _with_simpler_steps(program: Program) -> Iterator[Program]:
    for step in every(program.steps):
        if step.of and step.op not in SIMPLEST:
            for op in SIMPLEST:
                yield _replaced(program, step, Step(step.name, op, step.of[:1], _defaults(op)))


def _defaults(op: str) -> dict[str, Any]:
    """The simplest arguments of an operation."""
    return {name: domain.simplest() for name, domain in OPS[op].domains.items()}


def _replaced(program: Program, step: Step, by: Step) -> Program:
    change = lambda s: by if s.name == step.name else s  # noqa: E731
    return dataclasses.replace(program, steps=mapped(program.steps, change))


def _with_simpler_arguments(program: Program) -> Iterator[Program]:
    for step in every(program.steps):
        domains = OPS[step.op].domains | GENERAL
        for name, value in step.args.items():
            for simpler in domains[name].simpler(value):
                args = {**step.args, name: simpler}
                current = dataclasses.replace(step, args=args)
                yield _with_arguments(program, current)


def _with_arguments(program: Program, step: Step) -> Program:
    """The program with a step's arguments; bodies stay."""

    def change(s: Step) -> Step:
        return dataclasses.replace(s, args=step.args) if s.name == step.name else s

    return dataclasses.replace(program, steps=mapped(program.steps, change))


def _with_earlier_operands(program: Program) -> Iterator[Program]:
    """Reads a step's first operand in place of the others."""
    for step in every(program.steps):
        for i, name in enumerate(step.of[1:], 1):
            if name != step.of[0]:
                of = (*step.of[:i], step.of[0], *step.of[i + 1 :])
                yield live(_replaced(program, step, dataclasses.replace(step, of=of)))
