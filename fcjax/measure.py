"""Step time and memory of compiled functions, measured so that two of them can be compared.

A ratio of two times is only worth what the measurement's own noise leaves of it. Everything here is
timed interleaved in one process, and the first function is timed twice under two names: the ratio
of a function with itself (A/A) says how large a difference has to be before it means anything.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from fcjax import compat

AA_SUFFIX = " (again)"


@dataclasses.dataclass(frozen=True)
class Timings:
    """Times of several functions that took turns.

    Attributes:
      seconds: for each name, its time in every round, shape `(repeats,)`. The first name also
        appears with ` (again)` behind it, timed as if it were another function.
      baseline: the first name; every ratio is relative to it.
    """

    seconds: Mapping[str, np.ndarray]
    baseline: str

    def best(self, name: str) -> float:
        """Shortest time of `name`, in seconds."""
        return float(np.min(self.seconds[name]))

    def median(self, name: str) -> float:
        """Median time of `name`, in seconds."""
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str) -> float:
        """How many times faster than the baseline `name` is: ratio of the median times."""
        return self.median(self.baseline) / self.median(name)

    def best_ratio(self, name: str) -> float:
        """How many times faster than the baseline `name` is: ratio of the best times."""
        return self.best(self.baseline) / self.best(name)

    @property
    def aa_spread(self) -> float:
        """Largest departure from 1 of the baseline's two ratios with itself (0.03 means 3 %)."""
        again = self.baseline + AA_SUFFIX
        return max(abs(self.ratio(again) - 1.0), abs(self.best_ratio(again) - 1.0))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a compiled program needs, as the compiler planned them.

    Attributes:
      temp: scratch space, which holds the activations saved for the backward pass.
      argument: the inputs.
      output: the results.
      alias: results that are written over donated inputs.
    """

    temp: int
    argument: int
    output: int
    alias: int

    @property
    def total(self) -> int:
        """Bytes live at once: `argument + output + temp - alias`."""
        return self.argument + self.output + self.temp - self.alias


def compare_steps(
    fns: Mapping[str, Callable[..., Any]], args: tuple[Any, ...], repeats: int = 25
) -> Timings:
    """Times functions in turns, so that a drift of the machine's load meets all of them.

    Every function runs once untimed, which compiles it. Each round then runs all of them, in an
    order drawn anew, and waits for the results of each. Before each timed run it runs once untimed,
    as a training loop runs one step over and over: otherwise the function that ran last finds warm
    caches, and the baseline, whose turn comes twice as often, is 2% to 4% faster than its own twin
    (steps of 2 ms on a CPU).

    Args:
      fns: the functions by name, compiled already or with `jax.jit`; the first is the baseline. A
        function that needs arguments of its own can be given as a `functools.partial`.
      args: arguments passed to each of them.
      repeats: number of rounds.

    Returns:
      A `Timings`, where the first function was also timed a second time under the name `<first>
      (again)`.

    Raises:
      ValueError: if there is no function or no round.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fcjax.measure import compare_steps
      >>> fns = {"sin": jax.jit(jnp.sin), "cos": jax.jit(jnp.cos)}
      >>> timings = compare_steps(fns, (jnp.ones(8),), repeats=3)
      >>> list(timings.seconds)
      ['sin', 'sin (again)', 'cos']
      >>> timings.ratio("cos") > 0
      True
    """
    if not fns or repeats < 1:
        raise ValueError("compare_steps needs at least one function and at least one repeat")
    lanes = _lanes(fns)
    for _, fn in lanes:
        jax.block_until_ready(fn(*args))
    seconds: dict[str, list[float]] = {name: [] for name, _ in lanes}
    turns = np.random.default_rng(0)
    for _ in range(repeats):
        for i in turns.permutation(len(lanes)):
            name, fn = lanes[i]
            jax.block_until_ready(fn(*args))
            seconds[name].append(_timed(fn, args))
    return Timings({name: np.array(times) for name, times in seconds.items()}, next(iter(fns)))


def _lanes(fns: Mapping[str, Callable[..., Any]]) -> list[tuple[str, Callable[..., Any]]]:
    """The functions in order, the first one twice."""
    (first, fn), *others = fns.items()
    return [(first, fn), (first + AA_SUFFIX, fn), *others]


def _timed(fn: Callable[..., Any], args: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - start


def compiled_memory(fn: Callable[..., Any], *args: Any) -> Memory:
    """Memory of `fn` compiled for these arguments, as planned by the compiler; nothing is run.

    Args:
      fn: a function, with or without `jax.jit`; a jitted one keeps its options, such as donated
        arguments.
      *args: arrays or `jax.ShapeDtypeStruct`.

    Returns:
      A `Memory`, in bytes.

    Raises:
      RuntimeError: if the backend does not report memory.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fcjax.measure import compiled_memory
      >>> memory = compiled_memory(jnp.sin, jax.ShapeDtypeStruct((1024,), jnp.float32))
      >>> memory.argument, memory.output
      (4096, 4096)
    """
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    return memory_of(jitted.lower(*args).compile())


def memory_of(compiled: Any) -> Memory:
    """Memory of a program that is compiled already, by `jax.jit(fn).lower(*args).compile()`.

    Args:
      compiled: a `jax.stages.Compiled`.

    Returns:
      A `Memory`, in bytes.

    Raises:
      RuntimeError: if the backend does not report memory.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"the {jax.default_backend()} backend reports no memory analysis")
    return Memory(
        temp=analysis.temp_size_in_bytes,
        argument=analysis.argument_size_in_bytes,
        output=analysis.output_size_in_bytes,
        alias=analysis.alias_size_in_bytes,
    )


