"""Symmetries: what is found is one, and what is changed in a network makes it disappear."""

from __future__ import annotations

import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import law_networks
import numpy as np
import pytest
from law_networks import found, normal

from fcjax.laws import scaling
from fcjax.laws.units import quadratic

relu = jax.nn.relu


def described(fn, params, *args):
    """Of each symmetry: whether it mixes, its units, and (leaf, axis, charge) of its places."""
    return [
        (bool(s.mixed), s.units, [(p.leaf, p.axis, float(p.charge)) for p in s.places])
        for s in found(fn, params, *args)
    ]


# --- soundness ----------------------------------------------------------------------------------


def rotated(z):
    return jnp.concatenate([z[..., 1:], z[..., :1]], axis=-1)


OPERATIONS = {
    "relu": relu,
    "abs": jnp.abs,
    "square": jnp.square,
    "cube": lambda z: z**3,
    "root": lambda z: jnp.sqrt(jnp.abs(z) + 1e-9),
    "power": lambda z: jnp.abs(z) ** 1.5,
    "tanh": jnp.tanh,
    "negative": lambda z: -0.5 * z,
    "sign": lambda z: jnp.sign(z) + z,
    "threshold": lambda z: jnp.where(z > 1, z, 0),
    "clip": lambda z: jnp.clip(z, -0.3),
    "relu6": jax.nn.relu6,
    "rotate": rotated,
    "reverse": lambda z: z[..., ::-1],
    "cumulative": lambda z: jnp.cumsum(z, axis=-1),
    "sort": lambda z: jnp.sort(z, axis=-1),
    "softmax": jax.nn.softmax,
    "halves": lambda z: jnp.concatenate(jnp.split(z, 2, axis=-1)[::-1], axis=-1),
    "half": lambda z: jnp.concatenate([relu(z[..., :3]), z[..., 3:]], axis=-1),
    "fold": lambda z: jnp.tile(z.reshape(*z.shape[:-1], 2, 3).sum(-2), 2),
    "swap": lambda z: jnp.swapaxes(z.reshape(*z.shape[:-1], 2, 3), -1, -2).reshape(z.shape),
    "pad": lambda z: jnp.pad(z[..., 1:], [(0, 0)] * (z.ndim - 1) + [(1, 0)]),
    "shift": lambda z: jnp.pad(z[..., 1:], [(0, 0)] * (z.ndim - 1) + [(0, 1)]) + z,
    "norm": lambda z: z / jnp.sqrt(jnp.mean(z**2, -1, keepdims=True) + 0.1),
    "direction": lambda z: z / jnp.sqrt(jnp.sum(z**2, -1, keepdims=True)),
    "centre": lambda z: z - z.mean(-1, keepdims=True),
    "maximum": lambda z: jnp.maximum(z, z.max(-1, keepdims=True) / 2),
    "across": lambda z: z + z.max(0, keepdims=True),
    "stop": lambda z: z * jax.lax.stop_gradient(z),
    "stopped sign": lambda z: z * jax.lax.stop_gradient(jnp.sign(z)),
    "ratio": lambda z: z**2 / (jnp.abs(z) + 1e-9 * jnp.abs(z[..., :1])),
    "mask": lambda z: z * (jnp.arange(6) > 2),
    "gate": lambda z: z * jax.nn.sigmoid(z),
    "outer": lambda z: jnp.einsum("...i,...j->...ij", z, z)[..., 0],
    "dynamic": lambda z: jax.lax.dynamic_slice_in_dim(jnp.tile(z, 2), 2, 6, axis=1),
    "rows": lambda z: z[jnp.array([1, 0, 2, 1])],
    "columns": lambda z: z[:, jnp.array([0, 2, 2, 4, 1, 3])],
    "where": lambda z: jnp.where(z > 0, z, 0.1 * z),
    "self": lambda z: z @ (z.T @ z),
}  # fmt: skip


