"""What each array of a merged network is called, and what it is made of, for people."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fcjax.merging.ahead import digest
from fcjax.merging.kept import Kept
from fcjax.names import joint_name, unused
from fcjax.planning.plan import folds_always

__all__ = ["MergedRow", "as_they_were", "made_of", "names_of", "nothing_merged", "rows"]


MOST_SOURCES = 4
UNCHANGED = "as it was"


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
            sources = made_of([one], paths)
            names[one.identity] = unused(joint_name(sources or ["constant"], leaf), names.values())
    return names


def made_of(kept: Iterable[Kept], paths: Sequence[str]) -> list[str]:
    """The parameters that arrays are made of, in their own order."""
    sources = frozenset[str]().union(*(k.sources for k in kept))
    return [path for path in paths if digest("input", path) in sources]


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
            tuple(made_of([one], paths)),
            _reason(one, paths, is_leaf=one.identity in own),
        )
        for name, one in sorted(first.items())
    ]


def _reason(one: Kept, paths: Sequence[str], *, is_leaf: bool) -> str:
    if is_leaf:
        return UNCHANGED
    every = made_of([one], paths)
    named = every[:MOST_SOURCES]
    more = len(every) - len(named)
    sources = (", ".join(named) or "constants") + (f" and {more} more" if more else "")
    if one.formed is None:
        return f"computed from {sources}"
    return f"effective {'bias' if one.formed.is_sum else 'weight'} of {sources}"


def as_they_were(paths: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Iterator[MergedRow]:
    """One row for each parameter of a network that is left as it is, in alphabetical order."""
    for path, shape in sorted(zip(paths, shapes, strict=True)):
        yield MergedRow(path, shape, (path,), UNCHANGED)


def nothing_merged(listed: Sequence[MergedRow], operations: tuple[float, float]) -> str | None:
    """Why the network is left as it is, if it is; given what it takes before and after."""
    before, after = operations
    dearer = after > before and not folds_always()
    if dearer or all(row.reason == UNCHANGED for row in listed):
        return (
            "nothing to merge: no two parameters meet in a linear segment in which their product "
            "would make the evaluation cheaper"
        )
    return None
