"""Convolutions as linear operators: what composes, and that it equals the network as written."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax
from test_primitives import QUICK, arrays, assert_recipes_agree
from training import relative_deviation

import fcjax
from fcjax.expressions import algebra, layout, terms, windowed
from fcjax.expressions.primitives import RULES
from fcjax.expressions.terms import Unrepresentable
from fcjax.expressions.written import written
from fcjax.planning.parts import Convolution
from fcjax.planning.plan import always_fold, plan
from fcjax.planning.recipes import recipe
from fcjax.tracing import trace
from fcjax.transform import DATA, PARAM


def conv(x, kernel, stride=1, padding="SAME", spread=1, dilation=1, groups=1):
    """A convolution of channels-last rows of any rank."""
    n = x.ndim - 2
    space = "HWD"[:n]
    return lax.conv_general_dilated(
        x, kernel, (stride,) * n, padding if isinstance(padding, str) else [padding] * n,
        (spread,) * n, (dilation,) * n, (f"N{space}C", f"{space}IO", f"N{space}C"), groups,
    )  # fmt: skip


def left(planned):
    """The primitives that still meet data as written, and the parts of roots that do not."""
    gone = {v for c in planned.changes if c.taken for v in c.gone}
    made = {*planned.recipes, *gone}
    kept = [
        e.name for e in planned.body.equations
        if e.name in ("conv_general_dilated", "reduce_window_sum", "dot_general", "pad")
        and not made.issuperset(e.outputs) and e.outputs[0] in planned.bases
    ]  # fmt: skip
    parts = [p for how in planned.recipes.values() for p in how.parts]
    return kept, parts


def convolved(planned):
    """The kernels that convolve data in a plan, by how many products they are the sum of."""
    kept, parts = left(planned)
    assert kept == []
    return [
        len(p.weights) for p in parts if isinstance(p, Convolution) and p.rows and p.rows.is_data
    ]


X = (2, 8, 8, 3)

ONE_KERNEL = {
    "expanded": (lambda p, x: conv(conv(conv(x, p[0]), p[1]), p[2]),
                 [(1, 1, 3, 5), (3, 3, 5, 5), (1, 1, 5, 4)]),
    "valid twice": (lambda p, x: conv(conv(x, p[0], padding="VALID"), p[1], padding="VALID"),
                    [(3, 3, 3, 5), (2, 3, 5, 4)]),
    "full then same": (lambda p, x: conv(conv(x, p[0], padding=(2, 2)), p[1]),
                       [(3, 3, 3, 5), (3, 3, 5, 4)]),
    "depthwise then pointwise": (lambda p, x: conv(conv(x, p[0], groups=3), p[1]),
                                 [(3, 3, 1, 6), (1, 1, 6, 4)]),
    "pointwise then depthwise": (lambda p, x: conv(conv(x, p[0]), p[1], groups=6),
                                 [(1, 1, 3, 6), (3, 3, 1, 6)]),
    "depthwise twice": (lambda p, x: conv(conv(x, p[0], padding="VALID", groups=3), p[1],
                                          padding="VALID", groups=3),
                        [(3, 3, 1, 3), (2, 2, 1, 3)]),
    "groups": (lambda p, x: conv(conv(x, p[0]), p[1], groups=2), [(1, 1, 3, 6), (3, 3, 3, 4)]),
    "pointwise then transposed": (lambda p, x: conv(conv(x, p[0]), p[1], 1, (2, 1), 2),
                                  [(1, 1, 3, 6), (3, 3, 6, 4)]),
    "transposed then pointwise": (lambda p, x: conv(conv(x, p[0], 1, (2, 1), 2), p[1]),
                                  [(3, 3, 3, 6), (1, 1, 6, 4)]),
    "transposed then valid": (lambda p, x: conv(conv(x, p[0], 1, (2, 1), 2), p[1], 1, "VALID"),
                              [(3, 3, 3, 6), (3, 3, 6, 4)]),
    "strides": (lambda p, x: conv(conv(x, p[0], 2, (1, 1)), p[1], 2, (0, 0)),
                [(3, 3, 3, 5), (2, 2, 5, 4)]),
    "dilations": (lambda p, x: conv(conv(x, p[0], 1, "VALID", 1, 2), p[1], 1, "VALID", 1, 3),
                  [(2, 2, 3, 5), (2, 2, 5, 4)]),
    "average pooling": (lambda p, x: nn.avg_pool(conv(x, p[0]), (2, 2), (2, 2)), [(3, 3, 3, 6)]),
    "after average pooling": (lambda p, x: conv(nn.avg_pool(x, (2, 2), (2, 2)), p[0]),
                              [(1, 1, 3, 6)]),
    "sliced": (lambda p, x: conv(conv(x, p[0])[:, 1:-1, ::2], p[1], 1, "VALID"),
               [(3, 3, 3, 5), (2, 2, 5, 4)]),
    "padded between": (
        lambda p, x: conv(
            jnp.pad(conv(x, p[0]), ((0, 0), (1, 1), (0, 2), (0, 0))), p[1], padding="VALID"),
        [(1, 1, 3, 5), (2, 2, 5, 4)],
    ),
    "gain between": (lambda p, x: conv(conv(x, p[0]) * p[2] * 0.5, p[1]),
                     [(3, 3, 3, 5), (1, 1, 5, 4), (5,)]),
    "in another layout": (
        lambda p, x: lax.conv_general_dilated(
            conv(x, p[0]), p[1], (1, 1), "VALID", dimension_numbers=("NHWC", "OIHW", "NCHW")),
        [(3, 3, 3, 5), (4, 5, 2, 2)],
    ),
    "before global pooling": (lambda p, x: jnp.mean(conv(conv(x, p[0]), p[1]), (1, 2)),
                              [(3, 3, 3, 6), (1, 1, 6, 4)]),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_KERNEL)
def test_chain_is_one_kernel(name):
    fn, shapes = ONE_KERNEL[name]
    planned = assert_recipes_agree(lambda p, d: fn(p, d[0]), arrays(*shapes), arrays(X))
    assert convolved(planned) == [1]
    assert len(planned.recipes) == 1 or name == "before global pooling"


BRANCHES = {
    "3x3, 1x1 and identity": (lambda p, x: conv(x, p[0]) + conv(x, p[1]) + x,
                              [(3, 3, 3, 3), (1, 1, 3, 3)], 3),
    "with stride": (lambda p, x: conv(x, p[0], 2, (1, 1)) + conv(x, p[1], 2, "VALID"),
                    [(3, 3, 3, 4), (1, 1, 3, 4)], 2),
    "asymmetric": (lambda p, x: conv(x, p[0]) + conv(x, p[1]) - conv(x, p[2]),
                   [(3, 3, 3, 4), (1, 3, 3, 4), (3, 1, 3, 4)], 3),
    "dilated": (lambda p, x: conv(x, p[0], dilation=2) + conv(x, p[1]),
                [(3, 3, 3, 4), (5, 5, 3, 4)], 2),
    "average pooling": (
        lambda p, x: (conv(x, p[0]) + x
                      + nn.avg_pool(conv(x, p[1]), (3, 3), padding=((1, 1), (1, 1)))),
        [(3, 3, 3, 3), (1, 1, 3, 3)], 3,
    ),
    "deep": (lambda p, x: conv(x, p[0]) + conv(conv(x, p[1]), p[2]) + 0.5 * x,
             [(3, 3, 3, 3), (1, 1, 3, 7), (3, 3, 7, 3)], 3),
    "scaled": (lambda p, x: conv(x, p[0]) * p[1] + x * p[2] + conv(x, p[3], groups=3),
               [(3, 3, 3, 3), (3,), (3,), (3, 3, 1, 3)], 3),
    "depthwise": (lambda p, x: conv(x, p[0], groups=3) + conv(x, p[1], groups=3) + x,
                  [(3, 3, 1, 3), (1, 1, 1, 3)], 3),
    "before a pointwise": (lambda p, x: conv(conv(x, p[0]) + x, p[1]),
                           [(3, 3, 3, 3), (1, 1, 3, 4)], 2),
}  # fmt: skip


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_are_one_kernel(name):
    fn, shapes, count = BRANCHES[name]
    planned = assert_recipes_agree(lambda p, d: fn(p, d[0]), arrays(*shapes), arrays(X))
    assert convolved(planned) == [count]


APART = {
    "same twice": (lambda p, x: conv(conv(x, p[0]), p[1]), [(3, 3, 3, 5), (3, 3, 5, 4)]),
    "valid then same": (lambda p, x: conv(conv(x, p[0], padding="VALID"), p[1]),
                        [(3, 3, 3, 5), (3, 3, 5, 4)]),
    "same then transposed": (lambda p, x: conv(conv(x, p[0]), p[1], 1, (2, 1), 2),
                             [(3, 3, 3, 5), (3, 3, 5, 4)]),
    "gain that differs from place to place": (
        lambda p, x: conv(conv(x, p[0]) * p[2], p[1], padding="VALID"),
        [(3, 3, 3, 5), (2, 2, 5, 4), (8, 8, 1)],
    ),
    "kernel that is made of data": (lambda p, x: conv(conv(x, p[0]), x[0, :2, :2, :, None] * p[1]),
                                    [(1, 1, 3, 3), (4,)]),
    "dense behind space": (lambda p, x: conv(x, p[0]).reshape(2, -1) @ p[1],
                           [(3, 3, 3, 4), (256, 3)]),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_what_does_not_compose_stays_as_written(name):
    fn, shapes = APART[name]
    planned = assert_recipes_agree(lambda p, d: fn(p, d[0]), arrays(*shapes), arrays(X))
    assert planned.is_trivial


OTHERS = {
    "joined, and one beside": (
        lambda p, x: jnp.concatenate([conv(x, p[0]), conv(x, p[1])], -1) + conv(x, p[2]) + x @ p[3],
        [(3, 3, 3, 2), (1, 3, 3, 3), (3, 3, 3, 5), (3, 5)],
    ),
    "joined along an axis of space": (
        lambda p, x: conv(jnp.concatenate([conv(x, p[0]), x @ p[2]], 1), p[1]),
        [(3, 3, 3, 5), (1, 1, 5, 4), (3, 5)],
    ),
    "of rows that are the same along an axis": (
        lambda p, x: conv(jnp.broadcast_to((x[:, :1] @ p[0]), (2, 8, 8, 4)), p[1]),
        [(3, 4), (3, 3, 4, 2)],
    ),
    "of means over space": (
        lambda p, x: conv(
            jnp.broadcast_to(jnp.mean(x, (1, 2), keepdims=True), X) @ p[1], p[0]),
        [(3, 3, 3, 2), (3, 3)],
    ),
    "bias before a kernel that is larger than the image": (
        lambda p, x: conv(x[:, :4, :3] @ p[1] + p[2], p[0]), [(5, 5, 3, 2), (3, 3), (3,)],
    ),
    "nearest upsampling before": (
        lambda p, x: conv(
            jnp.broadcast_to(x[:, :, None], (2, 8, 2, 8, 3)).reshape(2, 16, 8, 3), p[0]),
        [(3, 3, 3, 2)],
    ),
    "circular": (
        lambda p, x: conv(jnp.concatenate([x[:, -1:], x, x[:, :1]], 1) @ p[0], p[1],
                          padding="VALID"),
        [(3, 4), (3, 3, 4, 2)],
    ),
    "a scale for each image": (
        lambda p, x: conv(conv(x, p[0]) * jnp.mean(x, (1, 2, 3), keepdims=True), p[1]),
        [(3, 3, 3, 4), (1, 1, 4, 2)],
    ),
    "less its mean": (
        lambda p, x: conv((h := conv(x, p[0])) - jnp.mean(h, (0, 1, 2)), p[1]),
        [(1, 1, 3, 4), (3, 3, 4, 2)],
    ),
    "another way over the same axis": (
        lambda p, x: jnp.swapaxes(conv(jnp.swapaxes(conv(x, p[0]), 1, 2), p[1]), 1, 2),
        [(3, 1, 3, 4), (3, 1, 4, 2)],
    ),
    "mapped over kernels": (
        lambda p, x: jax.vmap(lambda k: conv(conv(x, k), p[1]))(p[0]),
        [(3, 3, 3, 3, 4), (1, 1, 4, 2)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_combinations_have_the_value_of_the_network_as_written(name):
    fn, shapes = OTHERS[name]
    assert_recipes_agree(lambda p, d: fn(p, d[0]), arrays(*shapes), arrays(X))


def by_examples(x, kernel, groups=2, padding="VALID"):
    """A convolution whose examples stand in groups, with an own part of the kernel for each."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        batch_group_count=groups,
    )  # fmt: skip


