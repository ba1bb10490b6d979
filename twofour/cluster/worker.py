"""What runs on a machine of the cluster: one process, which prepares once and then answers items.

The files that were sent to it lie in a folder of the system's temporary ones. It holds a lock there
as long as it lives; a later worker removes the folders that nobody holds, for who was killed could
not.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofour.cluster.sending import Contents, File, placed, unpack
from twofour.core.errors import Error
from twofour.core.target import Host, detect_host
from twofour.core.version import __version__

_FOLDER, _LOCK = "twofour-work-", "held"
VERSIONS = f"twofour {__version__}, Python {sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Place:
    """Where a worker runs.

    Attributes:
        node: the machine's name.
        versions: of what its answers depend on.
        host: the machine.
        lacking: numbers of the files that are not there.
    """

    node: str
    versions: str
    host: Host
    lacking: tuple[int, ...] = ()


def look(files: Sequence[File] = ()) -> Place:
    """What this machine is, and which files are not on it."""
    lacking = (number for number, file in enumerate(files) if not file.is_here)
    return Place(platform.node(), VERSIONS, detect_host(), tuple(lacking))


class Worker:
    """An actor of Ray; who asks sees to the order of calls."""

    def __init__(self, here: str) -> None:
        """Works in the folder that the driver works in, where there is one.

        Args:
            here: that folder, which names of modules and files may be below.
        """
        if Path(here).is_dir():
            os.chdir(here)
        self._files: Sequence[Path] = ()
        self._work: Callable[[Any], Any] | None = None

    def look(self, files: Sequence[File]) -> Place:
        """As `look`."""
        return look(files)

    def begin(
        self, start: bytes, files: Sequence[File], numbers: Sequence[int], *sent: Contents
    ) -> Error | None:
        """Prepares.

        Args:
            start: of `sending.pack`.
            files: that the work reads.
            numbers: of those that were sent.
            sent: their contents.

        Returns:
            What was raised on the way.
        """
        contents = dict(zip(numbers, sent, strict=True))
        self._files = placed(files, contents, held_folder()) if sent else [f.path for f in files]
        try:
            self._work = unpack(start, self._files)()
        except Error as e:
            return e
        return None

    def answer(self, argument: bytes) -> Any:
        """The result of an item, or the `Error` that was raised."""
        assert self._work is not None
        try:
            return self._work(unpack(argument, self._files))
        except Error as e:
            return e


def held_folder() -> Path:
    """A new folder, which is removed some time after this process has ended."""
    root = Path(tempfile.gettempdir())
    for each in root.glob(f"{_FOLDER}*"):
        _remove_unheld(each)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=root))
    _hold(folder)
    return folder


def _hold(folder: Path) -> None:
    """Locks it until this process ends. Others see the file when it is locked already."""
    handle = os.open(folder / f".{_LOCK}", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.rename(folder / f".{_LOCK}", folder / _LOCK)


def _remove_unheld(folder: Path) -> None:
    """If it is ours, and whoever made it has ended."""
    try:
        if folder.lstat().st_uid != os.getuid():
            return
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # somebody is just making or removing it
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return
    finally:
        os.close(handle)
