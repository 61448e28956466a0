"""The lines that depend on the installed version of jax, and nothing else."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.extend.core as jex
from jax import lax
from jax.export import is_symbolic_dim, symbolic_shape
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.sharding import AxisType

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Var",
    "are_constrained",
    "bind",
    "bound_axes",
    "evaluated",
    "inner_jaxprs",
    "is_dropped",
    "is_placed",
    "open_jaxpr",
    "scan_layout",
    "symbols",
]


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Returns ``(jaxpr, consts)``; since jax 0.12 a closed jaxpr is a jaxpr with its consts."""
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on ``values`` exactly as jax itself would."""
    bind_params = eqn.primitive.get_bind_params(eqn.params)
    # a dict since jax 0.9.2; before, a pair of the callables to pass first and the dict
    if isinstance(bind_params, dict):
        outputs = eqn.primitive.bind(*values, **bind_params)
    else:
        functions, bind_params = bind_params
        outputs = eqn.primitive.bind(*functions, *values, **bind_params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def bound_axes() -> tuple[tuple[Any, int], ...]:
    """The names and sizes of the mapped axes around a call, which a trace may depend on."""
    return tuple((name, lax.axis_size(name)) for name in jex.unsafe_get_axis_names_DO_NOT_USE())


def symbols(dims: Iterable[Any]) -> dict[str, Any]:
    """The symbols in symbolic dimensions, by name."""
    scopes = {name: dim.scope for dim in dims for name in dim._get_vars()}
    return {name: symbolic_shape(name, scope=scopes[name])[0] for name in sorted(scopes)}


def are_constrained(dims: Iterable[Any]) -> bool:
    """Whether it is known of any symbolic dimension how large it can be."""
    return any(dim.scope._explicit_constraints for dim in dims)


def evaluated(dim: Any, numbers: dict[str, Any]) -> int:
    """A dimension with numbers for its symbols."""
    return int(dim._evaluate(numbers)) if is_symbolic_dim(dim) else int(dim)


def inner_jaxprs(eqn: JaxprEqn) -> list[Any]:
    """The jaxprs among an equation's parameters: bodies of loops, branches, calls."""
    listed = (x if isinstance(x, (tuple, list)) else [x] for x in eqn.params.values())
    return [x for values in listed for x in values if isinstance(x, (Jaxpr, ClosedJaxpr))]


def scan_layout(params: dict[str, Any]) -> tuple[int, int]:
    """Returns the number of loop constants and of carries of a scan equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax 0.12 describes them by a tree of trees
    return len(consts), len(carry)


def is_dropped(var: Var) -> bool:
    """Whether an equation's output is thrown away (``_`` in a printed jaxpr)."""
    return isinstance(var, jex.DropVar) if hasattr(jex, "DropVar") else str(var) == "_"


def is_placed(aval: Any) -> bool:
    """Whether a value's type says how it lies on a mesh, so that its shape is only a part of it."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    types = () if mesh is None or mesh.empty else mesh.axis_types
    return any(kind != AxisType.Auto for kind in types)
