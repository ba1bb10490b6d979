"""Arguments of config.yaml: what the command line may be told by the owner of a repository."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofour.core.errors import InputError
from twofour.serve.repository.arguments import options

FOLDER = Path("/models/m/1")
FILES = ("m.onnx", "d.npz", "-o", "os:system")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([], []),
        (["--int8", "--data", "d.npz"], ["--int8", "--data=/models/m/1/d.npz"]),
        (["--data=os:system"], ["--data=/models/m/1/os:system"]),
        (["--data", "-o"], ["--data=/models/m/1/-o"]),
        (["--shapes", "x:1x3:2x3:4x3"], ["--shapes=x:1x3:2x3:4x3"]),
        (["--threads", "-o"], ["--threads=-o"]),
        (["--shapes=--output=/x"], ["--shapes=--output=/x"]),
        (["--target", "cuda", "--fp16"], ["--target=cuda", "--fp16"]),
        (["--target=cpu"], ["--target=cpu"]),
    ],
)
def test_what_is_allowed_is_one_word_each(given: list[str], found: list[str]) -> None:
    assert options(given, FILES, FOLDER) == found


@pytest.mark.parametrize(
    "given",
    [
        ["-o", "/etc/x"],
        ["--output=/etc/x"],
        ["--out", "x"],
        ["other.onnx"],
        ["--"],
        ["--timing-cache", "/etc/x"],
        ["--json"],
        ["--data", "module:function"],
        ["--data", "../2/d.npz"],
        ["--data", "/etc/passwd"],
        ["--data"],
        ["--int8=yes"],
        ["--isa", "a\0b"],
        ["--target", "tensorrt"],
        ["--target=cuda:sm80"],
        ["--target"],
        ["--help"],
        [""],
    ],
)
def test_what_is_not_allowed(given: list[str]) -> None:
    with pytest.raises(InputError, match=r"build\.arguments"):
        options(given, FILES, FOLDER)


@given(
    st.lists(
        st.sampled_from(["--int8", "--data", "--shapes", "-o", "x", "=", "d.npz"])
        | st.text(max_size=5)
    )
)
def test_every_word_begins_with_an_allowed_option(given: list[str]) -> None:
    try:
        found = options(given, FILES, FOLDER)
    except InputError:
        return
    for word in found:
        assert word.partition("=")[0] in ("--int8", "--bf16", "--no-race", "--shapes", "--data")
        assert "\0" not in word
