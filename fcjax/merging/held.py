"""A merged network holds no more bytes than the network as written.

A product of weights that is larger than its factors, a second form of weights that are shared, a
wider copy of narrow ones: each saves operations, but is dropped where the whole would hold more.
"""

from collections.abc import Hashable, Iterator

from fcjax.merging.kept import Kept
from fcjax.merging.sweep import Dropped, Network, Sweep
from fcjax.planning.plan import folds_always
from fcjax.tracing.trace import Equation, Value

__all__ = ["affordable"]


def affordable(network: Network) -> Sweep:
    """What is left of a network; what costs most bytes is dropped until it holds no more."""
    dropped: set[Value | Equation] = set()
    if folds_always():
        return network.sweep(dropped)
    limit = _held(network, network.as_written())
    while True:
        sweep = network.sweep(dropped)
        if _held(network, sweep) <= limit:
            return sweep
        balance = _Balance(network, sweep, dropped)
        dropped |= max(_choices(network, sweep, dropped), key=balance.excess)


def _held(network: Network, sweep: Sweep) -> int:
    """The bytes of all arrays, equal ones counted once."""
    return sum({k.identity: network.size(k) for k in network.kept(sweep)}.values())


def _choices(network: Network, sweep: Sweep, dropped: Dropped) -> Iterator[Dropped]:
    """What can still be dropped."""
    for group in network.together:
        if not group <= dropped and any(network.lowered[v].formed for v in group):
            yield group
    yield from (frozenset({equation}) for equation in sweep.loops)
    for kept in network.kept(sweep):
        if kept.formed is None and kept.value not in network.inputs:
            yield frozenset({kept.value})


class _Balance:
    """Compares what is freed with what is read instead."""

    def __init__(self, network: Network, sweep: Sweep, dropped: Dropped) -> None:
        self.network = network
        self.sweep = sweep
        self.dropped = dropped
        self.readers: dict[str, set[Hashable]] = {}
        self.sizes: dict[str, int] = {}
        for kept in network.kept(sweep):
            self.sizes[kept.identity] = network.size(kept)
            self.readers.setdefault(kept.identity, set()).update(sweep.readers[kept.value])

    def excess(self, choice: Dropped) -> int:
        """By how many bytes less is held without a choice."""
        freed = {name for name, readers in self.readers.items() if readers <= choice}
        freed |= {self.network.array(v).identity for v in choice if self._is_kept(v)}
        added = {k.identity: self.network.size(k) for k in self._written(choice)}
        kept = self.sizes.keys() - freed
        return sum(self.sizes[n] for n in freed) - sum(s for n, s in added.items() if n not in kept)

    def _is_kept(self, value: Value | Equation) -> bool:
        """Whether a value is an array that is kept itself."""
        return isinstance(value, Value) and value not in self.network.lowered

    def _written(self, choice: Dropped) -> Iterator[Kept]:
        """The arrays that computing a choice as written reads."""
        left: list[Value | Equation] = [*choice]
        seen: set[Value] = set()
        while left:
            item = left.pop()
            equation = item if isinstance(item, Equation) else self.network.makers.get(item)
            values = () if equation is None else set(equation.values) - seen
            seen.update(values)
            for value in values:
                if self.network.is_kept(value, self.dropped | choice):
                    yield self.network.array(value)
                elif value in choice or not self._is_there(value):
                    left.append(value)

    def _is_there(self, value: Value) -> bool:
        """Whether a value is computed in any case, or through effective weights."""
        return value in self.network.lowered or value in self.sweep.readers
