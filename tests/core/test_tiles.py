"""2-D masks: right in both directions, the best of all, and greedy as its words say."""

from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.weights import weights_with_pattern
from twofour.core.errors import InputError
from twofour.core.masks import magnitude_mask, mask_of
from twofour.core.patterns import Pattern, is_pattern
from twofour.core.tiles import MOST_MASKS, search_of, tile_masks

TILED = ("2:4/2d", "1:2/2d", "1:3/2d", "4:8/2d", "3:4/2d", "2:5/2d", "3:7/2d")


@cache
def all_masks(n, m):
    """Every 0/1 matrix, sieved: slow."""
    rows = [row for row in product((True, False), repeat=m) if sum(row) == n]
    found = [np.array(rows) for rows in product(rows, repeat=m)]
    return [mask for mask in found if (mask.sum(axis=0) == n).all()]


@pytest.mark.parametrize(
    ("n", "m", "count"), [(1, 2, 2), (1, 3, 6), (2, 3, 6), (1, 4, 24), (2, 4, 90), (3, 4, 24)]
)
def test_all_masks_of_a_tile_in_order(n, m, count):
    masks = tile_masks(n, m).masks
    assert len(masks) == count
    np.testing.assert_array_equal(masks, all_masks(n, m))


def test_every_tile_that_is_searched_has_few_masks():
    for m in range(2, 8):
        for n in range(1, m):
            if search_of(Pattern(n, m, both=True)) == "exhaustive":
                assert len(tile_masks(n, m).masks) <= MOST_MASKS
    assert len(tile_masks(2, 5).masks) == MOST_MASKS
    assert len(tile_masks(1, 6).masks) == 720
    for n, m in ((2, 6), (3, 6), (1, 7), (4, 8), (16, 32), (500, 999)):
        assert search_of(Pattern(n, m, both=True)) == "greedy"


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from((np.float32, np.float64)))
@settings(max_examples=100, deadline=None)
def test_exhaustive_is_the_best_of_one_tile(seed, ties, dtype):
    random = np.random.default_rng(seed)
    energy = (random.integers(0, 4, (4, 4)) if ties else random.random((4, 4))).astype(dtype)
    sums, masks = [], all_masks(2, 4)
    for mask in masks:  # in the order of the definition
        rows = [np.add(*line[kept]) for line, kept in zip(energy, mask, strict=True)]
        sums.append(((rows[0] + rows[1]) + rows[2]) + rows[3])
    best = masks[int(np.argmax(sums))]
    np.testing.assert_array_equal(mask_of(energy, "2:4/2d", "exhaustive"), best)


def slow_greedy(tile, n):
    """The words of the definition, one tile."""
    m = len(tile)
    keep = np.zeros((m, m), bool)
    for place in sorted(range(m * m), key=lambda i: -tile.flat[i]):
        row, column = divmod(place, m)
        if keep[row].sum() < n and keep[:, column].sum() < n:
            keep[row, column] = True
    while keep.sum() < n * m:
        row = next(i for i in range(m) if keep[i].sum() < n)
        column = next(j for j in range(m) if keep[:, j].sum() < n)
        best, chosen = -np.inf, (-1, -1)
        for i, j in product(range(m), repeat=2):
            gain = tile[row, j] + tile[i, column] - tile[i, j]
            if keep[i, j] and not keep[row, j] and not keep[i, column] and gain > best:
                best, chosen = gain, (i, j)
        i, j = chosen
        keep[i, j], keep[row, j], keep[i, column] = False, True, True
    return keep


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from(TILED))
@settings(max_examples=100, deadline=None)
def test_greedy_is_its_words(seed, ties, name):
    pattern = Pattern.parse(name)
    random, size = np.random.default_rng(seed), (pattern.m, pattern.m)
    tile = random.integers(0, 4, size) * 1.0 if ties else random.random(size)
    np.testing.assert_array_equal(mask_of(tile, name, "greedy"), slow_greedy(tile, pattern.n))


@given(weights_with_pattern(TILED), st.sampled_from((None, "greedy")))
@settings(max_examples=60, deadline=None)
def test_masks_hold_both_ways_and_for_the_transpose(case, search):
    w, name = case
    pattern = Pattern.parse(name)
    mask = magnitude_mask(w, name, search)
    for turned in (mask, mask.swapaxes(0, 1)):
        split = turned.reshape(turned.shape[0], -1, pattern.m, *turned.shape[2:])
        assert (split.sum(axis=2) == pattern.n).all()
        assert is_pattern(turned, name)
        assert is_pattern(turned, pattern.free)
    assert is_pattern(w.swapaxes(0, 1) * mask.swapaxes(0, 1), name)


@given(weights_with_pattern(("2:4/2d", "1:2/2d", "1:3/2d", "2:5/2d")))
@settings(max_examples=60, deadline=None)
def test_exhaustive_keeps_at_least_what_greedy_keeps(case):
    w, name = case
    energy = (w * w).astype(np.float64)
    free = energy[mask_of(energy, Pattern.parse(name).free)].sum()
    best = energy[mask_of(energy, name, "exhaustive")].sum()
    greedy = energy[mask_of(energy, name, "greedy")].sum()
    assert free * (1 + 1e-12) >= best >= greedy * (1 - 1e-12)


def test_each_tap_and_tile_has_a_mask_of_its_own():
    w = np.random.default_rng(0).standard_normal((12, 8, 3, 2)).astype(np.float32)
    for name in ("2:4/2d", "4:8/2d"):
        m = Pattern.parse(name).m
        w = w[: len(w) // m * m]
        mask = magnitude_mask(w, name)
        for tap in np.ndindex(3, 2):
            for row, column in product(range(0, len(w), m), range(0, 8, m)):
                place = (slice(row, row + m), slice(column, column + m), *tap)
                np.testing.assert_array_equal(mask[place], magnitude_mask(w[place], name))


def test_a_tile_that_greedy_cannot_fill_is_filled():
    """Row 0 and column 0 have one entry that counts, where they cross; the rest is full of ones."""
    tile = np.ones((4, 4))
    tile[0], tile[:, 0] = 0, 0
    tile[np.diag_indices(4)] = 0
    tile[0, 0] = 9
    mask = mask_of(tile, "2:4/2d", "greedy")
    assert (mask.sum(axis=0) == 2).all()
    assert (mask.sum(axis=1) == 2).all()
    assert tile[mask].sum() == 9 + 5
    assert tile[mask_of(tile, "2:4/2d")].sum() == 9 + 5


def test_which_search():
    assert search_of(Pattern(2, 4, both=True)) == "exhaustive"
    assert search_of(Pattern(2, 4, both=True), "greedy") == "greedy"
    assert search_of(Pattern(4, 8, both=True)) == "greedy"
    assert search_of(Pattern(4, 8)) == search_of(Pattern(2, 4, pair=True)) == "exhaustive"
    with pytest.raises(InputError, match="cannot try all masks of pattern 4:8/2d") as e:
        search_of(Pattern(4, 8, both=True), "exhaustive")
    assert "at most 2040" in str(e.value)
    assert "use the greedy search" in str(e.value)
