"""A program as text, and the network that the text is."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .differences import largest
from .evaluating import narrow_types
from .measures import is_float
from .programs import Program
from .writing import Inapplicable, Writer, globals_of


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A network that is made by executing its text.

    Attributes:
      text: statements that define ``rng``, ``p``, ``args`` and ``f(p, *args)``.
      space: what they define.
      settings: what the checks are given beside it.
    """

    text: str
    space: dict[str, Any]
    settings: Mapping[str, Any]

    @property
    def f(self) -> Any:
        return self.space["f"]

    @property
    def p(self) -> Any:
        return self.space["p"]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.space["args"]

    @functools.cached_property
    def narrow(self) -> set[Any]:
        """The floating types below double in which it computes."""
        arrays = [a for a in self.args if hasattr(a, "dtype")]

        def call(p: Any, arrays: Any) -> Any:
            given = iter(arrays)
            return self.f(p, *(next(given) if hasattr(a, "dtype") else a for a in self.args))

        return narrow_types(jax.make_jaxpr(call)(self.p, arrays))

    @functools.cached_property
    def unit(self) -> float:
        """The unit in the last place of the narrowest type, relative to a number."""
        return max((float(jnp.finfo(dtype).eps) for dtype in self.narrow), default=1e-15)

    @functools.cached_property
    def size(self) -> float:
        """The largest weight or argument."""
        leaves = [x for x in jax.tree.leaves((self.p, self.args)) if is_float(x)]
        return max((largest(np.asarray(x)) for x in leaves), default=0.0)

    @functools.cached_property
    def perturbed(self) -> tuple[Network, ...]:
        """The same network with floating arrays that are rounded otherwise, twice."""
        return tuple(self._nudged(seed) for seed in range(2))

    def _nudged(self, seed: int) -> Network:
        """The network with all floating arrays changed in the last digits of the narrowest type."""
        rng = np.random.default_rng(seed)

        def moved(leaf: Any) -> Any:
            steps = rng.choice([-1, 0, 1], np.shape(leaf))
            return leaf * (1 + self.unit * steps).astype(leaf.dtype) if is_float(leaf) else leaf

        space = dict(self.space)
        space |= {n: jax.tree.map(moved, space[n]) for n in ("p", "args", "c") if n in space}
        space["f"] = types.FunctionType(self.f.__code__, space)
        return dataclasses.replace(self, space=space)


def network(program: Program) -> Network:
    """The network of a program.

    Raises:
      Inapplicable: if an operation does not take its operands.
    """
    text = written(program)
    space = globals_of()
    exec(text, space)
    return Network(text, space, program.settings)


def written(program: Program) -> str:
    """The program's text: the weights, the arguments and the function.

    Raises:
      Inapplicable: if an operation does not take its operands.
    """
    writer = Writer()
    for step in program.steps:
        writer.add(step)
    tables = writer.tables
    if not tables.weights:
        raise Inapplicable
    outputs = [str(writer.values[name]) for name in program.outputs]
    returned = outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"
    function = [f"def f({', '.join(['p', *tables.inputs])}):"]
    function += [f"    {line}" for line in [*writer.lines, f"return {returned}"]]
    arrays = _arrays("p", tables.weights)
    arrays += _arrays("c", tables.constants) if tables.constants else []
    arrays += [f"{name} = {text}" for name, text in tables.inputs.items()]
    given = "".join(f"{name}, " for name in tables.inputs).strip()
    begun = [f"rng = np.random.default_rng({program.seed})", "normal = rng.standard_normal"]
    return "\n".join([*begun, *arrays, f"args = ({given})", "", "", *function, ""])


def _arrays(name: str, table: Mapping[str, str]) -> list[str]:
    made = [f'{name}["{key}"] = {text}' for key, text in table.items()]
    return [f"{name} = {{}}", *made, f"{name} = jax.tree.map(jnp.asarray, {name})"]
