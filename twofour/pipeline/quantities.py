"""Numbers of the recipe, and numbers for people."""

from __future__ import annotations


def bytes_of(text: int | str | None) -> int | None:
    """200M -> bytes, k, M and G of 1024; None for None."""
    if text is None or isinstance(text, int):
        return text
    units = {"k": 10, "M": 20, "G": 30}
    return int(text.rstrip("kMG")) << units.get(text[-1], 0)


def size_text(size_bytes: float | None) -> str:
    """1.5 MB; "unknown" for None."""
    if size_bytes is None:
        return "unknown"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g} {unit}"
    return f"{size_bytes:.0f} B"


def time_text(seconds: float | None) -> str:
    """1.2 s, 3 min, 2.5 h; "unknown" for None."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
