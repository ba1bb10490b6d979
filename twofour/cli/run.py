"""twofour run: one inference on arrays from files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twofour.cli.options import Inputs, read_arrays
from twofour.cli.output import Json, Output, Quiet

if TYPE_CHECKING:
    from numpy.typing import NDArray


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


def _write(results: dict[str, NDArray[Any]], folder: Path) -> dict[str, Path]:
    """One file an output, under a temporary name first; characters no file name has become _."""
    import numpy as np

    from twofour.core.errors import InputError

    paths = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in results.items():
            safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
            path = folder / f"{safe.lstrip('.') or '_'}.npy"
            temporary = path.with_suffix(".npy.part")
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
