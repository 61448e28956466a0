"""Jaxprs evaluated on numbers, equation by equation.

What has no rule here runs as jax itself runs it, on whole arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcjax import compat
from fcjax.numbers import entrywise, gathering, layout, sums  # noqa: F401  (they register rules)
from fcjax.numbers.periodic import NOWHERE, Array, Numbers, Run, stored
from fcjax.numbers.rules import RULES

__all__ = ["Interpreter", "Unevaluated", "values_of"]

Value = Any
"""Numbers, or what only jax can hold: keys of random numbers."""
CALLS = {
    "jit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "remat2": "jaxpr",
    "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
}  # fmt: skip
"""Calls of one jaxpr with the operands, and under which parameter it stands."""


class Unevaluated(Exception):  # noqa: N818 (an answer, not a failure)
    """An equation that means more than its numbers, such as a callback."""


def values_of(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns, traced by jax and evaluated by numpy in double precision.

    Args:
      function: a function that jax can trace.
      *args: pytrees of arrays.

    Returns:
      a pytree of numpy arrays: floats as float64, rounded only where the program narrows them.

    Example:
      >>> import jax.numpy as jnp
      >>> float(values_of(lambda x: jnp.cos(x) @ x, jnp.zeros(3)))
      0.0
    """
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    found = Interpreter(Run()).evaluate(jaxpr, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), [_array(x) for x in found])


def _array(value: Value) -> Any:
    return value.full() if isinstance(value, Numbers) else value


