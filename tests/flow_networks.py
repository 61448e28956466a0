"""Networks with chains and gains that gradient flow determines, for the tests of flow folds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcjax.rules import matrix_flows

relu = jax.nn.relu


@dataclasses.dataclass(frozen=True)
class Network:
    """A network to be trained on a regression.

    Attributes:
      apply: ``apply(params, x)``.
      params: its initial parameters.
      x: the inputs.
      y: the targets.
      folded: the paths of the leaves that are to be folded away.
      has_kinks: whether gates flip along the training.
      time: learning rate times steps.
    """

    apply: Callable[[Any, Any], Any]
    params: Any
    x: Any
    y: Any
    folded: tuple[str, ...]
    has_kinks: bool = False
    time: float = 2.0


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng((seed, *shape)).normal(size=shape)


def chain(*widths: int, offsets: Any = None, seed: int = 0) -> list[np.ndarray]:
    """Matrices whose gaps are multiples of the identity."""
    rank, rng = min(widths), np.random.default_rng((seed, *widths))
    bases = [np.linalg.qr(rng.normal(size=(h, rank)))[0] for h in widths]
    sizes = rng.uniform(0.7, 1.2, size=rank)
    offsets = np.zeros(len(widths) - 1) if offsets is None else np.asarray(offsets)
    roots = [np.sqrt(sizes**2 + c) for c in offsets]
    return [a @ np.diag(s) @ b.T for a, b, s in zip(bases, bases[1:], roots, strict=False)]


def product(factors: Any, x: Any) -> Any:
    return functools.reduce(jnp.matmul, factors, x)


def network(apply: Any, params: Any, inputs: int, outputs: int, *folded: str, **more: Any) -> Any:
    params = jax.tree.map(jnp.asarray, params)
    x = jnp.asarray(normal(24, inputs, seed=1))
    teacher = normal(inputs, outputs, seed=2)
    return Network(apply, params, x, jnp.tanh(x @ teacher), folded, **more)


def vectors(count: int, size: int = 6) -> list[np.ndarray]:
    """Vectors of magnitudes between 0.3 and 1.2, of all signs."""
    rng = np.random.default_rng((count, size))
    return [rng.uniform(0.3, 1.2, size) * rng.choice([-1.0, 1.0], size) for _ in range(count)]


def normalised(x: Any) -> Any:
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def diagonal() -> Network:
    def apply(p: Any, x: Any) -> Any:
        return (x @ (p[0] * p[1] * p[2]))[:, None]

    return network(apply, vectors(3), 6, 1, "0", "1")


def difference() -> Network:
    def apply(p: Any, x: Any) -> Any:
        return (x @ (p["u"] * p["v"] - p["s"] * p["t"]))[:, None]

    params = dict(zip("uvst", vectors(4), strict=True))
    return network(apply, params, 6, 1, "s", "u")


def inside() -> Network:
    def apply(p: Any, x: Any) -> Any:
        return jnp.tanh(x * p["u"] * p["v"]) @ p["w"]

    u, v = vectors(2)
    return network(apply, {"u": u, "v": v, "w": normal(6, 2, scale=0.4)}, 6, 2, "u")


def around_relu() -> Network:
    def apply(p: Any, x: Any) -> Any:
        return relu((x @ p["a"]) * p["u"]) * p["v"] @ p["w"]

    u, v = vectors(2, 8)
    params = {"a": normal(6, 8, scale=0.4), "u": u, "v": v, "w": normal(8, 2, scale=0.4)}
    return network(apply, params, 6, 2, "u", has_kinks=True)


def balanced() -> Network:
    return network(
        lambda p, x: product(p, x), chain(20, 64, 64, 64, 5), 20, 5, "0", "1", "2", time=1.0
    )


def relaxed() -> Network:
    params = chain(6, 6, 6, 6, offsets=[0.4, 0.0, 0.9])
    return network(lambda p, x: product(p, x), params, 6, 6, "0", "1", time=1.0)


def relaxed_end() -> Network:
    params = chain(4, 4, 9, offsets=[0.5, 0.0])
    return network(lambda p, x: product(p, x), params, 4, 9, "0", time=1.0)


def narrow() -> Network:
    return network(lambda p, x: product(p, x), chain(6, 3, 8, 7), 6, 7, "0", "1", time=1.0)


def between() -> Network:
    def apply(p: Any, x: Any) -> Any:
        z = x @ p["first"] @ p["second"].T @ p["third"]
        return jnp.tanh(z) @ p["out"]

    first, second, third = chain(6, 9, 8, 5)
    params = {"first": first, "second": second.T, "third": third, "out": normal(5, 2, scale=0.5)}
    return network(apply, params, 6, 2, "first", "second")


def scalar_output() -> Network:
    def apply(p: Any, x: Any) -> Any:
        return relu(x @ p["w"] + p["b"]) @ p["a"]

    w, b = normal(6, 8, scale=0.3), normal(8, scale=0.1)
    size = np.sqrt(np.sum(w**2, 0) + b**2) + np.random.default_rng(0).uniform(0.05, 0.4, 8)
    params = {"w": w, "b": b, "a": (size * np.where(np.arange(8) % 2, 1, -1))[:, None]}
    return network(apply, params, 6, 1, "a", has_kinks=True)


def norm_gain() -> Network:
    def apply(p: Any, x: Any) -> Any:
        return jnp.tanh((normalised(x) * p["gain"] + p["shift"]) @ p["w"]) @ p["v"]

    params = {
        "gain": 1.0 + 0.2 * normal(6, seed=3),
        "shift": np.zeros(6),
        "w": normal(6, 5, scale=0.25),
        "v": normal(5, 2, scale=0.5),
    }
    return network(apply, params, 6, 2, "gain")


def channel_scale() -> Network:
    def apply(p: Any, x: Any) -> Any:
        return jnp.tanh((x @ p["w"]) * p["scale"]) @ p["v"]

    params = {
        "w": normal(6, 5, scale=0.25),
        "scale": 1.5 + 0.2 * normal(5, seed=3),
        "v": normal(5, 2, scale=0.5),
    }
    return network(apply, params, 6, 2, "scale")


def together() -> Network:
    """A chain of matrices, one of vectors and a gain in one network."""

    def apply(p: Any, x: Any) -> Any:
        z = jnp.tanh(product(p["chain"], x)) * p["u"] * p["v"]
        return jnp.tanh((z @ p["w"]) * p["scale"]) @ p["out"]

    u, v = vectors(2, 4)
    params = {
        "chain": chain(6, 8, 8, 4),
        "u": u,
        "v": v,
        "w": normal(4, 5, scale=0.25),
        "scale": 1.0 + 0.2 * normal(5, seed=3),
        "out": normal(5, 2, scale=0.5),
    }
    return network(apply, params, 6, 2, "chain/0", "chain/1", "scale", "u")


NETWORKS: dict[str, Callable[[], Network]] = {
    made.__name__: made
    for made in (
        diagonal, difference, inside, around_relu, balanced, relaxed, relaxed_end, narrow, between,
        scalar_output, norm_gain, channel_scale, together,
    )
}  # fmt: skip


def unbalanced() -> Network:
    """A chain as it is usually initialised."""
    params = [normal(6, 8, scale=0.4), normal(8, 8, scale=0.4), normal(8, 3, scale=0.4)]
    return network(lambda p, x: product(p, x), params, 6, 3)


def same_product(network: Network) -> Network:
    """The network with balanced factors, for a chain."""
    factors = [np.asarray(w) for w in network.params]
    rank = min(min(w.shape) for w in factors)
    return dataclasses.replace(network, params=matrix_flows.rebalanced(factors, rank))