GROUPED_EXAMPLES = {
    "behind a kernel": (lambda p, x: by_examples(conv(x, p[0]), p[1]),
                        [(3, 3, 3, 4), (2, 2, 4, 6)]),
    "before a pointwise map": (lambda p, x: by_examples(x, p[0], 3, "SAME") @ p[1],
                               [(3, 2, 3, 9), (9, 2)]),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPED_EXAMPLES)
def test_groups_of_examples_compose(name):
    fn, shapes = GROUPED_EXAMPLES[name]
    planned = assert_recipes_agree(lambda p, d: fn(p, d[0]), arrays(*shapes), arrays((6, 5, 5, 3)))
    assert len(planned.recipes) == 1


def test_response_to_a_bias_is_kept_as_a_map():
    """A bias before a padded convolution does not reach over the border."""

    def fn(params, data):
        return conv(conv(data[0], params[0]) + params[1], params[2])

    planned = assert_recipes_agree(fn, arrays((1, 1, 3, 5), (5,), (3, 3, 5, 4)), arrays(X))
    (how,) = planned.recipes.values()
    of_data, of_ones = how.parts
    assert (of_data.rows.is_data, of_ones.rows) == (True, None)
    assert [grid.out.size for grid in of_ones.grids] == [8, 8]


def test_bias_before_a_valid_convolution_is_a_constant():
    def fn(params, data):
        return conv(conv(data[0], params[0]) + params[1], params[2], padding="VALID")

    planned = assert_recipes_agree(fn, arrays((1, 1, 3, 5), (5,), (3, 3, 5, 4)), arrays(X))
    (how,) = planned.recipes.values()
    assert [isinstance(part, Convolution) for part in how.parts] == [True, False]


