"""The effective expression of a network, readable: ``y = relu(x Z1 + c1) Z2``."""

import itertools
from collections.abc import Mapping

from fcjax.expressions.terms import Expr, Factor, Term
from fcjax.planning.parts import Convolution, Linear, MeanSquare, Part, Product, Recipe, RowSquare
from fcjax.planning.plan import Plan
from fcjax.tracing.trace import Atom, Equation, Value

__all__ = ["lines"]

MOST_LINES = 60
QUIET = frozenset({"reshape", "broadcast_in_dim", "squeeze", "transpose", "convert_element_type",
                   "stop_gradient", "copy", "slice", "expand_dims", "split"})  # fmt: skip


def lines(plan: Plan, names: Mapping[Value, str]) -> list[str]:
    """One line for every value that is computed, with the effective weights under it."""
    printed = _Printer(plan, dict(names)).lines()
    if len(printed) > MOST_LINES:
        hidden = len(printed) - MOST_LINES
        printed = [*printed[: MOST_LINES - 1], f"  ... and {hidden + 1} more lines"]
    return printed


class _Printer:
    """Names values in the order they are computed and writes what they are."""

    def __init__(self, plan: Plan, names: dict[Value, str]) -> None:
        self.plan = plan
        self.names = names
        self.weights = itertools.count(1)
        self.values = itertools.count(1)
        self.notes: list[str] = []
        inputs = [v for v in plan.body.inputs if v not in names]
        for i, value in enumerate(inputs):
            names[value] = "x" if len(inputs) == 1 else f"x{i + 1}"
        for i, (value, _) in enumerate(plan.body.constants):
            names[value] = f"k{i + 1}"
        self.outputs = [a for a in plan.body.outputs if isinstance(a, Value)]

    def lines(self) -> list[str]:
        from fcjax.running.program import Nested, Program, Segment

        printed: list[str] = []
        for step in Program(self.plan).steps:
            if isinstance(step, Segment):
                written = self.recipe(step.recipe)
                printed.append(f"  {self.name(step.value)} = {written}")
                printed += self.notes
                self.notes = []
            else:
                equation = step.equation if isinstance(step, Nested) else step
                printed += self.equation(equation)
        return printed

    def name(self, value: Value) -> str:
        if value not in self.names:
            if value in self.outputs:
                i = self.outputs.index(value)
                self.names[value] = "y" if len(self.outputs) == 1 else f"y{i + 1}"
            else:
                self.names[value] = f"h{next(self.values)}"
        return self.names[value]

    # --- values as written ---

    def equation(self, equation: Equation) -> list[str]:
        """A line for a root or a boundary; nothing for what only exists inside expressions."""
        made = [v for v in equation.outputs if v is not None]
        roots = [v for v in made if v in self.plan.bases]
        if roots:
            return [f"  {self.name(v)} = {self.expr(self.plan.bases[v])}" for v in roots]
        if equation not in self.plan.boundaries:
            return []
        arguments = [self.atom(a) for a in equation.inputs if not _is_number(a)]
        if equation.name in QUIET and len(arguments) == 1:
            self.names[made[0]] = arguments[0]
            return []
        called = equation.source.params.get("name", equation.name)
        if equation.name == "custom_jvp_call":
            called = _custom_name(equation)
        outputs = ", ".join(self.name(v) for v in made)
        return [f"  {outputs} = {called}({', '.join(arguments)})"]

    def atom(self, atom: Atom) -> str:
        return self.name(atom) if isinstance(atom, Value) else f"{atom.val}"

    # --- expressions ---

    def expr(self, expr: Expr) -> str:
        return " + ".join(self.term(t) for t in expr.terms) or "0"

    def term(self, term: Term) -> str:
        written = " ".join(self.factor(f) for f in term.factors) or "1"
        return written if term.scale == 1.0 else f"{term.scale:.4g} {written}"

    def factor(self, factor: Factor) -> str:
        name = self.name(factor.leaf.var)
        if any(view is not None for view in factor.slices):
            name += "[slice]"
        return f"({name} - mean)" if factor.centred else name

    # --- recipes ---

    def recipe(self, recipe: Recipe) -> str:
        return " + ".join(self.part(p) for p in recipe.parts) or "0"

    def part(self, part: Part) -> str:
        if isinstance(part, Product):
            return self.product(part)
        if isinstance(part, RowSquare):
            shift = "".join(f" + {self.term(p.term)}" for p in part.shifts)
            return f"{part.scale:.4g} |{self.part(part.inner)}{shift}|^2"
        weight = self.weight(part)
        if isinstance(part, Convolution):
            rows = self.name(part.rows.leaf.var) if part.rows else "1"
            return f"{rows} * {weight}"
        if isinstance(part, MeanSquare):
            return f"{part.scale:.4g} |({self.name(part.rows.leaf.var)} - mean) {weight}|^2"
        rows = self.name(part.rows.leaf.var)
        written = f"({rows} - mean) {weight}" if part.centre_rows else f"{rows} {weight}"
        return " ".join([written, *(self.factor(f) for f in part.row_scales)])

    def product(self, part: Product) -> str:
        data = [f for f in part.term.factors if f.is_data]
        weights = [f for f in part.term.factors if not f.is_data]
        if not data or len(weights) < 2:
            return self.term(part.term)
        name = f"Z{next(self.weights)}"
        product = " ".join(self.factor(f) for f in weights)
        self.notes.append(f"      {name} = {product}")
        scale = "" if part.term.scale == 1.0 else f"{part.term.scale:.4g} "
        return scale + " ".join([*(self.factor(f) for f in data), name])

    def weight(self, part: Linear | MeanSquare | Convolution) -> str:
        name = f"Z{next(self.weights)}"
        products = (part.weight,) if isinstance(part, MeanSquare) else part.weights
        terms = " + ".join(self.term(p.term) for p in products)
        centred = isinstance(part, Linear) and part.centre_weight
        self.notes.append(f"      {name} = {terms}{', less its column means' if centred else ''}")
        return name


def _is_number(atom: Atom) -> bool:
    return not isinstance(atom, Value)


def _custom_name(equation: Equation) -> str:
    body = equation.source.params["call_jaxpr"]
    inner = getattr(body, "jaxpr", body)
    names = [e.params.get("name") for e in inner.eqns if e.params.get("name")]
    return names[0] if names else "custom_jvp"
