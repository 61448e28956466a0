"""What leaves are called in messages, reports and printed expressions."""

from collections.abc import Sequence
from typing import Any

import jax

__all__ = ["layer_name", "path_name", "short_names"]


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
