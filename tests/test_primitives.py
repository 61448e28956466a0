"""Every primitive rule against direct evaluation, alone and in random programs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
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
from fcjax import compat
from fcjax.expressions import layout, terms
from fcjax.expressions.primitives import RULES, register
from fcjax.expressions.terms import Unrepresentable
from fcjax.expressions.written import written
from fcjax.planning.plan import always_fold, plan
from fcjax.planning.recipes import recipe
from fcjax.running.evaluate import evaluate
from fcjax.running.weights import form
from fcjax.tracing import trace
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
        return plan(written(trace.flatten(jaxpr), kinds))


def directly(body, arrays):
    """The value of everything in ``body``, by its equations as they were traced."""
    env = dict(zip(body.inputs, arrays, strict=True)) | dict(body.constants)
    for equation in body.equations:
        inputs = [env[a] if isinstance(a, trace.Value) else a.val for a in equation.inputs]
        outputs = compat.bind(equation.source, inputs)
        env.update((v, o) for v, o in zip(equation.outputs, outputs, strict=True) if v is not None)
    return env


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
        drawing.apply(
            "concatenate", (i, *drawing.rng.choices(fitting, k=drawing.rng.randint(1, 2))), axis
        )


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


@functools.cache
def random_program(seed):
    drawing = Drawing(seed)
    drawing.fresh(drawing.shape())
    for _ in range(drawing.rng.randint(3, 12)):
        drawing.step()
    return drawing.finished()


def weighed(outputs):
    """A number that every entry of every output enters differently."""
    return sum(jnp.sum(jnp.sin(jnp.arange(o.size) + 1.0).reshape(o.shape) * o) for o in outputs)


@pytest.mark.parametrize("seed", range(45))
def test_recipes_of_random_programs(seed):
    program = random_program(seed)
    assert_recipes_agree(program, *program.inputs())


def loss_and_gradients(apply):
    """A loss of all outputs and its gradients by parameters and data."""
    return jax.value_and_grad(lambda p, x: weighed(apply(p, x)), (0, 1))


def assert_gradients_agree(program):
    """The folded program's loss and gradients are those of the program as written."""
    inputs = program.inputs()
    with always_fold():
        fc = fcjax.front_contribute(program, *inputs)

        def run(params, data):
            values = directly(fc.plan.body, [*params, *data]).values()
            both = [loss_and_gradients(f)(params, data) for f in (fc.apply, program)]
            return both, [jnp.max(jnp.abs(v)) for v in values]

        (actual, expected), sizes = jax.jit(run, compiler_options=QUICK)(*inputs)
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    scale = max(1.0, *map(float, sizes), *(float(jnp.max(jnp.abs(e))) for e in expected))
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-10 * scale)
    return fc.plan


@pytest.mark.parametrize("seed", range(1000, 1020))
def test_value_and_gradient_of_random_programs(seed):
    assert_gradients_agree(random_program(seed))


# --- single rules -------------------------------------------------------------------------------

few = settings(max_examples=5, deadline=None, derandomize=True)
sizes = st.integers(1, 4)


def before_a_product(value, weight):
    """The product of a value with the rows of ``weight`` that fit it, if the value has axes."""
    return jnp.tensordot(value, weight[: value.shape[-1]], 1) if value.ndim else value


def chained(operation):
    """``operation`` between two products."""

    def fn(params, data):
        return before_a_product(operation(jnp.tensordot(data[0], params[0], 1)), params[1])

    return fn


def assert_views_agree(operation, shape):
    """A view is exact on a product of data, on data, on a parameter, and before a product."""
    x, p, before, after = arrays(shape, shape, (shape[-1], shape[-1]), (64, 2))
    assert_recipes_agree(lambda ps, xs: operation(xs[0]), [], [x])
    assert_recipes_agree(lambda ps, xs: operation(ps[0]) + 1.0, [p], [])
    assert_recipes_agree(chained(operation), [before, after], [x])


@given(st.lists(sizes, min_size=1, max_size=3), st.data())
@few
def test_transpose(shape, data):
    permutation = data.draw(st.permutations(range(len(shape))))
    assert_views_agree(lambda x: lax.transpose(x, permutation), tuple(shape))


MERGES_AND_SPLITS = [
    ((2, 3, 4), (6, 4)),
    ((2, 3, 4), (2, 12)),
    ((2, 3, 4), (24,)),
    ((6, 4), (2, 3, 2, 2)),
    ((6, 4), (3, 8)),  # splits 6 into 3 and 2, merges the 2 with the 4
    ((4, 6), (8, 3)),
    ((4, 1, 3), (1, 12, 1)),
    ((12,), (4, 3)),
    ((1,), (1, 1, 1)),
    ((4, 1), (4,)),
]


