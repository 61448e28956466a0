"""The families of random programs, and what must hold for each of their programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .comparing import Check
from .domains import FLAG, Among, Some
from .drawing import Palette
from .measures import DERIVATIVES


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of random programs.

    Attributes:
      palette: what they are made of.
      checks: what must hold, given a program's settings.
    """

    palette: Palette
    checks: Callable[[Mapping[str, Any]], Sequence[Check]]


LINEAR = {
    "dense": 4, "dense_transposed": 1, "vector": 0.7, "dense_over": 2, "dense_moved": 0.7,
    "dense_general": 1, "dense_joint": 1, "dense_each": 0.7, "dense_composed": 2, "bias": 2,
    "gain": 1.5, "scaled": 2, "added": 2, "outer": 0.5, "scalar": 0.5, "divided": 0.5,
    "gain_twice": 0.5, "residual": 1,
}  # fmt: skip
STATISTICS = {
    "reduced": 1.5, "centred": 1.5, "normalised": 3, "normalised_in_groups": 0.5,
    "normalised_by_statistics": 0.7,
}  # fmt: skip
LAYOUT = {
    "merged": 1.2, "split": 1.2, "refolded": 0.7, "flattened": 0.4, "inserted": 0.7,
    "squeezed": 0.7, "transposed": 1.2, "sliced": 0.7, "indexed": 0.7, "half": 0.5,
    "broadcast": 0.5, "repeated": 0.7, "joined": 1, "rolled": 0.7, "flipped": 0.4, "wrapped": 0.6,
    "padded": 0.6,
}  # fmt: skip
CURVED = {"activation": 2, "multiplied": 0.7, "matmul": 0.5, "contracted": 0.5}
IMAGES = {
    "convolved": 5, "pointwise": 2, "transposed_convolution": 1.5, "pooled": 2, "upsampled": 1.2,
    "spread_out": 0.5, "channels_to_space": 0.8, "space_to_channels": 0.8,
    "padded_and_convolved": 0.7, "windows": 0.6, "excited": 0.4,
}  # fmt: skip
SEQUENCES = {
    "looked_up": 2, "looked_up_in": 0.7, "taken": 0.7, "looked_up_by_batch": 0.5, "scattered": 1,
    "attention": 2.5, "cross_attention": 1, "fused_attention": 0.7, "linear_attention": 0.8,
    "positions": 0.7, "gated": 1, "experts": 1.2, "recurrent": 1, "state_space": 1,
    "refitted": 0.3, "placed": 0.6, "ragged": 0.7,
}  # fmt: skip
CONTROL = {
    "called": 1, "mapped": 1.2, "ensemble": 0.7, "microbatched": 0.8, "layers": 1.5,
    "over_time": 1, "loop": 1, "branched": 0.8, "residual": 0.8, "called_twice": 0.5,
    "synchronised": 0.5,
}  # fmt: skip
TYPES = {
    "cast": 2.5, "rounded": 1.5, "dense_rounded": 1.5, "complexed": 1.2, "own_derivative": 1.5,
    "dense_clipped": 0.6, "effect": 1, "computed_outside": 0.3, "with_integers": 1,
    "with_flags": 0.7, "with_number": 1.5, "emptied": 0.5, "joined_with_nothing": 0.5,
    "discrete": 0.7,
}  # fmt: skip


def scaled(by: float, ops: Mapping[str, float]) -> dict[str, float]:
    return {name: by * often for name, often in ops.items()}


