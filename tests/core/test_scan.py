"""Scans: each item once, in order, whatever ends them on the way."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.core import scan_work
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.processes import AnyStart
from twofour.core.scan import (
    Arrivals,
    Cache,
    Item,
    Processes,
    arrivals,
    in_words,
    key_of,
    scan,
)
from twofour.core.target import Target, host_target

ROOT = Path(__file__).parents[2]
FIGURE = ["figure"]


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_results_come_in_the_order_of_the_items(jobs: int) -> None:
    pieces = scan_work.items(5)
    found = scan([*reversed(pieces), pieces[2]], scan_work.start, jobs=jobs)
    assert [each["figure"] for each in found] == [16.0, 9.0, 4.0, 1.0, 0.0, 4.0]


def test_nothing_to_do_starts_nothing() -> None:
    assert scan([], scan_work.refuse) == ()
    assert scan([], scan_work.refuse, jobs=3) == ()


def test_equal_keys_are_computed_once_and_known_ones_never(tmp_path: Path) -> None:
    log, path = tmp_path / "log", tmp_path / "cache"
    start = functools.partial(scan_work.start_slow, str(log), 0.0)
    pieces = scan_work.items(3)
    scan([*pieces, *pieces], start, Cache.open(path, FIGURE))
    assert len(log.read_text().splitlines()) == 3
    again = scan(scan_work.items(4), start, Cache.open(path, FIGURE))
    assert [each["figure"] for each in again] == [0.0, 1.0, 4.0, 9.0]
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["0", "1", "2", "3"]


def test_progress_counts_what_is_known() -> None:
    told: list[tuple[int, int | None, str]] = []
    pieces = scan_work.items(3)
    cache = Cache(results={pieces[1].key: {"figure": 7.0}})
    found = scan([*pieces, pieces[0]], scan_work.start, cache, 1, lambda *now: told.append(now))
    assert [each["figure"] for each in found] == [0.0, 7.0, 4.0, 0.0]
    assert [now[:2] for now in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[1][2] == "item 0, about 0 s left"


def test_a_killed_scan_goes_on_where_it_stood(tmp_path: Path) -> None:
    """SIGKILL: no handler runs. What the cache has is not computed again."""
    cache, log = tmp_path / "cache", tmp_path / "log"
    process = _script(cache, log, 12, 2, 0.1)
    _wait_for(lambda: cache.is_file() and cache.read_bytes().count(b"\n") >= 3)
    process.kill()
    process.wait()
    known = {entry["name"] for entry in map(json.loads, cache.read_text().splitlines())}
    assert 3 <= len(known) < 12
    _wait_for(lambda: not _alive(log))  # processes end when nobody reads what they found
    log.unlink()
    second = _script(cache, log, 12, 2, 0.0)
    assert second.wait() == 0
    computed = [f"item {line.split()[0]}" for line in log.read_text().splitlines()]
    assert sorted([*computed, *known]) == sorted(f"item {k}" for k in range(12))
    assert scan(scan_work.items(12), scan_work.refuse, Cache.open(cache, FIGURE))[11] == {
        "figure": 121.0
    }


def test_ctrl_c_ends_all_processes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = _script(tmp_path / "cache", log, 4, 2, 60.0, start_new_session=True)
    _wait_for(lambda: log.is_file() and log.read_text().count("\n") == 2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) != 0
    assert not _alive(log)


def _script(
    cache: Path, log: Path, count: int, jobs: int, seconds: float, **options: bool
) -> subprocess.Popen[bytes]:
    arguments = [cache, log, count, jobs, seconds]
    command = [sys.executable, str(ROOT / "tests/core/scan_work.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, **options)


def _wait_for(holds: object) -> None:
    end = time.monotonic() + 60
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


def _alive(log: Path) -> list[int]:
    pids = {int(line.split()[1]) for line in log.read_text().splitlines()}
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_damaged_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    pieces = scan_work.items(2)
    good = json.dumps({"key": pieces[0].key, "name": "x", "result": {"figure": 5.0}})
    other = {"key": pieces[1].key, "result": {"figure": 1.0, "more": 2.0}}
    bad = ["{", "[]", "7", "\udcff", '{"key": 3, "result": {"figure": 1}}', json.dumps(other)]
    bad.append(json.dumps({"key": pieces[1].key, "result": {"figure": "1"}}))
    bad.append("[" * 100_000)
    text = "\n".join([*bad, "", good, good[:20]])
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    cache = Cache.open(path, FIGURE)
    assert cache.damaged == len(bad) + 1
    found = scan(pieces, scan_work.start, cache)
    assert [each["figure"] for each in found] == [5.0, 1.0]
    assert Cache.open(path, FIGURE).results == cache.results  # added on a line of its own


def test_figures_that_are_no_numbers_are_kept(tmp_path: Path) -> None:
    cache = Cache.open(tmp_path / "cache", FIGURE)
    cache.add(Item("a", "k", 0), {"figure": float("nan")})
    cache.add(Item("b", "l", 0), {"figure": None})
    again = Cache.open(tmp_path / "cache", FIGURE)
    assert again.damaged == 0
    assert again.results["k"]["figure"] != again.results["k"]["figure"]
    assert again.results["l"] == {"figure": None}


@pytest.mark.parametrize("name", ["no/such/cache", "."])
def test_a_cache_that_cannot_be_written_is_refused_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot write the cache"):
        Cache.open(tmp_path / name, FIGURE)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_names_its_item(jobs: int, tmp_path: Path) -> None:
    cache = Cache.open(tmp_path / "cache", FIGURE)
    start = functools.partial(scan_work.start_odd, "error")
    with pytest.raises(InputError) as error:
        scan(scan_work.items(3), start, cache, jobs)
    assert error.value.what == "item 1: no figure"
    assert (error.value.reasons, error.value.fix) == (("expected one",), "give one")
    if jobs == 1:
        assert list(cache.results.values()) == [{"figure": 0.0}]  # what was found before stays


def test_an_error_at_the_start_of_a_process_is_told() -> None:
    with pytest.raises(InputError, match="cannot start"):
        scan(scan_work.items(3), scan_work.refuse, jobs=2)


def test_a_bug_in_a_process_shows_its_trace(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedError, match="ended at item 1"):
        scan(scan_work.items(3), functools.partial(scan_work.start_odd, "bug"), jobs=2)
    assert "ValueError: a bug" in capfd.readouterr().err


def test_a_process_that_was_killed_is_named() -> None:
    with pytest.raises(UnsupportedError, match="ended at item 1") as error:
        scan(scan_work.items(3), functools.partial(scan_work.start_odd, "killed"), jobs=2)
    assert error.value.reasons == ("killed by signal 9",)


def test_what_cannot_be_sent_is_refused() -> None:
    assert scan(scan_work.items(2), lambda: scan_work.square)[1] == {"figure": 1.0}
    with pytest.raises(InputError, match="cannot be sent"):
        scan(scan_work.items(2), lambda: scan_work.square, jobs=2)
    with pytest.raises(InputError, match="in 0 processes"):
        scan(scan_work.items(2), scan_work.start, jobs=0)


class Backwards:
    """A spread whose last item is ready first; remembers whether it was closed."""

    jobs, threads = 3, 1

    def __init__(self) -> None:
        self.closed = False

    def results(self, items: Sequence[Item], start: AnyStart) -> Arrivals:
        work = start()
        try:
            for item in reversed(items):
                yield item, work(item.argument)
        finally:
            self.closed = True


def test_another_spread_gives_the_same_and_its_results_are_kept(tmp_path: Path) -> None:
    path, spread = tmp_path / "cache", Backwards()
    found = scan(scan_work.items(4), scan_work.start, Cache.open(path, FIGURE), spread=spread)
    assert found == scan(scan_work.items(4), scan_work.start)
    lines = [json.loads(line)["name"] for line in path.read_text().splitlines()]
    assert lines == [f"item {k}" for k in (3, 2, 1, 0)]
    again = Cache.open(path, FIGURE)
    assert scan(scan_work.items(4), scan_work.refuse, again, spread=Backwards()) == found


def test_a_spread_is_closed_when_a_result_cannot_be_kept(tmp_path: Path) -> None:
    spread, cache = Backwards(), Cache.open(tmp_path / "cache", FIGURE)
    cache.path = tmp_path / "gone" / "cache"
    with pytest.raises(OSError, match="gone"):
        scan(scan_work.items(3), scan_work.start, cache, spread=spread)
    assert spread.closed


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_of_any_kind_arrive_with_their_items(jobs: int) -> None:
    told: list[tuple[int, int | None]] = []
    pieces = scan_work.items(3)
    found = arrivals(
        pieces, scan_work.start_bytes, Processes(jobs), lambda *now: told.append(now[:2])
    )
    assert dict((item.name, result) for item, result in found) == {
        "item 0": b"",
        "item 1": b"x",
        "item 2": b"xx",
    }
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_what_is_timed_is_worked_at_alone() -> None:
    """Two processes would disturb each other: all of it is done in this one."""
    pieces = [replace(each, target=host_target()) for each in scan_work.items(3)]
    found = scan(pieces, scan_work.start_process, spread=Processes(3))
    assert {each["figure"] for each in found} == {float(os.getpid())}


def test_a_target_that_this_machine_cannot_run_is_refused_before_any_work() -> None:
    first, second = scan_work.items(2)
    foreign = replace(second, target=Target("vector", "s390x", "another"))
    with pytest.raises(UnsupportedError, match="item 1: code for cpu:vector cannot run") as error:
        scan([first, foreign], scan_work.refuse)
    assert "architecture s390x" in str(error.value)


def test_keys_tell_parts_apart() -> None:
    keys = [key_of("a", "b"), key_of("ab"), key_of("a", "b", ""), key_of("b", "a"), key_of("a")]
    assert len(set(keys)) == len(keys)
    assert key_of("a", 1, None) == key_of("a", 1, None)


def test_durations_in_words() -> None:
    assert [in_words(s) for s in (0.4, 89, 90, 3000, 7200)] == [
        "0 s",
        "89 s",
        "2 min",
        "50 min",
        "2.0 h",
    ]


@pytest.mark.parametrize("content", [b"\x08\x09model", b'{\n "format": "x"\n}\n', b"\n\x00\n"])
def test_nothing_is_appended_to_a_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is no cache of results"):
        Cache.open(path, ["figure"])
    assert path.read_bytes() == content
