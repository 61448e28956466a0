"""The order of products: against brute force, and against the matrix-chain optimum."""

from __future__ import annotations

import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcjax.expressions.terms import Label
from fcjax.planning.contraction import Cost, Operand, members, pair, price, search, written

moderate = settings(max_examples=30, deadline=None, derandomize=True)


def operand(*labels, trainable=True, once=False):
    return Operand(frozenset(labels), trainable, once, 4)


@functools.cache
def orders(numbers):
    """Every way to multiply the operands in pairs, a half with the first number on the left."""
    if len(numbers) == 1:
        return numbers
    first, *rest = numbers
    found = []
    for count in range(len(rest)):
        for chosen in itertools.combinations(rest, count):
            left = (first, *chosen)
            right = tuple(n for n in rest if n not in chosen)
            found += itertools.product(orders(left), orders(right))
    return tuple(found)


def time_of(order, operands, keep, runs=1):
    return price(order, operands, keep, runs)[1].time


def best_time(operands, keep, runs=1):
    everything = orders(tuple(range(len(operands))))
    return min(time_of(order, operands, keep, runs) for order in everything)


def chain(widths, trainable=None):
    """Matrices between consecutive widths, the outermost labels kept."""
    labels = [Label(width) for width in widths]
    trains = trainable or (True,) * (len(widths) - 1)
    links = zip(itertools.pairwise(labels), trains, strict=True)
    operands = [operand(*ends, trainable=t) for ends, t in links]
    return operands, frozenset({labels[0], labels[-1]})


@st.composite
def short_terms(draw):
    """Two to four operands over up to five labels, some of them kept, repeated or frozen."""
    labels = [
        Label(size)
        for size in draw(st.lists(st.sampled_from((2, 8, 64, 512)), min_size=2, max_size=5))
    ]
    some = st.lists(st.sampled_from(labels), min_size=1, max_size=3, unique=True)
    one = st.builds(
        lambda axes, trainable, once: operand(*axes, trainable=trainable, once=once),
        some, st.booleans(), st.booleans(),
    )  # fmt: skip
    keep = draw(st.lists(st.sampled_from(labels), max_size=3))
    return (
        draw(st.lists(one, min_size=2, max_size=4)),
        frozenset(keep),
        draw(st.sampled_from((1, 16))),
    )


def is_chain_from_a_vector(operands, keep):
    """Whether a term is ordered from its vector instead of by search."""
    return any(len(o.labels) == 1 and o.labels - keep for o in operands)


@given(short_terms())
@moderate
def test_search_is_as_good_as_brute_force(term):
    operands, keep, runs = term
    order = search(operands, keep, runs)
    assert sorted(members(order)) == list(range(len(operands)))
    found, best = time_of(order, operands, keep, runs), best_time(operands, keep, runs)
    if is_chain_from_a_vector(operands, keep):
        assert found >= best * (1 - 1e-12)
    else:
        assert found == pytest.approx(best, rel=1e-12)


# an outer product of tiny matrices could spare the start of an operation, which no chain order has
widths = st.lists(st.sampled_from((32, 128, 512, 2048)), min_size=4, max_size=6)


@given(widths, st.data())
@moderate
def test_chains_are_ordered_as_matrix_chains(sizes, data):
    count = len(sizes) - 1
    trains = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    operands, keep = chain(sizes, trains)
    found = time_of(search(operands, keep), operands, keep)
    assert found == pytest.approx(best_time(operands, keep), rel=1e-12)


def test_textbook_chain():
    """Operation counts alone decide where matrices are large: CLRS's dimensions, scaled."""
    operands, keep = chain([100 * n for n in (30, 35, 15, 5, 10, 20, 25)])
    assert unordered(search(operands, keep)) == unordered(((0, (1, 2)), ((3, 4), 5)))


def unordered(order):
    """An order with the halves of its pairs exchangeable."""
    return order if isinstance(order, int) else frozenset(map(unordered, order))


