"""How many small faults of the library its own check of every rewrite finds.

    python tests/mutations.py [--count N] [--seed N] [--module NAME ...]

Each mutant changes one thing in one module that makes or runs rewrites: an operator, a comparison,
a number, a condition, the order of arguments. In a process of its own it folds every network of the
zoo, every rewrite forced, as it would for a user, and the values and gradients that come out are
compared with those of the network as written. A mutant is

    found    if the check refuted something and all that came out was right,
    missed   if any network came out wrong,
    stopped  if the transform ended in an error,
    idle     if nothing came out differently.

Nothing on disk is changed. Prints each mutant, then the part that was found of those that do harm.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import pathlib
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

PACKAGE = pathlib.Path(__file__).parent.parent / "fcjax"
MODULES = (
    "expressions.algebra", "expressions.layout", "expressions.windows", "expressions.windowed",
    "expressions.circular", "expressions.deviations", "expressions.like_terms",
    "expressions.terms", "planning.rowwise", "planning.hoisting", "running.evaluate",
    "running.named", "running.weights", "running.convolving", "running.placing",
    "running.program", "running.numerics", "running.arrays",
)  # fmt: skip
SECONDS = 1800
CLOSE = 1e-8

# --- mutants ------------------------------------------------------------------------------------

SWAPPED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.Mod: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or,
    ast.Or: ast.And,
}  # fmt: skip


def changed(node: ast.AST) -> ast.AST | None:
    """A copy of an expression with something wrong about it; None if there is nothing to change."""
    new = copy.deepcopy(node)
    if isinstance(new, (ast.BinOp, ast.BoolOp)) and type(new.op) in SWAPPED:
        new.op = SWAPPED[type(new.op)]()
    elif isinstance(new, ast.Compare) and type(new.ops[0]) in SWAPPED:
        new.ops[0] = SWAPPED[type(new.ops[0])]()
    elif isinstance(new, ast.Constant) and type(new.value) in (int, float):
        new.value += 1
    elif isinstance(new, ast.Constant) and type(new.value) is bool:
        new.value = not new.value
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, (ast.USub, ast.Not)):
        return new.operand
    elif isinstance(new, ast.IfExp):
        new.body, new.orelse = new.orelse, new.body
    elif isinstance(new, ast.Call) and len(new.args) == 2 and not _is_spread(new.args):
        new.args.reverse()
    elif isinstance(new, ast.Tuple) and isinstance(new.ctx, ast.Load) and len(new.elts) > 1:
        new.elts.reverse()
    else:
        return None
    return new


def _is_spread(nodes: list[ast.expr]) -> bool:
    return any(isinstance(node, ast.Starred) for node in nodes)


def places(tree: ast.Module) -> Iterator[ast.AST]:
    """The expressions inside functions that can be changed; not those of types and messages."""

    def visit(node: ast.AST, inside: bool) -> Iterator[ast.AST]:
        if isinstance(node, (ast.Raise, ast.Assert, ast.arguments, ast.AnnAssign)):
            return
        if inside and changed(node) is not None:
            yield node
        for name, value in ast.iter_fields(node):
            if name in ("returns", "annotation", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, inside or isinstance(node, ast.FunctionDef))

    yield from visit(tree, inside=False)


class _Replacing(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def mutated(source: str, number: int) -> tuple[str, str]:
    """A module with one thing changed, and what was changed."""
    tree = ast.parse(source)
    old = list(places(tree))[number]
    new = changed(old)
    assert new is not None
    what = f"line {old.lineno}: {ast.unparse(old)}  ->  {ast.unparse(new)}"
    return ast.unparse(ast.fix_missing_locations(_Replacing(old, new).visit(tree))), what


def path_of(module: str) -> pathlib.Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def chosen(modules: list[str], count: int, seed: int) -> list[tuple[str, int]]:
    """So many mutants, as many of each module as of any other while it has them."""
    rng = random.Random(seed)
    left = {m: list(range(len(list(places(ast.parse(path_of(m).read_text())))))) for m in modules}
    for numbers in left.values():
        rng.shuffle(numbers)
    found: list[tuple[str, int]] = []
    while len(found) < count and any(left.values()):
        found += [(m, numbers.pop()) for m, numbers in left.items() if numbers]
    return found[:count]


# --- one mutant, in a process of its own --------------------------------------------------------


class _Mutant(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module of the library as a mutant."""

    def __init__(self, module: str, number: int) -> None:
        self.name = f"fcjax.{module}"
        self.path = path_of(module)
        self.number = number

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            return importlib.util.spec_from_loader(name, self, origin=str(self.path))
        return None

    def exec_module(self, module):
        source, _ = mutated(self.path.read_text(), self.number)
        exec(compile(source, str(self.path), "exec"), module.__dict__)


