"""Small networks that the tests train with and without front contribution.

Every network is a builder registered under its function's name; `build(name)` makes it, with all
floating parameters in float64 and moved off their initial zeros and ones, so that no bias or gain
is trivial. What the analysis must find in each is in `golden`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import freeze

TOKENS = 64
WIDE = 16


@dataclass(frozen=True)
class Network:
    """One network with its data.

    name: the builder's name.
    apply_fn: `apply_fn(params, *args)`, any pytree out.
    params: pytree of arrays.
    batch: `batch(rng) -> (args, target)`, numpy arrays of the example shapes.
    loss: `loss(outputs, target)`, a scalar.
    """

    name: str
    apply_fn: Callable[..., Any]
    params: Any
    batch: Callable[[np.random.Generator], tuple[tuple, Any]]
    loss: Callable[[Any, Any], jax.Array]

    @property
    def example_args(self) -> tuple:
        """The arguments of one batch."""
        return self.batch(np.random.default_rng(0))[0]


class Registry:
    """Builders of networks under the names of their functions.

    A builder returns `(apply_fn, params, batch)` and optionally a loss. Its arguments are sizes,
    small by default.
    """

    def __init__(self):
        self._builders: dict[str, Callable] = {}
        self.build = functools.cache(self._build)

    def network(self, builder):
        """Register a builder."""
        if builder.__name__ in self._builders:
            raise ValueError(f"there already is a network named {builder.__name__}")
        self._builders[builder.__name__] = builder
        return builder

    def names(self) -> list[str]:
        """Every network's name, in order of registration."""
        return list(self._builders)

    def _build(self, name: str, *sizes: int) -> Network:
        apply_fn, params, batch, *loss = self._builders[name](*sizes)
        return Network(name, apply_fn, off_initial(params), batch, *(loss or [squared_error]))


_registry = Registry()
network, names, build = _registry.network, _registry.names, _registry.build


def is_inexact(leaf) -> bool:
    """Whether a leaf is floating, hence trainable."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def cast(tree, dtype):
    """Cast the floating leaves of a pytree, leaving the others as they are."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype if is_inexact(leaf) else None), tree)


def off_initial(params):
    """Parameters in float64, each moved by a little noise."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape) if is_inexact(leaf) else leaf,
        cast(params, jnp.float64),
    )


def squared_error(outputs, target):
    """Mean squared error of a single output array."""
    return jnp.mean((outputs - target) ** 2)


def first_squared_error(outputs, target):
    """Mean squared error of the first of several outputs."""
    return squared_error(outputs[0], target)


def teach(rows, out):
    """A fixed smooth function of the rows, shape (..., in) -> (..., out)."""
    teacher = np.random.default_rng(2).standard_normal((rows.shape[-1], out))
    return np.sin(rows @ teacher)


def rows(n_in, n_out, tokens=TOKENS):
    """Batches of independent rows: x (tokens, n_in), target (tokens, n_out)."""

    def batch(rng):
        x = rng.standard_normal((tokens, n_in))
        return (x,), teach(x, n_out) + 0.1 * rng.standard_normal((tokens, n_out))

    return batch


def sequences(n_in, n_out, batch_size=8, length=8):
    """Batches of sequences: x (batch_size, length, n_in), target (batch_size, length, n_out)."""

    def batch(rng):
        x = rng.standard_normal((batch_size, length, n_in))
        return (x,), teach(x, n_out)

    return batch


def pooled_sequences(n_in, n_out, batch_size=8, length=8):
    """As `sequences`, with one target per sequence: target (batch_size, n_out)."""

    def batch(rng):
        x = rng.standard_normal((batch_size, length, n_in))
        return (x,), teach(x.mean(axis=1), n_out)

    return batch


def tokens_of(vocabulary, n_out, batch_size=8, length=8):
    """Batches of token numbers: ids (batch_size, length), target (batch_size, length, n_out)."""

    def batch(rng):
        ids = rng.integers(0, vocabulary, (batch_size, length), dtype=np.int32)
        return (ids,), teach(np.eye(vocabulary)[ids], n_out)

    return batch


def with_extra(batch, *extra):
    """Put fixed arguments before the data of each batch."""

    def extended(rng):
        args, target = batch(rng)
        return (*extra, *args), target

    return extended


def weights(*shapes):
    """One seeded matrix per shape, scaled to keep the variance of its rows' images near one."""
    rng = np.random.default_rng(3)
    return [jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-2])) for shape in shapes]


