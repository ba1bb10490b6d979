"""The masks keep what the definition says, of any energy, and refuse what has no rank."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings

from tests.core.weights import weights_with_pattern
from twofour.core import masks
from twofour.core.errors import InputError
from twofour.core.masks import magnitude_mask, mask_of
from twofour.core.patterns import Pattern, first_violation, is_pattern


def slow_mask(energy, n, m):
    """N:M by the words of the definition: one group at a time, stable sort by falling energy."""
    mask = np.zeros(energy.shape, bool)
    for k in range(energy.shape[0]):
        for tap in np.ndindex(energy.shape[2:]):
            for c in range(0, energy.shape[1], m):
                group = energy[(k, slice(c, c + m), *tap)]
                for i in sorted(range(m), key=lambda i: -group[i])[:n]:
                    mask[(k, c + i, *tap)] = True
    return mask


@given(weights_with_pattern())
@settings(max_examples=80, deadline=None)
def test_mask_keeps_n_of_m_and_is_idempotent(case):
    w, name = case
    pattern = Pattern.parse(name)
    mask = magnitude_mask(w, name)
    groups = mask.reshape(w.shape[0], -1, pattern.m, *w.shape[2:])
    assert (groups.sum(axis=2) == pattern.n).all()
    pruned = w * mask
    assert first_violation(pruned, name) is None
    assert is_pattern(pruned, f"{pattern.n}:{pattern.m}")
    if masks.tiles.search_of(pattern) == "exhaustive":
        np.testing.assert_array_equal(magnitude_mask(pruned, name), mask)


@given(weights_with_pattern())
@settings(max_examples=40, deadline=None)
def test_free_mask_is_the_definition(case):
    w, name = case
    free = Pattern.parse(name).free
    np.testing.assert_array_equal(magnitude_mask(w, free), slow_mask(w * w, free.n, free.m))
    np.testing.assert_array_equal(mask_of(w * w, free), slow_mask(w * w, free.n, free.m))


@pytest.mark.parametrize("name", ["1:9", "5:10", "8:16", "15:16", "16:32", "3:100", "1:300"])
def test_large_groups_have_the_same_rule(name):
    pattern = Pattern.parse(name)
    random = np.random.default_rng(pattern.m)
    for energy in (random.random((3, 2 * pattern.m, 2)), random.integers(0, 3, (5, pattern.m))):
        np.testing.assert_array_equal(
            mask_of(energy, name), slow_mask(energy, pattern.n, pattern.m)
        )


@pytest.mark.parametrize("name", ["2:4", "4:8", "3:5"])
def test_both_ways_to_rank_agree(name, monkeypatch):
    pattern = Pattern.parse(name)
    for values in (2, 5, 1000):
        energy = np.random.default_rng(values).integers(0, values, (40, pattern.m * 10, 3))
        compared = mask_of(energy, name)
        with monkeypatch.context() as patch:
            patch.setattr(masks, "MOST_COMPARED", 0)
            np.testing.assert_array_equal(mask_of(energy, name), compared)


@pytest.mark.parametrize("rows", [32, 48, 64, 80, 95])
def test_pairs_share_a_mask_and_the_rest_is_free(rows):
    w = np.random.default_rng(rows).standard_normal((rows, 8, 3, 3)).astype(np.float32)
    mask = magnitude_mask(w, "2:4/pair")
    paired = rows // 32 * 32
    for block in range(0, paired, 32):
        first, second = block + np.arange(16), block + 16 + np.arange(16)
        np.testing.assert_array_equal(mask[first], mask[second])
        np.testing.assert_array_equal(mask[first], slow_mask(w[first] ** 2 + w[second] ** 2, 2, 4))
    np.testing.assert_array_equal(mask[paired:], slow_mask(w[paired:] ** 2, 2, 4))


@pytest.mark.parametrize("name", ["2:4", "4:8", "2:4/pair", "2:4/2d", "8:16"])
def test_chunks_do_not_show(name, monkeypatch):
    w = np.random.default_rng(1).standard_normal((96, 32, 3, 3)).astype(np.float32)
    whole = magnitude_mask(w, name)
    for chunk in (1, 1000, 10_000):
        monkeypatch.setattr(masks, "_CHUNK", chunk)
        np.testing.assert_array_equal(magnitude_mask(w, name), whole)


@pytest.mark.parametrize("name", ["2:4", "4:8", "2:4/pair", "2:4/2d", "4:8/2d", "16:32"])
def test_memory_does_not_grow_with_the_weight(name):
    w = np.random.default_rng(2).standard_normal((1024, 1024), np.float32)
    tracemalloc.start()
    mask = magnitude_mask(w, name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < mask.nbytes + (9 << 20), "the mask, and no float64 copy of the weight (8 MiB)"
    assert peak < mask.nbytes + (5 << 20) or Pattern.parse(name).both


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "float16", "float64", "bool"])
@pytest.mark.parametrize("name", ["2:4", "2:4/pair", "2:4/2d"])
def test_any_real_type(dtype, name):
    w = np.random.default_rng(3).integers(-128, 128, (32, 16, 2)).astype(dtype)
    expected = magnitude_mask(w.astype(np.float64), name)
    np.testing.assert_array_equal(magnitude_mask(w, name), expected)


def test_any_memory_order():
    w = np.random.default_rng(4).standard_normal((32, 64, 3)).astype(np.float32)
    for name in ("2:4", "2:4/pair", "2:4/2d"):
        expected = magnitude_mask(w, name)
        np.testing.assert_array_equal(magnitude_mask(np.asfortranarray(w), name), expected)
        turned = np.ascontiguousarray(w.transpose(1, 0, 2)).transpose(1, 0, 2)
        np.testing.assert_array_equal(magnitude_mask(turned, name), expected)


def test_ties_go_to_the_lowest_channel():
    mask = magnitude_mask(np.array([[1, -1, 1, 1, 0, 0, 0, 5]], np.float32), "2:4")
    assert mask.tolist() == [[True, True, False, False, True, False, False, True]]


def test_smallest_int8_is_larger_than_any_other():
    mask = magnitude_mask(np.array([[-128, 1, 127, 2]], np.int8), "2:4")
    assert mask.tolist() == [[True, False, True, False]]


def test_neighbouring_floats_keep_their_order():
    """The squares of two neighbours are never equal in float32."""
    low = np.linspace(1, 2, 4000, dtype=np.float32)
    high = np.nextafter(low, np.float32(3))
    w = np.stack([low, high, low, high], axis=1)
    np.testing.assert_array_equal(magnitude_mask(w, "2:4"), [[False, True, False, True]] * 4000)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["2:4", "2:4/pair", "2:4/2d", "8:16"])
def test_values_that_are_not_finite_are_refused(bad, name):
    w = np.ones((64, 16), np.float32)
    w[33, 2] = bad
    for make in (mask_of, magnitude_mask):
        with pytest.raises(InputError, match=r"\[64,16\].*\n.*1 of its values are NaN or infinite"):
            make(w, name)


def test_negative_energies_are_refused():
    energy = np.ones((4, 4), np.float32)
    energy[1, 2:] = -1
    with pytest.raises(InputError, match="2 of its energies are negative"):
        mask_of(energy, "2:4")
    assert magnitude_mask(energy, "2:4").sum() == 8


def test_squares_that_overflow_are_refused():
    w = np.ones((4, 4), np.float32)
    w[3, 3] = -3e20
    with pytest.raises(InputError, match=r"largest value is 3e\+20, whose square is infinite"):
        magnitude_mask(w, "2:4")
    assert magnitude_mask(w.astype(np.float64), "2:4")[3].tolist() == [True, False, False, True]


def test_what_is_not_a_number_is_refused():
    for dtype in ("complex64", "object", "U4"):
        with pytest.raises(InputError, match="expected real numbers"):
            mask_of(np.ones((4, 4)).astype(dtype), "2:4")


@pytest.mark.parametrize(
    ("shape", "name"), [((16,), "2:4"), ((4, 6), "2:4"), ((6, 4), "2:4/2d"), ((0, 4), "2:4")]
)
def test_shapes_are_checked(shape, name):
    for make in (mask_of, magnitude_mask):
        with pytest.raises(InputError, match="cannot have pattern"):
            make(np.zeros(shape, np.float32), name)


def test_unknown_search():
    for name in ("2:4", "2:4/2d"):
        with pytest.raises(InputError, match="expected one of exhaustive, greedy"):
            mask_of(np.ones((4, 4)), name, "random")
    assert mask_of(np.ones((4, 4)), "2:4", "greedy").sum() == 8
