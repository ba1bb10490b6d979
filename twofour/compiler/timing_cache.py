"""Measured times of kernels, kept between builds."""

from __future__ import annotations

import json
import math
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from twofour.core.errors import InputError


@dataclass
class TimingCache:
    """Measured times by key: only of kernels whose results were found right.

    Saved under a temporary name, then renamed.
    """

    times_us: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def load(path: Path | None) -> TimingCache:
        """The cache in a file; an empty one where there is none.

        Raises:
            InputError: the file is not a timing cache, or its folder does not exist.
        """
        if path is None:
            return TimingCache()
        if not path.parent.is_dir():
            raise _unwritable(path, f"there is no folder {path.parent}")
        if not path.exists():
            return TimingCache()
        try:
            given = json.loads(path.read_text())["times_us"]
            times = {str(k): float(v) for k, v in given.items()}
            if wrong := [k for k, v in times.items() if not 0 < v < math.inf]:
                raise ValueError(f"{wrong[0]} took {times[wrong[0]]} us")
            return TimingCache(times)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(
                f"{path} is not a timing cache",
                [f"{type(e).__name__}: {e}"],
                "name a file that does not exist yet, or delete this one",
            ) from e

    def save(self, path: Path | None) -> None:
        """Writes the file.

        Raises:
            InputError: it cannot be written.
        """
        if path is None:
            return
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            temporary.write_text(json.dumps({"times_us": self.times_us}, indent=0))
            temporary.replace(path)
        except OSError as e:
            raise _unwritable(path, str(e)) from e
        finally:
            temporary.unlink(missing_ok=True)


def _unwritable(path: Path, reason: str) -> InputError:
    what = f"cannot write the timing cache {path}"
    return InputError(what, [reason], "choose an existing, writable folder")
