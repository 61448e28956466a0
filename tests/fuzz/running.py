"""Runs the programs of a family, and reports those for which a check fails."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

from . import drawing
from .comparing import Failure, failure
from .families import FAMILIES
from .network import network
from .printing import standing_alone
from .programs import Program
from .shrinking import shrunk

SHRINKING = 60.0
"""Seconds after which a program is printed as far as it has been shrunk."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A program for which a check fails.

    Attributes:
      family: of the program.
      seed: with which the family makes it.
      program: the program, perhaps shrunk.
      failure: how it fails.
    """

    family: str
    seed: int
    program: Program
    failure: Failure

    def __str__(self) -> str:
        again = f"python -m tests.fuzz {self.family} 1 {self.seed}"
        what = f"{self.failure.check.name}: {self.failure.found.kind}"
        return f"{what}\n{self.failure.found.detail}\n{again}\n\n{self.text()}"

    def text(self) -> str:
        """The program with the comparison that fails, as Python that needs fcjax alone."""
        return standing_alone(network(self.program).text, printed(self.failure))


def failures(family: str, seeds: range, seconds: float) -> Iterator[Found]:
    """The programs for which a check fails, one for each check.

    Args:
      family: the family's name.
      seeds: one program for each.
      seconds: processor time that the library may take for one plan.
    """
    for seed in seeds:
        program = drawing.program(family, FAMILIES[family].palette, seed)
        made = network(program)
        for check in FAMILIES[family].checks(program.settings):
            found = failure(made, check, seconds)
            if found is not None:
                yield Found(family, seed, program, found)


def smallest(found: Found, seconds: float, patience: float = SHRINKING) -> Found:
    """The same failure of the smallest program that still has it."""
    family = FAMILIES[found.family]
    last = [found.failure]

    def fails(program: Program) -> bool:
        checks = [c for c in family.checks(program.settings) if c.name == found.failure.check.name]
        now = failure(network(program), checks[0], seconds)
        if now is None or now.found.kind != found.failure.found.kind:
            return False
        last.append(now)
        return True

    program = shrunk(found.program, family.palette.settings, fails, patience)
    return dataclasses.replace(found, program=program, failure=last[-1])


def by_kind(found: list[Found]) -> dict[str, list[Found]]:
    """Failures that may have one cause, the most frequent first."""
    kinds: dict[str, list[Found]] = collections.defaultdict(list)
    for one in found:
        kinds[one.failure.found.kind].append(one)
    return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


# --- printing ---

COMPARED = """\
make, measure = {make}, {measure}
expected = measure(plain(f, p, args), args)
{then}actual = measure(make(f, p, args), args)


def found(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {{jax.tree_util.keystr(k, simple=True, separator=" "): x for k, x in leaves}}[{where!r}]


assert found(actual).dtype == found(expected).dtype
np.testing.assert_allclose(found(actual), found(expected), rtol=0, atol={limit:.3g})"""
CRASH = "{measure}(({make})(f, p, args), args)"


def printed(failure: Failure) -> str:
    """The comparison that fails, with what it calls."""
    given = {"make": failure.check.make, "measure": failure.measure, "then": ""}
    if failure.check.way == "compiled":
        given["then"] = "from fcjax.numbers.interpreter import values_of\n"
    if not failure.measure:
        text = f"{failure.check.make}(f, p, args)"
    elif failure.found.where:
        text = COMPARED.format(**given, where=failure.found.where, limit=failure.found.limit)
    else:
        text = CRASH.format(**given)
    return f"{text}\n"
