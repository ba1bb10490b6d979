"""Arrays in `.npy` and `.npz` files, read as streams of rows.

The header and the size are checked when a column is opened; the data is read when it is asked for,
a few rows at a time, so a file may be larger than memory. Pickled objects are refused.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import InputError

Array = NDArray[Any]

_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Column:
    """One array of a file.

    Attributes:
        where: the file and the array, for messages.
        open: gives a stream of the .npy bytes.
        shape: of the whole array.
        dtype: of the array.
        fortran: stored with the first axis fastest; such an array is read whole.
    """

    where: str
    open: Callable[[], IO[bytes]]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    @property
    def row_bytes(self) -> int:
        """Size of one entry along axis 0."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def rows(self, size: int, stack: ExitStack) -> Iterator[Array]:
        """Yields [at most size, ...], as long as there are rows.

        Args:
            size: rows at a time.
            stack: closes the file.

        Raises:
            InputError: the file is damaged or shorter than its header says.
        """
        try:
            stream = stack.enter_context(self.open())
            _read_header(stream)
            if self.fortran:
                whole = self._take(stream, self.shape[0])
                whole = whole.reshape(self.shape[::-1]).transpose()
                yield from (whole[i : i + size] for i in range(0, self.shape[0], size))
                return
            for start in range(0, self.shape[0], size):
                yield self._take(stream, min(size, self.shape[0] - start))
        except _UNREADABLE as error:
            raise _unreadable(self.where, error) from error

    def number(self) -> Array:
        """The value of an array without axes.

        Raises:
            InputError: the file is damaged.
        """
        try:
            with self.open() as stream:
                _read_header(stream)
                return self._take(stream, 1).reshape(())
        except _UNREADABLE as error:
            raise _unreadable(self.where, error) from error

    def _take(self, stream: IO[bytes], rows: int) -> Array:
        wanted = rows * self.row_bytes
        got = stream.read(wanted)
        if len(got) != wanted:
            raise ValueError(f"it ends early: expected {wanted} bytes, got {len(got)}")
        return np.frombuffer(got, self.dtype).reshape(rows, *self.shape[1:])


def directory_columns(path: Path) -> dict[str, Column]:
    """The `.npy` files of a directory, by name.

    Raises:
        InputError: there are none, or one is not readable as an array.
    """
    files = sorted(path.glob("*.npy"))
    if not files:
        raise InputError(
            f"directory {path} holds no data",
            ["expected .npy files named like the model's inputs, got none"],
            "save one array per input: numpy.save('x.npy', x)",
        )
    return {
        file.stem: _column(str(file), partial(_open_file, file), file.stat().st_size)
        for file in files
    }


def npz_columns(path: Path) -> dict[str, Column]:
    """The arrays of an `.npz` file, by name.

    Raises:
        InputError: the file is not a zip archive, or a member is not readable as an array.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
    except _UNREADABLE as error:
        raise InputError(
            f"{path} is not an .npz file",
            [f"expected a zip archive of .npy arrays: {error}"],
            "write it with numpy.savez('data.npz', x=...)",
        ) from error
    columns = {}
    for info in members:
        name = info.filename.removesuffix(".npy")
        opened = partial(_open_member, path, info.filename)
        columns[name] = _column(f"{path}[{name}]", opened, info.file_size)
    return columns


def _open_file(path: Path) -> IO[bytes]:
    return path.open("rb")


def _open_member(path: Path, name: str) -> IO[bytes]:
    with zipfile.ZipFile(path) as archive:
        return archive.open(name)  # the member keeps the file open until it is closed itself


def _column(where: str, open_stream: Callable[[], IO[bytes]], size_bytes: int) -> Column:
    try:
        with open_stream() as stream:
            shape, fortran, dtype = _read_header(stream)
            wanted = stream.tell() + math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or wanted > size_bytes:
            raise ValueError(f"it ends early: expected {wanted} bytes, got {size_bytes}")
    except _UNREADABLE as error:
        raise _unreadable(where, error) from error
    return Column(where, open_stream, shape, dtype, fortran)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Reads up to the first byte of the data. Raises ValueError where it is no plain array."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"version {version} of the .npy format is for structured arrays")
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never loaded")
    return shape, fortran, dtype


def _unreadable(where: str, error: Exception) -> InputError:
    return InputError(
        f"cannot read {where}", [str(error)], "write it again with numpy.save or numpy.savez"
    )
