"""The front door: what is wrong with an argument, and what to do about it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcjax.errors import FrontContributionError
from fcjax.names import path_name
from fcjax.tracing.axes import unbound
from fcjax.tracing.calls import Call
from fcjax.tracing.trace import Body, Kind, Value

__all__ = [
    "data",
    "inferred_arguments",
    "is_known",
    "kept",
    "known_sizes",
    "options",
    "outputs",
    "params",
    "shapes",
    "structure",
    "tracing",
]

INFERRED_BATCH = 1024
"""The batch an inferred input has; the plan for the report is made for it."""
EXACTNESS = ("discrete", "flow", "approximate")
OBJECTIVES = ("time", "memory")


def options(
    apply_fn: Any, optimizer: Any, exactness: Any, objective: Any, data: Any, rebalance: Any = False
) -> None:
    """Checks the arguments of ``front_contribute`` that are no arrays.

    Raises:
      FrontContributionError: naming the argument.
    """
    if not callable(apply_fn):
        raise FrontContributionError(
            f"apply_fn must be a function apply_fn(params, *args), got {type(apply_fn).__name__}; "
            "for a Flax module pass module.apply"
        )
    parts = [getattr(optimizer, name, None) for name in ("init", "update")]
    if optimizer is not None and not all(callable(part) for part in parts):
        raise FrontContributionError(
            f"optimizer must be an optax.GradientTransformation such as optax.sgd(1e-2), got "
            f"{type(optimizer).__name__}"
        )
    for name, value, known in (
        ("exactness", exactness, EXACTNESS),
        ("objective", objective, OBJECTIVES),
    ):
        if value not in known:
            raise FrontContributionError(f"{name} must be one of {known}, got {value!r}")
    if data is not None and optimizer is None:
        raise FrontContributionError(
            "data= removes weights, which is exact only for some optimizers; pass optimizer= too"
        )
    if rebalance and (optimizer is None or exactness == "discrete"):
        raise FrontContributionError(
            "rebalance=True changes the initial weights to fold them under gradient flow; pass "
            'exactness="flow" and optimizer= too'
        )


def params(tree: Any, *, trained: bool = True) -> None:
    """Checks that parameters are finite arrays, some of them floats if they are to be trained.

    Raises:
      FrontContributionError: naming the leaf.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise FrontContributionError(
            f"params is empty: there is nothing to {'train' if trained else 'merge'}"
        )
    for path, leaf in leaves:
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise FrontContributionError(
                f"params leaf {path_name(path)} is a {type(leaf).__name__}, not an array; convert "
                "it with jnp.asarray, or keep it out of params (eqx.partition, nnx.split)"
            )
    if trained and not any(jnp.issubdtype(leaf.dtype, jnp.inexact) for _, leaf in leaves):
        raise FrontContributionError("params has no floating-point leaf: there is nothing to train")
    for path, leaf in leaves:
        known = not isinstance(leaf, jax.core.Tracer) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        if known and bool(np.isnan(np.asarray(leaf)).any()):
            raise FrontContributionError(
                f"params leaf {path_name(path)} has NaN entries; check its initialisation"
            )


def is_known(leaf: Any) -> bool:
    """Whether an array has values: it is not traced, and its buffer has not been donated."""
    if isinstance(leaf, jax.core.Tracer):
        return False
    return not (isinstance(leaf, jax.Array) and leaf.is_deleted())


def kept(tree: Any, what: str, remedy: str) -> None:
    """Checks that no array has been donated to a jitted function, which deletes it.

    Raises:
      FrontContributionError: with the remedy.
    """
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(tree)):
        raise FrontContributionError(
            f"{what} have been donated to a jitted function, as by donate_argnums, and are gone; "
            f"{remedy}"
        )


def structure(tree: Any, expected: Any, what: str) -> None:
    """Checks the structure of parameters given to ``apply``, ``expand`` or ``reduce``.

    Raises:
      FrontContributionError: with both structures.
    """
    got = jax.tree.structure(tree)
    if got != expected:
        raise FrontContributionError(
            f"the {what} given have another structure than this network's; pass fc.params or what "
            f"an optimizer made of it.\n  expected {expected}\n  got      {got}"
        )


def shapes(
    leaves: Sequence[Any], expected: Sequence[tuple[int, ...]], paths: Sequence[str]
) -> None:
    """Checks the shapes of parameter leaves.

    Raises:
      FrontContributionError: naming the first leaf that differs.
    """
    for leaf, shape, path in zip(leaves, expected, paths, strict=True):
        if np.shape(leaf) != tuple(shape):
            raise FrontContributionError(
                f"params leaf {path} has shape {np.shape(leaf)}, but it was {tuple(shape)} in "
                "front_contribute; call it again for other shapes"
            )


