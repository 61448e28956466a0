"""The operations that steps can name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from inspect import Parameter, signature

from .domains import Domain


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation.

    Attributes:
      write: ``write(context, *operands, **args)`` returns the expression of the result.
      domains: where its arguments come from.
      operands: the kind of each value that it reads, by a letter: x or y for numbers, i for
        integers, m for booleans, n for a Python number.
    """

    write: Callable[..., str]
    domains: Mapping[str, Domain]
    operands: tuple[str, ...]


OPS: dict[str, Op] = {}


def op(**domains: Domain) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Registers a function as the operation of its name.

    Positional parameters behind the first are operands, keyword-only ones have domains.
    """

    def register(write: Callable[..., str]) -> Callable[..., str]:
        parameters = signature(write).parameters.values()
        given = [p.name for p in parameters if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
        OPS[write.__name__] = Op(write, domains, tuple(given[1:]))
        return write

    return register
