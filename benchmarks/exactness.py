"""When front contribution is exact, in three pictures: laws, flow folds, the radial closure.

    python benchmarks/exactness.py [--quick] [--machine NAME] [--output FOLDER]

Laws: the largest drift of a conservation law along gradient descent on digits, for several learning
rates. Flow folds: relative deviation of the folded network's outputs from backprop's after a fixed
total time, for learning rates that halve; and two ways to do it wrong. Radial: test accuracy on
digits against the seconds of training steps, for backprop, the radial closure refreshed by one
ordinary step in every K, and frozen hidden layers. The pictures go to docs/.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from recording import parser, record, show
from rich.progress import track
from sklearn.datasets import load_digits

import fcjax
from fcjax.laws.plots import drifts

PyTree = Any
DOCS = Path(__file__).parents[1] / "docs"
COLORS = {"backprop": "#f4a582", "fc": "#08519c", "wrong": "#b2182b", "frozen": "#999999"}
BLUES = ("#08306b", "#08519c", "#2171b5", "#4292c6", "#6baed6", "#9ecae1")


# --- networks and data ----------------------------------------------------------------------------


def dense(*widths: int, seed: int = 0) -> list[dict[str, Array]]:
    """Dense layers for relu, biases zero."""
    generator = np.random.default_rng(seed)
    return [
        {
            "kernel": jnp.asarray(generator.normal(size=(a, b)) * (2 / a) ** 0.5),
            "bias": jnp.zeros(b),
        }
        for a, b in itertools.pairwise(widths)
    ]


def relu_net(params: PyTree, x: Array) -> Array:
    """Dense layers with a relu between two of them."""
    for i, layer in enumerate(params):
        x = jax.nn.relu(x) if i else x
        x = x @ layer["kernel"] + layer["bias"]
    return x


@functools.cache
def digits() -> tuple[Array, Array, Array, Array]:
    """Training images and labels, test images and labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order] / 16.0, labels[order]
    split = 360
    arrays = (images[split:], labels[split:], images[:split], labels[:split])
    return tuple(map(jnp.asarray, arrays))


def cross_entropy(apply: Callable[..., Array], params: PyTree, x: Array, labels: Array) -> Array:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), labels).mean()


# --- laws -----------------------------------------------------------------------------------------


def law_drift(quick: bool) -> dict[str, list[float]]:
    """Largest drift of any law at a fixed total time, by learning rate."""
    params = dense(64, 32, 32, 10)
    x, labels, *_ = digits()
    laws = fcjax.conservation_laws(relu_net, params, x)
    loss = functools.partial(cross_entropy, relu_net, x=x, labels=labels)
    found = {}
    for rate in (0.2, 0.1) if quick else (0.2, 0.1, 0.05, 0.025, 0.0125):
        values = drifts(laws, loss, params, rate, round(10 / rate))
        found[f"{rate:g}"] = np.max(np.abs(values - values[0]), axis=1).tolist()
    return found


# --- flow folds -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chain:
    """A network that flow folds."""

    apply_fn: Callable[..., Array]
    params: PyTree
    inputs: int
    time: float


def vectors(count: int) -> list[Array]:
    """Vectors of different magnitudes and signs."""
    generator = np.random.default_rng(count)
    return [
        jnp.asarray(generator.uniform(0.3, 1.2, 12) * generator.choice([-1.0, 1.0], 12))
        for _ in range(count)
    ]


def balanced(*widths: int) -> list[Array]:
    """Matrices with W_j^T W_j = W_(j+1) W_(j+1)^T."""
    generator, rank = np.random.default_rng(0), min(widths)
    bases = [np.linalg.qr(generator.normal(size=(h, rank)))[0] for h in widths]
    root = np.diag(generator.uniform(0.7, 1.2, rank))
    return [jnp.asarray(a @ root @ b.T) for a, b in itertools.pairwise(bases)]


def scalar_net(params: PyTree, x: Array) -> Array:
    """One hidden layer of relu and one output."""
    return jax.nn.relu(x @ params["hidden"]) @ params["out"][:, None]


