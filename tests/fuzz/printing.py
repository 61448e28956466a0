"""Prints a program with the check that fails, as Python that needs nothing of the tests."""

from __future__ import annotations

import ast
import dis
import inspect
import re
from collections.abc import Iterator
from types import CodeType, ModuleType

from . import claims, helpers, hidden, law_claims, making, measures
from .dtypes import DTYPES

IMPORTS = {
    "annotations": "from __future__ import annotations\n",
    "functools": "import functools",
    "types": "import types",
    "jax": "import jax",
    "jnp": "import jax.numpy as jnp",
    "np": "import numpy as np",
    "optax": "import optax",
    "lax": "from jax import lax",
    "io_callback": "from jax.experimental import io_callback",
    "ClosedJaxpr": "from jax.extend.core import ClosedJaxpr",
    "Jaxpr": "from jax.extend.core import Jaxpr",
    "Literal": "from jax.extend.core import Literal",
    "fcjax": "\nimport fcjax",
    "compat": "from fcjax import compat",
    "always_fold": "from fcjax.planning.plan import always_fold",
}
EXECUTABLE = """\
def executable(fn, *args):
    return jax.jit(fn)
"""
VALUES_OF = """\
def values_of(fn, *args):
    return jax.tree.map(np.asarray, jax.jit(fn)(*args))
"""


def standing_alone(text: str, check: str) -> str:
    """A program that needs nothing but the library.

    Args:
      text: that of a network.
      check: statements that fail for it.
    """
    before, behind = needed(text), needed(check)
    parts = [*before, text, *(part for part in behind if part not in before), check]
    used = names(compile("\n".join(parts), "<program>", "exec"))
    lines = [line for name, line in IMPORTS.items() if name in {*used, "annotations"}]
    lines += ["", 'jax.config.update("jax_enable_x64", True)']
    lines += [f"{n} = jnp.dtype({full!r})" for n, full in DTYPES.items() if n in used]
    return "\n\n\n".join(part.strip("\n") for part in ("\n".join(lines), *parts))


def needed(text: str) -> list[str]:
    """The definitions of this package that a text needs, and those that these need."""
    known = {"values_of": VALUES_OF, "executable": EXECUTABLE}
    for module in (helpers, measures, making, hidden, claims, law_claims):
        known |= definitions(module)
    found: set[str] = set()
    frontier = [text]
    while frontier:
        used = names(compile(frontier.pop(), "<program>", "exec"))
        more = {known[name] for name in used if name in known} - found
        found |= more
        frontier += more
    return [part.strip("\n") for part in dict.fromkeys(known.values()) if part in found]


def definitions(module: ModuleType) -> dict[str, str]:
    """The source of what a module defines, by name.

    What belongs to a definition, such as a rule for its derivative, stands behind it.
    """
    begun, *parts = inspect.getsource(module).split("\n\n\n")
    found = {
        name: ast.get_source_segment(begun, node) or ""
        for node in ast.parse(begun).body if isinstance(node, ast.Assign)
        for name in assigned(node)
    }  # fmt: skip
    for part in parts:
        plain = re.sub(r"^ *from \.\w+ import .*\n\n?|^# ---.*$", "", part, flags=re.MULTILINE)
        owner = re.match(r"@?(\w+)\.", plain)
        if owner and owner[1] in found:
            plain = f"{found[owner[1]]}\n\n\n{plain}"
            found[owner[1]] = plain
        found |= dict.fromkeys(defined(plain), plain)
    return found


def defined(part: str) -> Iterator[str]:
    """The names that statements define."""
    for node in ast.parse(part).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from assigned(node)


def assigned(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def names(code: CodeType) -> set[str]:
    """The global names that code reads."""
    found = {
        i.argval for i in dis.get_instructions(code)
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
    }  # fmt: skip
    return found.union(*(names(c) for c in code.co_consts if isinstance(c, CodeType)))