GENERAL = {"source": 0.12, "init": 0.15}
DENSE = LINEAR | STATISTICS | LAYOUT | CURVED | {"mapped": 0.8, "called": 0.3}
CONVOLUTIONAL = (
    scaled(0.35, LINEAR) | scaled(0.6, STATISTICS) | scaled(0.4, LAYOUT) | CURVED | IMAGES
)
SEQUENTIAL = scaled(0.5, LINEAR) | scaled(0.5, STATISTICS) | scaled(0.3, LAYOUT) | CURVED
SEQUENTIAL = SEQUENTIAL | SEQUENCES | CONTROL
TYPED = scaled(0.8, LINEAR) | scaled(0.5, STATISTICS) | scaled(0.4, LAYOUT) | CURVED | TYPES
TYPED = TYPED | scaled(0.3, IMAGES) | scaled(0.3, SEQUENCES) | scaled(0.3, CONTROL)
ALL = DENSE | scaled(0.7, IMAGES) | scaled(0.7, SEQUENCES) | scaled(0.7, CONTROL)
TRAINABLE = {
    "dense": 6, "gain": 3, "gain_twice": 3, "bias": 1, "activation": 2, "homogeneous": 2,
    "dense_composed": 2, "dense_over": 1, "added": 1, "residual": 1, "layers": 1, "scaled": 0.7,
    "convolved": 1, "pointwise": 1, "attention": 0.7, "looked_up": 0.7, "normalised": 1,
    "scalar": 1.5, "dense_general": 0.7, "mapped": 0.5, "vector": 0.5, "merged": 0.3, "split": 0.3,
    "reduced": 0.3, "transposed": 0.3,
}  # fmt: skip
HOMOGENEOUS = {
    "dense": 6, "homogeneous": 5, "gain": 2, "gain_twice": 1, "bias": 2, "dense_over": 1,
    "pointwise": 1, "convolved": 1.5, "pooled": 0.7, "added": 1, "residual": 0.7, "merged": 0.5,
    "split": 0.5, "transposed": 0.5, "joined": 0.5, "activation": 0.5, "layers": 0.7,
    "called": 0.7, "mapped": 0.7, "looked_up": 0.6, "attention": 0.6, "normalised": 0.5,
    "sliced": 0.3, "reduced": 0.4, "multiplied": 0.5, "scaled": 0.7, "branched": 0.4, "loop": 0.4,
    "microbatched": 0.5, "dense_general": 0.5, "dense_joint": 0.5, "dense_composed": 0.7,
    "gated": 0.7, "scalar": 0.5, "own_derivative": 0.2, "cast": 0.15,
}  # fmt: skip
FLOWING = {
    "dense": 4, "gain": 3, "gain_twice": 3, "homogeneous": 1, "activation": 2, "bias": 0.5,
    "dense_composed": 1, "added": 0.7, "residual": 0.5, "scaled": 0.7, "normalised": 0.5,
    "vector": 0.5, "scalar": 1,
}  # fmt: skip

REVERSE = ("value_and_gradient", "value_and_tangent", "values")
"""Not every program has a gradient: a ``while`` loop has a tangent only."""


def followed(settings: Mapping[str, Any]) -> list[Check]:
    """Values and gradients, as planned and with every rewrite forced."""
    del settings
    return [Check("planned", "planned", REVERSE), Check("forced", "forced(planned)", REVERSE)]


def evaluated(settings: Mapping[str, Any]) -> list[Check]:
    """The library's evaluation by numpy, which its own checks and these tests rely on."""
    del settings
    return [Check("evaluated", "plain", REVERSE, way="compiled")]


def merged(settings: Mapping[str, Any]) -> list[Check]:
    measures = (f"values_at({settings['rows']})", "values")
    return [
        Check("merged", "merged", measures),
        Check("merged by force", "forced(merged)", measures),
    ]


def derived(settings: Mapping[str, Any]) -> list[Check]:
    measures = (f"derivative({settings['derivative']!r})", "value_and_tangent")
    return [Check("planned", "planned", measures), Check("forced", "forced(planned)", measures)]


MATRICES = "lambda tree: jax.tree.map(lambda w: jnp.ndim(w) > 1, tree)"
ODD_ONES = "lambda tree: {k: int(k[1:]) % 2 == 1 for k in tree}"
LABELS = "lambda tree: {k: 'ab'[int(k[1:]) % 2] for k in tree}"
TRANSFORMATIONS = (
    "optax.trace(0.9)",
    "optax.trace(0.9, nesterov=True)",
    "optax.add_decayed_weights(0.01)",
    f"optax.add_decayed_weights(0.01, mask={MATRICES})",
    "optax.clip_by_global_norm(0.1)",
    "optax.clip_by_global_norm(1e-3)",
    "optax.clip(0.1)",
    "optax.scale_by_adam()",
    "optax.scale_by_rms(eps=1e-4)",
    "optax.scale_by_sign()",
    "optax.ema(0.8)",
    "optax.apply_every(3)",
    "optax.scale_by_trust_ratio()",
    "optax.centralize()",
    "optax.adaptive_grad_clip(0.1)",
    "optax.scale_by_schedule(lambda count: 1 / (1 + 0.1 * count))",
    f"optax.masked(optax.trace(0.5), {MATRICES})",
    f"optax.masked(optax.set_to_zero(), {ODD_ONES})",
    f"optax.masked(optax.scale(0.5), {ODD_ONES})",
    f"optax.partition({{'a': optax.trace(0.9), 'b': optax.set_to_zero()}}, {LABELS})",
    f"optax.partition({{'a': optax.identity(), 'b': optax.scale_by_adam()}}, {LABELS})",
)


