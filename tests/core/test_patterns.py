"""The first break of a pattern is found where it was planted, and named in words."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.weights import weights_with_pattern
from twofour.core import patterns
from twofour.core.errors import InputError
from twofour.core.masks import magnitude_mask


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("2:4", (2, 4, False, False)),
        ("2:4/pair", (2, 4, True, False)),
        ("2:4/2d", (2, 4, False, True)),
        (" 16:32 ", (16, 32, False, False)),
    ],
)
def test_parse(name, expected):
    pattern = patterns.Pattern.parse(name)
    assert (pattern.n, pattern.m, pattern.pair, pattern.both) == expected
    assert patterns.Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    "name", ["", "24", "4:2", "2:2", "0:4", "2:4/pairs", "2:4/2d/pair", "2:4/2D", "2:4:8", "-2:4"]
)
def test_parse_refuses(name):
    with pytest.raises(InputError, match="use 2:4"):
        patterns.Pattern.parse(name)


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


def test_break_along_the_output_channels_is_named():
    w = np.zeros((16, 8, 3, 3), np.float32)
    for row in (4, 6, 7):
        w[row, 5, 0, 2] = 1
    w[8:11, 6, 0, 0] = 1
    assert patterns.is_pattern(w, "2:4")
    assert patterns.why_not(w, "2:4/2d") == (
        "input channel 5, tap (0,2), output channels 4-7 hold 3 nonzeros"
    )
    found = patterns.first_violation(w, "2:4/2d")
    assert (found.output_channels, found.channels, found.tap) == ((4, 7), (5, 5), (0, 2))
    assert patterns.why_not(w[..., 0, 2], "2:4/2d") == (
        "input channel 5, output channels 4-7 hold 3 nonzeros"
    )
    w[12, :3, 1, 1] = 1  # along the input channels comes first
    assert patterns.why_not(w, "2:4/2d") == (
        "output channel 12, tap (1,1), channels 0-3 hold 3 nonzeros"
    )


def test_share_held_of_both_directions():
    w = np.zeros((4, 8), np.float32)
    w[:3, 0] = 1
    assert patterns.share_held(w, "2:4") == 1
    assert patterns.share_held(w, "2:4/2d") == 15 / 16  # 8 groups a direction
    w[0, :3] = 1
    assert patterns.share_held(w, "2:4/2d") == 14 / 16


def test_patterns_held_in_the_order_asked_for():
    random = np.random.default_rng(0)
    w = random.standard_normal((64, 16, 3)).astype(np.float32)
    assert patterns.held(w) == ()
    for name in patterns.NAMED:
        found = patterns.held(np.where(magnitude_mask(w, name), w, 0))
        expected = {"2:4/pair": 3, "2:4/2d": 3, "2:4": 2, "4:8": 1}[name]
        assert found[0] == name
        assert len(found) == expected
    pruned = np.where(magnitude_mask(w, "2:4/2d"), w, 0)
    assert patterns.held(pruned, ("4:8", "2:4")) == ("4:8", "2:4")
    assert patterns.held(np.zeros((32, 16))) == patterns.NAMED
    assert patterns.held(np.zeros((31, 16))) == ("2:4", "4:8")
    assert patterns.held(np.zeros((16, 12))) == ("2:4/2d", "2:4")


def test_output_channels_masked_together():
    names = ("2:4", "2:4/pair", "2:4/2d", "4:8/2d")
    assert [patterns.Pattern.parse(name).together for name in names] == [1, 32, 4, 8]


def test_two_ways_to_tie_channels_at_once_are_refused():
    with pytest.raises(InputError, match="pair or both"):
        patterns.Pattern(2, 4, pair=True, both=True)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((6, 8), "6 output channels are not a multiple of 4"),
        ((6, 3, 3, 3), "6 output channels and 3 input channels are not a multiple of 4"),
        ((8, 3), "3 input channels are not a multiple of 4"),
        ((64, 1, 3, 3), "single input channel"),
    ],
)
def test_shapes_that_cannot_have_both_directions(shape, reason):
    assert reason in patterns.ineligible(shape, "2:4/2d")
    assert reason in patterns.why_not(np.zeros(shape), "2:4/2d")
    with pytest.raises(InputError, match=reason):
        patterns.share_held(np.zeros(shape), "2:4/2d")


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


def test_energy_kept():
    w = np.array([[3, 0, 4, 1]], np.float32)
    assert patterns.energy_kept(w, magnitude_mask(w, "2:4")) == pytest.approx(25 / 26)
    assert patterns.energy_kept(0 * w, magnitude_mask(w, "2:4")) == 1.0


NAMES = ("1:4", "2:4", "4:8", "3:8", "2:8", "2:4/pair", "4:8/pair", "2:4/2d", "4:8/2d", "3:6")


@pytest.mark.parametrize("strict", NAMES)
def test_what_a_pattern_demands_holds_for_each_of_its_weights(strict):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((96, 48)).astype(np.float32)
    w *= magnitude_mask(w, strict)
    pattern = patterns.Pattern.parse(strict)
    demanded = {name for name in NAMES if pattern.demands(patterns.Pattern.parse(name))}
    assert demanded <= {name for name in NAMES if patterns.is_pattern(w, name)}
    plain = {"2:4/pair": {"2:4", "4:8", "4:8/pair"}, "2:4": {"4:8"}, "4:8": set(), "2:4/2d": {
        "2:4", "4:8", "4:8/2d"}}  # fmt: skip
    assert demanded == plain.get(strict, demanded - {strict}) | {strict}