def residual_bytes(fn: Callable[..., Any], params: Any, *args: Any) -> int:
    """Bytes that differentiating `fn` with respect to `params` saves for the backward pass.

    This counts what JAX's autodiff asks to keep, before any compiler: parameters and inputs that
    the backward pass reads are included, and an array that is kept under several names counts once.

    Args:
      fn: the function `fn(params, *args)`, of any output.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      *args: arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The number of bytes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fcjax.measure import residual_bytes
      >>> w, x = jnp.ones((), jnp.float32), jnp.ones(1000, jnp.float32)
      >>> residual_bytes(lambda w, x: jnp.sin(x * w), w, x)  # x and cos(x * w)
      8000
    """

    def residuals(params, args):
        _, pullback = jax.vjp(lambda p: fn(p, *args), params)
        # The same tracer can be saved by several equations.
        return list({id(leaf): leaf for leaf in jax.tree.leaves(pullback)}.values())

    saved = jax.eval_shape(residuals, params, args)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in saved)


MOVES = frozenset(
    {"broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "dynamic_slice",
     "dynamic_update_slice", "expand_dims", "gather", "iota", "pad", "reshape", "rev", "select_n",
     "slice", "split", "squeeze", "stop_gradient", "transpose"}
)  # fmt: skip
"""Primitives that compute nothing."""


def flops(fn: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of one call, counted on the traced function; nothing is run.

    A product of matrices or a convolution counts two for each multiply-add, a reduction one for
    each entry that it reads, and any other operation one for each entry of its result. Bodies of
    loops count as often as they run (of a `while` loop: once), a `cond` as its dearest branch.

    Args:
      fn: the function.
      *args: arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The number of operations.

    Example:
      >>> import jax.numpy as jnp
      >>> from fcjax.measure import flops
      >>> flops(lambda x, w: jnp.tanh(x @ w), jnp.ones((2, 3)), jnp.ones((3, 4)))
      56.0
    """
    return flops_of(jax.make_jaxpr(fn)(*args))


def flops_of(jaxpr: Any) -> float:
    """The same for a function that is traced already."""
    return sum(_equation_flops(eqn) for eqn in compat.open_jaxpr(jaxpr)[0].eqns)


def _equation_flops(eqn: Any) -> float:
    inner = [flops_of(body) for body in compat.inner_jaxprs(eqn)]
    if inner:
        runs = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        return runs * (max(inner) if eqn.primitive.name == "cond" else sum(inner))
    if eqn.primitive.name in MOVES:
        return 0.0
    outputs = float(sum(math.prod(v.aval.shape) for v in eqn.outvars))
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * outputs * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        channels = eqn.params["dimension_numbers"].rhs_spec[0]
        kernel = eqn.invars[1].aval.shape
        return 2.0 * outputs * math.prod(kernel) / kernel[channels]
    inputs = float(sum(math.prod(v.aval.shape) for v in eqn.invars))
    return max(inputs, outputs) if eqn.primitive.name.startswith("reduce") else outputs
