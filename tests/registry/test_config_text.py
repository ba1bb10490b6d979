"""config.yaml changed in its text: what is served is as wanted, and nothing else is another."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from twofour.core.errors import InputError
from twofour.registry.config_text import serving
from twofour.serve.repository.config import read_config

CASES = [
    ("", [3], None, "versions: {specific: [3]}\n"),
    ("# ours\n", [3], None, "# ours\nversions: {specific: [3]}\n"),
    ("load: first", [3], None, "versions: {specific: [3]}\nload: first"),
    (
        "versions: {latest: 2}  # as we like it\nload: first\n",
        [3, 4],
        {3: 90, 4: 10},
        "versions: {specific: [3, 4]}  # as we like it\nload: first\n"
        "traffic: {split: {3: 90, 4: 10}}\n",
    ),
    (
        "traffic: {sticky_header: x}  # by user\n",
        [3, 4],
        {3: 87.5, 4: 12.5},
        "traffic: {split: {3: 87.5, 4: 12.5}, sticky_header: x}  # by user\n"
        "versions: {specific: [3, 4]}\n",
    ),
    (
        "traffic:\n  # by user\n  sticky_header: x  # a\n  split:\n    3: 90  # most\n    4: 10\n"
        "versions:\n  specific:\n  - 3\n  - 4  # new\n# end\n",
        [4],
        {4: 100},
        "traffic:\n  # by user\n  sticky_header: x  # a\n  split:\n    {4: 100}\n"
        "versions:\n  {specific: [4]}  # new\n# end\n",
    ),
    ('{"load": "first"}', [3], None, '{"versions": {"specific": [3]}, "load": "first"}'),
    ("{}", [3], None, '{"versions": {"specific": [3]}}'),
    ("---\n", [3], None, "---\nversions: {specific: [3]}\n"),
    ("---\nlabels:\n  y: [cat]\n", [1], None, None),
    ("versions: {all: true}\r\nload: first\r\n", [1], None, None),
    ("traffic:\n  sticky_header: x\n", [1, 2], {1: 1, 2: 2}, None),
    ('"versions": {"all": true}\n', [1], None, None),
    (
        "parameters:\n  owner: |\n    us\n",
        [1],
        None,
        None,
    ),
]


@pytest.mark.parametrize(("text", "versions", "split", "expected"), CASES)
def test_what_is_served_is_as_wanted(
    text: str, versions: list[int], split: Any, expected: str | None
) -> None:
    after = serving(text.encode(), versions, split, "config.yaml").decode()
    if expected is not None:
        assert after == expected
    config = read_config(after.encode(), "config.yaml")
    assert config.versions.specific == tuple(versions)
    assert config.traffic.split == (split or {})
    if text.startswith("{"):
        json.loads(after)
    again = serving(after.encode(), versions, split, "config.yaml").decode()
    assert again == after


@pytest.mark.parametrize(
    "text",
    [
        "versions: &v {latest: 2}\nparameters: {a: b}\n---\nx: 1\n",
        "load: first\n...\n",
        "x: &t {sticky_header: a}\ntraffic: *t\n",
        "traffic: 3\n",
        "[1]\n",
        "versions: {latest: 2\n",
        "versionz: {latest: 2}\n",
        "\xff",
    ],
)
def test_what_is_not_understood_is_left_and_says_what_to_write(text: str) -> None:
    with pytest.raises(InputError) as caught:
        serving(text.encode("latin-1"), [1, 2], {1: 90, 2: 10}, "models/net/config.yaml")
    assert "config.yaml" in str(caught.value)


COMMENTS = st.sampled_from(["", "  # why", "  # a: {b"])
ENTRIES = [
    "load: first",
    "labels:\n  y:\n  - cat\n  - dog",
    "batching: {max_size: 8, preferred_sizes: [4, 8]}",
    "warm_up:\n  rounds: 2\n  data: 'a: b.npz'",
    "parameters:\n  owner: |\n    us\n    and you",
    "versions: {latest: 3}",
    "versions:\n  specific:\n    - 1\n    - 2",
    "versions:\n  specific: [1,\n    2]",
    "versions:\n  all: true",
    "traffic: {split: {1: 5, 2: 5}, sticky_header: x-user}",
    "traffic:\n  split: {1: 5}\n  shadow: 3",
    "traffic:\n  shadow: 3\n  shadow_percent: 10",
    "traffic: {}",
]


@given(
    entries=st.lists(
        st.tuples(st.sampled_from(ENTRIES), COMMENTS),
        unique_by=lambda each: each[0].partition(":")[0],
        max_size=5,
    ),
    head=st.sampled_from(["", "# head\n", "---\n", "\n"]),
    ends=st.booleans(),
    versions=st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True).map(sorted),
    shares=st.none() | st.lists(st.floats(0.001, 100), min_size=3, max_size=3),
)
def test_all_else_stays(
    entries: list[tuple[str, str]],
    head: str,
    ends: bool,
    versions: list[int],
    shares: list[float] | None,
) -> None:
    """Every line of a comment, and every value that is not of what is served."""
    text = head + "\n".join(entry + comment for entry, comment in entries) + "\n" * ends
    split = dict(zip(versions, shares, strict=False)) if shares is not None else None
    after = serving(text.encode(), versions, split, "config.yaml").decode()
    plain, before = yaml.safe_load(after), yaml.safe_load(text) or {}
    assert plain["versions"] == {"specific": versions}
    if split is not None:
        assert plain["traffic"]["split"] == split
    for each in (plain, before):
        each.pop("versions", None)
        traffic = each.pop("traffic", None) or {}
        traffic.pop("split", None)
        each["rest"] = traffic
    if split is not None:
        assert plain == before
    comments = [comment for entry, comment in entries if comment]
    assert after.count("#") == len(comments) + head.count("#")
