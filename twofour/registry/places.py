"""Where a registry writes: a folder, or what fsspec writes to; the same words for both.

What `twofour serve` must not see has a name that begins with a dot. A folder is renamed when it is
whole. Where nothing can be renamed, a claim comes first, then the files, then the manifest: servers
leave out what is claimed and has no manifest (see `layout.CLAIM`).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from twofour.core.errors import Error, InputError
from twofour.core.progress import Report
from twofour.core.writing import write_whole
from twofour.serve.repository.errors import PassingError
from twofour.serve.repository.layout import CLAIM, Folder
from twofour.serve.repository.local import list_folder, parts
from twofour.serve.repository.manifest import FileRecord
from twofour.serve.repository.remote import Remote

MOST_TRIES = 100
_PART_BYTES = 8 << 20
_CREDENTIALS = re.compile(r"//[^/@]*@")
# Stores without folders: there, to make one might make a bucket.
_FLAT = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "memory"})
_UNKNOWN_MODE = (NotImplementedError, TypeError, ValueError)


@dataclass(frozen=True)
class Draft:
    """A version that has no number yet.

    Attributes:
        model: its name.
        sources: name -> the file to copy.
        records: what each was when it was hashed.
        last: what is written after them for a number, in order: the manifest in the end.
        report: told of each part that is copied.
    """

    model: str
    sources: Mapping[str, Path]
    records: tuple[FileRecord, ...]
    last: Callable[[int], Mapping[str, bytes]]
    report: Report


class FolderPlace:
    """A repository in a local folder.

    Args:
        root: of it.
    """

    def __init__(self, root: Path) -> None:
        """Reads nothing yet."""
        self._root = root

    @property
    def shown(self) -> str:
        """As messages name it."""
        return str(self._root)

    def listing(self) -> Folder:
        """What is in it; nothing if it is not there yet.

        Raises:
            InputError: it cannot be read.
        """
        return list_folder(self._root) if os.path.lexists(self._root) else Folder()

    def parts(self, place: str, size_bytes: int) -> Iterator[bytes]:
        """A file's content, some megabytes at a time; raises InputError."""
        return parts(self._root, place, size_bytes)

    def small(self, place: str, most_bytes: int) -> bytes | None:
        """A small file's content, of a larger one a byte more; None where there is none.

        Raises:
            InputError: it cannot be read.
        """
        with _at(f"{self.shown}/{place}"):
            try:
                with (self._root / place).open("rb") as file:
                    return file.read(most_bytes + 1)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def hidden(self, place: str) -> list[str]:
        """Names of the files in a hidden folder, ascending; raises InputError."""
        with _at(f"{self.shown}/{place}"):
            try:
                return sorted(os.listdir(self._root / place))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def replace(self, place: str, content: bytes) -> None:
        """Writes a file, whole or not at all; raises InputError."""
        with _at(f"{self.shown}/{place}"):
            (self._root / place).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._root / place, content)

    def publish(self, draft: Draft, first: int) -> int:
        """Puts a version there as a whole, under the first number from `first` on that is free.

        Raises:
            InputError: it cannot be written, or a source has changed; then nothing stays.
        """
        model = self._root / draft.model
        temporary = model / f".publishing-{uuid.uuid4().hex}"
        with _at(f"{self.shown}/{draft.model}"):
            self._root.mkdir(exist_ok=True)
            model.mkdir(exist_ok=True)
            try:
                temporary.mkdir(parents=True)  # another may just have taken the empty model away
                _copy_all(draft, lambda name: _whole(temporary / name))
                for number in range(first, first + MOST_TRIES):
                    if self._take(draft, model, temporary, number):
                        return number
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
                with suppress(OSError):
                    model.rmdir()  # if nothing was published in it
        raise _no_number(draft.model, first)

    def _take(self, draft: Draft, model: Path, temporary: Path, number: int) -> bool:
        """Renames the folder to a number; False where another has it, or is about to.

        Who made the claim looks for the number after that: either it is there, or nobody else can
        be between the claim and the rename.
        """
        claim, version = model / f".claim-{number}", model / str(number)
        try:
            claim.mkdir()
        except FileExistsError:
            return False
        try:
            if os.path.lexists(version):
                return False
            for name, content in draft.last(number).items():
                (temporary / name).unlink(missing_ok=True)
                with _whole(temporary / name) as write:
                    write(content)
            temporary.rename(version)
        finally:
            claim.rmdir()
        _flush(model)
        return True


