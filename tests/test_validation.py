"""Rewrites that are wrong, whatever is wrong about them: found by numbers, and left out."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from test_corners import normal, with_gradients

import fcjax
from fcjax.errors import RefutedError
from fcjax.expressions import algebra, deviations, windowed
from fcjax.laws import symmetries
from fcjax.merging import forming
from fcjax.numbers.drawing import Draw
from fcjax.numbers.interpreter import Interpreter, values_of
from fcjax.planning import rowwise
from fcjax.planning.plan import always_fold
from fcjax.rules import choice
from fcjax.rules.compress import Compression
from fcjax.rules.reduction import Reduction
from fcjax.running import evaluate, numerics, program
from fcjax.validation import bodies
from fcjax.validation.plans import RAISE

SHAPES = {
    "a": (8, 16), "b": (16, 4), "c": (4, 3), "d": (4, 8), "e": (16, 8), "g": (8,),
    "up": (3, 8, 16), "down": (3, 16, 8),
}  # fmt: skip
PARAMS = {name: normal(*shape, scale=0.3) for name, shape in SHAPES.items()}
X = normal(6, 8)


def chain(p, x):
    return jnp.tanh(x @ p["a"] @ p["b"] * 3.0) @ p["c"]


def sliced(p, x):
    return jnp.tanh((x @ p["a"])[:, 2:6] @ p["b"][2:6])


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3)


def normed(p, x):
    return (norm(x) * p["g"]) @ p["a"] @ p["b"]


def streamed(p, x):
    for _ in range(2):
        x = x + jnp.tanh((norm(x) * p["g"]) @ p["a"]) @ p["e"]
    return norm(x) @ p["a"]


def looped(p, x):
    return lax.scan(lambda h, _: (jnp.tanh(h @ p["a"] @ p["b"] @ p["d"]), None), x, None, 5)[0]


def layered(p, x):
    layers = (p["up"], p["down"])
    return lax.scan(lambda h, w: (jnp.tanh(h @ w[0] @ w[1]), None), x, layers)[0]


def rematerialised(p, x):
    return jax.checkpoint(lambda x: jnp.tanh(x @ p["a"] @ p["b"]))(x) @ p["c"]


def branched(p, x):
    return lax.cond(x[0, 0] > 9, lambda x: x @ p["a"] @ p["b"], lambda x: x[:, :4] * 2, x)


def looked_up(p, x):
    ids = jnp.arange(6).reshape(2, 3) % 4
    return jnp.cumsum(jnp.tanh(p["a"][ids] @ p["b"]), 1)


# --- ways to be wrong ---


def enlarged(fn):
    def made(*args, **kwargs):
        named = fn(*args, **kwargs)
        return dataclasses.replace(named, array=named.array * 1.01)

    return made


def begun_earlier(fn):
    def cut(expr, axis, start, limit, stride=1):
        return fn(expr, axis, start - 1, limit - 1, stride) if start else fn(expr, axis, 0, limit)

    return cut


def steeper(fn):
    """The right value with another derivative."""
    return lambda *args: 2 * fn(*args) - lax.stop_gradient(fn(*args))


def formed_larger(fn):
    def form(recipe, env):
        return {k: dataclasses.replace(v, array=v.array * 1.01) for k, v in fn(recipe, env).items()}

    return form


def other_branch(step, values):
    return program._run_cond(step, [1 - values[0], *values[1:]])


def fewer_turns(step, values):
    source = step.equation.source
    shorter = source.replace(params={**source.params, "length": 2})
    equation = dataclasses.replace(step.equation, source=shorter)
    return program._run_scan(dataclasses.replace(step, equation=equation), values)


def larger_rows(fn):
    def run(equations, env, tokens, count):
        fn(equations, env, tokens, count)
        last = list(equations)[-1].outputs[0]
        env[last] = env[last] * 1.01

    return run


# For each fault a network that has it: (network, module or object, name, how it is broken).
BROKEN = {
    "a product": (chain, evaluate, "product_of", enlarged),
    "an effective weight": (normed, evaluate, "whole_weight", enlarged),
    "a number that is lost": (chain, algebra, "scale", lambda fn: lambda expr, by: expr),
    "a slice": (sliced, windowed, "slice_axis", begun_earlier),
    "a derivative": (normed, numerics, "scaled_product", steeper),
    "a mean that is kept": (streamed, deviations, "deviation", lambda fn: lambda expr, axis: expr),
    "a crash": (normed, evaluate, "_linear", lambda fn: None),
    "what is formed before a loop": (looped, program, "form", formed_larger),
    "turns of a loop": (looped, program.NESTED, "scan", lambda fn: fewer_turns),
    "a branch": (branched, program.NESTED, "cond", lambda fn: other_branch),
    "inside a checkpoint": (rematerialised, evaluate, "product_of", enlarged),
    "rows before a look-up": (looked_up, rowwise, "run", larger_rows),
}


@pytest.fixture
def declined(monkeypatch):
    """Refuted rewrites are left out, as they are for users, instead of failing a test."""
    monkeypatch.delenv(RAISE)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_wrong_rewrite_is_left_out_and_the_report_says_so(fault, declined, monkeypatch):
    network, place, name, how = BROKEN[fault]
    expected = values_of(lambda p: with_gradients(network, p, (X,)), PARAMS)
    if isinstance(place, dict):
        monkeypatch.setitem(place, name, how(place[name]))
    else:
        monkeypatch.setattr(place, name, how(getattr(place, name)))
    with always_fold():
        fc = fcjax.front_contribute(network, PARAMS, X)
        found = values_of(lambda p: with_gradients(fc.apply, p, (X,)), fc.params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert fc.plan.refuted
    assert "a check on numbers refuted" in str(fc)


def test_a_wrong_rewrite_is_an_error_where_the_environment_asks(monkeypatch):
    monkeypatch.setattr(evaluate, "product_of", enlarged(evaluate.product_of))
    with (
        always_fold(),
        pytest.raises(RefutedError, match=r"off by 0\.01 of its size"),
    ):
        fcjax.front_contribute(chain, PARAMS, X)


def test_what_was_refuted_can_be_reported(declined, monkeypatch):
    monkeypatch.setattr(evaluate, "product_of", enlarged(evaluate.product_of))
    with always_fold():
        fc = fcjax.front_contribute(chain, PARAMS, X)
    (refuted,) = fc.plan.refuted
    assert "let" in refuted.program
    assert "in (" in refuted.program
    reasons = {row.path: row.reason for row in fc.report}
    assert "kept as written: a check on numbers refuted" in reasons["a"]
    assert {row.rule for row in fc.report} == {"train"}


def test_what_is_right_beside_it_is_kept(declined, monkeypatch):
    """Only the rewrite that is wrong is left out: here that of the slice."""

    def fn(p, x):
        return jnp.tanh(x @ p["a"] @ p["b"] * 3.0) @ p["c"], sliced(p, x)

    monkeypatch.setattr(windowed, "slice_axis", begun_earlier(windowed.slice_axis))
    with always_fold():
        fc = fcjax.front_contribute(fn, PARAMS, X)
    assert len(fc.plan.recipes) == 1
    assert len(fc.plan.refuted) == 1


@pytest.mark.parametrize("rows", [1, 4096])
def test_a_check_costs_as_much_for_many_rows_as_for_few(rows):
    """Numbers repeat themselves along axes that nothing looks at, so that sizes do not matter."""
    shapes = []
    seen = evaluate.product_of

    def product_of(*args):
        named = seen(*args)
        shapes.append(getattr(named.array, "period", named.array).size)
        return named

    with pytest.MonkeyPatch.context() as patch, always_fold():
        patch.setattr(evaluate, "product_of", product_of)
        fcjax.front_contribute(chain, PARAMS, jax.ShapeDtypeStruct((rows, 8), float))
    assert max(shapes) <= 64


# --- fewer weights ---

WRONG_REDUCTIONS = {
    "expanded otherwise": (Compression, "expand", lambda fn: lambda *args: 1.01 * fn(*args)),
    "reduced otherwise": (Compression, "reduce", lambda fn: lambda *args: 1.01 * fn(*args)),
    "followers with another sign": (
        Reduction,
        "running",
        lambda fn: lambda self, leaves, fixed: [-x for x in fn(self, leaves, fixed)],
    ),
}


def hidden_space(p, x):
    return x @ p["a"] @ p["b"]


def equal_magnitudes(p, x):
    return x * p["u"] * p["v"]


@pytest.mark.parametrize("fault", WRONG_REDUCTIONS)
def test_a_wrong_reduction_is_left_out_and_the_report_says_so(fault, declined, monkeypatch):
    monkeypatch.setattr(
        *WRONG_REDUCTIONS[fault][:2],
        WRONG_REDUCTIONS[fault][2](getattr(*WRONG_REDUCTIONS[fault][:2])),
    )
    network, params = hidden_space, {"a": normal(2, 16), "b": normal(16, 2)}
    if "followers" in fault:
        network, params = equal_magnitudes, {"u": normal(2), "v": -normal(2)}
    x = normal(6, 2)
    fc = fcjax.front_contribute(network, params, x, optimizer=optax.sgd(0.1))
    assert jax.tree.map(jnp.shape, fc.params) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(fc.apply(fc.params, x), network(params, x), rtol=1e-12)
    assert any("a check on numbers refuted" in row.reason for row in fc.report)


def test_a_space_that_backpropagation_leaves_is_refuted(monkeypatch):
    """Directions that are not trained must not change any output, to first order."""
    reach = choice.reach
    monkeypatch.setattr(choice, "reach", lambda *args: narrowed(reach(*args)))
    params = {"a": normal(2, 16), "b": normal(16, 2)}
    with pytest.raises(RefutedError, match=r"off by|in directions that are not trained"):
        fcjax.front_contribute(hidden_space, params, normal(6, 2), optimizer=optax.sgd(0.1))


def narrowed(reached):
    """One direction of every space less than backpropagation reaches."""
    bases = tuple(
        basis
        and dataclasses.replace(
            basis, columns=basis.columns[..., :-1], ranks=tuple(n - 1 for n in basis.ranks)
        )
        for basis in reached.bases
    )
    return dataclasses.replace(reached, bases=bases)


# --- merging ---

# Where effective weights of a merged network can be wrong: (network, object, name).
MISFORMED = {
    "a matrix": (chain, forming.Formed, "compute"),
    "behind a norm": (normed, forming.Formed, "compute"),
    "a product": (sliced, evaluate, "product_of"),
    "inside a loop": (layered, forming.Formed, "compute"),
}


@pytest.mark.parametrize("fault", MISFORMED)
def test_wrong_effective_weights_are_left_out_with_a_warning(fault, declined, monkeypatch):
    network, place, name = MISFORMED[fault]
    expected = values_of(network, PARAMS, X)
    right = getattr(place, name)
    how = enlarged(right) if place is evaluate else lambda *args: right(*args) * 1.01
    with always_fold():
        assert fcjax.merge(network, PARAMS, X).reason is None
        monkeypatch.setattr(place, name, how)
        with pytest.warns(UserWarning, match=r"refuted effective weights.*off by 0\.0"):
            merged = fcjax.merge(network, PARAMS, X)
        found = values_of(merged.apply, merged.params, X)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_wrong_effective_weights_are_an_error_where_the_environment_asks(monkeypatch):
    right = forming.Formed.compute
    monkeypatch.setattr(forming.Formed, "compute", lambda *args: right(*args) * 1.01)
    with always_fold(), pytest.raises(RefutedError, match=r"off by 0\.0"):
        fcjax.merge(chain, PARAMS, X)


# --- laws ---


def test_a_law_that_does_not_hold_is_not_claimed(monkeypatch):
    found = symmetries.find

    def with_a_wrong_one(body, kinds):
        (symmetry,) = found(body, kinds)
        (first, *others) = symmetry.places
        wrong = dataclasses.replace(first, charge=2 * first.charge)
        return symmetry, dataclasses.replace(symmetry, places=(wrong, *others))

    monkeypatch.setattr(symmetries, "find", with_a_wrong_one)
    params = {"a": normal(3, 4), "b": normal(4, 2)}
    laws = fcjax.conservation_laws(
        lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, normal(5, 3)
    )
    assert len(laws.groups) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_laws_of_what_is_rounded_on_the_way_are_not_claimed(dtype):
    params = {"a": normal(3, 4), "b": normal(4, 2)}

    def fn(p, x):
        return x @ p["a"] @ p["b"].astype(dtype).astype(float)

    assert len(fcjax.conservation_laws(fn, params, normal(5, 3))) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_laws_of_what_is_stored_in_half_precision_are_not_claimed(dtype):
    params = {"a": normal(3, 4).astype(dtype), "b": normal(4, 2).astype(dtype)}
    inputs = normal(5, 3).astype(dtype)
    assert len(fcjax.conservation_laws(lambda p, x: x @ p["a"] @ p["b"], params, inputs)) == 0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_numbers_that_are_added_up_round_as_they_may(dtype):
    params, x = {"a": normal(2, 2).astype(dtype)}, normal(2).astype(dtype)

    def fn(p, x):
        product = x @ p["a"]
        moved = product + 0.7
        return moved + 0.1 * (product - moved)

    assert not fcjax.front_contribute(fn, params, x).plan.refuted


def test_what_is_not_finite_says_nothing_about_the_size_of_the_rest():
    whole = Interpreter(Draw(set()).run).whole
    assert bodies._largest([whole(np.array([3.0, -np.inf, np.nan])), whole(np.ones(2))])[0] == 3.0


def test_what_cancels_in_a_loop_is_compared_with_what_goes_into_it():
    params = {"a": normal(8, 4)}

    def fn(p, x):
        def step(h, row):
            zero = x - jax.lax.stop_gradient(x)
            return ((zero.reshape(-1) @ p["a"]).reshape(2, 2),) * 2

        return jax.lax.scan(step, 0 * x[0], x)[1]

    with always_fold():
        fc = fcjax.front_contribute(fn, params, normal(2, 2, 2))
    assert not fc.plan.refuted


def test_keys_and_integers_among_the_parameters_are_left_alone():
    params = {"a": normal(8, 16), "b": normal(16, 4), "key": jax.random.key(0), "n": jnp.arange(3)}

    def fn(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"] + jax.random.normal(p["key"], (4,)) * p["n"].sum()

    fc = fcjax.front_contribute(fn, params, X, optimizer=optax.sgd(0.1))
    np.testing.assert_allclose(fc.apply(fc.params, X), fn(params, X), atol=1e-12)
    assert len(fcjax.conservation_laws(fn, params, X).groups) == 1
