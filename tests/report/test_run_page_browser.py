"""The page of a run in a real Chromium: nothing is asked for, nothing fails, all of it works."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.report.sample_runs import hostile, many_layers, plain, real_parts, sample_run
from tests.report.test_run_page import SMALL
from twofour.core.outcome import Outcome
from twofour.report.run import write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def real(data_folder: Path) -> Outcome:
    """A run whose layers are those of an engine built here."""
    return sample_run(real_parts(data_folder / "onnx" / "mlperftiny_resnet8.onnx"))


class Shown:
    """A page that notes what it asks for and what the console says."""

    def __init__(
        self, browser: Browser, document: dict[str, Any], path: Path, width: int = 1280, **more: Any
    ) -> None:
        write_run(document, path)
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **more)
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.set_default_timeout(30_000)
        self.page.goto(path.as_uri())
        self.path = path

    def close(self) -> None:
        """Fails where anything was asked for or said."""
        self.context.close()
        assert self.said == []
        assert set(self.asked) <= {self.path.as_uri(), "data:,"}

    def seen(self) -> tuple[float, ...]:
        """What the window on the graph shows: left, top, width and height."""
        box = self.page.locator("#graph").get_attribute("viewBox") or ""
        return tuple(map(float, box.split()))

    def column(self, head: str) -> list[str]:
        """The texts of a column of the layer table."""
        heads = self.page.locator("#table thead th").all_inner_texts()
        place = next(k for k, each in enumerate(heads) if each.split(" ")[0] == head)
        cells = self.page.locator(f"#table tbody tr td:nth-child({place + 1})")
        return [text.strip() for text in cells.all_inner_texts()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_readable_on_a_desk_and_on_a_phone(
    browser: Browser, real: Outcome, tmp_path: Path, width: int, scheme: Any
) -> None:
    shown = Shown(browser, plain(real), tmp_path / "run.html", width, color_scheme=scheme)
    page = shown.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    expect(page.locator(".verdict")).to_contain_text("Passed")
    paper, ink = (
        page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("background", "color")
    )
    assert (_brightness(paper) > _brightness(ink)) == (scheme == "light")
    picture = page.screenshot(full_page=True)
    assert len(picture) > 50_000
    for image in page.locator("figure:visible, section svg:visible").all():
        box = image.bounding_box()
        assert box is None or box["height"] > 5
    shown.close()


def _brightness(colour: str) -> int:
    """Of rgb(1, 2, 3)."""
    return sum(int(part) for part in colour.split("(")[1].split(")")[0].split(",")[:3])


def test_heads_sort_by_click_and_by_key(browser: Browser, tmp_path: Path) -> None:
    shown = Shown(browser, plain(SMALL), tmp_path / "run.html")
    head = shown.page.locator("#table th", has_text="time")
    head.click()
    assert shown.column("time") == ["4.00\u00a0\u00b5s", "2.00\u00a0\u00b5s", "1.00\u00a0\u00b5s"]
    head.press("Enter")
    assert shown.column("time") == ["1.00\u00a0\u00b5s", "2.00\u00a0\u00b5s", "4.00\u00a0\u00b5s"]
    assert head.get_attribute("aria-sort") == "ascending"
    sparse = shown.page.locator("#table th", has_text="sparse")
    for _ in range(2):  # what is not known is last either way
        sparse.click()
        assert shown.column("sparse")[-1] == ""
    shown.close()


def test_layers_are_filtered(browser: Browser, tmp_path: Path) -> None:
    shown = Shown(browser, plain(SMALL), tmp_path / "run.html")
    shown.page.locator("#filter").fill("CONV2 onnx")
    expect(shown.page.locator("#shown")).to_have_text("0 of 3")
    shown.page.locator("#filter").fill("softmax")
    expect(shown.page.locator("#table tbody tr:visible")).to_have_count(1)
    shown.close()


def test_the_wheel_zooms_once_the_graph_was_clicked(browser: Browser, tmp_path: Path) -> None:
    shown = Shown(browser, plain(SMALL), tmp_path / "run.html")
    graph = shown.page.locator("#graph")
    graph.scroll_into_view_if_needed()
    box = graph.bounding_box()
    assert box is not None
    shown.page.mouse.move(box["x"] + 20, box["y"] + 20)
    before = shown.seen()
    shown.page.mouse.wheel(0, -100)
    shown.page.wait_for_timeout(200)
    assert shown.seen() == before, "the page scrolls, the graph stays"
    graph.scroll_into_view_if_needed()
    graph.click(position={"x": 8, "y": 8})
    shown.page.mouse.wheel(0, -300)
    expect(graph).not_to_have_attribute("viewBox", _box(before))
    near = shown.seen()
    assert near[2] < before[2]
    assert near[0] == pytest.approx(before[0], abs=0.05 * before[2]), "the corner stays in place"
    shown.page.mouse.wheel(0, 600)
    expect(graph).not_to_have_attribute("viewBox", _box(near))
    assert shown.seen()[2] > near[2]
    shown.close()


def _box(seen: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in seen)


def test_buttons_zoom_and_fit(browser: Browser, tmp_path: Path) -> None:
    shown = Shown(browser, plain(SMALL), tmp_path / "run.html")
    do = shown.page.get_by_role
    whole = shown.seen()
    do("button", name="Zoom out").click()
    assert shown.seen()[2] == pytest.approx(whole[2] * 1.4)
    do("button", name="Zoom in").click()
    assert shown.seen() == pytest.approx(whole)
    do("button", name="Zoom out").click()
    do("button", name="Fit").click()
    assert shown.seen() == pytest.approx(whole)
    do("button", name="Full window").click()
    box = shown.page.locator("#drawing").bounding_box()
    assert box == {"x": 0, "y": 0, "width": 1280, "height": 900}
    shown.page.keyboard.press("Escape")
    expect(shown.page.locator("#drawing")).not_to_have_class("drawing whole")
    do("button", name="Precision").click()
    expect(shown.page.locator("#drawing")).to_have_attribute("data-colour", "precision")
    shown.close()


def test_dragging_moves_the_graph_and_opens_nothing(browser: Browser, tmp_path: Path) -> None:
    shown = Shown(browser, plain(SMALL), tmp_path / "run.html")
    node = _node(shown, 1)
    node.scroll_into_view_if_needed()
    before, top = shown.seen(), shown.page.evaluate("scrollY")
    box = node.bounding_box()
    assert box is not None
    x, y = box["x"] + 30, box["y"] + 15
    shown.page.mouse.move(x, y)
    shown.page.mouse.down()
    shown.page.mouse.move(x + 60, y + 10, steps=5)
    shown.page.mouse.up()
    after = shown.seen()
    assert after[0] < before[0]
    assert after[2:] == before[2:]
    assert shown.page.evaluate("scrollY") == top
    expect(shown.page.locator("tr.flash")).to_have_count(0)
    shown.close()


def _node(shown: Shown, row: int) -> Locator:
    return shown.page.locator(f'#graph [data-row="{row}"]')


def test_a_node_tells_and_leads_to_its_row_and_back(browser: Browser, tmp_path: Path) -> None:
    shown = Shown(browser, plain(SMALL), tmp_path / "run.html")
    _node(shown, 1).hover()
    hint = shown.page.locator("#hint")
    expect(hint).to_contain_text("conv2")
    expect(hint).to_contain_text("time: 4.00")
    expect(hint).to_contain_text("of roofline: 61.0")
    expect(shown.page.locator(".edges .near")).to_have_count(2)
    shown.page.locator("#filter").fill("softmax")
    _node(shown, 1).click()
    row = shown.page.locator("#layer-1")
    expect(row).to_have_class("flash")
    expect(row).to_be_in_viewport()
    row.get_by_role("link").click()
    expect(_node(shown, 1)).to_be_focused()
    expect(_node(shown, 1)).to_be_in_viewport()
    shown.close()


def test_the_keyboard_walks_along_the_edges(browser: Browser, tmp_path: Path) -> None:
    shown = Shown(browser, plain(SMALL), tmp_path / "run.html")
    keys = shown.page.keyboard
    shown.page.locator("#node-0").focus()
    for number in (1, 2, 3, 4):
        keys.press("ArrowDown")
        expect(shown.page.locator(f"#node-{number}")).to_be_focused()
    keys.press("ArrowUp")
    expect(shown.page.locator("#node-3")).to_be_focused()
    expect(shown.page.locator("#hint")).to_contain_text("softmax")
    width = shown.seen()[2]
    keys.press("+")
    assert shown.seen()[2] < width
    keys.press("0")
    assert shown.seen()[2] == pytest.approx(width)
    keys.press("Enter")
    expect(shown.page.locator("#layer-2 a")).to_be_focused()
    shown.close()


def test_hashes_are_copied_whole(browser: Browser, tmp_path: Path) -> None:
    more = {"permissions": ["clipboard-read", "clipboard-write"]}
    shown = Shown(browser, plain(SMALL), tmp_path / "run.html", **more)
    shown.page.locator("[data-copy]").first.click()
    expect(shown.page.locator(".hash.copied")).to_have_count(1)
    copied = shown.page.evaluate("navigator.clipboard.readText()")
    assert copied == SMALL.artifacts[0].sha256
    shown.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_hostile_and_long_names_stay_texts_within_the_page(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    shown = Shown(browser, hostile(SMALL), tmp_path / "run.html", width)
    shown.page.wait_for_timeout(300)
    assert shown.page.locator("img").count() == 0
    _node(shown, 0).locator("rect").hover()
    expect(shown.page.locator("#hint")).to_contain_text("<script>alert(1)</script>")
    shown.close()
    shown = Shown(browser, hostile(SMALL, "x" * 3000), tmp_path / "long.html", width)
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    shown.close()


def test_thousands_of_layers_are_moved_and_sorted(browser: Browser, tmp_path: Path) -> None:
    shown = Shown(browser, plain(many_layers(SMALL, 2000)), tmp_path / "run.html")
    width = shown.seen()[2]
    shown.page.get_by_role("button", name="Zoom in").click()
    assert shown.seen()[2] < width
    shown.page.locator("#table th", has_text="share").click()
    expect(shown.page.locator("#table tbody tr").first).to_contain_text("conv2")
    shown.page.locator("#filter").fill("block665.")
    expect(shown.page.locator("#table tbody tr:visible")).to_have_count(3)
    shown.close()


def test_without_scripts_the_graph_is_there_whole(browser: Browser, tmp_path: Path) -> None:
    shown = Shown(browser, plain(SMALL), tmp_path / "run.html", java_script_enabled=False)
    expect(shown.page.locator("#graph .node")).to_have_count(5)
    assert shown.seen()[:2] == (0, 0)
    expect(shown.page.get_by_role("button", name="Fit")).to_be_hidden()
    shown.close()


def test_it_prints_in_light_colours_and_within_the_paper(browser: Browser, tmp_path: Path) -> None:
    run = dataclasses.replace(SMALL, notes=())
    shown = Shown(browser, plain(run), tmp_path / "run.html", 760, color_scheme="dark")
    shown.page.emulate_media(media="print")
    paper = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert _brightness(paper) == 3 * 255
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 760
    assert shown.page.pdf().startswith(b"%PDF")
    shown.close()
