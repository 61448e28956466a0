"""What the analysis must find in every network of the zoo: hand-annotated, to be read beside it.

An annotation holds at a useful size: `zoo` with 1024 times the rows; `zoo_conv` with 32 channels on
64 images of 32 x 32; `zoo_blocks` at width 256 with 1024 times the rows. It follows from what is
exact (the table in the README) and from the prices of time: a product of layers pays if it meets
the data with fewer multiplications or fewer arrays; a gain that moves into weights saves an array,
but behind a norm its rows' scale then stands on what these weights give, which must not be much
wider than the norm; the moments of BatchNorm pay in front of a map that does not contract.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ALONE = "nothing to merge it with"
DEARER = "the step would cost"


@dataclass(frozen=True)
class Golden:
    """The right answer for one network.

    segments: what makes up one effective weight (or kernel, or table) together, multiplied or
        added in one linear segment: names separated by blanks. A leaf may stand in several.
    left: for what is left as it is, part of the reason that the report must give.
    removed: what a subtracted mean removes, names separated by blanks.
    reduced: the shapes in which leaves are trained with SGD, where these are not their own; None
        if they are not trained.
    sizes: the builder's arguments, if not those of all networks beside it.
    """

    segments: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)
    removed: str = ""
    reduced: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    sizes: tuple[int, ...] | None = None


def golden(
    *segments: str, alone="", dearer="", left=None, removed="", reduced=None, sizes=None
) -> Golden:
    """An annotation: what is `alone` has nothing to merge with, what is `dearer` does not pay."""
    reasons = dict.fromkeys(alone.split(), ALONE) | dict.fromkeys(dearer.split(), DEARER)
    return Golden(segments, reasons | (left or {}), removed, reduced or {}, sizes)


def pair(up, down, inputs, hidden, outputs):
    """The shapes of two matrices with `hidden` directions between them."""
    return {up: (inputs, hidden), down: (hidden, outputs)}


def dense_pair(up, down, inputs, hidden, outputs):
    """The same of two Flax layers, the first with a bias."""
    kernels = pair(f"{up}/kernel", f"{down}/kernel", inputs, hidden, outputs)
    return {**kernels, f"{up}/bias": (hidden,)}


ZOO = {
    # chains: two layers in a row reach in + out directions of the space between (+ 1 with a bias)
    "linear_depth_1": golden(alone="0"),
    "linear_depth_2": golden("0 1", reduced=pair("0", "1", 6, 6 + 3, 3)),
    "linear_depth_4_biases": golden("*"),
    "linear_depth_12": golden("*"),
    "bottleneck_then_wide": golden(  # one segment, whether the waist of 2 is formed or not
        "*", reduced=pair("0", "1", 6, 6 + 2, 2) | pair("2", "3", 2, 2 + 6, 6)
    ),
    "residual_linear": golden(  # the third block would make 22 terms of 10, and 18 is the limit
        "Dense_0 Dense_1 Dense_2 Dense_3",
        "Dense_4 Dense_5 Dense_6",
        reduced=dense_pair("Dense_1", "Dense_0", 4, 4 + 4 + 1, 4)
        | dense_pair("Dense_3", "Dense_2", 4, 4 + 4 + 1, 4)
        | dense_pair("Dense_5", "Dense_4", 4, 4 + 4 + 1, 4),
    ),
    "parallel_branches": golden(
        "shallow middle deep",
        alone="readout",
        reduced=pair("middle/0", "middle/1", 4, 4 + 8, 8),
    ),
    "identity_branch": golden(
        "a b c d", alone="e", reduced=pair("a", "b", 4, 4 + 4, 4) | pair("c", "d", 4, 4 + 4, 4)
    ),
    "scales": golden("*", reduced=pair("w/0", "w/1", 4, 4 + 4, 4)),
    # layouts
    "dense_general": golden("*"),  # heads and their entries reach 4 and 8 directions each: all
    "einsum_layouts": golden("*"),
    "reshapes_and_transposes": golden("*", reduced={"a": (4, 4 + 5 * 2), "c": (5 * 14, 2)}),
    "mean_pooling": golden("*", reduced=pair("0", "1", 4, 4 + 3, 3)),
    "concatenate_before_dense": golden("a c d", alone="b"),
    "slices_after_dense": golden("a b c d"),  # x (a b + a c) + tanh(x a) d, one sum
    "embedding_then_linear": golden("*", reduced=pair("up", "down", 4, 4 + 3, 3)),
    # parameters
    "lora_stop_gradient": golden("*"),
    "adapter_beside_closed_over_weight": golden("a b", reduced=pair("a", "b", 4, 4 + 4, 4)),
    "tied_in_a_chain": golden("*"),
    "tied_autoencoder": golden("w", reduced={"w": (6, 6)}),
    "weight_normalisation": golden("*"),
    "integer_and_unused_leaves": golden(
        "w",
        left={"exponent": "its dtype is int32", "unused": "does not depend on it"},
        reduced={**pair("w/0", "w/1", 4, 4 + 3, 3), "exponent": None},
    ),
    # several segments, consumers, outputs
    "segments_between_activations": golden(
        *"0123",
        reduced={k: v for i in range(4) for k, v in pair(f"{i}/0", f"{i}/1", 4, 4 + 4, 4).items()},
    ),
    "several_consumers": golden("a b d", "a c"),
    "multi_output": golden("trunk", alone="head", reduced=pair("trunk/0", "trunk/1", 4, 4 + 4, 4)),
    "relu_mlp": golden(alone="*"),
    "gated_linear_unit": golden(alone="*"),
    # normalisations
    "layer_norm_then_dense": golden("LayerNorm_0 Dense_1", alone="Dense_0"),
    "rms_norm_then_dense": golden("RMSNorm_0 Dense_1", alone="Dense_0"),
    "group_norm_then_dense": golden(  # a scale for each group is not deferred; the gain moves on
        "GroupNorm_0 Dense_1", alone="Dense_0"
    ),
    "layer_norm_then_chain": golden("*"),
    "dense_norm_dense": golden(
        "layers_0 layers_1",
        "layers_2 layers_3 layers_4",
        reduced=dense_pair("layers_0", "layers_1", 4, 4 + 4 + 1, 4)
        | dense_pair("layers_3", "layers_4", 4, 4 + 3 + 1, 3),
    ),
    "wide_dense_norm_dense": golden("layers_0", "layers_1"),
    "pre_norm_stack": golden(
        "LayerNorm_0 Dense_0",
        "scale_0 Dense_1",
        "LayerNorm_1 Dense_2",
        "scale_1 Dense_3",
        "LayerNorm_2 Dense_4",
    ),
    "pre_norm_stack_with_its_stream": golden(
        "LayerNorm_0 Dense_0",
        "scale_0 Dense_1",
        "LayerNorm_1 Dense_2",
        "scale_1 Dense_3",
        "LayerNorm_2 Dense_4",
    ),
    "batch_norm_training": golden("Dense_0 BatchNorm_0", alone="Dense_1"),
    "batch_norm_training_after_bias": golden(
        "Dense_0/kernel BatchNorm_0", alone="Dense_1", removed="Dense_0/bias"
    ),
    "batch_norm_branches": golden(
        "Dense_0 Dense_1 Dense_2 BatchNorm_0 BatchNorm_1 BatchNorm_2",
        alone="Dense_3",
        reduced=pair("Dense_1/kernel", "Dense_0/kernel", 4, 4 + 4, 4),
    ),
    "batch_norm_inference": golden(  # statistics that are arguments are data, and scale data
        "BatchNorm_0/bias Dense_1", alone="BatchNorm_0/scale Dense_0"
    ),
    # attention
    "attention": golden(dearer="*"),
    "transformer_block": golden(
        "LayerNorm_0 MultiHeadDotProductAttention_0/query",
        "LayerNorm_0 MultiHeadDotProductAttention_0/key",
        "LayerNorm_0 MultiHeadDotProductAttention_0/value",
        "LayerNorm_1 Dense_1",
        "LayerNorm_2 Dense_2",
        alone="MultiHeadDotProductAttention_0/out Dense_0",
        sizes=(256,),
    ),
    "gpt": golden(
        "LayerNorm_0 MultiHeadDotProductAttention_0/query",
        "LayerNorm_0 MultiHeadDotProductAttention_0/key",
        "LayerNorm_0 MultiHeadDotProductAttention_0/value",
        "LayerNorm_1 Dense_1",
        "LayerNorm_2 Embed_0",
        alone="Dense_0",
        dearer="MultiHeadDotProductAttention_0/out positions",
        sizes=(256, 1024),
    ),
    # program structure
    "nested_jit": golden("*"),
    "vmap_inside": golden(  # one basis for all members would need 3 * (4 + 2) of 16 directions
        "row", "ensemble", reduced=pair("row/0", "row/1", 4, 4 + 4, 4)
    ),
    "checkpoint": golden(
        "0 1", "2 3", reduced=pair("0", "1", 4, 4 + 4, 4) | pair("2", "3", 4, 4 + 3, 3)
    ),
    "linen_remat": golden(
        "CheckpointLinearPair_0",
        "CheckpointLinearPair_1",
        alone="Dense_0",
        reduced={
            f"CheckpointLinearPair_{i}/{leaf}": shape
            for i in range(2)
            for leaf, shape in dense_pair("Dense_1", "Dense_0", 4, 4 + 4 + 1, 4).items()
        },
    ),
    "scan_over_layers": golden("*", reduced={"up": (3, 4, 4 + 4), "down": (3, 4 + 4, 4)}),
    "recurrent_scan": golden("in mix state", alone="out", reduced=pair("in", "mix", 4, 4 + 4, 4)),
    "linen_scan": golden(
        "ScanPairStep_0",
        alone="Dense_0",
        reduced={
            f"ScanPairStep_0/LinearPair_0/{leaf}": (3, *shape)
            for leaf, shape in dense_pair("Dense_1", "Dense_0", 4, 4 + 4 + 1, 4).items()
        },
    ),
    "cond": golden(
        "a b",
        "d e",
        alone="c",
        reduced=pair("a", "b", 4, 4 + 4, 4) | pair("d", "e", 4, 4 + 3, 3),
    ),
    "custom_jvp_activation": golden(
        "0 1", "2 3", reduced=pair("0", "1", 4, 4 + 4, 4) | pair("2", "3", 4, 4 + 3, 3)
    ),
    "custom_vjp_activation": golden(
        "0 1", "2 3", reduced=pair("0", "1", 4, 4 + 4, 4) | pair("2", "3", 4, 4 + 3, 3)
    ),
    "custom_vjp_identity": golden(
        "0 1", "2 3", reduced=pair("0", "1", 4, 4 + 4, 4) | pair("2", "3", 4, 4 + 3, 3)
    ),
    # frameworks
    "nnx_chain": golden(
        "up down",
        "out",
        reduced=dense_pair("up", "down", 4, 4 + 4 + 1, 4)
        | dense_pair("out/layers/0", "out/layers/1", 4, 4 + 3 + 1, 3),
    ),
    "nnx_norm_block": golden("norm up", alone="down"),
    "equinox_chain": golden(
        "layers/0 layers/1",
        "layers/3 layers/4",
        reduced={
            "layers/0/weight": (4 + 4 + 1, 4),
            "layers/0/bias": (4 + 4 + 1,),
            "layers/1/weight": (4, 4 + 4 + 1),
            "layers/3/weight": (4 + 3 + 1, 4),
            "layers/3/bias": (4 + 3 + 1,),
            "layers/4/weight": (3, 4 + 3 + 1),
        },
    ),
    "equinox_mlp": golden(alone="*"),
    # time, autoencoders (zoo_time)
    "linear_rnn": golden(
        "LinearCell_0",
        alone="Dense_0",
        reduced=dense_pair("LinearCell_0/up", "LinearCell_0/down", 4, 4 + 4 + 1, 4),
    ),
    "state_space": golden(
        "a b1 b2",
        "c1 c2",
        reduced=dense_pair("b1", "b2", 3, 3 + 4 + 1, 4)
        | pair("c1/kernel", "c2/kernel", 4, 4 + 3, 3),
    ),
    "variational_autoencoder": golden(
        "Dense_2 Dense_1",
        "Dense_5 Dense_4",
        alone="Dense_0 Dense_3",
        reduced=pair("Dense_2/kernel", "Dense_1/kernel", 8, 8 + 2, 2)
        | pair("Dense_5/kernel", "Dense_4/kernel", 2, 2 + 6, 6),
    ),
    "nonlinear_tied_autoencoder": golden("encoder mix", alone="bias"),
}

CONVOLUTIONS = {
    "rep_vgg": golden("Conv_0 Conv_1", "Conv_2 Conv_3"),
    "rep_vgg_batch_norm": golden(
        "Conv_1 BatchNorm_0 BatchNorm_1 BatchNorm_2",
        "Conv_3 BatchNorm_3 BatchNorm_4 BatchNorm_5",
        alone="Conv_0 Conv_2",
    ),
    "rep_vgg_inference": golden(
        "Conv_0 Conv_1 BatchNorm_0 BatchNorm_1 BatchNorm_2",
        "Conv_2 Conv_3 BatchNorm_3 BatchNorm_4 BatchNorm_5",
    ),
    "diverse_branches": golden("*"),
    "ac_net": golden("*"),
    "mobile_one": golden("Conv_0 Conv_1 Conv_2", "Conv_3 Conv_4"),
    "expand_net": golden("Conv_0 Conv_1 Conv_2", "Conv_3 Conv_4 Conv_5"),
    "expand_net_valid": golden("*"),
    "do_conv": golden(left={"*": "by the network itself"}),
    "pooled": golden(
        "Conv_0",
        "Conv_1 Dense_0",
        reduced={"Conv_1/kernel": (1, 1, 32, 32 + 3), "Dense_0/kernel": (32 + 3, 3)},
    ),
    "res_net_bottleneck": golden(
        "Conv_0 BatchNorm_0",
        "Conv_2 BatchNorm_2 Conv_3 BatchNorm_3",
        alone="Conv_1 BatchNorm_1",
    ),
    "res_net_bottleneck_inference": golden(  # two products would stand beside one sum
        "Conv_0 BatchNorm_0",
        "Conv_1 BatchNorm_1",
        "Conv_2 BatchNorm_2 BatchNorm_3",
        dearer="Conv_3",
    ),
    "inverted_bottleneck": golden(
        "Conv_0 BatchNorm_0",
        alone="Conv_1 BatchNorm_1",
        dearer="Conv_2 BatchNorm_2",
    ),
    "inverted_bottleneck_inference": golden(
        "Conv_0 BatchNorm_0", "Conv_1 BatchNorm_1", "Conv_2 BatchNorm_2"
    ),
    "conv_next": golden(  # Dense_1 is four times as wide as the norm
        "Dense_0 gamma", alone="Conv_0", dearer="LayerNorm_0 Dense_1"
    ),
    "u_net": golden(  # what the transposed convolution gives meets Conv_3 by phases
        "ConvTranspose_0 Conv_2 Conv_3", alone="Conv_0 Conv_1"
    ),
    "decoder": golden("Conv_1", alone="Conv_0 Conv_2"),  # by phases of the small rows
    "circular": golden("*"),
    "tied_autoencoder": golden("kernel"),
    "nnx_rep": golden("point norms", "up space down", alone="wide"),
}

BLOCKS = {
    "gpt_block": golden(
        "Block_0/norm_1 Block_0/q",
        "Block_0/norm_1 Block_0/k",
        "Block_0/norm_1 Block_0/v",
        "Block_0/norm_2 Block_0/up",
        "LayerNorm_0 Embed_0",
        alone="Block_0/down",
        dearer="positions Block_0/o",
    ),
    # the gain of norm_1 would need the product of tokens that a frozen kernel's gradient does not
    "gpt_block_with_adapters": golden(
        "Block_0/q",
        "Block_0/k",
        "Block_0/v",
        "Block_0/o",
        "Block_0/norm_2 Block_0/up",
        "LayerNorm_0 Embed_0",
        alone="Block_0/down",
        dearer="positions Block_0/norm_1",
    ),
    "factorised_encoder": golden(
        "Embed_0 Dense_0 LayerNorm_0 Block_0/norm_1 Block_0/q Block_0/k Block_0/v",
        "Block_0/norm_1 Block_0/q",
        "Block_0/norm_1 Block_0/k",
        "Block_0/norm_1 Block_0/v",
        "Block_0/norm_2 Block_0/up",
        "Block_0/down Dense_1",
        alone="Block_0/o",
    ),
    "vision_transformer": golden(
        "Block_0/norm_1 Block_0/q",
        "Block_0/norm_1 Block_0/k",
        "Block_0/norm_1 Block_0/v",
        "Block_0/norm_2 Block_0/up",
        "norm head",
        alone="patch Block_0/down",
        dearer="positions Block_0/o",
        left={"class_token": "read by concatenate"},  # beside patches on two merged axes of space
    ),
    "nnx_transformer_block": golden("norm_1 qkv", "norm_2 up", alone="out down"),
    # patch gives far more channels than it reads, so norm_1 and the stream are formed from patches;
    # a mean over tokens, each of which norm scales, is no linear map of what norm reads
    "mlp_mixer": golden(
        "patch norm_1", "patch down_1", "norm_2 up_2", alone="up_1 down_2 norm head"
    ),
    "scanned_feed_forward": golden("stack/norm stack/up", alone="stack/down head"),
    "nnx_scan_over_blocks": golden(
        "blocks",
        alone="out",
        reduced={
            "blocks/up/kernel": (3, 64, 129),
            "blocks/up/bias": (3, 129),
            "blocks/down/kernel": (3, 129, 64),
        },
        sizes=(64,),
    ),
    "mixture_of_experts": golden(  # the experts' own bases, of 64 + 64 + 1, are not looked for
        "up down", alone="gate head", sizes=(64,)
    ),
    "batch_norm_over_a_mapped_axis": golden(
        "up mid",
        alone="gain shift down",
        reduced=pair("up", "mid", 64, 64 + 65, 65),
        sizes=(64,),
    ),
}
