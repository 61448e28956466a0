"""What training in fewer coordinates saves: weights, optimizer state, checkpoints and step time.

    python benchmarks/compress.py [--only NAME] [--quick] [--machine NAME]

Each network is trained by SGD with momentum in three ways: by backprop, by fcjax that is not told
the optimizer (collapse), and by fcjax that is (compress). One step is `value_and_grad` of the mean
loss, the optimizer's update and its application, compiled; the steps take turns in one process. The
collapsed step is compiled twice, and the ratio of the two (A/A) is the noise: the compressed step
may not be slower than the collapsed one by more. Bars are judged on medians; ratios of best times
stand beside them.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from models import chain, kernels, normal, squared_error
from recording import noise, parser, record, show

import fcjax
from fcjax.demo.models import balanced, orthogonal
from fcjax.measure import compare_steps

PyTree = Any
MIB = 2**20
SETUP_SECONDS = 10.0
DIFFERENCE = 1e-4
OPTIMIZER = optax.sgd(1e-3, momentum=0.9)
COLLAPSED, TWIN, BACKPROP, COMPRESSED = (
    "collapse",
    "collapse compiled twice",
    "backprop",
    "compress",
)
COLUMNS = (
    "network",
    "weights BP, fcjax",
    "state MiB BP, fcjax",
    "checkpoint MiB BP, fcjax",
    "fixed MiB",
    "set-up s",
    "step ms BP, collapse, compress",
    "times faster than collapse (median, best)",
    "times faster than BP (median, best)",
    "A/A",
    "output difference",
    "verdict",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One network and the batch it is measured on.

    Attributes:
      apply_fn: the network, ``apply_fn(params, x) -> y``.
      params: its parameters.
      batch: the inputs ``x``, rows first.
      outputs: width of ``y``.
      data: the training inputs, where they span less than their space.
    """

    apply_fn: Callable[[PyTree, Array], Array]
    params: PyTree
    batch: Array
    outputs: int
    data: Array | None = None


# --- networks -------------------------------------------------------------------------------------


def segments(params: list[list[dict[str, Array]]], x: Array) -> Array:
    """Runs of dense layers with biases, a ReLU between two runs."""
    for i, layers in enumerate(params):
        x = jax.nn.relu(x) if i else x
        for layer in layers:
            x = x @ layer["kernel"] + layer["bias"]
    return x


def dense(*widths: int) -> list[dict[str, Array]]:
    """A run of Gaussian dense layers with biases."""
    made = zip(kernels(widths), widths[1:], strict=True)
    return [{"kernel": kernel, "bias": 0.05 * normal(out, out)} for kernel, out in made]


def deep_linear(initial: Callable[[tuple[int, ...]], list[Any]]) -> Case:
    """12-128-128-128-3 without biases."""
    params = [jnp.asarray(w, jnp.float32) for w in initial((12, 128, 128, 128, 3))]
    return Case(chain, params, normal(0, 1024, 12), 3)


def wide_orthogonal() -> Case:
    """784-4096-4096-10 with biases, the middle layer orthogonal."""
    layers = dense(784, 4096, 4096, 10)
    layers[1]["kernel"] = jnp.linalg.qr(layers[1]["kernel"])[0]
    return Case(segments, [layers], normal(0, 256, 784), 10)


def low_rank_inputs() -> Case:
    """A ReLU net whose 2048 features are linear functions of 256."""
    inputs = normal(0, 1024, 256) @ normal(1, 256, 2048) / 16
    return Case(segments, [dense(2048, 1024), dense(1024, 10)], inputs, 10, inputs)


CASES: dict[str, Callable[[], Case]] = {
    "linear 12-128-3": lambda: Case(chain, kernels((12, 128, 3)), normal(0, 1024, 12), 3),
    "linear 12-128-128-128-3, orthogonal": lambda: deep_linear(orthogonal),
    "linear 12-128-128-128-3, balanced": lambda: deep_linear(balanced),
    "784-4096-10": lambda: Case(segments, [dense(784, 4096, 10)], normal(0, 1024, 784), 10),
    "ReLU of 3 times 64-512-64": lambda: Case(
        segments, [dense(64, 512, 64) for _ in range(3)], normal(0, 4096, 64), 64
    ),
    "ReLU 2048-1024-10, inputs of rank 256": low_rank_inputs,
    "784-4096-4096-10, orthogonal": wide_orthogonal,
}


# --- measurement ----------------------------------------------------------------------------------


