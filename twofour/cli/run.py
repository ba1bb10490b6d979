"""twofour run: one inference on arrays from files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twofour.cli.options import Inputs, read_arrays
from twofour.cli.output import Json, Output, Quiet

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LONGEST_NAME = 200  # characters; file systems take 255 bytes


def run(
    engine: Annotated[Path, typer.Argument(help="An .engine file.")],
    inputs: Inputs = None,
    output_dir: Annotated[
        Path, typer.Option(help="Folder for one NAME.npy an output; made if need be.")
    ] = Path("."),
    threads: Annotated[int | None, typer.Option(min=1, help="As built, if not given.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run an engine once and write its outputs.

    Example: twofour run resnet20.engine --input x=x.npy --output-dir out
    """
    from twofour.runtime.session import Session, load

    out = Output(as_json, quiet)
    feeds = read_arrays(inputs)
    session: Session
    with load(engine, threads) as session:
        results = session.run(feeds)
    paths = _write(results, output_dir)
    for name, array in results.items():
        out.show(f"{name}: {array.dtype} {list(array.shape)} -> {paths[name]}")
    written = {
        name: {"dtype": str(array.dtype), "shape": array.shape, "file": str(paths[name])}
        for name, array in results.items()
    }
    out.data("run/1", {"outputs": written})


def _file_name(name: str, taken: set[str]) -> str:
    """A name that stays inside its folder, is not too long, and is not taken.

    Args:
        name: of an output, whatever it holds.
        taken: names in use, in lower case: some file systems do not tell upper case from it.
    """
    safe = "".join(c if (c.isascii() and c.isalnum()) or c in "._-" else "_" for c in name)
    safe = safe.lstrip(".")[:_LONGEST_NAME] or "_"
    tries = (f"{safe}_{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([safe], tries) if each.lower() not in taken)


def _write(results: dict[str, NDArray[Any]], folder: Path) -> dict[str, Path]:
    """One file an output, under a temporary name first; what no file name has becomes _."""
    import numpy as np

    from twofour.core.errors import InputError

    paths: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in results.items():
            path = folder / f"{_file_name(name, {p.stem.lower() for p in paths.values()})}.npy"
            temporary = path.with_name(f"{path.name}.part")
            try:
                with temporary.open("wb") as file:
                    np.save(file, array, allow_pickle=False)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            paths[name] = path
    except OSError as e:
        raise InputError(f"cannot write to {folder}", [str(e)], "name a writable folder") from e
    return paths