def judged() -> str:
    """What becomes of a mutant that is imported in this process."""
    import conftest  # noqa: F401  (sets up jax)

    os.environ.pop("FCJAX_RAISE_REFUTED", None)
    import zoo
    import zoo_blocks
    import zoo_conv
    import zoo_time  # noqa: F401  (adds to the zoo)

    refuted = False
    for family in (zoo, zoo_conv, zoo_blocks):
        for name in family.names():
            try:
                right, found = _compared(family.build(name))
            except Exception as error:
                return f"stopped by {name}: {type(error).__name__}: {error}".split("\n")[0][:160]
            if not right:
                return f"missed by {name}"
            refuted = refuted or found
    return "found" if refuted else "idle"


def _compared(network) -> tuple[bool, bool]:
    """Whether a network comes out right, and whether the check refuted anything."""
    import jax
    import numpy as np
    from training import backprop, floating

    import fcjax
    from fcjax.numbers.interpreter import values_of
    from fcjax.planning.plan import always_fold

    args = network.example_args
    plain, params = backprop(network)

    def loss(apply):
        def of(p):
            leaves = [x for x in jax.tree.leaves(apply(p, *args)) if zoo_is_inexact(x)]
            return sum((jax.numpy.sin(x) * x).sum() for x in leaves)

        return jax.value_and_grad(of)

    from zoo import is_inexact as zoo_is_inexact

    with always_fold():
        fc = fcjax.front_contribute(network.apply_fn, network.params, *args)
        found = values_of(loss(fc.apply), fc.params)
    expected = values_of(loss(plain), floating(network.params))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    largest = max(np.max(np.abs(x), initial=0.0) for x in jax.tree.leaves(expected))
    right = all(np.max(np.abs(a - b), initial=0.0) <= CLOSE * largest for a, b in pairs)
    del params
    return right, bool(fc.plan.refuted)


# --- all of them --------------------------------------------------------------------------------


def run(module: str, number: int) -> str:
    command = [sys.executable, __file__, "--judge", module, str(number)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "stopped by the clock"
    lines = made.stdout.strip().split("\n")
    return lines[-1] if made.returncode == 0 else f"stopped: {made.stderr.strip()[-160:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", nargs="*", choices=MODULES, default=list(MODULES))
    parser.add_argument("--judge", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.judge:
        module, number = options.judge
        sys.meta_path.insert(0, _Mutant(module, int(number)))
        print(judged())
        return
    verdicts: Counter[str] = Counter()
    for module, number in chosen(options.module, options.count, options.seed):
        _, what = mutated(path_of(module).read_text(), number)
        verdict = run(module, number)
        verdicts[verdict.split()[0].rstrip(":")] += 1
        print(
            json.dumps({"module": module, "number": number, "what": what, "verdict": verdict}),
            flush=True,
        )
    harmful = verdicts["found"] + verdicts["missed"]
    print(f"{verdicts['found']} of {harmful} that do harm were found; {dict(verdicts)}")


if __name__ == "__main__":
    main()