def zeros(*sizes):
    """One zero bias per size."""
    return [jnp.zeros(size) for size in sizes]


def linen(module, batch, *init_args):
    """Apply function and parameters of a linen module without state."""
    init_args = init_args or batch(np.random.default_rng(0))[0]
    params = jax.jit(module.init)(jax.random.key(0), *init_args)["params"]
    return lambda params, *args: module.apply({"params": params}, *args), params


# --- chains --------------------


@network
def linear_depth_1():
    """A single matrix: nothing to multiply it with."""
    return lambda params, x: x @ params[0], tuple(weights((6, 3))), rows(6, 3)


@network
def linear_depth_2():
    """Two matrices in a list."""
    return lambda params, x: x @ params[0] @ params[1], weights((6, WIDE), (WIDE, 3)), rows(6, 3)


@network
def linear_depth_4_biases():
    """Four Flax layers with biases."""
    batch = rows(6, 3)
    module = nn.Sequential([nn.Dense(WIDE), nn.Dense(WIDE), nn.Dense(WIDE), nn.Dense(3)])
    return *linen(module, batch), batch


@network
def linear_depth_12():
    """Twelve layers with biases in a dict of tuples."""
    sizes = [6, *[WIDE] * 11, 3]
    kernels = weights(*itertools.pairwise(sizes))
    params = {
        f"layer_{i:02}": pair for i, pair in enumerate(zip(kernels, zeros(*sizes[1:]), strict=True))
    }

    def apply_fn(params, x):
        for kernel, bias in params.values():
            x = x @ kernel + bias
        return x

    return apply_fn, params, rows(6, 3)


@network
def bottleneck_then_wide():
    """A wide pair before a narrow waist, and one behind it."""
    params = weights((6, WIDE), (WIDE, 2), (2, WIDE), (WIDE, 6))
    return lambda params, x: functools.reduce(jnp.matmul, params, x), params, rows(6, 6)


class ResidualLinear(nn.Module):
    """`h + h A B`, three times, then a readout."""

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = x + nn.Dense(x.shape[-1])(nn.Dense(WIDE)(x))
        return nn.Dense(3)(x)


@network
def residual_linear():
    """Residual linear blocks, parameters in a FrozenDict."""
    batch = rows(4, 3)
    apply_fn, params = linen(ResidualLinear(), batch)
    return apply_fn, freeze(params), batch


@network
def parallel_branches():
    """A sum of three branches of different depth, then relu and a readout."""
    params = {
        "shallow": weights((4, 8)),
        "middle": weights((4, WIDE), (WIDE, 8)),
        "deep": weights((4, WIDE), (WIDE, WIDE), (WIDE, 8)),
        "readout": weights((8, 3)),
    }

    def apply_fn(params, x):
        branches = [
            functools.reduce(jnp.matmul, params[name], x) for name in ("shallow", "middle", "deep")
        ]
        return jax.nn.relu(sum(branches)) @ params["readout"][0]

    return apply_fn, params, rows(4, 3)


@network
def identity_branch():
    """An identity, a subtracted and a negated branch in one sum."""
    params = dict(
        zip("abcde", weights((4, WIDE), (WIDE, 4), (4, WIDE), (WIDE, 4), (4, 3)), strict=True)
    )

    def apply_fn(params, x):
        y = x + x @ params["a"] @ params["b"] - (-(x @ params["c"])) @ params["d"]
        return jnp.tanh(y) @ params["e"]

    return apply_fn, params, rows(4, 3)


@network
def scales():
    """LayerScale on a residual branch, constant scales and a division by a constant."""
    params = {
        "w": weights((4, WIDE), (WIDE, 4), (4, 3)),
        "gamma": jnp.full((4,), 0.5),
        "gain": jnp.asarray(1.5),
    }

    def apply_fn(params, x):
        branch = (x / 2.0) @ params["w"][0] @ params["w"][1]
        return (x + params["gamma"] * branch) @ params["w"][2] * params["gain"] * 0.25

    return apply_fn, params, rows(4, 3)


# --- layouts --------------------


class HeadsInAndOut(nn.Module):
    """DenseGeneral into heads and out of them again."""

    @nn.compact
    def __call__(self, x):
        heads = nn.DenseGeneral((4, 8))(x)
        return nn.DenseGeneral(3, axis=(-2, -1))(heads)


