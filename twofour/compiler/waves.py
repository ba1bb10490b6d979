"""Which operators of a step need not wait for each other: waves, with one barrier behind each.

    b = f(a), c = g(a), d = h(b), e = i(c, d)   =>   waves {b}, {c, d}, {e}

An operator waits for those before it that write what it reads or writes, or read what it writes;
then it is in a later wave. There are as few waves as the longest chain has operators, and each
operator is in the last one that it can be in: branches that end together, like the heads of a
detector, go along with each other level by level.

What has memory of its own beside tensors, as a plugin's workspace, is alone in its wave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_ALL = 1 << 62


@dataclass(frozen=True)
class Span:
    """Channels of something that holds bytes; by default all of it.

    Attributes:
        holder: its name.
        first: channel.
        end: behind the last one.
    """

    holder: str
    first: int = 0
    end: int = _ALL

    def meets(self, other: Span) -> bool:
        """Whether two of one holder have channels in common."""
        return self.first < other.end and other.first < self.end


@dataclass(frozen=True)
class Use:
    """What an operator touches.

    Attributes:
        reads: what it reads.
        writes: what it writes.
        alone: it touches more than that.
    """

    reads: tuple[Span, ...]
    writes: tuple[Span, ...]
    alone: bool = False


def waves(uses: Sequence[Use]) -> list[int]:
    """The number of the wave of each operator, counted from 0.

    Args:
        uses: of operators, in an order in which they can run.
    """
    behind = _behind(uses)
    left = [0] * len(uses)
    for index in reversed(range(len(uses))):
        left[index] = max((left[later] + 1 for later in behind[index]), default=0)
    most = max(left, default=0)
    return [most - n for n in left]


def _behind(uses: Sequence[Use]) -> list[set[int]]:
    """For each operator those that wait for it, at least by way of others."""
    behind: list[set[int]] = [set() for _ in uses]
    seen: dict[str, _Seen] = {}
    alone = -1
    for index, use in enumerate(uses):
        if use.alone:
            for before in range(max(alone, 0), index):
                behind[before].add(index)
            alone = index
        elif alone >= 0:
            behind[alone].add(index)
        for before in _before(use, seen):
            behind[before].add(index)
        for span in use.reads:
            seen.setdefault(span.holder, _Seen()).reads.append((span, index))
        for span in use.writes:
            seen.setdefault(span.holder, _Seen()).writes.append((span, index))
    return behind


@dataclass
class _Seen:
    """Who touched a holder so far."""

    reads: list[tuple[Span, int]] = field(default_factory=list)
    writes: list[tuple[Span, int]] = field(default_factory=list)


def _before(use: Use, seen: dict[str, _Seen]) -> Iterator[int]:
    """The operators that one waits for."""
    for span in (*use.reads, *use.writes):
        held = seen.get(span.holder, _Seen())
        yield from (index for other, index in held.writes if span.meets(other))
    for span in use.writes:
        held = seen.get(span.holder, _Seen())
        yield from (index for other, index in held.reads if span.meets(other))
