"""Hidden spaces of networks, and what backpropagation reaches of them, as plain arrays."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from segments import balanced, orthogonal

from fcjax.expressions.written import written
from fcjax.spaces import subspaces
from fcjax.spaces.hidden import find
from fcjax.spaces.subspaces import change, made_with, outside, reach, span, used
from fcjax.tracing import trace
from fcjax.transform import DATA, PARAM

X = jax.ShapeDtypeStruct((7, 4), jnp.float64)
EXACT = 1e-12


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float64)


def spaces_of(fn, params, *data, arguments=()):
    """The spaces of ``fn(*params, *data)``."""
    data = data or (X,)
    flat = trace.flatten(jax.make_jaxpr(fn)(*params, *data))
    network = written(flat, [PARAM] * len(params) + [DATA] * len(data))
    return find(network, len(params), arguments)


def places(fn, params, *data, **options):
    """The spaces as sets of pairs: number of the parameter, piece of its axes."""
    found = spaces_of(fn, params, *data, **options).found
    return [{(p.leaf, p.piece) for p in space.places} for space in found]


def normal(*sizes, seed=0):
    return np.random.default_rng((seed, *sizes)).standard_normal(sizes)


# --- which axes stand on one space ---

HIDDEN, OUT, SQUARE, BIAS = shape(4, 9), shape(9, 3), shape(9, 9), shape(9)


JOINED = {
    "pair": (lambda w, v, x: x @ w @ v, [HIDDEN, OUT], [{(0, 1), (1, 0)}]),
    "chain": (
        lambda w, m, v, x: x @ w @ m @ v, [HIDDEN, SQUARE, OUT],
        [{(0, 1), (1, 0)}, {(1, 1), (2, 0)}],
    ),
    "bias": (lambda w, b, v, x: (x @ w + b) @ v, [HIDDEN, BIAS, OUT],
             [{(0, 1), (1, 0), (2, 0)}]),
    "branches": (lambda w, u, v, x: (x @ w + jnp.tanh(x) @ u) @ v, [HIDDEN, HIDDEN, OUT],
                 [{(0, 1), (1, 1), (2, 0)}]),
    "two readers": (lambda w, v, u, x: jnp.tanh((h := x @ w) @ v) + jnp.sin(h @ u),
                    [HIDDEN, OUT, OUT], [{(0, 1), (1, 0), (2, 0)}]),
    "identity edge": (
        lambda w, a, b, v, x: ((h := x @ w) + h @ a @ b) @ v,
        [HIDDEN, shape(9, 5), shape(5, 9), OUT],
        [{(0, 1), (1, 0), (2, 1), (3, 0)}, {(1, 1), (2, 0)}],
    ),
    "two uses": (lambda w, m, v, x: x @ w @ m @ m @ v, [HIDDEN, SQUARE, OUT],
                 [{(0, 1), (1, 0), (1, 1), (2, 0)}]),
    "autoencoder": (lambda w, x: x @ w @ w.T, [HIDDEN], [{(0, 1)}]),
    "constant scale": (lambda w, v, x: (2.0 * (x @ w)) @ v, [HIDDEN, OUT], [{(0, 1), (1, 0)}]),
    "scalar gain": (lambda w, g, v, x: (g * (x @ w)) @ v, [HIDDEN, shape(), OUT],
                    [{(0, 1), (2, 0)}]),
    # Of two axes along which two parameters meet, the larger.
    "heads": (
        lambda w, v, x: jnp.einsum("bhk,hko->bo", jnp.einsum("bi,ihk->bhk", x, w), v),
        [shape(4, 2, 5), shape(2, 5, 3)], [{(0, 2), (1, 1)}],
    ),
    "trace": (lambda w, v, x: jnp.tanh(x) * jnp.trace(w @ v), [HIDDEN, shape(9, 4)],
              [{(0, 1), (1, 0)}]),
    "mapped": (
        lambda w, v, x: jax.vmap(lambda w, v: jnp.tanh(x @ w @ v))(w, v),
        [shape(2, 4, 9), shape(2, 9, 3)], [{(0, 2), (1, 1)}],
    ),
    "checkpoint": (jax.checkpoint(lambda w, v, x: jnp.tanh(x @ w @ v)), [HIDDEN, OUT],
                   [{(0, 1), (1, 0)}]),
    "both branches": (
        lambda w, v, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ v, lambda: jnp.tanh(x @ w @ v)),
        [HIDDEN, OUT], [{(0, 1), (1, 0)}],
    ),
    "jit": (jax.jit(lambda w, v, x: x @ w @ v), [HIDDEN, OUT], [{(0, 1), (1, 0)}]),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINED)
def test_axes_that_meet_only_each_other_are_one_space(name):
    fn, params, expected = JOINED[name]
    found = places(fn, params)
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


def constant_diagonal(w, v, x):
    return (x @ w * np.arange(1.0, 10.0)) @ v


PINNED = {
    "relu": (lambda w, v, x: jax.nn.relu(x @ w) @ v, [HIDDEN, OUT]),
    "output": (lambda w, v, x: (x @ w @ v, x @ w), [HIDDEN, OUT]),
    "gain": (lambda w, g, v, x: (x @ w * g) @ v, [HIDDEN, BIAS, OUT]),
    "constant diagonal": (constant_diagonal, [HIDDEN, OUT]),
    "constant matrix": (lambda w, v, x: x @ w @ np.ones((9, 9)) @ v, [HIDDEN, OUT]),
    "slice": (lambda w, v, x: x @ w @ v + jnp.tanh((x @ w)[:, :3]), [HIDDEN, OUT]),
    "slice of a weight": (lambda w, v, x: (x @ w)[:, :5] @ v[:5], [HIDDEN, OUT]),
    "read elsewhere": (lambda w, v, x: x @ w @ v + jnp.sum(jnp.abs(w)), [HIDDEN, OUT]),
    "norm of a weight": (lambda w, v, x: x @ w @ (v / jnp.max(v)), [HIDDEN, OUT]),
    "constant bias": (lambda w, v, x: (x @ w + np.arange(9.0)) @ v, [HIDDEN, OUT]),
    "sum of channels": (lambda w, v, x: x @ w @ v + jnp.sum(x @ w, -1, keepdims=True),
                        [HIDDEN, OUT]),
    "split in two ways": (
        lambda w, v, x: jnp.einsum("bhk,hko->bo", (x @ w).reshape(-1, 3, 3), v.reshape(3, 3, 3)),
        [HIDDEN, OUT],
    ),
    "carry": (
        lambda w, v, x: jax.lax.scan(lambda h, _: (jnp.tanh(h @ w @ v), None), x, length=3)[0]
        @ w, [HIDDEN, shape(9, 4)],
    ),
    "tied to an output": (lambda w, x: jnp.tanh(x @ w) @ w.T, [HIDDEN]),
}  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
def test_axes_that_are_read_entry_by_entry_are_no_space(name):
    fn, params = PINNED[name]
    hidden = {(0, 1)}
    assert not any(found & hidden for found in places(fn, params))


def test_loops_over_stacked_layers_have_a_basis_for_each():
    def apply(w, v, x):
        return jax.lax.scan(lambda h, p: (jnp.tanh(h @ p[0] @ p[1]), None), x, (w, v))[0]

    (space,) = spaces_of(apply, [shape(3, 4, 9), shape(3, 9, 4)]).found
    assert (space.depth, space.dimension) == (1, 9)


def test_inputs_are_spaces_if_their_argument_is_given():
    two = lambda w, u, x: jnp.tanh(x @ w) + jnp.sin(x @ u)  # noqa: E731
    found = spaces_of(two, [HIDDEN, HIDDEN], arguments=[0]).found
    assert [{(p.leaf, p.piece) for p in s.places} for s in found] == [{(0, 0), (1, 0)}]
    assert found[0].source.argument == 0
    assert spaces_of(two, [HIDDEN, HIDDEN]).found == ()


def test_inputs_that_something_else_reads_with_the_same_weight_are_no_space():
    fn = lambda w, x: jnp.tanh(x @ w) + jnp.sin(jnp.cos(x) @ w)  # noqa: E731
    assert spaces_of(fn, [HIDDEN], arguments=[0]).found == ()


# --- what is reached ---


def slow_reach(spaces, arrays):
    """Ranks by singular values of everything at once, again and again until nothing changes."""
    bases = [None] * len(spaces.found)
    ranks = None
    while True:
        bases = [_stacked(spaces, arrays, bases, s) for s in range(len(spaces.found))]
        now = [tuple(b.shape[1] for b in basis) for basis in bases]
        if now == ranks:
            return ranks, bases
        ranks = now


def _stacked(spaces, arrays, bases, number):
    space = spaces.found[number]
    slices = np.shape(arrays[space.places[0].leaf])[0] if space.depth else 1
    found = []
    for i in range(slices):
        rows = [np.zeros((1, space.dimension))]
        if bases[number] is not None:
            rows.append(bases[number][i].T)
        for place in space.places:
            sizes = list(itertools.chain(*spaces.splits[place.leaf]))
            array = np.reshape(arrays[place.leaf], sizes)
            for other, there in enumerate(spaces.found):
                for p in there.places:
                    if p.leaf == place.leaf and p.piece != place.piece:
                        basis = np.zeros((there.dimension, 1))
                        if bases[other] is not None:
                            basis = bases[other][i if there.depth else 0]
                        if basis.shape[1] == 0:
                            basis = np.zeros((there.dimension, 1))
                        array = np.moveaxis(np.tensordot(array, basis, (p.piece, 0)), -1, p.piece)
            array = array / (np.linalg.norm(arrays[place.leaf]) or 1.0)
            array = array[i : i + 1] if space.depth else array
            rows.append(np.moveaxis(array, place.piece, -1).reshape(-1, space.dimension))
        _, sizes, right = np.linalg.svd(np.concatenate(rows), full_matrices=False)
        found.append(right[sizes > 1e-9].T)
    return found


def agree(spaces, arrays):
    """The ranks that ``reach`` finds, which must be those of the reference, with its spaces."""
    found = reach(spaces, arrays)
    ranks, slow = slow_reach(spaces, arrays)
    for i, (space, basis) in enumerate(zip(spaces.found, found.bases, strict=True)):
        if basis is None:
            assert set(ranks[i]) == {space.dimension}
            continue
        assert basis.ranks == ranks[i]
        for columns, rank, expected in zip(basis.columns, basis.ranks, slow[i], strict=True):
            kept = columns[:, :rank]
            np.testing.assert_allclose(kept.T @ kept, np.eye(rank), atol=1e-10)
            np.testing.assert_allclose(kept @ kept.T, expected @ expected.T, atol=1e-7)
            assert not columns[:, rank:].any()
    return [r[0] if len(r) == 1 else r for r in ranks]


def matrix(rng, n, m):
    """A matrix of one of the kinds that initial values have."""
    kind = rng.choice(["normal", "orthogonal", "orthogonal", "low rank", "float32"])
    if kind == "orthogonal":
        return orthogonal(n, m, seed=int(rng.integers(1 << 30)))
    made = rng.standard_normal((n, m)) * 10.0 ** rng.integers(-3, 3)
    if kind == "low rank":
        return rng.standard_normal((n, 2)) @ rng.standard_normal((2, m))
    return np.float64(np.float32(made)) if kind == "float32" else made


@pytest.mark.parametrize("seed", range(20))
def test_random_chains_with_biases_reach_what_the_reference_finds(seed):
    rng = np.random.default_rng(seed)
    sizes = [4, *rng.integers(3, 40, size=rng.integers(1, 5)), 3]
    if rng.random() < 0.5:
        sizes[1:-1] = [sizes[1]] * len(sizes[1:-1])
    arrays = [matrix(rng, n, m) for n, m in itertools.pairwise(sizes)]
    count = len(arrays)
    has_bias = rng.random(count) < 0.3
    arrays += [rng.standard_normal(m) for m in sizes[1:]]

    def apply(*args):
        *params, x = args
        for w, b, has in zip(params[:count], params[count:], has_bias, strict=True):
            x = x @ w + b if has else x @ w
        return x

    agree(spaces_of(apply, arrays), arrays)


@pytest.mark.parametrize("seed", range(10))
def test_random_graphs_reach_what_the_reference_finds(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(6, 30))
    arrays = [
        rng.standard_normal((4, n)), matrix(rng, n, 5), matrix(rng, 5, n), matrix(rng, n, n),
        rng.standard_normal((n, 3)), rng.standard_normal(n), matrix(rng, 4, n),
    ]  # fmt: skip
    uses = rng.random(4) < 0.5

    def apply(w, a, b, m, v, bias, u, x):
        h = x @ w
        h = h + h @ a @ b if uses[0] else h
        h = h + bias if uses[1] else h
        h = h + jnp.tanh(x) @ u if uses[2] else h
        return jnp.tanh(h @ v) + (h @ m @ v if uses[3] else 0.0)

    agree(spaces_of(apply, arrays), arrays)


@pytest.mark.parametrize("seed", range(5))
def test_random_layers_in_loops_reach_what_the_reference_finds(seed):
    rng = np.random.default_rng(seed)
    arrays = [np.stack([matrix(rng, 4, 12) for _ in range(3)]), normal(3, 12, 4), normal(3, 12)]
    pairs = [balanced(4, 12, 4, seed=seed), [orthogonal(4, 12), orthogonal(12, 4)]]
    for i, (up, down) in enumerate(pairs):
        arrays[0][i], arrays[1][i] = up, down
    arrays[2][0] = 0.0

    def apply(w, v, b, x):
        def layer(h, p):
            return jnp.tanh((h @ p[0] + p[2]) @ p[1]), None

        return jax.lax.scan(layer, x, (w, v, b))[0]

    ((first, _, last),) = agree(spaces_of(apply, arrays), arrays)
    assert first == 4
    assert last > first


def test_known_ranks():
    pair = [normal(4, 40), normal(40, 3)]
    assert agree(spaces_of(lambda w, v, x: x @ w @ v, pair), pair) == [7]
    biased = [*pair, normal(40)]
    assert agree(spaces_of(lambda w, v, b, x: (x @ w + b) @ v, biased), biased) == [8]
    deep = [pair[0], orthogonal(40), orthogonal(40, seed=1), pair[1]]
    apply = lambda w, a, b, v, x: x @ w @ a @ b @ v  # noqa: E731
    assert agree(spaces_of(apply, deep), deep) == [7, 7, 7]
    random = [pair[0], normal(40, 40), pair[1]]
    assert agree(spaces_of(lambda w, a, v, x: x @ w @ a @ v, random), random) == [40, 40]
    chain = balanced(4, 40, 40, 3)
    assert agree(spaces_of(lambda w, a, v, x: x @ w @ a @ v, chain), chain) == [3, 3]
    tied = [normal(4, 40)]
    assert agree(spaces_of(lambda w, x: x @ w @ w.T, tied), tied) == [4]


def test_orthogonal_matrices_made_in_float32_count_as_orthogonal():
    arrays = [normal(4, 64), np.float64(np.float32(orthogonal(64))), normal(64, 3)]
    apply = lambda w, a, v, x: x @ w @ a @ v  # noqa: E731
    found = reach(spaces_of(apply, arrays), arrays)
    assert [b.ranks for b in found.bases] == [(7,), (7,)]
    nudged = [arrays[0], arrays[1] + 1e-7 * normal(64, 64), arrays[2]]
    assert reach(spaces_of(apply, nudged), nudged).bases == (None, None)


# --- saddles ---

CHAIN = lambda w, v, x: x @ w @ v  # noqa: E731
LOW = normal(4, 1) @ normal(1, 20)

SADDLES = {
    "all zero": ([np.zeros((4, 20)), np.zeros((20, 3))], {0: 3}),
    "both of rank one": ([LOW, normal(20, 1) @ normal(1, 3)], {0: 3}),
    "second zero": ([normal(4, 20), np.zeros((20, 3))], {}),
    "first zero": ([np.zeros((4, 20)), normal(20, 3)], {}),
    "first of rank one": ([LOW, normal(20, 3)], {}),
    "balanced": (balanced(4, 20, 3), {}),
    "random": ([normal(4, 20), normal(20, 3)], {}),
    "bottleneck": ([normal(4, 2), normal(2, 3)], {}),
}


@pytest.mark.parametrize("name", SADDLES)
def test_saddles_are_where_fewer_directions_are_reached_than_can_be_used(name):
    arrays, expected = SADDLES[name]
    assert reach(spaces_of(CHAIN, arrays), arrays).saddles == expected


# --- plain linear algebra ---


def with_singular_values(values, rows, columns, seed=0):
    n = len(values)
    return orthogonal(rows, n, seed=seed) @ np.diag(values) @ orthogonal(n, columns, seed=seed + 1)


SPECTRA = {
    "all new": (np.linspace(1, 0.5, 30), 30),
    "nothing": (np.full(20, 1e-15), 0),
    "few among many": ([1.0, 0.5, 1e-3], 3),
    "half": (np.logspace(0, -20, 40), None),
    "just above": ([1.0, 3e-12], 2),
    "just below": ([1.0, 3e-13], 1),
    "wide range": (np.logspace(0, -11, 50), 50),
    "many and noise": ([*np.ones(40), *np.full(40, 1e-14)], 40),
}


@pytest.mark.parametrize(("rows", "columns"), [(200, 100), (100, 200), (90, 100)])
@pytest.mark.parametrize("name", SPECTRA)
def test_new_directions_are_those_of_singular_values(name, rows, columns):
    values, rank = SPECTRA[name]
    rank = int(np.sum(np.asarray(values) > EXACT)) if rank is None else rank
    array = with_singular_values(values, rows, columns)
    found, doubt = subspaces._new_directions(array, np.zeros((columns, 0)), EXACT)
    assert found.shape == (columns, rank)
    np.testing.assert_allclose(found.T @ found, np.eye(rank), atol=1e-12)
    assert np.linalg.norm(array - array @ found @ found.T, 2) <= 3 * EXACT
    assert doubt == any(EXACT < v < 1e3 * EXACT for v in values)


@pytest.mark.parametrize("new", [0, 1, 5, 40])
def test_new_directions_are_orthogonal_to_the_old_ones(new):
    whole = orthogonal(120, 60, seed=3)
    basis = whole[:, :20]
    array = normal(200, 20) @ basis.T + normal(200, new) @ whole[:, 20 : 20 + new].T
    found, _ = subspaces._new_directions(array, basis, EXACT * np.linalg.norm(array, 2))
    assert found.shape[1] == new
    np.testing.assert_allclose(basis.T @ found, 0.0, atol=1e-12)
    np.testing.assert_allclose(found.T @ found, np.eye(new), atol=1e-12)


def test_new_directions_never_exceed_the_space():
    basis = orthogonal(10, 8)
    found, _ = subspaces._new_directions(normal(50, 10), basis, EXACT)
    assert found.shape[1] == 2


@pytest.mark.parametrize(("rows", "rank"), [(50, 3), (5, 5), (200, 20)])
def test_span_is_an_orthonormal_basis_of_the_rows(rows, rank):
    array = normal(rows, rank) @ normal(rank, 30)
    basis = span(array)
    assert basis.ranks == (rank,)
    assert outside(array, basis.columns[0]) < 1e-12
    assert outside(normal(1, 30, seed=1), basis.columns[0]) > 0.1


def test_span_of_nothing_is_nothing():
    assert span(np.zeros((5, 4))).ranks == (0,)


def test_used_selects_coordinates():
    array = np.zeros((5, 6))
    array[2, 1], array[4, 3] = 1.0, -1e-300
    assert used(array).ranks == (2,)
    np.testing.assert_array_equal(used(array).columns[0], np.eye(6)[:, [1, 3]])


def test_outside_is_relative_to_the_largest_row():
    basis = np.eye(3)[:, :2]
    assert outside(np.array([[10.0, 0, 0], [0, 0, 1]]), basis) == pytest.approx(0.1)
    assert outside(np.zeros((2, 3)), basis) == 0.0


def test_made_with_tells_the_dtype_that_made_the_values():
    wide = normal(5, 5)
    assert made_with(wide) == EXACT
    assert made_with(np.float32(wide)) == made_with(np.float64(np.float32(wide))) > 1e-6
    assert made_with(np.float64(jnp.bfloat16(0.1))) == made_with(np.float32(wide))


@pytest.mark.parametrize("library", [np, jnp])
@pytest.mark.parametrize(("piece", "depth"), [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1), (2, 2)])
def test_change_contracts_one_axis(library, piece, depth):
    array = library.asarray(normal(3, 4, 5))
    slices = math.prod(array.shape[:depth])
    matrices = normal(slices, array.shape[piece], 2)
    made = change(array, piece, library.asarray(matrices), depth)
    for lead in np.ndindex(*array.shape[:depth]):
        number = int(np.ravel_multi_index(lead, array.shape[:depth])) if depth else 0
        expected = np.moveaxis(
            np.tensordot(array[lead], matrices[number], (piece - depth, 0)), -1, piece - depth
        )
        np.testing.assert_allclose(made[lead], expected, rtol=1e-12)
