"""Options that several commands take, and how their texts become values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from twofour.core.errors import InputError

_SHAPE = re.compile(r"(?P<name>.+):(?P<dims>\d+(x\d+)*)")

Shapes = Annotated[
    list[str] | None,
    typer.Option("--shapes", help="NAME:1x3x224x224, once for each input with open sizes."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="At most so many threads compute.")]


def parse_shapes(texts: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """NAME:1x3x224x224 -> {name: (1, 3, 224, 224)}.

    Raises:
        InputError: not of this form, a size of 0, or a name twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts or ():
        match = _SHAPE.fullmatch(text)
        dims = tuple(int(dim) for dim in match["dims"].split("x")) if match else ()
        if match is None or min(dims) < 1 or match["name"] in shapes:
            raise InputError(
                f"bad --shapes {text!r}",
                ["expected NAME:1x3x224x224, sizes of at least 1, each name once"],
                "write it like --shapes x:1x3x224x224",
            )
        shapes[match["name"]] = dims
    return shapes


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
