"""A repository in a local folder: it is listed without following links that lead out of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from twofour.core.errors import InputError
from twofour.serve.repository.layout import CLAIM, MANIFEST, File, Folder, is_hidden

_DEPTH = 3  # files of a version: MODEL/VERSION/FILE
_PART_BYTES = 8 << 20


def list_folder(root: Path) -> Folder:
    """What is in a repository, down to the files of its versions.

    A link is followed if it ends within the repository. What is no regular file, cannot be read or
    goes around in circles is listed with the reason.

    Args:
        root: the repository; it may be a link itself.

    Raises:
        InputError: it is no folder, or cannot be read.
    """
    try:
        return _contents(os.path.realpath(root, strict=True), os.fspath(root), 1)
    except OSError as e:
        fix = "name an existing folder that this user may read"
        raise InputError(f"the repository {root} cannot be read", [_text(e)], fix) from e


def parts(root: Path, place: str, size_bytes: int) -> Iterator[bytes]:
    """A file's content, some megabytes at a time.

    Args:
        root: the repository.
        place: of the file below it.
        size_bytes: as it was listed.

    Raises:
        InputError: it cannot be read, or has another size.
    """
    left = size_bytes
    try:
        with (root / place).open("rb") as file:
            while part := file.read(_PART_BYTES):
                left -= len(part)
                if left < 0:
                    break
                yield part
    except OSError as e:
        fix = "make it readable for this user"
        raise InputError(f"{root / place} cannot be read", [_text(e)], fix) from e
    if left:
        got = f"expected {size_bytes} bytes, got {'more' if left < 0 else 'fewer'}"
        raise InputError(f"{root / place} changed while it was read", [got], "try again")


def _contents(top: str, folder: str, depth: int) -> Folder:
    """A folder's files and folders; those of the deepest level have none below.

    Args:
        top: of the repository, without links.
        folder: to list.
        depth: 1 for the repository itself.
    """
    found = Folder()
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            try:
                info = _stat(top, entry)
            except (OSError, ValueError) as e:
                _refuse(found, entry, depth, _text(e))
                continue
            if stat.S_ISDIR(info.st_mode):
                if depth < _DEPTH:
                    inner = _inner(top, entry.path, depth + 1)
                    if depth < _DEPTH - 1 or not _is_unfinished(entry.path, inner):
                        found.folders[entry.name] = inner
            elif depth > 1:
                found.files[entry.name] = _file(entry, info)
    return found


def _stat(top: str, entry: os.DirEntry[str]) -> os.stat_result:
    """Of what an entry leads to.

    Raises:
        OSError: it leads nowhere, in circles, or cannot be looked at.
        ValueError: it leads outside.
    """
    if entry.is_symlink():
        target = os.path.realpath(entry.path, strict=True)
        if os.path.commonpath([top, target]) != top:
            raise ValueError("a link that leads out of the repository")
    return entry.stat()


def _inner(top: str, path: str, depth: int) -> Folder | str:
    """A folder's contents, or why it cannot be read."""
    try:
        return _contents(top, path, depth)
    except OSError as e:
        return _text(e)


def _is_unfinished(path: str, inner: Folder | str) -> bool:
    """Whether a version is a copy, not whole yet, of one that was published in an object store."""
    if isinstance(inner, str) or MANIFEST in inner.files:
        return False
    return os.path.lexists(os.path.join(path, CLAIM))


def _file(entry: os.DirEntry[str], info: os.stat_result) -> File | str:
    if not stat.S_ISREG(info.st_mode):
        return "no regular file"
    if not os.access(entry.path, os.R_OK):
        return "this user may not read it"
    return File(entry.name, info.st_size, f"{info.st_mtime_ns}-{info.st_ino}")


def _refuse(found: Folder, entry: os.DirEntry[str], depth: int, reason: str) -> None:
    """Keeps the reason where the thing would have been: nobody knows what a broken link is."""
    if depth == 1 or (depth == 2 and entry.name.isdigit()):
        found.folders[entry.name] = reason
    else:
        found.files[entry.name] = reason


def _text(error: OSError | ValueError) -> str:
    """Without the path, which the message around it has."""
    return (isinstance(error, OSError) and error.strerror) or str(error)
