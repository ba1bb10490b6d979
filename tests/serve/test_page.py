"""The status page in a real Chromium, and what its files promise."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.serve import sample_status
from tests.serve.sample_status import HOSTILE, Load, SampleServer, idle, serving, version
from twofour.serve.page import HEADERS, assets

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


def test_files_refer_to_nothing_elsewhere_and_make_no_html_of_texts() -> None:
    files = assets()
    assert {"", "page.css", "page.js", "icon.svg"} <= set(files)
    for name, file in files.items():
        text = file.body.decode()
        outside = re.findall(
            r"(?:https?:)?//[\w.]+\.\w+[^\s\"]*", re.sub(r"(?m)^\s*//.*$", "", text)
        )
        assert set(outside) <= {"http://www.w3.org/2000/svg"}, name
        for danger in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
            assert danger not in text, name
        assert text.count("\n") <= 400
    page = files[""].body.decode()
    assert not re.search(r"<script(?![^>]*\bsrc=)|\bon\w+=|<style|\bstyle=", page)


def test_the_policy_allows_scripts_of_the_server_alone() -> None:
    policy = HEADERS["content-security-policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "*" not in policy


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Shown:
    """A page that notes what it asks for and what the console says."""

    def __init__(self, browser: Browser, url: str, width: int = 1280, key: str = "") -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900})
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(f"{url}#{key}")

    def ready(self) -> Page:
        expect(self.page.locator("#main")).to_be_visible(timeout=20_000)
        return self.page

    def rows(self) -> list[list[str]]:
        rows = self.page.locator("#models tbody tr").all()
        return [[cell.inner_text() for cell in row.locator("td").all()] for row in rows]


def versions(server: SampleServer) -> dict[tuple[str, str], dict[str, Any]]:
    document = json.loads(server.status.document())
    return {
        (model["model"], each["version"]): each
        for model in document["models"]
        for each in model["versions"]
    }


def time_text(ms: float | None) -> str:
    """Three digits, as the page writes times below a second."""
    if ms is None:
        return "\u2013"
    number, unit = (ms, "ms") if ms >= 1 else (ms * 1000, "\u00b5s")
    return f"{number:#.3g}".rstrip(".") + f" {unit}"


@needs_browser
def test_the_page_shows_what_the_document_says(browser: Browser) -> None:
    server = sample_status.several()
    with serving(server.status) as url:
        shown = Shown(browser, url, key="resnet50/3")
        page = shown.ready()
        assert page.title() == "resnets-eu-1"
        expect(page.locator("#state")).to_have_text("not ready")
        expect(page.locator("#sums")).to_contain_text("4 of 6")
        rows = {(row[0].splitlines()[0], row[1]): row for row in shown.rows()}
        told = versions(server)
        assert set(rows) == set(told)
        assert "no engine fits this machine" in rows["resnet50", "5"][0]
        for key, each in told.items():
            row = rows[key]
            assert row[2] == each["state"].lower()
            assert float(row[4]) == pytest.approx(each["requests_per_s"], rel=0.06)
            assert row[8] == time_text(each["latency_ms"]["total"]["p99"])
            assert row[9] == str(each["queue_length"])
        assert rows["resnet50", "3"][3].strip() == "90 %"
        detail = page.locator("#detail")
        expect(detail.locator("h2")).to_have_text("resnet50 version 3")
        expect(detail.locator("tr", has_text="timed out")).to_contain_text("5")
        assert detail.locator("svg[aria-label='p99 by version']").count() == 1
        bars = detail.locator("svg[aria-label='Rows'] rect").count()
        assert bars == sum(count > 0 for count in told["resnet50", "3"]["batch_rows"])
        assert shown.said == []
        assert all(asked.startswith(url.removesuffix("page/")) for asked in shown.asked)
        page.close()


@needs_browser
def test_what_nobody_wants_loaded_is_no_failure(browser: Browser) -> None:
    unused = [idle("resnet20", 1), idle("lazy", 1), idle("lazy", 2)]
    server = SampleServer(Load(version("resnet20", 2), 5, 1.0), *unused, seconds=10)
    with serving(server.status) as url:
        shown = Shown(browser, url)
        page = shown.ready()
        expect(page.locator("#sums")).to_contain_text("1 of 1")
        rows = [(row[0], row[1], row[2]) for row in shown.rows()]
        assert rows == [("lazy", "2", "not loaded"), ("resnet20", "2", "ready")]
        assert page.locator(".bad:visible").count() == 0
        page.close()


@needs_browser
def test_hostile_names_are_texts(browser: Browser) -> None:
    server = sample_status.several()
    with serving(server.status) as url:
        key = f"{quote(HOSTILE, safe='')}/1"
        shown = Shown(browser, url, key=key)
        page = shown.ready()
        page.get_by_role("button", name=HOSTILE).click()
        expect(page.locator("#detail h2")).to_contain_text(HOSTILE)
        page.wait_for_timeout(300)
        assert page.locator("img").count() == 0
        assert page.title() == "resnets-eu-1"
        assert shown.said == []
        page.close()


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scenario", ["empty", "one", "several", "forty"])
def test_nothing_is_wider_than_the_screen(browser: Browser, scenario: str, width: int) -> None:
    server = getattr(sample_status, scenario)()
    with serving(server.status) as url:
        shown = Shown(browser, url, width)
        page = shown.ready()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert len(shown.rows()) == len(server.reading.versions)
        assert page.locator("#empty").is_visible() == (scenario == "empty")
        assert page.locator("#filter").is_visible() == (scenario == "forty")
        assert shown.said == []
        page.close()


@needs_browser
def test_new_points_and_new_states_appear_by_themselves(browser: Browser) -> None:
    server = sample_status.one()
    with serving(server.status) as url:
        shown = Shown(browser, url)
        page = shown.ready()
        line = page.locator("svg[aria-label='Requests per second'] path.mark").last
        before = line.get_attribute("d")
        for at in range(20):
            server.status.tick(1e6 + at)
        server.reading.versions[0].tally.failures["FailedError"] += 1  # type: ignore[union-attr]
        expect(line).not_to_have_attribute("d", before or "", timeout=10_000)
        since = [asked for asked in shown.asked if "since=" in asked]
        assert since[0].endswith("since=0")
        assert not since[-1].endswith("since=0")
        assert shown.said == []
        page.close()


@needs_browser
def test_pointing_at_a_plot_shows_that_moment_in_all(browser: Browser) -> None:
    with serving(sample_status.one().status) as url:
        page = Shown(browser, url).ready()
        page.locator("svg[aria-label='Load']").hover()
        expect(page.locator("svg .cursor")).to_have_count(3)
        expect(page.locator(".legend").first).to_contain_text(":")
        page.mouse.move(0, 0)
        expect(page.locator("svg .cursor")).to_have_count(0)
        page.close()


@needs_browser
def test_forty_models_can_be_sorted_and_filtered(browser: Browser) -> None:
    with serving(sample_status.forty().status) as url:
        shown = Shown(browser, url)
        page = shown.ready()
        page.get_by_role("button", name="Req/s").click()
        rates = [float(row[4]) for row in shown.rows()]
        assert rates == sorted(rates, reverse=True)
        page.locator("#filter").fill("MODEL_07")
        assert [row[0] for row in shown.rows()] == ["team-2/model_07"]
        page.close()


@needs_browser
def test_a_server_that_is_gone_is_said_to_be_gone(browser: Browser) -> None:
    server = sample_status.one()
    with serving(server.status) as url:
        shown = Shown(browser, url)
        page = shown.ready()
    expect(page.locator("#notice")).to_contain_text("No answer from the server", timeout=15_000)
    expect(page.locator("body")).to_have_class("stale")
    page.close()


@needs_browser
def test_a_server_with_tokens_asks_for_one(browser: Browser) -> None:
    token = "0123456789abcdef"
    with serving(sample_status.one().status, token) as url:
        page = Shown(browser, url).page
        expect(page.locator("#access")).to_be_visible()
        expect(page.locator("#main")).to_be_hidden()
        page.locator("#token").fill(token)
        page.locator("#access button").click()
        expect(page.locator("#main")).to_be_visible()
        expect(page.locator("#access")).to_be_hidden()
        page.close()