@pytest.mark.parametrize(("shape", "wanted"), MERGES_AND_SPLITS)
def test_reshape(shape, wanted):
    assert_views_agree(lambda x: jnp.reshape(x, wanted), shape)


def test_reshape_without_common_refinement_is_a_boundary():
    matrix = terms.Leaf("x", "data", (2, 3), np.dtype(float), trainable=False)
    with pytest.raises(Unrepresentable, match="no common refinement"):
        layout.reshape(terms.of_leaf(matrix), (3, 2))
    assert_views_agree(lambda x: x.reshape(3, 2), (2, 3))


@given(st.lists(sizes, min_size=1, max_size=3), st.data())
@few
def test_broadcast_in_dim(shape, data):
    rank = len(shape) + data.draw(st.integers(0, 2))
    positions = sorted(data.draw(st.permutations(range(rank)))[: len(shape)])
    wide = data.draw(st.lists(sizes, min_size=rank, max_size=rank))
    for position, size in zip(positions, shape, strict=True):
        wide[position] = size if size > 1 else wide[position]
    assert_views_agree(lambda x: lax.broadcast_in_dim(x, wide, positions), tuple(shape))


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 3), (1, 2)])
def test_expand_and_squeeze(axes):
    assert_views_agree(lambda x: lax.expand_dims(x, axes), (3, 2))
    assert_views_agree(lambda x: lax.squeeze(lax.expand_dims(x, axes), axes), (3, 2))


@given(st.lists(sizes, min_size=1, max_size=3), st.data())
@few
def test_slice(shape, data):
    views = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        views.append((start, data.draw(st.integers(start + 1, size)), data.draw(st.integers(1, 3))))
    assert_views_agree(lambda x: sliced(x, views), tuple(shape))


def test_slices_of_slices():
    views = [[(1, 9, 2)], [(1, 4, 1)], [(0, 3, 2)]]

    def fn(params, data):
        value = params[0] @ data[0]
        for view in views:
            value = sliced(value, view)
        return value

    assert_recipes_agree(fn, arrays((10, 3)), arrays((3,)))


@pytest.mark.parametrize(("axis", "cuts"), [(0, (1, 2)), (1, (1, 3)), (1, (2, 2)), (1, (4,))])
def test_split(axis, cuts):
    def fn(params, data):
        return [
            part @ params[1][: part.shape[1]] for part in lax.split(data[0] @ params[0], cuts, axis)
        ]

    assert_recipes_agree(fn, arrays((5, 4), (4, 2)), arrays((3, 5)))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("which", ["data", "params", "chains"])
def test_concatenate_as_an_output(axis, which):
    def fn(params, data):
        chains = [data[0] @ params[0], data[0] @ params[0] @ params[1]]
        parts = {"data": [*data, *data], "params": params, "chains": chains}[which]
        return lax.concatenate(parts, axis) * 2.0

    assert_recipes_agree(fn, arrays((3, 3), (3, 3)), arrays((3, 3)))


@pytest.mark.parametrize("contracted", [0, 1, 2])
def test_concatenate_then_dot(contracted):
    """A product over the joined axis reads each part at its offset; over others it keeps them."""
    shapes = [(2, 1, 3), (2, 4, 3)]
    weight = {0: (2, 5), 1: (5, 5), 2: (3, 5)}[contracted]

    def fn(params, data):
        parts = [jnp.tensordot(x, params[0], 1) for x in data]
        return jnp.tensordot(lax.concatenate(parts, 1), params[1], ((contracted,), (0,)))

    assert_recipes_agree(fn, arrays((3, 3), weight), arrays(*shapes))


@pytest.mark.parametrize("axis", [0, 1])
def test_concatenate_then_dot_folds(axis):
    """The joined value is gone: its parts meet the rows of the weight at their offsets."""

    def fn(params, data):
        joined = lax.concatenate([data[0] @ params[0], data[0] @ params[1]], 1)
        return jnp.tensordot(joined, params[2], ((1,), (axis,)))

    shape = (5, 4) if axis == 0 else (4, 5)
    planned = assert_recipes_agree(fn, arrays((4, 2), (4, 3), shape), arrays((6, 4)))
    assert len(planned.recipes) == 1