def test_order_of_listing_does_not_matter():
    operands, keep = chain([64, 1024, 32, 512, 16, 256])
    times = {
        round(time_of(search(shuffled, keep), shuffled, keep))
        for shuffled in itertools.islice(itertools.permutations(operands), 0, 120, 7)
    }
    assert len(times) == 1


@pytest.mark.parametrize("reverse", [False, True])
def test_vector_ended_chains_are_matrix_vector_products(reverse):
    labels = [Label(n) for n in (64, 128, 32, 16)]
    operands = [operand(labels[0]), *(operand(*ends) for ends in itertools.pairwise(labels))]
    expected = (((0, 1), 2), 3)
    if reverse:
        operands, expected = operands[::-1], (((3, 2), 1), 0)
    assert search(operands, frozenset({labels[-1]})) == expected


def test_long_stars_are_ordered_greedily_and_completely():
    hub = Label(4)
    operands = [operand(hub, Label(2)) for _ in range(9)]
    keep = frozenset().union(*(o.labels for o in operands)) - {hub}
    assert sorted(members(search(operands, keep))) == list(range(9))


def test_one_operand_is_its_own_order():
    assert search([operand(Label(3))], frozenset()) == 0


# --- prices ---


@pytest.mark.parametrize(
    ("trainable", "passes"), [((0, 0), 1), ((1, 0), 2), ((0, 1), 2), ((1, 1), 3)]
)
def test_a_product_has_one_pass_forward_and_one_for_each_gradient(trainable, passes):
    n, e, k = Label(256), Label(512), Label(1024)
    a, b = operand(n, e, trainable=bool(trainable[0])), operand(e, k, trainable=bool(trainable[1]))
    result, cost = pair(a, b, frozenset({n, k}))
    assert result.labels == {n, k}
    assert result.trainable == any(trainable)
    assert cost.flops == 2 * 256 * 512 * 1024 * passes
    assert cost.held == (256 * 1024 * 4 if any(trainable) else 0)


def test_frozen_chains_are_cheaper_than_trained_ones():
    keep_and = [
        chain([64, 256, 256, 64], trains)
        for trains in ((True,) * 3, (False, True, True), (False,) * 3)
    ]
    times = [time_of(((0, 1), 2), operands, keep) for operands, keep in keep_and]
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == 3


def test_what_is_formed_once_is_shared_by_all_runs():
    a, b = (
        operand(*ends, once=True) for ends in itertools.pairwise([Label(8), Label(16), Label(4)])
    )
    keep = a.labels ^ b.labels
    alone, shared = (pair(a, b, keep, runs)[1] for runs in (1, 32))
    assert shared.time == pytest.approx(alone.time / 32)
    changing = operand(*b.labels)
    assert pair(a, changing, keep, 32)[1] == pair(a, changing, keep, 1)[1]


def test_runs_move_invariant_products_out_of_the_loop():
    """x A B with few rows is x A first; run often, with A and B the same, A B is formed once."""
    n, d, h = Label(8), Label(64), Label(64)
    out = Label(64)
    operands = [operand(n, d), operand(d, h, once=True), operand(h, out, once=True)]
    keep = frozenset({n, out})
    assert unordered(search(operands, keep, 1)) == unordered(((0, 1), 2))
    assert unordered(search(operands, keep, 1000)) == unordered((0, (1, 2)))


def test_elementwise_products_hold_nothing():
    n, d = Label(16), Label(8)
    result, cost = pair(operand(n, d), operand(d), frozenset({n, d}))
    assert result.labels == {n, d}
    assert cost.held == 0
    assert cost.time > 0


def test_prices_add_up_over_an_order():
    operands, keep = chain([8, 16, 32, 4])
    first, one = pair(operands[0], operands[1], keep | operands[2].labels)
    _, two = pair(first, operands[2], keep)
    assert price(((0, 1), 2), operands, keep)[1] == Cost() + one + two


def test_writing_a_frozen_value_holds_nothing():
    label = Label(8)
    assert written(operand(label, trainable=False)).held == 0
    assert written(operand(label)).held == 32
    assert written(operand(label)).time == 2 * written(operand(label, trainable=False)).time