def scalar_params() -> PyTree:
    """Output weights larger than the norms of what comes in."""
    generator = np.random.default_rng(3)
    hidden = generator.normal(size=(12, 8)) / 12**0.5 / 2
    return {
        "hidden": jnp.asarray(hidden),
        "out": jnp.asarray(1.2 * generator.choice([-1.0, 1.0], 8)),
    }


def diagonal_net(params: PyTree, x: Array) -> Array:
    """A linear model whose weights are products."""
    return (x @ functools.reduce(jnp.multiply, params))[:, None]


CHAINS = {
    "diagonal network, depth 3": lambda: Chain(diagonal_net, vectors(3), 12, 2.0),
    "balanced 20-64-64-64-5": lambda: Chain(
        lambda p, x: functools.reduce(jnp.matmul, p, x), balanced(20, 64, 64, 64, 5), 20, 1.0
    ),
    "scalar output, relu": lambda: Chain(scalar_net, scalar_params(), 12, 2.0),
}


def descent(apply: Callable[..., Array], params: PyTree, data: Any, rate: float, steps: int):
    """Parameters after gradient descent on the squared error."""
    x, y = data

    def step(_: int, p: PyTree) -> PyTree:
        gradient = jax.grad(lambda p: jnp.mean((apply(p, x) - y) ** 2))(p)
        return jax.tree.map(lambda w, g: w - rate * g, p, gradient)

    return jax.jit(lambda p: jax.lax.fori_loop(0, steps, step, p))(params)


def final_layer_regardless(params: PyTree) -> tuple[Callable[..., Array], PyTree]:
    """Wrong: the last factor survives, although it is not the smallest everywhere."""
    constants = [w**2 - params[-1] ** 2 for w in params[:-1]]
    signs = [jnp.sign(w) for w in params[:-1]]

    def apply(last: Array, x: Array) -> Array:
        roots = [
            jax.lax.stop_gradient(s * jnp.sqrt(jnp.maximum(last**2 + c, 0)))
            for s, c in zip(signs, constants, strict=True)
        ]
        return diagonal_net([*roots, last], x)

    return apply, params[-1]


def autodiff_of_closed_form(params: PyTree) -> tuple[Callable[..., Array], PyTree]:
    """Wrong: the right survivor, moved by the gradient through the closed form."""
    stacked = jnp.stack(params)
    smallest = jnp.min(jnp.abs(stacked), axis=0)
    constants, signs = stacked**2 - smallest**2, jnp.sign(stacked)

    def apply(survivor: Array, x: Array) -> Array:
        return diagonal_net(list(signs * jnp.sqrt(survivor**2 + constants)), x)

    return apply, smallest


def flow_deviations(quick: bool) -> dict[str, dict[str, float]]:
    """Relative deviation of outputs from backprop's at a fixed total time, by learning rate."""
    rates = [0.1 / 2**i for i in range(2 if quick else 6)]
    found: dict[str, dict[str, float]] = {}
    for name, make in CHAINS.items():
        case = make()
        generator = np.random.default_rng(1)
        x = jnp.asarray(generator.normal(size=(64, case.inputs)))
        y = jnp.tanh(x @ jnp.asarray(generator.normal(size=(case.inputs, 1))))
        ways = {name: lambda rate, case=case, x=x: folded(case, x, rate)}
        if case.apply_fn is diagonal_net:
            ways["wrong: final factor regardless"] = lambda _, p=case.params: (
                final_layer_regardless(p)
            )
            ways["wrong: plain gradient of the closed form"] = lambda _, p=case.params: (
                autodiff_of_closed_form(p)
            )
        for rate in track(rates, description=name):
            steps = round(case.time / rate)
            full = case.apply_fn(descent(case.apply_fn, case.params, (x, y), rate, steps), x)
            for label, way in ways.items():
                apply, params = way(rate)
                outputs = apply(descent(apply, params, (x, y), rate, steps), x)
                deviation = jnp.linalg.norm(outputs - full) / jnp.linalg.norm(full)
                found.setdefault(label, {})[f"{rate:g}"] = float(deviation)
    return found