def random_program(seed):
    """Dense layers and random operations, some weights used twice, with branches that meet."""
    rng = np.random.default_rng(seed)
    params = [normal(rng, 6, 6) for _ in range(4)] + [normal(rng, 6) for _ in range(3)]
    names = rng.choice(list(OPERATIONS), 8)
    moves = rng.integers(0, 7, 12)
    chosen = rng.integers(0, 1000, (12, 2))

    def apply(p, x):
        values, at = [x @ p[0]], iter(names)
        for move, (i, j) in zip(moves, chosen, strict=True):
            z, other = values[-1], values[i % len(values)]
            if move <= 2:
                z = OPERATIONS[next(at, "negative")](z)
            elif move == 3:
                z = z @ p[j % 4] if j % 2 else z @ p[j % 4].T
            elif move == 4:
                z = z + p[4 + j % 3]
            elif move == 5:
                z = z * p[4 + j % 3]
            else:
                z = z + other if j % 2 else z * other
            values.append(z)
        return values[-1] @ p[3]

    return apply, params, normal(rng, 4, 6)


def check_conserved(apply_fn, params, *args):
    """No law changes along the gradient; returns how many symmetries there are."""
    symmetries = found(apply_fn, params, *args)
    leaves, structure = jax.tree.flatten(params)
    loss = law_networks.scalar_loss(apply_fn, args)
    gradient = jax.tree.leaves(jax.grad(loss)(jax.tree.unflatten(structure, leaves)))
    size = float(np.max([jnp.abs(g).max() for g in gradient]))
    if not np.isfinite(size):  # a power of a power, or nothing divided by its norm
        return 0
    for symmetry in symmetries:
        _, flow = jax.jvp(lambda w: quadratic(symmetry, w), (leaves,), (gradient,))  # noqa: B023
        assert float(jnp.abs(flow).max()) <= 1e-9 * size, symmetry
    return len(symmetries)


def test_no_false_law_in_random_programs():
    """Every law of programs of operations that scale, half scale and do not scale holds."""
    counts = [check_conserved(*random_program(seed)) for seed in range(16)]
    assert sum(count > 0 for count in counts) >= 3


@pytest.mark.parametrize(
    "name", ["dense_chain", "relu_stream", "depthwise", "rotary", "gated", "norm_gains",
             "heads_of_units"],
)  # fmt: skip
def test_scaling_the_units_leaves_the_output(name):
    """Every unit of a scaling symmetry takes a factor of its own, and the output stays the same."""
    rng = np.random.default_rng(3)
    apply_fn, params, args, _ = getattr(law_networks, name)(rng)
    apply_fn = jax.jit(apply_fn)
    leaves, structure = jax.tree.flatten(params)
    before = apply_fn(params, *args)
    scalings = [s for s in found(apply_fn, params, *args) if not s.mixed]
    assert scalings
    for symmetry in scalings:
        factors = jnp.asarray(np.exp(0.3 * rng.standard_normal(symmetry.units)))
        scaled = list(leaves)
        for place in symmetry.places:
            power = factors ** float(place.charge)
            scaled[place.leaf] = place.scaled(scaled[place.leaf], power)
        after = apply_fn(jax.tree.unflatten(structure, scaled), *args)
        np.testing.assert_allclose(after, before, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(len(law_networks.BUILDERS)))
def test_calls_and_batching_change_nothing(seed):
    """The same symmetries under jit and remat, and for examples that vmap batches."""
    apply_fn, params, args, count = law_networks.build(seed)
    plain = described(apply_fn, params, *args)
    called = jax.jit(lambda p, *a: jax.checkpoint(jax.jit(apply_fn))(p, *a))
    assert described(called, params, *args) == plain

    def batched(p, *args):
        return jax.vmap(lambda *one: apply_fn(p, *(a[None] for a in one)))(*args)

    assert sum(s.laws for s in found(batched, params, *args)) == count


# --- what is found ------------------------------------------------------------------------------


def two_layers(act):
    return lambda p, x: act(x @ p[0] + p[1]) @ p[2]


def layers(rng, *, a=3, h=4, out=2):
    return [normal(rng, a, h), normal(rng, h), normal(rng, h, out)], normal(rng, 5, a)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("act", "degree"),
    [
        (relu, 1),
        (jax.vmap(relu), 1),
        (jax.jit(relu), 1),
        (lambda z: relu(relu(z) - 0.5 * z), 1),
        (lambda z: relu(z) ** 2, 2),
        (lambda z: z * relu(z), 2),
        (lambda z: relu(z) ** 3, 3),
        (lambda z: jnp.sqrt(relu(z) + 0.0), Fraction(1, 2)),
        (lambda z: jnp.minimum(z, 0.0) * z / 2, 2),
        (lambda z: jnp.where(z >= 0, z, -0.2 * z), 1),
        (lambda z: z * (z > 0), 1),
        (lambda z: jnp.sign(z) * z, 1),
        (lambda z: jnp.maximum(z, 0.1 * z), 1),
    ],
)
def test_degrees_of_activations(rng, act, degree):
    params, x = layers(rng)
    assert described(two_layers(act), params, x) == [
        (False, (4,), [(0, 1, 1), (1, 0, 1), (2, 0, -degree)])
    ]


