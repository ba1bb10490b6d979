"""A folder of entries that several servers share: each there whole or not at all, and not too many.

    CACHE/KEY/...          an entry; KEY is hexadecimal
    CACHE/KEY.partial/...  one that is being made, or that a killed server left
    CACHE/KEY.lock         held shared by who uses the entry, alone by who makes or removes it

Locks are the kernel's (flock): they end with the process that holds them, so none is ever stale.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from twofour.core.errors import Error, InputError
from twofour.serve.repository.errors import PassingError

_POLL_S = 0.05
_TRIES = 5
_LOCK = ".lock"
_PARTIAL = ".partial"

Stop = threading.Event
"""Set by who no longer wants a result: what waits, fetches or builds ends with an error."""


def check_wanted(stop: Stop, what: str) -> None:
    """Ends what nobody waits for.

    Raises:
        Error: `stop` is set.
    """
    if stop.is_set():
        raise Error(f"{what} was given up", ["the server stops, or the model was unloaded"])


class Cache:
    """Entries by key, the least recently used of which go when there are too many bytes.

    Args:
        folder: made if it is not there, for this user alone: machine code may lie in it.
        most_bytes: of all entries; one that is in use stays however large.

    Raises:
        InputError: the folder cannot be made, or others may write to it.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """Makes the folder."""
        self.folder, self.most_bytes = folder, most_bytes
        fix = "choose another cache folder, on a disk with room, that only this user may write to"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            info = folder.stat()
        except OSError as e:
            raise InputError(f"the cache {folder} cannot be made", [str(e)], fix) from e
        if info.st_uid != os.geteuid() or info.st_mode & stat.S_IWOTH:
            found = f"owner {info.st_uid}, mode {stat.S_IMODE(info.st_mode):o}"
            expected = f"expected owner {os.geteuid()} and no others who write, got {found}"
            raise InputError(f"the cache {folder} is not safe", [expected], fix)

    @contextmanager
    def entry(
        self, key: str, good: Callable[[Path], bool], make: Callable[[Path, int], None], stop: Stop
    ) -> Iterator[Path]:
        """An entry's folder, made if need be, which stays while the context is open.

        Args:
            key: hexadecimal, of all that the content depends on.
            good: whether a folder's content is whole; one that is not is made again.
            make: fills an empty folder, which takes its place when this returns. Its second
                argument is the descriptor of the lock: a child that inherits it holds the lock too.
            stop: ends waiting for another who makes the same entry.

        Raises:
            Error: `stop` was set; or what `make` raises.
            PassingError: the disk is full, the folder cannot be written, or the entry does not
                stay.
        """
        folder = self.folder / key
        for _ in range(_TRIES):
            with self._lock(key, fcntl.LOCK_SH, stop):
                if folder.is_dir() and good(folder):
                    os.utime(folder)
                    yield folder
                    return
            with self._lock(key, fcntl.LOCK_EX, stop) as lock:
                if not (folder.is_dir() and good(folder)):
                    self._make(folder, make, lock)
            self.trim(keep=key)
        reason = f"made {_TRIES} times, and each time it was damaged or removed by another server"
        raise PassingError(f"{folder} does not stay", [reason], "give the cache more bytes")

    def trim(self, keep: str = "") -> None:
        """Removes entries, those not used for longest first, until the others fit; none in use.

        Args:
            keep: a key whose entry stays.
        """
        folders = [path for path in self.folder.iterdir() if path.suffix in ("", _PARTIAL)]
        aged = sorted((_used_ns(path), path) for path in folders if path.is_dir())
        sizes = {path: _size_bytes(path) for _, path in aged}
        total = sum(sizes.values())
        for _, path in aged:
            unfinished = path.suffix == _PARTIAL
            if path.stem != keep and (unfinished or total > self.most_bytes):
                total -= sizes[path] if self._remove(path) else 0
        for path in self.folder.glob(f"*{_LOCK}"):
            if path.stem != keep and not path.with_suffix("").exists():
                self._remove(path.with_suffix(""))

    def _make(self, folder: Path, make: Callable[[Path, int], None], lock: int) -> None:
        """Fills a temporary folder, then renames it; the lock is held alone."""
        partial = folder.with_name(folder.name + _PARTIAL)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(mode=0o700)
            make(partial, lock)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        except OSError as e:
            fix = "make room, or name another cache folder"
            raise PassingError(f"{folder} cannot be written", [str(e)], fix) from e
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _remove(self, path: Path) -> bool:
        """Removes an entry that nobody uses; whether it did."""
        lock_file = self.folder / f"{path.stem}{_LOCK}"
        lock = _open(lock_file)
        try:
            if not _taken(lock, lock_file, fcntl.LOCK_EX):
                return False
            shutil.rmtree(path, ignore_errors=True)
            if not any((self.folder / f"{path.stem}{end}").exists() for end in ("", _PARTIAL)):
                lock_file.unlink(missing_ok=True)  # who waits for it sees that, and opens another
            return not path.exists()
        finally:
            os.close(lock)

    @contextmanager
    def _lock(self, key: str, kind: int, stop: Stop) -> Iterator[int]:
        """Holds the lock of a key; its descriptor."""
        path = self.folder / f"{key}{_LOCK}"
        lock = _open(path)
        try:
            while not _taken(lock, path, kind):
                check_wanted(stop, f"waiting for {path}")
                os.close(lock)
                lock = -1
                stop.wait(_POLL_S)
                lock = _open(path)
            yield lock
        finally:
            if lock >= 0:
                os.close(lock)


def _open(path: Path) -> int:
    """A lock file, made if need be.

    Raises:
        PassingError: it cannot be made.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as e:
        fix = "make room, or name a cache folder that this user may write to"
        raise PassingError(f"{path} cannot be opened", [str(e)], fix) from e


def _taken(lock: int, path: Path, kind: int) -> bool:
    """Locks the file if nobody is in the way and it still is the one of that name."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _used_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _size_bytes(path: Path) -> int:
    """Of all files below, those that go meanwhile left out."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total
