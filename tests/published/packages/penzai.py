"""Networks of Penzai."""

from __future__ import annotations

from typing import Any

import jax
from penzai import pz
from penzai.models.simple_mlp import MLP
from penzai.models.transformer.variants.llamalike_common import (
    LlamalikeTransformerConfig,
    build_llamalike_transformer,
)

from ..models import Made, below, model, numbers


def penzai(net: Any, call: Any, *inputs: Any) -> Made:
    """A Penzai model; ``call(net, *inputs)`` names the axes."""
    unbound, variables = pz.unbind_params(net)
    start = {v.label: v.value for v in variables}

    def apply(params: Any, state: Any, *inputs: Any) -> Any:
        values = [
            pz.ParameterValue(label=label, value=value, metadata={})
            for label, value in params.items()
        ]
        return call(pz.bind_variables(unbound, values), *inputs)

    return Made(apply, lambda: (start, ()), inputs)


@model("Penzai MLP")
def mlp(dtype: Any, train: bool) -> Made:
    net = MLP.from_config(init_base_rng=jax.random.key(0), feature_sizes=[6, 12, 8, 3])
    call = lambda net, x: net(pz.nx.wrap(x).tag("batch", "features")).unwrap("batch", "features")  # noqa: E731
    return penzai(net, call, numbers(5, 6))


@model("Penzai Llama")
def llama(dtype: Any, train: bool) -> Made:
    config = LlamalikeTransformerConfig(
        num_kv_heads=2, query_head_multiplier=2, embedding_dim=16, projection_dim=4,
        mlp_hidden_dim=24, num_decoder_blocks=2, vocab_size=40, mlp_variant="swiglu",
        tie_embedder_and_logits=False, parameter_dtype=dtype, activation_dtype=dtype,
    )  # fmt: skip
    net = build_llamalike_transformer(config, init_base_rng=jax.random.key(0))

    def call(net: Any, tokens: Any) -> Any:
        named = pz.nx.wrap(tokens).tag("batch", "seq")
        positions = pz.nx.arange("seq", tokens.shape[1])
        return net(named, token_positions=positions).unwrap("batch", "seq", "vocabulary")

    return penzai(net, call, below(40, 3, 8))
