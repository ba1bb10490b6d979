"""Files that are there whole or not at all, whoever is killed while they are written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file under another name in its folder, then renames it.

    A symbolic link stays one: what it points to is replaced. Others may read the file as far as the
    umask lets them.

    Args:
        path: of the file; an existing one is replaced.
        content: all of it.

    Raises:
        OSError: it cannot be written; then what was there stays.
    """
    path = Path(os.path.realpath(path))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
