"""Elementwise chains: which are found, which are not, and that the difference shows in training."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import relative_deviation

from fcjax.expressions.written import written
from fcjax.rules import fold
from fcjax.tracing import trace
from fcjax.transform import DATA, PARAM

WIDTH = 6
STEPS = 300
OPTIMIZERS = {
    "sgd": optax.sgd(5e-2),
    "momentum": optax.sgd(1e-2, momentum=0.9),
    "adam": optax.adam(1e-2),
    "lion": optax.lion(2e-3),
}
relu, leaky_relu = jax.nn.relu, jax.nn.leaky_relu


def shape(*sizes, dtype=jnp.float64):
    return jax.ShapeDtypeStruct(sizes, dtype)


VECTOR, SQUARE, SCALAR = shape(WIDTH), shape(WIDTH, WIDTH), shape()
X = shape(16, WIDTH)


def chains(fn, params, *data):
    """The chains of ``fn(*params, *data)`` as lists that end with the survivor, and the reasons."""
    flat = trace.flatten(jax.make_jaxpr(fn)(*params, *(data or [X])))
    network = written(flat, [PARAM] * len(params) + [DATA] * len(data or [X]))
    found, reasons = fold.chains(network, len(params))
    return [[*chain.followers, chain.survivor] for chain in found], reasons


def flat_relu(z):
    return relu(z.reshape(-1)).reshape(z.shape)


def masked(z):
    return jnp.where(jnp.arange(WIDTH) % 2 == 0, z / 0.5, 0)


HOMOGENEOUS = {
    "identity": lambda z: z,
    "relu": relu,
    "relu under jit": jax.jit(relu),
    "relu under vmap": jax.vmap(relu),
    "relu of each entry": jnp.vectorize(relu),
    "relu of the negative": lambda z: relu(-2 * z),
    "relu of a reshape": flat_relu,
    "leaky_relu": leaky_relu,
    "leaky_relu with a slope": lambda z: leaky_relu(z, 0.3),
    "leaky_relu under vmap": jax.vmap(leaky_relu),
    "maximum": lambda z: jnp.maximum(z, 0),
    "zero first": lambda z: jnp.maximum(0.0, z),
    "maximum of two slopes": lambda z: jnp.maximum(z, 0.1 * z),
    "minimum": lambda z: jnp.minimum(z, 0.0),
    "clip": lambda z: jnp.clip(z, 0),
    "where": lambda z: jnp.where(z > 0, z, 0),
    "where with a float": lambda z: jnp.where(z > 0, z, 0.0),
    "where with a slope": lambda z: jnp.where(z >= 0, z, -0.2 * z),
    "abs": jnp.abs,
    "sign times itself": lambda z: jnp.sign(z) * z,
    "mask": lambda z: z * (z > 0),
    "difference": lambda z: relu(z) - 0.5 * relu(-z) - z,
    "relu twice": lambda z: relu(relu(z) - 0.5 * z),
}


def straight_through(z):
    """Computes relu but has the derivative of something else."""
    act = jax.custom_jvp(lambda z: jnp.maximum(z, 0.0))
    act.defjvps(lambda tangent, ans, z: jnp.where(z > -1, tangent, 0.0))
    return act(z)


OTHERS = {
    "relu6": lambda z: jax.nn.relu6(4 * z),
    "maximum with one": lambda z: jnp.maximum(z, 1),
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "tanh": jnp.tanh,
    "relu after a constant": lambda z: relu(z + 0.5),
    "squared relu": lambda z: z * relu(z),
    "comparison with one": lambda z: jnp.where(z > 0.5, z, 0.0),
    "straight through": straight_through,
    "stop_gradient": lambda z: relu(jax.lax.stop_gradient(z)),
}


# --- what is found ---

FOUND = {
    "product": (lambda u, v, x: x * u * v, [VECTOR] * 2, [[0, 1]]),
    "three": (lambda u, v, w, x: u * x * v * w, [VECTOR] * 3, [[0, 1, 2]]),
    "difference": (lambda u, v, s, t, x: x @ (u * v - s * t), [VECTOR] * 4, [[0, 1], [2, 3]]),
    "matrices": (lambda u, v, x: x @ (u * v), [SQUARE] * 2, [[0, 1]]),
    "scalars": (lambda u, v, x: relu(x * u) * v, [SCALAR] * 2, [[0, 1]]),
    "scalars around a matrix": (
        lambda u, w, v, x: (relu((x @ w) * u) @ w) * v, [SCALAR, SQUARE, SCALAR], [[0, 2]],
    ),
    "inside a net": (
        lambda a, u, v, b, x: jnp.tanh(relu(x @ a * u) * v) @ b,
        [SQUARE, VECTOR, VECTOR, SQUARE], [[1, 2]],
    ),
    "three with activations": (
        lambda u, v, w, x: leaky_relu(leaky_relu(x * u) * v) * w, [VECTOR] * 3, [[0, 1, 2]],
    ),
    "residual": (lambda u, v, x: x + relu(x * u) * v, [VECTOR] * 2, [[0, 1]]),
    "PReLU": (
        lambda a, u, v, x: (lambda z: jnp.where(z > 0, z, a * z))(x * u) * v,
        [SCALAR, VECTOR, VECTOR], [[1, 2]],
    ),
    "squares": (lambda u, v, x: jnp.mean((x * u * v) ** 2), [VECTOR] * 2, [[0, 1]]),
    "both tied": (lambda u, v, x: x * u * u * v * v, [VECTOR] * 2, [[0, 1]]),
    "slices": (
        lambda u, v, x: x[:, :2] @ (u[:2] * v[:2]) + x[:, 2:] @ (u[2:] * v[2:]),
        [VECTOR] * 2, [[0, 1]],
    ),
    "gate": (lambda u, v, x: (x * u) * jnp.tanh(x) * v, [VECTOR] * 2, [[0, 1]]),
    "mask": (lambda u, v, x: masked(x * u) * v, [VECTOR] * 2, [[0, 1]]),
    "every example": (jax.vmap(lambda u, v, x: relu(x * u) * v, (None, None, 0)),
                      [VECTOR] * 2, [[0, 1]]),
    "all readers": (
        lambda u, v, x: (lambda h: jnp.tanh(h * v) @ (h * v).T)(relu(x * u)),
        [VECTOR] * 2, [[0, 1]],
    ),
    "loop around": (
        lambda u, v, x: jax.lax.scan(lambda c, r: (c + r, c), x[0], relu(x * u) * v)[1],
        [VECTOR] * 2, [[0, 1]],
    ),
    "last read": (lambda alpha, scale, x: x * scale * alpha, [VECTOR] * 2, [[1, 0]]),
    "last read, broadcast early": (
        lambda alpha, scale, x: (lambda a: relu(x * scale) * a)(jnp.broadcast_to(alpha, x.shape)),
        [VECTOR] * 2, [[1, 0]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_chain_is_found(name):
    fn, params, expected = FOUND[name]
    assert chains(fn, params) == (expected, {})


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_chain_is_found_through_a_homogeneous_activation(name):
    found, reasons = chains(lambda u, v, x: HOMOGENEOUS[name](x * u) * v, [VECTOR] * 2)
    assert (found, reasons) == ([[0, 1]], {})


def test_chain_that_outgrows_an_expression_falls_into_several():
    def fn(*arguments):
        *gains, x = arguments
        return functools.reduce(lambda h, gain: relu(h * gain), gains, x)

    found, _ = chains(fn, [VECTOR] * 40)
    assert len(found) == 3
    assert sorted(itertools.chain(*found)) == list(range(40))


def test_relu_of_batches_in_the_middle_is_not_recognised():
    found, _ = chains(
        lambda u, v, x: jax.vmap(relu, 1, 1)(x * u) * v, [VECTOR] * 2, shape(4, 16, WIDTH)
    )
    assert found == []


# --- what is not ---

REFUSED = {
    "bias": (lambda u, v, b, x: relu(x * u + b) * v, [VECTOR] * 3),
    "linear map between": (lambda u, v, w, x: relu(relu(x * u) @ w) * v, [VECTOR] * 2 + [SQUARE]),
    "transposed": (lambda u, v, x: x @ (u * v.T), [SQUARE] * 2),
    "reversed": (lambda u, v, x: x * u * v[::-1], [VECTOR] * 2),
    "other slices": (lambda u, v, x: x[:, :3] @ (u[:3] * v[3:]) + v[:3] @ u[3:], [VECTOR] * 2),
    "outer product": (lambda u, v, x: x @ jnp.outer(u, v), [VECTOR] * 2),
    "centred": (lambda u, v, x: x * (u - u.mean()) * (v - v.mean()), [VECTOR] * 2),
    "max pooling": (
        lambda u, v, x: jnp.repeat((x * u).reshape(-1, 3, 2).max(-1), 2, -1) * v, [VECTOR] * 2,
    ),
    "one reader without": (
        lambda u, v, x: (lambda h: jnp.tanh(h) + h * v)(relu(x * u)), [VECTOR] * 2,
    ),
    "difference that vanishes without activation": (
        lambda u, v, x: (lambda h: relu(h) - h + h * v)(x * u), [VECTOR] * 2,
    ),
    "reshape that is not followed": (
        lambda u, v, x: x * u * v + leaky_relu((x * u).reshape(-1)).reshape(x.shape), [VECTOR] * 2,
    ),
    "checkpoint": (lambda u, v, x: jax.checkpoint(lambda z: z * u * v)(x), [VECTOR] * 2),
    "loop": (
        lambda u, v, x: jax.lax.scan(lambda c, r: (c + r * u * v, c), x[0], x)[1], [VECTOR] * 2,
    ),
    "never read": (lambda u, v, x: x, [VECTOR] * 2),
    "without effect": (lambda u, v, x: jnp.sign(x * u * v) + 0 * u * v, [VECTOR] * 2),
    "other dtypes": (lambda u, v, x: x * u * v, [VECTOR, shape(WIDTH, dtype=jnp.float32)]),
    "other shapes": (lambda u, v, x: x * u * v, [VECTOR, shape(1, WIDTH)]),
    "integers": (lambda u, v, x: x * u * v, [shape(WIDTH, dtype=jnp.int32)] * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_structure_is_refused(name):
    fn, params = REFUSED[name]
    assert chains(fn, params)[0] == []


@pytest.mark.parametrize("name", OTHERS)
def test_other_activation_is_refused(name):
    assert chains(lambda u, v, x: OTHERS[name](x * u) * v, [VECTOR] * 2)[0] == []


def test_relu_that_only_computes_the_same_is_refused_for_its_derivative():
    own = jax.custom_jvp(lambda z: jnp.maximum(z, 0.0))
    own.defjvps(lambda tangent, ans, z: jax.lax.select(z > 0, tangent, jnp.zeros_like(z)))
    assert chains(lambda u, v, x: own(x * u) * v, [VECTOR] * 2)[0] == [[0, 1]]
    assert chains(lambda u, v, x: straight_through(x * u) * v, [VECTOR] * 2)[0] == []


TIED, APART = "multiplied by itself.*a parameter of its own", "read them together everywhere"


@pytest.mark.parametrize(
    ("fn", "count", "expected"),
    [
        (lambda u, v, x: x * (u * u - v * v), 2, {0: TIED, 1: TIED}),
        (lambda u, v, x: x * u * u * v, 2, {0: TIED, 1: APART}),
        (lambda u, v, x: x * (u * v + u), 2, {0: APART, 1: APART}),
        (lambda u, v, t, x: x * (u * v + v * t), 3, {0: APART, 1: APART, 2: APART}),
        (lambda u, v, x: x * u * v + jnp.tanh(u), 2, {0: APART, 1: APART}),
        (lambda u, v, x: (x * u * v, v), 2, {0: APART, 1: APART}),
        (lambda u, v, x: jax.nn.gelu(x * u) * v, 2, {0: APART, 1: APART}),
        (lambda g, b, x: x + (jnp.tanh(x) + b) * g, 2, {}),
    ],
)
def test_reason_names_the_remedy(fn, count, expected):
    found, reasons = chains(fn, [VECTOR] * count)
    assert found == []
    assert reasons.keys() == expected.keys()
    for number, reason in reasons.items():
        assert re.search(expected[number], reason)


def test_frozen_parameter_is_no_factor():
    jaxpr = jax.make_jaxpr(lambda u, v, x: x * u * v)(VECTOR, VECTOR, X)
    frozen = trace.Kind("param", trainable=False)
    network = written(trace.flatten(jaxpr), [PARAM, frozen, DATA])
    assert fold.chains(network, 2) == ((), {})


# --- signs ---


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32, np.float64])
def test_signs_are_those_of_equal_magnitudes(dtype):
    survivor = np.asarray([0.5, -0.25, 0.0, -0.0, 3.0], dtype)
    follower = np.asarray([-0.5, -0.25, 0.0, 0.0, 3.0], dtype)
    follower[-1] += 2 * float(jnp.finfo(dtype).eps)
    by = fold.signs(survivor, follower)
    assert by.dtype == dtype
    np.testing.assert_array_equal(by.astype(float), [-1, 1, 1, 1, 1])
    assert fold.signs(survivor, 1.1 * follower.astype(dtype)) is None


@pytest.mark.parametrize("other", [0.0, np.nan, np.inf, 2e-300])
def test_no_signs_for_other_magnitudes(other):
    survivor, follower = np.array([1.0, 1e-300]), np.array([1.0, other])
    assert fold.signs(survivor, follower) is None
    assert not fold.mismatch(survivor, follower) <= 0.4


def test_signs_of_scalars_and_of_nothing():
    assert fold.signs(np.array(2.0), np.array(-2.0)) == -1
    assert fold.signs(np.zeros((0, 3)), np.zeros((0, 3))).shape == (0, 3)


# --- training ---


def initial(params, seed=0):
    """Balanced parameters of random signs; the sizes of others do not matter here."""
    rng = np.random.default_rng(seed)
    sizes = {p.shape: rng.uniform(0.3, 1.0, p.shape) for p in params}
    return [sizes[p.shape] * rng.choice([-1.0, 1.0], p.shape) for p in params]


def unfolded(followers, params):
    """What expands the parameters that are trained to all of them."""
    by = {k: fold.signs(params[last], params[k]) for k, last in followers.items()}

    def expand(kept):
        return [
            jax.lax.stop_gradient(by[k] * kept[followers[k]]) if k in followers else kept[k]
            for k in range(len(params))
        ]

    return expand


def final_outputs(fn, params, followers, optimizers=tuple(OPTIMIZERS)):
    """The outputs after training with each optimizer, where followers are not trained."""
    rng = np.random.default_rng(1)
    xs = rng.normal(size=(STEPS, *X.shape))
    teacher = initial(params, seed=2)
    targets = jax.vmap(lambda x: fn(*teacher, x))(xs)
    expand = unfolded(followers, params)
    kept = {k: p for k, p in enumerate(params) if k not in followers}

    def loss(kept, x, target):
        return jnp.mean((fn(*expand(kept), x) - target) ** 2)

    def run(optimizer):
        def step(carry, batch):
            kept, state = carry
            updates, state = optimizer.update(jax.grad(loss)(kept, *batch), state, kept)
            return (optax.apply_updates(kept, updates), state), None

        (last, _), _ = jax.lax.scan(step, (kept, optimizer.init(kept)), (xs, targets))
        return fn(*expand(last), xs[0])

    return jax.jit(lambda: {name: run(OPTIMIZERS[name]) for name in optimizers})()


TRAINED = {
    name: FOUND[name]
    for name in (
        "three", "difference", "matrices", "scalars around a matrix", "inside a net",
        "three with activations", "residual", "PReLU", "both tied", "mask", "every example",
    )
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_folded_network_trains_as_backpropagation_does(name):
    fn, params, found = TRAINED[name]
    start = initial(params)
    followers = {k: last for *rest, last in found for k in rest}
    expected = final_outputs(fn, start, {})
    actual = final_outputs(fn, start, followers)
    for optimizer in OPTIMIZERS:
        assert relative_deviation(actual[optimizer], expected[optimizer]) <= 1e-9
        untrained = fn(*start, np.random.default_rng(1).normal(size=(STEPS, *X.shape))[0])
        assert relative_deviation(untrained, expected[optimizer]) > 1e-2


NEEDED = {
    "read elsewhere": lambda u, v, x: x * (u * v + u),
    "only one tied": lambda u, v, x: x * u * u * v,
    "transposed": lambda u, v, x: x * u * v[::-1],
    "relu after a constant": lambda u, v, x: OTHERS["relu after a constant"](x * u) * v,
    "relu6": lambda u, v, x: OTHERS["relu6"](x * u) * v,
    "gelu": lambda u, v, x: jax.nn.gelu(x * u) * v,
    "squared relu": lambda u, v, x: OTHERS["squared relu"](x * u) * v,
    "straight through": lambda u, v, x: straight_through(x * u) * v,
}


@pytest.mark.parametrize("name", NEEDED)
def test_refusal_is_needed(name):
    fn = NEEDED[name]
    assert chains(fn, [VECTOR] * 2)[0] == []
    start = initial([VECTOR] * 2)
    expected = final_outputs(fn, start, {}, ["sgd"])
    actual = final_outputs(fn, start, {0: 1}, ["sgd"])
    assert relative_deviation(actual, expected) > 1e-3


def test_tied_factors_train_differently_from_two_of_equal_magnitude():
    start = initial([VECTOR] * 2)
    two_of_each = [start[0], start[0], start[1], start[1]]
    expected = final_outputs(lambda u, v, x: x @ (u * u - v * v), start, {}, ["sgd"])
    actual = final_outputs(FOUND["difference"][0], two_of_each, {0: 1, 2: 3}, ["sgd"])
    assert relative_deviation(actual, expected) > 1e-3


# --- random networks ---

COUNT = 4
ACTIVATIONS = [*HOMOGENEOUS.values()] * 4 + [*OTHERS.values()]


def random_network(rng):
    """A network of sums, products and activations of a few vectors and data."""
    left = list(rng.permutation(COUNT))

    def leaf():
        again = not left or rng.random() < 0.15
        number = int(rng.integers(COUNT) if again else left.pop())
        return lambda *a: a[number]

    def node(depth):
        kind = rng.choice(["leaf", "data", "times", "plus", "act"], p=[0.1, 0.05, 0.5, 0.1, 0.25])
        if depth == 0 or kind == "leaf":
            return leaf()
        if kind == "data":
            return lambda *a: a[-1]
        one = node(depth - 1)
        if kind == "act":
            act = ACTIVATIONS[rng.integers(len(ACTIVATIONS))]
            return lambda *a: act(one(*a))
        other = node(depth - 1)
        if kind == "plus":
            return lambda *a: one(*a) + other(*a)
        return lambda *a: one(*a) * other(*a)

    body = node(5)
    return lambda *a: jnp.tanh(a[-1] * body(*a))


def scaled_gradients(fn, point, seed):
    """Every parameter times the gradient of some loss by it."""
    rng = np.random.default_rng(seed)
    weights, x = rng.normal(size=X.shape), rng.normal(size=X.shape)
    gradients = jax.grad(lambda p: jnp.sum(weights * fn(*p, x)))(point)
    return [g * p for g, p in zip(gradients, point, strict=True)]


def test_claims_about_random_networks_hold():
    claims = 0
    for seed in range(80):
        rng = np.random.default_rng(seed)
        fn = random_network(rng)
        found, _ = chains(fn, [VECTOR] * COUNT)
        points = [list(rng.normal(size=(COUNT, WIDTH))), initial([VECTOR] * COUNT, seed)]
        for point in points if found else []:
            scaled = scaled_gradients(fn, point, seed)
            for one, other in itertools.chain(*(itertools.pairwise(chain) for chain in found)):
                np.testing.assert_allclose(scaled[one], scaled[other], rtol=1e-9, atol=1e-12)
                claims += 1
    assert claims > 40
