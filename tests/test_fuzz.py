"""Random programs of every family, new ones with every commit, and the tool that runs them."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from fuzz import comparing, differences, drawing, printing, programs, running
from fuzz.families import FAMILIES
from fuzz.network import network
from fuzz.registry import OPS

import fcjax

PROGRAMS = 40
"""Of each family, on the newest Python and others on the oldest; the command runs more."""
APART = 200
"""How far the seeds of one commit are from those of the next."""
OLDEST = sys.version_info < (3, 12)
SECONDS = 10.0
ROOT = Path(__file__).parent.parent


def first_seed():
    """A seed for the programs of this commit, so that every commit tries others."""
    count = subprocess.run(
        ["git", "rev-list", "--count", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return int(count.stdout) * APART if count.returncode == 0 else 0


def shown(found):
    """The failures, each shrunk, as they are printed."""
    ones = [ones[0] for ones in running.by_kind(found).values()]
    return "\n\n".join(str(running.smallest(one, SECONDS)) for one in ones)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_programs(family):
    begin = first_seed() + PROGRAMS * OLDEST
    found = list(running.failures(family, range(begin, begin + PROGRAMS), SECONDS))
    assert not found, shown(found)


# --- the tool ---


def wrong(apply):
    """Networks of the library that are slightly wrong wherever there is a matrix of weights."""

    def changed(self, params, *args):
        factor = 1 + 1e-6 * any(np.ndim(w) == 2 for w in params.values())
        return jax.tree.map(lambda x: x * factor, apply(self, params, *args))

    return changed


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setattr(fcjax.FrontContribution, "apply", wrong(fcjax.FrontContribution.apply))


@pytest.mark.usefixtures("broken")
def test_a_wrong_library_is_found_and_the_program_shrunk_and_printed():
    found = next(running.failures("dense", range(20), SECONDS))
    assert found.failure.found.kind == "value is off"
    small = running.smallest(found, SECONDS)
    assert programs.size(small.program) == 2
    assert small.failure.found.kind == found.failure.found.kind
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        exec(compile(small.text(), "<printed>", "exec"), {})


@pytest.mark.parametrize("family", FAMILIES)
def test_printed_programs_stand_alone(family):
    """Whatever a printed program names it imports or defines."""
    program = drawing.program(family, FAMILIES[family].palette, 3)
    for check in FAMILIES[family].checks(program.settings):
        off = differences.Difference("", "", "x")
        failure = comparing.Failure(check, off, [*check.measures, ""][0])
        text = running.Found(family, 3, program, failure).text()
        code = compile(text, "<printed>", "exec")
        assert printing.names(code) <= {*dir(builtins), *code.co_names}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_always_gives_the_same_program(family):
    palette = FAMILIES[family].palette
    first, again = (drawing.program(family, palette, 3) for _ in range(2))
    assert first == again
    assert network(first).text == network(again).text


def test_every_operation_is_drawn_by_a_family():
    drawn = {name for f in FAMILIES.values() for name in (*f.palette.ops, *f.palette.begins)}
    assert set(OPS) == drawn | set(drawing.INPUTS.values())


@pytest.mark.parametrize("name", OPS)
def test_simpler_arguments_end_with_the_simplest(name):
    rng = np.random.default_rng(0)
    for domain in OPS[name].domains.values():
        value = domain.draw(rng, 0.2)
        for _ in range(100):
            value = next(domain.simpler(value), value)
        assert value == domain.simplest()


@pytest.mark.parametrize(
    ("actual", "kind"),
    [
        ([1.0, 2.0], None),
        ([1.0, 2.0 + 1e-11], None),
        ([1.0, 2.0 + 1e-9], "value is off"),
        ([1.0, np.nan], "value is finite elsewhere"),
        (np.float32([1.0, 2.0]), "value is of another type"),
        ([[1.0, 2.0]], "value is of another type"),
    ],
)
def test_differences(actual, kind):
    found = differences.difference(
        {"value": np.asarray(actual)}, {"value": np.asarray([1.0, 2.0])}, {}
    )
    assert (found and found.kind) == kind


def test_infinities_are_told_apart():
    found = differences.difference(
        {"value": np.array([np.inf])}, {"value": np.array([-np.inf])}, {}
    )
    assert found.kind == "value is infinite otherwise"


def test_a_plan_that_takes_too_long_is_a_failure(monkeypatch):
    def endless(*args):
        while True:
            pass

    monkeypatch.setattr(fcjax, "front_contribute", endless)
    found = next(running.failures("dense", range(1), 0.2))
    assert found.failure.found.kind.startswith("slow")


def test_the_command_lists_the_families():
    listed = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--list"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert listed.stdout.split() == list(FAMILIES)
