"""Compares a network with the same network as written, and says how they differ."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import re
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fcjax

from . import claims, law_claims, making, measures
from .differences import EXACT, Difference, apart, difference, largest, named
from .evaluating import Way, evaluating
from .making import plain
from .network import Network

ROUNDINGS = 100
"""How many times what rounding all weights differently changes may be off beside that."""
UNITS = 8
"""Units in the last place of the narrowest type that are no deviation."""
COTANGENT = 1.0
"""The largest number that gradients are added up from."""
DIGIT = 0.2
"""An array of a narrow type of whose largest entry so much may be off is not compared."""
HUGE = 1e100
"""A network whose results are larger explodes; loops square what they have squared."""
REFUSED = (
    "returns nothing differentiable",
    "nothing to train",
    "stand at a saddle",
    r"arguments \(.*\[0.*\) reads",  # no rows, whose sum needs weights that are multiplied
)
"""Networks that fcjax refuses by design, as regular expressions."""


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that must hold for every network.

    Attributes:
      name: what it is called.
      make: names how fcjax makes a network, or a claim about it.
      measures: what of it is compared with the network as written: the first that this one has.
        None for a claim.
      way: how the network as written is evaluated.
    """

    name: str
    make: str
    measures: tuple[str, ...] = ()
    way: Way = "fast"


@dataclasses.dataclass(frozen=True)
class Failure:
    """A check that does not hold.

    Attributes:
      check: the check.
      found: what is wrong. Two failures of one kind may be one fault.
      measure: the measure that found it; none for a claim.
    """

    check: Check
    found: Difference
    measure: str = ""


def failure(network: Network, check: Check, seconds: float) -> Failure | None:
    """How a check fails for a network, or None.

    Args:
      network: the network.
      check: the check.
      seconds: processor time that the library may take.
    """
    if not check.measures:
        return _claimed(network, check, seconds)
    for text in check.measures:
        expected = _expected(network, text, check.way)
        if expected is not None and max((largest(x) for _, x in named(expected)), default=0) > HUGE:
            return None  # it overflows, in each order of products elsewhere
        if expected is not None:
            return _compared(network, check, text, expected, seconds)
    return None


def _claimed(network: Network, check: Check, seconds: float) -> Failure | None:
    try:
        with limited(seconds), quietly():
            _evaluated(check.make, network)(network.f, network.p, network.args)
    except AssertionError as error:
        return Failure(check, Difference(str(error).split(":")[0], str(error)[:300]))
    except Exception as error:
        return _crash(check, error)
    return None


def _compared(
    network: Network, check: Check, text: str, expected: Any, seconds: float
) -> Failure | None:
    try:
        with limited(seconds), quietly():
            made = _evaluated(check.make, network)(network.f, network.p, network.args)
        actual = _evaluated(text, network)(made, network.args)
    except Exception as error:
        found = _crash(check, error)
        return found and dataclasses.replace(found, measure=text)
    off = difference(actual, expected, None if network.narrow else {})
    if off is not None:
        off = difference(actual, *_allowed(network, text, expected))
    return off and Failure(check, off, text)


def _evaluated(text: str, network: Network) -> Any:
    """A check or a measure, which may name what the network's text defines."""
    space: dict[str, Any] = {}
    for module in (making, measures, claims, law_claims):
        space |= vars(module)
    return eval(text, space | network.space)


@functools.lru_cache(maxsize=8)
def _expected(network: Network, text: str, way: Way = "fast") -> Any:
    """What a measure finds of the network as written; None if JAX refuses it."""
    net = plain(network.f, network.p, network.args)
    for evaluated in (way, "compiled"):
        with contextlib.suppress(Exception), quietly(), evaluating(evaluated):
            return _evaluated(text, network)(net, network.args)
    return None


# --- what rounding explains ---


def _allowed(network: Network, text: str, expected: Any) -> tuple[Any, dict[str, float]]:
    """What a result is compared with, and the deviation of each array that rounding explains."""
    if network.narrow:
        return _in_narrow_types(network, text, expected)
    limits = _limits(expected, 1e-13, network.size)
    for other in network.perturbed:
        _add(limits, ROUNDINGS, expected, _expected(other, text))
    return expected, limits


def _in_narrow_types(network: Network, text: str, expected: Any) -> tuple[Any, dict[str, float]]:
    """The network in double precision, from which twice its own error may be off.

    Its own error is no smaller than what another rounding of all numbers changes: that of one
    array may be small by luck.
    """
    double = _expected(network, text, "in double")
    limits = _limits(expected, UNITS * network.unit, COTANGENT)
    if double is not None:
        with np.errstate(over="ignore"):  # what leaves the range of a narrow type is infinite in it
            double = jax.tree.map(
                lambda x, like: np.asarray(x).astype(like.dtype), double, expected
            )
    _add(limits, 2.0, expected, double)
    for other in network.perturbed if double is not None else ():
        _add(limits, 2.0, double, _expected(other, text, "in double"))
    for name, x in named(expected):  # one digit says nothing about the next
        limits[name] = np.inf if limits[name] > DIGIT * largest(x) else limits[name]
    return expected if double is None else double, limits


def _limits(expected: Any, unit: float, size: float = 0.0) -> dict[str, float]:
    """Units of the largest entry of all, or of what they are made of: it may cancel."""
    floor = unit * max([size, *(largest(x) for _, x in named(expected))])
    return {name: max(EXACT * largest(x), floor) for name, x in named(expected)}


def _add(limits: dict[str, float], factor: float, expected: Any, other: Any) -> None:
    """Adds a multiple of how far two roundings are apart; nothing is known without the other."""
    if other is None:
        limits.update(dict.fromkeys(limits, np.inf))
        return
    for (name, x), y in zip(named(expected), jax.tree.leaves(other), strict=True):
        limits[name] += factor * apart(x, y)


# --- crashes and time ---


def _crash(check: Check, error: BaseException) -> Failure | None:
    if isinstance(error, fcjax.FrontContributionError) and any(
        re.search(refused, str(error)) for refused in REFUSED
    ):
        return None
    first_line = str(error).split("\n")[0]
    kind = "slow" if isinstance(error, TooSlow) else type(error).__name__
    what = re.sub(r"\W*\d\S*", "", first_line) if kind == "RefutedError" else f"in {_line(error)}"
    return Failure(check, Difference(f"{kind} {what}", first_line[:300]))


def _line(error: BaseException) -> str:
    """The innermost function of the library, or of the tests, that an error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if _is_ours(f.filename)] or frames
    chosen = ours[-1] if not isinstance(error, TooSlow) else ours[min(6, len(ours) - 1)]
    return f"{Path(chosen.filename).stem}.{chosen.name}"


def _is_ours(filename: str) -> bool:
    return Path(fcjax.__file__).parent in Path(filename).parents or "claims" in Path(filename).stem


class TooSlow(Exception):  # noqa: N818
    """The library took longer than it may."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises ``TooSlow`` after some processor time."""

    def interrupt(signum: int, frame: Any) -> None:
        raise TooSlow(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, interrupt)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what networks print, and without warnings of what they compute."""
    with np.errstate(all="ignore"), contextlib.redirect_stdout(io.StringIO()):
        yield
