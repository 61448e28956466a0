"""Conservation laws of gradient flow, found for the user's own network."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fcjax import check
from fcjax.errors import FrontContributionError
from fcjax.laws import scaling_rules, symmetries
from fcjax.laws.certificate import Certificate, certificate, counted
from fcjax.laws.invariance import invariant
from fcjax.laws.units import Symmetry, quadratic
from fcjax.names import layer_name, short_names
from fcjax.rules.reduction import Tree
from fcjax.tracing import axes, trace
from fcjax.tracing.calls import Call
from fcjax.tracing.final import hidden_leaves
from fcjax.tracing.trace import Body, Kind
from fcjax.transform import DATA, FROZEN, PARAM, _tree

__all__ = ["ConservationLaws", "LawGroup", "conservation_laws"]

PyTree = Any


def conservation_laws(
    apply_fn: Callable[..., PyTree], params: PyTree, *example_args: Any
) -> "ConservationLaws":
    r"""Finds what gradient flow conserves in a network, whatever the loss and the data.

    Multiply what comes into a hidden unit k by c > 0. If the unit's output scales by :math:`c^p`,
    dividing what goes out by that leaves the network as it is, so that

    .. math:: \|w^{in}_k\|^2 - p\,\|w^{out}_k\|^2

    does not change along gradient flow (biases belong to what comes in). Between linear maps any
    mixing of the units may be undone, and the law is the symmetric matrix
    :math:`\sum_{in} W^T W - \sum_{out} W W^T`. Laws are found for dense and convolutional layers,
    residual and parallel branches, gains, gated units, embeddings and attention heads. What is not
    known to scale ends a law; a network without laws gives an empty result with a reason. Indices
    of look-ups stand in their tables: for others ``x[i]`` returns a row, but JAX gives that row no
    gradient. Weights in half precision have no laws: their gradients round too much.

    Args:
      apply_fn: a pure function ``apply_fn(params, *args)`` that returns any pytree.
      params: any pytree of arrays.
      *example_args: arrays or ``jax.ShapeDtypeStruct`` to trace with, as in ``front_contribute``.

    Returns:
      the laws, see :class:`ConservationLaws`.

    Raises:
      FrontContributionError: if an argument is unusable, with the remedy.

    Example:
      >>> import jax, jax.numpy as jnp, fcjax
      >>> params = {"first": jnp.ones((2, 3)), "second": jnp.ones((3, 1))}
      >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["first"]) @ p["second"]
      >>> laws = fcjax.conservation_laws(apply_fn, params, jnp.ones((5, 2)))
      >>> laws.names[0], laws.values(params).tolist()
      ('first -> second, unit 0', [1.0, 1.0, 1.0])
      >>> laws.rank()
      (3, 6)

    References:
      Du, Hu and Lee 2018, https://arxiv.org/abs/1806.00900; Kunin et al. 2021,
      https://arxiv.org/abs/2012.04728; Marcotte, Gribonval and Peyre 2023,
      https://arxiv.org/abs/2307.00144
    """
    check.options(apply_fn, None, "discrete", "time", None)
    check.params(params)
    if not example_args:
        example_args = check.inferred_arguments(apply_fn, params)
    tree, call = _tree(params), Call.of(example_args, {})
    flat = call.flattened(apply_fn, tree.structure)
    with check.tracing(call.arrays):
        avals = [*map(jax.typeof, tree.leaves), *call.arrays]
        jaxpr, *_ = axes.make_jaxpr(flat, avals, anywhere=True)
        body = trace.flatten(jaxpr)
    kinds = [PARAM if trained else FROZEN for trained in tree.trained]
    kinds += [DATA] * len(call.arrays)
    check.outputs(body, trace.kinds(body, kinds))
    return ConservationLaws(tree, body, kinds)


@dataclasses.dataclass(frozen=True)
class LawGroup:
    """The laws of one group of hidden units.

    Attributes:
      name: the layers on both sides, such as ``"Dense_0 -> Dense_1"``.
      symmetry: what they follow from: where the units stand in the parameters, with which degrees.
      start: the position of the first among all laws.
    """

    name: str
    symmetry: Symmetry
    start: int

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self.start + self.symmetry.laws

    def names(self) -> Iterator[str]:
        """The name of each law."""
        symmetry = self.symmetry
        fixed = symmetry.units[: len(symmetry.units) - symmetry.mixed]
        if not symmetry.mixed:
            for unit in np.ndindex(*fixed):
                yield f"{self.name}, unit {_index(unit)}"
            return
        _, size = symmetry.mixing
        for block in np.ndindex(*fixed):
            where = f", block {_index(block)}" if block else ""
            for i, j in itertools.combinations_with_replacement(range(size), 2):
                yield f"{self.name}{where}, entry ({i}, {j})"

    @property
    def kind(self) -> str:
        """What the laws are, in words."""
        blocks, size = self.symmetry.mixing
        if self.symmetry.mixed:
            matrix = f"symmetric {size} x {size}"
            return matrix if blocks == 1 else f"{blocks} x {matrix}"
        degrees = sorted({-place.charge for place in self.symmetry.outgoing})
        listed = ", ".join(map(str, degrees))
        return "one a unit" + (f", degree {listed}" if degrees not in ([], [1]) else "")


def _index(index: Sequence[int]) -> str:
    return str(index[0]) if len(index) == 1 else f"({', '.join(map(str, index))})"


class ConservationLaws:
    """The conservation laws of a network.

    Attributes:
      groups: the laws by groups of hidden units, from the input to the output.
      reason: why there are none, or None.
    """

    def __init__(self, tree: Tree, body: Body, kinds: Sequence[Kind]) -> None:
        self._tree = tree
        self._hidden = hidden_leaves(body, kinds, len(tree.leaves))
        found = invariant(body, symmetries.find(body, kinds), tree.leaves)
        starts = itertools.accumulate((s.laws for s in found), initial=0)
        names = _group_names(found, short_names(tree.paths), tree.paths)
        self.groups = tuple(map(LawGroup, names, found, starts))
        self.reason = None if found else _reason(body)

    def __len__(self) -> int:
        return self.groups[-1].stop if self.groups else 0

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The name of each law, in the order of ``values``."""
        return tuple(itertools.chain.from_iterable(group.names() for group in self.groups))

    def _leaves(self, params: PyTree) -> list[Any]:
        check.structure(params, self._tree.structure, "params")
        leaves = jax.tree.leaves(params)
        check.shapes(leaves, [np.shape(x) for x in self._tree.leaves], self._tree.paths)
        return leaves

    def values(self, params: PyTree) -> Array:
        """The value of each law, of shape ``(number of laws,)``; can be jitted.

        Args:
          params: parameters of the structure given to ``conservation_laws``.

        Raises:
          FrontContributionError: if ``params`` has another structure or shapes.
        """
        leaves = self._leaves(params)
        each = [quadratic(group.symmetry, leaves) for group in self.groups]
        return jnp.concatenate(each) if each else jnp.zeros(0)

    def drift(self, before: PyTree, after: PyTree) -> Array:
        """By how much each law changed between two sets of parameters.

        Args:
          before: parameters of the structure given to ``conservation_laws``.
          after: likewise.

        Raises:
          FrontContributionError: if one has another structure or shapes.
        """
        return self.values(after) - self.values(before)

    def predicted_drift(
        self,
        params: PyTree,
        gradients: PyTree,
        learning_rate: Any,
        weight_decay: Any = 0.0,
        *,
        in_loss: bool = False,
    ) -> Array:
        r"""By how much one step of SGD will change each law: an identity, not an estimate.

        A law D is a quadratic form, and orthogonal to the gradient G of every loss. One step
        :math:`w' = w - \eta (G + \lambda w)` therefore gives

        .. math:: D(w') = (1 - \eta\lambda)^2 D(w) + \eta^2 D(G).

        Args:
          params: the parameters before the step.
          gradients: the gradients there, of the same structure.
          learning_rate: eta.
          weight_decay: lambda.
          in_loss: whether the gradients contain ``weight_decay * params`` already, from a penalty
            in the loss; otherwise the optimizer adds it, as ``optax.add_decayed_weights`` does.

        Returns:
          an array of shape ``(number of laws,)``.

        Raises:
          FrontContributionError: if an argument has another structure or shapes.

        Example:
          >>> import jax, jax.numpy as jnp, fcjax
          >>> apply_fn = lambda p, x: x @ p[0] @ p[1]
          >>> params, x = (2 * jnp.eye(1), jnp.eye(1)), jnp.eye(1)
          >>> laws = fcjax.conservation_laws(apply_fn, params, x)
          >>> gradients = jax.grad(lambda p: apply_fn(p, x).sum())(params)
          >>> stepped = jax.tree.map(lambda w, g: w - 0.5 * g, params, gradients)
          >>> float(laws.predicted_drift(params, gradients, 0.5)[0])
          -0.75
          >>> float(laws.drift(params, stepped)[0])
          -0.75
        """
        shrinks = learning_rate * weight_decay
        squared = learning_rate**2 * self.values(gradients)
        if in_loss:
            return squared - 2 * shrinks * self.values(params)
        return squared + (shrinks**2 - 2 * shrinks) * self.values(params)

    def certificate(self, params: PyTree = None) -> Certificate:
        """How many hidden weights the laws determine, in all and layer by layer.

        Args:
          params: at which parameters; the initial ones by default.

        Raises:
          FrontContributionError: if ``params`` has another structure or shapes, or no known values,
            or if the initial ones are asked for and have been donated.
        """
        leaves = self._tree.leaves if params is None else self._leaves(params)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise FrontContributionError(
                "the rank of conservation laws is a whole number that depends on the values of "
                "params; call rank and certificate outside jit"
            )
        check.kept(leaves, "the params that the laws were found for", "pass others as params=")
        found = [group.symmetry for group in self.groups]
        return certificate(found, self._hidden, self._tree.paths, leaves)

    def rank(self, params: PyTree = None) -> tuple[int, int]:
        """The hidden degrees of freedom that are determined, and all hidden degrees of freedom.

        Args:
          params: at which parameters; the initial ones by default.

        Raises:
          FrontContributionError: if ``params`` has another structure or shapes, or no known values,
            or if the initial ones are asked for and have been donated.
        """
        found = self.certificate(params)
        return found.determined, found.hidden

    def __repr__(self) -> str:
        return f"ConservationLaws({len(self):,} laws in {len(self.groups)} groups)"

    def __str__(self) -> str:
        if not self.groups:
            return f"fcjax: no conservation laws: {self.reason}"
        if not all(map(check.is_known, self._tree.leaves)):
            return f"fcjax: {len(self):,} laws of gradient flow, of params without known values"
        found = self.certificate()
        values = np.asarray(
            self.values(jax.tree.unflatten(self._tree.structure, self._tree.leaves))
        )
        lines = [f"fcjax: {len(self):,} conservation laws of gradient flow", ""]
        lines += _table(
            ("units between", "laws", "what", "smallest", "largest"),
            [_group_row(group, values[group.start : group.stop]) for group in self.groups],
        )
        lines += ["", "determined by the laws and all other layers"]
        lines += _table(
            ("hidden layer", "degrees of freedom"),
            [(row.name, counted(row.determined, row.size, row.exact)) for row in found.layers],
        )
        return "\n".join([*lines, "", str(found)])