def test_sum_of_a_concatenation_with_constant_parts():
    """What does not vary along its part of the joined axis counts once for each of its places."""

    def fn(params, data):
        parts = [jnp.broadcast_to(params[0], (7, 3)), data[0] @ params[1] + 1.0]
        return lax.concatenate(parts, 1).sum(1)

    assert_recipes_agree(fn, arrays((7, 1), (4, 2)), arrays((7, 4)))
    assert_recipes_agree(
        lambda ps, xs: lax.concatenate([ps[0] + 1.0, ps[0]], 0).sum(), arrays((3,)), []
    )


def test_gain_after_concatenate():
    def fn(params, data):
        a, b, c, gain = params
        return lax.concatenate([data[0] @ a @ c, data[0] @ b], 1) * gain

    assert_recipes_agree(fn, arrays((4, 3), (4, 2), (3, 3), (5,)), arrays((7, 4)))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 4), (1, 1)])
def test_reduce_sum(shape):
    for axes in powerset(range(len(shape))):
        assert_recipes_agree(lambda ps, xs: xs[0].sum(axes), [], arrays(shape))  # noqa: B023
    x, w, b = arrays(shape, (shape[-1], 3), (3,))
    for axes in powerset(range(len(shape))):
        assert_recipes_agree(lambda ps, xs: (xs[0] @ ps[0] + ps[1]).sum(axes), [w, b], [x])  # noqa: B023


def powerset(items):
    return itertools.chain.from_iterable(
        itertools.combinations(items, k) for k in range(1, len(items) + 1)
    )


