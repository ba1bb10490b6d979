"""The shared cache: whole or not there, one maker at a time across processes, bounded."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from twofour.core.errors import Error, InputError
from twofour.serve.repository import cache as caches
from twofour.serve.repository.cache import Cache

KEY = "ab" * 32
NEVER = threading.Event()
SPAWN = multiprocessing.get_context("spawn")


def is_good(folder: Path) -> bool:
    return (folder / "data").exists() and (folder / "data").read_bytes() == b"good"


def write(folder: Path, _: int) -> None:
    (folder / "data").write_bytes(b"good")


def refuse(folder: Path, _: int) -> None:
    raise AssertionError("it is there already")


def keys(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if path.is_dir()}


def put(cache: Cache, key: str, size_bytes: int) -> None:
    def fill(folder: Path, _: int) -> None:
        (folder / "data").write_bytes(bytes(size_bytes))

    with cache.entry(key, lambda folder: True, fill, NEVER):
        pass


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 1000)
    with cache.entry(KEY, is_good, write, NEVER) as folder:
        assert is_good(folder)
    with cache.entry(KEY, is_good, refuse, NEVER) as folder:
        assert folder == tmp_path / "c" / KEY


def test_one_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 1000)

    def fail(folder: Path, _: int) -> None:
        (folder / "data").write_bytes(b"go")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"), cache.entry(KEY, is_good, fail, NEVER):
        pass
    assert keys(cache) == set()
    with cache.entry(KEY, is_good, write, NEVER) as folder:
        assert is_good(folder)


def test_what_never_becomes_good_ends(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 1000)
    with (
        pytest.raises(InputError, match="does not stay"),
        cache.entry(KEY, lambda folder: False, write, NEVER),
    ):
        pass


def test_what_a_killed_server_left_is_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 1000)
    for name in (KEY, "cd"):
        (cache.folder / f"{name}.partial").mkdir()
        (cache.folder / f"{name}.partial" / "data").write_bytes(b"go")
    (cache.folder / "ef.lock").touch()
    with cache.entry(KEY, is_good, write, NEVER):
        pass
    assert keys(cache) == {KEY}
    assert not (cache.folder / "ef.lock").exists()


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 25)
    for key in ("aa", "bb"):
        put(cache, key, 10)
        time.sleep(0.01)
    put(cache, "aa", 10)  # used again
    put(cache, "cc", 10)
    assert keys(cache) == {"aa", "cc"}
    assert {path.name for path in cache.folder.iterdir()} >= {"aa.lock", "cc.lock"}
    assert not (cache.folder / "bb.lock").exists()


def test_one_in_use_stays_however_large(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 5)
    with cache.entry(KEY, is_good, write, NEVER) as folder:
        put(cache, "cd", 10)
        assert is_good(folder)
    cache.trim()
    assert keys(cache) == set()


def test_threads_make_an_entry_once(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path / "c", 1000), []

    def make(folder: Path, _: int) -> None:
        made.append(folder)
        time.sleep(0.2)
        write(folder, 0)

    def use(_: int) -> bool:
        with cache.entry(KEY, is_good, make, NEVER) as folder:
            return is_good(folder)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(16)))
    assert len(made) == 1


def work(folder: str, count: int, failed: object) -> None:
    """Takes entries of three keys in a cache that holds two; runs in a process of its own."""
    cache = Cache(Path(folder), 9)
    for i in range(count):
        with cache.entry(f"{i % 3:02x}", is_good, write, NEVER) as found:
            if not is_good(found):
                failed.set()  # type: ignore[attr-defined]


def test_processes_that_share_a_cache_never_see_half_an_entry(tmp_path: Path) -> None:
    failed = SPAWN.Event()
    arguments = (str(tmp_path / "c"), 60, failed)
    workers = [SPAWN.Process(target=work, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert not failed.is_set()


def hold(folder: str, ready: object) -> None:
    """Begins to make an entry and never ends; runs in a process of its own."""

    def make(_: Path, __: int) -> None:
        ready.set()  # type: ignore[attr-defined]
        time.sleep(600)

    with Cache(Path(folder), 1000).entry(KEY, is_good, make, NEVER):
        pass


def test_a_lock_ends_with_the_process_that_held_it(tmp_path: Path) -> None:
    ready = SPAWN.Event()
    worker = SPAWN.Process(target=hold, args=(str(tmp_path / "c"), ready))
    worker.start()
    assert ready.wait(60)
    cache, stop = Cache(tmp_path / "c", 1000), threading.Event()
    timer = threading.Timer(0.3, stop.set)
    timer.start()
    with pytest.raises(Error, match="given up"), cache.entry(KEY, is_good, write, stop):
        pass
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with cache.entry(KEY, is_good, write, NEVER) as folder:
        assert is_good(folder)


def test_a_lock_that_was_removed_while_it_was_opened_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, opened, open_lock = Cache(tmp_path / "c", 1000), [], caches._open

    def removed_at_first(path: Path) -> int:
        opened.append(open_lock(path))
        if len(opened) == 1:
            path.unlink()  # by another server, which removed the entry
        return opened[-1]

    with cache.entry(KEY, is_good, write, NEVER):
        pass
    monkeypatch.setattr(caches, "_open", removed_at_first)
    with cache.entry(KEY, is_good, refuse, NEVER):
        other = os.open(cache.folder / f"{KEY}.lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)


def test_a_folder_that_others_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c").chmod(0o777)
    with pytest.raises(InputError, match="not safe"):
        Cache(tmp_path / "c", 1000)
    assert (Cache(tmp_path / "d", 1000).folder.stat().st_mode & 0o777) == 0o700


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c").touch()
    with pytest.raises(InputError, match="cannot be made"):
        Cache(tmp_path / "c", 1000)
