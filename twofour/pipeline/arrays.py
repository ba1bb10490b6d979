"""Arrays in a file: .npz without pickle, the same bytes for the same arrays."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import InputError
from twofour.core.writing import write_whole

Array = NDArray[Any]


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Writes arrays as `numpy.load` reads them; no times of day are in the file.

    Raises:
        OSError: it cannot be written.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in sorted(arrays.items()):
            part = io.BytesIO()
            np.lib.format.write_array(part, np.asarray(array), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, part.getvalue())
    write_whole(path, content.getvalue())


def load_arrays(path: Path) -> dict[str, Array]:
    """The inverse of `save_arrays`.

    Raises:
        InputError: it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as e:
        raise InputError(f"cannot read {path}", [str(e)]) from e