def test_linear_layers_mix(rng):
    params, x = layers(rng)
    (symmetry,) = found(two_layers(lambda z: -2 * z), params, x)
    assert (symmetry.mixed, symmetry.units, symmetry.is_untied) == (1, (4,), True)
    assert [p.leaf for p in symmetry.incoming] == [0, 1]
    assert [p.leaf for p in symmetry.outgoing] == [2]


def test_adjacent_units_come_in_order(rng):
    """From the input to the output, and each with the layers next to it."""
    apply_fn, params, args, _ = law_networks.gains(rng)
    leaves = [[p.leaf for p in s.places] for s in found(apply_fn, params, *args)]
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert [[names[i] for i in group] for group in leaves] == [
        ["['w']", "['g']"], ["['g']", "['s']"], ["['s']", "['v']"]
    ]  # fmt: skip


def test_a_stream_holds_its_weights_twice(rng):
    """A residual layer both reads and writes the stream."""
    params = [normal(rng, 3, 4), normal(rng, 4, 4), normal(rng, 4, 2)]

    def apply(p, x):
        h = x @ p[0]
        return (h + h @ p[1]) @ p[2]

    (symmetry,) = found(apply, params, normal(rng, 5, 3))
    assert [(p.leaf, p.axis, int(p.charge)) for p in symmetry.places] == [
        (0, 1, 1), (1, 0, -1), (1, 1, 1), (2, 0, -1)
    ]  # fmt: skip
    assert symmetry.mixed
    assert not symmetry.is_untied


def test_a_mixed_pair_of_axes(rng):
    """Linear layers with two hidden axes mix over both at once."""
    params = [normal(rng, 3, 2, 4), normal(rng, 2, 4, 5)]

    def apply(p, x):
        return jnp.einsum("nhk,hko->no", jnp.einsum("ni,ihk->nhk", x, p[0]), p[1])

    (symmetry,) = found(apply, params, normal(rng, 5, 3))
    assert (symmetry.mixed, sorted(symmetry.units), symmetry.laws) == (2, [2, 4], 36)


# --- what is changed, and no longer a symmetry --------------------------------------------------


@jax.custom_jvp
def straight_through(z):
    return relu(z)


straight_through.defjvp(lambda primals, tangents: (straight_through(*primals), *tangents))

