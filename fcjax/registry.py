"""Rules by the names of the primitives that they are for."""

from collections.abc import Callable
from typing import TypeVar

__all__ = ["registering"]

Rule = TypeVar("Rule")


def registering(rules: dict[str, Rule], what: str) -> Callable[..., Callable[[Rule], Rule]]:
    """A decorator with the names of primitives, which puts a rule for them into a registry.

    A second rule for a name raises a ``ValueError``.

    Args:
      rules: the registry.
      what: what a rule is called in that error.

    Example:
      >>> rules = {}
      >>> register = registering(rules, "rule")
      >>> double = register("mul", "add")(lambda x: 2 * x)
      >>> sorted(rules)
      ['add', 'mul']
    """

    def register(*names: str) -> Callable[[Rule], Rule]:
        def wrap(rule: Rule) -> Rule:
            for name in names:
                if name in rules:
                    raise ValueError(f"primitive {name!r} has a {what} already")
                rules[name] = rule
            return rule

        return wrap

    return register
