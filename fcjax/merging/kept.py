"""What a merged network keeps of its parameters."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jax import Array

from fcjax.merging import ahead
from fcjax.planning.plan import Plan
from fcjax.tracing.trace import Body, Value

__all__ = ["Forming", "Kept", "Merging"]


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
    """

    plan: Plan
    kept: tuple[Kept, ...]
    before: Body

    def arrays(self, leaves: Sequence[Any], constants: Sequence[Any]) -> list[Array]:
        """Computes what is kept.

        Args:
          leaves: the parameters.
          constants: one array for each constant of the body.
        """
        env = dict(zip(self.before.inputs, leaves, strict=False))
        env |= {v: c for (v, _), c in zip(self.before.constants, constants, strict=True)}
        wanted = [k.value for k in self.kept if k.formed is None]
        formed = [k.formed for k in self.kept if k.formed is not None]
        wanted += [v for f in formed for v in f.leaves]
        env = ahead.compute(self.before, wanted, env)
        return [env[k.value] if k.formed is None else k.formed.compute(env) for k in self.kept]
