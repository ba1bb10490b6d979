"""What a file says of its weights is read back, whoever wrote it."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofour.core import promises
from twofour.core.masks import magnitude_mask
from twofour.core.patterns import is_pattern


@given(st.dictionaries(st.text(), st.sampled_from(["2:4", "4:8", "2:4/pair", "1:16"])))
def test_what_is_written_is_read(given_promises):
    assert promises.from_text(promises.to_text(given_promises)) == (given_promises, ())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("9" * 100_000, "is not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"w": "2:4"}' + " " * (1 << 24), "16777228 characters, expected at most 16777216"),
        ('{"w": "4:2"}', "promises 1 weights a pattern that is none: 'w' ('4:2')"),
        ('{"w": 24, "v": null, "u": ["2:4"]}', "promises 3 weights a pattern that is none"),
    ],
)
def test_what_cannot_be_understood_is_ignored_with_a_note(text, reason):
    found, notes = promises.from_text(text)
    assert found == {}
    assert len(notes) == 1
    assert reason in notes[0]
    assert len(notes[0]) < 600


def test_what_can_be_understood_beside_it_is_kept():
    found, notes = promises.from_text(json.dumps({"w": " 2:4 ", "v": "much"}))
    assert found == {"w": "2:4"}
    assert len(notes) == 1


@pytest.mark.parametrize("name", ["2:4", "4:8", "1:4", "3:4", "1:2", "2:6", "2:4/pair", "1:4/pair"])
def test_the_strongest_pattern_is_the_one_a_weight_was_pruned_to(name):
    w = np.random.default_rng(0).standard_normal((64, 48, 3))
    w *= magnitude_mask(w, name)
    assert promises.strongest(w) == name


def test_a_dense_weight_promises_nothing_and_few_channels_hold_no_pair():
    w = np.random.default_rng(0).standard_normal((16, 8))
    assert promises.strongest(w) is None
    w[0, 3] = 0
    assert promises.strongest(w) is None
    assert promises.strongest(np.zeros((0, 4))) is None
    assert promises.strongest(np.zeros(4)) is None
    w *= magnitude_mask(w, "2:4")
    assert is_pattern(w, "2:4/pair")
    assert promises.strongest(w) == "2:4"
