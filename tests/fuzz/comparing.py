"""Compares a network with the same network as written, and says how they differ."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import signal
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fcjax

from . import claims, making, measures
from .evaluating import Way, evaluating
from .making import plain
from .network import Network

EXACT = 1e-10
"""Relative deviation that float64 may have, of each array's largest entry."""
ROUNDINGS = 100
"""How many times what rounding all weights differently changes may be off beside that."""
UNITS = 8
"""Units in the last place of the narrowest type that are no deviation."""
REFUSED = ("returns nothing differentiable", "nothing to train", "stand at a saddle")
"""Networks that fcjax refuses by design."""


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
      kind: what is wrong, without numbers: two failures of one kind may be one fault.
      detail: what is wrong, with numbers.
      measure: the measure that found it; none for a claim.
      where: the array that differs.
      limit: the deviation that it may have.
    """

    check: Check
    kind: str
    detail: str
    measure: str = ""
    where: str = ""
    limit: float = 0.0


UNKNOWN = Check("", "")


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
        if expected is not None:
            return _compared(network, check, text, expected, seconds)
    return None


def _claimed(network: Network, check: Check, seconds: float) -> Failure | None:
    try:
        with limited(seconds), quietly():
            _evaluated(check.make, network)(network.f, network.p, network.args)
    except AssertionError as error:
        return Failure(check, str(error).split(":")[0], str(error)[:300])
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
        off = difference(actual, expected, _allowed(network, text, expected))
    return off and dataclasses.replace(off, check=check, measure=text)


def _evaluated(text: str, network: Network) -> Any:
    """A check or a measure, which may name what the network's text defines."""
    return eval(text, {**vars(making), **vars(measures), **vars(claims), **network.space})


@functools.lru_cache(maxsize=8)
def _expected(network: Network, text: str, way: Way = "fast") -> Any:
    """What a measure finds of the network as written; None if JAX refuses it."""
    net = plain(network.f, network.p, network.args)
    for evaluated in (way, "compiled"):
        with contextlib.suppress(Exception), quietly(), evaluating(evaluated):
            return _evaluated(text, network)(net, network.args)
    return None


# --- how far off ---


def difference(actual: Any, expected: Any, allowed: Mapping[str, Any] | None) -> Failure | None:
    """The first array that differs, outputs in front.

    Args:
      actual: a pytree of arrays, the kinds of results in front.
      expected: likewise.
      allowed: deviations that are no difference, by path; ``EXACT`` of the largest entry
        where nothing is said. None if no two numbers may differ.
    """
    if jax.tree.structure(actual) != jax.tree.structure(expected):
        structures = f"{jax.tree.structure(actual)}, not {jax.tree.structure(expected)}"
        return Failure(UNKNOWN, "structure", structures)
    pairs = zip(named(expected), jax.tree.leaves(actual), strict=True)
    for (where, b), a in sorted(pairs, key=lambda pair: not pair[0][0].startswith("value")):
        kind, limit = where.split()[0], 0.0
        if allowed is not None:
            limit = allowed.get(where, EXACT * largest(b))
        found = _off(a, b, limit)
        if found:
            detail = f"{where}: {a.dtype}{a.shape} {a.ravel()[:6]}, "
            detail += f"not {b.dtype}{b.shape} {b.ravel()[:6]}"
            return Failure(UNKNOWN, f"{kind} is {found}", detail, where=where, limit=limit)
    return None


def named(tree: Any) -> list[tuple[str, np.ndarray]]:
    """The arrays of a pytree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator=" "), x) for path, x in leaves]


def _off(a: np.ndarray, b: np.ndarray, limit: float) -> str | None:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return "of another type"
    a, b = wide(a), wide(b)
    if np.isinf(limit):
        return None
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return "finite elsewhere"
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return "infinite otherwise"
    return "off" if largest(a[finite] - b[finite]) > limit else None


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64)


def largest(x: np.ndarray) -> float:
    """The largest magnitude of the finite entries."""
    sizes = np.abs(wide(np.asarray(x)))
    return float(np.max(sizes, initial=0.0, where=np.isfinite(sizes)))


def _allowed(network: Network, text: str, expected: Any) -> dict[str, float]:
    """The deviation of each array that rounding explains."""
    unit, factor, others = _rounded(network, text)
    floor = unit * max((largest(x) for _, x in named(expected)), default=0.0)
    limits = {name: max(EXACT * largest(x), floor) for name, x in named(expected)}
    for other in others:
        if other is None:
            return dict.fromkeys(limits, np.inf)
        for (name, x), y in zip(named(expected), jax.tree.leaves(other), strict=True):
            limits[name] += factor * _apart(x, y)
    return limits


def _apart(x: np.ndarray, y: np.ndarray) -> float:
    """How far two roundings of one array are apart; infinite if they are different numbers."""
    if x.shape != y.shape or not np.array_equal(np.isfinite(wide(x)), np.isfinite(wide(y))):
        return np.inf
    both = np.isfinite(wide(x))
    return largest(wide(x)[both] - wide(y)[both])


def _rounded(network: Network, text: str) -> tuple[float, float, list[Any]]:
    """Units, a factor, and what a measure finds of the network rounded otherwise.

    Twice the network's own error may be off in narrow types, and ``ROUNDINGS`` in float64.
    """
    if network.narrow:
        unit = max(float(jnp.finfo(dtype).eps) for dtype in network.narrow)
        return UNITS * unit, 2.0, [_expected(network, text, "in double")]
    return 1e-13, ROUNDINGS, [_expected(other, text) for other in network.perturbed]


# --- crashes and time ---


def _crash(check: Check, error: BaseException) -> Failure | None:
    if isinstance(error, fcjax.FrontContributionError) and any(r in str(error) for r in REFUSED):
        return None
    kind = "slow" if isinstance(error, TooSlow) else type(error).__name__
    return Failure(check, f"{kind} in {_line(error)}", str(error).split("\n")[0][:300])


def _line(error: BaseException) -> str:
    """The innermost function of the library, or of the tests, that an error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if _is_ours(f.filename)] or frames
    chosen = ours[-1] if not isinstance(error, TooSlow) else ours[min(6, len(ours) - 1)]
    return f"{Path(chosen.filename).stem}.{chosen.name}"


def _is_ours(filename: str) -> bool:
    return Path(fcjax.__file__).parent in Path(filename).parents or "claims.py" in filename


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
