"""``front_contribute``: the library's one transform, and the object it returns."""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fcjax import check, trace
from fcjax import report as reporting
from fcjax.errors import NotFoldableError
from fcjax.names import path_name
from fcjax.plan import Plan, folds_always, plan
from fcjax.program import Program
from fcjax.report import Row
from fcjax.trace import Body, Kind
from fcjax.written import written

__all__ = ["FrontContribution", "front_contribute"]

PyTree = Any
PARAM = Kind("param", trainable=True)
FROZEN = Kind("param", trainable=False)
DATA = Kind("data", trainable=False, invariant=False)


def front_contribute(
    apply_fn: Callable[..., PyTree],
    params: PyTree,
    *example_args: Any,
    optimizer: Any = None,
    exactness: Literal["discrete", "flow", "approximate"] = "discrete",
    data: Any = None,
    objective: Literal["time", "memory"] = "time",
    strict: bool = False,
) -> "FrontContribution":
    r"""Traces a network and folds its non-final layers into effective weights.

    A linear segment ``y = x W_1 ... W_N`` is computed through its effective weight,

    .. math:: Z = W_1 \cdots W_N, \qquad
        \partial L/\partial W_j
          = (W_1 \cdots W_{j-1})^T\, x^T \partial L/\partial y\, (W_{j+1} \cdots W_N)^T,

    so the batch meets one product and the gradient of every factor is backpropagation's. The
    same holds with biases, branches, scales and normalisations in between. A planner takes only
    what pays for the shapes of the call.

    Args:
      apply_fn: a pure function ``apply_fn(params, *args, **kwargs)`` that returns any pytree.
      params: any pytree of arrays. Integer leaves are kept and not trained.
      *example_args: arrays or ``jax.ShapeDtypeStruct`` to trace with. With none, the input of a
        dense network with one input is inferred from its kernels, if only one width fits; the
        report is then for a batch of 1024. Calls are planned for their own shapes in any case.
      optimizer: the optax transformation that will train. Collapsing is exact for any optimizer.
      exactness: ``"discrete"`` equals backpropagation step by step; ``"flow"`` and
        ``"approximate"`` allow further rules, none of which exists yet.
      data: training inputs for input-span compression, which does not exist yet.
      objective: what the planner saves: ``"time"`` of a step, or ``"memory"`` for the backward
        pass.
      strict: whether to raise unless every non-final weight is folded away.

    Returns:
      the folded network, see :class:`FrontContribution`.

    Raises:
      FrontContributionError: if an argument is unusable, with the remedy.
      NotFoldableError: if ``strict`` and weights in front of the final layer keep training.

    Example:
      >>> import jax, jax.numpy as jnp, fcjax
      >>> params = {"first": jnp.ones((8, 64)), "second": jnp.ones((64, 2))}
      >>> def apply_fn(params, x):
      ...     return x @ params["first"] @ params["second"]
      >>> fc = fcjax.front_contribute(apply_fn, params, jnp.ones((1024, 8)))
      >>> [row.rule for row in fc.report]
      ['collapse', 'collapse']
      >>> grads = jax.grad(lambda p: fc.apply(p, jnp.ones((1024, 8))).sum())(fc.params)
      >>> grads["first"].shape
      (8, 64)

    References:
      Mishra and Arunkumar 2021, https://arxiv.org/abs/2106.05569
    """
    check.options(apply_fn, optimizer, exactness, objective, data)
    check.params(params)
    if not example_args:
        example_args = check.inferred_arguments(apply_fn, params)
    fc = FrontContribution(apply_fn, params, example_args, objective)
    if strict:
        _require_folded(fc)
    return fc