def folded(case: Chain, x: Array, rate: float) -> tuple[Callable[..., Array], PyTree]:
    """The network folded under gradient flow."""
    fc = fcjax.front_contribute(
        case.apply_fn, case.params, x, optimizer=optax.sgd(rate), exactness="flow"
    )
    return fc.apply, fc.params


# --- the radial closure ---------------------------------------------------------------------------

RATE, BATCH = 0.05, 64
WIDTHS = (64, 256, 256, 256, 10)


class Ways:
    """Compiled training steps on digits."""

    def __init__(self) -> None:
        self.params = dense(*WIDTHS)
        x, *_ = digits()
        self.fc = fcjax.front_contribute(
            relu_net, self.params, x[:BATCH], optimizer=optax.sgd(RATE), exactness="approximate"
        )
        self.backprop = jax.jit(self._stepper(relu_net))
        self.radial = jax.jit(
            lambda p, c, x, labels: self._stepper(
                lambda p, x: self.fc.apply_with(p, c, x)
            )(p, x, labels)
        )  # fmt: skip
        self.refresh = jax.jit(
            lambda p, c, x, labels: self.fc.refresh(
                self._stepper(relu_net)(self.fc.expand(p, c), x, labels)
            )
        )
        self.frozen = jax.jit(self._frozen)

    @staticmethod
    def _stepper(apply: Callable[..., Array]) -> Callable[..., PyTree]:
        def step(params: PyTree, x: Array, labels: Array) -> PyTree:
            gradient = jax.grad(lambda p: cross_entropy(apply, p, x, labels))(params)
            return jax.tree.map(lambda w, g: w - RATE * g, params, gradient)

        return step

    def _frozen(self, params: PyTree, x: Array, labels: Array) -> PyTree:
        *hidden, last = params
        return [*hidden, self._stepper(lambda p, x: relu_net([*hidden, p], x))(last, x, labels)]


def batches(epochs: int) -> Iterator[tuple[int, Array, Array]]:
    """Shuffled batches with the number of their epoch."""
    x, labels, *_ = digits()
    generator = np.random.default_rng(1)
    for epoch in range(epochs):
        order = generator.permutation(len(x))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield epoch, x[chosen], labels[chosen]


def accuracies(quick: bool) -> dict[str, dict[str, list[float]]]:
    """For each way to train, seconds of steps and test accuracy after each epoch."""
    ways = Ways()
    runs = {"backprop": functools.partial(run_plain, ways.backprop, ways.params)}
    for every in (1, 2, 5, 20, None):
        label = f"radial, K = {every or 'infinity'}"
        runs[label] = functools.partial(run_radial, ways, every)
    runs["frozen hidden layers"] = functools.partial(run_plain, ways.frozen, ways.params)
    epochs = 2 if quick else 12
    for run in runs.values():
        run(1)  # compiles
    return {label: runs[label](epochs) for label in track(list(runs), description="radial")}


def run_plain(step: Callable[..., PyTree], params: PyTree, epochs: int):
    """Trains by one compiled step."""
    return timed(params, lambda p, x, labels, _: step(p, x, labels), relu_net, epochs)


def run_radial(ways: Ways, every: int | None, epochs: int):
    """Trains the final layer, with one ordinary step in every K."""

    def step(state: Any, x: Array, labels: Array, number: int) -> Any:
        params, contributions = state
        if every is not None and number % every == every - 1:
            return ways.refresh(params, contributions, x, labels)
        return ways.radial(params, contributions, x, labels), contributions

    start = (ways.fc.params, ways.fc.contributions)
    return timed(start, step, lambda s, x: ways.fc.apply_with(s[0], s[1], x), epochs)


def timed(state: Any, step: Callable[..., Any], apply: Any, epochs: int) -> dict[str, list[float]]:
    """Seconds of training steps and test accuracy at the end of each epoch."""
    *_, test, labels = digits()
    predict = jax.jit(lambda s, test: jnp.mean(jnp.argmax(apply(s, test), -1) == labels))
    seconds, total, accuracy = [], 0.0, []
    for _, group in itertools.groupby(enumerate(batches(epochs)), lambda item: item[1][0]):
        started = time.perf_counter()
        for number, (_, x, y) in group:
            state = step(state, x, y, number)
        jax.block_until_ready(state)
        total += time.perf_counter() - started
        seconds.append(total)
        accuracy.append(float(predict(state, test)))
    return {"seconds": seconds, "accuracy": accuracy}


