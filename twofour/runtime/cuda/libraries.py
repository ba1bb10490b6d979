"""Where cuBLASLt and cuSPARSELt are, and how their functions are called, by ctypes.

    library = cublaslt()
    library.call("cublasLtMatmulDescCreate", byref(descriptor), 68, 0, about="x [16, 64] ...")

They are looked for in NVIDIA's wheels, then where the system's loader looks. A library is loaded
when it is needed and not before, once in a process.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofour.core.errors import UnsupportedError

TYPES = {
    "float32": 0,
    "float16": 2,
    "int8": 3,
    "int32": 10,
    "bfloat16": 14,
    "float8e4m3fn": 28,
}
"""cudaDataType of library_types.h."""
ALIGNMENT = 16
"""Bytes: what the address of every operand is a multiple of."""
_VERSION_PARTS = (0, 1, 2)


@dataclass(frozen=True)
class Wanted:
    """What is looked for.

    Attributes:
        title: for people.
        names: of the file, the preferred one first.
        packages: wheels that have it.
        status_name: function that gives the name of a status.
        property: function that gives a part of the version.
        oldest: version that is known to work, as `Library.version`.
    """

    title: str
    names: tuple[str, ...]
    packages: tuple[str, ...]
    status_name: str
    property: str
    oldest: int


CUBLASLT = Wanted(
    "cuBLASLt",
    ("libcublasLt.so.13", "libcublasLt.so.12"),
    ("nvidia-cublas", "nvidia-cublas-cu12"),
    "cublasLtGetStatusName",
    "cublasLtGetProperty",
    120100,
)
CUSPARSELT = Wanted(
    "cuSPARSELt",
    ("libcusparseLt.so.0",),
    ("nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12"),
    "cusparseLtGetErrorName",
    "cusparseLtGetProperty",
    700,
)


class Library:
    """A library that is loaded.

    Attributes:
        wanted: which it is.
        path: of its file.
        version: 10000 * major + 100 * minor + patch: 130100 for 13.1.0, 800 for 0.8.0.
    """

    def __init__(self, wanted: Wanted, path: str, loaded: Any) -> None:
        """Reads the version.

        Args:
            wanted: which it is.
            path: of its file.
            loaded: what ctypes made of it.
        """
        self.wanted = wanted
        self.path = path
        self._loaded = loaded
        self._name = getattr(loaded, wanted.status_name)
        self._name.restype = ctypes.c_char_p
        parts = [self._part(part) for part in _VERSION_PARTS]
        self.version = 10000 * parts[0] + 100 * parts[1] + parts[2]

    @property
    def title(self) -> str:
        """For people: "cuBLASLt 13.1.0"."""
        major, rest = divmod(self.version, 10000)
        return f"{self.wanted.title} {major}.{rest // 100}.{rest % 100}"

    def status(self, name: str, *arguments: Any) -> int:
        """Calls a function and gives its status; 0 is success."""
        return int(getattr(self._loaded, name)(*arguments))

    def call(self, name: str, *arguments: Any, about: str = "") -> None:
        """Calls a function that has to succeed.

        Args:
            name: of the function.
            arguments: as ctypes takes them: numbers in types of ctypes, structures by reference.
            about: what it is called for, for the message.

        Raises:
            UnsupportedError: it gives another status than success.
        """
        status = self.status(name, *arguments)
        if status:
            raise UnsupportedError(
                f"{self.title} refuses {name}",
                [f"status {status}: {self.status_text(status)}", *([about] if about else [])],
                "twofour doctor says what there is of GPUs and their libraries",
            )

    def status_text(self, status: int) -> str:
        """The name of a status."""
        found = self._name(status)
        return found.decode(errors="replace") if isinstance(found, bytes) else "unknown"

    def _part(self, part: int) -> int:
        found = ctypes.c_int()
        if status := self.status(self.wanted.property, part, ctypes.byref(found)):
            text = self.status_text(status)
            raise UnsupportedError(
                f"{self.wanted.title} does not tell its version",
                [f"{self.path}: {self.wanted.property} gives status {status}, {text}"],
                _install(self.wanted),
            )
        return found.value


@functools.cache
def cublaslt() -> Library:
    """CuBLASLt.

    Raises:
        UnsupportedError: it is not installed, cannot be loaded or is too old; says how to get it.
    """
    return load(CUBLASLT)


@functools.cache
def cusparselt() -> Library:
    """CuSPARSELt.

    Raises:
        UnsupportedError: it is not installed, cannot be loaded or is too old; says how to get it.
    """
    return load(CUSPARSELT)


def versions() -> dict[str, str]:
    """Title and version of each library that can be loaded, for reports: "cuBLASLt" -> "13.1.0"."""
    found = {}
    for wanted, get in ((CUBLASLT, cublaslt), (CUSPARSELT, cusparselt)):
        try:
            found[wanted.title] = get().title.partition(" ")[2]
        except UnsupportedError:
            continue
    return found


def load(
    wanted: Wanted,
    roots: tuple[Path, ...] | None = None,
    opened: Callable[[str], Any] = ctypes.CDLL,
) -> Library:
    """Loads a library.

    Args:
        wanted: which.
        roots: folders of NVIDIA's wheels; None for those of this Python.
        opened: opens a file.

    Raises:
        UnsupportedError: none of its files can be loaded, or it is too old.
    """
    reasons = []
    for path in places(wanted, wheel_folders() if roots is None else roots):
        try:
            library = Library(wanted, path, opened(path))
        except (OSError, AttributeError) as error:
            reasons.append(f"{path}: {error}")
            continue
        if library.version < wanted.oldest:
            oldest = f"{wanted.oldest // 10000}.{wanted.oldest % 10000 // 100}"
            reasons.append(f"{path} is {library.title}; expected {oldest} or newer")
            continue
        return library
    raise UnsupportedError(f"{wanted.title} cannot be loaded", reasons, _install(wanted))


def places(wanted: Wanted, roots: tuple[Path, ...]) -> Iterator[str]:
    """Where the library may be: files in wheels first, then its names for the system's loader."""
    for name in wanted.names:
        for root in roots:
            yield from map(str, sorted(root.glob(f"*/lib/{name}")))
    yield from wanted.names


def wheel_folders() -> tuple[Path, ...]:
    """The folders `nvidia` that wheels of NVIDIA share."""
    try:
        found = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        return ()
    if found is None or found.submodule_search_locations is None:
        return ()
    return tuple(Path(place) for place in found.submodule_search_locations)


def _install(wanted: Wanted) -> str:
    return " or ".join(f"pip install {package}" for package in wanted.packages)