class Interpreter:
    """Evaluates jaxprs and their equations.

    Attributes:
      run: what all its numbers share.
      turns: how many turns of a loop over arrays are taken, None for all. What is not reached is
        zero: enough to compare two loops of one length.
    """

    def __init__(self, run: Run, turns: int | None = None) -> None:
        self.run = run
        self.turns = turns

    def whole(self, array: Any) -> Value:
        """An array of which nothing repeats itself; numbers as they are."""
        if isinstance(array, Numbers):
            return array
        dtype = array.dtype if hasattr(array, "dtype") else jnp.result_type(array)
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            return array
        values = stored(np.asarray(array), dtype)
        sources = (NOWHERE,) * values.ndim
        return Numbers(values, values.shape, np.dtype(dtype), sources, self.run)

    def evaluate(self, jaxpr: Any, inputs: Sequence[Any]) -> list[Value]:
        """The results of a (closed) jaxpr.

        Args:
          jaxpr: the jaxpr.
          inputs: arrays or numbers, one for each of its inputs.

        Raises:
          Unevaluated: if it calls back into Python.
        """
        opened, consts = compat.open_jaxpr(jaxpr)
        names = [*opened.constvars, *opened.invars]
        given = map(self.whole, [*consts, *inputs])
        env: dict[Any, Value] = dict(zip(names, given, strict=True))
        with np.errstate(all="ignore"):
            for eqn in opened.eqns:
                made = self.apply(eqn, [self._read(env, atom) for atom in eqn.invars])
                env |= dict(zip(eqn.outvars, made, strict=True))
        return [self._read(env, atom) for atom in opened.outvars]

    def compute(self, equations: Iterable[Any], env: dict[Any, Value]) -> None:
        """Evaluates the equations of a body; what they make is added to ``env``.

        Args:
          equations: ``tracing.trace.Equation``, in an order in which they can be computed.
          env: arrays or numbers of what they read, by its values.
        """
        for equation in equations:
            operands = [a.val if isinstance(a, compat.Literal) else env[a] for a in equation.inputs]
            with np.errstate(all="ignore"):
                made = self.apply(equation.source, list(map(self.whole, operands)))
            env.update((v, x) for v, x in zip(equation.outputs, made, strict=True) if v is not None)

    def results(self, body: Any, inputs: Sequence[Any]) -> list[Value]:
        """The results of a body, given arrays or numbers for its inputs."""
        env: dict[Any, Value] = dict(body.constants)
        env |= dict(zip(body.inputs, inputs, strict=True))
        self.compute(body.equations, env)
        return [self.whole(self._read(env, atom)) for atom in body.outputs]

    def _read(self, env: dict[Any, Value], atom: Any) -> Value:
        return self.whole(atom.val) if isinstance(atom, compat.Literal) else env[atom]

    def apply(self, eqn: compat.JaxprEqn, values: Sequence[Value]) -> list[Value]:
        """The results of one equation, given its operands."""
        name = eqn.primitive.name
        special = LOOPS.get(name)
        if special is not None:
            return special(self, eqn, list(values))
        if name in CALLS and CALLS[name] in eqn.params:
            return self.evaluate(eqn.params[CALLS[name]], values)
        rule = RULES.get(name)
        if rule is None or not all(isinstance(x, Numbers) for x in values):
            return self._by_jax(eqn, values)
        made = rule(eqn.params, *values)
        listed = made if eqn.primitive.multiple_results else [made]
        return [
            x if isinstance(x, Numbers) else self._as(x, var.aval)
            for x, var in zip(listed, eqn.outvars, strict=True)
        ]

    def _as(self, array: Array, aval: Any) -> Numbers:
        sources = (NOWHERE,) * array.ndim
        return Numbers(stored(array, aval.dtype), array.shape, aval.dtype, sources, self.run)

    def _by_jax(self, eqn: compat.JaxprEqn, values: Sequence[Value]) -> list[Value]:
        if eqn.effects or "callback" in eqn.primitive.name:
            if not eqn.outvars:
                return []
            raise Unevaluated(eqn.primitive.name)
        with jax.ensure_compile_time_eval():  # numbers, also while something else is traced
            return [self.whole(x) for x in compat.bind(eqn, [_as_jax(x) for x in values])]

    # --- control flow ---------------------------------------------------------------------------

    def _scan(self, eqn: compat.JaxprEqn, values: list[Value]) -> list[Value]:
        params = eqn.params
        consts, carry = compat.scan_layout(params)
        fixed, state, rows = (
            values[:consts],
            values[consts : consts + carry],
            values[consts + carry :],
        )
        length = params["length"]
        order = range(length)[:: -1 if params["reverse"] else 1][: self.turns]
        outputs: dict[int, list[Value]] = {}
        for i in order:
            found = self.evaluate(params["jaxpr"], [*fixed, *state, *(_entry(x, i) for x in rows)])
            state, outputs[i] = found[:carry], found[carry:]
        avals = [var.aval for var in eqn.outvars[carry:]]
        stacked = [
            self._stacked({i: own[k] for i, own in outputs.items()}, length, aval)
            for k, aval in enumerate(avals)
        ]
        return [*state, *stacked]

    def _stacked(self, rows: dict[int, Value], length: int, aval: Any) -> Value:
        if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
            return jnp.stack([rows[i] for i in range(length)])
        blank = self._as(np.zeros(aval.shape[1:], aval.dtype), aval)
        wide = [layout.reshape(rows.get(i, blank), (1, *aval.shape[1:])) for i in range(length)]
        return layout.concatenate(wide, 0) if wide else self._as(np.zeros(aval.shape), aval)

    def _while(self, eqn: compat.JaxprEqn, values: list[Value]) -> list[Value]:
        params = eqn.params
        of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
        tested, fixed = values[:of_cond], values[of_cond : of_cond + of_body]
        state = values[of_cond + of_body :]
        while _number(self.evaluate(params["cond_jaxpr"], [*tested, *state])[0]):
            state = self.evaluate(params["body_jaxpr"], [*fixed, *state])
        return state

    def _cond(self, eqn: compat.JaxprEqn, values: list[Value]) -> list[Value]:
        branches = eqn.params["branches"]
        which = min(max(int(_number(values[0])), 0), len(branches) - 1)
        return self.evaluate(branches[which], values[1:])


LOOPS: dict[str, Callable[[Interpreter, Any, list[Value]], list[Value]]] = {
    "scan": Interpreter._scan,
    "while": Interpreter._while,
    "cond": Interpreter._cond,
}


def _number(value: Value) -> Any:
    """A scalar."""
    return value.period.reshape(-1)[0].real


def _entry(x: Value, i: int) -> Value:
    if not isinstance(x, Numbers):
        return x[i]
    x.run.looked_at.update(x.sources[0])
    return x.like(x.period[i % x.period.shape[0]], x.shape[1:], x.sources[1:])


def _as_jax(value: Value) -> Any:
    if not isinstance(value, Numbers):
        return value
    array = value.full()
    real = array.real if np.iscomplexobj(array) and not _is_complex(value.dtype) else array
    return jnp.asarray(real.astype(value.dtype), value.dtype)


def _is_complex(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))