def test_position_embedding_before_a_convolution_is_convolved_by_itself():
    def fn(params, data):
        return conv(conv(data[0], params[0]) + params[1], params[2])

    planned = assert_recipes_agree(fn, arrays((1, 1, 3, 5), (8, 8, 5), (3, 3, 5, 4)), arrays(X))
    (how,) = planned.recipes.values()
    assert [part.rows.is_data for part in how.parts] == [True, False]


# --- random chains ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layer:
    """One operation: its name, the shape of its parameter, and the rest of its arguments."""

    name: str
    shape: tuple[int, ...]
    options: tuple


APPLY = {
    "conv": lambda x, p, *options: conv(x, p, *options),
    "bias": lambda x, p: x + p,
    "gain": lambda x, p: x * p,
    "pool": lambda x, p, size, stride, pads: nn.avg_pool(
        x, (size,) * (x.ndim - 2), (stride,) * (x.ndim - 2), [pads] * (x.ndim - 2)
    ),
    "pad": lambda x, p, *pads: lax.pad(x, 0.0, [(0, 0, 0), *[pads] * (x.ndim - 2), (0, 0, 0)]),
    "repeat": lambda x, p, times: functools.reduce(
        lambda x, axis: jnp.repeat(x, times, axis), range(1, x.ndim - 1), x
    ),
    "wrap": lambda x, p, *pads: jnp.pad(x, [(0, 0), *[pads] * (x.ndim - 2), (0, 0)], mode="wrap"),
    "cut": lambda x, p, start, step: x[:, start::step],
    "joined": lambda x, p, size: jnp.concatenate(
        [conv(x, p, padding=(size // 2, size // 2)), x], -1
    ),
    "branches": lambda x, p, sizes, parts: sum(
        (
            conv(x, k, padding=(s // 2, s // 2))
            for s, k in zip(sizes, _kernels(p, sizes), strict=True)
        ),
        x * 0.5,
    ),
}


def _kernels(flat, sizes):
    """Kernels of several sizes, cut out of one array of shape ``(taps, ..., in, out)``."""
    n = flat.ndim - 2
    return [flat[(slice(0, s),) * n] for s in sizes]


def space_after(size, taps, stride, pads, spread, dilation):
    return (spread * (size - 1) + sum(pads) - dilation * (taps - 1)) // stride + 1


@st.composite
def layers(draw, n, size, channels):
    """An operation on ``n`` axes of this size, with the size and channels that it leaves."""
    few, pads = st.integers(1, 2), st.integers(0, 2)
    name = draw(st.sampled_from(["conv"] * 6 + ["repeat", "wrap"] + [*APPLY]))
    if name in ("bias", "gain"):
        return Layer(name, (channels,), ()), size, channels
    if name == "branches":
        sizes = draw(st.sampled_from([(3,), (3, 1), (1, 3)]))
        return Layer(name, (3,) * n + (channels, channels), (sizes, None)), size, channels
    if name == "joined" and channels == 2:
        taps = draw(st.sampled_from([1, 3]))
        return Layer(name, (taps,) * n + (2, 2), (taps,)), size, 4
    if name == "repeat":
        times = draw(st.integers(2, 3))
        return Layer(name, (), (times,)), times * size, channels
    if name == "wrap":
        low, high = draw(pads), draw(pads)
        return Layer(name, (), (low, high)), size + low + high, channels
    if name == "pad":
        low, high, inside = draw(pads), draw(st.integers(-1, 1)), draw(st.integers(0, 1))
        made = size + low + high + inside * (size - 1)
        return Layer(name, (), (low, high, inside)), made, channels
    if name == "cut" and n == 1:
        start, step = draw(few) - 1, draw(few)
        return Layer(name, (), (start, step)), len(range(start, size, step)), channels
    if name == "pool":
        window, stride, both = draw(st.integers(2, 3)), draw(few), (draw(st.integers(0, 1)),) * 2
        made = space_after(size, window, stride, both, 1, 1)
        return Layer(name, (), (window, stride, both)), made, channels
    taps, stride, spread, dilation = draw(st.integers(1, 3)), *(draw(few) for _ in range(3))
    both = (draw(pads), draw(pads))
    groups = draw(st.sampled_from([g for g in (1, 1, 2, 4) if channels % g == 0]))
    out = draw(st.sampled_from([2, 4]))
    shape = (taps,) * n + (channels // groups, max(out, groups))
    made = space_after(size, taps, stride, both, spread, dilation)
    return Layer("conv", shape, (stride, both, spread, dilation, groups)), made, max(out, groups)


@st.composite
def chains(draw):
    """Three or four layers on one or two axes of space, each of two places or more."""
    n = draw(st.integers(1, 2))
    size, channels = draw(st.integers(4, 7)), draw(st.sampled_from([2, 4]))
    start = (2, *[size] * n, channels)
    found: list[Layer] = []
    for _ in range(draw(st.integers(3, 4))):
        layer, made, after = draw(layers(n, size, channels))
        if 2 <= made <= 12:
            found.append(layer)
            size, channels = made, after
    assume(any(layer.shape for layer in found))  # something to train
    return start, tuple(found)


def run(found, params, x):
    for layer, param in zip(found, params, strict=True):
        x = APPLY[layer.name](x, param, *layer.options)
    return x


@given(chains())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_random_chains_have_the_values_and_gradients_of_backprop(chain):
    start, found = chain

    def apply_fn(params, x):
        return run(found, params, x)

    assert_follows_backprop(apply_fn, arrays(*(f.shape for f in found)), *arrays(start, seed=1))


def assert_follows_backprop(apply_fn, params, x):
    """Values and gradients with everything folded are those of the function as written."""
    made = jax.eval_shape(apply_fn, params, x)
    target = jnp.resize(jnp.cos(x + 1.0), made.shape)

    def both(apply):
        def loss(params, x):
            return jnp.sum(target * jnp.sin(apply(params, x)))

        return jax.value_and_grad(loss, (0, 1))

    with always_fold():
        fc = fcjax.front_contribute(apply_fn, params, x)
        ours = jax.jit(both(fc.apply), compiler_options=QUICK)(params, x)
    expected = jax.jit(both(apply_fn), compiler_options=QUICK)(params, x)
    for actual, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert relative_deviation(actual, wanted, floor=1e-3) <= 1e-11
    return fc


# --- loops, transformations, precision ----------------------------------------------------------


def expanded(params, x):
    return conv(conv(conv(x, params[0]), params[1]) + params[3], params[2])


EXPANDED = [(1, 1, 3, 7), (3, 3, 7, 7), (1, 1, 7, 3), (7,)]


def recurrent(params, x):
    def step(state, x_t):
        return jnp.tanh(expanded(params, state) + x_t), None

    return jax.lax.scan(step, jnp.zeros_like(x), jnp.stack([x, 0.5 * x, -x]))[0]


def ensemble(params, x):
    members = [jnp.stack([p, -0.5 * p]) for p in params]
    return jnp.sum(jax.vmap(lambda p: jnp.tanh(expanded(p, x)))(members), 0)


PROGRAMS = {
    "jit": jax.jit(expanded),
    "remat": jax.checkpoint(lambda p, x: jnp.tanh(expanded(p, x))),
    "scan": recurrent,
    "vmap over parameters": ensemble,
    "vmap over images": lambda p, x: jax.vmap(lambda row: expanded(p, row[None])[0])(x),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_structured_programs_have_the_gradients_of_backprop(name):
    apply_fn, params, (x,) = PROGRAMS[name], arrays(*EXPANDED), arrays(X)

    def gradients(apply):
        return jax.grad(lambda p, x: jnp.sum(jnp.sin(apply(p, x))), (0, 1))

    with always_fold():
        fc = fcjax.front_contribute(apply_fn, params, x)
        assert "collapse" in {row.rule for row in fc.report}
        actual = jax.jit(gradients(fc.apply), compiler_options=QUICK)(params, x)
    expected = jax.jit(gradients(apply_fn), compiler_options=QUICK)(params, x)
    assert relative_deviation(actual, expected) <= 1e-11


def test_kernel_of_a_loop_is_formed_before_it():
    params, (x,) = arrays(*EXPANDED), arrays(X)
    with always_fold():
        fc = fcjax.front_contribute(recurrent, params, x)
        body = trace.flatten(jax.make_jaxpr(fc.apply)(params, x))
    (loop,) = [e.source for e in body.equations if e.name == "scan"]
    inside = [e.name for e in trace.flatten(loop.params["jaxpr"]).equations]
    assert inside.count("conv_general_dilated") == 1
    assert inside.count("dot_general") == 1  # what becomes of the bias, a vector


def test_forward_mode_works():
    params, (x,) = arrays(*EXPANDED), arrays(X)
    with always_fold():
        fc = fcjax.front_contribute(expanded, params, x)
        actual = jax.jvp(fc.apply, (params, x), (params, x))
    near = jax.jvp(expanded, (params, x), (params, x))
    assert relative_deviation(actual, near) <= 1e-11


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_narrow_gradients_are_near_those_of_backprop_in_float64(dtype, limit):
    params, (x,) = [0.2 * p for p in arrays(*EXPANDED)], arrays(X)

    def gradients(apply, params, x):
        return jax.grad(lambda p: jnp.sum(jnp.sin(apply(p, x).astype(jnp.float32))))(params)

    def cast(params, x):
        return expanded([p.astype(dtype) for p in params], x.astype(dtype))

    stored = [p.astype(jnp.float32) for p in params]
    with always_fold():
        fc = fcjax.front_contribute(cast, stored, x.astype(jnp.float32))
        actual = gradients(fc.apply, stored, x.astype(jnp.float32))
    assert {leaf.dtype for leaf in actual} == {jnp.dtype(jnp.float32)}
    assert relative_deviation(actual, gradients(expanded, params, x), floor=0.1) <= limit


# --- what pays ----------------------------------------------------------------------------------


def priced(fn, shapes, x):
    """The plan of ``fn(params, x)`` with prices in force."""
    params = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    data = jax.ShapeDtypeStruct(x, jnp.float32)
    body = trace.flatten(jax.make_jaxpr(fn)(params, data))
    return plan(written(body, [PARAM] * len(params) + [DATA]))


IMAGES = (32, 32, 32, 32)
AS_WRITTEN = {
    "plain": (lambda p, x: jax.nn.relu(conv(jax.nn.relu(conv(x, p[0])), p[1]) + p[2]),
              [(3, 3, 32, 64), (3, 3, 64, 32), (32,)]),
    "residual": (
        lambda p, x: jax.nn.relu(x + conv(jax.nn.relu(conv(x, p[0]) + p[2]), p[1]) + p[2]),
        [(3, 3, 32, 32), (3, 3, 32, 32), (32,)],
    ),
    "shortcut with stride": (
        lambda p, x: conv(jax.nn.relu(conv(x, p[0], 2)), p[1]) + conv(x, p[2], 2),
        [(3, 3, 32, 64), (3, 3, 64, 64), (1, 1, 32, 64)],
    ),
    "depthwise then pointwise": (lambda p, x: conv(conv(x, p[0], groups=32), p[1]),
                                 [(3, 3, 1, 32), (1, 1, 32, 64)]),
    "narrow between": (lambda p, x: conv(conv(x, p[0]), p[1]), [(1, 1, 32, 4), (3, 3, 4, 32)]),
    "two small kernels": (lambda p, x: conv(conv(x, p[0], padding="VALID"), p[1], padding="VALID"),
                          [(3, 3, 32, 32), (3, 3, 32, 32)]),
}  # fmt: skip


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_what_does_not_pay_runs_as_written(name):
    assert priced(*AS_WRITTEN[name], IMAGES).is_trivial


PAYS = {
    "expanded": (expanded, [(1, 1, 32, 128), (3, 3, 128, 128), (1, 1, 128, 32), (128,)]),
    "wide between two small kernels": (
        lambda p, x: conv(conv(x, p[0], padding="VALID"), p[1], padding="VALID"),
        [(3, 3, 32, 256), (3, 3, 256, 32)],
    ),
    "branches": (lambda p, x: conv(x, p[0]) + conv(x, p[1]) + x, [(3, 3, 32, 32), (1, 1, 32, 32)]),
    "before average pooling": (lambda p, x: nn.avg_pool(conv(x, p[0]), (2, 2), (2, 2)),
                               [(3, 3, 32, 32)]),
    "pointwise before global pooling": (lambda p, x: jnp.mean(conv(x, p[0]), (1, 2)),
                                        [(1, 1, 32, 128)]),
}  # fmt: skip


@pytest.mark.parametrize("name", PAYS)
def test_what_pays_is_folded(name):
    planned = priced(*PAYS[name], IMAGES)
    kept, _ = left(planned)
    assert kept == []
    assert len(planned.recipes) == 1
    assert planned.after.time < planned.before.time


# --- what is refused ----------------------------------------------------------------------------


def unknown(*shape, kind="data"):
    """The expression of a leaf."""
    value = trace.Value(jax.core.ShapedArray(shape, np.dtype(float)))
    return terms.of_leaf(terms.Leaf(value, kind, shape, np.dtype(float), trainable=True))


def unfolded(expr, axis=0, taps=3, **options):
    """What a window with padding sees of one axis, without its taps where there is one only."""
    made = windowed.unfold(expr, axis, expr.shape[axis], taps, offset=-1, **options)
    return made if taps > 1 else layout.reshape(made, made.shape[:-1])


def smoothed(expr, axis=0):
    """A convolution of one axis by a parameter."""
    last = len(expr.dims)
    kernel = unknown(3, kind="param")
    return algebra.contract(unfolded(expr, axis), kernel, ((last,), (0,)), ((), ()))


def moved(expr):
    """Every second entry of what is read, at every third of the result."""
    made = windowed.unfold(expr, 0, 4, 1, spread=2, stride=3)
    return layout.reshape(made, made.shape[:1])


def mean(expr, axis=0):
    average = algebra.scale(algebra.reduce_sum(expr, (axis,)), 1 / expr.shape[axis])
    others = [i for i in range(len(expr.dims)) if i != axis]
    return layout.broadcast(average, expr.shape, others)


def less_mean(expr):
    return algebra.add(expr, algebra.scale(mean(expr), -1.0))


def dot(a, b):
    return algebra.contract(a, b, ((0,), (0,)), ((), ()))


def times_gain(expr):
    return algebra.multiply(expr, unknown(*expr.shape, kind="param"))


def backwards(expr, taps):
    return windowed.unfold(expr, 0, 6, taps, stride=-1, offset=4)


def outer(a, b):
    return algebra.contract(a, b, ((), ()), ((), ()))


REFUSED = {
    "merged axis or one of size 1": lambda x: windowed.unfold(unknown(1), 0, 3, 3),
    "a sum over an axis that windows": lambda x: algebra.reduce_sum(smoothed(x), (0,)),
    "several windows read": lambda x: unfolded(times_gain(smoothed(x))),
    "what lies outside differs": lambda x: smoothed(smoothed(x)),
    "deviations from a mean": lambda x: recipe(smoothed(less_mean(x))),
    "differ from place to place": lambda x: recipe(times_gain(smoothed(x))),
    "two axes that are summed": lambda x: recipe(dot(moved(x), unknown(4, kind="param"))),
    "in place runs backwards": lambda x: recipe(layout.reshape(backwards(x, 1), (6,))),
    "with taps runs backwards": lambda x: recipe(
        dot(layout.transpose(backwards(x, 2), (1, 0)), unknown(2, kind="param"))
    ),
    "two different parameters": lambda x: recipe(
        smoothed(smoothed(outer(unknown(5, kind="param"), unknown(6, kind="param")), 0), 1)
    ),
    "kernels alone": lambda x: recipe(outer(x, smoothed(unknown(5, kind="param")))),
    "makes no axis of the value": lambda x: recipe(dot(smoothed(x), unknown(6, kind="param"))),
    "window over a product of two": lambda x: recipe(
        algebra.multiply(smoothed(unknown(5, 4, 2)), layout.broadcast(unknown(4), (5, 4, 2), (1,)))
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_convolution_is_refused(message):
    with pytest.raises(Unrepresentable, match=message):
        REFUSED[message](unknown(6))


RULE_REFUSED = {
    "accumulates in another dtype": lambda x: lax.conv_general_dilated(
        x.astype(jnp.int8), x.astype(jnp.int8), (1,), "VALID",
        preferred_element_type=jnp.int32),
    "something else than zeros": lambda x: lax.pad(x, 1.0, [(1, 1, 0)] * 3),
}  # fmt: skip


@pytest.mark.parametrize("message", RULE_REFUSED)
def test_what_a_rule_does_not_know_is_refused(message):
    eqn = jax.make_jaxpr(RULE_REFUSED[message])(jnp.ones((2, 2, 2))).eqns[-1]
    operands = [
        terms.of_leaf(terms.Leaf(object(), "param", v.aval.shape, v.aval.dtype, trainable=True))
        for v in eqn.invars
    ]
    with pytest.raises(Unrepresentable, match=message):
        RULES[eqn.primitive.name](operands, eqn)
