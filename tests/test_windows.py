"""Index arithmetic of convolutions against enumeration, on integers alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fcjax.expressions import windows

CASES = 4000


def relation(*steps, offset):
    """The array over all indices that is True where ``sum(by * index) + offset == 0``."""
    total = np.int64(offset)
    for axis, (size, by) in enumerate(steps):
        shape = [size if i == axis else 1 for i in range(len(steps))]
        total = total + by * np.arange(size).reshape(shape)
    return total == 0


def convolution(rng):
    """Sizes of input, output and kernel, then spread, stride, dilation and low padding."""
    sizes = rng.integers(1, [8, 7, 4])
    return (*map(int, sizes), *map(int, rng.integers(1, [3, 4, 4])), int(rng.integers(-1, 4)))


def chain(seed):
    """Two convolutions in a row: ``(read, middle, taps, ...)`` and ``(middle, out, taps, ...)``."""
    rng = np.random.default_rng(seed)
    read, middle, *first = convolution(rng)
    _, *second = convolution(rng)
    if seed % 2:  # of the size that the first one makes without cropping
        taps, spread, stride, dilation, low = first
        middle = max(1, (spread * (read - 1) + 2 * low - dilation * (taps - 1)) // stride + 1)
    return (read, middle, *first), (middle, *second)


def reads(size, out, taps, spread, stride, dilation, low):
    """The steps of one convolution and its offset."""
    return ((size, spread), (out, -stride), (taps, -dilation)), low


def test_joined_windows_are_exact_if_and_only_if_the_sum_over_what_lies_between_says_so():
    exact = 0
    for seed in range(CASES):
        one, two = (reads(*layer) for layer in chain(seed))
        (i, j_out, a), (j_in, o, b) = one[0], two[0]
        both = np.einsum(
            "ija,job->iaob", relation(*one[0], offset=one[1]).astype(int),
            relation(*two[0], offset=two[1]).astype(int),
        )  # fmt: skip
        by_one, by_two = j_out[1], j_in[1]
        steps = [(size, by * by_two) for size, by in (i, a)]
        steps += [(size, -by * by_one) for size, by in (o, b)]
        composed = relation(*steps, offset=one[1] * by_two - two[1] * by_one)
        claimed = windows.joins_exactly(
            windows.values((i, a), one[1]), by_one, windows.values((o, b), two[1]), by_two, j_in[0]
        )
        assert claimed == np.array_equal(both, composed), (one, two)
        exact += claimed
    assert CASES / 20 < exact < CASES * 19 / 20


@pytest.mark.parametrize(
    ("first", "second", "exact"),
    [
        ((9, 9, 3, 1, 1, 1, 1), (9, 7, 3, 1, 1, 1, 0), True),  # SAME then VALID
        ((9, 9, 3, 1, 1, 1, 1), (9, 9, 1, 1, 1, 1, 0), True),  # SAME then pointwise
        ((9, 9, 3, 1, 1, 1, 1), (9, 5, 1, 1, 2, 1, 0), True),  # then pointwise with stride
        ((9, 9, 1, 1, 1, 1, 0), (9, 9, 3, 1, 1, 1, 1), True),  # pointwise then SAME
        ((9, 11, 3, 1, 1, 1, 2), (11, 11, 3, 1, 1, 1, 1), True),  # FULL then SAME
        ((9, 9, 3, 1, 1, 1, 1), (9, 9, 3, 1, 1, 1, 1), False),  # SAME then SAME
        ((9, 7, 3, 1, 1, 1, 0), (7, 7, 3, 1, 1, 1, 1), False),  # VALID then SAME
        ((9, 5, 1, 1, 2, 1, 0), (5, 5, 3, 1, 1, 1, 1), True),  # it ends where the input does
        ((10, 5, 1, 1, 2, 1, 0), (5, 5, 3, 1, 1, 1, 1), True),
        ((10, 4, 1, 1, 2, 1, 0), (4, 4, 3, 1, 1, 1, 1), False),  # it stops before
        ((9, 9, 1, 1, 1, 1, 0), (9, 18, 3, 2, 1, 1, 2), True),  # pointwise then transposed
        ((9, 18, 3, 2, 1, 1, 2), (18, 18, 1, 1, 1, 1, 0), True),  # transposed then pointwise
        ((9, 18, 3, 2, 1, 1, 2), (18, 16, 3, 1, 1, 1, 0), True),  # transposed then VALID
        ((9, 9, 3, 1, 1, 1, 1), (9, 17, 3, 2, 1, 1, 1), True),  # transposed, no padding
        ((9, 9, 3, 1, 1, 1, 1), (9, 18, 3, 2, 1, 1, 2), False),  # then transposed
    ],
)  # fmt: skip
def test_rules_of_thumb(first, second, exact):
    one, two = reads(*first), reads(*second)
    (i, j, a), (k, o, b) = one[0], two[0]
    rests = windows.values((i, a), one[1]), windows.values((o, b), two[1])
    assert windows.joins_exactly(rests[0], j[1], rests[1], k[1], j[0]) is exact


def test_always_solved_is_what_enumeration_says():
    found = set()
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        by, size, offset = int(rng.choice([-2, -1, 1, 2])), *map(int, rng.integers(1, 9, 2))
        steps = [tuple(map(int, pair)) for pair in rng.integers([1, -2], [4, 3], (2, 2))]
        solved = relation(*steps, (size, by), offset=offset).any(axis=-1).all()
        assert windows.always_solved(windows.values(steps, offset), by, size) == solved
        found.add(bool(solved))
    assert found == {True, False}


def test_views_are_slices():
    found = 0
    bys = [-3, -2, -1, 1, 2, 3]
    for by, other, offset in itertools.product(bys, bys, range(-6, 7)):
        size, count = 7, 3
        view = windows.as_view(by, size, other, count, offset)
        reached = relation((size, by), (count, other), offset=offset)
        if view is None:
            rising = by * other < 0
            assert not (rising and reached.any(axis=0).all())
            continue
        start, step = view
        found += 1
        expected = np.zeros((size, count), bool)
        expected[start + step * np.arange(count), np.arange(count)] = True
        np.testing.assert_array_equal(reached, expected)
    assert found > 20


def test_tap_grid_holds_all_positions_and_is_the_coarsest():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        positions = [
            windows.values([tuple(map(int, rng.integers(1, 4, 2)))], int(rng.integers(-3, 4)))
            for _ in range(rng.integers(1, 4))
        ]
        low, dilation, count = windows.tap_grid(positions)
        grid = low + dilation * np.arange(count)
        every = np.unique(np.concatenate(positions))
        assert np.isin(every, grid).all()
        assert (grid[0], grid[-1]) == (every[0], every[-1])
        assert np.gcd.reduce(np.diff(every), initial=0) in (dilation, 0)
