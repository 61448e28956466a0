"""What merging a trained network saves at inference: weights, operations and latency.

    python benchmarks/merge.py [--only NAME] [--quick] [--machine NAME]

The original and the merged network take turns in one process, compiled, at several batch sizes. The
original is compiled and timed twice; the ratio of the two (A/A) is the noise: the merged network
may not be slower by more. The bar is judged on medians; ratios of best times stand beside them.
A network merged by hand takes turns too, where there is one: it is what the compiler can reach.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from models import convolve, normal
from recording import noise, parser, record, show

import fcjax
from fcjax.measure import compare_steps

PyTree = Any
BATCHES = (1, 8, 64)
DIFFERENCE = 1e-4
COLUMNS = (
    "network, batch",
    "weights before, after",
    "MFLOP before, after",
    "latency ms before, after",
    "times the latency by hand",
    "times faster (median, best)",
    "A/A",
    "output difference",
    "verdict",
)
statistics = functools.partial(nn.BatchNorm, use_running_average=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
      module: the network.
      shape: the shape of one input, without the batch.
      by_hand: what makes of its variables the same merged by hand: a function and its parameters.
    """

    module: nn.Module
    shape: tuple[int, ...]
    by_hand: Callable[[PyTree], tuple[Callable[..., Array], PyTree]] | None = None


# --- networks -------------------------------------------------------------------------------------


class RepVgg(nn.Module):
    """Blocks of 3x3, 1x1 and identity branches, each with BatchNorm."""

    blocks: int = 3

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        width = x.shape[-1]
        for _ in range(self.blocks):
            wide = statistics()(nn.Conv(width, (3, 3), use_bias=False)(x))
            point = statistics()(nn.Conv(width, (1, 1), use_bias=False)(x))
            x = nn.relu(wide + point + statistics()(x))
        return x


