"""Circular padding, rolls and circular convolutions: views that go round an axis."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import pytest
from test_convolutions import (
    assert_follows_backprop,
    conv,
    convolved,
    left,
    priced,
    smoothed,
    times_gain,
    unknown,
)
from test_primitives import arrays, assert_recipes_agree

from fcjax.expressions.terms import Unrepresentable
from fcjax.expressions.windowed import slice_axis

X = (2, 8, 8, 3)


def wrapped(x, low=1, high=1):
    """Circular padding of every axis of space."""
    pads = [(0, 0), *[(low, high)] * (x.ndim - 2), (0, 0)]
    return jnp.pad(x, pads, mode="wrap")


def circular(x, kernel, **options):
    """A convolution with circular padding."""
    taps = kernel.shape[0]
    around = options.get("dilation", 1) * (taps - 1)
    return conv(wrapped(x, around // 2, around - around // 2), kernel, padding="VALID", **options)


def linen(x, kernel):
    module = nn.Conv(kernel.shape[-1], kernel.shape[:2], padding="CIRCULAR", use_bias=False)
    return module.apply({"params": {"kernel": kernel}}, x)


ONE_KERNEL = {
    "pointwise, then circular": (lambda p, x: linen(x @ p[1], p[0]), [(3, 3, 4, 5), (3, 4)], 1),
    "circular, then pointwise": (lambda p, x: linen(x, p[0]) @ p[1], [(3, 3, 3, 4), (4, 5)], 1),
    "gain and bias": (lambda p, x: circular(x * p[1] + p[2], p[0]), [(3, 3, 3, 4), (3,), (3,)], 1),
    "branches": (lambda p, x: linen(x, p[0]) + circular(x, p[1]) + x @ p[2] + x,
                 [(3, 3, 3, 3), (5, 5, 3, 3), (3, 3)], 4),
    "branches of even sizes": (lambda p, x: circular(x, p[0]) + circular(x, p[1]),
                               [(2, 2, 3, 3), (4, 4, 3, 3)], 2),
    "twice": (lambda p, x: circular(circular(x, p[0]), p[1]), [(3, 3, 3, 4), (5, 5, 4, 5)], 1),
    "first with a stride that closes": (lambda p, x: circular(circular(x, p[0], stride=2), p[1]),
                                        [(3, 3, 3, 4), (3, 3, 4, 5)], 1),
    "second with any stride": (lambda p, x: circular(circular(x, p[0]), p[1], stride=3),
                               [(3, 3, 3, 4), (3, 3, 4, 5)], 1),
    "dilated": (lambda p, x: circular(circular(x, p[0]), p[1], dilation=2),
                [(3, 3, 3, 4), (3, 3, 4, 5)], 1),
    "branches, then circular": (lambda p, x: circular(circular(x, p[0]) + x, p[1]),
                                [(3, 3, 3, 3), (3, 3, 3, 4)], 2),
    "depthwise, then pointwise": (lambda p, x: circular(x, p[0], groups=3) @ p[1],
                                  [(3, 3, 1, 3), (3, 4)], 1),
    "farther than the axis is long": (lambda p, x: circular(x[:, 0] @ p[1], p[0]),
                                      [(21, 4, 2), (3, 4)], 1),
    "rolled": (lambda p, x: conv(jnp.roll(x @ p[1], (2, -1), (1, 2)), p[0]),
               [(3, 3, 4, 5), (3, 4)], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_KERNEL)
def test_what_composes_is_one_kernel(name):
    fn, shapes, count = ONE_KERNEL[name]
    planned = assert_recipes_agree(lambda p, d: fn(p, d[0]), arrays(*shapes), arrays(X))
    assert convolved(planned) == [count]


@pytest.mark.parametrize("name", ["branches", "first with a stride that closes", "rolled"])
def test_values_and_gradients_are_those_of_backprop(name):
    fn, shapes, _ = ONE_KERNEL[name]
    fc = assert_follows_backprop(fn, arrays(*shapes), *arrays(X))
    assert {row.rule for row in fc.report} == {"collapse"}


APART = {
    "first with a stride that does not close": (
        lambda p, x: circular(circular(x, p[0], stride=3), p[1]), [(3, 3, 3, 4), (3, 3, 4, 5)]),
    "zeros, then circular": (lambda p, x: circular(conv(x, p[0]), p[1]),
                             [(3, 3, 3, 4), (3, 3, 4, 5)]),
    "circular, then zeros": (lambda p, x: conv(circular(x, p[0]), p[1]),
                             [(3, 3, 3, 4), (3, 3, 4, 5)]),
    "a map of positions": (lambda p, x: circular(x * p[1], p[0]), [(3, 3, 3, 4), (8, 8, 1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_what_does_not_compose_stays_as_written(name):
    fn, shapes = APART[name]
    planned = assert_recipes_agree(lambda p, d: fn(p, d[0]), arrays(*shapes), arrays(X))
    assert planned.is_trivial


OTHERS = {
    "other data around": (
        lambda p, x: conv(
            jnp.concatenate([x[:, -1:], x, 2.0 * x[:, :1]], 1) @ p[1], p[0], 1, "VALID"),
        [(3, 3, 4, 5), (3, 4)]),
    "reflected": (
        lambda p, x: conv(
            jnp.pad(x @ p[1], ((0, 0), (1, 1), (0, 0), (0, 0)), mode="reflect"), p[0]),
        [(3, 3, 4, 5), (3, 4)]),
    "out of order": (
        lambda p, x: conv(jnp.concatenate([x[:, 5:], x[:, 1:]], 1) @ p[1], p[0], 1, "VALID"),
        [(3, 3, 4, 5), (3, 4)]),
    "other rows around": (
        lambda p, x: conv(
            jnp.concatenate([x[:, -1:, ::2], x[:, :, 1::2]], 1) @ p[1], p[0], 1, "VALID"),
        [(3, 3, 4, 5), (3, 4)]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_joins_have_the_value_of_the_network_as_written(name):
    fn, shapes = OTHERS[name]
    assert_recipes_agree(lambda p, d: fn(p, d[0]), arrays(*shapes), arrays(X))


def test_branches_are_taken_and_one_kernel_is_left_alone():
    shapes, x = [(3, 3, 32, 32), (1, 1, 32, 32), (32, 32)], (32, 32, 32, 32)
    alone = priced(lambda p, x: jnp.tanh(linen(jnp.tanh(x @ p[2]), p[0])), shapes, x)
    assert alone.is_trivial
    branches = priced(lambda p, x: linen(x, p[0]) + conv(x, p[1]) + x, shapes, x)
    assert left(branches)[0] == []
    assert branches.after.time < branches.before.time


def around(expr):
    """The first axis, begun one place before and ended one behind."""
    return slice_axis(expr, 0, -1, expr.shape[0] + 1)


def part(expr, *view):
    return slice_axis(expr, 0, *view)


REFUSED = {
    "several factors along an axis": lambda x: around(times_gain(x)),
    "something else than data": lambda x: around(unknown(6, kind="param")),
    "a part of an axis that is gone round": lambda x: around(part(x, 0, 4)),
    "a part of an axis": lambda x: around(part(x, 0, 6, 2)),
    "no single axis": lambda x: around(smoothed(unknown(6, kind="param"))),
    "does not close": lambda x: around(smoothed(x)),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_known_to_repeat_is_refused(message):
    with pytest.raises(Unrepresentable, match=message):
        REFUSED[message](unknown(6))


def test_a_slice_of_a_view_that_goes_round_is_the_array_again():
    expr = unknown(6)
    (term,) = part(around(expr), 1, 7).terms
    assert term.factors[0].slices == (None,)
