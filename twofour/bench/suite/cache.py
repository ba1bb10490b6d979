"""Files that are made once: each has a record beside it of what it was made from.

Part of that is the code that made it: the modules it runs, found by what they import, so that a
change elsewhere makes nothing again.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2]
# Modules, and folders of those that are found by their names.
MODEL_CODE = (
    "onnx_tools/load.py",
    "onnx_tools/prune.py",
    "onnx_tools/quantize.py",
    "train/networks/catalog.py",
)
ENGINE_CODE = ("compiler/build.py", "kernels/cpu")
MEASURED_CODE = (*ENGINE_CODE, "bench/suite/entries.py", "bench/timing.py", "bench/peers")

Record = Mapping[str, Any]


def once(path: Path, origin: Record, make: Callable[[], Record | None]) -> Record:
    """Makes a file unless it is there already, made from the same things.

    Args:
        path: what `make` writes, whole or not at all; its folder is made if need be.
        origin: all that the file depends on, plain data.
        make: writes the file; returns what is worth keeping about it, plain data, if anything.

    Returns:
        What `make` returned, now or then.
    """
    record = path.with_name(f"{path.name}.from.json")
    known = _read(record)
    if known is not None and path.is_file() and known.get("origin") == dict(origin):
        kept: Record = known["kept"]
        return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    kept = make() or {}
    record.write_text(json.dumps({"origin": dict(origin), "kept": dict(kept)}, indent=2) + "\n")
    return kept


@functools.cache
def code_sha256(parts: tuple[str, ...]) -> str:
    """Of these files and folders of the package, and of all that they import."""
    digest = hashlib.sha256()
    for path in sorted(_closure(parts)):
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _closure(parts: tuple[str, ...]) -> set[Path]:
    """The files, and those of the package that they import, directly or not."""
    roots = [PACKAGE / part for part in parts]
    left = [path for root in roots for path in (root.rglob("*.py") if root.is_dir() else [root])]
    found: set[Path] = set()
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += _imported(path)
    return found


def _imported(path: Path) -> Iterator[Path]:
    """Files of the package that a file imports; `from a import b` names module a, or a.b."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        for name in names:
            package, _, rest = name.partition(".")
            home = PACKAGE.joinpath(*rest.split("."))
            if package == PACKAGE.name and rest:
                yield from filter(Path.is_file, (home.with_suffix(".py"), home / "__init__.py"))


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(record: Path) -> dict[str, Any] | None:
    """None where there is no record, or one that was cut short."""
    try:
        found = json.loads(record.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and "kept" in found else None