@network
def dense_general():
    """DenseGeneral kernels with a heads axis."""
    batch = sequences(4, 3)
    return *linen(HeadsInAndOut(), batch), batch


@network
def einsum_layouts():
    """Kernels with the output axis first, heads in the middle, and a transposed activation."""
    params = {"a": weights((5, 4, 8))[0], "b": 0.3 * weights((3, 5, 8))[0], "c": weights((2, 3))[0]}

    def apply_fn(params, x):
        heads = jnp.einsum("btd,hdk->bhtk", x, params["a"])
        merged = jnp.einsum("bhtk,ohk->obt", heads, params["b"])
        return jnp.einsum("obt,po->btp", merged, params["c"])

    return apply_fn, params, sequences(4, 2)


@network
def reshapes_and_transposes():
    """Rows cut into groups, mixed along both axes, and flattened."""
    params = dict(zip("abc", weights((4, WIDE), (3, 5), (5 * WIDE, 2)), strict=True))

    def apply_fn(params, x):
        grouped = x.reshape(x.shape[0], 3, 4) @ params["a"]
        mixed = jnp.swapaxes(grouped, 1, 2) @ params["b"]
        return jnp.swapaxes(mixed, 1, 2).reshape(x.shape[0], -1) @ params["c"]

    return apply_fn, params, rows(12, 2)


@network
def mean_pooling():
    """A wide map averaged over the positions."""
    params = weights((4, WIDE), (WIDE, 3))
    return (
        lambda params, x: jnp.mean(x @ params[0], axis=1) @ params[1],
        params,
        pooled_sequences(4, 3),
    )


@network
def concatenate_before_dense():
    """Two linear branches and a non-linear one concatenated before a dense pair."""
    params = dict(zip("abcd", weights((4, WIDE), (4, 4), (WIDE + 8, WIDE), (WIDE, 3)), strict=True))

    def apply_fn(params, x):
        joined = jnp.concatenate([x @ params["a"], jnp.tanh(x @ params["b"]), x], axis=-1)
        return joined @ params["c"] @ params["d"]

    return apply_fn, params, rows(4, 3)


@network
def slices_after_dense():
    """One dense map sliced and split into three uses."""
    params = dict(zip("abcd", weights((4, 24), (8, 3), (8, 3), (4, 3)), strict=True))

    def apply_fn(params, x):
        left, right = jnp.split((x @ params["a"])[:, :16], 2, axis=-1)
        tail = (x @ params["a"])[:, 16::2]
        return left @ params["b"] + right @ params["c"] + jnp.tanh(tail) @ params["d"]

    return apply_fn, params, rows(4, 3)


@network
def embedding_then_linear():
    """A look-up, then a dense pair."""
    params = {
        "table": weights((10, 4))[0],
        "up": weights((4, WIDE))[0],
        "down": weights((WIDE, 3))[0],
    }
    return lambda p, ids: p["table"][ids] @ p["up"] @ p["down"], params, tokens_of(10, 3)


# --- parameters --------------------


@network
def lora_stop_gradient():
    """A low-rank branch beside a weight behind stop_gradient."""
    params = {"frozen": weights((12, 12))[0], "a": weights((12, 2))[0], "b": weights((2, 12))[0]}

    def apply_fn(params, x):
        return jnp.tanh(x @ jax.lax.stop_gradient(params["frozen"]) + x @ params["a"] @ params["b"])

    return apply_fn, params, rows(12, 12)


@network
def adapter_beside_closed_over_weight():
    """A trainable branch beside a frozen weight that apply_fn closes over."""
    frozen = weights((4, 4))[0]
    params = {"a": weights((4, WIDE))[0], "b": weights((WIDE, 4))[0]}
    return (
        lambda p, x: jnp.tanh(x @ frozen.astype(x.dtype) + x @ p["a"] @ p["b"]),
        params,
        rows(4, 4),
    )


@network
def tied_in_a_chain():
    """The same square weight and bias at three places of one chain."""
    params = {"w": weights((4, 4))[0], "b": jnp.zeros(4), "out": weights((4, 3))[0]}

    def apply_fn(params, x):
        for _ in range(3):
            x = x @ params["w"] + params["b"]
        return x @ params["out"]

    return apply_fn, params, rows(4, 3)


