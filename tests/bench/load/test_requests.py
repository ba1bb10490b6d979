"""Requests from a model's metadata: shapes, lengths, data that suits, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from twofour.bench.load.client import ModelInfo, Tensor, parse_target, said
from twofour.bench.load.requests import Wanted, make_requests, parse_lengths, rows_of, shapes_of
from twofour.core.errors import InputError, UnsupportedError

TARGET = parse_target("http://127.0.0.1:8000", "net", {})
TEXT = (
    Tensor("input_ids", "INT64", (-1, -1)),
    Tensor("attention_mask", "INT64", (-1, -1)),
    Tensor("token_type_ids", "INT64", (-1, -1)),
)
IMAGE = (Tensor("x", "FP32", (-1, 3, 4, 4)),)


def info(inputs: Sequence[Tensor]) -> ModelInfo:
    return ModelInfo("net", ("1",), "", tuple(inputs), ())


def test_data_suits_a_text_network() -> None:
    wanted = Wanted(batch=2, lengths=range(8, 17))
    requests = make_requests(info(TEXT), wanted, TARGET)
    lengths = {feeds["input_ids"].shape[1] for feeds in requests}
    assert lengths == set(range(8, 17))
    for feeds in requests:
        assert {array.shape for array in feeds.values()} == {feeds["input_ids"].shape}
        assert (feeds["attention_mask"] == 1).all()
        assert not feeds["token_type_ids"].any()
        assert 0 <= feeds["input_ids"].min() <= feeds["input_ids"].max() < 100
        assert rows_of(feeds) == 2
    assert shapes_of(requests)["input_ids"] == "2x8 to 2x16"
    again = make_requests(info(TEXT), wanted, TARGET)
    assert all(
        (a["input_ids"] == b["input_ids"]).all() for a, b in zip(requests, again, strict=True)
    )


def test_requests_differ_from_each_other() -> None:
    requests = make_requests(info(IMAGE), Wanted(), TARGET)
    assert len(requests) > 1
    assert not (requests[0]["x"] == requests[1]["x"]).all()


def test_arrays_are_sent_as_given() -> None:
    x = np.ones((5, 3, 4, 4), np.float32)
    (feeds,) = make_requests(info(IMAGE), Wanted(arrays={"x": x}), TARGET)
    assert feeds["x"] is x


@pytest.mark.parametrize(
    ("inputs", "wanted", "message"),
    [
        (IMAGE, Wanted(shapes={"z": (1,)}), "no input 'z'"),
        (IMAGE, Wanted(shapes={"x": (1, 3, 4, 5)}), "cannot have shape 1x3x4x5"),
        (TEXT, Wanted(), "has open sizes"),
        (IMAGE, Wanted(lengths=(8,)), "--lengths has nothing to say"),
        (IMAGE, Wanted(arrays={"x": np.zeros((1, 3, 4, 4), np.int8)}), "does not fit"),
        (
            IMAGE,
            Wanted(shapes={"x": (2, 3, 4, 4)}, arrays={"x": np.zeros((1, 3, 4, 4), np.float32)}),
            "two shapes",
        ),
        ((Tensor("x", "FP32", (1, 3)),), Wanted(batch=2), "as the server says"),
    ],
)
def test_what_does_not_fit_is_refused(
    inputs: Sequence[Tensor], wanted: Wanted, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_requests(info(inputs), wanted, TARGET)


def test_texts_are_not_supported() -> None:
    with pytest.raises(UnsupportedError, match="BYTES"):
        make_requests(info([Tensor("x", "BYTES", (1,))]), Wanted(), TARGET)


def test_lengths(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("7\n9\n7\n")
    assert parse_lengths("8-10") == (8, 9, 10)
    assert parse_lengths("64") == (64,)
    assert parse_lengths(str(path)) == (7, 9, 7)
    path.write_text("7\n0\n")
    for bad in ("", "0", "9-8", "8-", "-8", "a", "1-99999999", str(path), "none.txt"):
        with pytest.raises(InputError, match="bad --lengths"):
            parse_lengths(bad)


@pytest.mark.parametrize(
    ("url", "authority", "path"),
    [
        ("http://h:81/a/", "h:81", "/a"),
        ("https://h", "h:443", ""),
        ("grpc://h:9", "h:9", ""),
        ("http://[::1]:8000", "[::1]:8000", ""),
    ],
)
def test_urls(url: str, authority: str, path: str) -> None:
    target = parse_target(url, "net:3", {})
    assert (target.authority, target.path) == (authority, path)
    assert (target.model, target.version) == ("net", "3")


@pytest.mark.parametrize("url", ["", "h:80", "ftp://h", "http://", "http://h:x", "http://h/?a=1"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="bad --url"):
        parse_target(url, "net", {})
    with pytest.raises(InputError, match="bad --model"):
        parse_target("http://h", "net:new", {})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", ""),
        (b"plain\n  words", "plain words"),
        (b'{"error": "line\\n two \\"x\\""}', 'line two "x"'),
        (b'{"detail": ["a"]}', "['a']"),
        (b'{"other": 1}', '{"other": 1}'),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"x" * 5000, "x" * 197 + "..."),
    ],
)
def test_a_servers_words_are_one_line(body: bytes, words: str) -> None:
    assert said(body) == words