class StorePlace:
    """A repository behind a URL that fsspec writes to.

    Args:
        url: of it.
        options: of fsspec's file system.

    Raises:
        InputError: no such kind of URL, or the package for it is not there.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        """Reads nothing yet."""
        self._remote = Remote(url, options)
        fresh = {"skip_instance_cache": True, "use_listings_cache": False}
        self._system, root = fsspec.core.url_to_fs(url, **fresh, **options)
        self._root = str(root).rstrip("/")
        names = self._system.protocol
        self._flat = not _FLAT.isdisjoint([names] if isinstance(names, str) else names)

    @property
    def shown(self) -> str:
        """As messages name it: without passwords."""
        return self._remote.shown

    def listing(self) -> Folder:
        """What is in it; raises InputError."""
        return self._remote.list_all()

    def parts(self, place: str, size_bytes: int) -> Iterator[bytes]:
        """A file's content, some megabytes at a time; raises InputError."""
        return self._remote.parts(place, size_bytes)

    def small(self, place: str, most_bytes: int) -> bytes | None:
        """A small file's content, of a larger one a byte more; None where there is none.

        Raises:
            InputError: it cannot be read.
        """
        with _at(f"{self.shown}/{place}"):
            try:
                with self._system.open(f"{self._root}/{place}", "rb") as file:
                    content: bytes = file.read(most_bytes + 1)
                    return content
            except FileNotFoundError:
                return None

    def hidden(self, place: str) -> list[str]:
        """Names of the files in a hidden folder, ascending; raises InputError."""
        with _at(f"{self.shown}/{place}"):
            found = self._system.find(f"{self._root}/{place}")
        return sorted(path.rpartition("/")[2] for path in found)

    def replace(self, place: str, content: bytes) -> None:
        """Writes a file, whole or not at all; raises InputError."""
        with _at(f"{self.shown}/{place}"):
            self._put(place, content)

    def publish(self, draft: Draft, first: int) -> int:
        """Puts a version there, under the first number from `first` on that is free.

        Raises:
            InputError: it cannot be written, or a source has changed; then no file of it stays.
        """
        for number in range(first, first + MOST_TRIES):
            place = f"{draft.model}/{number}"
            with _at(f"{self.shown}/{place}"):
                if self._claim(place):
                    self._fill(draft, place, number)
                    return number
        raise _no_number(draft.model, first)

    def _claim(self, place: str) -> bool:
        """Whether a number is now ours alone.

        Twofold: the store refuses to make the same object twice, if it can; and each publisher
        writes an object of its own, and gives the number up when it then sees another's. Of two
        that do so, at least one sees the other.
        """
        if not self._create(f"{place}/{CLAIM}", b"see docs/registry.md\n"):
            return False
        mine = f"{CLAIM}-{uuid.uuid4().hex}"
        self._put(f"{place}/{mine}", b"")
        found = {path.rpartition("/")[2] for path in self._system.find(f"{self._root}/{place}")}
        if found - {mine, CLAIM}:
            self._remove(f"{place}/{mine}")
            return False
        return True

    def _fill(self, draft: Draft, place: str, number: int) -> None:
        """Uploads the files, the manifest in the end."""
        written: list[str] = []

        @contextmanager
        def opened(name: str) -> Iterator[Callable[[bytes], Any]]:
            written.append(name)
            with self._system.open(self._path(f"{place}/{name}"), "wb") as file:
                yield file.write

        try:
            _copy_all(draft, opened)
            for name, content in draft.last(number).items():
                written.append(name)
                self._put(f"{place}/{name}", content)
        except BaseException:
            for name in reversed(written):  # the claim stays: this number is used up
                self._remove(f"{place}/{name}")
            raise

    def _put(self, place: str, content: bytes) -> None:
        self._system.pipe_file(self._path(place), content)

    def _path(self, place: str) -> str:
        """In the file system; its folder is made where folders are needed."""
        path = f"{self._root}/{place}"
        if not self._flat:
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
        return path

    def _create(self, place: str, content: bytes) -> bool:
        """Writes a file that must not be there; False if it is, as far as the store knows."""
        path = self._path(place)
        try:
            self._system.pipe_file(path, content, mode="create")
        except FileExistsError:
            return False
        except _UNKNOWN_MODE:
            if self._system.exists(path):
                return False
            self._system.pipe_file(path, content)
        return True

    def _remove(self, place: str) -> None:
        with suppress(Exception):  # what stays is claimed, and so not served
            self._system.rm_file(f"{self._root}/{place}")


Place = FolderPlace | StorePlace


def open_place(repository: str, options: Mapping[str, Any] | None = None) -> Place:
    """A repository as `twofour serve` takes it, to write to.

    Raises:
        InputError: a URL that cannot be used.
    """
    for prefix in ("file://", "local://"):
        repository = repository.removeprefix(prefix)
    if "://" in repository:
        return StorePlace(repository, options or {})
    return FolderPlace(Path(repository))


def hash_file(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file.

    Raises:
        InputError: it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with _at(str(path)), path.open("rb") as file:
        while part := file.read(_PART_BYTES):
            digest.update(part)
            size += len(part)
    return size, digest.hexdigest()


def _copy_all(draft: Draft, opened: Callable[[str], Any]) -> None:
    """Copies every file, and sees that it still is what it was when it was hashed.

    Raises:
        InputError: a source has changed meanwhile.
    """
    total = sum(record.size_bytes for record in draft.records)
    done = 0
    for record in draft.records:
        digest = hashlib.sha256()
        source = draft.sources[record.name]
        with source.open("rb") as file, opened(record.name) as write:
            while part := file.read(_PART_BYTES):
                digest.update(part)
                write(part)
                done += len(part)
                draft.report(done, total, record.name)
        if digest.hexdigest() != record.sha256:
            reason = "its content is not what it was when it was hashed"
            raise InputError(f"{source} changed while it was published", [reason], "publish again")


@contextmanager
def _whole(path: Path) -> Iterator[Callable[[bytes], Any]]:
    """A new file that is on the disk when the context ends, and that nobody writes to any more."""
    with path.open("xb") as file:
        yield file.write
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode & ~0o222)


def _flush(folder: Path) -> None:
    """So that a rename outlives a loss of power."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _at(where: str) -> Iterator[None]:
    """What a file system raises is whatever the package behind it raises: the cause is kept.

    Raises:
        PassingError: always of these; ours go through.
    """
    try:
        yield
    except Error:
        raise
    except Exception as e:
        reason = f"{type(e).__name__}: {_CREDENTIALS.sub('//', str(e))}"
        fix = "check the place, the room on it, the network and the credentials"
        raise PassingError(f"{where} cannot be read or written", [reason], fix) from e


def _no_number(model: str, first: int) -> InputError:
    reason = f"{MOST_TRIES} numbers from {first} on are taken or claimed by others"
    fix = "remove what publishers that were killed have left: MODEL/.claim-N in a folder"
    return InputError(f"no free version number for model {model!r}", [reason], fix)
