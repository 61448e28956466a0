"""The analysis of every network of the zoo against its hand-made annotation."""

from __future__ import annotations

import functools

import golden
import jax
import jax.numpy as jnp
import optax
import pytest
import zoo
import zoo_blocks
import zoo_conv
import zoo_time  # noqa: F401 (adds to the zoo)

import fcjax

FAMILIES = {zoo: golden.ZOO, zoo_conv: golden.CONVOLUTIONS, zoo_blocks: golden.BLOCKS}
SIZES = {zoo: (), zoo_conv: (32,), zoo_blocks: (64,)}
MORE = 64


def useful(family, name):
    """A network at the size of its annotation, and its arguments."""
    network = family.build(name, *SIZES[family])
    *others, x = network.example_args
    shape = (64, 32, 32, x.shape[-1]) if family is zoo_conv else (MORE * x.shape[0], *x.shape[1:])
    float32 = functools.partial(zoo.cast, dtype=jnp.float32)
    dtype = jnp.float32 if zoo.is_inexact(x) else x.dtype
    return (
        network.apply_fn,
        float32(network.params),
        (*float32(others), jax.ShapeDtypeStruct(shape, dtype)),
    )


def named(names, paths):
    """The paths that stand under names separated by blanks; each name must be there."""
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


def rules(annotation, paths):
    """The rule of each leaf, without an optimizer."""
    collapsed = set().union(*(named(n, paths) for n in (*annotation.segments, *annotation.removed)))
    return {p: "collapse" if p in collapsed else "train" for p in paths}


def shapes(annotation, rows):
    """The shape in which each leaf is trained with SGD."""
    own = {row.path: row.shape for row in rows}
    reduced = annotation.reduced
    paths = {p: p.removesuffix("/value") for p in own}
    assert not set(reduced) - set(paths.values())
    return {p: reduced.get(paths[p], own[p]) for p in own}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_network_is_annotated(family):
    assert sorted(FAMILIES[family]) == sorted(family.names())


def check(rows, annotation):
    paths = [row.path for row in rows]
    assert {row.path: row.segment for row in rows} == segments(annotation, paths)
    for names, reason in annotation.left.items():
        for row in rows:
            if row.path in named(names, paths):
                assert reason in row.reason, row


each_network = pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, id=name if family is zoo else f"{family.__name__}-{name}")
        for family, annotations in FAMILIES.items()
        for name in annotations
    ],
)


@each_network
@pytest.mark.parametrize("outer", [jax.jit, lambda f: f], ids=["jitted", "plain"])
def test_segments_rules_and_reasons(family, name, outer):
    apply_fn, params, args = useful(family, name)
    rows = fcjax.front_contribute(outer(apply_fn), params, *args).report
    annotation = FAMILIES[family][name]
    paths = [row.path for row in rows]
    assert {row.path: row.segment for row in rows} == segments(annotation, paths)
    assert {row.path: row.rule for row in rows} == rules(annotation, paths)
    for names, reason in annotation.left.items():
        found = {row.path: row.reason for row in rows if row.path in named(names, paths)}
        assert {p: r for p, r in found.items() if reason not in r} == {}


@each_network
def test_reduced_shapes_with_sgd(family, name):
    apply_fn, params, args = useful(family, name)
    fc = fcjax.front_contribute(jax.jit(apply_fn), params, *args, optimizer=optax.sgd(1e-2))
    annotation = FAMILIES[family][name]
    assert {row.path: row.reduced_shape for row in fc.report} == shapes(annotation, fc.report)
