"""The search example: what it says of points that dominate others, and its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.examples.test_recovery import script
from tests.report.test_search_page import point


def points() -> list[dict[str, Any]]:
    return [
        point("1 of 6, everything float32", 100.0, 90.0, on_front=True),
        point("2 of 6, everything INT8", 30.0, 89.5),
        point("3 of 6, everything 2:4 INT8", 20.0, 80.0),
        point("4 of 6, at the bound", 25.0, 89.6, on_front=True),
        point("5 of 6, spread over the front", 19.0, 84.0, on_front=True),
        point("6 of 6, in a gap", 10.0, None),
    ]


def test_what_dominates() -> None:
    module = script("search_front")
    int8, sparse = (module.against(rival, points()) for rival in module.alike(points()))
    assert int8["name"] == "everything INT8"
    assert int8["better"] == pytest.approx(0.1)
    assert int8["faster"] == pytest.approx(30 / 25)
    assert int8["beaten"]
    assert sparse["better"] == pytest.approx(4.0)
    assert sparse["faster"] == pytest.approx(20 / 19)


def test_what_does_not() -> None:
    """As fast but no better, as good but no faster: not dominated."""
    module = script("search_front")
    rival = point("everything INT8", 30.0, 89.5)
    slow = [rival, point("at the bound", 31.0, 89.6), point("in a gap", 29.0, 89.4)]
    found = module.against(rival, slow)
    assert found["better"] == pytest.approx(-0.1)
    assert found["faster"] == pytest.approx(30 / 31)
    assert not found["beaten"]
    alone = module.against(rival, [rival])
    assert (alone["better"], alone["faster"], alone["beaten"]) == (None, None, False)


def test_the_page(tmp_path: Path) -> None:
    module = script("search_front")
    every = points()
    result = {
        "name": "resnet56",
        "title": "ResNet-56",
        "metric": "top1",
        "samples": 100,
        "dense": 90.0,
        "max_drop": 1.0,
        "answer": 3,
        "unseen": None,
        "points": every,
        "against": [module.against(rival, every) for rival in module.alike(every)],
    }
    summary = {"title": "t", "command": "c", "version": "1", "device": ["a CPU"]}
    summary |= {"results": [result]}
    (tmp_path / "search.json").write_text(json.dumps(summary))
    assert module.main(["--again", str(tmp_path / "search.json")]) == 0
    page = (tmp_path / "search.md").read_text()
    assert "| **at the bound** | 25.0 | 4.00 | 1.20 | 89.60 | +0.40 ±0.20 |" in page
    assert "| everything INT8, not on the front | 30.0 |" in page
    assert "- everything INT8 is dominated by the search" in page
    assert "in a gap" not in page