class Way:
    """One way to train a case: parameters, optimizer state, and a compiled step."""

    def __init__(self, apply: Callable[..., Any], params: PyTree) -> None:
        def step(params: PyTree, state: PyTree, x: Array, target: Array) -> tuple[PyTree, PyTree]:
            gradient = jax.grad(lambda p: squared_error(apply(p, x), target))(params)
            updates, state = OPTIMIZER.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        self.params = params
        self.state = OPTIMIZER.init(params)
        self.step = jax.jit(step)

    @property
    def bound(self) -> Callable[..., Any]:
        """The step from the initial parameters, a function of the batch."""
        return functools.partial(self.step, self.params, self.state)

    def trained(self, x: Array, target: Array, steps: int = 10) -> PyTree:
        """The parameters after some steps."""
        params, state = self.params, self.state
        for _ in range(steps):
            params, state = self.step(params, state, x, target)
        return params


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """All numbers of one network, in seconds and bytes."""
    batch = (case.batch, normal(2, len(case.batch), case.outputs))
    plain, plain_seconds = timed_setup(case)
    fc, setup_seconds = timed_setup(case, optimizer=OPTIMIZER, data=case.data)
    ways = {
        COLLAPSED: Way(plain.apply, plain.params),
        TWIN: Way(plain.apply, plain.params),
        BACKPROP: Way(case.apply_fn, case.params),
        COMPRESSED: Way(fc.apply, fc.params),
    }
    timings = compare_steps({name: way.bound for name, way in ways.items()}, batch, repeats)
    kept = {name: ways[name] for name in (BACKPROP, COMPRESSED)}
    expanded = fc.expand(ways[COMPRESSED].trained(*batch))
    return {
        "repeats": repeats,
        "weights": {name: count(way.params) for name, way in kept.items()},
        "state_bytes": {name: size(way.state) for name, way in kept.items()},
        "checkpoint_bytes": {name: size((way.params, way.state)) for name, way in kept.items()},
        "fixed_bytes": size(fc.contributions),
        "setup_seconds": setup_seconds,
        "collapse_setup_seconds": plain_seconds,
        "median_seconds": {name: timings.median(name) for name in ways},
        "best_seconds": {name: timings.best(name) for name in ways},
        "noise": noise(timings, TWIN),
        "output_difference": relative_difference(
            case.apply_fn(expanded, case.batch),
            case.apply_fn(ways[BACKPROP].trained(*batch), case.batch),
        ),
    }


def timed_setup(case: Case, **options: Any) -> tuple[fcjax.FrontContribution, float]:
    """The transformed network, and the seconds that it took."""
    jax.block_until_ready((case.params, case.batch, case.data))
    started = time.perf_counter()
    fc = fcjax.front_contribute(case.apply_fn, case.params, case.batch, **options)
    jax.block_until_ready((fc.params, fc.contributions))
    return fc, time.perf_counter() - started


def relative_difference(found: Array, wanted: Array) -> float:
    """Largest difference, relative to the largest wanted value."""
    return float(jnp.max(jnp.abs(found - wanted)) / jnp.max(jnp.abs(wanted)))


def count(tree: PyTree) -> int:
    """Number of entries of all arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def size(tree: PyTree) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


# --- judgement ------------------------------------------------------------------------------------


def times_faster(result: dict[str, Any], than: str) -> tuple[float, float]:
    """Median and best time of another way over that of the compressed step."""
    times = (result["median_seconds"], result["best_seconds"])
    return tuple(seconds[than] / seconds[COMPRESSED] for seconds in times)


def failures(result: dict[str, Any]) -> list[str]:
    """The bars that are missed, as words; none if all are passed."""
    missed = []
    if result["weights"][COMPRESSED] >= result["weights"][BACKPROP]:
        missed.append("no fewer weights")
    if times_faster(result, COLLAPSED)[0] < 1.0 - result["noise"]:
        missed.append("slower than collapse")
    if result["setup_seconds"] > SETUP_SECONDS:
        missed.append(f"set-up above {SETUP_SECONDS:g} s")
    if not result["output_difference"] <= DIFFERENCE:
        missed.append("other outputs")
    return missed


def as_row(result: dict[str, Any]) -> list[str]:
    """One row of the table."""
    weights, median = result["weights"], result["median_seconds"]
    state, checkpoint = result["state_bytes"], result["checkpoint_bytes"]
    return [
        result["network"],
        f"{weights[BACKPROP]:,}, {weights[COMPRESSED]:,}",
        f"{state[BACKPROP] / MIB:.3f}, {state[COMPRESSED] / MIB:.4f}",
        f"{checkpoint[BACKPROP] / MIB:.3f}, {checkpoint[COMPRESSED] / MIB:.4f}",
        f"{result['fixed_bytes'] / MIB:.3f}",
        f"{result['setup_seconds']:.2f}",
        ", ".join(f"{1e3 * median[name]:.2f}" for name in (BACKPROP, COLLAPSED, COMPRESSED)),
        *("{:.2f}, {:.2f}".format(*times_faster(result, than)) for than in (COLLAPSED, BACKPROP)),
        f"{100 * result['noise']:.0f} %",
        f"{result['output_difference']:.0e}",
        result["verdict"],
    ]


def main() -> None:
    arguments = parser("what training in fewer coordinates saves")
    arguments.add_argument("--only", choices=sorted(CASES), nargs="+", help="these networks")
    options = arguments.parse_args()
    timed_setup(CASES["linear 12-128-3"](), optimizer=OPTIMIZER)  # imports, caches
    results = {}
    for name in options.only or CASES:
        result = {"network": name, **measure(CASES[name](), repeats=5 if options.quick else 25)}
        missed = failures(result)
        result["verdict"] = "FAIL: " + ", ".join(missed) if missed else "PASS"
        results[name] = result
        print(" | ".join(as_row(result)), flush=True)
    show(
        f"jax {jax.__version__}, {options.machine}", COLUMNS, [as_row(r) for r in results.values()]
    )
    if not options.quick:
        print(record("compress", options.machine, results, COLUMNS, as_row))


if __name__ == "__main__":
    main()
