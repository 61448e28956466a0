"""Every primitive rule against direct evaluation, alone and in random programs."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import fcjax
from fcjax import compat, trace
from fcjax.evaluate import evaluate, form
from fcjax.expressions import Unrepresentable
from fcjax.parts import recipe
from fcjax.plan import always_fold, plan
from fcjax.primitives import RULES, register
from fcjax.transform import DATA, PARAM

TOLERANCE = 1e-12

# --- the oracle: every root of a plan against the equations as traced ----------------------------


def traced(fn, params, data):
    """The plan of ``fn(params, data)`` with everything folded, both arguments lists of arrays."""
    jaxpr = jax.make_jaxpr(lambda p, x: fn(p, x))(params, data)
    kinds = [PARAM] * len(params) + [DATA] * len(data)
    with always_fold():
        return plan(trace.flatten(jaxpr), kinds)


def directly(body, arrays):
    """The value of everything in ``body``, by its equations as they were traced."""
    env = dict(zip(body.inputs, arrays, strict=True)) | dict(body.constants)
    for equation in body.equations:
        inputs = [env[a] if isinstance(a, trace.Value) else a.val for a in equation.inputs]
        outputs = compat.bind(equation.source, inputs)
        env.update((v, o) for v, o in zip(equation.outputs, outputs, strict=True) if v is not None)
    return env


def magnitude(arrays):
    """The largest absolute value anywhere, at least 1."""
    return max([1.0, *(float(np.max(np.abs(a))) for a in arrays if np.size(a))])


def as_planned(planned, env):
    """Pairs of a root and its value by recipe: as written, as planned, with weights formed."""
    for value, expr in planned.bases.items():
        try:
            how = recipe(expr)
        except Unrepresentable:
            continue  # such a root is computed as it was written
        yield value, evaluate(how, env, {})
    for value, how in planned.recipes.items():
        yield value, evaluate(how, env, {})
        yield value, evaluate(how, env, form(how, env))


def assert_recipes_agree(fn, params, data):
    """Every expression of the plan has the value that the equations give; returns the plan."""
    planned = traced(fn, params, data)
    env = directly(planned.body, [*params, *data])
    limit = TOLERANCE * magnitude(env.values())
    for value, actual in as_planned(planned, env):
        assert actual.shape == value.shape
        assert actual.dtype == value.aval.dtype
        np.testing.assert_allclose(actual, env[value], rtol=TOLERANCE, atol=limit)
    return planned


def arrays(*shapes, seed=0):
    """One array of standard normal entries for each shape."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]


