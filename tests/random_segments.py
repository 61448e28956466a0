"""Random networks with linear segments, and random optimizers, by seed."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from segments import balanced, orthogonal
from zoo import squared_error

ACTIVATIONS = (jax.nn.relu, jnp.tanh, jax.nn.gelu, jnp.sin, jax.nn.softplus)
TOKENS = 12


def network(seed: int) -> tuple[Any, Any, Any]:
    """A random network: `apply_fn`, its parameters, and `batch(rng)`."""
    rng = np.random.default_rng((seed, 0))
    sizes = [int(n) for n in rng.integers(2, 7, size=rng.integers(2, 4))]
    parts, params = [], []
    for n_in, n_out in itertools.pairwise(sizes):
        kind = rng.choice(["chain", "chain", "branches", "layer", "tied"])
        made, part = PARTS[kind](rng, n_in, n_out)
        parts.append((part, ACTIVATIONS[rng.integers(len(ACTIVATIONS))], rng.random() < 0.4))
        params.append(made)
    last_is_linear = rng.random() < 0.5

    def apply_fn(params, x):
        for i, (part, activation, residual) in enumerate(parts):
            y = part(params[i], x)
            x = x + y if residual and x.shape == y.shape else y
            if i < len(parts) - 1 or not last_is_linear:
                x = activation(x)
        return x

    def batch(rng):
        x = rng.standard_normal((TOKENS, sizes[0]))
        return (x,), np.sin(x @ np.ones((sizes[0], sizes[-1]))) + 0.1

    if rng.random() < 0.25:
        params = jax.tree.map(np.float32, params)
    return apply_fn, jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), params), batch


def _chain(rng, n_in, n_out):
    """A linear chain with random depth, width, biases and initial values."""
    depth = int(rng.integers(2, 5))
    width = int(rng.integers(4, 33))
    sizes = [n_in, *[width] * (depth - 1), n_out]
    kind = str(rng.choice(KERNELS))
    kernels = _kernels(rng, sizes, kind)
    has_bias = rng.random(depth) < 0.4
    sizes_of_biases = [n if b else 0 for n, b in zip(sizes[1:], has_bias, strict=True)]
    zero = rng.random() < 0.5
    biases = [(0.0 if zero else 0.3) * rng.standard_normal(n) for n in sizes_of_biases]
    # Identity edges around square layers, which join both of their axes into one space: values
    # that reach only a part of it count as a saddle, whatever the rank of the product.
    inner = rng.random(depth) < (0.2 if kind in ("normal", "orthogonal") else 0.0)
    scale = float(rng.choice([1.0, 1.0, 0.5, -2.0]))

    def part(params, x):
        for kernel, bias, edge in zip(params["w"], params["b"], inner, strict=True):
            y = scale * (x @ kernel)
            y = y + bias if bias.size else y
            x = x + y if edge and y.shape == x.shape else y
        return x

    return {"w": kernels, "b": biases}, part


KERNELS = ("normal", "orthogonal", "orthogonal", "balanced", "low rank", "zero last")


def _kernels(rng, sizes, kind):
    seed = int(rng.integers(1 << 30))
    if kind == "balanced":
        return balanced(*sizes, seed=seed)
    kernels = [rng.standard_normal(pair) / np.sqrt(pair[0]) for pair in itertools.pairwise(sizes)]
    if kind == "orthogonal":
        kernels[1:-1] = [orthogonal(*w.shape, seed=seed + i) for i, w in enumerate(kernels[1:-1])]
    if kind == "low rank":
        kernels[0] = kernels[0][:, :1] @ rng.standard_normal((1, sizes[1]))
    if kind == "zero last":
        kernels[1:-1] = [orthogonal(*w.shape, seed=seed + i) for i, w in enumerate(kernels[1:-1])]
        kernels[-1] = 0 * kernels[-1]
    return kernels


def _branches(rng, n_in, n_out):
    """Two writers and two readers of one hidden space."""
    width = int(rng.integers(8, 33))
    params = {k: rng.standard_normal((n_in, width)) / np.sqrt(n_in) for k in "ab"}
    params |= {k: rng.standard_normal((width, n_out)) / np.sqrt(width) for k in "cd"}

    def part(params, x):
        h = x @ params["a"] + jnp.tanh(x) @ params["b"]
        return h @ params["c"] - jnp.sin(h @ params["d"])

    return params, part


def _layer(rng, n_in, n_out):
    params = {"w": rng.standard_normal((n_in, n_out)) / np.sqrt(n_in), "b": np.zeros(n_out)}
    return params, lambda params, x: x @ params["w"] + params["b"]


def _tied(rng, n_in, n_out):
    """`W W^T`, then one more layer."""
    width = int(rng.integers(4, 25))
    params = {
        "w": rng.standard_normal((n_in, width)) / np.sqrt(width),
        "v": rng.standard_normal((n_in, n_out)) / np.sqrt(n_in),
    }
    return params, lambda params, x: jnp.tanh(x @ params["w"] @ params["w"].T) @ params["v"]


PARTS = {"chain": _chain, "branches": _branches, "layer": _layer, "tied": _tied}


def optimizer(seed: int) -> tuple[str, optax.GradientTransformation]:
    """A random chain of transformations, and how it is written."""
    rng = np.random.default_rng((seed, 1))
    size = float(rng.choice([1e-3, 1e-2, 0.1, 1.0]))
    decay = float(rng.choice([1e-4, 1e-2]))
    clip = float(rng.choice([1e-2, 0.1, 1.0]))
    matrices = lambda tree: jax.tree.map(lambda w: jnp.ndim(w) > 1, tree)  # noqa: E731
    choices = {
        "trace": lambda: optax.trace(0.9),
        "nesterov": lambda: optax.trace(0.9, nesterov=True),
        "decay": lambda: optax.add_decayed_weights(decay),
        "decay of matrices": lambda: optax.add_decayed_weights(decay, mask=matrices),
        "clip by norm": lambda: optax.clip_by_global_norm(clip),
        "clip": lambda: optax.clip(clip),
        "clip by block": lambda: optax.clip_by_block_rms(clip),
        "adaptive clip": lambda: optax.adaptive_grad_clip(clip),
        "adam": lambda: optax.scale_by_adam(),
        "rms": lambda: optax.scale_by_rms(eps=1e-4),
        "sign": lambda: optax.scale_by_sign(),
        "lion": lambda: optax.scale_by_lion(),
        "centralize": lambda: optax.centralize(),
        "masked trace": lambda: optax.masked(optax.trace(0.5), matrices),
        "masked scale": lambda: optax.masked(optax.scale(0.5), matrices),
        "apply every": lambda: optax.apply_every(3),
        "ema": lambda: optax.ema(0.8),
        "trust ratio": lambda: optax.scale_by_trust_ratio(),
        "normalise": lambda: optax.normalize_by_update_norm(),
        "param block norm": lambda: optax.scale_by_param_block_norm(),
        "schedule": lambda: optax.scale_by_schedule(lambda count: 1.0 / (1.0 + 0.1 * count)),
        "zero nans": lambda: optax.zero_nans(),
    }
    # Most that the rules allow, so that half of the chains are allowed.
    likely = ["trace", "nesterov", "decay", "decay of matrices", "clip by norm", "schedule",
              "masked trace", "masked scale", "ema", "apply every", "trust ratio"]  # fmt: skip
    pool = likely if rng.random() < 0.6 else list(choices)
    chosen = [str(name) for name in rng.choice(pool, size=rng.integers(0, 4), replace=False)]
    bounded = {"sign", "lion", "adam", "rms", "normalise", "trust ratio", "clip", "clip by norm"}
    rate = 0.05 * size if bounded.isdisjoint(chosen) else 1e-3
    parts = [choices[name]() for name in chosen]
    described = f"{chosen}, rate {rate:g}, decay {decay:g}, clip {clip:g}"
    return described, optax.chain(*parts, optax.scale(-rate))


loss = squared_error


def made_in_float32(params) -> bool:
    """Whether all initial values are representable in float32."""
    return all(np.array_equal(w, np.float32(w)) for w in jax.tree.leaves(params))


def ranks(params) -> list[tuple[int, int]]:
    """For each chain, the rank of its product and how large it could be, a first bias included."""
    found = []
    for part in params:
        if "b" in part and isinstance(part["w"], list):
            kernels, (bias, *_) = part["w"], part["b"]
            first = np.concatenate([kernels[0], bias[None]] if bias.size else [kernels[0]])
            product = np.linalg.multi_dot([first, *kernels[1:]])
            found.append((int(np.linalg.matrix_rank(product)), min(product.shape)))
    return found
