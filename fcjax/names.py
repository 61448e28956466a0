"""What leaves are called in messages, reports and printed expressions."""

from collections.abc import Collection, Sequence
from typing import Any

import jax

__all__ = ["joint_name", "layer_name", "path_name", "short_names", "unused"]

MOST_LAYERS = 4


def path_name(path: Sequence[Any]) -> str:
    """A leaf's path, such as ``Dense_0/kernel``; the root itself is ``params``.

    Example:
      >>> import jax
      >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"a": [1.0]})
      >>> path_name(path)
      'a/0'
    """
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return "/".join(part.lstrip(".") for part in parts) or "params"


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The shortest way to write each path: a kernel by its layer, anything else by its path.

    Example:
      >>> short_names(["params/Dense_0/bias", "params/Dense_0/kernel"])
      {'params/Dense_0/bias': 'Dense_0.bias', 'params/Dense_0/kernel': 'Dense_0'}
    """
    pieces = {p: p.split("/") for p in paths}
    while len(paths) > 1 and len({tuple(q[:1]) for q in pieces.values()}) == 1:
        if any(len(q) <= 2 for q in pieces.values()):
            break  # a layer and its leaf stay
        pieces = {p: q[1:] for p, q in pieces.items()}
    short = {}
    for path, parts in pieces.items():
        parts = parts[:-1] if parts[-1] == "value" and len(parts) > 1 else parts  # nnx wraps arrays
        kernel = parts[-1] in ("kernel", "weight", "embedding") and len(parts) > 1
        short[path] = ".".join(parts[:-1] if kernel else parts)
    return short if len(set(short.values())) == len(short) else {p: p for p in paths}


def layer_name(short: str) -> str:
    """The layer that a leaf belongs to, from its short name.

    Example:
      >>> layer_name("Dense_0"), layer_name("Dense_0.bias"), layer_name("block.w")
      ('Dense_0', 'Dense_0', 'block.w')
    """
    parts = short.replace("/", ".").split(".")
    while len(parts) > 1 and parts[-1] in ("bias", "scale", "value"):
        parts.pop()
    return ".".join(parts)


def joint_name(paths: Sequence[str], leaf: str) -> str:
    """What an array made of several leaves is called: by their layers.

    Args:
      paths: the leaves; a single one keeps its name.
      leaf: what the array is to the layers, such as ``kernel``.

    Example:
      >>> joint_name(["block/Dense_0/kernel", "block/Dense_1/kernel"], "kernel")
      'block/Dense_0+Dense_1/kernel'
      >>> joint_name(["batch_stats/BatchNorm_0/var", "params/BatchNorm_0/scale"], "kernel")
      'params/BatchNorm_0/kernel'
      >>> joint_name(["up", "down"], "kernel")
      'up+down/kernel'
    """
    if len(paths) == 1:
        return paths[0]
    layers: dict[tuple[str, ...], tuple[str, ...]] = {}
    for path in paths:
        layer = _layer(path)
        layers[layer[1:] or layer] = layer  # collections hold the same layers
    common = _common([layer[:-1] for layer in layers.values()])
    tails = ["/".join(layer[len(common) :]) for layer in layers.values()]
    if len(tails) > MOST_LAYERS:
        tails = [tails[0], "...", tails[-1]]
    return "/".join((*common, "+".join(tails), leaf))


def _layer(path: str) -> tuple[str, ...]:
    parts = tuple(path.split("/"))
    parts = parts[:-1] if parts[-1] == "value" and len(parts) > 1 else parts
    return parts[:-1] or parts


def _common(layers: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    shared: tuple[str, ...] = ()
    for pieces in zip(*layers, strict=False):
        if len(set(pieces)) > 1:
            break
        shared += pieces[:1]
    return shared


def unused(name: str, taken: Collection[str]) -> str:
    """A name that is not taken, with a number behind it if it must be.

    Example:
      >>> unused("bias", ["bias", "bias_2"])
      'bias_3'
    """
    count, candidate = 2, name
    while candidate in taken:
        candidate = f"{name}_{count}"
        count += 1
    return candidate
