"""Verdicts on optimizers, remembered from one call to the next."""

import functools
from collections.abc import Callable, Hashable
from typing import TypeVar

__all__ = ["remembered"]

Result = TypeVar("Result")

LAST = 256
"""How many results are remembered of each function, with the optimizers that they are about."""


def remembered(function: Callable[..., Result]) -> Callable[..., Result]:
    """A function that returns what it returned for equal arguments before.

    An argument is held on to as long as its result is, so that no other object takes its place.
    Arguments that cannot be compared are never remembered.

    Example:
      >>> calls = []
      >>> noted = remembered(lambda x: calls.append(x) or len(calls))
      >>> noted(1), noted(1), noted([]), noted([])
      (1, 1, 2, 3)
    """
    known = functools.lru_cache(maxsize=LAST)(function)

    @functools.wraps(function)
    def call(*arguments: Hashable) -> Result:
        try:
            return known(*arguments)
        except Exception:  # no hash, or == is no bool; what the function raises it raises again
            return function(*arguments)

    return call
