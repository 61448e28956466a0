"""What the transform costs: seconds to trace, analyse and plan networks of growing depth.

    python benchmarks/transform_cost.py [--quick] [--machine NAME]

Each network is transformed several times and the best time kept. `growth` is the time per equation
relative to the shallowest network's: 1 is linear; above 2 fails. Compile times are of a gradient
step, its tracing included.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from recording import parser, record, show

import fcjax

SECONDS_AT_100 = 2.0
COLUMNS = (
    "network",
    "equations",
    "transform s",
    "growth",
    "compile s BP, fcjax",
    "verdict",
)
WIDTH, ROWS = 16, 64


def relu_stack(params: list[Any], x: Any) -> Any:
    """Dense layers with a bias and a ReLU."""
    for layer in params:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x


def linear_stack(params: list[Any], x: Any) -> Any:
    """Dense layers with a bias and nothing between them: one segment."""
    for layer in params:
        x = x @ layer["kernel"] + layer["bias"]
    return x


def residual_stack(params: list[Any], x: Any) -> Any:
    """Pre-norm residual blocks: LayerNorm, dense, gelu, added to the stream."""
    for layer in params:
        centred = x - x.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)
        x = x + jax.nn.gelu((normed * layer["gain"]) @ layer["kernel"] + layer["bias"])
    return x


STACKS = {"relu": relu_stack, "linear": linear_stack, "residual": residual_stack}


def parameters(depth: int) -> list[dict[str, jax.Array]]:
    """Parameters of `depth` square layers."""
    keys = jax.random.split(jax.random.key(0), depth)
    kernel = [jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5 for key in keys]
    vector = jnp.ones(WIDTH)
    return [{"kernel": k, "bias": vector, "gain": vector} for k in kernel]


def best_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Shortest time of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def compile_seconds(apply: Callable[..., Any], params: Any, x: Any) -> float:
    """Seconds to trace and compile a gradient step."""
    step = jax.jit(jax.grad(lambda p: jnp.mean(apply(p, x) ** 2)))
    return best_seconds(lambda: step.lower(params).compile(), repeats=1)


def measure(kind: str, depth: int, repeats: int, compiles: bool) -> dict[str, Any]:
    """Cost of transforming one network."""
    apply_fn, params, x = STACKS[kind], parameters(depth), jnp.ones((ROWS, WIDTH))
    transform = best_seconds(lambda: fcjax.front_contribute(apply_fn, params, x), repeats)
    fc = fcjax.front_contribute(apply_fn, params, x)
    both = [compile_seconds(f, params, x) for f in (apply_fn, fc.apply)] if compiles else None
    return {
        "network": f"{kind}-{depth}",
        "depth": depth,
        "equations": len(jax.make_jaxpr(apply_fn)(params, x).eqns),
        "transform_seconds": transform,
        "compile_seconds": both,
    }


def judged(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of one kind of network with their growth and verdict."""
    per_equation = [r["transform_seconds"] / r["equations"] for r in results]
    growth = [cost / per_equation[0] for cost in per_equation]
    slow = [r["depth"] <= 100 and r["transform_seconds"] > SECONDS_AT_100 for r in results]
    verdicts = [
        "FAIL: slow" if s else "FAIL: not linear" if g > 2.0 else "PASS"
        for s, g in zip(slow, growth, strict=True)
    ]
    judgements = zip(results, growth, verdicts, strict=True)
    return [{**r, "growth": g, "verdict": v} for r, g, v in judgements]


def as_row(result: dict[str, Any]) -> list[str]:
    """One row of the table."""
    compiled = result["compile_seconds"]
    return [
        result["network"],
        str(result["equations"]),
        f"{result['transform_seconds']:.3f}",
        f"{result['growth']:.2f}",
        f"{compiled[0]:.2f}, {compiled[1]:.2f}" if compiled else "",
        result["verdict"],
    ]


def main() -> None:
    options = parser("what the transform costs").parse_args()
    depths = (10, 20, 50, 100) if options.quick else (10, 20, 50, 100, 200)
    fcjax.front_contribute(relu_stack, parameters(2), jnp.ones((ROWS, WIDTH)))  # imports, caches
    rows = itertools.chain.from_iterable(
        judged([measure(k, d, 1 if options.quick else 3, not options.quick) for d in depths])
        for k in STACKS
    )
    results = {r["network"]: r for r in rows}
    show(
        f"jax {jax.__version__}, {options.machine}", COLUMNS, [as_row(r) for r in results.values()]
    )
    if not options.quick:
        print(record("transform_cost", options.machine, results, COLUMNS, as_row))


if __name__ == "__main__":
    main()
