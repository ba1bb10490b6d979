"""One arena for all activations on the GPU: buffers that are never in use together share bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from twofour.core.cuda_program import ALIGNMENT


@dataclass(frozen=True)
class Life:
    """A buffer.

    Attributes:
        size_bytes: of it.
        first: the first turn that touches it.
        last: the last one.
    """

    size_bytes: int
    first: int
    last: int


def place(lives: Mapping[str, Life]) -> tuple[dict[str, int], int]:
    """The offset of each buffer, largest first into the first gap; and the size of the arena."""
    offsets: dict[str, int] = {}
    order = sorted(lives, key=lambda name: (-lives[name].size_bytes, lives[name].first))
    end = 0
    for name in order:
        life = lives[name]
        beside = [other for other in offsets if _meet(life, lives[other])]
        offsets[name] = _gap(rounded(life.size_bytes), beside, offsets, lives)
        end = max(end, offsets[name] + rounded(life.size_bytes))
    return offsets, end


def rounded(size_bytes: int) -> int:
    """The size up to where another buffer may begin."""
    return -(-max(size_bytes, 1) // ALIGNMENT) * ALIGNMENT


def _meet(a: Life, b: Life) -> bool:
    return a.first <= b.last and b.first <= a.last


def _gap(
    size: int, beside: Sequence[str], offsets: Mapping[str, int], lives: Mapping[str, Life]
) -> int:
    offset = 0
    for name in sorted(beside, key=lambda other: offsets[other]):
        if offsets[name] >= offset + size:
            break
        offset = max(offset, offsets[name] + rounded(lives[name].size_bytes))
    return offset
