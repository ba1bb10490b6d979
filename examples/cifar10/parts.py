"""Which share of a run's jobs a process does."""

from __future__ import annotations

from twofour.core.errors import InputError


def share(text: str) -> tuple[int, int]:
    """`2/4` as (2, 4).

    Raises:
        InputError: it is something else.
    """
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise InputError(f"--part {text!r} is no part", ["expected 1/4, 2/4, ..."])
    return int(part), int(parts)
