"""``merge``: a trained network for inference, every linear segment one operator."""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from fcjax import check
from fcjax.copies import Copied
from fcjax.errors import FrontContributionError
from fcjax.measure import Timings, compare_steps, flops_of
from fcjax.merging.ahead import digest
from fcjax.merging.kept import computed
from fcjax.merging.prepared import Compiled, Traced, compiled, resized, settled
from fcjax.merging.symbolic import EVEN, NUMBERS, Sizes, check_path, check_results, run
from fcjax.merging.table import (
    MergedRow,
    as_they_were,
    made_of,
    names_of,
    nothing_merged,
    rows,
)
from fcjax.names import path_name, unused
from fcjax.tracing.calls import Call, Calls

__all__ = ["Merged", "merge"]

PyTree = Any


def merge(
    apply_fn: Callable[..., PyTree],
    params: PyTree,
    *example_args: Any,
    constant_argnums: Sequence[int] = (),
) -> "Merged":
    r"""Merges a trained network for inference.

    What depends on the parameters alone is computed once, here, and every linear segment becomes
    one operator: :math:`y = x W_1 W_2 + b_1 W_2 + b_2` becomes :math:`y = x Z + c`. Branches add
    up, adapters are added to the weights beside them, gains of normalisations and BatchNorm with
    running statistics are multiplied into the weights. A product of weights that would make the
    evaluation dearer, as behind a narrow waist, is not formed.

    Args:
      apply_fn: a pure function ``apply_fn(params, *args, **kwargs)`` that returns any pytree.
      params: any pytree of arrays, for Flax linen all variables that stay the same, such as
        ``{"params": ..., "batch_stats": ...}``.
      *example_args: arrays or ``jax.ShapeDtypeStruct`` to trace with. With none, the input of a
        dense network with one input is inferred from its kernels, if only one width fits.
      constant_argnums: positions of further arguments of ``apply_fn`` that stay the same, such as
        running statistics; ``params`` is 0. They must be arrays. Calls leave them out.

    Returns:
      the merged network, see :class:`Merged`.

    Raises:
      FrontContributionError: if an argument is unusable, with the remedy.

    Example:
      >>> import jax.numpy as jnp, fcjax
      >>> params = {"up": jnp.ones((8, 64)), "bias": jnp.ones(64), "down": jnp.ones((64, 2))}
      >>> def apply_fn(params, x):
      ...     return (x @ params["up"] + params["bias"]) @ params["down"]
      >>> merged = fcjax.merge(apply_fn, params, jnp.ones((16, 8)))
      >>> {name: array.shape for name, array in merged.params.items()}
      {'bias+down/bias': (2,), 'down+up/kernel': (8, 2)}
      >>> merged.apply(merged.params, jnp.ones((3, 8))).shape
      (3, 2)

    References:
      Ding et al. 2021, RepVGG, https://arxiv.org/abs/2101.03697
    """
    check.options(apply_fn, None, "discrete", "time", None)
    check.params(params, trained=False)
    if not example_args:
        example_args = check.inferred_arguments(apply_fn, params)
    if constant_argnums:
        apply_fn, params, example_args = _with_constants(
            apply_fn, params, example_args, frozenset(constant_argnums)
        )
    return Merged(apply_fn, params, example_args)


