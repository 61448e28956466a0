"""Python numbers among the arguments of a network: data, unless it needs them as they are."""

import enum
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import relative_deviation

import fcjax

PARAMS = {
    "a": np.random.default_rng(0).standard_normal((4, 16)) / 2,
    "b": np.random.default_rng(1).standard_normal((16, 3)) / 4,
}
X = np.random.default_rng(2).standard_normal((8, 4))
TRANSFORMS = pytest.mark.parametrize("transform", [fcjax.front_contribute, fcjax.merge])


def segment(params, x):
    """Two layers that are worth one."""
    return x @ params["a"] @ params["b"]


def same(found, apply_fn, params, *args, **kwargs):
    """Whether a call returns what the network returns, in its dtype."""
    actual, expected = found.apply(found.params, *args, **kwargs), apply_fn(params, *args, **kwargs)
    tolerance = 50 * jnp.finfo(expected.dtype).eps * jnp.abs(expected).max()
    return actual.dtype == expected.dtype and jnp.abs(actual - expected).max() <= tolerance


def plans(found):
    """How many plans are kept."""
    return len(found._compiled)


# --- data ---------------------------------------------------------------------------------------

PLACES = {
    "before": lambda p, x, t: segment(p, x * t),
    "between": lambda p, x, t: (x @ p["a"] * t) @ p["b"],
    "behind": lambda p, x, t: segment(p, x) * t,
    "added": lambda p, x, t: (x @ p["a"] + t) @ p["b"],
    "to the weights": lambda p, x, t: x @ (p["a"] * t) @ p["b"],
    "a power": lambda p, x, t: segment(p, jnp.abs(x) ** t),
    "in a condition": lambda p, x, t: segment(p, jnp.where(t > 1, x, -x)),
    "an index": lambda p, x, t: segment(p, x) + p["b"][jnp.asarray(t, int)],
}


@TRANSFORMS
@pytest.mark.parametrize("number", [float, int])
@pytest.mark.parametrize("place", PLACES)
def test_another_value_of_a_number_needs_no_other_plan(place, number, transform):
    apply_fn = PLACES[place]
    found = transform(apply_fn, PARAMS, X, number(2))
    before = plans(found)
    for value in range(5):
        assert same(found, apply_fn, PARAMS, X, number(value))
    assert plans(found) == before


@TRANSFORMS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
@pytest.mark.parametrize("number", [3, 0.5])
@pytest.mark.parametrize("place", ["before", "between", "behind"])
def test_numbers_do_not_widen_the_network(place, number, dtype, transform):
    params, x = jax.tree.map(lambda a: jnp.asarray(a, dtype), (PARAMS, X))
    found = transform(PLACES[place], params, x, 1 + number)
    assert same(found, PLACES[place], params, x, number)


@TRANSFORMS
def test_complex_numbers_are_data(transform):
    apply_fn = lambda p, x, t: jnp.abs(segment(p, x) * t)  # noqa: E731
    found = transform(apply_fn, PARAMS, X, 1j)
    before = plans(found)
    for value in (1j, 2.0 + 1j):
        assert same(found, apply_fn, PARAMS, X, value)
    assert plans(found) == before


@TRANSFORMS
def test_numbers_by_name_and_inside_of_trees_are_data(transform):
    apply_fn = lambda p, x, scales=(1.0, {"t": 1}), *, by=1.0: (  # noqa: E731
        jnp.tanh(segment(p, x * scales[0])) * scales[1]["t"] + by
    )
    found = transform(apply_fn, PARAMS, X, (2.0, {"t": 3}))
    before = plans(found)
    for value in (1.5, 2.5):
        assert same(found, apply_fn, PARAMS, X, (value, {"t": 2 * int(value)}))
        assert same(found, apply_fn, PARAMS, X, (value, {"t": 2 * int(value)}), by=-value)
    assert plans(found) == before + 1


@TRANSFORMS
def test_numbers_are_data_under_jit_and_grad_too(transform):
    apply_fn = PLACES["between"]
    found = transform(apply_fn, PARAMS, X, 1.0)
    before = plans(found)
    slope = lambda apply, params, t: jax.grad(lambda x: apply(params, x, t).sum())(X)  # noqa: E731
    for value in (0.5, 2.0):
        actual, expected = slope(found.apply, found.params, value), slope(apply_fn, PARAMS, value)
        assert relative_deviation(actual, expected) <= 1e-12
        assert same(found, jax.jit(apply_fn), PARAMS, X, value)
    assert plans(found) == before


# --- what a network needs as it is --------------------------------------------------------------


def looped(params, x, n):
    """A loop that has a derivative where its length is known."""
    return jax.lax.fori_loop(0, n, lambda i, y: jnp.tanh(y) + i, segment(params, x))