# --- pictures -------------------------------------------------------------------------------------


def draw(laws, flow, radial) -> Figure:
    """Three panels."""
    figure = Figure(figsize=(13, 4.2), layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    for color, (rate, drift) in zip(BLUES, laws.items(), strict=False):
        left.plot(np.arange(len(drift)) * float(rate), drift, color=color, label=rate)
    left.set(xlabel="learning rate x steps", ylabel="largest drift of a law")
    left.set_title("Laws hold up to O(learning rate)", fontsize=11)
    left.legend(frameon=False, title="learning rate")
    _flow_panel(middle, flow)
    for label, run in radial.items():
        color, style = _radial_style(label, list(radial))
        right.plot(run["seconds"], run["accuracy"], style, color=color, label=label, markersize=3)
    right.set(xlabel="seconds of training steps", ylabel="test accuracy, digits")
    right.set_title("The radial closure is an approximation", fontsize=11)
    right.legend(frameon=False, fontsize=8.5, loc="lower right")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", linewidth=0.8)
    return figure


def _flow_panel(axes: Axes, flow: dict[str, dict[str, float]]) -> None:
    right = [label for label in flow if not label.startswith("wrong")]
    for label, deviations in flow.items():
        wrong = label not in right
        color = COLORS["wrong"] if wrong else BLUES[2 * right.index(label)]
        rates = [float(rate) for rate in deviations]
        style = "s--" if wrong else "o-"
        axes.loglog(rates, list(deviations.values()), style, color=color, label=label, markersize=4)
    axes.set(xlabel="learning rate", ylabel="relative deviation from backprop")
    axes.set_title("Flow folds converge to backprop", fontsize=11)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(0.0, 0.95))


def _radial_style(label: str, labels: list[str]) -> tuple[str, str]:
    if label == "backprop":
        return COLORS["backprop"], "o-"
    if label.startswith("frozen"):
        return COLORS["frozen"], "s-"
    return BLUES[labels.index(label) - 1], "o-"


# --- the tables -----------------------------------------------------------------------------------

COLUMNS = ("what", "values")


def as_row(result: dict[str, Any]) -> list[str]:
    """One row of the table."""
    return [result["what"], result["values"]]


def tabulated(laws, flow, radial) -> dict[str, dict[str, Any]]:
    """The numbers behind the pictures, as rows."""
    rows = {}
    ends = ", ".join(f"{rate}: {max(drift):.2e}" for rate, drift in laws.items())
    rows["laws"] = {"what": "largest drift of a law, by learning rate", "values": ends}
    for label, deviations in flow.items():
        listed = ", ".join(f"{rate}: {value:.2e}" for rate, value in deviations.items())
        rows[label] = {"what": f"deviation, {label}", "values": listed}
    for label, run in radial.items():
        values = f"{run['accuracy'][-1]:.3f} after {run['seconds'][-1]:.2f} s"
        rows[f"accuracy {label}"] = {"what": f"test accuracy, {label}", "values": values}
    return rows


def main() -> None:
    arguments = parser("laws, flow folds and the radial closure")
    arguments.add_argument("--output", type=Path, default=DOCS, help="folder of the picture")
    options = arguments.parse_args()
    with jax.enable_x64(True):
        results = [measured(options.quick) for measured in (law_drift, flow_deviations, accuracies)]
    rows = tabulated(*results)
    show(f"jax {jax.__version__}, {options.machine}", COLUMNS, [as_row(r) for r in rows.values()])
    picture = options.output / ("exactness-quick.png" if options.quick else "exactness.png")
    draw(*results).savefig(picture, dpi=150)
    print(picture)
    if not options.quick:
        print(record("exactness", options.machine, rows, COLUMNS, as_row))


if __name__ == "__main__":
    main()