def optimizer(settings: Mapping[str, Any]) -> str:
    parts = [*settings["transformations"], f"optax.scale(-{settings['rate']})"]
    return f"optax.chain({', '.join(parts)})"


def optimizers(settings: Mapping[str, Any]) -> list[Check]:
    chain = optimizer(settings)
    measures = (f"trained({chain})",)
    return [
        Check("trained", f"optimized({chain})", measures),
        Check("trained by force", f"forced(optimized({chain}))", measures),
        Check("expanded", f"expands_and_reduces({chain})"),
    ]


def flows(settings: Mapping[str, Any]) -> list[Check]:
    rebalance = f"rebalance={settings['rebalance']}"
    return [
        Check("flow", f"follows_the_flow(exactness='flow', {rebalance})"),
        Check("radial", f"closes({rebalance})"),
    ]


def laws(settings: Mapping[str, Any]) -> list[Check]:
    options = settings["strict"]
    return [
        Check("laws", "laws_hold"),
        Check("rank", "rank_is_right"),
        Check("hidden", "hidden_weights_are_counted"),
        Check("strict", f"strict_is_honest({options})"),
    ]


ROWS = {"rows": 3, "data": 1}
FAMILIES = {
    "dense": Family(Palette({"data": 3, "rows": 1}, DENSE, (2, 7), general=GENERAL), followed),
    "convolutional": Family(
        Palette({"image": 1}, CONVOLUTIONAL, (2, 6), general=GENERAL), followed
    ),
    "sequence": Family(
        Palette({"rows": 2, "ids": 1}, SEQUENTIAL, (1, 5), general=GENERAL), followed
    ),
    "types": Family(
        Palette(
            {"typed_data": 3, "data": 1, "image": 0.5, "whole": 0.3}, TYPED, (2, 7), zeros=0.06,
            general={"source": 0.25, "init": 0.15},
        ),
        followed,
    ),
    "optimizers": Family(
        Palette(
            {"rows": 3, "image": 0.5}, TRAINABLE, (2, 6), general={"init": 0.4},
            settings={
                "transformations": Some(TRANSFORMATIONS, 3),
                "rate": Among((0.01, 0.1, 0.001)),
            },
        ),
        optimizers,
    ),
    "flow": Family(
        Palette(
            {"rows": 1}, FLOWING, (2, 5), settings={"rebalance": FLAG}, general={"init": 0.4},
        ),
        flows,
    ),
    "laws": Family(
        Palette(
            {"rows": 3, "image": 0.7, "ids": 0.2}, HOMOGENEOUS, (2, 6), general=GENERAL, zeros=0.01,
            settings={"strict": Among(("", "optimizer=optax.sgd(0.1), exactness='flow'",
                                       "optimizer=optax.adam(0.1)"))},
        ),
        laws,
    ),
    "merge": Family(
        Palette(
            {"data": 2, "rows": 2, "image": 2, "ids": 0.5}, ALL | scaled(0.3, TYPES), (2, 6),
            zeros=0.01, general=GENERAL, settings={"rows": Among((1, 2, 5, 0))},
        ),
        merged,
    ),
    "derivatives": Family(
        Palette(
            {"data": 2, "rows": 2, "image": 1}, ALL, (2, 5), general=GENERAL,
            settings={"derivative": Among(tuple(DERIVATIVES))},
        ),
        derived,
    ),
    "numbers": Family(
        Palette({"data": 2, "rows": 2, "image": 2}, ALL | TYPES, (1, 5), zeros=0.02,
                general=GENERAL),
        evaluated,
    ),
}  # fmt: skip
