"""Nearest upsampling in front of convolutions: phases of the rows before it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_convolutions import assert_follows_backprop, convolved, left, priced
from test_convolutions import conv as convolution
from test_primitives import arrays, assert_recipes_agree, traced

from fcjax.planning.parts import Convolution
from fcjax.running.convolving import placing
from fcjax.tracing import trace

X = (2, 5, 5, 3)


def upsampled(x, times=2, axes=(1, 2)):
    """Every entry repeated along some axes."""
    return functools.reduce(lambda x, axis: jnp.repeat(x, times, axis), axes, x)


def conv(x, kernel, *, times=2, **options):
    """A convolution of upsampled rows of any rank."""
    return convolution(upsampled(x, times, range(1, x.ndim - 1)), kernel, **options)


def phases(planned):
    """For each convolution of data, into how many phases its axes are split."""
    parts = [p for how in planned.recipes.values() for p in how.parts]
    return [
        tuple(f.phase.size if f.phase else 1 for f in p.phases)
        for p in parts
        if isinstance(p, Convolution) and p.rows and p.rows.is_data
    ]


# --- the forms in which it is written -----------------------------------------------------------


def by_broadcasting(x):
    wide = jnp.broadcast_to(x[:, :, None, :, None], (2, 5, 2, 5, 2, 3))
    return wide.reshape(2, 10, 10, 3)


FORMS = {
    "repeat": upsampled,
    "broadcast and reshape": by_broadcasting,
    "image.resize": lambda x: jax.image.resize(x, (2, 10, 10, 3), "nearest"),
    "mapped image.resize": jax.vmap(lambda x: jax.image.resize(x, (10, 10, 3), "nearest")),
    "look-up": lambda x: jnp.take(x, jnp.arange(10) // 2, axis=1)[:, :, jnp.arange(10) // 2],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_one_kernel_over_the_rows_before_it(form):
    kernel = arrays((3, 3, 3, 4))
    planned = assert_recipes_agree(
        lambda p, d: convolution(FORMS[form](d[0]), p[0]), kernel, arrays(X)
    )
    assert convolved(planned) == [1]
    assert phases(planned) == [(2, 2)]


@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (2, 5, 2, 3), (2, 5, 8, 3)])
def test_resizing_by_no_whole_number_stays_as_written(shape):
    planned = traced(
        lambda p, d: convolution(jax.image.resize(d[0], shape, "nearest"), p[0]),
        arrays((3, 3, 3, 4)), arrays(X),
    )  # fmt: skip
    assert planned.is_trivial
    assert "gather" in {e.name for e in planned.boundaries}


LOOK_UPS = {
    "backwards": lambda x: x[:, 9 - jnp.arange(10) // 2],
    "as it is": lambda x: x[:, jnp.arange(10)],
    "by argument": lambda x: x[:, (jnp.arange(20) + jnp.int32(x[0, 0])) // 2],
    "of single entries": lambda x: x[jnp.arange(4) // 2, jnp.arange(4) // 2],
}


@pytest.mark.parametrize("name", LOOK_UPS)
def test_other_look_ups_stay_look_ups(name):
    jaxpr = jax.make_jaxpr(LOOK_UPS[name])(jnp.ones((2, 10)))
    names = {e.name for e in trace.flatten(jaxpr).equations}
    assert "gather" in names


# --- what it equals -----------------------------------------------------------------------------

GRID = {
    f"{n}d, {times} times, {taps} taps, {name}": (n, times, taps, options)
    for n, times, taps, name, options in [
        (1, 2, 1, "stride 1", {}),
        (1, 3, 2, "same", {}),
        (1, 2, 3, "valid", {"padding": "VALID"}),
        (1, 3, 3, "more padding", {"padding": (3, 1)}),
        (1, 2, 5, "stride 2", {"padding": (2, 2), "stride": 2}),
        (1, 3, 5, "stride 2", {"padding": (2, 1), "stride": 2}),
        (1, 2, 3, "stride 4", {"padding": (1, 1), "stride": 4}),
        (1, 2, 3, "stride 3", {"padding": (1, 1), "stride": 3}),
        (1, 2, 3, "dilated", {"dilation": 2}),
        (1, 3, 2, "dilated", {"dilation": 3, "padding": (2, 2)}),
        (1, 2, 3, "transposed", {"padding": (2, 1), "spread": 2}),
        (2, 2, 1, "same", {}),
        (2, 2, 2, "same", {}),
        (2, 2, 3, "same", {}),
        (2, 3, 3, "same", {}),
        (2, 2, 5, "same", {}),
        (2, 2, 3, "groups", {"groups": 2}),
        (2, 2, 3, "depthwise", {"groups": 4}),
    ]
}


@pytest.mark.parametrize("name", GRID)
def test_values_and_gradients_are_those_of_backprop(name):
    n, times, taps, options = GRID[name]
    shapes = [(taps,) * n + (4 // options.get("groups", 1), 4), (3, 4), (4,)]
    x = (2, *[5, 4][:n], 3)

    def apply_fn(p, x):  # the bias is kept as a map where the kernel reads padding
        return conv(x @ p[1] + p[2], p[0], times=times, **options)

    fc = assert_follows_backprop(apply_fn, arrays(*shapes), *arrays(x))
    assert {row.rule for row in fc.report} == {"collapse"}


ALONG = {
    "chain": lambda p, x: convolution(conv(x, p[0], padding="VALID"), p[0], padding="VALID"),
    "twice": lambda p, x: conv(conv(x, p[0], padding="VALID"), p[0], padding="VALID"),
    "repeated twice": lambda p, x: conv(upsampled(x), p[0]),
    "one axis": lambda p, x: convolution(upsampled(x, 2, (1,)), p[0]),
    "two times on one axis and three on the other": lambda p, x: convolution(
        upsampled(upsampled(x, 2, (1,)), 3, (2,)), p[0]),
    "padded by itself": lambda p, x: convolution(
        jnp.pad(upsampled(x), ((0, 0), (1, 2), (0, 1), (0, 0))), p[0], padding="VALID"),
    "branches": lambda p, x: (
        convolution(u := upsampled(x), p[0]) + convolution(u, p[1]) + 0.5 * u),
    "joined to others": lambda p, x: convolution(
        jnp.concatenate([upsampled(x @ p[1][0, 0]), jnp.tanh(upsampled(x))], -1),
        jnp.concatenate([p[0], -p[0]], 2)),
    "average pooling": lambda p, x: lax.reduce_window(
        upsampled(x @ p[1][0, 0]), 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"),
    "rows of one place": lambda p, x: conv(jnp.mean(x, (1, 2), keepdims=True), p[0], times=3),
    "in a loop": lambda p, x: lax.scan(
        lambda h, _: (jnp.tanh(conv(h[:, ::2, ::2], p[0])[:, :5, :5]), None), x, None, 2)[0],
}  # fmt: skip


@pytest.mark.parametrize("name", ALONG)
def test_values_and_gradients_in_company_are_those_of_backprop(name):
    assert_follows_backprop(ALONG[name], arrays((3, 3, 3, 3), (1, 1, 3, 3)), *arrays(X))


def test_rows_are_repeated_after_a_pointwise_map():
    planned = traced(lambda p, d: conv(d[0], p[0]), arrays((1, 1, 3, 4)), arrays(X))
    (how,) = planned.recipes.values()
    (part,) = how.parts
    assert part.term.factors[0].leaf.shape == X


def test_a_pixel_shuffle_is_no_repetition():
    def fn(p, d):
        shuffled = (d[0] @ p[1]).reshape(2, 5, 5, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
        return convolution(shuffled.reshape(2, 10, 10, 3), p[0])

    planned = assert_recipes_agree(fn, arrays((3, 3, 3, 4), (3, 12)), arrays(X))
    assert "conv_general_dilated" in {e.name for e in planned.boundaries}


def test_no_kernel_meets_a_gap_or_makes_more_than_its_padded_rows():
    """Both would cost the gradient of a kernel 40 times the time of others on a CPU."""
    params, (x,) = arrays((3, 3, 3, 4), (3, 3)), arrays(X)
    fc = assert_follows_backprop(lambda p, x: conv(x @ p[1], p[0]), params, x)
    body = trace.flatten(jax.make_jaxpr(fc.apply)(params, x))
    (made,) = [e.source for e in body.equations if e.name == "conv_general_dilated"]
    assert made.params["lhs_dilation"] == (1, 1)
    assert made.outvars[0].aval.shape[1] <= made.invars[0].aval.shape[1]


# --- what pays ----------------------------------------------------------------------------------


def scaled(fn):
    """With a gain in front, so that a gradient flows to the rows."""
    return lambda p, x: fn(p, jnp.tanh(x * p[-1]))


PAYS = {
    "as many channels": ((3, 3, 64, 64), {}),
    "fewer channels": ((3, 3, 64, 3), {}),
    "larger kernel": ((5, 5, 64, 64), {}),
    "three times": ((3, 3, 64, 64), {"times": 3}),
    "pointwise": ((1, 1, 64, 64), {}),
}
AS_WRITTEN = {
    "many more channels": ((3, 3, 16, 64), {}),
    "few channels": ((3, 3, 8, 8), {}),
    "two taps": ((2, 2, 64, 64), {}),
    "depthwise": ((3, 3, 1, 64), {"groups": 64}),
}


def plan_of(kernel, **options):
    groups = options.get("groups", 1)
    channels = kernel[2] * groups
    fn = scaled(lambda p, x: conv(x, p[0], **options))
    return priced(fn, [kernel, (channels,)], (16, 16, 16, channels))


@pytest.mark.parametrize("name", PAYS)
def test_what_pays_is_folded(name):
    kernel, options = PAYS[name]
    planned = plan_of(kernel, **options)
    assert left(planned)[0] == []
    assert planned.after.time < planned.before.time
    assert planned.after.held < planned.before.held
    assert phases(planned) == ([] if name == "pointwise" else [(options.get("times", 2),) * 2])


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_what_does_not_pay_runs_as_written(name):
    kernel, options = AS_WRITTEN[name]
    assert plan_of(kernel, **options).is_trivial


def test_transposed_convolution_that_stands_alone_stays_as_written():
    kernels = [(3, 3, 64, 64), (1, 1, 64, 64), (64,)]
    transposed = functools.partial(convolution, padding=(2, 1), spread=2)
    alone = priced(scaled(lambda p, x: transposed(x, p[0])), kernels, (16, 16, 16, 64))
    assert alone.is_trivial
    before_pointwise = priced(
        scaled(lambda p, x: convolution(transposed(x, p[0]), p[1])), kernels, (16, 16, 16, 64)
    )
    assert phases(before_pointwise) == [(2, 2)]


def test_three_taps_over_rows_repeated_twice_are_two_of_two_phases():
    planned = plan_of((3, 3, 64, 64))
    (how,) = planned.recipes.values()
    (part,) = how.parts
    assert [g.tap.size for g in part.grids] == [2, 2]
    assert [(g.out.size, g.read.size) for g in part.grids] == [(17, 16)] * 2


def test_placing_leaves_out_what_stands_between_places():
    np.testing.assert_array_equal(
        placing([(3, 1)], [(2, 1)], 0, 2, every=2), [[1, 0], [0, 1], [0, 1]]
    )


def test_row_numbers_that_share_their_parts_are_computed_once():
    """Each doubling reads the one before twice; anew for every reader it would be 2^40 sums."""

    def apply_fn(params, x):
        numbers = jnp.arange(8)
        for _ in range(40):
            numbers = numbers + numbers
        numbers = (numbers * 0 + jnp.arange(8)) // 2
        return jnp.tanh(x.at[:, numbers].get(mode="clip") @ params)

    equations = trace.flatten(jax.make_jaxpr(apply_fn)(jnp.ones((3, 2)), jnp.ones((2, 4, 3))))
    assert "gather" not in [equation.name for equation in equations.equations]
