"""What a merged network keeps of its parameters."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from jax import Array
from jax.extend.core import jaxpr_as_fun

from fcjax.merging import ahead
from fcjax.planning.plan import Plan
from fcjax.tracing.trace import Body, Value

__all__ = ["Forming", "Kept", "Merging", "computed"]


class Forming(Protocol):
    """How an array is made once; see ``forming.Formed`` and ``loops.OfLoop``."""

    @property
    def is_sum(self) -> bool:
        """Whether it is added to a result, as a bias is."""

    @property
    def leaves(self) -> list[Value]:
        """The values it is made of."""

    def compute(self, env: Mapping[Any, Array]) -> Array:
        """The array, given those that it is made of."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """An array that the merged network reads.

    Attributes:
      value: what it is called in the merged network.
      identity: equal for equal computations, whatever the shapes of the call.
      sources: the identities of the parameters and constants it is made of.
      formed: how it is made if it is an effective weight or bias, else None.
    """

    value: Value
    identity: str
    sources: frozenset[str]
    formed: Forming | None


@dataclasses.dataclass(frozen=True)
class Merging:
    """A merged network.

    Attributes:
      plan: how it is computed; its inputs are what is kept, then the arguments.
      kept: what is kept; equal arrays have equal identities.
      before: the body as written.
      planned: what was decided, whose decisions other sizes take again.
    """

    plan: Plan
    kept: tuple[Kept, ...]
    before: Body
    planned: Plan

    def arrays(self, leaves: Sequence[Any], constants: Sequence[Any]) -> list[Array]:
        """Computes what is kept.

        Args:
          leaves: the parameters; None for those that nothing is made of.
          constants: one array for each constant of the body, or None.
        """
        env = dict(zip(self.before.inputs, leaves, strict=False))
        env |= {v: c for (v, _), c in zip(self.before.constants, constants, strict=True)}
        wanted = [k.value for k in self.kept if k.formed is None]
        formed = [k.formed for k in self.kept if k.formed is not None]
        wanted += [v for f in formed for v in f.leaves]
        env = ahead.compute(self.before, wanted, env)
        return [env[k.value] if k.formed is None else k.formed.compute(env) for k in self.kept]


# --- one program for arrays that are alike -------------------------------------------------------


def computed(found: Merging, names: Sequence[str], leaves: Sequence[Any]) -> list[Array]:
    """What is kept, by one compiled program for all that are computed alike, as those of layers.

    Args:
      found: the network.
      names: the identities of its parameters.
      leaves: the parameters.
    """
    constants = [array for _, array in found.before.constants]
    of_constants = [*map(ahead.of_array, constants)]
    programs: dict[str, Callable[..., list[Array]]] = {}
    made = []
    for one in found.kept:
        arrays = dataclasses.replace(found, kept=(one,)).arrays
        given = [
            [x if name in one.sources else None for name, x in zip(of, xs, strict=True)]
            for of, xs in ((names, leaves), (of_constants, constants))
        ]
        jaxpr = jax.make_jaxpr(arrays)(*given)
        program = programs.setdefault(ahead.of_param(jaxpr), jax.jit(jaxpr_as_fun(jaxpr)))
        made += program(*jax.tree.leaves(given))
    return made
