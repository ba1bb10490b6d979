"""Work as bytes, and the files that it reads.

Every `Path` in a scan's `start` and arguments that exists is a file, or a folder, that the work
reads. In the bytes there is its number only. A worker takes the file that lies under the same name
where it is the same by its hash, as on a shared disk; else the contents are sent to it. With a file
go those beside it that hold its data: model.onnx.data and model.onnx_data with model.onnx.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import cloudpickle

from twofour.core.errors import InputError

_FIX = "name functions of a module and data on disk; or leave --ray out"
Contents = tuple[NDArray[np.uint8], ...]
"""Of the parts of a file, in their order."""


@dataclass(frozen=True)
class Part:
    """One file.

    Attributes:
        name: below the folder that its `File` lies in.
        size_bytes: of it.
        digest: SHA-256 of it.
    """

    name: str
    size_bytes: int
    digest: str

    @staticmethod
    def of(path: Path, folder: Path) -> Part:
        """Reads it."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Part(str(path.relative_to(folder)), path.stat().st_size, digest)

    def lies_in(self, folder: Path) -> bool:
        """Whether the same file is there."""
        path = folder / self.name
        same = path.is_file() and path.stat().st_size == self.size_bytes
        return same and Part.of(path, folder) == self


@dataclass(frozen=True)
class File:
    """What a path names, with all that belongs to it.

    Attributes:
        path: absolute.
        parts: the file itself and those with its data, or all files of the folder.
    """

    path: Path
    parts: tuple[Part, ...]

    @staticmethod
    def of(path: Path) -> File:
        """Reads it.

        Raises:
            InputError: it cannot be read.
        """
        path = path.absolute()
        try:
            return File(path, tuple(Part.of(each, path.parent) for each in _files_of(path)))
        except OSError as e:
            raise InputError(f"cannot send {path} to other machines", [str(e)]) from e

    @property
    def size_bytes(self) -> int:
        """Of all parts."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def is_here(self) -> bool:
        """Whether this machine has it, under the same name."""
        return self.path.exists() and all(part.lies_in(self.path.parent) for part in self.parts)

    def contents(self) -> Contents:
        """Of the parts, read from this machine's disk."""
        return tuple(np.fromfile(self.path.parent / part.name, np.uint8) for part in self.parts)

    def write(self, contents: Contents, folder: Path) -> Path:
        """Puts the parts into a folder of their own, and says where the file is then."""
        if not self.parts:  # an empty folder
            (folder / self.path.name).mkdir(parents=True)
        for part, content in zip(self.parts, contents, strict=True):
            place = folder / part.name
            place.parent.mkdir(parents=True, exist_ok=True)
            content.tofile(place)
        return folder / self.path.name


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(each for each in path.rglob("*") if each.is_file())
    beside = (path.with_name(path.name + end) for end in (".data", "_data"))
    return [each for each in (path, *beside) if each.is_file()]


@dataclass(frozen=True)
class Packed:
    """Work as it is sent.

    Attributes:
        start: the function that each worker calls.
        arguments: of the items.
        files: that these read, by number.
    """

    start: bytes
    arguments: tuple[bytes, ...]
    files: tuple[File, ...]


def pack(start: object, arguments: Iterable[object]) -> Packed:
    """Makes bytes of work.

    Raises:
        InputError: it cannot be sent, or a file cannot be read.
    """
    numbers: dict[Path, int] = {}
    first = _dumps(start, numbers)
    others = tuple(_dumps(each, numbers) for each in arguments)
    return Packed(first, others, tuple(File.of(path) for path in numbers))


def unpack(content: bytes, places: Sequence[Path]) -> Any:
    """What bytes were made of.

    Args:
        content: of `pack`.
        places: where the files are here.
    """
    return _Unpickler(io.BytesIO(content), places).load()


def placed(files: Sequence[File], sent: Mapping[int, Contents], folder: Path) -> list[Path]:
    """Where files are here: under their own names, or below a folder that is filled with them.

    Args:
        files: of the work.
        sent: contents of those that were not here.
        folder: for them.
    """
    return [
        file.write(sent[number], folder / str(number)) if number in sent else file.path
        for number, file in enumerate(files)
    ]


def _dumps(work: object, numbers: dict[Path, int]) -> bytes:
    file = io.BytesIO()
    try:
        _Pickler(file, numbers).dump(work)  # type: ignore[no-untyped-call]
    except (pickle.PicklingError, AttributeError, TypeError) as e:
        raise InputError("the work cannot be sent to other machines", [str(e)], _FIX) from e
    return file.getvalue()


class _Pickler(cloudpickle.CloudPickler):
    """Numbers the paths that exist."""

    def __init__(self, file: io.BytesIO, numbers: dict[Path, int]) -> None:
        super().__init__(file)  # type: ignore[no-untyped-call]
        self._numbers = numbers

    def persistent_id(self, found: object) -> int | None:
        if not isinstance(found, Path) or not found.exists():
            return None
        return self._numbers.setdefault(found.absolute(), len(self._numbers))


class _Unpickler(pickle.Unpickler):
    """Puts in their place where the files are."""

    def __init__(self, file: io.BytesIO, places: Sequence[Path]) -> None:
        super().__init__(file)
        self._places = places

    def persistent_load(self, number: int) -> Path:
        return self._places[number]
