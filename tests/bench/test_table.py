"""The table says the same on a terminal, on a page and to a program."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from twofour.bench.table import Row, markdown, plain, rich_table
from twofour.bench.timing import Timing


def timing(us: float) -> Timing:
    return Timing(us, us * 1.5, us * 0.9, 1.25, 1000, (us, us * 2, us), us * 3, us, 1e6 / us)


BASELINE = "ONNX Runtime INT8"
ROWS = [
    Row(BASELINE, "2:4 int8", 0.9132, timing(320.0), 310_000),
    Row("twofour", "2:4 int8", 0.9132, timing(80.0), 205_400),
    Row("PyTorch", "dense f32", None, None, None),
]


def test_plain_has_numbers() -> None:
    rows = json.loads(json.dumps(plain(ROWS, BASELINE)))
    assert [row["name"] for row in rows] == ["ONNX Runtime INT8", "twofour", "PyTorch"]
    assert rows[1]["speed"] == 4.0
    assert rows[1]["median_us"] == 80.0
    assert (rows[1]["speed_low"], rows[1]["speed_high"]) == (4.0, 4.0)
    assert "speed" not in rows[2]
    assert rows[2]["top1"] is None


def test_markdown() -> None:
    lines = markdown(plain(ROWS, BASELINE), BASELINE).splitlines()
    assert lines[0] == "| runs on | weights | top-1 | latency | ± | speed | size |"
    assert lines[3] == "| twofour | 2:4 int8 | 91.32 % | 80.0 us | 1.2 | 4.00x | 205 kB |"
    assert lines[4] == "| PyTorch | dense f32 |  |  |  |  |  |"
    assert "times as fast as ONNX Runtime INT8" in lines[-1]
    assert len({line.count("|") for line in lines[:5]}) == 1


@pytest.mark.parametrize("width", [80, 120])
def test_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(rich_table(plain(ROWS, BASELINE), BASELINE, "digits"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for cell in ("digits", "twofour", "91.32 %", "80.0 us", "4.00x", "205 kB"):
        assert cell in text
    assert max(map(len, text.splitlines())) <= width
