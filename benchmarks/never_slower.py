"""Every network of the tests' zoo, trained and at inference: nothing may get slower.

    python benchmarks/never_slower.py [--only NAME] [--quick] [--machine NAME]

At a useful size, with 64 times the rows that the tests train on or 16 images of 32 x 32 with 32
channels, each timing runs one step. At the tests' own size, where a step takes a few microseconds,
it runs many in one compiled loop: gradient descent for training, and for inference a loop whose
batches depend on the outputs before them. The original is compiled twice, and both programs are
timed; their ratio (A/A) is the noise.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from recording import noise, parser, record, show

import fcjax
from fcjax.measure import compare_steps, compiled_memory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import zoo
import zoo_blocks
import zoo_conv
import zoo_time  # noqa: F401 (adds to the zoo)

ROUND_SECONDS = 0.02
TIMES, CHANNELS, IMAGES = 64, 32, (16, 32, 32)
TINY = ", tiny"
ORIGINAL, TWIN, OURS = "original", "compiled twice", "fcjax"
COLUMNS = (
    "network",
    "rules",
    "step us",
    "times faster (median, best)",
    "A/A",
    "temp KiB BP, fcjax",
    "inference us",
    "merged times faster (median, best)",
    "A/A",
    "verdict",
)


def in_float32(tree: Any) -> Any:
    """The floating leaves of a pytree in float32."""
    return zoo.cast(tree, jnp.float32)


def networks() -> dict[str, Callable[[], zoo.Network]]:
    """What builds each network, by name, in float32 and at the size to be timed."""
    families = {name: family for family in (zoo, zoo_blocks) for name in family.names()}
    many = {n: functools.partial(_rows, family, n, TIMES) for n, family in families.items()}
    images = {f"{n}, images": functools.partial(_images, n) for n in zoo_conv.names()}
    tiny = {n + TINY: functools.partial(_rows, family, n, 1) for n, family in families.items()}
    return many | images | tiny


def _rows(family: Any, name: str, times: int) -> zoo.Network:
    """A network and so many of its batches as one."""
    network = family.build(name)

    def batch(rng: np.random.Generator) -> tuple[tuple, Any]:
        drawn = [network.batch(rng) for _ in range(times)]
        (*others, _), _ = drawn[0]
        x = np.concatenate([args[-1] for args, _ in drawn])
        target = jax.tree.map(lambda *parts: np.concatenate(parts), *[part for _, part in drawn])
        return in_float32(((*others, x), target))

    return dataclasses.replace(network, params=in_float32(network.params), batch=batch)


def _images(name: str) -> zoo.Network:
    network = zoo_conv.build(name, CHANNELS)
    (*rest, x), _ = network.batch(np.random.default_rng(0))
    shape = (*IMAGES, x.shape[-1])

    def batch(rng: np.random.Generator) -> tuple[tuple, Any]:
        images = rng.standard_normal(shape)
        args = in_float32((*rest, images))
        outputs = jax.eval_shape(network.apply_fn, in_float32(network.params), *args)
        target = jnp.full(_first(outputs).shape, 0.1, jnp.float32)
        return args, target

    return dataclasses.replace(network, params=in_float32(network.params), batch=batch)


def _first(outputs: Any) -> Any:
    return max(jax.tree.leaves(outputs), key=lambda leaf: leaf.size)


# --- programs -------------------------------------------------------------------------------------


def training(network: zoo.Network, apply: Callable[..., Any], args: tuple, target: Any):
    """`step(params)`: one step of gradient descent."""

    def objective(params: Any) -> Any:
        return network.loss(apply(params, *args), target)

    def step(params: Any) -> Any:
        gradients = jax.grad(objective, allow_int=True)(params)
        return jax.tree.map(
            lambda p, g: p - 1e-6 * g if zoo.is_inexact(p) else p, params, gradients
        )

    return step


def inference(apply: Callable[..., Any], args: tuple):
    """`call((params, number))`: one call, which cannot be left out of a loop or taken out of it."""
    leaves, structure = jax.tree.flatten(args)

    def call(carry: Any) -> Any:
        params, number = carry
        moved = [
            leaf + 1e-6 * number if zoo.is_inexact(leaf) else jnp.where(number > 1e30, 0, leaf)
            for leaf in leaves
        ]
        outputs = apply(params, *jax.tree.unflatten(structure, moved))
        return params, sum(jnp.mean(leaf) for leaf in jax.tree.leaves(outputs))

    return call


def repeated(step: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """The step so many times in one compiled loop."""
    return jax.jit(
        lambda carry, steps: jax.lax.fori_loop(0, steps, lambda _, carry: step(carry), carry)
    )


def compare(programs: dict[str, tuple[Any, Any]], repeats: int, *, loops: bool) -> dict[str, Any]:
    """Seconds of one step, how many times faster ours is, the noise, and temporary bytes.

    Args:
      programs: for each name a step and what it begins with.
      repeats: number of rounds.
      loops: whether many steps run in one compiled loop; convolutions are slow there.
    """
    steps, carries = 1, {name: carry for name, (_, carry) in programs.items()}
    if loops:
        runs = {name: repeated(step) for name, (step, _) in programs.items()}
        steps = _count(functools.partial(runs[ORIGINAL], carries[ORIGINAL]))
        ways = {name: functools.partial(run, carries[name], steps) for name, run in runs.items()}
    else:
        runs = {name: jax.jit(step) for name, (step, _) in programs.items()}
        ways = {name: functools.partial(run, carries[name]) for name, run in runs.items()}
    timings = compare_steps(ways, (), repeats)
    return {
        "steps": steps,
        "seconds": {name: timings.median(name) / steps for name in (ORIGINAL, OURS)},
        "times_faster": (timings.ratio(OURS), timings.best_ratio(OURS)),
        "noise": noise(timings, TWIN),
        "temp_bytes": {
            name: compiled_memory(jax.jit(programs[name][0]), carries[name]).temp
            for name in (ORIGINAL, OURS)
        },
    }


def _count(loop: Callable[[int], Any]) -> int:
    """How many steps take about `ROUND_SECONDS`."""
    steps = 1
    while True:
        jax.block_until_ready(loop(steps))
        start = time.perf_counter()
        jax.block_until_ready(loop(steps))
        seconds = time.perf_counter() - start
        if seconds > ROUND_SECONDS / 2:
            return max(1, round(steps * ROUND_SECONDS / seconds))
        steps *= 4


def measure(network: zoo.Network, repeats: int, *, loops: bool) -> dict[str, Any]:
    """All numbers of one network, in seconds and bytes."""
    args, target = network.batch(np.random.default_rng(7))
    fc = fcjax.front_contribute(network.apply_fn, network.params, *args)
    merged = fcjax.merge(network.apply_fn, network.params, *args)
    number = jnp.float32(0)
    steps, calls = (
        {
            ORIGINAL: made(network.apply_fn, network.params),
            TWIN: made(network.apply_fn, network.params),
            OURS: made(ours.apply, ours.params),
        }
        for ours, made in (
            (fc, lambda apply, params: (training(network, apply, args, target), params)),
            (merged, lambda apply, params: (inference(apply, args), (params, number))),
        )
    )
    return {
        "rules": sorted({row.rule for row in fc.report}),
        "training": compare(steps, repeats, loops=loops),
        "inference": compare(calls, repeats, loops=loops),
    }


def verdict(result: dict[str, Any]) -> str:
    """The bars that are missed, or that all are passed."""
    missed = [
        f"{part} slower"
        for part in ("training", "inference")
        if max(result[part]["times_faster"]) < 1.0 - result[part]["noise"]
    ]
    return "FAIL: " + ", ".join(missed) if missed else "PASS"


def as_row(result: dict[str, Any]) -> list[str]:
    """One row of the table."""
    cells = []
    for part in ("training", "inference"):
        before, after = result[part]["seconds"].values()
        cells.append(
            [
                f"{1e6 * before:.3g}, {1e6 * after:.3g}",
                "{:.2f}, {:.2f}".format(*result[part]["times_faster"]),
                f"{100 * result[part]['noise']:.0f} %",
            ]
        )
    temp = [f"{n / 1024:.0f}" for n in result["training"]["temp_bytes"].values()]
    rules = ", ".join(result["rules"])
    return [result["network"], rules, *cells[0], ", ".join(temp), *cells[1], result["verdict"]]


def main() -> None:
    """Measures, prints and records."""
    made = networks()
    arguments = parser("every network of the zoo, trained and merged")
    arguments.add_argument("--only", choices=sorted(made), nargs="+", help="these networks")
    options = arguments.parse_args()
    results = {}
    for name in options.only or made:
        repeats = 5 if options.quick else 25
        result = measure(made[name](), repeats, loops=name.endswith(TINY))
        results[name] = {"network": name, **result, "verdict": verdict(result)}
        print(" | ".join(as_row(results[name])), flush=True)
        if not options.quick:  # half an hour in all: what is measured is kept
            record("never_slower", options.machine, {name: results[name]}, COLUMNS, as_row)
    title = f"jax {jax.__version__}, {options.machine}"
    show(title, COLUMNS, [as_row(r) for r in results.values()])


if __name__ == "__main__":
    main()