CHANGES = {
    "tanh": two_layers(jnp.tanh),
    "gelu": two_layers(jax.nn.gelu),
    "silu": two_layers(jax.nn.silu),
    "relu6": two_layers(lambda z: jax.nn.relu6(20 * z)),
    "softplus": two_layers(jax.nn.softplus),
    "threshold": two_layers(lambda z: jnp.where(z > 1, z, 0)),
    "maximum with a number": two_layers(lambda z: jnp.maximum(z, 0.1)),
    "a number added": two_layers(lambda z: relu(z + 0.1)),
    "bias behind the relu": lambda p, x: (relu(x @ p[0]) ** 2 + p[1]) @ p[2] + p[1].sum(),
    "data added": two_layers(lambda z: relu(z) + jnp.ones(4)),
    "data beside a square": two_layers(lambda z: relu(z) + relu(z) ** 2),
    "tied": lambda p, x: relu(x @ p[0] + p[1]) @ p[0].T,
    "used again": lambda p, x: relu(x @ p[0] + p[1]) @ p[2] + jnp.sin(p[2]).sum(),
    "straight through": two_layers(straight_through),
    "stopped": two_layers(lambda z: jax.lax.stop_gradient(relu(z))),
    "sorted": two_layers(lambda z: jnp.sort(z, axis=-1)),
    "normalised": two_layers(lambda z: z / jnp.sqrt(0.1 + jnp.sum(z**2, -1, keepdims=True))),
    "centred": two_layers(lambda z: relu(z) - relu(z).mean(-1, keepdims=True)),
    "strided": lambda p, x: relu(x @ p[0] + p[1])[:, ::2] @ p[2][::2],
    "returned": lambda p, x: jnp.concatenate([relu(x @ p[0] + p[1]), x @ p[0] @ p[2]], axis=-1),
    "in a loop": two_layers(lambda z: jax.lax.fori_loop(0, 2, lambda _, y: relu(y), z)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_the_law_disappear(change, rng):
    params, x = layers(rng)
    assert len(found(two_layers(relu), params, x)) == 1
    if change == "tied":
        x = normal(rng, 5, 3)
    assert not found(CHANGES[change], params, x)


HARMLESS = {"in a loop", "strided", "threshold"}
"""Changes that keep the law of the gradient, but are not known to, or only between jumps."""


@pytest.mark.parametrize("change", sorted(CHANGES.keys() - HARMLESS))
def test_the_law_that_disappeared_does_not_hold(change, rng):
    """The law of relu would change along the gradient: not to find it is right."""
    params, x = layers(rng)
    params, x = [3 * w for w in params], 6 * x
    (symmetry,) = found(two_layers(relu), params, x)
    gradient = jax.grad(law_networks.scalar_loss(CHANGES[change], (x,)))(params)
    _, flow = jax.jvp(lambda w: quadratic(symmetry, w), (params,), (gradient,))
    assert float(jnp.abs(flow).max()) > 1e-3


def test_units_that_are_added_to_each_other_scale_together(rng):
    """Of a sum of shifted units only the sum of all laws is left."""
    params, x = layers(rng)
    fn = two_layers(lambda z: relu(z) + jnp.roll(relu(z), 1, axis=-1))
    (symmetry,) = found(fn, params, x)
    assert symmetry.units == (1,)
    total = jnp.sum(params[0] ** 2) + jnp.sum(params[1] ** 2) - jnp.sum(params[2] ** 2)
    assert float(quadratic(symmetry, params)[0]) == pytest.approx(float(total), rel=1e-14)
    assert check_conserved(fn, params, x) == 1


def test_jax_attention_with_grouped_queries(rng):
    """One matrix for each head of keys, and of values, summed over the queries that share it."""
    params = [normal(rng, 3, h, 5) for h in (6, 2, 2)]

    def apply(p, x):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, w) for w in p)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    (symmetry,) = found(apply, params, normal(rng, 2, 4, 3))
    assert (symmetry.mixed, symmetry.units) == (1, (2, 5))
    assert [place.leaf for place in symmetry.places] == [0, 1]


def test_rows_that_are_never_read_have_no_law(rng):
    params = [normal(rng, 5, 4), normal(rng, 4, 2)]
    assert described(lambda p, x: relu(x @ p[0][:3]) @ p[1], params, normal(rng, 5, 3)) == [
        (False, (4,), [(0, 1, 1), (1, 0, -1)])
    ]


def test_constants_of_any_kind(rng):
    """A closed-over key, and zeros, which scale with anything."""
    params, x = layers(rng)
    key, zero = jax.random.key(0), np.zeros(4)

    def apply(p, x):
        keep = jax.random.bernoulli(key, 0.5, (5, 4))
        hidden = jnp.maximum(x @ p[0] + p[1] + zero, zero)
        return jnp.where(keep, hidden / 0.5, 0.0) @ p[2]

    assert described(apply, params, x) == [(False, (4,), [(0, 1, 1), (1, 0, 1), (2, 0, -1)])]


@pytest.mark.parametrize(
    ("mask", "mixes"), [((5, 1), True), ((1, 4), False), ((5, 4), False), ((), True)]
)
def test_mixing_ends_at_a_product_entry_by_entry(rng, mask, mixes):
    """A mask that is the same for all units lets them mix; one that is not lets them scale."""
    params, x = layers(rng)
    by = jnp.asarray(rng.standard_normal(mask))
    ((mixed, *_),) = described(two_layers(lambda z: z * by), params, x)
    assert mixed == mixes


def test_a_parameter_that_is_not_trained_has_no_law(rng):
    params = [normal(rng, 3, 4), jnp.ones((4, 2), jnp.int32)]
    assert not found(lambda p, x: relu(x @ p[0]) @ p[1].astype(float), params, normal(rng, 5, 3))


def test_a_second_rule_is_refused():
    with pytest.raises(ValueError, match=re.escape("primitive 'mul' has a scaling rule already")):
        scaling.register("mul")(lambda reading, equation: None)