@network
def tied_autoencoder():
    """A linear autoencoder: encoder W, decoder W transposed."""
    return (
        lambda params, x: x @ params["w"] @ params["w"].T,
        {"w": 0.5 * weights((6, WIDE))[0]},
        rows(6, 6),
    )


@network
def weight_normalisation():
    """Kernels computed from a direction and a magnitude."""
    params = [{"v": v, "g": jnp.ones(v.shape[1])} for v in weights((4, WIDE), (WIDE, 3))]

    def apply_fn(params, x):
        for layer in params:
            x = x @ (layer["g"] * layer["v"] / jnp.linalg.norm(layer["v"], axis=0))
        return x

    return apply_fn, params, rows(4, 3)


@network
def integer_and_unused_leaves():
    """An integer leaf that is read, and a floating one that is not."""
    params = {
        "w": weights((4, WIDE), (WIDE, 3)),
        "exponent": jnp.asarray(2, jnp.int32),
        "unused": jnp.ones(5),
    }
    return lambda p, x: x @ p["w"][0] @ p["w"][1] / p["exponent"], params, rows(4, 3)


# --- several segments, several consumers, several outputs --------------------


@network
def segments_between_activations():
    """A linear pair before relu, tanh and gelu, and one at the end."""
    params = [tuple(weights((4, WIDE), (WIDE, 4))) for _ in range(4)]

    def apply_fn(params, x):
        for (up, down), activation in zip(
            params, [jax.nn.relu, jnp.tanh, jax.nn.gelu, lambda x: x], strict=True
        ):
            x = activation(x @ up @ down)
        return x

    return apply_fn, params, rows(4, 4)


@network
def several_consumers():
    """A hidden value read by linear maps, by one before relu, and by tanh directly."""
    params = dict(zip("abcd", weights((4, 12), (12, 3), (12, 3), (12, 3)), strict=True))

    def apply_fn(params, x):
        h = x @ params["a"]
        return (
            h @ params["b"]
            + jax.nn.relu(h @ params["c"])
            + jnp.tanh(h)[:, :3]
            + h[:, :3] @ params["d"][:3]
        )

    return apply_fn, params, rows(4, 3)


@network
def multi_output():
    """A dict of outputs, one of them a hidden value, one scalar, one integer."""
    params = {"trunk": weights((4, WIDE), (WIDE, 4)), "head": weights((4, 3))[0]}

    def apply_fn(params, x):
        trunk = x @ params["trunk"][0] @ params["trunk"][1]
        y = jnp.tanh(trunk) @ params["head"]
        return {"y": y, "trunk": (trunk, jnp.sum(trunk)), "label": jnp.argmax(y, axis=-1)}

    def loss(outputs, target):
        return squared_error(outputs["y"], target) + 0.1 * jnp.mean(outputs["trunk"][0] ** 2)

    return apply_fn, params, rows(4, 3), loss


@network
def relu_mlp():
    """An ordinary classifier: an activation after every layer."""
    batch = rows(12, 4)
    return *linen(
        nn.Sequential([nn.Dense(12), nn.relu, nn.Dense(12), nn.relu, nn.Dense(4)]), batch
    ), batch


@network
def gated_linear_unit():
    """A product of two activations, which no collapse crosses."""
    params = dict(zip("uvw", weights((12, 12), (12, 12), (12, 4)), strict=True))
    return lambda p, x: ((x @ p["u"]) * jax.nn.sigmoid(x @ p["v"])) @ p["w"], params, rows(12, 4)


# --- normalisations --------------------


class NormThenDense(nn.Module):
    """A normalisation, a dense map, gelu, a dense map, around a residual."""

    norm: Callable

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(2 * x.shape[-1])(self.norm()(x))))


@network
def layer_norm_then_dense():
    """Pre-LayerNorm feed-forward block."""
    batch = sequences(8, 8)
    return *linen(NormThenDense(nn.LayerNorm), batch), batch


@network
def rms_norm_then_dense():
    """Pre-RMSNorm feed-forward block."""
    batch = sequences(8, 8)
    return *linen(NormThenDense(nn.RMSNorm), batch), batch


@network
def group_norm_then_dense():
    """GroupNorm over positions and groups of channels, then a feed-forward block."""
    batch = sequences(8, 8)
    return *linen(NormThenDense(functools.partial(nn.GroupNorm, num_groups=2)), batch), batch


