"""The page of a search: whole, self-contained, and safe with any names."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.report.test_sensitivity_page import Page
from twofour.report.search import search_page

CHOICES = {"dense f32": 20.0, "dense int8": 6.0, "2:4 int8": 4.0}


def unit(name: str, k: int) -> dict[str, Any]:
    return {
        "name": name,
        "layers": [name, f"{name}.other"] if k % 2 else [name],
        "parameters": 64 * (k + 1),
        "times_us": {choice: us + k for choice, us in CHOICES.items()},
        "offered": list(CHOICES),
        "errors": {"2:4": 0.01 * k, "int8": None if k == 3 else 0.001},
        "drops": {"2:4": 0.1 * k, "int8": None},
        "choice": "2:4 int8",
    }


def point(name: str, us: float, figure: float | None, **more: Any) -> dict[str, Any]:
    drop = None if figure is None else 90 - figure
    return {
        "name": name,
        "latency_us": us,
        "speed": 100 / us,
        "speed_low": 99 / us,
        "speed_high": 101 / us,
        "figure": figure,
        "drop": drop,
        "drop_error": None if drop is None else 0.2,
        "error": drop,
        "on_front": False,
        "counts": {"2:4 int8": 3, "dense f32": 1},
        "choices": ["2:4 int8"],
        **more,
    }


def found(layers: int = 4, name: str = "layer", **more: Any) -> dict[str, Any]:
    return {
        "model": "m.onnx",
        "data": "d.npz",
        "metric": "top1",
        "unit": "%",
        "higher_is_better": True,
        "samples": 100,
        "dense": 90.0,
        "max_drop": 1.0,
        "max_latency_us": None,
        "threads": 1,
        "cpu": "a CPU",
        "target": "cpu:x",
        "answer": 2,
        "layers": {},
        "unseen": {
            "samples": 700,
            "dense": 90.5,
            "figure": 90.0,
            "drop": 0.5,
            "drop_error": 0.1,
        },
        "points": [
            point("1 of 4, everything float32", 100.0, 90.0, on_front=True),
            point("2 of 4, everything INT8", 30.0, 89.5),
            point("3 of 4, at the bound", 25.0, 89.6, on_front=True),
            point("4 of 4, in a gap", 10.0, None),
        ],
        "predicted": [{"latency_us": 20.0, "error": 0.1, "drop": 0.5}],
        "units": [unit(f"{name}.{k}", k) for k in range(layers)],
        "notes": ["a note"],
        **more,
    }


@pytest.mark.parametrize("layers", [1, 20, 100])
def test_the_page_is_whole_and_needs_nothing_else(layers: int) -> None:
    text = search_page(found(layers))
    page = Page(text)
    assert page.open == []
    assert page.links == ["data:,"]  # no icon is asked for
    assert "://" not in text
    assert page.tags.count("svg") == 2
    assert page.tags.count("tr") == 1 + 4 + 1 + layers
    assert page.tags.count("circle") == 3 + 3 * layers  # one engine has no figure
    words = " ".join(" ".join(page.texts).split())
    assert "everything INT8" in page.texts
    assert "25.0 us" in words
    assert "no number" in words
    assert "On 700 samples that the search did not use: top1 90 (float32 90.5), drop +0.5" in words


def test_the_answer_and_the_front_are_marked() -> None:
    text = search_page(found())
    drawing = text.partition('aria-label="top1 over us (logarithmic)"')[2].partition("</svg>")[0]
    assert drawing.count('class="cost"') == 1
    assert drawing.count('class="gain"') == 1
    assert drawing.count('class="mark"') == 1
    assert (
        len(re.findall(r"[\d.]+,[\d.]+", drawing.partition('points="')[2].partition('"')[0])) == 2
    )


@pytest.mark.parametrize(
    "more", [{}, {"max_drop": None, "max_latency_us": 26.0}, {"higher_is_better": False}]
)
def test_all_that_is_drawn_lies_within(more: dict[str, Any]) -> None:
    text = search_page(found(100, **more))
    for box, drawing in re.findall(r'<svg viewBox="0 0 (\d+ \d+)".*?>(.*?)</svg>', text, re.S):
        width, height = map(int, box.split())
        for names, most in ((("x", "cx", "x1", "x2"), width), (("y", "cy", "y1", "y2"), height)):
            for name in names:
                places = [float(v) for v in re.findall(rf' {name}="([^"]+)"', drawing)]
                assert all(0 <= place <= most for place in places), (name, places)


def test_names_are_texts_and_never_markup() -> None:
    bad = '<script>alert("x")</script>&amp;'
    page = Page(search_page(found(2, bad, model=bad, metric=bad, notes=[bad], cpu=bad)))
    assert page.tags.count("script") == 1  # the page's own
    assert any(bad in text for text in page.texts)


def test_a_search_without_an_answer() -> None:
    content = found(answer=None)
    for each in content["units"]:
        each["choice"] = None
    words = " ".join(Page(search_page(content)).texts)
    assert "No engine that was built holds the bound." in words
