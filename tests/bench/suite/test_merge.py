"""Rows of several runs on one page: only where they were measured alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from twofour.bench.suite.merge import differences, merged, read_page
from twofour.core.errors import InputError

NOW: dict[str, Any] = {
    "cpu": "a CPU",
    "cores": 2,
    "target": "cpu:avx2",
    "tools": {"numpy": "2.0", "openvino": "2026.1"},
    "peers": ["openvino"],
    "threads": 1,
    "duration_s": 6.0,
    "code_sha256": "ab",
}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("cpu", "another", "CPU: the page has another, this run a CPU"),
        ("cores", 4, "number of cores: the page has 4, this run 2"),
        ("target", "cpu:vector", "target: the page has cpu:vector, this run cpu:avx2"),
        ("peers", [], "peers: the page has [], this run ['openvino']"),
        ("threads", 2, "threads: the page has 2, this run 1"),
        ("duration_s", 1.0, "seconds a row: the page has 1.0, this run 6.0"),
        ("code_sha256", "cd", "the code that builds and measures has changed since"),
        ("code_sha256", None, "the code that builds and measures has changed since"),
        (
            "tools",
            {"numpy": "2.0", "openvino": "2025.0"},
            "openvino: the page has 2025.0, this run 2026.1",
        ),
        ("tools", {"openvino": "2026.1"}, "numpy: the page has None, this run 2.0"),
    ],
)
def test_each_circumstance_counts(key: str, value: object, said: str) -> None:
    assert differences({**NOW, key: value}, NOW) == [said]


def test_alike_is_alike_whatever_else_a_page_says() -> None:
    assert differences({**NOW, "rows": [], "command": "x"}, NOW) == []


def test_a_new_row_takes_the_place_of_an_earlier_one() -> None:
    def rows(run: int, *names: str) -> list[dict[str, Any]]:
        return [{"name": name, "run": run} for name in names]

    found = merged(rows(1, "c", "a", "gone"), rows(2, "b", "a"), ["a", "b", "c", "d"])
    assert [(row["name"], row["run"]) for row in found] == [("a", 2), ("b", 2), ("c", 1)]


def test_a_page_that_is_none(tmp_path: Path) -> None:
    assert read_page(tmp_path / "cpu.json") is None
    for text in ("[]", "{}", '{"rows": 1}', "{", ""):
        (tmp_path / "cpu.json").write_text(text)
        with pytest.raises(InputError, match="is no page of a suite"):
            read_page(tmp_path / "cpu.json")
