"""What primitives make of numbers: one function for each, in one registry.

A rule takes the equation's parameters and the operands, and returns the result, or a list of them
where the primitive has several.
"""

from collections.abc import Callable
from typing import Any

from fcjax.registry import registering

__all__ = ["RULES", "Params", "rule"]

Params = dict[str, Any]
RULES: dict[str, Callable[..., Any]] = {}
rule = registering(RULES, "evaluation")
