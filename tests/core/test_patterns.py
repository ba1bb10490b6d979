"""The masks obey their pattern, and the first break of a pattern is found where it was planted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from twofour.core import patterns
from twofour.core.errors import InputError
from twofour.core.masks import magnitude_mask

NAMES = ("2:4", "2:4/pair", "4:8", "1:4", "1:2/pair")


@st.composite
def weights_with_pattern(draw):
    """A weight, half of the time with many equal values, and the name of a pattern that fits it."""
    name = draw(st.sampled_from(NAMES))
    m = patterns.Pattern.parse(name).m
    rows = draw(st.sampled_from((1, 16, 31, 32, 33, 48, 64, 80)))
    taps = draw(st.sampled_from(((), (1, 1), (3, 3), (2,))))
    shape = (rows, m * draw(st.integers(1, 3)), *taps)
    if draw(st.booleans()):
        return np.random.default_rng(draw(st.integers(0, 999))).standard_normal(shape), name
    few = st.sampled_from((0.0, 1.0, -1.0, 2.0))
    return draw(arrays(np.float32, shape, elements=few, fill=few)), name


def slow_mask(w, n, m):
    """2:4 by the words of the definition: one group at a time, stable sort by falling magnitude."""
    mask = np.zeros(w.shape, bool)
    for k in range(w.shape[0]):
        for tap in np.ndindex(w.shape[2:]):
            for c in range(0, w.shape[1], m):
                group = np.abs(w[(k, slice(c, c + m), *tap)])
                for i in sorted(range(m), key=lambda i: -group[i])[:n]:
                    mask[(k, c + i, *tap)] = True
    return mask


@pytest.mark.parametrize(
    ("name", "expected"),
    [("2:4", (2, 4, False)), ("2:4/pair", (2, 4, True)), (" 4:8 ", (4, 8, False))],
)
def test_parse(name, expected):
    pattern = patterns.Pattern.parse(name)
    assert (pattern.n, pattern.m, pattern.pair) == expected
    assert patterns.Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize("name", ["", "24", "4:2", "2:2", "0:4", "2:4/pairs", "2:4:8", "-2:4"])
def test_parse_refuses(name):
    with pytest.raises(InputError, match="use 2:4"):
        patterns.Pattern.parse(name)


@given(weights_with_pattern())
@settings(max_examples=60, deadline=None)
def test_mask_keeps_n_of_m_and_is_idempotent(case):
    w, name = case
    pattern = patterns.Pattern.parse(name)
    mask = magnitude_mask(w, name)
    groups = mask.reshape(w.shape[0], -1, pattern.m, *w.shape[2:])
    assert (groups.sum(axis=2) == pattern.n).all()
    pruned = w * mask
    assert patterns.first_violation(pruned, name) is None
    assert patterns.is_pattern(pruned, f"{pattern.n}:{pattern.m}")
    np.testing.assert_array_equal(magnitude_mask(pruned, name), mask)


@given(weights_with_pattern())
@settings(max_examples=30, deadline=None)
def test_free_mask_is_the_definition(case):
    w, name = case
    pattern = patterns.Pattern.parse(name)
    free = f"{pattern.n}:{pattern.m}"
    np.testing.assert_array_equal(magnitude_mask(w, free), slow_mask(w, pattern.n, pattern.m))


@pytest.mark.parametrize("rows", [32, 48, 64, 80, 95])
def test_pairs_share_a_mask_and_the_rest_is_free(rows):
    w = np.random.default_rng(rows).standard_normal((rows, 8, 3, 3)).astype(np.float32)
    mask = magnitude_mask(w, "2:4/pair")
    paired = rows // 32 * 32
    for block in range(0, paired, 32):
        first, second = block + np.arange(16), block + 16 + np.arange(16)
        np.testing.assert_array_equal(mask[first], mask[second])
        joined = np.sqrt(w[first] ** 2 + w[second] ** 2)
        np.testing.assert_array_equal(mask[first], slow_mask(joined, 2, 4))
    np.testing.assert_array_equal(mask[paired:], slow_mask(w[paired:], 2, 4))


def test_ties_go_to_the_lowest_channel():
    mask = magnitude_mask(np.array([[1, -1, 1, 1, 0, 0, 0, 5]], np.float32), "2:4")
    assert mask.tolist() == [[True, True, False, False, True, False, False, True]]


def test_smallest_int8_is_larger_than_any_other():
    mask = magnitude_mask(np.array([[-128, 1, 127, 2]], np.int8), "2:4")
    assert mask.tolist() == [[True, False, True, False]]


@given(weights_with_pattern(), st.data())
@settings(max_examples=60, deadline=None)
def test_planted_violation_is_named(case, data):
    w, name = case
    pattern = patterns.Pattern.parse(name)
    pruned = np.where(w == 0, 1, w) * magnitude_mask(w, name)
    row = data.draw(st.integers(0, w.shape[0] - 1))
    group = data.draw(st.integers(0, w.shape[1] // pattern.m - 1)) * pattern.m
    tap = tuple(data.draw(st.integers(0, size - 1)) for size in w.shape[2:])
    pruned[(row, slice(group, group + pattern.m), *tap)] = 3
    found = patterns.first_violation(pruned, name)
    assert found is not None
    assert found.output_channels == (row,)
    assert found.tap == tap
    assert found.channels == (group, group + pattern.m - 1)
    assert found.nonzeros == pattern.m


def test_violation_in_words():
    w = np.zeros((64, 256, 3, 3), np.float32)
    w[17, 40:43, 0, 2] = 1
    w[18, 0:4, 0, 0] = 1
    assert str(patterns.first_violation(w, "2:4")) == (
        "output channel 17, tap (0,2), channels 40-43 hold 3 nonzeros"
    )
    assert patterns.why_not(w[:, :, 0, 2], "2:4") == (
        "output channel 17, channels 40-43 hold 3 nonzeros"
    )


def test_pair_that_is_2_4_but_shares_no_mask_is_named():
    w = np.zeros((64, 8, 1, 1), np.float32)
    w[33, 4:6] = 1
    w[49, 5:7] = 1
    assert patterns.is_pattern(w, "2:4")
    found = patterns.first_violation(w, "2:4/pair")
    assert (
        str(found) == "output channels 33 and 49 together, tap (0,0), channels 4-7 hold 3 nonzeros"
    )
    w[49, 6] = 0
    assert patterns.first_violation(w, "2:4/pair") is None


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((16, 3, 3, 3), "3 input channels are not a multiple of 4"),
        ((16,), "no input channel axis"),
        ((0, 4), "is empty"),
    ],
)
def test_shapes_that_cannot_have_the_pattern(shape, reason):
    w = np.zeros(shape, np.float32)
    assert reason in patterns.ineligible(shape, "2:4")
    assert reason in patterns.why_not(w, "2:4")
    assert not patterns.is_pattern(w, "2:4")
    with pytest.raises(InputError, match=reason):
        patterns.first_violation(w, "2:4")
    with pytest.raises(InputError, match=reason):
        magnitude_mask(w, "2:4")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    w = np.ones((4, 4), np.float32)
    w[1, 2] = bad
    with pytest.raises(InputError, match="1 of its values are NaN or infinite"):
        magnitude_mask(w, "2:4")


def test_energy_kept():
    w = np.array([[3, 0, 4, 1]], np.float32)
    assert patterns.energy_kept(w, magnitude_mask(w, "2:4")) == pytest.approx(25 / 26)
    assert patterns.energy_kept(0 * w, magnitude_mask(w, "2:4")) == 1.0
