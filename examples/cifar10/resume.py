"""Files that are made once: each remembers what it was made from.

Beside `int8.onnx` lies `int8.onnx.from.json`: the hashes of the files it was made from, the
options, the package's code, the versions of what computes, and its own hash. If all of that is
still so, the file is not made again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import twofour

TOOLS = ("numpy", "llvmlite", "onnxruntime", "torch", "openvino")


def once(path: Path, sources: Sequence[Path], options: str, make: Callable[[], object]) -> bool:
    """Makes a file unless it is there already, made from the same things.

    Args:
        path: what `make` writes, whole or not at all; its folder is made if need be.
        sources: the files it is made from.
        options: everything else that it depends on and the user can choose.
        make: writes the file.

    Returns:
        Whether it was made.
    """
    record = path.with_name(f"{path.name}.from.json")
    origin = {
        "sources": {source.name: sha256(source) for source in sources},
        "options": options,
        "code": _code_sha256(),
        "tools": {name: found for name, found in versions().items() if name != "openvino"},
    }
    if path.is_file() and _read(record) == {**origin, "sha256": sha256(path)}:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    make()
    record.write_text(json.dumps({**origin, "sha256": sha256(path)}, indent=2) + "\n")
    return True


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions(tools: Iterable[str] = TOOLS) -> dict[str, str]:
    """The version of each of `tools` that is installed."""
    found = {}
    for name in tools:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def _code_sha256() -> str:
    """Of all files of the package: another compiler may make another engine."""
    package = Path(twofour.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} {sha256(path)}\n".encode())
    return digest.hexdigest()


def _read(record: Path) -> dict[str, Any] | None:
    """What a record says; None if there is none, or it was cut short."""
    try:
        content: dict[str, Any] = json.loads(record.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content
