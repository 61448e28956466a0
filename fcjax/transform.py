"""``front_contribute``: the library's one transform, and the object it returns."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fcjax import check, compat
from fcjax import report as reporting
from fcjax.copies import Copied
from fcjax.errors import NotFoldableError, RefutedError
from fcjax.expressions.written import Written, written
from fcjax.laws.certificate import Certificate, of_network
from fcjax.names import path_name
from fcjax.planning import hoisting
from fcjax.planning.plan import Plan, folds_always, plan
from fcjax.report import Row
from fcjax.rules.choice import choose
from fcjax.rules.flow_matrices import MatrixFold
from fcjax.rules.flow_rules import unasked
from fcjax.rules.products import MatrixChain, with_products
from fcjax.rules.reduction import Reduction, Tree, nothing
from fcjax.rules.rewrite import rewritten
from fcjax.running.program import Program
from fcjax.tracing import axes, trace
from fcjax.tracing.calls import Call, Calls
from fcjax.tracing.final import hidden_leaves
from fcjax.tracing.trace import Body, Kind
from fcjax.validation.plans import RAISE, validated
from fcjax.validation.reductions import refuted_reduction

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
    rebalance: bool = False,
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
      optimizer: the optax transformation that will train. It allows the rules that remove weights
        and are exact for this optimizer only; whether they are is tested by experiment. Without it
        all weights are trained.
      exactness: ``"discrete"`` equals backpropagation step by step; ``"flow"`` also folds chains
        whose conservation laws hold under gradient flow: over a fixed time ``learning rate *
        steps`` the result then differs from that of SGD by a multiple of the learning rate. Needs
        ``optimizer``. ``"approximate"`` also trains the final layer alone where all hidden units
        are homogeneous: the radial closure (``radial.py``), which is not backpropagation. Needs
        ``optimizer`` too.
      data: the training inputs, an array for the first argument or a tuple of arrays for all of
        them: what first layers do for inputs outside their span is then not trained. Needs
        ``optimizer``.
      objective: what the planner saves: ``"time"`` of a step, or ``"memory"`` for the backward
        pass.
      strict: whether to raise unless every non-final weight is folded away.
      rebalance: whether chains may start from balanced weights with the same function, where that
        allows to fold them. Needs ``exactness="flow"`` and ``optimizer``.

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
    check.options(apply_fn, optimizer, exactness, objective, data, rebalance)
    check.params(params)
    if not example_args:
        example_args = check.inferred_arguments(apply_fn, params)
    fc = FrontContribution(
        apply_fn, params, example_args, objective, optimizer, data, exactness, rebalance
    )
    if strict:
        _require_folded(fc)
    return fc


class FrontContribution(Copied):
    """A network whose non-final layers are folded into effective weights.

    Attributes:
      apply_fn: the original function.
      params: the trainable parameters: the original structure, leaves in the shapes in which they
        are trained, and None for those that are not.
      contributions: arrays that are computed before training and not trained: constants that
        ``apply_fn`` closes over, non-float parameter leaves, and what leads from the trained
        parameters to the original ones (signs, bases, what no basis reaches, constants of laws).
      objective: what the planner saves.

    Copies and pickles are without compiled functions. What cannot be pickled, such as an
    ``apply_fn`` that is a lambda, makes ``pickle`` fail in its own words.
    """

    anew = frozenset({"_calls", "_compiled", "_example", "_given"})
    mutable = frozenset({"contributions", "params"})

    def __init__(
        self,
        apply_fn: Callable[..., PyTree],
        params: PyTree,
        example_args: tuple[Any, ...],
        objective: Literal["time", "memory"] = "time",
        optimizer: Any = None,
        data: Any = None,
        exactness: Literal["discrete", "flow", "approximate"] = "discrete",
        rebalance: bool = False,
    ) -> None:
        self.apply_fn = apply_fn
        self.objective: Literal["time", "memory"] = objective
        self._exactness = exactness
        self._tree = _tree(params)
        self.paths = self._tree.paths
        self._avals = tuple(jax.typeof(leaf) for leaf in self._tree.leaves)
        self.begin_anew()
        call = self._calls.of(example_args, {})
        check.known_sizes(call, "give example arguments whose sizes are numbers")
        self._call = call.shapes
        body, out_structure, self._assumed = self._trace(self._avals, call, anywhere=True)
        self._reduction = nothing(self._tree)
        network = self._given = self._written(body)
        check.outputs(network.body, network.known)
        if optimizer is not None:
            given = check.data(data, call.arrays)
            self._reduction = choose(
                network, self._tree, optimizer, given, call.arrays,
                exactness=exactness, rebalance=rebalance,
            )  # fmt: skip
            self._tree = self._reduction.tree
        elif exactness != "discrete":
            self._reduction = nothing(self._tree, unasked(network, self._tree, exactness))
        self.contributions: dict[str, Any] = {}
        self._settle(body, call, out_structure)
        if not self._assumed:
            self._compiled[self._key(self._avals, call)] = self._example
        self.params = jax.tree.unflatten(self._tree.structure, self._reduction.start())
        self._params_structure = jax.tree.structure(self.params)
        self._shapes = tuple(jnp.shape(x) for x in jax.tree.leaves(self.params))

    def _settle(self, body: Body, call: Call, out_structure: Any) -> None:
        """Plans the example with the weights that were chosen, or with all if that is refuted."""
        as_given = self._reduction.is_trivial and not self._reduction.unmoved
        network = self._given if as_given else self._written(body)
        self._example = self._planned(network, out_structure, self._given)
        self.contributions = {
            "constants": tuple(_plain(array) for _, array in body.constants),
            "frozen": self._tree.frozen,
            **self._reduction.contributions,
        }
        answer = self._refuted(self._example.plan, body, call.arrays)
        if answer is not None:
            changed = [leaf for leaf in range(len(self.paths)) if self._reduction.rule(leaf)]
            self._reduction = dataclasses.replace(
                nothing(self._tree, dict.fromkeys(changed, answer)),
                unmoved=self._reduction.unmoved,
            )
            self._settle(body, call, out_structure)

    def _refuted(self, planned: Plan, body: Body, arguments: Sequence[Any]) -> str | None:
        """Why the reduced weights do not stand for all, if a check on numbers finds that."""
        if self._reduction.is_trivial:
            return None
        found = refuted_reduction(body, planned, self._reduction, self.contributions, arguments)
        if found is not None and os.environ.get(RAISE):
            raise RefutedError(f"a reduction of weights is wrong: {found}")
        return found and (
            "trained as written, because a check on numbers refuted what would replace it "
            f"({found}): a fault of fcjax, please report it with this network"
        )

    def begin_anew(self) -> None:
        """Forgets what was traced and compiled."""
        self._compiled: dict[Hashable, _Compiled] = {}
        self._calls = Calls(self.apply_fn, self._tree.structure, self._avals)

    # --- the network ---

    def apply(self, params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        """The network's output; takes the place of ``apply_fn`` in any training loop.

        Args:
          params: parameters of the structure of ``fc.params``.
          *args: what ``apply_fn`` takes; batch sizes need not be those of the example. Python
            numbers are data, as for ``jax.jit``, unless ``apply_fn`` branches on them, makes shapes
            of them or asks for their type; bools are flags. Sizes that are symbols, as in
            ``jax.export``, are planned for nothing: the network runs as written.
          **kwargs: likewise.

        Returns:
          what ``apply_fn`` returns.

        Raises:
          FrontContributionError: if ``params`` has another structure or shapes, if this call reads
            a compressed layer in another way than the example did, if known inputs leave the span
            of ``data``, or if a size is a symbol and weights are folded along gradient flow.

        Example:
          >>> import jax.numpy as jnp, fcjax
          >>> fc = fcjax.front_contribute(lambda w, x: x @ w, jnp.eye(3), jnp.ones((1, 3)))
          >>> fc.apply(fc.params, 2 * jnp.ones((5, 3))).shape
          (5, 3)
        """
        leaves = self._leaves(params, self.contributions["frozen"])
        call = self._calls.of(args, kwargs)
        if call.is_symbolic:
            return self._for_any_size(leaves, call)
        self._reduction.refuse_outside(call.arrays)
        running = self._reduction.running(leaves, self.contributions)
        compiled = self._compile(running, call)
        if compiled.is_as_written:  # nothing to gain
            return self.apply_fn(jax.tree.unflatten(self._tree.structure, running), *args, **kwargs)
        sources = self._reduction.sources(self.contributions)
        constants = [array for _, array in compiled.body.constants]
        return compiled(running, call.arrays, sources, constants)

    def _for_any_size(self, leaves: Sequence[Any], call: Call) -> PyTree:
        """The network as written."""
        if self._reduction.flows:  # their gradients are those of the reduced network
            check.known_sizes(call, "export apply_fn, with the parameters of fc.expand")
        full = self._reduction.expand(leaves, self.contributions)
        args, kwargs = call.rebuild(call.arrays)
        return self.apply_fn(jax.tree.unflatten(self._tree.structure, full), *args, **kwargs)

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
          FrontContributionError: if ``params`` has another structure or shapes, or if a size is a
            symbol, as in ``jax.export``.

        Example:
          >>> import jax.numpy as jnp, fcjax
          >>> table = jnp.arange(3.0)
          >>> fc = fcjax.front_contribute(lambda w, x: x @ w + table, jnp.eye(3), jnp.ones((1, 3)))
          >>> doubled = {**fc.contributions, "constants": (2 * table,)}
          >>> fc.apply_with(fc.params, doubled, jnp.zeros((1, 3))).tolist()
          [[0.0, 2.0, 4.0]]
        """
        leaves = self._leaves(params, contributions["frozen"])
        call = self._calls.of(args, kwargs)
        check.known_sizes(call, "use fc.apply")
        running = self._reduction.running(leaves, contributions)
        compiled = self._compile(running, call)
        own = {id(a): i for i, (_, a) in enumerate(self._example.body.constants)}
        constants = [
            contributions["constants"][own[id(array)]] if id(array) in own else array
            for _, array in compiled.body.constants
        ]
        sources = self._reduction.sources(contributions)
        return compiled(running, call.arrays, sources, constants)

    # --- between the reduced and the full parameters ---

    def expand(self, params: PyTree, contributions: dict[str, Any] | None = None) -> PyTree:
        """The full parameters: the original structure, shapes and dtypes.

        Args:
          params: parameters of the structure of ``fc.params``.
          contributions: those of ``fc.refresh``; ``fc.contributions`` by default.

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
        contributions = self.contributions if contributions is None else contributions
        leaves = self._leaves(params, contributions["frozen"])
        full = self._reduction.expand(leaves, contributions)
        return jax.tree.unflatten(self._tree.structure, full)

    def reduce(self, full_params: PyTree) -> PyTree:
        """The inverse of ``expand``.

        Args:
          full_params: parameters of the original structure.

        Returns:
          parameters of the structure of ``fc.params``.

        Raises:
          FrontContributionError: if ``full_params`` has another structure or shapes, or differs
            from the initial parameters where nothing is trained.

        Example:
          >>> import jax.numpy as jnp, fcjax
          >>> fc = fcjax.front_contribute(lambda w, x: x @ w, jnp.eye(2), jnp.ones((1, 2)))
          >>> fc.reduce(5 * jnp.eye(2)).shape
          (2, 2)
        """
        leaves = self._full_leaves(full_params)
        reduced = self._reduction.reduce(leaves, self.contributions)
        self._reduction.refuse_elsewhere(leaves, reduced)
        return jax.tree.unflatten(self._tree.structure, reduced)

    def check(self, params: PyTree, contributions: dict[str, Any] | None = None) -> tuple[str, ...]:
        """Whether the flow folds are still valid at some trained parameters.

        Gradient flow never leaves the region where their closed forms hold; training with a
        learning rate can. Ask this now and then, outside of ``jit``.

        Args:
          params: parameters of the structure of ``fc.params``, with known values.
          contributions: those of ``fc.refresh``; ``fc.contributions`` by default.

        Returns:
          One sentence for each flow fold or closure that is no longer valid; empty if all are.

        Raises:
          FrontContributionError: if ``params`` has another structure or shapes.

        Example:
          >>> import jax.numpy as jnp, optax, fcjax
          >>> apply_fn = lambda p, x: x @ p[0] @ p[1]
          >>> params = [2 * jnp.eye(2), 2 * jnp.eye(2)]
          >>> fc = fcjax.front_contribute(
          ...     apply_fn, params, jnp.ones((1, 2)), optimizer=optax.sgd(0.1), exactness="flow"
          ... )
          >>> fc.check(fc.params)
          ()
          >>> fc.check([None, jnp.diag(jnp.array([4.0, -1.0]))])  # doctest: +ELLIPSIS
          ('the determinant of the product in 1 has changed its sign: ...',)
        """
        contributions = self.contributions if contributions is None else contributions
        leaves = self._leaves(params, contributions["frozen"])
        return self._reduction.broken(leaves, contributions)

    def refresh(self, full_params: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Begins the radial closure anew, at weights that backpropagation has moved.

        A pure function, which may be jitted. Between two of its calls the directions of hidden
        weights stay; one ordinary step every K steps, and this after it, turn them too.

        Args:
          full_params: parameters of the original structure.

        Returns:
          parameters of the structure of ``fc.params``, and contributions for ``fc.apply_with`` and
          ``fc.expand``.

        Raises:
          FrontContributionError: if ``full_params`` has another structure or shapes, or if the
            network is not folded by the radial closure.

        Example:
          >>> import jax, jax.numpy as jnp, optax, fcjax
          >>> net = lambda p, x: jax.nn.relu(x @ p[0]) @ p[1]
          >>> fc = fcjax.front_contribute(
          ...     net, [jnp.eye(2), jnp.ones((2, 1))], jnp.ones((1, 2)),
          ...     optimizer=optax.sgd(0.1), exactness="approximate",
          ... )
          >>> params, contributions = fc.refresh([2 * jnp.eye(2), jnp.ones((2, 1))])
          >>> fc.apply_with(params, contributions, jnp.ones((1, 2))).tolist()
          [[4.0]]
        """
        leaves = self._full_leaves(full_params)
        flows = self._reduction.refreshed(leaves)
        frozen = [x for x, t in zip(leaves, self._tree.trained, strict=True) if not t]
        contributions = {**self.contributions, "flows": flows, "frozen": tuple(frozen)}
        reduced = self._reduction.reduce(leaves, contributions)
        return jax.tree.unflatten(self._tree.structure, reduced), contributions

    def law_gradients(self, params: PyTree, gradient: PyTree) -> dict[str, Any]:
        """By how much one step of SGD changes what each flow fold takes as conserved.

        Args:
          params: parameters of the structure of ``fc.params``.
          gradient: the gradient of a loss by them.

        Returns:
          For each flow fold, under the name of its survivor, a scalar that times the squared
          learning rate bounds the change; see :func:`fcjax.track_drift`.

        Raises:
          FrontContributionError: if either has another structure or shapes.

        Example:
          >>> import jax.numpy as jnp, optax, fcjax
          >>> fc = fcjax.front_contribute(
          ...     lambda p, x: x * p[0] * p[1], [jnp.ones(2), 2 * jnp.ones(2)], jnp.ones((1, 2)),
          ...     optimizer=optax.sgd(0.1), exactness="flow",
          ... )
          >>> found = fc.law_gradients(fc.params, [None, jnp.array([3.0, -1.0])])
          >>> {name: float(square) for name, square in found.items()}
          {'1': 9.0}
        """
        frozen = self.contributions["frozen"]
        leaves, gradients = self._leaves(params, frozen), self._leaves(gradient, frozen)
        return self._reduction.law_gradients(leaves, gradients, self.contributions)

    def _full_leaves(self, full_params: PyTree) -> list[Any]:
        check.structure(full_params, self._tree.structure, "full parameters")
        leaves = jax.tree.leaves(full_params)
        check.shapes(leaves, [a.shape for a in self._avals], self.paths)
        return leaves

    def _leaves(self, params: PyTree, frozen: Sequence[Any]) -> list[Any]:
        """All leaves, in the shapes in which they are trained; None for those that follow."""
        check.structure(params, self._params_structure, "params")
        given = jax.tree.leaves(params)
        kept = [
            i for i, x in enumerate(self._tree.trained) if x and i not in self._reduction.folded
        ]
        check.shapes(given, self._shapes, [self.paths[i] for i in kept])
        trained, fixed = dict(zip(kept, given, strict=True)), iter(frozen)
        return [trained.get(i) if t else next(fixed) for i, t in enumerate(self._tree.trained)]

    # --- tracing and planning, once for every set of shapes ---

    def _compile(self, running: Sequence[Any], call: Call) -> "_Compiled":
        avals = [self._original(i, jax.typeof(x)) for i, x in enumerate(running)]
        key = self._key(avals, call)
        found = self._compiled.get(key)
        if found is None:
            body, out_structure, _ = self._trace(avals, call)
            found = self._planned(self._written(body), out_structure)
            if not any(isinstance(c, jax.core.Tracer) for _, c in found.body.constants):
                self._compiled[key] = found
        return found

    def _original(self, leaf: int, aval: Any) -> Any:
        """A leaf as ``apply_fn`` takes it, in the dtype of this call."""
        shape = self._avals[leaf].shape
        return aval if aval.shape == shape else jax.core.ShapedArray(shape, aval.dtype)

    def _key(self, avals: Sequence[Any], call: Call) -> Hashable:
        precision = jax.config.values["jax_default_matmul_precision"]
        around = folds_always(), precision, compat.bound_axes()
        return tuple(avals), call.key, around

    def _trace(
        self, avals: Sequence[Any], call: Call, *, anywhere: bool = False
    ) -> tuple[Body, Any, dict[str, int]]:
        """The network on its original parameters, and the structure of what it returns.

        With ``anywhere`` also outside mapped axes that it names; their assumed sizes come last.
        """
        flat = call.flattened(self.apply_fn, self._tree.structure)
        with check.tracing(call.arrays):
            jaxpr, shapes, assumed = axes.make_jaxpr(
                flat, [*avals, *call.arrays], anywhere=anywhere
            )
        return trace.flatten(jaxpr), jax.tree.structure(shapes), assumed

    @functools.cached_property
    def _given(self) -> Written:
        """The network as it was given, traced for the example."""
        body, *_ = self._trace(self._avals, self._call, anywhere=True)
        return self._written(body, nothing(self._tree))

    @functools.cached_property
    def _example(self) -> "_Compiled":
        """The plan for the example."""
        body, out_structure, _ = self._trace(self._avals, self._call, anywhere=True)
        return self._planned(self._written(body), out_structure, self._given)

    def _written(self, body: Body, reduction: Reduction | None = None) -> Written:
        reduction = reduction or self._reduction
        without_gradient = reduction.followed | reduction.unmoved
        of_params = [
            PARAM if trained and leaf not in without_gradient else FROZEN
            for leaf, trained in enumerate(self._tree.trained)
        ]
        of_arguments = [DATA] * (len(body.inputs) - len(of_params))
        return written(body, [*of_params, *of_arguments])

    def _planned(
        self, network: Written, out_structure: Any, original: Written | None = None
    ) -> "_Compiled":
        """The plan; what ``original`` costs, the network by default, is its price as written."""
        if self._reduction.is_trivial:
            ways = (hoisting.planned, plan, functools.partial(plan, streams=False))
            planned = validated(
                network.body, [functools.partial(make, network, self.objective) for make in ways]
            )
            return _Compiled(network, planned, out_structure)
        reduced = network
        if self._products:
            reduced = with_products(reduced, self._products, self.paths)
        if self._reduction.compression is not None:
            reduced = rewritten(reduced, self._reduction.compression, self.paths)
        planned = plan(reduced, self.objective, original or network)
        return _Compiled(network, planned, out_structure)

    @property
    def _products(self) -> list[MatrixChain]:
        """The chains whose factors the network is not given, only their product."""
        return [fold.chain for fold in self._reduction.flows if isinstance(fold, MatrixFold)]

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
        return reporting.rows(self._example.plan, self._reduction)

    def _certificate(self) -> Certificate:
        """How far the final layer can go in this network."""
        body, known = self._given.body, self._given.known
        kinds = [known[value] for value in body.inputs]
        return of_network(body, kinds, self.paths, self._tree.leaves)

    def __str__(self) -> str:
        text = reporting.text(self._example.plan, self._reduction, self._assumed)
        if self._exactness == "discrete" or not all(map(check.is_known, self._tree.leaves)):
            return text
        return f"{text}\n\n{self._certificate()}"

    def __repr__(self) -> str:
        return f"FrontContribution({reporting.counted(self.report)})"


