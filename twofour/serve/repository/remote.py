"""A repository behind an fsspec URL: one listing for all of it, and files read as streams.

Which packages read which URLs is fsspec's: s3:// needs s3fs, gs:// gcsfs. Credentials come from
where those look for them (the environment, files, the machine's role), or from options.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec

from twofour.core.errors import InputError
from twofour.serve.repository.errors import PassingError
from twofour.serve.repository.layout import CLAIM, MANIFEST, File, Folder, is_hidden

_TAGS = ("ETag", "etag", "md5Hash", "generation", "ukey")
_TIMES = ("LastModified", "last_modified", "mtime", "modified", "created", "updated")
_PART_BYTES = 8 << 20
_CREDENTIALS = re.compile(r"//[^/@]*@")


class Remote:
    """A repository in an object store or on another machine; blocking, safe in several threads.

    Args:
        url: of the repository, as fsspec takes it.
        options: of fsspec's file system: credentials, end points.

    Raises:
        PassingError: no such kind of URL, or the package that reads it is not there.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        """Reads nothing yet."""
        self.shown = _CREDENTIALS.sub("//", url)
        with self._reading(self.shown):
            fresh = {"skip_instance_cache": True, "use_listings_cache": False}
            self._system, root = fsspec.core.url_to_fs(url, **fresh, **options)
            self._root = str(root).rstrip("/")

    def list_all(self) -> Folder:
        """What is in the repository, down to the files of its versions.

        A version that is still being published is not there.

        Raises:
            PassingError: it cannot be read.
        """
        with self._reading(self.shown):
            found: Mapping[str, Mapping[str, Any]] = self._system.find(self._root, detail=True)
        top = Folder()
        claimed = []
        for path, info in found.items():
            names = path.removeprefix(self._root).removeprefix("/").split("/")
            if info.get("type") == "file" and 2 <= len(names) <= 3:
                _put(top, names, info)
            if len(names) == 3 and names[-1] == CLAIM:
                claimed.append(names[:2])
        for model, version in claimed:
            _leave_out_unfinished(top, model, version)
        return top

    def has(self, place: str) -> bool:
        """Whether there is a file, asked for by its name, so that no listing can be too old.

        Raises:
            PassingError: the store does not say.
        """
        with self._reading(f"{self.shown}/{place}"):
            return bool(self._system.exists(f"{self._root}/{place}"))

    def parts(self, place: str, size_bytes: int) -> Iterator[bytes]:
        """A file's content, some megabytes at a time.

        Args:
            place: of the file below the repository, MODEL/VERSION/FILE.
            size_bytes: as it was listed; one of another size is an error before it fills the disk.

        Raises:
            PassingError: it cannot be read.
            InputError: it has another size.
        """
        where, left = f"{self.shown}/{place}", size_bytes
        with self._reading(where):
            file = self._system.open(f"{self._root}/{place}", "rb", block_size=_PART_BYTES)
        with file:
            while True:
                with self._reading(where):
                    part: bytes = file.read(_PART_BYTES)
                left -= len(part)
                if left < 0 or (not part and left):
                    got = f"expected {size_bytes} bytes, got {'more' if left < 0 else 'fewer'}"
                    raise InputError(f"{where} changed while it was read", [got], "try again")
                if not part:
                    return
                yield part

    @contextmanager
    def _reading(self, where: str) -> Iterator[None]:
        """What a file system raises is whatever the package behind it raises: the cause is kept."""
        try:
            yield
        except Exception as e:
            reason = f"{type(e).__name__}: {_CREDENTIALS.sub('//', str(e))}"
            fix = "check the URL, the network and the credentials"
            raise PassingError(f"{where} cannot be read", [reason], fix) from e


def _put(top: Folder, names: list[str], info: Mapping[str, Any]) -> None:
    """A file at its place; what is hidden, at any level, is left out."""
    if any(map(is_hidden, names)) or not all(names[:-1]):
        return
    folder = top
    for name in names[:-1]:
        inner = folder.folders.setdefault(name, Folder())
        if isinstance(inner, str):
            return
        folder = inner
    if names[-1]:  # else the empty object by which some tools mark a folder
        folder.files[names[-1]] = File(names[-1], int(info.get("size") or 0), _tag(info))


def _leave_out_unfinished(top: Folder, model: str, version: str) -> None:
    """Takes out a version whose publisher has not written its manifest yet."""
    folder = top.folders.get(model)
    inner = folder.folders.get(version) if isinstance(folder, Folder) else None
    if isinstance(folder, Folder) and isinstance(inner, Folder) and MANIFEST not in inner.files:
        del folder.folders[version]


def _tag(info: Mapping[str, Any]) -> str:
    """What the store says of a file's content; times only where it says nothing better."""
    found = [f"{key}={info[key]}" for key in _TAGS if info.get(key)]
    return " ".join(found or [f"{key}={info[key]}" for key in _TIMES if info.get(key)])
