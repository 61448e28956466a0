"""What a deep balanced chain costs that is folded along gradient flow onto its product.

    python benchmarks/flow.py [--quick] [--machine NAME]

A step of SGD on a linear chain of 16 matrices of 512 x 512, on 4096 rows: as backprop runs it, as
fcjax runs it without knowing the optimizer (collapse), folded along gradient flow, and what the
fold cannot undercut by hand: the step of one matrix of that size, and the eigendecomposition of its
Gram matrix beside it. The steps take turns in one process; the hand-written one is timed twice, and
its ratio to itself (A/A) is the noise. The bar: the fold takes at most 1.2 times the time by hand.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from models import chain, normal, squared_error
from recording import noise, parser, record, show

import fcjax
from fcjax.measure import compare_steps, residual_bytes

PyTree = Any
DEPTH, WIDTH, ROWS = 16, 512, 4096
RATE = 1e-2
LIMIT = 1.2
HAND, TWIN, FOLDED, COLLAPSED, BACKPROP = (
    "one matrix and eigh",
    "one matrix and eigh, compiled twice",
    "fold",
    "collapse",
    "backprop",
)
COLUMNS = (
    "network",
    "weights BP, fold",
    "step ms BP, collapse, fold, by hand",
    "times the hand-written step (median, best)",
    "times faster than collapse, BP (median)",
    "A/A",
    "saved MiB BP, fold",
    "verdict",
)


def balanced_chain() -> list[jax.Array]:
    """Balanced factors; the product has singular values between 0.5 and 1.5."""
    rng = np.random.default_rng(0)
    frames = [np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0] for _ in range(DEPTH + 1)]
    roots = np.linspace(0.5, 1.5, WIDTH) ** (1 / DEPTH)
    made = [(a * roots) @ b.T for a, b in itertools.pairwise(frames)]
    return [jnp.asarray(factor, jnp.float32) for factor in made]


def bound_step(apply: Callable[..., Any], params: PyTree) -> Callable[..., Any]:
    """A compiled step of SGD from some parameters, as a function of the batch."""
    optimizer = optax.sgd(RATE)

    def step(params: PyTree, x: jax.Array, target: jax.Array) -> PyTree:
        gradient = jax.grad(lambda p: squared_error(apply(p, x), target))(params)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    return functools.partial(jax.jit(step), params)


def hand_step(product: jax.Array) -> Callable[..., Any]:
    """The step of one matrix, and beside it the eigendecomposition of its Gram matrix."""

    def step(product: jax.Array, x: jax.Array, target: jax.Array) -> PyTree:
        gradient = jax.grad(lambda z: squared_error(x @ z, target))(product)
        return product - RATE * gradient, jnp.linalg.eigh(product @ product.T)

    return functools.partial(jax.jit(step), product)


def measure(repeats: int) -> dict[str, Any]:
    """All numbers, in seconds and bytes."""
    params, x = balanced_chain(), normal(0, ROWS, WIDTH)
    target = normal(1, ROWS, WIDTH)
    plain = fcjax.front_contribute(chain, params, x)
    fc = fcjax.front_contribute(chain, params, x, optimizer=optax.sgd(RATE), exactness="flow")
    product = functools.reduce(jnp.matmul, params)
    steps = {
        HAND: hand_step(product),
        TWIN: hand_step(product),
        FOLDED: bound_step(fc.apply, fc.params),
        COLLAPSED: bound_step(plain.apply, plain.params),
        BACKPROP: bound_step(chain, params),
    }
    timings = compare_steps(steps, (x, target), repeats)
    return {
        "network": f"linear, {DEPTH} of {WIDTH} x {WIDTH}, {ROWS} rows",
        "repeats": repeats,
        "weights": {BACKPROP: count(params), FOLDED: count(fc.params)},
        "median_seconds": {name: timings.median(name) for name in steps},
        "best_seconds": {name: timings.best(name) for name in steps},
        "noise": noise(timings, TWIN),
        "saved_bytes": {
            BACKPROP: residual_bytes(chain, params, x),
            FOLDED: residual_bytes(fc.apply, fc.params, x),
        },
    }


def count(tree: PyTree) -> int:
    """Number of entries of all arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def times_by_hand(result: dict[str, Any]) -> tuple[float, float]:
    """Median and best time of the folded step over those of the hand-written one."""
    median, best = result["median_seconds"], result["best_seconds"]
    return median[FOLDED] / median[HAND], best[FOLDED] / best[HAND]


def as_row(result: dict[str, Any]) -> list[str]:
    """One row of the table."""
    median, weights, saved = (result[key] for key in ("median_seconds", "weights", "saved_bytes"))
    return [
        result["network"],
        f"{weights[BACKPROP]:,}, {weights[FOLDED]:,}",
        ", ".join(f"{1e3 * median[n]:.0f}" for n in (BACKPROP, COLLAPSED, FOLDED, HAND)),
        "{:.2f}, {:.2f}".format(*times_by_hand(result)),
        ", ".join(f"{median[name] / median[FOLDED]:.1f}" for name in (COLLAPSED, BACKPROP)),
        f"{100 * result['noise']:.0f} %",
        ", ".join(f"{saved[name] / 2**20:.0f}" for name in (BACKPROP, FOLDED)),
        result["verdict"],
    ]


def main() -> None:
    options = parser("what a fold along gradient flow costs").parse_args()
    result = measure(repeats=5 if options.quick else 25)
    result["verdict"] = "PASS" if times_by_hand(result)[0] <= LIMIT else f"FAIL: above {LIMIT}"
    results = {result["network"]: result}
    show(f"jax {jax.__version__}, {options.machine}", COLUMNS, [as_row(result)])
    if not options.quick:
        print(record("flow", options.machine, results, COLUMNS, as_row))


if __name__ == "__main__":
    main()