# --- one traced and planned call ----------------------------------------------------------------


class _Compiled:
    """A plan for one set of shapes, as a jitted function.

    Attributes:
      plan: the plan.
      body: the equations that it computes; others than the network's where weights are reduced.
      is_as_written: whether it computes just what ``apply_fn`` does.
    """

    def __init__(self, network: Written, planned: Plan, out_structure: Any) -> None:
        self.is_as_written = planned.is_trivial and planned.body is network.body
        self.body = planned.body
        self.plan = planned
        self._out_structure = out_structure
        program = Program(planned)
        self._run = jax.jit(lambda inputs, constants: program(inputs, constants, {}))

    def __call__(
        self, leaves: Sequence[Any], arrays: Sequence[Any], sources: Sequence[Any], constants: Any
    ) -> PyTree:
        outputs = self._run([*leaves, *arrays, *sources], constants)
        return jax.tree.unflatten(self._out_structure, outputs)


def _plain(array: Any) -> Any:
    """An array of numpy as such, not as jax wraps it in what it traces: that cannot be pickled."""
    return array if isinstance(array, jax.Array) else np.asarray(array)


def _tree(params: PyTree) -> Tree:
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = tuple(leaf for _, leaf in paths)
    return Tree(
        structure,
        tuple(path_name(path) for path, _ in paths),
        leaves,
        tuple(jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact) for leaf in leaves),
    )


def _require_folded(fc: FrontContribution) -> None:
    kinds = [fc.plan.known[value] for value in fc.plan.body.inputs]
    left = [fc.paths[i] for i in hidden_leaves(fc.plan.body, kinds, len(fc.paths))]
    if left:
        sizes = {row.path: math.prod(row.reduced_shape or ()) for row in fc.report}
        reasons = {fc.paths[leaf]: reason for leaf, reason in fc._reduction.reasons.items()}
        listed = ", ".join(
            f"{p} ({sizes[p]} degrees of freedom{': ' + reasons[p] if p in reasons else ''})"
            for p in left[:5]
        )
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise NotFoldableError(
            f"strict=True, but weights in front of the final layer keep training: {listed}{more}. "
            "Collapsing and compressing make their step cheaper and remove none of them entirely. "
            f"{fc._certificate()}. Leave strict at False to train the network as it is."
        )
