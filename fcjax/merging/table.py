"""What each array of a merged network is called, and what it is made of, for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fcjax.merging.ahead import digest
from fcjax.merging.kept import Kept
from fcjax.names import joint_name

__all__ = ["MergedRow", "names_of", "nothing_merged", "rows"]


MOST_SOURCES = 4


@dataclass(frozen=True)
class MergedRow:
    """One array of a merged network.

    Attributes:
      path: its name in ``params``.
      shape: its shape.
      sources: the leaves of the original parameters that it is made of.
      reason: what was done, in a few words.
    """

    path: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    reason: str


def names_of(kept: Sequence[Kept], paths: Sequence[str]) -> dict[str, str]:
    """A name for each identity."""
    own = {digest("input", path): path for path in paths}
    names: dict[str, str] = {k.identity: own[k.identity] for k in kept if k.identity in own}
    for one in kept:
        if one.identity not in names:
            leaf = "bias" if one.formed is not None and one.formed.is_sum else "kernel"
            sources = [paths[i] for i in one.sources]
            names[one.identity] = _unused(joint_name(sources or ["constant"], leaf), names)
    return names


def _unused(name: str, names: Mapping[str, str]) -> str:
    taken = set(names.values())
    count = 2
    candidate = name
    while candidate in taken:
        candidate = f"{name}_{count}"
        count += 1
    return candidate


def rows(
    kept: Sequence[Kept], names: Mapping[str, str], paths: Sequence[str]
) -> Sequence[MergedRow]:
    """One row for each name, in alphabetical order."""
    first = {names[k.identity]: k for k in reversed(kept)}
    own = {digest("input", path) for path in paths}
    return [
        MergedRow(
            name,
            one.value.shape,
            tuple(paths[i] for i in one.sources),
            _reason(one, paths, is_leaf=one.identity in own),
        )
        for name, one in sorted(first.items())
    ]


def _reason(one: Kept, paths: Sequence[str], *, is_leaf: bool) -> str:
    if is_leaf:
        return "as it was"
    named = [paths[i] for i in one.sources[:MOST_SOURCES]]
    more = len(one.sources) - len(named)
    sources = (", ".join(named) or "constants") + (f" and {more} more" if more else "")
    if one.formed is None:
        return f"computed from {sources}"
    return f"effective {'bias' if one.formed.is_sum else 'weight'} of {sources}"


def nothing_merged(listed: Sequence[MergedRow]) -> str | None:
    """Why the network is left as it is, if it is."""
    if all(row.reason == "as it was" for row in listed):
        return (
            "nothing to merge: no two parameters meet in a linear segment in which their product "
            "would make the evaluation cheaper"
        )
    return None