def _group_row(group: LawGroup, values: np.ndarray[Any, Any]) -> tuple[str, ...]:
    return (
        group.name, f"{group.symmetry.laws:,}", group.kind,
        f"{values.min(initial=np.inf):.3g}", f"{values.max(initial=-np.inf):.3g}",
    )  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of aligned columns."""
    listed = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*listed, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in listed
    ]


# --- names and reasons --------------------------------------------------------------------------


def _group_names(
    found: Sequence[Symmetry], short: dict[str, str], paths: Sequence[str]
) -> list[str]:
    """The layers on both sides of each group, numbered where that is the same for two."""
    names: list[str] = []
    for symmetry in found:
        sides = [
            _listed(list(dict.fromkeys(layer_name(short[paths[p.leaf]]) for p in places)))
            for places in (symmetry.incoming, symmetry.outgoing)
        ]
        name = " -> ".join(side for side in sides if side)
        again = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({again + 1})" if again else name)
    return names


def _listed(layers: Sequence[str]) -> str:
    if len(layers) > 4:
        return f"{layers[0]} + {layers[1]} + ... + {layers[-1]} ({len(layers)} layers)"
    return " + ".join(layers)


def _reason(body: Body) -> str:
    """Why a network has no laws: what stands between its layers."""
    unknown = scaling_rules.read(body, [], []).boundaries
    if not unknown:
        return "no hidden unit can be scaled without changing the output"
    return (
        "no hidden unit can be scaled without changing the output; what is not known to scale with "
        f"its input: {', '.join(unknown)}"
    )
