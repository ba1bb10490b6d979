"""What a model file says of its own weights: which of them have which sparsity pattern.

A file carries it as one metadata entry, so that every later stage knows what an earlier one made
and can tell a mask that was lost from a weight that is dense on purpose:

    "twofour.patterns": {"layer1.0.conv1.weight": "2:4", "layer1.0.conv2.weight": "2:4/pair"}
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import InputError
from twofour.core.patterns import PAIR_BLOCK, Pattern, is_pattern

KEY = "twofour.patterns"
"""Of the metadata entry: JSON, name of the initializer -> name of the pattern."""
MOST_CHARACTERS = 1 << 24
_LARGEST_GROUP = 32


def to_text(promises: Mapping[str, str]) -> str:
    """The metadata entry, the same for the same promises.

    Args:
        promises: name of the initializer -> name of its pattern.
    """
    return json.dumps(dict(sorted(promises.items())), ensure_ascii=False)


def from_text(text: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Reads a metadata entry, which anybody may have written.

    Args:
        text: its value.

    Returns:
        Name of the initializer -> name of its pattern, as `str(Pattern)` has it; and in words what
        was left out because it cannot be understood.
    """
    if len(text) > MOST_CHARACTERS:
        size = f"{len(text)} characters, expected at most {MOST_CHARACTERS}"
        return {}, (f"metadata {KEY!r} is ignored: it has {size}",)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        return {}, (f"metadata {KEY!r} is ignored: it is not JSON: {reason}",)
    if not isinstance(found, dict):
        got = type(found).__name__
        return {}, (f"metadata {KEY!r} is ignored: expected a JSON object, got {got}",)
    known: dict[str, str] = {}
    unknown: list[str] = []
    for name, given in found.items():
        pattern = _pattern(given)
        if pattern is None:
            unknown.append(f"{name[:80]!r} ({str(given)[:40]!r})")
        else:
            known[name] = pattern
    if not unknown:
        return known, ()
    some = ", ".join(unknown[:4]) + (", ..." if len(unknown) > 4 else "")
    note = f"metadata {KEY!r} promises {len(unknown)} weights a pattern that is none: {some}"
    return known, (note,)


def strongest(w: NDArray[np.generic]) -> str | None:
    """The pattern a weight can promise: that of the fewest nonzeros, of equal ones the finest.

    Args:
        w: real [N, C, ...].

    Returns:
        An N:M with M at most 32, as a pair or both ways where the weight has that too; None if it
        has no pattern. A weight with fewer output channels than a block of pairs has no pair in it.
    """
    if w.ndim < 2 or np.count_nonzero(w) == w.size:
        return None
    best: Pattern | None = None
    for m in range(2, min(w.shape[1], _LARGEST_GROUP) + 1):
        if w.shape[1] % m:
            continue
        n = max(_most_nonzeros(w, m), 1)
        if n < m and (best is None or n * best.m < best.n * m):
            best = Pattern(n, m)
    if best is None:
        return None
    suffixes = ("/pair", "/2d") if len(w) >= PAIR_BLOCK else ("/2d",)
    stricter = [s for s in suffixes if _pattern(f"{best}{s}") and is_pattern(w, f"{best}{s}")]
    return f"{best}{stricter[0]}" if stricter else str(best)


def _most_nonzeros(w: NDArray[np.generic], m: int) -> int:
    """In any of its groups of m input channels."""
    groups = np.not_equal(w, 0).reshape(len(w), w.shape[1] // m, m, -1)
    return int(np.count_nonzero(groups, axis=2).max())


def _pattern(given: object) -> str | None:
    """The name of a pattern as it prints, or None for anything else."""
    try:
        return str(Pattern.parse(given)) if isinstance(given, str) else None
    except InputError:
        return None
