"""Every primitive rule against direct evaluation, alone and in random programs."""

from __future__ import annotations

import dataclasses
import functools
import math
import random

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
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options for programs that run once."""

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


def compared(planned, inputs):
    """Triples of a root's value, its value by recipe, and the largest value anywhere."""

    def run(*inputs):
        env = directly(planned.body, inputs)
        pairs = [(env[value], actual) for value, actual in as_planned(planned, env)]
        return pairs, [jnp.max(jnp.abs(v)) for v in env.values() if v.size]

    return jax.jit(run, compiler_options=QUICK)(*inputs)


def assert_recipes_agree(fn, params, data):
    """Every expression of the plan has the value that the equations give; returns the plan."""
    planned = traced(fn, params, data)
    pairs, sizes = compared(planned, [*params, *data])
    limit = TOLERANCE * max(1.0, *map(float, sizes))
    for expected, actual in pairs:
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=limit)
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


LARGEST = 400
"""Elements that a value of a random program has at most."""


class Drawing:
    """A random program while it is drawn: layers, norms, views and sums over one or two inputs."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.data = tuple(self.shape() for _ in range(self.rng.randint(1, 2)))
        self.shapes = [*self.data]
        self.params = []
        self.steps = []

    def shape(self):
        return tuple(self.rng.choices((1, 2, 3, 4), (1, 3, 3, 2), k=self.rng.randint(1, 3)))

    def some(self, items, least=0):
        items = list(items)
        return tuple(self.rng.sample(items, self.rng.randint(min(least, len(items)), len(items))))

    def late(self):
        """The number of a value, the last one more often than not."""
        last = len(self.shapes) - 1
        return last if self.rng.random() < 0.6 else self.rng.randint(0, last)

    def add(self, name, operands, options, shape):
        self.steps.append(Step(name, tuple(operands), tuple(options)))
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1

    def fresh(self, shape):
        """A parameter that nothing has read yet."""
        self.params.append(tuple(shape))
        return self.add("param", (), (len(self.params) - 1,), shape)

    def apply(self, name, operands, *options):
        """Adds a step unless what it makes is too large."""
        read = [jax.ShapeDtypeStruct(self.shapes[i], jnp.float64) for i in operands]
        made = jax.eval_shape(lambda *xs: APPLY[name](*xs, *options), *read).shape
        if math.prod(made) <= LARGEST and len(made) <= 5:
            self.add(name, operands, options, made)

    def step(self):
        """One step, drawn from all of them; layers more often than views."""
        names = [*LAYERS, *BINARY, *UNARY]
        weights = [6] * len(LAYERS) + [2] * len(BINARY) + [1] * len(UNARY)
        (name,) = self.rng.choices(names, weights)
        i = self.late()
        if name in LAYERS:
            LAYERS[name](self, i)
        elif name in BINARY:
            BINARY[name](self, i)
        elif self.shapes[i]:
            self.apply(name, (i,), *UNARY[name](self, self.shapes[i]))

    def finished(self):
        last = len(self.shapes) - 1
        outputs = (len(self.data), self.rng.randint(0, last), last)  # the first is a parameter
        return RandomProgram(tuple(self.params), self.data, tuple(self.steps), outputs)


def dense(drawing, i):
    """A product over some axes with a new weight."""
    shape = drawing.shapes[i]
    axes = drawing.some(range(len(shape)), least=1)[:2]
    width = drawing.rng.choices((1, 2, 3, 5), k=drawing.rng.choice((0, 1, 1, 1, 2)))
    weight = drawing.fresh((*(shape[k] for k in axes), *width))
    drawing.apply("dot", (i, weight), (axes, tuple(range(len(axes)))), ((), ()))


def affine(name):
    """A bias or a gain over the last axes."""

    def layer(drawing, i):
        shape = drawing.shapes[i]
        drawing.apply(name, (i, drawing.fresh(shape[drawing.rng.randint(0, len(shape)) :])))

    return layer


def any_dot(drawing, i):
    """A product of any two values over any axes that fit, some of them batch axes."""
    i, j = drawing.rng.sample((i, drawing.rng.randrange(len(drawing.shapes))), 2)
    left = list(range(len(drawing.shapes[j])))
    contracting, batch = ([], []), ([], [])
    for axis in drawing.some(range(len(drawing.shapes[i]))):
        fitting = [k for k in left if drawing.shapes[j][k] == drawing.shapes[i][axis]]
        if fitting:
            other = drawing.rng.choice(fitting)
            left.remove(other)
            chosen = drawing.rng.choice((contracting, contracting, batch))
            chosen[0].append(axis)
            chosen[1].append(other)
    drawing.apply("dot", (i, j), tuple(map(tuple, contracting)), tuple(map(tuple, batch)))


def elementwise(name):
    """An operation on two values that broadcast against each other."""

    def step(drawing, i):
        fitting = [j for j, s in enumerate(drawing.shapes) if broadcasts(s, drawing.shapes[i])]
        drawing.apply(name, drawing.rng.sample((i, drawing.rng.choice(fitting)), 2))

    return step


def broadcasts(a, b):
    return all(x == y or 1 in (x, y) for x, y in zip(a[::-1], b[::-1], strict=False))


def any_concatenate(drawing, i):
    rank = len(drawing.shapes[i])
    if rank:
        axis = drawing.rng.randrange(rank)
        others = [k for k in range(rank) if k != axis]
        fitting = [
            j
            for j, s in enumerate(drawing.shapes)
            if len(s) == rank and all(s[k] == drawing.shapes[i][k] for k in others)
        ]
        drawing.apply("concatenate", (i, *drawing.rng.choices(fitting, k=drawing.rng.randint(1, 2))), axis)


def nothing(drawing, shape):
    return ()


def an_axis(drawing, shape):
    return (drawing.rng.randrange(len(shape)),)


def some_axes(drawing, shape):
    return (drawing.some(range(len(shape)), least=1),)


def a_number(drawing, shape):
    return (drawing.rng.choice((-1.5, 0.5, 2.0, 1.0)),)


def any_layout(drawing, shape):
    """A shape of the same size."""
    left, wanted = math.prod(shape), []
    while left > 1:
        wanted.append(drawing.rng.choice([k for k in range(2, left + 1) if left % k == 0]))
        left //= wanted[-1]
    return (tuple(wanted),)


def any_broadcast(drawing, shape):
    rank = len(shape) + drawing.rng.randint(0, 1)
    positions = sorted(drawing.rng.sample(range(rank), len(shape)))
    wide = [drawing.rng.choice((1, 2, 3)) for _ in range(rank)]
    for position, size in zip(positions, shape, strict=True):
        wide[position] = size if size > 1 else wide[position]
    return (tuple(wide), tuple(positions))


def any_views(drawing, shape):
    views = []
    for size in shape:
        start, limit = sorted(drawing.rng.sample(range(size + 1), 2))
        views.append((start, limit, drawing.rng.randint(1, 3)))
    return (tuple(views),)


def any_split(drawing, shape):
    (axis,) = an_axis(drawing, shape)
    first = drawing.rng.randint(1, shape[axis])
    sizes = (first, shape[axis] - first) if first < shape[axis] else (first,)
    return (axis, sizes, drawing.rng.randrange(len(sizes)))


LAYERS = {"dense": dense, "bias": affine("add"), "gain": affine("mul")}
BINARY = {
    "dot": any_dot,
    "add": elementwise("add"),
    "sub": elementwise("sub"),
    "mul": elementwise("mul"),
    "concatenate": any_concatenate,
}
UNARY = {
    "neg": nothing,
    "square": nothing,
    "integer_pow": lambda drawing, shape: (drawing.rng.randint(2, 3),),
    "times": a_number,
    "over": a_number,
    "shifted": a_number,
    "tanh": nothing,
    "reshape": any_layout,
    "transpose": lambda drawing, shape: (drawing.some(range(len(shape)), least=len(shape)),),
    "broadcast_in_dim": any_broadcast,
    "expand_dims": lambda drawing, shape: ((drawing.rng.randint(0, len(shape)),),),
    "squeeze": lambda drawing, shape: (tuple(k for k, size in enumerate(shape) if size == 1),),
    "slice": any_views,
    "split": any_split,
    "reduce_sum": some_axes,
    "centred": some_axes,
    "one_pass_variance": some_axes,
    "layer_norm": an_axis,
    "standardised": an_axis,
}


@functools.lru_cache(maxsize=None)
def random_program(seed):
    drawing = Drawing(seed)
    drawing.fresh(drawing.shape())
    for _ in range(drawing.rng.randint(3, 12)):
        drawing.step()
    return drawing.finished()


def weighed(outputs):
    """A number that every entry of every output enters differently."""
    return sum(jnp.sum(jnp.sin(jnp.arange(o.size) + 1.0).reshape(o.shape) * o) for o in outputs)


@pytest.mark.parametrize("seed", range(60))
def test_recipes_of_random_programs(seed):
    program = random_program(seed)
    assert_recipes_agree(program, *program.inputs())


def loss_and_gradients(apply):
    """A loss of all outputs and its gradients by parameters and data."""
    return jax.value_and_grad(lambda p, x: weighed(apply(p, x)), (0, 1))


@pytest.mark.parametrize("seed", range(1000, 1040))
def test_value_and_gradient_of_random_programs(seed):
    program = random_program(seed)
    inputs = program.inputs()
    with always_fold():
        fc = fcjax.front_contribute(program, *inputs)
        both = jax.jit(
            lambda *xs: (loss_and_gradients(fc.apply)(*xs), loss_and_gradients(program)(*xs)),
            compiler_options=QUICK,
        )
        actual, expected = map(jax.tree.leaves, both(*inputs))
    scale = max(1.0, *(float(jnp.max(jnp.abs(e))) for e in expected), largest(program, inputs))
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-10 * scale)
