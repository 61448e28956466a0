"""Graph networks of jraph; as in its examples, Haiku makes what acts on nodes and edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import jraph

from ..adapters import haiku
from ..models import Made, below, model, numbers

NODES, EDGES = 10, 24
GRAPH = (
    numbers(NODES, 6), numbers(EDGES, 4), numbers(1, 3),
    below(NODES, EDGES), below(NODES, EDGES, seed=1),
)  # fmt: skip


def on_graph(net: Callable[[jraph.GraphsTuple], jraph.GraphsTuple]) -> Made:
    """A network that is called with the arrays of one graph."""

    def apply(nodes: Any, edges: Any, context: Any, senders: Any, receivers: Any) -> Any:
        counts = {"n_node": jnp.array([NODES]), "n_edge": jnp.array([EDGES])}
        links = {"senders": senders, "receivers": receivers}
        graph = net(jraph.GraphsTuple(nodes, edges, globals=context, **links, **counts))
        return graph.nodes, graph.edges, graph.globals

    return haiku(apply, *GRAPH)


def joined(width: int) -> Any:
    """An MLP on what a node, an edge or a graph sees."""

    @jraph.concatenated_args
    def update(features: Any) -> Any:
        return hk.nets.MLP([16, width])(features)

    return update


@model("GraphNetwork", batched=False)
def graph_network(dtype: Any, train: bool) -> Made:
    def net(graph: jraph.GraphsTuple) -> jraph.GraphsTuple:
        embed = jraph.GraphMapFeatures(hk.Linear(8), hk.Linear(8), hk.Linear(8))
        return jraph.GraphNetwork(joined(8), joined(8), joined(4))(embed(graph))

    return on_graph(net)


@model("InteractionNetwork", batched=False)
def interaction_network(dtype: Any, train: bool) -> Made:
    def net(graph: jraph.GraphsTuple) -> jraph.GraphsTuple:
        made = jraph.InteractionNetwork(joined(8), joined(6), jraph.segment_mean, True)
        return made(made(graph))

    return on_graph(net)


@model("GCN", batched=False)
def gcn(dtype: Any, train: bool) -> Made:
    def net(graph: jraph.GraphsTuple) -> jraph.GraphsTuple:
        graph = jraph.GraphConvolution(hk.nets.MLP([16, 12]), add_self_edges=True)(graph)
        graph = graph._replace(nodes=jax.nn.relu(graph.nodes))
        return jraph.GraphConvolution(hk.Linear(5))(graph)

    return on_graph(net)


@model("GAT", batched=False)
def gat(dtype: Any, train: bool) -> Made:
    def net(graph: jraph.GraphsTuple) -> jraph.GraphsTuple:
        for width in (12, 5):
            logit = lambda sent, received, _: hk.Linear(1)(  # noqa: E731
                jnp.concatenate([sent, received], axis=1)
            )
            graph = jraph.GAT(hk.Linear(width), logit, jax.nn.leaky_relu)(graph)
        return graph

    return on_graph(net)