class ResNet(nn.Module):
    """Bottleneck blocks with BatchNorm."""

    blocks: int = 3

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        width = x.shape[-1]
        for _ in range(self.blocks):
            h = nn.relu(statistics()(nn.Conv(width // 4, (1, 1), use_bias=False)(x)))
            h = nn.relu(statistics()(nn.Conv(width // 4, (3, 3), use_bias=False)(h)))
            x = nn.relu(x + statistics()(nn.Conv(width, (1, 1), use_bias=False)(h)))
        return x


class Transformer(nn.Module):
    """Pre-norm blocks."""

    blocks: int = 2

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        width = x.shape[-1]
        for _ in range(self.blocks):
            x = x + nn.MultiHeadDotProductAttention(num_heads=8)(nn.LayerNorm()(x))
            x = x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))
        return x


class Adapters(nn.Module):
    """Dense layers with a low-rank branch beside each."""

    rank: int = 16
    layers: int = 4

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        width = x.shape[-1]
        for _ in range(self.layers):
            low = nn.Dense(self.rank, use_bias=False)(x)
            x = nn.relu(nn.Dense(width)(x) + nn.Dense(width, use_bias=False)(low))
        return x


def chain(*widths: int) -> nn.Module:
    """Dense layers without activations."""
    return nn.Sequential([nn.Dense(width) for width in widths])


def folded(variables: PyTree, i: int) -> tuple[Array, Array]:
    """A convolution and the BatchNorm behind it as one kernel and one bias."""
    norm, found = variables["params"][f"BatchNorm_{i}"], variables["batch_stats"][f"BatchNorm_{i}"]
    gain = norm["scale"] / jnp.sqrt(found["var"] + 1e-5)
    kernel = variables["params"][f"Conv_{i}"]["kernel"]
    return kernel * gain, norm["bias"] - found["mean"] * gain


def res_net_by_hand(variables: PyTree) -> tuple[Callable[..., Array], PyTree]:
    """`ResNet` without its BatchNorm."""
    layers = [folded(variables, i) for i in range(3 * ResNet.blocks)]

    def apply(layers: list[tuple[Array, Array]], x: Array) -> Array:
        for i in range(0, len(layers), 3):
            (a, b), (c, d), (e, f) = layers[i : i + 3]
            h = nn.relu(convolve(x, a) + b)
            x = nn.relu(x + (convolve(nn.relu(convolve(h, c) + d), e) + f))
        return x

    return apply, layers


def adapters_by_hand(variables: PyTree) -> tuple[Callable[..., Array], PyTree]:
    """`Adapters` without the branches."""
    dense = [variables["params"][f"Dense_{i}"] for i in range(3 * Adapters.layers)]
    layers = [
        (wide["kernel"] + down["kernel"] @ up["kernel"], wide["bias"])
        for down, wide, up in zip(dense[::3], dense[1::3], dense[2::3], strict=True)
    ]

    def apply(layers: list[tuple[Array, Array]], x: Array) -> Array:
        for kernel, bias in layers:
            x = nn.relu(x @ kernel + bias)
        return x

    return apply, layers


CASES = {
    "linear 784-1024x4-10": Case(chain(1024, 1024, 1024, 1024, 10), (784,)),
    "bottleneck 512-8-512": Case(chain(8, 512), (512,)),
    "adapters 512, rank 16": Case(Adapters(), (512,), adapters_by_hand),
    "RepVGG 32 channels, 32x32": Case(RepVgg(), (32, 32, 32)),
    "ResNet 64 channels, 32x32": Case(ResNet(), (32, 32, 64), res_net_by_hand),
    "transformer 256, 64 tokens": Case(Transformer(), (64, 256)),
    "ReLU 512-512-10": Case(nn.Sequential([nn.Dense(512), nn.relu, nn.Dense(10)]), (512,)),
}


# --- measurement ----------------------------------------------------------------------------------


def measure(case: Case, batch: int, repeats: int) -> dict[str, Any]:
    """All numbers of one network at one batch size, in seconds."""
    x = normal(1, batch, *case.shape)
    shapes = jax.eval_shape(case.module.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda s: 0.02 + 0.05 * jnp.abs(normal(s.size, *s.shape)), shapes)
    apply_fn: Callable[..., Array] = case.module.apply
    merged = fcjax.merge(apply_fn, variables, x)
    ways = {
        "original": functools.partial(jax.jit(apply_fn), variables),
        "compiled twice": functools.partial(jax.jit(lambda v, x: apply_fn(v, x)), variables),
        "merged": functools.partial(jax.jit(merged.apply), merged.params),
    }
    if case.by_hand is not None:
        hand, merged_by_hand = case.by_hand(variables)
        ways["by hand"] = functools.partial(jax.jit(hand), merged_by_hand)
    timings = compare_steps(ways, (x,), repeats)
    wanted, found = ways["original"](x), ways["merged"](x)
    if case.by_hand is not None:
        assert bool(jnp.allclose(ways["by hand"](x), wanted, rtol=DIFFERENCE))
    return {
        "weights": merged.weights,
        "flops": merged.flops,
        "median_seconds": {name: timings.median(name) for name in ("original", "merged")},
        "times_faster": (timings.ratio("merged"), timings.best_ratio("merged")),
        "times_by_hand": case.by_hand and timings.median("merged") / timings.median("by hand"),
        "noise": noise(timings, "compiled twice"),
        "output_difference": float(jnp.max(jnp.abs(found - wanted)) / jnp.max(jnp.abs(wanted))),
        "as_written": merged.reason is not None,
    }


def verdict(result: dict[str, Any]) -> str:
    """The bars that are missed, or that all are passed."""
    missed = []
    if result["times_faster"][0] < 1.0 - result["noise"]:
        missed.append("slower")
    if result["flops"][1] > result["flops"][0]:
        missed.append("more operations")
    if not result["output_difference"] <= DIFFERENCE:
        missed.append("other outputs")
    return "FAIL: " + ", ".join(missed) if missed else "PASS"


def as_row(result: dict[str, Any]) -> list[str]:
    """One row of the table."""
    before, after = result["median_seconds"].values()
    return [
        result["network"] + (" (as written)" if result["as_written"] else ""),
        "{:,}, {:,}".format(*result["weights"]),
        ", ".join(f"{flops / 1e6:.4g}" for flops in result["flops"]),
        f"{1e3 * before:.3g}, {1e3 * after:.3g}",
        f"{result['times_by_hand']:.2f}" if result["times_by_hand"] else "",
        "{:.2f}, {:.2f}".format(*result["times_faster"]),
        f"{100 * result['noise']:.0f} %",
        f"{result['output_difference']:.0e}",
        result["verdict"],
    ]


def main() -> None:
    """Measures, prints and records."""
    arguments = parser("what merging a network saves at inference")
    arguments.add_argument("--only", choices=sorted(CASES), nargs="+", help="these networks")
    options = arguments.parse_args()
    results = {}
    for name in options.only or CASES:
        for batch in BATCHES:
            key = f"{name}, {batch}"
            result = measure(CASES[name], batch, repeats=5 if options.quick else 25)
            results[key] = {"network": key, **result, "verdict": verdict(result)}
            print(" | ".join(as_row(results[key])), flush=True)
    title = f"jax {jax.__version__}, {options.machine}"
    show(title, COLUMNS, [as_row(r) for r in results.values()])
    if not options.quick:
        print(record("merge", options.machine, results, COLUMNS, as_row))


if __name__ == "__main__":
    main()
