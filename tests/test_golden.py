"""The analysis of every network of the zoo against its annotation by hand."""

from __future__ import annotations

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
import zoo_blocks
import zoo_conv
import zoo_time  # noqa: F401 (adds to the zoo)

import fcjax

FAMILIES = {zoo: golden.ZOO, zoo_conv: golden.CONVOLUTIONS, zoo_blocks: golden.BLOCKS}
SIZES = {zoo: (), zoo_conv: (32,), zoo_blocks: (256,)}

each_network = pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, id=name if family is zoo else f"{family.__name__}-{name}")
        for family, annotations in FAMILIES.items()
        for name in annotations
    ],
)


def useful(family, name):
    """A network at the size of its annotation: its function, parameters and arguments."""
    sizes = FAMILIES[family][name].sizes
    network = family.build(name, *(SIZES[family] if sizes is None else sizes))
    *others, x = network.example_args
    shape = (64, 32, 32, x.shape[-1]) if family is zoo_conv else (1024 * x.shape[0], *x.shape[1:])
    dtype = jnp.float32 if zoo.is_inexact(x) else x.dtype
    params, others = zoo.cast((network.params, others), jnp.float32)
    return network.apply_fn, params, (*others, jax.ShapeDtypeStruct(shape, dtype))


def named(names, paths):
    """The paths that stand under names separated by blanks; each name must stand for some."""
    found = set()
    for name in names.split():
        under = {p for p in paths if name == "*" or p == name or p.startswith(f"{name}/")}
        assert under, f"the network has no {name}"
        found |= under
    return found


def segments(annotation, paths):
    """The segment of each leaf: what stands with it in any of the annotated ones."""
    groups = [named(names, paths) for names in annotation.segments]
    return {
        p: tuple(sorted(set().union(*(group for group in groups if p in group)))) for p in paths
    }


def shapes(annotation, rows):
    """The shape in which each leaf is trained with SGD."""
    own = {row.path.removesuffix("/value"): row.shape for row in rows}
    assert not set(annotation.reduced) - set(own)
    return own | annotation.reduced


@pytest.mark.parametrize("family", FAMILIES)
def test_every_network_is_annotated(family):
    assert sorted(FAMILIES[family]) == sorted(family.names())


@each_network
@pytest.mark.parametrize("outer", [jax.jit, lambda f: f], ids=["jitted", "plain"])
def test_segments_rules_and_reasons(family, name, outer):
    apply_fn, params, args = useful(family, name)
    fc = fcjax.front_contribute(outer(apply_fn), params, *args)
    rows, annotation = {row.path: row for row in fc.report}, FAMILIES[family][name]
    left = {p: reason for names, reason in annotation.left.items() for p in named(names, rows)}
    rules = {p: "train" if p in left else "collapse" for p in rows}
    wanted = segments(annotation, rows)
    assert {p for p in rows if not wanted[p]} == {*left, *named(annotation.removed, rows)}
    assert {p: row.segment for p, row in rows.items()} == wanted
    assert {p: row.rule for p, row in rows.items()} == rules
    assert {p: rows[p].reason for p, reason in left.items() if reason not in rows[p].reason} == {}


@each_network
def test_reduced_shapes_with_sgd(family, name):
    """A leaf of another shape is compressed, one of none folded; other rules are as without."""
    apply_fn, params, args = useful(family, name)
    fc = fcjax.front_contribute(apply_fn, params, *args, optimizer=optax.sgd(1e-2))
    annotation, rows = FAMILIES[family][name], fc.report
    found = {row.path.removesuffix("/value"): row.reduced_shape for row in rows}
    assert found == shapes(annotation, rows)
    smaller = {row.path for row in rows if row.reduced_shape not in (row.shape, None)}
    assert {row.path for row in rows if row.rule == "compress"} == smaller


# --- what no network of the zoo shows -----------------------------------------------------------

VECTOR = np.arange(1.0, 5)


def chain(params, x):
    """An elementwise chain, then a matrix."""
    return jnp.tanh((x * params["u"] * params["v"]) @ params["w"])


def table(params, ids):
    """Layers that act on each row of a table alone."""
    return jax.nn.gelu(params["table"][ids] @ params["up"]) @ params["down"]


def matrices(params, x):
    """A chain of matrices, then another behind tanh."""
    return jnp.tanh(x @ params["u"] @ params["v"]) @ params["w"]


def reports(apply_fn, params, x, **options):
    """The rows of a network's report, by path."""
    params = {name: jnp.asarray(value) for name, value in params.items()}
    fc = fcjax.front_contribute(apply_fn, params, x, **options)
    return {row.path: row for row in fc.report}


def test_segment_of_a_chain_holds_the_leaf_that_is_folded_away():
    params = {"u": VECTOR, "v": -VECTOR, "w": np.ones((4, 3))}
    rows = reports(chain, params, jnp.ones((1024, 4)), optimizer=optax.sgd(0.1))
    assert [row.rule for row in rows.values()] == ["fold", "collapse", "collapse"]
    assert {row.segment for row in rows.values()} == {("u", "v", "w")}
    assert rows["u"].reduced_shape is None


def test_segment_of_matrices_that_are_trained_as_their_product():
    params = {"u": 2 * np.eye(4), "v": 2 * np.eye(4), "w": np.ones((4, 3))}
    options = {"optimizer": optax.sgd(0.1), "exactness": "flow"}
    rows = reports(matrices, params, jnp.ones((1024, 4)), **options)
    assert [row.rule for row in rows.values()] == ["fold", "fold", "train"]
    assert [row.segment for row in rows.values()] == [("u", "v"), ("u", "v"), ()]


def test_segment_of_an_effective_table():
    params = {"table": np.ones((16, 8)), "up": np.ones((8, 8)), "down": np.ones((8, 4))}
    rows = reports(table, params, jax.ShapeDtypeStruct((4096,), jnp.int32))
    assert {row.segment for row in rows.values()} == {("down", "table", "up")}
    assert all("computed for the 16 rows of table" in row.reason for row in rows.values())


BOUNDARIES = {
    "pow": lambda params, x: (x ** params["w"]).mean(1),
    "max": lambda params, x: jnp.maximum(x, params["w"]),
    "sort": lambda params, x: x * jnp.sort(params["w"]),
}


@pytest.mark.parametrize("operation", BOUNDARIES)
def test_reason_names_the_boundary_that_reads_a_leaf(operation):
    (row,) = reports(BOUNDARIES[operation], {"w": VECTOR}, jnp.ones((64, 4))).values()
    assert row.rule == "train"
    assert row.segment == ()
    assert row.reason == f"read by {operation}, which no linear segment crosses"