NUMBERS = {
    "neg": lax.neg,
    "literal times": lambda x: 3.0 * x,
    "times literal": lambda x: x * -0.5,
    "over literal": lambda x: x / 4.0,
    "literal over": lambda x: 1.0 / x,  # no rule: a boundary, and still the same value
    "minus literal": lambda x: x - 1.5,
    "literal minus": lambda x: 1.5 - x,
    "copy": jnp.copy,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    assert_views_agree(NUMBERS[name], (3, 2))


@pytest.mark.parametrize("power", [1, 2, 3, 4, 5, -1])
def test_integer_pow(power):
    """Powers of parameters multiply on; powers of data above two are boundaries."""
    p, x = arrays((3, 2), (4, 3))
    assert_recipes_agree(lambda ps, xs: xs[0] @ lax.integer_pow(ps[0], power), [p], [x])
    assert_recipes_agree(lambda ps, xs: lax.integer_pow(xs[0] @ ps[0], power).sum(0), [p], [x])


@pytest.mark.parametrize("squared", [lax.square, lambda y: y * y])
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_square(squared, axes):
    p, b, x = arrays((3, 2), (2,), (4, 3))
    assert_recipes_agree(lambda ps, xs: squared(ps[0]).sum(axes), [p], [])
    assert_recipes_agree(lambda ps, xs: squared(xs[0] @ ps[0] + ps[1]).sum(axes), [p, b], [x])


WIDENING = [
    ((3, 4), (1, 4)),
    ((3, 4), (3, 1)),
    ((3, 1), (1, 4)),
    ((2, 1, 3), (1, 4, 1)),
    ((1,), (1,)),
]


@pytest.mark.parametrize(("a", "b"), WIDENING)
@pytest.mark.parametrize("operation", [lax.add, lax.sub, lax.mul, jnp.add, jnp.multiply])
def test_implicit_repetition(operation, a, b):
    """Axes of size 1 are repeated by the primitives themselves, either side."""
    for first, second in ((a, b), (b, a)):
        p, x = arrays(first, second)
        assert_recipes_agree(lambda ps, xs: operation(ps[0], xs[0]), [p], [x])
        assert_recipes_agree(lambda ps, xs: operation(xs[0], ps[0]), [p], [x])


LAYOUTS = [
    # shape and shape, contracting, batch
    ((2, 3), (3, 4), ((1,), (0,)), ((), ())),
    ((3, 2), (4, 3), ((0,), (1,)), ((), ())),
    ((2, 3, 4), (3, 5, 2, 4), ((2,), (3,)), ((0, 1), (2, 0))),
    ((2, 3, 4), (4, 2), ((2, 0), (0, 1)), ((), ())),
    ((2, 3), (2, 3), ((0, 1), (0, 1)), ((), ())),
    ((2, 3), (2, 3), ((), ()), ((1, 0), (1, 0))),
    ((2,), (3,), ((), ()), ((), ())),
    ((1, 3), (3, 1), ((1,), (0,)), ((0,), (1,))),
    ((1, 1), (1, 2), ((1,), (0,)), ((), ())),
    ((4, 1, 2), (1, 2, 4), ((1, 2), (0, 1)), ((0,), (2,))),
]


@pytest.mark.parametrize(("a", "b", "contracting", "batch"), LAYOUTS)
def test_dot_general(a, b, contracting, batch):
    x, w, again = arrays(a, b, (64, 2))
    flipped = (contracting[::-1], batch[::-1])

    def data_first(params, data):
        return before_a_product(
            lax.dot_general(data[0], params[0], (contracting, batch)), params[1]
        )

    def data_second(params, data):
        return before_a_product(lax.dot_general(params[0], data[0], flipped), params[1])

    assert_recipes_agree(data_first, [w, again], [x])
    assert_recipes_agree(data_second, [w, again], [x])


EINSUMS = {
    "bd,de->be": ((4, 3), (3, 2)),
    "bld,dhk->blhk": ((2, 3, 4), (4, 2, 3)),
    "blhk,hkd->bld": ((2, 3, 2, 3), (2, 3, 4)),
    "bhd,hde->bhe": ((4, 2, 3), (2, 3, 2)),
    "bij,jk->kib": ((2, 3, 4), (4, 2)),
    "bd,d->b": ((4, 3), (3,)),
    "bd,bd->": ((4, 3), (4, 3)),
    "b,d->bd": ((4,), (3,)),
    "bd,de->b": ((4, 3), (3, 2)),
    "bij,i->bj": ((2, 3, 4), (3,)),
    "bd,ed->ebd": ((4, 3), (2, 3)),
}


@pytest.mark.parametrize("spec", EINSUMS)
def test_einsum(spec):
    x, w = arrays(*EINSUMS[spec])
    assert_recipes_agree(lambda ps, xs: jnp.einsum(spec, xs[0], ps[0]), [w], [x])


def test_chain_of_einsums_is_one_recipe():
    def fn(params, data):
        heads = jnp.einsum("bld,dhk->blhk", data[0], params[0])
        return jnp.einsum("blhk,hkd->bld", heads, params[1])

    planned = assert_recipes_agree(fn, arrays((4, 2, 3), (2, 3, 4)), arrays((2, 3, 4)))
    assert len(planned.recipes) == 1


def test_product_of_two_activations_is_a_boundary_that_can_be_computed():
    def fn(params, data):
        return (data[0] @ params[0]) @ (data[0] @ params[0]).T

    planned = assert_recipes_agree(fn, arrays((3, 3)), arrays((4, 3)))
    (result,) = planned.body.outputs
    assert any(result in equation.outputs for equation in planned.boundaries)
    assert result in planned.bases


def test_cast_of_weights_up_keeps_the_wider_precision():
    """Weights stored in float32 and multiplied in float64 are not rounded to float32 in between."""
    narrow = [w.astype(jnp.float32) for w in arrays((5, 4), (4, 3))]

    def fn(params, data):
        return data[0] @ params[0].astype(jnp.float64) @ params[1].astype(jnp.float64)

    assert_recipes_agree(fn, narrow, arrays((6, 5)))


def test_cast_of_data_is_a_boundary():
    def fn(params, data):
        return (data[0] @ params[0]).astype(jnp.float32).astype(jnp.float64) @ params[1]

    planned = assert_recipes_agree(fn, arrays((5, 4), (4, 3)), arrays((6, 5)))
    assert planned.is_trivial


def test_product_in_another_precision_is_at_the_highest_asked():
    def fn(params, data):
        return jnp.matmul(data[0], params[0], precision="highest") @ params[1]

    planned = assert_recipes_agree(fn, arrays((5, 4), (4, 3)), arrays((6, 5)))
    (how,) = planned.recipes.values()
    assert how.expr.precision == lax.Precision.HIGHEST


def test_every_rule_is_exercised():
    """A new rule must be drawn by the random programs too."""
    used = {
        equation.name
        for seed in range(60)
        for equation in traced_body(random_program(seed)).equations
    }
    elsewhere = {"convert_element_type", "copy", "copy_p"}
    in_space = {"conv_general_dilated", "reduce_window_sum", "pad"}  # test_convolutions.py
    aliases = {"add_any", "expand_dims"}  # of gradients, and of what jax traces as other views
    assert set(RULES) - used <= elsewhere | aliases | in_space


def traced_body(program):
    return trace.flatten(jax.make_jaxpr(program)(*program.inputs()))


def test_a_second_rule_for_a_primitive_is_refused():
    with pytest.raises(ValueError, match="primitive 'dot_general' has a rule already"):
        register("dot_general")(lambda operands, eqn: operands[0])