# --- random programs ----------------------------------------------------------------------------

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation: its name, the numbers of its operands, and its static options."""

    name: str
    operands: tuple[int, ...]
    options: tuple


@dataclasses.dataclass(frozen=True)
class RandomProgram:
    """Steps over a pool of values that starts with the data; a step may fetch a parameter."""

    params: tuple[Shape, ...]
    data: tuple[Shape, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def __call__(self, params, data):
        pool = [*data]
        for step in self.steps:
            if step.name == "param":
                pool.append(params[step.options[0]])
            else:
                pool.append(APPLY[step.name](*(pool[i] for i in step.operands), *step.options))
        return [pool[i] for i in self.outputs]

    def inputs(self):
        both = arrays(*self.params, *self.data, seed=len(self.steps))
        return both[: len(self.params)], both[len(self.params) :]


def centred(x, axes):
    return x - jnp.mean(x, axes, keepdims=True)


def one_pass_variance(x, axes):
    return jnp.mean(x * x, axes) - jnp.square(jnp.mean(x, axes))


def layer_norm(x, axis):
    deviation = centred(x, axis)
    return deviation * lax.rsqrt(jnp.mean(jnp.square(deviation), axis, keepdims=True) + 0.1)


def standardised(x, axis):
    variance = one_pass_variance(x, axis)
    return centred(x, axis) / jnp.expand_dims(jnp.sqrt(jnp.abs(variance) + 0.1), axis)


def sliced(x, views):
    return lax.slice(x, *(list(v) for v in zip(*views, strict=True)))


def split_part(x, axis, sizes, which):
    return lax.split(x, sizes, axis)[which]


def dot(a, b, contracting, batch):
    return lax.dot_general(a, b, (contracting, batch))


APPLY = {
    "dot": dot,
    "add": jnp.add,
    "sub": jnp.subtract,
    "mul": jnp.multiply,
    "neg": lax.neg,
    "square": lax.square,
    "integer_pow": lax.integer_pow,
    "times": lambda x, by: x * by,
    "over": lambda x, by: x / by,
    "shifted": lambda x, by: x + by,
    "tanh": lax.tanh,
    "reshape": jnp.reshape,
    "transpose": lax.transpose,
    "broadcast_in_dim": lax.broadcast_in_dim,
    "expand_dims": lax.expand_dims,
    "squeeze": lax.squeeze,
    "slice": sliced,
    "split": split_part,
    "concatenate": lambda *parts_axis: lax.concatenate(parts_axis[:-1], parts_axis[-1]),
    "reduce_sum": jnp.sum,
    "centred": centred,
    "one_pass_variance": one_pass_variance,
    "layer_norm": layer_norm,
    "standardised": standardised,
}


def subset(draw, items, **limits):
    """Some of the items, in a drawn order."""
    return tuple(draw(st.permutations(items)))[
        : draw(st.integers(limits.get("least", 0), len(items)))
    ]


def any_of(draw, shapes):
    """The number of a value, late ones more often."""
    last = len(shapes) - 1
    return draw(st.one_of(st.integers(0, last), st.just(last), st.integers(max(0, last - 2), last)))


def one_operand(options):
    """Draws a step on one value of rank at least 1 with options that depend on its shape."""

    def choose(draw, shapes):
        i = any_of(draw, shapes)
        return ((i,), options(draw, shapes[i])) if shapes[i] else None

    return choose


def two_shapes(draw, shapes):
    """Two values that broadcast against each other."""
    i = any_of(draw, shapes)
    fitting = [j for j, s in enumerate(shapes) if broadcasts(s, shapes[i])]
    j = draw(st.sampled_from(fitting))
    return (draw(st.permutations((i, j))), ())


def broadcasts(a, b):
    return all(x == y or 1 in (x, y) for x, y in zip(a[::-1], b[::-1], strict=False))


def dot_of(draw, shapes):
    i, j = any_of(draw, shapes), draw(st.integers(0, len(shapes) - 1))
    i, j = draw(st.permutations((i, j)))
    left = list(range(len(shapes[j])))
    contracting, batch = ([], []), ([], [])
    for axis in draw(st.permutations(range(len(shapes[i])))):
        fitting = [k for k in left if shapes[j][k] == shapes[i][axis]]
        if fitting and draw(st.integers(0, 3)):
            other = draw(st.sampled_from(fitting))
            left.remove(other)
            chosen = batch if contracting[0] and draw(st.booleans()) else contracting
            chosen[0].append(axis)
            chosen[1].append(other)
    return ((i, j), (tuple(map(tuple, contracting)), tuple(map(tuple, batch))))


def factorised(draw, size):
    """A shape of that size."""
    divisors = [k for k in range(1, size + 1) if size % k == 0]
    first = draw(st.sampled_from(divisors))
    if first == size:
        return (size,)
    return (first, *factorised(draw, size // first))


def reshape_options(draw, shape):
    return (factorised(draw, math.prod(shape)),)


def broadcast_options(draw, shape):
    rank = len(shape) + draw(st.integers(0, 1))
    positions = tuple(sorted(draw(st.permutations(range(rank)))[: len(shape)]))
    wide = [draw(st.sampled_from((1, 2, 3))) for _ in range(rank)]
    for position, size in zip(positions, shape, strict=True):
        wide[position] = size if size > 1 else wide[position]
    return (tuple(wide), positions)


def slice_options(draw, shape):
    views = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        limit = draw(st.integers(start + 1, size))
        views.append((start, limit, draw(st.integers(1, 3))))
    return (tuple(views),)


def split_options(draw, shape):
    axis = draw(st.integers(0, len(shape) - 1))
    first = draw(st.integers(1, shape[axis]))
    sizes = (first, shape[axis] - first) if first < shape[axis] else (first,)
    return (axis, sizes, draw(st.integers(0, len(sizes) - 1)))


def concatenate_of(draw, shapes):
    i = any_of(draw, shapes)
    if not shapes[i]:
        return None
    axis = draw(st.integers(0, len(shapes[i]) - 1))
    fitting = [j for j, s in enumerate(shapes) if same_but(s, shapes[i], axis)]
    more = draw(st.lists(st.sampled_from(fitting), min_size=1, max_size=2))
    return ((i, *more), (axis,))


def same_but(a, b, axis):
    return len(a) == len(b) and all(
        x == y or k == axis for k, (x, y) in enumerate(zip(a, b, strict=True))
    )


def axes_options(draw, shape):
    return (subset(draw, range(len(shape)), least=1),)


def axis_option(draw, shape):
    return (draw(st.integers(0, len(shape) - 1)),)


def number_option(draw, shape):
    return (draw(st.sampled_from((-1.5, 0.5, 2.0, 1.0))),)


CHOOSE = {
    "dot": dot_of,
    "add": two_shapes,
    "sub": two_shapes,
    "mul": two_shapes,
    "neg": one_operand(lambda draw, shape: ()),
    "square": one_operand(lambda draw, shape: ()),
    "integer_pow": one_operand(lambda draw, shape: (draw(st.integers(2, 3)),)),
    "times": one_operand(number_option),
    "over": one_operand(number_option),
    "shifted": one_operand(number_option),
    "tanh": one_operand(lambda draw, shape: ()),
    "reshape": one_operand(reshape_options),
    "transpose": one_operand(
        lambda draw, shape: (subset(draw, range(len(shape)), least=len(shape)),)
    ),
    "broadcast_in_dim": one_operand(broadcast_options),
    "expand_dims": one_operand(lambda draw, shape: ((draw(st.integers(0, len(shape))),),)),
    "squeeze": one_operand(lambda draw, shape: (tuple(i for i, s in enumerate(shape) if s == 1),)),
    "slice": one_operand(slice_options),
    "split": one_operand(split_options),
    "concatenate": concatenate_of,
    "reduce_sum": one_operand(axes_options),
    "centred": one_operand(axes_options),
    "one_pass_variance": one_operand(axes_options),
    "layer_norm": one_operand(axis_option),
    "standardised": one_operand(axis_option),
}
LARGEST = 300
"""Elements that a value of a random program has at most."""


class Drawing:
    """A random program while it is drawn."""

    def __init__(self, draw, data):
        self.draw = draw
        self.data = tuple(data)
        self.shapes = [*data]
        self.params = []
        self.steps = []

    def add(self, name, operands, options, shape):
        self.steps.append(Step(name, tuple(operands), options))
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1

    def fresh(self, shape):
        """A parameter that nothing has read yet."""
        self.params.append(tuple(shape))
        return self.add("param", (), (len(self.params) - 1,), shape)

    def apply(self, name, operands, options=()):
        """Adds a step unless what it makes is too large; returns its number."""
        read = [jax.ShapeDtypeStruct(self.shapes[i], jnp.float64) for i in operands]
        made = jax.eval_shape(lambda *xs: APPLY[name](*xs, *options), *read).shape
        if math.prod(made) > LARGEST or len(made) > 5:
            return None
        return self.add(name, operands, options, made)

    def dense(self):
        """A product over some axes of a late value with a new weight."""
        i = any_of(self.draw, self.shapes)
        shape = self.shapes[i]
        axes = subset(self.draw, range(len(shape)), least=min(1, len(shape)))[:2]
        out = self.draw(st.lists(st.sampled_from((1, 2, 3, 5)), max_size=2))
        weight = self.fresh((*(shape[k] for k in axes), *out))
        numbers = ((axes, tuple(range(len(axes)))), ((), ()))
        self.apply("dot", (i, weight), numbers)

    def affine(self, name):
        """A bias or a gain over the last axes of a late value."""
        i = any_of(self.draw, self.shapes)
        shape = self.shapes[i]
        self.apply(name, (i, self.fresh(shape[self.draw(st.integers(0, len(shape))) :])))

    def any_step(self):
        name = self.draw(st.sampled_from((*CHOOSE, "add", "add", "mul", "centred")))
        chosen = CHOOSE[name](self.draw, self.shapes)
        if chosen is not None:
            self.apply(name, *chosen)

    def finished(self):
        last = len(self.shapes) - 1
        some = self.draw(st.lists(st.integers(0, last), max_size=2))
        outputs = (len(self.data), *some, last)  # the first is a parameter
        return RandomProgram(tuple(self.params), self.data, tuple(self.steps), outputs)


@st.composite
def random_programs(draw):
    """Up to a dozen layers, norms, views and sums over one or two inputs."""
    shape = st.lists(st.sampled_from((1, 2, 3, 3, 4)), min_size=1, max_size=3)
    program = Drawing(draw, draw(st.lists(shape.map(tuple), min_size=1, max_size=2)))
    program.fresh(draw(shape))
    dense, anything = program.dense, program.any_step
    bias, gain = (functools.partial(program.affine, name) for name in ("add", "mul"))
    for step in draw(
        st.lists(
            st.sampled_from((dense, dense, dense, bias, gain, *[anything] * 5)),
            min_size=2,
            max_size=12,
        )
    ):
        step()
    return program.finished()


def weighed(outputs):
    """A number that every entry of every output enters differently."""
    return sum(jnp.sum(jnp.sin(jnp.arange(o.size) + 1.0).reshape(o.shape) * o) for o in outputs)


@given(random_programs())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_random_programs_recipes(program):
    assert_recipes_agree(program, *program.inputs())


@given(random_programs())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_random_programs_value_and_gradient(program):
    params, data = program.inputs()
    with always_fold():
        fc = fcjax.front_contribute(program, params, data)
        run = jax.jit(jax.value_and_grad(lambda p, x: weighed(fc.apply(p, x)), (0, 1)))
        actual = run(params, data)
    expected = jax.jit(jax.value_and_grad(lambda p, x: weighed(program(p, x)), (0, 1)))(
        params, data
    )
    everything = directly(fc.plan.body, [*params, *data]).values()
    scale = magnitude([*everything, *jax.tree.leaves(expected)])
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-10 * scale)
