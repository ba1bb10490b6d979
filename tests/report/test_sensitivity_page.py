"""The page and the plot of a scan: whole, self-contained, and safe with any names."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from twofour.core.errors import InputError
from twofour.core.sensitivity import Case, Left, Sensitivity, Together, document, tradeoff
from twofour.report.charts import ending, place_labels, round_values, scale_of
from twofour.report.plot import plot_sensitivity
from twofour.report.sensitivity import sensitivity_page, write_sensitivity

VOID = {"meta", "link", "br", "img", "input"}


def found(layers: int, gains: bool = True, name: str = "layer") -> dict[str, Any]:
    """A document of so many layers in two patterns."""
    cases = tuple(
        Case(f"{name}.{k}", p, f"w{k}", 64 * k + 64, 0.9, 90 - drop, drop, 0.3, 0.1)
        for p in ("2:4", "2:4/pair")
        for k in range(layers)
        for drop in [((7 * k) % layers) / layers * 4 - 0.5]
    )
    left = (Left(f"{name}.first", "2:4", "3 input channels are not a multiple of 4"),)
    scan = Sensitivity("m.onnx", "top1", "%", True, 90.0, 500, cases, left, ("a note",))
    ways = []
    for pattern in scan.patterns if gains else ():
        us = {case.layer: 1.0 + case.parameters / 64 for case in scan.at(pattern)}
        way = tradeoff(scan.at(pattern), pattern, "int8", us)
        ways.append(replace(way, together=(Together(layers, 80.0, 10.0, 0.5),)))
    return document(scan, ways, "1 thread on a CPU" if gains else None)


class Page(HTMLParser):
    """Elements that were opened and not closed, and all texts and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


@pytest.mark.parametrize("layers", [1, 20, 100])
def test_the_page_is_whole_and_needs_nothing_else(layers: int) -> None:
    text = sensitivity_page(found(layers))
    page = Page(text)
    assert page.open == []
    assert page.links == ["data:,"]  # no icon is asked for
    assert "://" not in text
    assert page.tags.count("tr") == 2 * (layers + 1)
    assert page.tags.count("rect") == 4 * layers
    for k in range(layers):
        assert page.texts.count(f"layer.{k}") >= 4  # a bar and a row in each pattern
    assert "layer.first (3 input channels are not a multiple of 4)" in " ".join(page.texts)


def test_rows_begin_with_the_worst() -> None:
    page = Page(sensitivity_page(found(20)))
    drops = [float(t.split(" ")[0]) for t in page.texts if re.fullmatch(r"[+-][\d.]+ ±0.3", t)]
    assert drops == sorted(drops[:20], reverse=True) * 2


def test_all_that_is_drawn_lies_within() -> None:
    text = sensitivity_page(found(100))
    for box, drawing in re.findall(r'<svg viewBox="0 0 (\d+ \d+)".*?>(.*?)</svg>', text, re.S):
        width, height = map(int, box.split())
        for name, most in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            places = [float(v) for v in re.findall(rf' {name}="([^"]+)"', drawing)]
            assert all(0 <= place <= most for place in places), (name, max(places))


def test_names_are_texts_and_never_markup() -> None:
    bad = '<script>alert("x")</script>&amp;'
    text = sensitivity_page(found(2, name=bad) | {"model": bad, "notes": [bad]})
    page = Page(text)
    assert page.tags.count("script") == 1  # the page's own
    assert f"{bad}.0" in page.texts


@pytest.mark.parametrize("name", ["$\\frac{$", "\u5c42\x1b[31m"])
@pytest.mark.filterwarnings("error")
def test_names_are_no_formulas_and_need_no_letters(name: str, tmp_path: Path) -> None:
    plot_sensitivity(found(2, name=name) | {"model": name, "metric": name}, tmp_path / "p.png")
    assert (tmp_path / "p.png").is_file()


def test_a_scan_without_gains_has_its_page_and_plot(tmp_path: Path) -> None:
    page = Page(sensitivity_page(found(3, gains=False)))
    assert page.tags.count("svg") == 2
    assert "us gained" not in page.texts
    plot_sensitivity(found(3, gains=False), tmp_path / "p.png")


def test_a_network_without_a_number_is_shown(tmp_path: Path) -> None:
    """As --json has it: null."""
    content = found(4)
    content["cases"][2] |= {"figure": None, "drop": None, "drop_error": None}
    content["tradeoffs"][0]["steps"][-1] |= {"total_drop": None, "drop_per_us": None}
    content["tradeoffs"][0]["together"][0]["drop"] = None
    content["dense"] = None
    page = Page(sensitivity_page(content))
    assert page.texts.count("no number") >= 2
    plot_sensitivity(content, tmp_path / "p.png")


@pytest.mark.parametrize("layers", [1, 20, 100])
def test_the_plot_grows_with_the_layers(layers: int, tmp_path: Path) -> None:
    plot_sensitivity(found(layers), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        width, height = image.size
    assert width == 1690
    assert height / (2 * layers) >= 20  # pixels of a row; its letters have 13
    assert list(tmp_path.iterdir()) == [tmp_path / "plot.png"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for write in (write_sensitivity, plot_sensitivity):
        with pytest.raises(InputError, match="cannot write"):
            write(found(1), tmp_path / "no" / "file")


def test_scales_have_round_ends_and_0() -> None:
    assert scale_of([2.2, 0.3], 0, 100).most == 2.5
    assert scale_of([-1.2, 3.0], 0, 100).least == -2.0
    assert [text for _, text in scale_of([0.7], 0, 100).ticks] == [
        "0",
        "0.2",
        "0.4",
        "0.6",
        "0.8",
    ]
    for values in ([], [0.0], [math.inf], [1e-9], [1e9, -3]):
        scale = scale_of(values, 10, 90)
        assert scale.least <= 0 < scale.most
        assert 2 <= len(scale.ticks) <= 9
        assert scale.at(math.inf) == 90
        assert scale.at(scale.least) == 10
    assert round_values(-1.0, 1.0) == (-1.0, -0.5, 0.0, 0.5, 1.0)


@pytest.mark.parametrize("value", [5e-324, 1e308, -1e308, math.inf, math.nan])
def test_scales_of_what_cannot_be_drawn_have_room(value: float) -> None:
    scale = scale_of([value, -value], 0, 100)
    assert (scale.least, scale.most) == (0, 1)
    assert scale.ticks[-1] == (100, "1")


def test_labels_keep_apart() -> None:
    points = [(50.0, 50.0 + k, "a name of a layer", "") for k in range(30)]
    placed = [p.label for p in place_labels(points, 10, 400) if p.label]
    lines = sorted(y for _, y, _ in placed)
    assert 2 <= len(placed) <= 10
    assert all(b - a >= 13 for a, b in itertools.pairwise(lines))
    (right,) = place_labels([(390.0, 50.0, "name", "")], 1, 400)
    assert right.label == (382.0, 54.0, "end")


def test_long_names_keep_their_end() -> None:
    assert ending("short", 10) == "short"
    assert ending("encoder.layer.11.attention.output.dense", 32) == "...11.attention.output.dense"
    assert ending("a" * 50, 20) == "..." + "a" * 17