@network
def layer_norm_then_chain():
    """LayerNorm before an over-parameterised linear chain, with a constant offset in its input."""
    batch = rows(6, 3)
    module = nn.Sequential([nn.LayerNorm(), nn.Dense(WIDE), nn.Dense(WIDE), nn.Dense(3)])
    apply_fn, params = linen(module, batch)
    return lambda params, x: apply_fn(params, x + 2.0), params, batch


@network
def dense_norm_dense():
    """A linear pair on either side of an RMSNorm."""
    batch = rows(4, 3)
    module = nn.Sequential([nn.Dense(WIDE), nn.Dense(4), nn.RMSNorm(), nn.Dense(WIDE), nn.Dense(3)])
    return *linen(module, batch), batch


@network
def wide_dense_norm_dense():
    """LayerNorm of a product much wider than its input, and RMSNorm of another."""
    batch = rows(4, 3)
    first = nn.Sequential([nn.Dense(2 * WIDE), nn.LayerNorm(), nn.Dense(4), nn.gelu])
    second = nn.Sequential([nn.Dense(WIDE, use_bias=False), nn.RMSNorm(), nn.Dense(3)])
    return *linen(nn.Sequential([first, second]), batch), batch


class PreNormStack(nn.Module):
    """Pre-LayerNorm blocks on one residual stream with a scale each, a final norm, a readout."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            scale = self.param(f"scale_{i}", nn.initializers.ones, x.shape[-1:])
            h = nn.gelu(nn.Dense(WIDE)(nn.LayerNorm()(x)))
            x = x + scale * nn.Dense(x.shape[-1])(h)
        return x, nn.Dense(3)(nn.LayerNorm()(x))


@network
def pre_norm_stack():
    """A residual stream that only LayerNorms read, far from the origin."""
    batch = sequences(8, 3)
    apply_fn, params = linen(PreNormStack(), batch)
    return lambda params, x: apply_fn(params, x + 3.0)[1], params, batch


@network
def pre_norm_stack_with_its_stream():
    """The same, its stream returned: somebody sees the mean."""
    batch = sequences(8, 3)
    apply_fn, params = linen(PreNormStack(), batch)

    def loss(outputs, target):
        return squared_error(outputs[1], target) + 0.1 * jnp.mean(jnp.sin(outputs[0]))

    return apply_fn, params, batch, loss


def batch_norm(module, batch, train):
    """Apply function with the statistics as an argument; in training it returns updated ones."""
    (x,), _ = batch(np.random.default_rng(0))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    stats = jax.tree.map(lambda leaf: leaf + 0.1, cast(variables["batch_stats"], jnp.float64))
    mutable = ["batch_stats"] if train else False

    def apply_fn(params, stats, x):
        return module.apply({"params": params, "batch_stats": stats}, x, mutable=mutable)

    loss = first_squared_error if train else squared_error
    return apply_fn, variables["params"], with_extra(batch, stats), loss


class DenseBatchNorm(nn.Module):
    """A dense map, BatchNorm, an activation, a readout."""

    train: bool
    activation: Callable
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=not self.train)(
            nn.Dense(WIDE, use_bias=self.use_bias)(x)
        )
        return nn.Dense(3)(self.activation(x))


class BatchNormBranches(nn.Module):
    """A sum of over-parameterised branches, each with its own BatchNorm in training mode."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=False)
        wide = norm()(nn.Dense(4, use_bias=False)(nn.Dense(4 * WIDE, use_bias=False)(x)))
        plain = norm()(nn.Dense(4, use_bias=False)(x))
        return nn.Dense(3)(nn.relu(wide + plain + norm()(x)))


@network
def batch_norm_training():
    """Training-mode BatchNorm after an expanding dense map, returning its updated statistics."""
    module = DenseBatchNorm(train=True, activation=nn.relu, use_bias=False)
    return batch_norm(module, rows(4, 3), train=True)


@network
def batch_norm_training_after_bias():
    """A bias before training-mode BatchNorm: its gradient is zero but for rounding."""
    module = DenseBatchNorm(train=True, activation=jnp.tanh)
    apply_fn, *rest, _ = batch_norm(module, rows(4, 3), train=True)
    return lambda params, stats, x: apply_fn(params, stats, x)[0], *rest


@network
def batch_norm_branches():
    """Parallel branches with training-mode BatchNorm."""
    return batch_norm(BatchNormBranches(), rows(4, 3), train=True)


@network
def batch_norm_inference():
    """BatchNorm with running statistics, affine, between two dense maps."""
    return batch_norm(DenseBatchNorm(train=False, activation=lambda x: x), rows(4, 3), train=False)