class Merged(Copied):
    """A network for inference.

    Attributes:
      apply_fn: the original function.
      params: what ``apply`` takes: effective weights and biases, and the original leaves that are
        still read, by name. The original pytree if there was nothing to merge.
      reason: why nothing was merged, or None.
      weights: the numbers of weights before and after.
      flops: floating-point operations of one call with the example's shapes, before and after.

    Copies and pickles are without compiled functions. What cannot be pickled, such as an
    ``apply_fn`` that is a lambda, makes ``pickle`` fail in its own words.
    """

    anew = frozenset({"_calls", "_compiled", "_first"})
    mutable = frozenset({"params"})

    def __init__(
        self, apply_fn: Callable[..., PyTree], params: PyTree, example_args: tuple[Any, ...]
    ) -> None:
        self.apply_fn = apply_fn
        paths, self._structure = jax.tree_util.tree_flatten_with_path(params)
        self._paths = _unique(path_name(path) for path, _ in paths)
        self._original = tuple(leaf for _, leaf in paths)
        self._avals = tuple(jax.typeof(leaf) for leaf in self._original)
        self._timings: Timings | None = None
        self.begin_anew()
        example = self._calls.of(example_args, {})
        check.known_sizes(example, "give example arguments whose sizes are numbers")
        calls, traced = self._traced_for_sizes(example)
        merged = settled(traced, self._paths)
        self._raw, found = merged.raw, merged.found
        self._decided, self._first = calls[merged.first].shapes, found[merged.first]
        self._compiled.update(zip(map(self._key, calls), found, strict=True))
        kept = [k for c in found for k in c.merging.kept]
        self._names = names_of(kept, self._paths)
        self._rows = tuple(rows(kept, self._names, self._paths))
        before = flops_of(traced[0].jaxpr)
        self.flops = (before, found[0].flops(example.arrays))
        self.reason = nothing_merged(self._rows, self.flops)
        self.params: PyTree = params
        if self.reason is None:
            self.params = self._formed(found)
        else:
            self.flops = (before, before)
            self._rows = tuple(as_they_were(self._paths, [a.shape for a in self._avals]))
        self._given = jax.tree.map(jax.typeof, self.params)
        self.weights = (_count(params), _count(self.params))

    def begin_anew(self) -> None:
        """Forgets what was traced and compiled."""
        self._compiled: dict[Hashable, Compiled] = {}
        self._calls = Calls(self.apply_fn, self._structure, self._avals)

    # --- evaluation ---

    def apply(self, params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        """The network's output, equal to the original's up to rounding.

        Args:
          params: arrays of the structure of ``merged.params``.
          *args: what ``apply_fn`` takes, without constant arguments; of any batch size. Python
            numbers are data, as for ``jax.jit``, unless ``apply_fn`` branches on them, makes shapes
            of them or asks for their type; bools are flags.
          **kwargs: likewise.

        Returns:
          what ``apply_fn`` returns.

        Raises:
          FrontContributionError: if ``params`` has another structure, shapes or dtypes, or if a
            call of these shapes reads the parameters in another way than the example did.

        Example:
          >>> import jax.numpy as jnp, fcjax
          >>> merged = fcjax.merge(lambda p, x: x @ p[0] @ p[1], [jnp.eye(3)] * 2, jnp.ones((1, 3)))
          >>> merged.apply(merged.params, jnp.ones(3)).tolist()
          [1.0, 1.0, 1.0]
        """
        if self.reason is not None:
            return self.apply_fn(params, *args, **kwargs)
        check.structure(params, jax.tree.structure(self.params), "merged params")
        _check_arrays(params, self._given)
        call = self._calls.of(args, kwargs)
        if call.is_symbolic:
            return self._with_symbols(params, call)
        return self._run(self._merged(call), params, call.arrays)

    def _with_symbols(self, params: PyTree, call: Call) -> PyTree:
        """``apply`` for sizes that are symbols, from the programs for several numbers."""
        symbolic = self._trace(call)

        def traced_for(numbers: Any) -> tuple[Sizes, list[tuple[Call, Traced]]]:
            sizes = Sizes(call, numbers, symbolic.jaxpr)
            return sizes, [(c, self._trace(c)) for c in sizes.calls(call)]

        try:
            sizes, traced = traced_for(NUMBERS)
        except FrontContributionError:
            sizes, traced = traced_for(EVEN)
        programs = []
        for numbers, network in traced:
            check_path(symbolic.jaxpr, network.jaxpr)
            found = compiled(network, self._paths, self._raw, self._first)
            self._refuse_other(found, numbers)
            whole = functools.partial(self._run, found)
            programs.append(jax.make_jaxpr(whole)(params, numbers.arrays))
        outputs = run(sizes, programs, [*jax.tree.leaves(params), *call.arrays])
        check_results(sizes, symbolic.jaxpr, outputs)
        return jax.tree.unflatten(symbolic.structure, outputs)

    def _run(self, found: Compiled, params: Mapping[str, Any], arrays: Sequence[Any]) -> PyTree:
        return found([params[self._names[k.identity]] for k in found.merging.kept], arrays)

    def latency(self, *args: Any, repeats: int = 25) -> Timings:
        """Times the original and the merged network in turns; ``print`` shows the last result.

        Args:
          *args: arrays to call both with.
          repeats: number of rounds.

        Returns:
          times under the names ``original`` and ``merged``.

        Example:
          >>> import jax.numpy as jnp, fcjax
          >>> merged = fcjax.merge(lambda p, x: x @ p[0] @ p[1], [jnp.eye(3)] * 2, jnp.ones((1, 3)))
          >>> sorted(merged.latency(jnp.ones((4, 3)), repeats=3).seconds)
          ['merged', 'original', 'original (again)']
        """
        call = self._calls.of(args, {})
        original = jax.tree.unflatten(self._structure, self._original)
        fns = {
            "original": functools.partial(jax.jit(call.bind(self.apply_fn)), original),
            "merged": functools.partial(jax.jit(call.bind(self.apply)), self.params),
        }
        self._timings = compare_steps(fns, call.arrays, repeats)
        return self._timings

    # --- tracing, once for every set of shapes ---

    def _key(self, call: Call) -> Hashable:
        return call.key, jax.config.values["jax_default_matmul_precision"]

    def _merged(self, call: Call) -> Compiled:
        key = self._key(call)
        found = self._compiled.get(key)
        if found is None:
            found = compiled(self._trace(call), self._paths, self._raw, self._first)
            self._refuse_other(found, call)
            if not any(isinstance(c, jax.core.Tracer) for c in found.constants):
                self._compiled[key] = found
        return found

    @functools.cached_property
    def _first(self) -> Compiled:
        """The network for the shapes for which it was decided what is merged."""
        return compiled(self._trace(self._decided), self._paths, self._raw)

    def _trace(self, call: Call) -> Traced:
        flat = call.flattened(self.apply_fn, self._structure)
        with check.tracing(call.arrays):
            jaxpr, shapes = jax.make_jaxpr(flat, return_shape=True)(*self._avals, *call.arrays)
        return Traced(jaxpr, jax.tree.structure(shapes))

    def _traced_for_sizes(self, example: Call) -> tuple[list[Call], list[Traced]]:
        """The example, and the same with other batch sizes, as far as the network takes them."""
        calls, traced = [example], [self._trace(example)]
        for call in resized(example):
            with contextlib.suppress(FrontContributionError):  # the first axis is no batch then
                traced.append(self._trace(call))
                calls.append(call)
        return calls, traced

    def _formed(self, found: Sequence[Compiled]) -> dict[str, Any]:
        """The arrays of the merged network; original leaves are not copied."""
        own = {digest("input", p): x for p, x in zip(self._paths, self._original, strict=True)}
        made = {self._names[i]: jnp.asarray(x) for i, x in own.items() if i in self._names}
        for merging in (c.merging for c in found):
            missing = tuple(k for k in merging.kept if self._names[k.identity] not in made)
            of = dataclasses.replace(merging, kept=missing)
            arrays = computed(of, [*own], [*own.values()])
            made |= {self._names[k.identity]: x for k, x in zip(missing, arrays, strict=True)}
        return dict(sorted(made.items()))

    def _refuse_other(self, found: Compiled, call: Call) -> None:
        missing = [k for k in found.merging.kept if k.identity not in self._names]
        if missing:
            given = ", ".join(f"{a.dtype}{list(a.shape)}" for a in call.arrays)
            raise FrontContributionError(
                f"a call with arguments ({given}) reads "
                f"{', '.join(made_of(missing, self._paths)) or 'constants'} in another way than "
                "the example of merge did; call merge with an example like it"
            )

    # --- what was found ---

    @property
    def report(self) -> tuple[MergedRow, ...]:
        """One row for each array of ``params``: what it is made of.

        Example:
          >>> import jax.numpy as jnp, fcjax
          >>> merged = fcjax.merge(lambda p, x: x @ p[0] @ p[1], [jnp.eye(3)] * 2, jnp.ones((1, 3)))
          >>> [(row.path, row.sources) for row in merged.report]
          [('0+1/kernel', ('0', '1'))]
        """
        return self._rows

    def __str__(self) -> str:
        table = Table()
        for heading in ("array", "shape", "made of"):
            table.add_column(heading, overflow="fold")
        for row in self._rows:
            table.add_row(row.path, str(list(row.shape)), row.reason)
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        return "\n".join((*self._head(), *(x.rstrip() for x in text.getvalue().splitlines())))

    def _head(self) -> list[str]:
        lines = [
            f"fcjax: {self.weights[0]:,} weights before, {self.weights[1]:,} after",
            f"FLOPs {self.flops[0]:.4g} before, {self.flops[1]:.4g} after, for the example",
        ]
        if self.reason is not None:
            lines.append(self.reason)
        if self._timings is not None:
            before, after = (1e3 * self._timings.median(n) for n in ("original", "merged"))
            lines.append(
                f"latency {before:.3g} ms before, {after:.3g} ms after "
                f"(A/A within {100 * self._timings.aa_spread:.0f} %)"
            )
        return lines

    def __repr__(self) -> str:
        return f"Merged({self.weights[0]:,} weights before, {self.weights[1]:,} after)"


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    """Names that may be equal, such as those of ``{"a/b": ...}`` and ``{"a": {"b": ...}}``."""
    found: list[str] = []
    for name in names:
        found.append(unused(name, found))
    return tuple(found)


def _count(tree: PyTree) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def _check_arrays(params: PyTree, avals: PyTree) -> None:
    for name, aval in avals.items():
        given = jax.typeof(params[name])
        if (given.shape, given.dtype) != (aval.shape, aval.dtype):
            raise FrontContributionError(
                f"merged params {name} is {given.str_short()}, but it was {aval.str_short()} in "
                "merge; merge the changed parameters instead"
            )


# --- arguments that stay the same ---------------------------------------------------------------


def _with_constants(
    apply_fn: Callable[..., PyTree],
    params: PyTree,
    example_args: tuple[Any, ...],
    numbers: frozenset[int],
) -> tuple[Callable[..., PyTree], PyTree, tuple[Any, ...]]:
    """The network as a function of one pytree of everything constant, and of the other arguments.

    Raises:
      FrontContributionError: if a number names no argument, or an argument is no array.
    """
    for number in numbers:
        if not 0 < number <= len(example_args):
            raise FrontContributionError(
                f"constant_argnums has {number}, but the example has arguments 1 to "
                f"{len(example_args)} (params is 0 and always constant)"
            )
    constants = {str(n): example_args[n - 1] for n in sorted(numbers)}
    check.params(constants, trained=False)
    rest = tuple(x for n, x in enumerate(example_args, 1) if n not in numbers)

    def closed(tree: Mapping[str, PyTree], *args: Any, **kwargs: Any) -> PyTree:
        left = iter(args)
        total = len(args) + len(numbers)
        given = [tree[str(n)] if n in numbers else next(left) for n in range(1, total + 1)]
        return apply_fn(tree["params"], *given, **kwargs)

    return closed, {"params": params, **constants}, rest