def data(given: Any, arguments: Sequence[Any]) -> dict[int, np.ndarray[Any, Any]]:
    """Checks the training inputs, and puts them under the numbers of their arguments.

    Args:
      given: None, an array for the first argument, or a tuple of arrays for all of them.
      arguments: the array arguments of the example.

    Raises:
      FrontContributionError: if an array does not match its argument or has no finite values.
    """
    if given is None:
        return {}
    listed = list(given) if isinstance(given, (tuple, list)) else [given]
    found = {}
    for number, (array, argument) in enumerate(zip(listed, arguments, strict=False)):
        values = np.asarray(array)
        if values.ndim != len(argument.shape) or values.shape[1:] != tuple(argument.shape[1:]):
            raise FrontContributionError(
                f"data for argument {number} has shape {values.shape}, but the example argument is "
                f"{tuple(argument.shape)}: they may only differ in the first axis"
            )
        if not np.isfinite(values).all():
            raise FrontContributionError(
                f"data for argument {number} has NaN or infinite entries; clean it first"
            )
        found[number] = values
    if len(listed) > len(arguments):
        raise FrontContributionError(
            f"data has {len(listed)} arrays, but the example has {len(arguments)} arguments; pass "
            "one array for each argument"
        )
    return found


def known_sizes(call: Call, remedy: str) -> None:
    """Checks that no size is a symbol, as in ``jax.export``.

    Raises:
      FrontContributionError: if one is.
    """
    if call.is_symbolic:
        shapes = ", ".join(str(array.shape) for array in call.arrays)
        raise FrontContributionError(
            f"the arguments have the symbolic shapes {shapes}, and a plan is made for numbers; "
            f"{remedy}"
        )


@contextlib.contextmanager
def tracing(arguments: Sequence[Any]) -> Iterator[None]:
    """Turns what goes wrong while tracing into an error with a remedy.

    Raises:
      FrontContributionError: from the original error.
    """
    try:
        yield
    except FrontContributionError:
        raise
    except Exception as error:
        given = ", ".join(f"{a.dtype}{list(a.shape)}" for a in arguments)
        first_line = str(error).strip().split("\n")[0]
        raise FrontContributionError(
            f"apply_fn could not be traced with arguments ({given}): "
            f"{type(error).__name__}: {first_line}. {_remedy(error)}"
        ) from error


def _remedy(error: Exception) -> str:
    name = type(error).__name__
    if name in ("ModifyScopeVariableError", "TraceContextError"):
        return (
            "apply_fn mutates Flax state. Make it pure: with linen pass mutable=['batch_stats'] "
            "and return the updated state, with nnx split the state off and return it, or "
            "normalise with running statistics."
        )
    if isinstance(error, NameError) and unbound(error):
        return (
            f"Call it where the axis {unbound(error)!r} is mapped, by jax.vmap(..., axis_name=...) "
            "or jax.shard_map, as apply_fn itself."
        )
    if isinstance(error, (TypeError, ValueError)):
        return "Check the shapes and number of the example arguments against the network."
    return "It must be a pure function that jax.jit accepts; try jax.jit(apply_fn) first."


def outputs(body: Body, known: Mapping[Value, Kind]) -> None:
    """Checks that the network's output is an array that depends on its parameters.

    Raises:
      FrontContributionError: if there is nothing to differentiate.
    """
    results = [a for a in body.outputs if isinstance(a, Value)]
    if not any(known[value].trainable for value in results):
        raise FrontContributionError(
            "apply_fn returns nothing differentiable: no floating-point output depends on params; "
            "return the network's predictions"
        )


def inferred_arguments(
    apply_fn: Callable[..., Any], params: Any
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The input of a dense network with one input, if only one width can be traced.

    Raises:
      FrontContributionError: if none or several can.
    """
    leaves = [x for x in jax.tree.leaves(params) if len(x.shape) == 2]
    kernels = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    dtypes = [kernel.dtype for kernel in kernels]
    widths = sorted({size for kernel in kernels for size in kernel.shape})
    fitting = []
    for width in widths:
        candidate = jax.ShapeDtypeStruct((INFERRED_BATCH, width), dtypes[0])
        with contextlib.suppress(Exception):  # any failure means that this width does not fit
            jax.eval_shape(apply_fn, params, candidate)
            fitting.append(candidate)
    if len(fitting) != 1:
        found = [c.shape[1] for c in fitting]
        raise FrontContributionError(
            f"no example arguments were given and the input cannot be inferred: widths that fit "
            f"are {found}. Pass an example, such as front_contribute(apply_fn, params, "
            "jax.ShapeDtypeStruct((batch, features), jnp.float32))"
        )
    return tuple(fitting)