# --- attention --------------------


@network
def attention():
    """Multi-head self-attention."""
    batch = sequences(8, 8, batch_size=4)
    return *linen(nn.MultiHeadDotProductAttention(num_heads=2), batch), batch


class Transformer(nn.Module):
    """One pre-LayerNorm block with causal attention, and a readout."""

    @nn.compact
    def __call__(self, x):
        width, mask = x.shape[-1], nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dense(width)(nn.gelu(nn.Dense(2 * width)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x))


@network
def transformer_block(width=8):
    """A pre-norm transformer block."""
    batch = sequences(width, 3, batch_size=4)
    return *linen(Transformer(), batch), batch


class Gpt(nn.Module):
    """Token and position embeddings, a causal pre-norm block, a head tied to the embedding."""

    width: int
    vocabulary: int

    @nn.compact
    def __call__(self, ids):
        embed, shape = nn.Embed(self.vocabulary, self.width), (ids.shape[1], self.width)
        x = embed(ids) + self.param("positions", nn.initializers.normal(), shape)
        attend = nn.MultiHeadDotProductAttention(num_heads=2)
        x = x + attend(nn.LayerNorm()(x), mask=nn.make_causal_mask(ids))
        x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


@network
def gpt(width=8, vocabulary=11):
    """A GPT of one block, its head tied to its embedding."""
    batch = tokens_of(vocabulary, vocabulary, batch_size=4)
    return *linen(Gpt(width, vocabulary), batch), batch


# --- program structure --------------------


@network
def nested_jit():
    """A chain whose halves are jitted, one inside the other."""
    params = weights((4, WIDE), (WIDE, WIDE), (WIDE, 3))

    @jax.jit
    def first(params, x):
        return jax.jit(jnp.matmul)(x @ params[0], params[1])

    return lambda params, x: first(params, x) @ params[2], params, rows(4, 3)


@network
def vmap_inside():
    """A chain written for one row, and an ensemble of chains mapped over its parameters."""
    params = {"row": weights((4, WIDE), (WIDE, 4)), "ensemble": weights((3, 4, WIDE), (3, WIDE, 2))}

    def apply_fn(params, x):
        y = jax.vmap(lambda row: jnp.tanh(row @ params["row"][0] @ params["row"][1]))(x)
        members = jax.vmap(lambda up, down: y @ up @ down)(*params["ensemble"])
        return jnp.mean(members, axis=0)

    return apply_fn, params, rows(4, 2)


@network
def checkpoint():
    """Linear pairs inside jax.checkpoint."""
    params = weights((4, WIDE), (WIDE, 4), (4, WIDE), (WIDE, 3))

    @jax.checkpoint
    def block(up, down, x):
        return jnp.tanh(x @ up @ down)

    return lambda p, x: block(p[0], p[1], x) @ p[2] @ p[3], params, rows(4, 3)


class LinearPair(nn.Module):
    """A dense pair before tanh."""

    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(x.shape[-1])(nn.Dense(WIDE)(x)))