class FrontContribution:
    """A network whose non-final layers are folded into effective weights.

    Attributes:
      apply_fn: the original function.
      params: the trainable parameters: the original structure, non-float leaves replaced by None.
      contributions: arrays that are computed before training and not trained: constants that
        ``apply_fn`` closes over, and non-float parameter leaves.
      objective: what the planner saves.
    """

    def __init__(
        self,
        apply_fn: Callable[..., PyTree],
        params: PyTree,
        example_args: tuple[Any, ...],
        objective: Literal["time", "memory"] = "time",
    ) -> None:
        self.apply_fn = apply_fn
        self.objective: Literal["time", "memory"] = objective
        paths, self._structure = jax.tree_util.tree_flatten_with_path(params)
        leaves = [leaf for _, leaf in paths]
        self.paths = tuple(path_name(path) for path, _ in paths)
        self._avals = tuple(jax.typeof(leaf) for leaf in leaves)
        self._trained = tuple(jnp.issubdtype(a.dtype, jnp.inexact) for a in self._avals)
        self.params = self._unflatten(leaves)
        self._params_structure = jax.tree.structure(self.params)
        self._compiled: dict[Hashable, _Compiled] = {}
        call = _Call.of(example_args, {})
        self._example = self._compile(leaves, call)
        check.outputs(self._example.body, self._example.plan.known)
        self.contributions: dict[str, tuple[Any, ...]] = {
            "constants": tuple(array for _, array in self._example.body.constants),
            "frozen": tuple(x for x, t in zip(leaves, self._trained, strict=True) if not t),
        }

    # --- the network ---

    def apply(self, params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        """The network's output; takes the place of ``apply_fn`` in any training loop.

        Args:
          params: parameters of the structure of ``fc.params``.
          *args: what ``apply_fn`` takes; batch sizes need not be those of the example.
          **kwargs: likewise.

        Returns:
          what ``apply_fn`` returns.

        Raises:
          FrontContributionError: if ``params`` has another structure or shapes.

        Example:
          >>> import jax.numpy as jnp, fcjax
          >>> fc = fcjax.front_contribute(lambda w, x: x @ w, jnp.eye(3), jnp.ones((1, 3)))
          >>> fc.apply(fc.params, 2 * jnp.ones((5, 3))).shape
          (5, 3)
        """
        leaves = self._full_leaves(params, self.contributions["frozen"])
        call = _Call.of(args, kwargs)
        compiled = self._compile(leaves, call)
        if compiled.plan.is_trivial:  # nothing to gain: the network runs exactly as written
            return self.apply_fn(jax.tree.unflatten(self._structure, leaves), *args, **kwargs)
        return compiled(leaves, call.arrays, [array for _, array in compiled.body.constants])

    def apply_with(
        self, params: PyTree, contributions: dict[str, tuple[Any, ...]], *args: Any, **kwargs: Any
    ) -> PyTree:
        """``apply`` as a pure function of the precomputed arrays too.

        Args:
          params: parameters of the structure of ``fc.params``.
          contributions: arrays of the structure of ``fc.contributions``.
          *args: what ``apply_fn`` takes.
          **kwargs: likewise.

        Returns:
          what ``apply_fn`` returns.

        Raises:
          FrontContributionError: if ``params`` has another structure or shapes.

        Example:
          >>> import jax.numpy as jnp, fcjax
          >>> table = jnp.arange(3.0)
          >>> fc = fcjax.front_contribute(lambda w, x: x @ w + table, jnp.eye(3), jnp.ones((1, 3)))
          >>> doubled = {**fc.contributions, "constants": (2 * table,)}
          >>> fc.apply_with(fc.params, doubled, jnp.zeros((1, 3))).tolist()
          [[0.0, 2.0, 4.0]]
        """
        leaves = self._full_leaves(params, contributions["frozen"])
        call = _Call.of(args, kwargs)
        compiled = self._compile(leaves, call)
        own = {id(a): i for i, (_, a) in enumerate(self._example.body.constants)}
        constants = [
            contributions["constants"][own[id(array)]] if id(array) in own else array
            for _, array in compiled.body.constants
        ]
        return compiled(leaves, call.arrays, constants)

    # --- between the reduced and the full parameters ---

    def expand(self, params: PyTree) -> PyTree:
        """The full parameters: the original structure, shapes and dtypes.

        Args:
          params: parameters of the structure of ``fc.params``.

        Returns:
          a pytree for ``apply_fn``.

        Raises:
          FrontContributionError: if ``params`` has another structure or shapes.

        Example:
          >>> import jax.numpy as jnp, fcjax
          >>> params = {"count": jnp.array(3), "w": jnp.eye(2)}
          >>> fc = fcjax.front_contribute(lambda p, x: x @ p["w"], params, jnp.ones((1, 2)))
          >>> fc.params["count"] is None, int(fc.expand(fc.params)["count"])
          (True, 3)
        """
        leaves = self._full_leaves(params, self.contributions["frozen"])
        return jax.tree.unflatten(self._structure, leaves)

    def reduce(self, full_params: PyTree) -> PyTree:
        """The inverse of ``expand``.

        Args:
          full_params: parameters of the original structure.

        Returns:
          parameters of the structure of ``fc.params``.

        Raises:
          FrontContributionError: if ``full_params`` has another structure or shapes.

        Example:
          >>> import jax.numpy as jnp, fcjax
          >>> fc = fcjax.front_contribute(lambda w, x: x @ w, jnp.eye(2), jnp.ones((1, 2)))
          >>> fc.reduce(5 * jnp.eye(2)).shape
          (2, 2)
        """
        check.structure(full_params, self._structure, "full parameters")
        leaves = jax.tree.leaves(full_params)
        check.shapes(leaves, self._avals, self.paths)
        return self._unflatten(leaves)

    def _unflatten(self, leaves: Sequence[Any]) -> PyTree:
        kept = [x if t else None for x, t in zip(leaves, self._trained, strict=True)]
        return jax.tree.unflatten(self._structure, kept)

    def _full_leaves(self, params: PyTree, frozen: Sequence[Any]) -> list[Any]:
        check.structure(params, self._params_structure, "params")
        trained, fixed = iter(jax.tree.leaves(params)), iter(frozen)
        leaves = [next(trained) if t else next(fixed) for t in self._trained]
        check.shapes(leaves, self._avals, self.paths)
        return leaves

    # --- tracing and planning, once for every set of shapes ---

    def _compile(self, leaves: Sequence[Any], call: "_Call") -> "_Compiled":
        avals = tuple(jax.typeof(x) for x in (*leaves, *call.arrays))
        precision = jax.config.values["jax_default_matmul_precision"]
        key = (avals, call.static, folds_always(), precision)
        found = self._compiled.get(key)
        if found is None:
            found = _compiled(self, leaves, call)
            if not any(isinstance(c, jax.core.Tracer) for _, c in found.body.constants):
                self._compiled[key] = found
        return found

    # --- what was found ---

    @property
    def plan(self) -> Plan:
        """The plan for the example's shapes."""
        return self._example.plan

    @property
    def report(self) -> tuple[Row, ...]:
        """One row for each leaf of the original parameters: what was done with it, and why.

        Example:
          >>> import jax.numpy as jnp, fcjax
          >>> apply_fn = lambda w, x: jnp.tanh(x @ w)
          >>> fc = fcjax.front_contribute(apply_fn, jnp.eye(2), jnp.ones((1, 2)))
          >>> fc.report[0].rule
          'train'
        """
        return reporting.rows(self._example.plan, self.paths, self._avals)

    def __str__(self) -> str:
        return reporting.text(self._example.plan, self.paths, self._avals)

    def __repr__(self) -> str:
        taken = sum(row.rule == "collapse" for row in self.report)
        return f"FrontContribution({taken} of {len(self.paths)} leaves collapsed)"


# --- one traced and planned call ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Call:
    """Arguments of a call, arrays apart from what is fixed while tracing.

    Attributes:
      arrays: the array arguments in flattening order.
      static: the structure and everything in it that is no array.
    """

    arrays: tuple[Any, ...]
    static: tuple[Any, tuple[Any, ...]]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Call":
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = (Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
        is_array = [isinstance(x, arrays) for x in leaves]
        fixed = tuple(None if a else x for x, a in zip(leaves, is_array, strict=True))
        marks = tuple(is_array)
        return cls(
            tuple(x for x, a in zip(leaves, is_array, strict=True) if a),
            (structure, tuple(zip(marks, fixed, strict=True))),
        )

    def rebuild(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        structure, marked = self.static
        given = iter(arrays)
        return jax.tree.unflatten(structure, [next(given) if a else x for a, x in marked])


class _Compiled:
    """A plan for one set of shapes, as a jitted function."""

    def __init__(self, body: Body, plan: Plan, out_structure: Any) -> None:
        self.body = body
        self.plan = plan
        self._out_structure = out_structure
        program = Program(plan)
        self._run = jax.jit(lambda inputs, constants: program(inputs, constants, {}))

    def __call__(self, leaves: Sequence[Any], arrays: Sequence[Any], constants: Any) -> PyTree:
        outputs = self._run([*leaves, *arrays], constants)
        return jax.tree.unflatten(self._out_structure, outputs)


def _compiled(fc: FrontContribution, leaves: Sequence[Any], call: _Call) -> _Compiled:
    count = len(leaves)

    def flat(*inputs: Any) -> PyTree:
        args, kwargs = call.rebuild(inputs[count:])
        return fc.apply_fn(jax.tree.unflatten(fc._structure, inputs[:count]), *args, **kwargs)

    with check.tracing(call.arrays):
        jaxpr, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves, *call.arrays)
    body = trace.flatten(jaxpr)
    of_params = [PARAM if t else FROZEN for t in fc._trained]
    network = written(body, [*of_params, *itertools.repeat(DATA, len(call.arrays))])
    planned = plan(network, fc.objective)
    return _Compiled(body, planned, jax.tree.structure(shapes))


def _require_folded(fc: FrontContribution) -> None:
    left = reporting.trained_before_final(fc.plan, fc.paths)
    if left:
        sizes = {p: int(np.prod(a.shape)) for p, a in zip(fc.paths, fc._avals, strict=True)}
        listed = ", ".join(f"{p} ({sizes[p]} degrees of freedom)" for p in left[:5])
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise NotFoldableError(
            f"strict=True, but weights in front of the final layer keep training: {listed}{more}. "
            "Collapsing makes their step cheaper and removes none of them. Leave strict at False "
            "to train the network as it is."
        )
