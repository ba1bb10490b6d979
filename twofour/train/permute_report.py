"""What a permutation of channels gained, and why other channels stay, as data and as text."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby

COLUMNS = 100
_NAMES_COLUMNS = 58


@dataclass(frozen=True)
class SpaceReport:
    """Channels that can trade places, and what came of it.

    Attributes:
        channels: how many.
        readers: names of the weights that will be pruned and read them.
        writers: names of the matrices and filters that write them.
        before: energy that masks of the readers kept before these channels were permuted.
        after: and afterwards.
        energy: of the readers without masks.
        note: why the order stayed, if it did.
    """

    channels: int
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    before: float
    after: float
    energy: float
    note: str = ""


@dataclass(frozen=True)
class StaysReport:
    """Input channels of a weight that cannot be permuted.

    Attributes:
        name: of the weight.
        channels: how many of those it reads.
        reason: in words.
    """

    name: str
    channels: int
    reason: str


@dataclass(frozen=True)
class PermutationReport:
    """What `permute` did.

    Attributes:
        spaces: in the order in which the network writes them.
        stays: of weights that will be pruned, what cannot be permuted.
        before: energy that masks of all weights that will be pruned keep in the given order.
        after: in the order that the model has now.
        energy: of those weights without masks.
    """

    spaces: tuple[SpaceReport, ...]
    stays: tuple[StaysReport, ...]
    before: float
    after: float
    energy: float

    @property
    def recovered(self) -> float:
        """The share of the energy that masks would have removed and now keep, 0 to 1."""
        lost = self.energy - self.before
        return (self.after - self.before) / lost if lost > 0 else 0.0

    def table(self) -> str:
        """Plain text of at most 100 columns."""
        lines = [f"{'channels':>8}  {'read by':<{_NAMES_COLUMNS}}{'kept before':>13}{'after':>9}"]
        for (channels, readers, note), found in groupby(self.spaces, _kind):
            alike = list(found)
            before = _percent(alike[0].before, alike[0].energy)
            after = _percent(alike[-1].after, alike[-1].energy)
            count = f"{len(alike)} x {channels}" if len(alike) > 1 else str(channels)
            row = f"{count:>8}  {_shortened(readers):<{_NAMES_COLUMNS}}{before:>13}{after:>9}"
            lines += [row, *_wrapped(note, " " * 10)]
        lines += self._stays()
        before, after = (_percent(e, self.energy) for e in (self.before, self.after))
        lines.append(
            f"total: masks keep {after} of the energy, {before} before; of what they removed, "
            f"{100 * self.recovered:.1f}% is kept now"
        )
        return "\n".join(lines)

    def _stays(self) -> list[str]:
        by_reason: dict[str, list[str]] = defaultdict(list)
        for entry in self.stays:
            by_reason[entry.reason].append(f"{entry.name} ({entry.channels})")
        lines = ["channels that stay, by reason"] if by_reason else []
        for reason, names in by_reason.items():
            lines += _wrapped(f"{reason}: {', '.join(names)}", "  ")
        return lines


def _kind(space: SpaceReport) -> tuple[int, tuple[str, ...], str]:
    """Heads of one attention are one line of the table."""
    return space.channels, space.readers, space.note


def _shortened(names: tuple[str, ...]) -> str:
    """As many names as fit."""
    shown = names[0] if len(names[0]) <= _NAMES_COLUMNS - 12 else "..." + names[0][-40:]
    for index, name in enumerate(names[1:], 1):
        more = f", {name}"
        if len(shown) + len(more) > _NAMES_COLUMNS - 12:
            return f"{shown}, {len(names) - index} more"
        shown += more
    return shown


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f}%" if whole > 0 else "-"


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, initial_indent=indent, subsequent_indent=indent + "    ")