class RematBlocks(nn.Module):
    """Two rematerialised dense pairs."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.remat(LinearPair)()(nn.remat(LinearPair)()(x)))


@network
def linen_remat():
    """Dense pairs inside nn.remat."""
    batch = rows(4, 3)
    return *linen(RematBlocks(), batch), batch


@network
def scan_over_layers():
    """Stacked dense pairs with tanh, applied by lax.scan."""
    params = {"up": weights((3, 4, WIDE))[0], "down": weights((3, WIDE, 4))[0]}

    def apply_fn(params, x):
        def layer(h, kernels):
            return jnp.tanh(h @ kernels["up"] @ kernels["down"]), None

        return jax.lax.scan(layer, x, params)[0]

    return apply_fn, params, rows(4, 4)


@network
def recurrent_scan():
    """A recurrence over time with a linear body, its states read out outside."""
    params = {
        "in": weights((4, WIDE))[0],
        "mix": weights((WIDE, 4))[0],
        "state": 0.5 * weights((4, 4))[0],
        "out": weights((4, 3))[0],
    }

    def apply_fn(params, x):
        def step(state, x_t):
            state = state @ params["state"] + x_t @ params["in"] @ params["mix"]
            return state, state

        start = jnp.zeros((x.shape[0], 4), x.dtype)
        states = jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1))[1]
        return jnp.swapaxes(states, 0, 1) @ params["out"]

    return apply_fn, params, sequences(4, 3)


class PairStep(nn.Module):
    """`LinearPair` as the body of nn.scan."""

    @nn.compact
    def __call__(self, x, _):
        return LinearPair()(x), None


class LinenScan(nn.Module):
    """Three dense pairs under nn.scan, then a readout."""

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            PairStep, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return nn.Dense(3)(scanned()(x, None)[0])


@network
def linen_scan():
    """nn.scan over layers."""
    batch = rows(4, 3)
    return *linen(LinenScan(), batch), batch


@network
def cond():
    """A branch chosen by the data, between linear pairs."""
    params = dict(
        zip("abcde", weights((4, WIDE), (WIDE, 4), (4, 4), (4, WIDE), (WIDE, 3)), strict=True)
    )

    def apply_fn(params, x):
        h = x @ params["a"] @ params["b"]
        h = jax.lax.cond(x[0, 0] > 0, lambda h: h @ params["c"], jnp.tanh, h)
        return h @ params["d"] @ params["e"]

    return apply_fn, params, rows(4, 3)


@jax.custom_jvp
def straight_through(x):
    """Rounds to quarters; its derivative is taken to be one."""
    return jnp.round(4 * x) / 4


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return straight_through(*primals), tangents[0]


@jax.custom_vjp
def halved_gradient(x):
    """tanh whose backward pass returns half the cotangent."""
    return jnp.tanh(x)


halved_gradient.defvjp(lambda x: (jnp.tanh(x), None), lambda _, cotangent: (0.5 * cotangent,))


@jax.custom_vjp
def doubled_gradient(x):
    """The identity, linear as a value, whose backward pass doubles the cotangent."""
    return x * 1.0


doubled_gradient.defvjp(lambda x: (x * 1.0, None), lambda _, cotangent: (2.0 * cotangent,))


def _pairs_around(activation):
    params = weights((4, WIDE), (WIDE, 4), (4, WIDE), (WIDE, 3))
    return lambda p, x: activation(x @ p[0] @ p[1]) @ p[2] @ p[3], params, rows(4, 3)


@network
def custom_jvp_activation():
    """A straight-through estimator between linear pairs."""
    return _pairs_around(straight_through)


@network
def custom_vjp_activation():
    """A custom backward pass between linear pairs."""
    return _pairs_around(halved_gradient)


@network
def custom_vjp_identity():
    """A linear function with a backward pass that is not its transpose."""
    return _pairs_around(doubled_gradient)


# --- frameworks --------------------


def from_nnx(model, batch):
    """Apply function that closes over the graph and fixed state, and an nnx.State of parameters."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, x: nnx.merge(graphdef, params, rest)(x), params, batch


class NnxChain(nnx.Module):
    """Dense pairs around relu."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(4, WIDE, rngs=rngs), nnx.Linear(WIDE, 4, rngs=rngs)
        self.out = nnx.Sequential(nnx.Linear(4, WIDE, rngs=rngs), nnx.Linear(WIDE, 3, rngs=rngs))

    def __call__(self, x):
        return self.out(nnx.relu(self.down(self.up(x))))


class NnxNormBlock(nnx.Module):
    """A pre-LayerNorm residual block."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


@network
def nnx_chain():
    """Flax NNX dense pairs."""
    return from_nnx(NnxChain(nnx.Rngs(0)), rows(4, 3))


@network
def nnx_norm_block():
    """Flax NNX pre-norm block."""
    return from_nnx(NnxNormBlock(nnx.Rngs(0)), sequences(8, 8))


@network
def equinox_chain():
    """Equinox layers mapped over rows, parameters from eqx.partition."""
    keys = jax.random.split(jax.random.key(0), 4)
    layers = [
        eqx.nn.Linear(4, WIDE, key=keys[0]),
        eqx.nn.Linear(WIDE, 4, key=keys[1]),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Linear(4, WIDE, key=keys[2]),
        eqx.nn.Linear(WIDE, 3, key=keys[3]),
    ]
    params, static = eqx.partition(eqx.nn.Sequential(layers), eqx.is_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, rows(4, 3)


@network
def equinox_mlp():
    """An Equinox multilayer perceptron."""
    params, static = eqx.partition(eqx.nn.MLP(12, 4, 12, 1, key=jax.random.key(0)), eqx.is_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, rows(12, 4)
