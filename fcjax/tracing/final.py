"""Which parameters stand before the final layer."""

from collections.abc import Mapping, Sequence, Set

from fcjax.tracing import trace
from fcjax.tracing.trace import Body, Kind, Value, nested_bodies

__all__ = ["before_final", "hidden_leaves"]

LAYERS = ("dot_general", "conv_general_dilated")


def before_final(
    body: Body, known: Mapping[Value, Kind], count: int, products: Sequence[str] = LAYERS
) -> list[int]:
    """The trainable parameters that something behind them multiplies with further parameters.

    Args:
      body: the network; its first ``count`` inputs are the parameters.
      known: what each value depends on.
      count: the number of parameters.
      products: the primitives that count as a layer.

    Returns:
      their numbers.
    """
    numbers = {value: i for i, value in enumerate(body.inputs[:count])}
    behind: dict[Value, Set[int]] = {
        value: {i} for value, i in numbers.items() if known[value].trainable
    }
    before: set[int] = set()
    for equation in body.equations:
        reached = frozenset().union(*(behind.get(v, ()) for v in equation.values))
        is_layer = equation.name in products or nested_bodies(equation, dict(known))
        if is_layer and any(known[v].of == "param" for v in equation.values):
            data = [v for v in equation.values if known[v].of == "data"]
            before.update(*(behind.get(v, ()) for v in data))
        behind.update({v: reached for v in equation.outputs if v is not None})
    return sorted(before)


def hidden_leaves(body: Body, kinds: Sequence[Kind], count: int) -> list[int]:
    """The numbers of the trainable parameters that stand before the final layer.

    The final layer is the last product with a parameter, an elementwise one included.

    Args:
      body: the network; its first ``count`` inputs are the parameters.
      kinds: what each of its inputs is.
      count: the number of parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> kinds = [Kind("param", True), Kind("param", True), Kind("data", False)]
      >>> jaxpr = jax.make_jaxpr(lambda v, w, x: jnp.tanh(x @ v) @ w)(*[jnp.eye(2)] * 3)
      >>> hidden_leaves(trace.flatten(jaxpr), kinds, 2)
      [0]
    """
    return before_final(body, trace.kinds(body, kinds), count, (*LAYERS, "mul"))
