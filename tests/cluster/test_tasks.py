"""Scans on a real Ray cluster of two nodes: what they find is what processes find.

The tests share a cluster, and each leaves it as it was: they may run in any order.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[default]'")

import ray
from ray.cluster_utils import Cluster

from tests.cluster import work
from tests.cluster.nodes import two_nodes
from tests.serve.clusters import ROOT
from twofour.cluster import nodes
from twofour.cluster.tasks import TRIES, RayTasks, on_ray
from twofour.core.errors import GateError, InputError, UnsupportedError
from twofour.core.scan import Cache, Item, arrivals, scan
from twofour.core.target import Target, host_target

pytestmark = pytest.mark.slow
FIGURE = ["figure"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes() as found:
        yield found


@pytest.fixture
def spread(cluster: Cluster) -> Iterator[RayTasks]:
    """As many workers as there are CPUs; all have ended, and what they took is free again."""
    with on_ray() as found:
        assert found.jobs == 3
        yield found
    wait(lambda: ray.available_resources().get("CPU") == 3, 60)


def wait(condition: Callable[[], bool], most_s: float) -> None:
    end = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < end, f"not within {most_s} s"
        time.sleep(0.1)


def figures(found: Sequence[dict[str, float | None]]) -> list[float | None]:
    return [each["figure"] for each in found]


def test_results_are_those_of_processes_and_are_kept_as_they_come(
    spread: RayTasks, tmp_path: Path
) -> None:
    log, path = tmp_path / "log", tmp_path / "cache"
    start = functools.partial(work.start_log, str(log))
    told: list[tuple[int, int | None]] = []
    known = scan(work.items(2), start, Cache.open(path, FIGURE))
    found = scan(
        work.items(7),
        start,
        Cache.open(path, FIGURE),
        report=lambda *now: told.append(now[:2]),
        spread=spread,
    )
    assert found == scan(work.items(7), start)
    assert found[:2] == known
    lines = [json.loads(line)["name"] for line in path.read_text().splitlines()]
    assert sorted(lines) == [f"item {k}" for k in range(7)]
    assert told == [(done, 7) for done in range(2, 8)]
    assert scan(work.items(7), work.refuse, Cache.open(path, FIGURE), spread=spread) == found


def test_the_work_is_spread_over_the_nodes(spread: RayTasks) -> None:
    """Three workers at most, each with a CPU of its own, that live as long as there are items."""
    found = [place for _, place in arrivals(work.items(30), work.start_where, spread)]
    assert len(found) == 30
    assert 1 <= len({process for *_, process in found}) <= 3
    assert {cpus for _, cpus, _ in found} == {1.0}
    fewer = replace(spread, jobs=1)
    again = [place for _, place in arrivals(work.items(5), work.start_where, fewer)]
    assert len({process for *_, process in again}) == 1


def test_both_nodes_take_part_when_items_take_long(spread: RayTasks, tmp_path: Path) -> None:
    """Three workers have to be at an item at once: two of them have no room on one node."""
    start = functools.partial(work.start_together, str(tmp_path), 3)
    found = [node for _, node in arrivals(work.items(3), start, spread)]
    assert len(set(found)) == 2


@pytest.mark.parametrize("deaths", [1, TRIES - 1])
def test_the_item_of_a_killed_worker_is_done_again(
    spread: RayTasks, tmp_path: Path, deaths: int
) -> None:
    notes: list[str] = []
    start = functools.partial(work.start_mortal, str(tmp_path), deaths)
    found = scan(work.items(5), start, spread=replace(spread, note=notes.append))
    assert figures(found) == [0.0, 1.0, 4.0, 9.0, 16.0]
    assert len(notes) == deaths
    assert all("ended at item 1, which is done again" in note for note in notes)


def test_an_item_that_kills_all_its_workers_is_named(spread: RayTasks, tmp_path: Path) -> None:
    start = functools.partial(work.start_mortal, str(tmp_path), TRIES)
    with pytest.raises(UnsupportedError, match=f"{TRIES} workers ended at item 1"):
        scan(work.items(5), start, spread=spread)
    assert len(list(tmp_path.iterdir())) == TRIES


def test_workers_that_die_as_they_begin_are_given_up(spread: RayTasks) -> None:
    with pytest.raises(UnsupportedError, match="end as they begin"):
        scan(work.items(2), work.dies, spread=spread)


def test_a_killed_node_loses_no_item(cluster: Cluster, spread: RayTasks, tmp_path: Path) -> None:
    """It is killed while its worker is at an item that may end only where it is done again."""
    log, gates = tmp_path / "log", tmp_path / "gates"
    gates.mkdir()
    third = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    start = functools.partial(work.start_gated, str(log), str(gates))
    found = arrivals(work.items(6), start, replace(spread, jobs=4))
    killed: list[str] = []

    def begun(words: str) -> list[str]:
        return [line for line in log.read_text().splitlines() if words in line]

    def kill() -> None:
        wait(lambda: log.is_file() and log.read_text().count("\n") == 4, 120)
        killed.extend(begun(third.node_id))
        cluster.remove_node(third, allow_graceful=False)
        for k in set(range(6)) - {int(line.split()[0]) for line in killed}:
            gates.joinpath(str(k)).touch()
        wait(lambda: len(begun(f"{killed[0].split()[0]} ")) == 2, 120)
        gates.joinpath(killed[0].split()[0]).touch()

    with work.in_thread(kill):
        results = {item.name: result for item, result in found}
    assert results == {f"item {k}": k * k for k in range(6)}
    wait(lambda: third.node_id not in nodes.cpus_by_node(), 60)  # for the tests that follow
    assert len(killed) == 1
    first, second = begun(f"{killed[0].split()[0]} ")
    assert first == killed[0]
    assert third.node_id not in second


def test_an_error_keeps_its_class_and_names_its_item(spread: RayTasks, tmp_path: Path) -> None:
    cache = Cache.open(tmp_path / "cache", FIGURE)
    start = functools.partial(work.start_odd, "error")
    with pytest.raises(GateError) as error:
        scan(work.items(3), start, cache, spread=replace(spread, jobs=1))
    assert error.value.what == "item 1: no figure"
    assert (error.value.reasons, error.value.fix) == (("expected one",), "give one")
    assert list(cache.results.values()) == [{"figure": 0.0}]  # what was found before stays


def test_an_error_at_the_start_of_a_worker_is_told(spread: RayTasks) -> None:
    with pytest.raises(GateError) as error:
        scan(work.items(3), work.refuse, spread=spread)
    assert error.value.what == "cannot start"
    assert error.value.reasons == ("expected more",)


def test_a_bug_is_told_with_its_trace(spread: RayTasks) -> None:
    with pytest.raises(UnsupportedError, match="failed at item 1") as error:
        scan(work.items(3), functools.partial(work.start_odd, "bug"), spread=spread)
    assert "ZeroDivisionError: a bug of the metric" in str(error.value)
    assert "in odd" in str(error.value)


def test_what_cannot_be_sent_is_refused(spread: RayTasks) -> None:
    lock = work.unsendable()
    with pytest.raises(InputError, match="cannot be sent to other machines"):
        scan(work.items(2), functools.partial(work.start_log, lock), spread=spread)


# Files.


@pytest.fixture
def hidden(tmp_path: Path) -> Iterator[Path]:
    """A folder under a name that holds in this process alone."""
    handle = os.open(tmp_path, os.O_RDONLY)
    yield Path(f"/proc/self/fd/{handle}")
    os.close(handle)


def files_in(folder: Path) -> Callable[[], Callable[[Path], tuple[float, list[str], str]]]:
    np.savez(folder / "data.npz", x=np.arange(5))
    (folder / "texts" / "inner").mkdir(parents=True)
    (folder / "texts" / "a.txt").write_text("a")
    (folder / "texts" / "inner" / "b.txt").write_text("b")
    (folder / "one").write_text("first")
    (folder / "two").write_text("second")
    return functools.partial(work.start_reading, folder / "data.npz", folder / "texts")


def test_files_that_other_machines_lack_are_sent(spread: RayTasks, hidden: Path) -> None:
    """Of the work and of its items; a folder with all that is in it."""
    start = files_in(hidden)
    items = [Item(name, name, hidden / name) for name in ("one", "two")]
    found = {item.name: result for item, result in arrivals(items, start, spread)}
    texts = ["a.txt", "inner/b.txt"]
    assert found == {"one": (10.0, texts, "first"), "two": (10.0, texts, "second")}


def test_files_that_are_there_are_read_in_place(spread: RayTasks, tmp_path: Path) -> None:
    start = files_in(tmp_path)
    items = [Item(name, name, tmp_path / name) for name in ("one", "two")]
    narrow = replace(spread, sent_bytes=0)  # nothing may be sent
    found = {item.name: result[2] for item, result in arrivals(items, start, narrow)}
    assert found == {"one": "first", "two": "second"}


def test_too_much_to_send_is_refused(spread: RayTasks, hidden: Path) -> None:
    start = files_in(hidden)
    narrow = replace(spread, sent_bytes=100)
    with pytest.raises(InputError, match=r"data\.npz is not on node") as error:
        list(arrivals([Item("one", "one", hidden / "one")], start, narrow))
    assert "a path that every node has" in str(error.value)


# Targets.


def test_what_is_timed_has_a_machine_to_itself(spread: RayTasks) -> None:
    """The worker holds all CPUs of its node, be it the one with one or the one with two."""
    target = host_target()
    items = [replace(item, target=target) for item in work.items(2)]
    sizes = {node["NodeID"]: node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"]}
    found = [place for _, place in arrivals(items, work.start_where, spread)]
    assert all(cpus == sizes[node] for node, cpus, _ in found)


def test_timed_items_and_others_in_one_scan(spread: RayTasks) -> None:
    target = host_target()
    first, second, *others = work.items(4)
    items = [replace(first, target=target), replace(second, target=target), *others]
    for jobs in (1, 3):
        found = dict(arrivals(items, work.start_where, replace(spread, jobs=jobs)))
        assert set(found) == set(items)


def test_a_target_that_no_node_can_run_is_refused(spread: RayTasks) -> None:
    foreign = Target("vector", "s390x", "z16")
    items = [replace(work.items(1)[0], target=foreign)]
    with pytest.raises(UnsupportedError, match="no node of the cluster can run cpu:") as error:
        list(arrivals(items, work.refuse, spread))
    assert "lacks architecture s390x" in str(error.value)


def test_a_node_with_another_version_is_refused(
    spread: RayTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "VERSIONS", "twofour 0.0, Python 2.7")
    for target in (None, host_target()):
        items = [replace(each, target=target) for each in work.items(1)]
        with pytest.raises(InputError, match="runs other versions") as error:
            list(arrivals(items, work.start_where, spread))
        assert "expected twofour 0.0" in str(error.value)


# The driver ends.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_who_asked_and_the_rest_is_done_later(
    cluster: Cluster, spread: RayTasks, tmp_path: Path, number: int
) -> None:
    log, path = tmp_path / "log", tmp_path / "cache"
    known = functools.partial(work.start_log, str(tmp_path / "other"))
    scan(work.items(2), known, Cache.open(path, FIGURE))
    arguments = [cluster.address, path, log, 8, 600.0]
    command = [sys.executable, str(ROOT / "tests/cluster/work.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    wait(lambda: log.is_file() and log.read_text().count("\n") == 3, 120)
    driver.send_signal(number)
    assert driver.wait(60) != 0
    pids = [int(line.split()[1]) for line in log.read_text().splitlines()]
    wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 60)
    log.unlink()
    again = functools.partial(work.start_log, str(log))
    found = scan(work.items(8), again, Cache.open(path, FIGURE), spread=spread)
    assert figures(found) == [float(k * k) for k in range(8)]
    assert sorted(line.split()[0] for line in log.read_text().splitlines()) == list("234567")
