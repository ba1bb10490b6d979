"""What a file, a folder, or a function is, as one hash.

A file is its bytes; a folder the names and the bytes of its files; a function (`module:function`)
the source file of its module, and of the modules beside the recipe that this one imports, and those
import. What such a function reads besides is not seen: after a change there, `--from` the stage.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import invalidate_caches
from importlib.machinery import PathFinder
from pathlib import Path

from twofour.core.errors import InputError
from twofour.pipeline.faults import FUNCTION

_FUNCTION = re.compile(FUNCTION)


@dataclass(frozen=True)
class Identity:
    """What something is.

    Attributes:
        sha256: of its content.
        size_bytes: of it.
    """

    sha256: str
    size_bytes: int


def is_function(place: str) -> bool:
    """Whether it names a function, and no file that is there."""
    return _FUNCTION.fullmatch(place) is not None and not Path(place).exists()


def identity(place: str, folder: Path) -> Identity:
    """The identity of what the user gave.

    Args:
        place: path, or module:function.
        folder: of the recipe, where modules are looked for first.

    Raises:
        InputError: there is no such file, folder or module, or it cannot be read.
    """
    try:
        if is_function(place):
            return _of_function(place, folder)
        path = Path(place)
        if path.is_dir():
            return _of_files([(str(p.relative_to(path)), p) for p in sorted(_files(path))])
        return Identity(sha256_of(path), path.stat().st_size)
    except OSError as e:
        raise InputError(f"cannot read {place}", [str(e)], "check the path") from e


def sha256_of(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def module_file(module: str, folder: Path) -> Path | None:
    """The source file of a module, found without importing anything; None where there is none.

    Args:
        module: its name, a.b.c.
        folder: where it is looked for first.
    """
    invalidate_caches()  # the file may be younger than what Python remembers of its folder
    places: Sequence[str] | None = [str(folder), *sys.path]
    spec = None
    for part in module.split("."):
        if places is None:
            return None
        spec = PathFinder.find_spec(part, places)
        if spec is None:
            return None
        places = spec.submodule_search_locations
    return Path(spec.origin) if spec is not None and spec.origin else None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _of_files(named: Sequence[tuple[str, Path]]) -> Identity:
    parts = [(name, sha256_of(path)) for name, path in named]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return Identity(digest, sum(path.stat().st_size for _, path in named))


def _of_function(place: str, folder: Path) -> Identity:
    module = place.partition(":")[0]
    file = module_file(module, folder)
    if file is None or not file.is_file():
        raise InputError(
            f"no module {module} for {place}",
            [f"looked beside the recipe, in {folder}, and in Python's path"],
            f"write {module.replace('.', '/')}.py beside the recipe, or name another module",
        )
    return _of_files(sorted(_with_imports(module, file, folder).items()))


def _with_imports(module: str, file: Path, folder: Path) -> dict[str, Path]:
    """A module and those beside the recipe that it needs, by name."""
    found, waiting = {module: file}, [(module, file)]
    while waiting:
        name, path = waiting.pop()
        for needed in _imports(name, path):
            source = module_file(needed, folder) if needed not in found else None
            if source is not None and source.is_relative_to(folder) and source.suffix == ".py":
                found[needed] = source
                waiting.append((needed, source))
    return found


def _imports(module: str, path: Path) -> Iterator[str]:
    """Names that may be modules which a source file imports; none where it is no Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(filter(None, [*(parents if node.level else ()), node.module]))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
