"""Files that are made once: each has a record beside it of what it was made from."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2]
MODEL_CODE = ("core", "onnx_tools", "train")
ENGINE_CODE = ("core", "onnx_tools", "engine.py", "kernels", "runtime", "compiler")

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
    """Of the package's files in these folders: other code may write another file."""
    digest = hashlib.sha256()
    for part in parts:
        root = PACKAGE / part
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            digest.update(f"{path.relative_to(PACKAGE)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


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