NEEDED = {
    "a branch": lambda p, x, n: segment(p, x) if n > 2 else x @ p["a"],
    "a length": lambda p, x, n: jnp.concatenate([segment(p, x), jnp.ones((n, 3))]),
    "a number of layers": lambda p, x, n: sum(segment(p, x) * i for i in range(1, n)),
    "its type": lambda p, x, n: segment(p, x * n if isinstance(n, int) else x[:1]),
    "its type, for another value": lambda p, x, n: segment(p, x) * (5 if isinstance(n, int) else n),
    "whether it is a scalar": lambda p, x, n: segment(p, x) * (7.5 if np.isscalar(n) else n),
    "a power of two": lambda p, x, n: segment(p, x) * 2**n,
    "a fraction of a power": lambda p, x, n: segment(p, x) * 10**-n,
    "a power that is too large": lambda p, x, n: segment(p, x) * (n**20 / n**19),
    "Python's own arithmetic": lambda p, x, n: segment(p, x * math.sqrt(n)),
    "numpy's": lambda p, x, n: segment(p, x * np.sqrt(n)),
    "a loop": looped,
}


@TRANSFORMS
@pytest.mark.parametrize("use", NEEDED)
def test_what_a_network_needs_as_it_is_stays_a_python_number(use, transform):
    apply_fn = NEEDED[use]
    for first in (2, 3):
        found = transform(apply_fn, PARAMS, X, first)
        assert same(found, apply_fn, PARAMS, X, first)
        if transform is fcjax.front_contribute:  # merged weights may be made of the number
            for other in (first + 1, 10):
                assert same(found, apply_fn, PARAMS, X, other)


@TRANSFORMS
def test_a_number_that_the_example_had_not_as_such(transform):
    """Another type of a number, or a number by its name, in a compiled call."""
    apply_fn = lambda p, x, t=1.0: jnp.tanh(segment(p, x)) * t  # noqa: E731
    found = transform(apply_fn, PARAMS, X, 2)
    for call in (lambda apply, p: apply(p, X, 3.0), lambda apply, p: apply(p, X, t=0.5)):
        actual = jax.jit(lambda p, call=call: call(found.apply, p))(found.params)
        np.testing.assert_allclose(actual, call(apply_fn, PARAMS), rtol=1e-12)


@TRANSFORMS
@pytest.mark.parametrize("use", NEEDED)
def test_a_number_beside_one_that_is_needed_is_data(use, transform):
    apply_fn = lambda p, x, n, t: NEEDED[use](p, x, n) * t  # noqa: E731
    found = transform(apply_fn, PARAMS, X, 3, 0.5)
    before = plans(found)
    for value in (0.25, 0.75):
        assert same(found, apply_fn, PARAMS, X, 3, value)
    assert plans(found) == before


@TRANSFORMS
def test_what_is_needed_may_depend_on_another_number(transform):
    def apply_fn(p, x, n, m):
        return jnp.tanh(segment(p, x)) * (sum(range(m)) if n > 2 else m)

    found = transform(apply_fn, PARAMS, X, 1, 4)
    for n, m in ((1, 4), (1, 5), (3, 4), (3, 5), (1, 6)):
        assert same(found, apply_fn, PARAMS, X, n, m)


def test_a_loop_of_known_length_keeps_its_derivative():
    fc = fcjax.front_contribute(looped, PARAMS, X, 2)
    slope = lambda apply, params: jax.grad(lambda p: apply(p, X, 3).sum())(params)  # noqa: E731
    actual, expected = slope(fc.apply, fc.params), slope(looped, PARAMS)
    assert relative_deviation(actual, expected) <= 1e-12


class Mode(enum.IntEnum):
    """A number that is a name."""

    PLAIN = 1
    NEGATIVE = 2


FLAGS = {
    "a flag": (lambda p, x, f: segment(p, x) if f else segment(p, -x), (True, False)),
    "a flag itself": (lambda p, x, f: segment(p, x) * (2 if f is True else 3), (True, False)),
    "a name": (lambda p, x, f: segment(p, x) * (2 if f == "train" else 3), ("train", "test")),
    "an enumeration": (lambda p, x, f: segment(p, x) * (2 if f is Mode.PLAIN else 3), tuple(Mode)),
    "a large number": (lambda p, x, f: segment(p, x) * (f % 7), (2**70, 2**71)),
}


@TRANSFORMS
@pytest.mark.parametrize("kind", FLAGS)
def test_flags_names_and_what_no_array_holds_stay_as_they_are(kind, transform):
    apply_fn, values = FLAGS[kind]
    for first in values:
        found = transform(apply_fn, PARAMS, X, first)
        assert same(found, apply_fn, PARAMS, X, first)
    if transform is fcjax.front_contribute:
        assert all(same(found, apply_fn, PARAMS, X, value) for value in values)
