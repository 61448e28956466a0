"""Step time and memory of backprop, of fcjax, and of the limit folded by hand.

    python benchmarks/collapse.py [--only NAME] [--quick] [--machine NAME]

One step is `value_and_grad` of the mean loss, compiled. The steps of a network take turns in one
process. Backprop is compiled twice: the ratio of the two (A/A) is the noise, and no smaller
difference means anything. The limit takes turns with fcjax only: behind backprop a step finds cold
caches, and of two equal programs the second in line would look 20% faster. Bars are judged on
medians; ratios of best times stand beside them.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from models import NETWORKS, Network
from recording import noise, parser, record, show

import fcjax
from fcjax.measure import compare_steps, compiled_memory, residual_bytes

MIB = 2**20
BACKPROP, TWIN, FOLDED, LIMIT = "backprop", "backprop compiled twice", "fcjax", "by hand"
COLUMNS = (
    "network",
    "BP ms",
    "fcjax ms",
    "times faster (median, best)",
    "predicted",
    "A/A",
    "times the hand limit (time, temp)",
    "temp MiB BP, fcjax",
    "saved MiB BP, fcjax",
    "compile s BP, fcjax",
    "gradient difference",
    "verdict",
)


def gradient_step(network: Network, apply: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled `value_and_grad` of the loss of `apply`."""

    def objective(params: Any, x: Any, target: Any) -> Any:
        return network.loss(apply(params, x), target)

    return jax.jit(jax.value_and_grad(objective))


def relative_difference(found: Any, wanted: Any) -> float:
    """Largest difference of two gradients, relative to the largest entry of the second.

    The scale is the whole gradient's: parameters whose true gradient is zero hold rounding noise.
    """
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    scale = max(float(jnp.max(jnp.abs(w))) for _, w in pairs)
    return max(float(jnp.max(jnp.abs(f - w))) for f, w in pairs) / scale


def measure(network: Network, repeats: int) -> dict[str, Any]:
    """All numbers of one network, in seconds and bytes."""
    started = time.perf_counter()
    fc = fcjax.front_contribute(network.apply_fn, network.params, network.batch)
    transform_seconds = time.perf_counter() - started
    applies = {BACKPROP: network.apply_fn, TWIN: network.apply_fn, FOLDED: fc.apply}
    if network.limit is not None:
        applies[LIMIT] = network.limit
    steps = {name: gradient_step(network, apply) for name, apply in applies.items()}
    args = (fc.params, network.batch, network.target)
    temp, compile_seconds = {}, {}
    for name, step in steps.items():
        started = time.perf_counter()
        temp[name] = compiled_memory(step, *args).temp
        compile_seconds[name] = time.perf_counter() - started
    limit = steps.pop(LIMIT, None)
    timings = compare_steps(steps, args, repeats)
    against_limit = limit and compare_steps({LIMIT: limit, FOLDED: steps[FOLDED]}, args, repeats)
    saved = {
        name: residual_bytes(apply, fc.params, network.batch) for name, apply in applies.items()
    }
    return {
        "network": network.name,
        "repeats": repeats,
        "transform_seconds": transform_seconds,
        "median_seconds": {name: timings.median(name) for name in steps},
        "best_seconds": {name: timings.best(name) for name in steps},
        "ratio": timings.ratio(FOLDED),
        "best_ratio": timings.best_ratio(FOLDED),
        "prediction": network.prediction,
        "noise": noise(timings, TWIN),
        "times_limit_seconds": against_limit and 1.0 / against_limit.ratio(FOLDED),
        "limit_noise": against_limit and against_limit.aa_spread,
        "temp_bytes": temp,
        "saved_bytes": saved,
        "compile_seconds": compile_seconds,
        "gradient_difference": relative_difference(
            steps[FOLDED](*args)[1], steps[BACKPROP](*args)[1]
        ),
        "rules": sorted({row.rule for row in fc.report}),
    }


def times_limit(result: dict[str, Any]) -> tuple[float, float] | None:
    """Median time and temporary bytes, as multiples of the limit's; None without a limit."""
    seconds, temp = result["times_limit_seconds"], result["temp_bytes"]
    return None if seconds is None else (seconds, temp[FOLDED] / max(temp[LIMIT], 1))


def failures(network: Network, result: dict[str, Any]) -> list[str]:
    """The parts of the bar that are missed, as words; none if it is passed."""
    bar, missed = network.bar, []
    allowance = 1.0 - result["noise"] if bar.speedup == 1.0 else 1.0
    if result["ratio"] < bar.speedup * allowance:
        missed.append(f"speed below {bar.speedup:g}")
    temp, saved = result["temp_bytes"], result["saved_bytes"]
    if bar.memory is not None and temp[BACKPROP] < bar.memory * temp[FOLDED]:
        missed.append(f"temp above 1/{bar.memory:.3g}")
    if bar.residuals and saved[FOLDED] >= saved[BACKPROP]:
        missed.append("saves no fewer bytes")
    if bar.limit is not None and max(times_limit(result) or ()) > bar.limit:
        missed.append(f"above {bar.limit:g} of the hand limit")
    if not result["gradient_difference"] <= network.gradients:
        missed.append("another gradient")
    return missed


def as_row(result: dict[str, Any]) -> list[str]:
    """One row of the table."""
    median, temp, saved = (result[k] for k in ("median_seconds", "temp_bytes", "saved_bytes"))
    limit, compiled = times_limit(result), result["compile_seconds"]
    return [
        result["network"],
        f"{1e3 * median[BACKPROP]:.1f}",
        f"{1e3 * median[FOLDED]:.1f}",
        f"{result['ratio']:.2f}, {result['best_ratio']:.2f}",
        f"{result['prediction']:g}",
        f"{100 * result['noise']:.0f} %",
        f"{limit[0]:.2f}, {limit[1]:.2f}" if limit else "",
        f"{temp[BACKPROP] / MIB:.1f}, {temp[FOLDED] / MIB:.1f}",
        f"{saved[BACKPROP] / MIB:.1f}, {saved[FOLDED] / MIB:.1f}",
        f"{compiled[BACKPROP]:.2f}, {compiled[FOLDED]:.2f}",
        f"{result['gradient_difference']:.0e}",
        result["verdict"],
    ]


def main() -> None:
    arguments = parser("backprop against fcjax against the hand-folded limit")
    arguments.add_argument("--only", choices=sorted(NETWORKS), nargs="+", help="these networks")
    options = arguments.parse_args()
    results = {}
    for name in options.only or NETWORKS:
        network = NETWORKS[name]()
        result = measure(network, repeats=5 if options.quick else 25)
        missed = failures(network, result)
        result["verdict"] = "FAIL: " + ", ".join(missed) if missed else "PASS"
        results[name] = result
        print(f"{name}: {result['ratio']:.2f} times faster, {result['verdict']}", flush=True)
    show(
        f"jax {jax.__version__}, {options.machine}", COLUMNS, [as_row(r) for r in results.values()]
    )
    if not options.quick:
        print(record("collapse", options.machine, results, COLUMNS, as_row))


if __name__ == "__main__":
    main()
