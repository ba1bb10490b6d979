"""Options that several commands take, and how their texts become values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twofour.core.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DIMS = r"\d+(?:x\d+)*"
_SHAPE = re.compile(rf"(?P<name>.+?):(?P<dims>{_DIMS}(?::{_DIMS}:{_DIMS})?)")

Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shapes",
        metavar="NAME:SHAPE",
        help="NAME:1x3x224x224, once for each input with open sizes.",
    ),
]
Ranges = Annotated[
    list[str] | None,
    typer.Option(
        "--shapes",
        metavar="NAME:SHAPE",
        help="NAME:1x3x224x224, or NAME:MIN:OPT:MAX such as ids:1x16:8x128:32x512, once for each "
        "input with open sizes. Naming an input again begins the next profile.",
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input", metavar="NAME=FILE.npy", help="An array for an input; once for each input."
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="At most so many threads compute.")]


def parse_shapes(texts: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """NAME:1x3x224x224 -> {name: (1, 3, 224, 224)}.

    Raises:
        InputError: not of this form, a size of 0, or a name twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts or ():
        name, corners = _parsed(text)
        if len(corners) > 1 or name in shapes:
            raise _bad_shape(text, "NAME:1x3x224x224, each name once")
        shapes[name] = corners[0]
    return shapes


def parse_profiles(texts: Sequence[str] | None) -> list[dict[str, Any]]:
    """What `BuildOptions.profiles` takes, of NAME:1x3x224x224 or NAME:1x16:8x128:32x512.

    A name that the profile has already begins the next one.

    Raises:
        InputError: not of this form, or a size of 0.
    """
    profiles: list[dict[str, Any]] = []
    for text in texts or ():
        name, corners = _parsed(text)
        if not profiles or name in profiles[-1]:
            profiles.append({})
        profiles[-1][name] = corners if len(corners) > 1 else corners[0]
    return profiles


def parse_size(text: str | None) -> int | None:
    """65536, 64k or 1M (of 1024) -> bytes; None for None.

    Raises:
        InputError: not of this form.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)([kMG]?)", text)
    if match is None:
        raise InputError(f"bad size {text!r}", ["expected a whole number, and k, M or G"], "try 1M")
    return int(match[1]) << {"": 0, "k": 10, "M": 20, "G": 30}[match[2]]


def parse_percent(text: str) -> float:
    """3% or 3 -> 0.03.

    Raises:
        InputError: not of this form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%?", text)
    if match is None:
        raise InputError(f"bad share {text!r}", ["expected a number of percent"], "try 3%")
    return float(match[1]) / 100


def read_arrays(items: Sequence[str] | None) -> dict[str, NDArray[Any]]:
    """NAME=FILE.npy, for each input -> arrays by name.

    Raises:
        InputError: not of this form, or a file that holds no single array.
    """
    return dict(_read_array(item) for item in items or ())


def _read_array(item: str) -> tuple[str, NDArray[Any]]:
    import numpy as np

    name, equals, file = item.partition("=")
    if not (name and equals and file):
        expected = f"expected NAME=FILE.npy, got {item!r}"
        raise InputError("bad --input", [expected], "write it like --input x=x.npy")
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        reason = "it is no .npy file of numbers" if isinstance(e, ValueError) else str(e)
        raise InputError(
            f"cannot read input {name!r} from {file}", [reason], "write it with numpy.save"
        ) from e
    if not isinstance(array, np.ndarray):
        raise InputError(
            f"cannot read input {name!r} from {file}",
            ["expected one array, got an .npz archive"],
            "write it with numpy.save",
        )
    return name, array


def _parsed(text: str) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """The name, and one shape or three."""
    match = _SHAPE.fullmatch(text)
    parts = match["dims"].split(":") if match else ()
    corners = tuple(tuple(int(dim) for dim in part.split("x")) for part in parts)
    if match is None or min(map(min, corners)) < 1:
        raise _bad_shape(text, "NAME:1x3x224x224, or three shapes NAME:MIN:OPT:MAX")
    return match["name"], corners


def _bad_shape(text: str, expected: str) -> InputError:
    return InputError(
        f"bad --shapes {text!r}",
        [f"expected {expected}, sizes of at least 1"],
        "write it like --shapes x:1x3x224x224",
    )


def require_packages(what: str, names: Sequence[str], extra: str) -> None:
    """Refuses a command whose packages are missing, before anything is done.

    Args:
        what: needs them, in words.
        names: of modules.
        extra: of this package's optional dependencies that has them.

    Raises:
        InputError: names those that are missing.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{what} needs packages that are not installed",
            [f"missing: {', '.join(missing)}"],
            f"pip install 'twofour[{extra}]'",
        )


def require_writable(output: Path) -> None:
    """A command may take long; a wrong path is better found before it."""
    if output.is_dir() or not output.parent.is_dir():
        found = "it is a folder" if output.is_dir() else f"there is no folder {output.parent}"
        raise InputError(f"cannot write {output}", [found], "name a file in an existing folder")


def is_engine(path: Path) -> bool:
    """Whether a file is an engine by its first bytes, or by its name where it cannot be read.

    A safetensors container has its JSON header at byte 8; no ONNX file has a brace there.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError:
        return path.suffix == ".engine"
    return head[8:] == b"{" or path.suffix == ".engine"
