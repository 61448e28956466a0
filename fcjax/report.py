"""What was folded, what was not, and why, for people."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from fcjax.expressions.terms import Expr
from fcjax.expressions.written import handed_over
from fcjax.names import short_names
from fcjax.planning.plan import Change, Plan
from fcjax.render import lines
from fcjax.rules.flow_matrices import MatrixFold
from fcjax.rules.reduction import Reduction
from fcjax.tracing.trace import Value

__all__ = ["Row", "rows", "text"]


Origins = Mapping[Value, set[str]]


@dataclasses.dataclass(frozen=True)
class Row:
    """What was done with one leaf of the original parameters.

    Attributes:
      path: where it is, such as ``Dense_0/kernel``.
      shape: its shape.
      reduced_shape: the shape in which it is trained, or None if it is not.
      rule: ``"fold"`` if it follows from another leaf and is not trained, ``"compress"`` if it is
        trained in fewer coordinates, ``"collapse"`` if it is multiplied into an effective weight,
        ``"train"`` if it is left as it is.
      exactness: for which optimizers the result equals backpropagation's.
      reason: one sentence.
      segment: the paths of the leaves that make up one effective weight (or kernel, or table) with
        this leaf, itself included, in alphabetical order: multiplied with it, or added beside it
        in the same linear segment. A leaf that stands in several segments, such as the gain of a
        norm that three layers read, has the leaves of all. Empty for a leaf that is left as it is
        or that a subtracted mean removes.

    Example:
      >>> import jax.numpy as jnp, fcjax
      >>> params = {"up": jnp.ones((4, 64)), "down": jnp.ones((64, 2)), "out": jnp.ones((2, 2))}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["up"] @ params["down"]) @ params["out"]
      >>> fc = fcjax.front_contribute(apply_fn, params, jnp.ones((1024, 4)))
      >>> {row.path: row.segment for row in fc.report}
      {'down': ('down', 'up'), 'out': (), 'up': ('down', 'up')}
    """

    path: str
    shape: tuple[int, ...]
    reduced_shape: tuple[int, ...] | None
    rule: str
    exactness: str
    reason: str
    segment: tuple[str, ...] = ()


def rows(plan: Plan, reduction: Reduction) -> tuple[Row, ...]:
    """One row for each leaf."""
    paths = reduction.tree.paths
    origins = {value: {path} for value, path in zip(plan.body.inputs, paths, strict=False)}
    for fold in reduction.flows:
        if isinstance(fold, MatrixFold):  # their product stands in the survivor's place
            origins[plan.body.inputs[fold.survivor]] = {paths[leaf] for leaf in fold.leaves}
    found = _Findings(plan, origins, short_names(paths))
    return tuple(
        _row(leaf, value, found, reduction)
        for leaf, value in zip(range(len(paths)), plan.body.inputs, strict=False)
    )


def _row(leaf: int, value: Value, found: "_Findings", reduction: Reduction) -> Row:
    path = reduction.tree.paths[leaf]
    array = reduction.tree.leaves[leaf]
    shape, reduced = tuple(np.shape(array)), reduction.reduced_shape(leaf)
    if not reduction.tree.trained[leaf]:
        reason = f"not trained: its dtype is {array.dtype.name}; kept in fc.contributions"
        return Row(path, shape, None, "train", "any optimizer", reason)
    collapses = path in found.collapsed or path in found.cancelled or path in found.hoisted
    reasons = [found.reason(path, value)]
    if leaf in reduction.reasons:
        reasons.insert(0 if reduction.rule(leaf) else 1, reduction.reasons[leaf])
    rule, exactness = reduction.rule(leaf) or (
        "collapse" if collapses else "train", "any optimizer"
    )  # fmt: skip
    if rule in ("fold", "radial") or (rule == "compress" and not collapses):
        reasons = reasons[:1]
    return Row(path, shape, reduced, rule, exactness, "; ".join(reasons), found.segment(path))


class _Findings:
    """What happened to each leaf, gathered over a plan and the plans of its nested bodies."""

    def __init__(self, plan: Plan, origins: Origins, short: Mapping[str, str]) -> None:
        self.short = short
        self.collapsed: dict[str, set[str]] = {}
        self.declined: dict[str, tuple[float, set[str]]] = {}
        self.written: dict[str, set[str]] = {}
        self.linear: set[str] = set()
        self.cancelled: set[str] = set()
        self.hoisted: dict[str, str] = {}
        self.read: set[str] = set()
        self.boundaries: dict[str, set[str]] = {}
        self.refuted: set[str] = set()
        for inner, own in walk(plan, origins):
            self._gather(inner, own)
            for declined in plan.refuted:
                self.refuted.update(*(own.get(v, set()) for v in declined.leaves))

    def _gather(self, plan: Plan, names: Origins) -> None:
        for recipe in plan.recipes.values():
            group = _paths(recipe.expr, names)
            for path in group:
                self.collapsed.setdefault(path, set()).update(group - {path})
        for change in plan.changes:
            if not change.taken:
                self._decline(plan, change, names)
            else:
                for value in (*change.roots, *change.gone):
                    self.cancelled |= _paths(plan.bases[value], names)
        self._hoist(plan, names)
        computed = {v for equation in plan.body.equations for v in equation.outputs}
        given = {v: paths for v, paths in names.items() if v not in computed}
        for expr in plan.bases.values():
            if expr.has_data:
                self.linear |= _paths(expr, given)
        for equation in plan.body.equations:
            read = set().union(*(names.get(v, set()) for v in equation.values))
            self.read |= read
            for path in read if equation in plan.boundaries else ():
                self.boundaries.setdefault(path, set()).add(equation.name)

    def _hoist(self, plan: Plan, names: Origins) -> None:
        """What is computed for the rows of a table instead of for tokens."""
        behind: dict[Value, str] = {}
        for equation in plan.body.equations:
            paths = set().union(*(names.get(v, set()) for v in equation.values))
            tables = [plan.body.rows[v] for v in equation.outputs if v and v in plan.body.rows]
            if tables:
                paths, count = names.get(tables[0], set()), tables[0].shape[0]
                table = (
                    f"computed for the {count} rows of {self._listed(paths)}, not for each token"
                )
            else:
                table = next((behind[v] for v in equation.values if v in behind), "")
            if table and equation.name != "gather":
                behind.update({v: table for v in equation.outputs if v is not None})
                self.hoisted.update(dict.fromkeys(paths, table))

    def _decline(self, plan: Plan, change: Change, names: Origins) -> None:
        before, after = change.before, change.after
        ratio = max(after.time / max(before.time, 1.0), after.flops / max(before.flops, 1.0))
        touched = [plan.bases[v] for v in (*change.roots, *change.gone) if v in plan.bases]
        group = set().union(*(_paths(expr, names) for expr in touched))
        if all(plan.known[v].of == "param" for v in change.gone):  # a product of weights, formed
            self.written.update({path: group - {path} for path in group})  # as written
            return
        for path in group if len(group) > 1 else ():
            best = self.declined.get(path)
            if best is None or ratio < best[0]:
                self.declined[path] = (ratio, group - {path})

    def reason(self, path: str, value: Value) -> str:
        """Why the leaf is where it is, in one sentence."""
        if path in self.hoisted:
            return f"part of one effective table: {self.hoisted[path]}"
        if path in self.refuted:
            return "kept as written: a check on numbers refuted what would have replaced it"
        if path in self.collapsed:
            partners = self._listed(self.collapsed[path])
            return f"part of one {f'segment with {partners}' if partners else 'effective weight'}"
        if path in self.cancelled:
            return "removed by the mean that is subtracted behind it: its true gradient is zero"
        if path not in self.read:
            return "unused: the output does not depend on it"
        if path in self.written and path not in self.declined:
            named = self._listed(self.written[path])
            return f"multiplied with {named} by the network itself, before it meets the data"
        if path in self.declined:
            ratio, others = self.declined[path]
            named = self._listed(others)
            return (
                f"could be multiplied with {named}, but the step would cost "
                f"{ratio:.2f} times the layers as written at these shapes"
            )
        if path in self.boundaries and path not in self.linear:
            readers = ", ".join(sorted(self.boundaries[path]))
            return f"read by {readers}, which no linear segment crosses"
        return "linear between two non-linear operations, with nothing to merge it with"

    def segment(self, path: str) -> tuple[str, ...]:
        """The leaves of the effective weights and tables that the leaf is part of."""
        group = set(self.collapsed.get(path, ()))
        if path in self.hoisted:
            group |= {p for p, table in self.hoisted.items() if table == self.hoisted[path]}
        return tuple(sorted(group | {path})) if group or path in self.collapsed else ()

    def _listed(self, group: set[str]) -> str:
        names = sorted(self.short.get(path, path) for path in group)
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def walk(plan: Plan, names: Origins) -> Iterator[tuple[Plan, Origins]]:
    """The plan and those of nested bodies, with the parameters that each value is made of.

    A value computed from parameters alone, such as a normalised weight, stands for all of them.
    """
    origins = {v: set(paths) for v, paths in names.items()}
    for equation in plan.body.equations:
        joined = set().union(*(origins.get(v, set()) for v in equation.values))
        for value in equation.outputs:
            if value is not None and plan.known[value].of == "param":
                origins[value] = joined
    yield plan, origins
    for i, inner in plan.nested.items():
        for nested in inner:
            given = handed_over(plan.body.equations[i], nested.body)
            own = {v: origins[a] for v, a, _ in given if isinstance(a, Value) and a in origins}
            yield from walk(nested, own)


def _paths(expr: Expr, names: Origins) -> set[str]:
    return set().union(*(names.get(v, set()) for v in expr.leaves))


# --- printing -----------------------------------------------------------------------------------


def text(plan: Plan, reduction: Reduction, assumed: Mapping[str, int]) -> str:
    """The whole report: sizes, the effective expression, and the leaves left alone.

    Args:
      plan: the plan.
      reduction: what is trained.
      assumed: the sizes that the plan takes mapped axes to have which the network names.
    """
    paths = reduction.tree.paths
    listed = rows(plan, reduction)
    names = short_names(paths)
    bases = reduction.sources_in(plan.body.inputs)
    called = _called(plan, reduction, names)
    called |= {value: f"S{i + 1}" for i, value in enumerate(bases)}
    arguments = plan.body.inputs[len(paths) : len(plan.body.inputs) - len(bases)]
    head = [
        f"fcjax: {counted(listed)}; {_weights(listed)}",
        f"step FLOPs {_rounded(plan.before.flops)} as written, "
        f"{_rounded(plan.after.flops)} folded, for inputs {_inputs(arguments)}; "
        f"exact for {_exact_for(reduction)}",
    ]
    if assumed:
        listed_axes = ", ".join(f"{name!r} of size {size}" for name, size in assumed.items())
        head.append(
            f"planned as if inside the mapped axis {listed_axes}; a call plans for its own axes "
            "and shapes"
        )
    if reduction.unmoved:
        head.append(
            f"planned without the gradients of {len(reduction.unmoved)} leaves, which the "
            "optimizer leaves alone"
        )
    if reduction.followers or reduction.compression is not None:
        head.append(
            "tested on a tree of this structure, the optimizer moves full and reduced weights "
            f"alike, to {reduction.deviation:.0e} of an update"
        )
    sections = [head, ["", "effective expression", *lines(plan, called)]]
    if reduction.flows:
        title = "folded along gradient flow"
        if any(fold.rule == "radial" for fold in reduction.flows):
            title = "approximated by the radial closure"
        sections.append(["", title, *_flows(reduction, names)])
    for title, rules in (("fewer weights", ("fold", "compress")), ("left as they are", ("train",))):
        chosen = [row for row in listed if row.rule in rules and row.exactness != "flow"]
        if chosen:
            sections.append(["", title, *_listed(chosen, names)])
    if plan.refuted:
        sections.append(_refuted(plan))
    return "\n".join(itertools.chain(*sections))


def _refuted(plan: Plan) -> list[str]:
    """What a check found, with what is needed to find the fault."""
    lines = [
        "",
        "left as written because a check on numbers refuted a rewrite, which is a fault of fcjax;",
        f"please report it with these lines (jax {jax.__version__})",
    ]
    for declined in plan.refuted:
        lines += [f"  {declined.reason}", *(f"    {row}" for row in declined.program.split("\n"))]
    return lines


def _exact_for(reduction: Reduction) -> str:
    if any(fold.rule == "radial" for fold in reduction.flows):
        return "no optimizer: the radial closure is an approximation"
    if reduction.flows:
        return "this optimizer as its learning rate goes to 0"
    return "any optimizer" if reduction.is_trivial else "this optimizer"


def _flows(reduction: Reduction, names: Mapping[str, str]) -> list[str]:
    short = [names[path] for path in reduction.tree.paths]
    labels = _labels(reduction)
    return [
        f"  {line}"
        for fold, label in zip(reduction.flows, labels, strict=True)
        for line in fold.formula(short, label)
    ]


def _labels(reduction: Reduction) -> list[str]:
    """A name for the effective weight of each flow fold, numbered if there are several."""
    symbols = [fold.symbol for fold in reduction.flows]
    return [
        symbol if symbols.count(symbol) == 1 else f"{symbol}{symbols[:i].count(symbol) + 1}"
        for i, symbol in enumerate(symbols)
    ]


def _called(plan: Plan, reduction: Reduction, names: Mapping[str, str]) -> dict[Value, str]:
    """What the inputs that are parameters are called in the effective expression."""
    short = [names[path] for path in reduction.tree.paths]
    shown = dict(enumerate(short))
    for fold, label in zip(reduction.flows, _labels(reduction), strict=True):
        shown |= fold.shown(short, label)
    return {v: shown[i] for i, v in enumerate(plan.body.inputs[: len(short)])}


def counted(listed: Sequence[Row]) -> str:
    """How many leaves each rule treats."""
    of = {
        name: sum(
            row.rule == rule and (rule == "compress" or row.reduced_shape is None) for row in listed
        )
        for rule, name in (
            ("fold", "folded away"),
            ("compress", "compressed"),
            ("radial", "approximated"),
        )
    }
    collapsed = sum(row.rule == "collapse" for row in listed)
    parts = [f"{collapsed} of {len(listed)} leaves collapsed into effective weights"]
    return ", ".join(parts + [f"{count} {name}" for name, count in of.items() if count])


def _weights(listed: Sequence[Row]) -> str:
    trained = [row for row in listed if row.rule != "train" or row.reduced_shape is not None]
    before = sum(math.prod(row.shape) for row in trained)
    after = sum(math.prod(r.reduced_shape) for r in trained if r.reduced_shape is not None)
    return f"{after:,} weights trained, {'as' if after == before else f'{before:,}'} before"


def _listed(chosen: Sequence[Row], names: Mapping[str, str]) -> list[str]:
    printed = [f"  {names[row.path]}: {_sizes(row)}{row.reason}" for row in chosen[:MOST_LEAVES]]
    if len(chosen) > MOST_LEAVES:
        printed.append(f"  and {len(chosen) - MOST_LEAVES} more; see fc.report")
    return printed


def _sizes(row: Row) -> str:
    if row.rule != "compress" or row.reduced_shape is None:
        return ""
    return f"{list(row.shape)} -> {list(row.reduced_shape)}; "


MOST_LEAVES = 40


def _inputs(arguments: Sequence[Value]) -> str:
    return ", ".join(v.aval.str_short(short_dtypes=True) for v in arguments) or "none"


def _rounded(number: float) -> str:
    return f"{number:.3g}"
