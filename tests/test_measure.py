"""Measurements whose result is known beforehand."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcjax import measure

F32 = jnp.float32


def test_functions_take_turns_and_each_turn_is_two_runs():
    calls = []
    fns = {name: lambda x, name=name: calls.append(name) for name in ("a", "b")}
    timings = measure.compare_steps(fns, (1,), repeats=3)
    turns = [calls[i : i + 2] for i in range(3, len(calls), 2)]
    assert all(first == second for first, second in turns)
    rounds = [sorted(first for first, _ in turns[i : i + 3]) for i in (0, 3, 6)]
    assert rounds == [["a", "a", "b"]] * 3
    assert len(calls) == 3 + 2 * 9
    assert {name: len(times) for name, times in timings.seconds.items()} == {
        "a": 3,
        "a (again)": 3,
        "b": 3,
    }


def test_ratios_and_spread():
    seconds = {
        "slow": np.array([4.0, 2.0, 3.0]),
        "slow (again)": np.array([3.0, 2.2, 3.3]),
        "fast": np.array([1.0, 1.5, 1.2]),
    }
    timings = measure.Timings(seconds, "slow")
    assert timings.best("slow") == 2.0
    assert timings.median("fast") == 1.2
    assert timings.ratio("fast") == pytest.approx(2.5)
    assert timings.best_ratio("fast") == pytest.approx(2.0)
    assert timings.aa_spread == pytest.approx(1 - 2 / 2.2)


def test_a_slower_function_is_found_slower():
    fns = {"sleeps": lambda: time.sleep(0.005), "returns": lambda: None}
    timings = measure.compare_steps(fns, (), repeats=5)
    assert timings.best("sleeps") >= 0.005
    assert timings.ratio("returns") > 2


@pytest.mark.parametrize(("fns", "repeats"), [({}, 3), ({"a": abs}, 0)])
def test_nothing_to_time(fns, repeats):
    with pytest.raises(ValueError, match="at least one function and at least one repeat"):
        measure.compare_steps(fns, (1,), repeats)


def test_memory_of_arguments_and_results():
    x = jax.ShapeDtypeStruct((256, 4), F32)
    memory = measure.compiled_memory(lambda x: (x + 1, x.sum()), x)
    assert memory.argument == 4096
    assert 4096 + 4 <= memory.output <= 4096 + 64
    assert memory.total == memory.argument + memory.output + memory.temp - memory.alias


def test_a_donated_argument_is_aliased():
    x = jax.ShapeDtypeStruct((1024,), F32)
    assert measure.compiled_memory(jax.jit(lambda x: x + 1, donate_argnums=0), x).alias == 4096
    assert measure.compiled_memory(jax.jit(lambda x: x + 1), x).alias == 0


def test_backend_without_memory_analysis():
    class Silent:
        def memory_analysis(self):
            return None

    with pytest.raises(RuntimeError, match="no memory analysis"):
        measure.memory_of(Silent())


def test_residuals_of_a_chain():
    def chain(weights, x):
        for w in weights:
            x = x @ w
        return x

    weights = [jax.ShapeDtypeStruct((4, 4), F32)] * 3
    x = jax.ShapeDtypeStruct((100, 4), F32)
    # Three layer inputs, and the weights behind the first.
    assert measure.residual_bytes(chain, weights, x) == 4 * (3 * 400 + 2 * 16)


def test_an_array_saved_twice_counts_once():
    x = jax.ShapeDtypeStruct((100,), F32)
    scale = jax.ShapeDtypeStruct((), F32)
    assert (
        measure.residual_bytes(lambda w, x: w["a"] * x + w["b"] * x, {"a": scale, "b": scale}, x)
        == 400
    )


def test_integer_parameters_save_nothing():
    params = {"w": jnp.ones((3, 3), F32), "i": jnp.arange(3)}
    x = jnp.ones((5, 3), F32)
    assert measure.residual_bytes(lambda p, x: x @ p["w"] + p["i"], params, x) == 60
