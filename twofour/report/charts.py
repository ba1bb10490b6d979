"""Where the parts of a drawing lie, as plain numbers: the geometry of bars, points and lines.

Lengths are pixels from the upper left corner, as SVG has them. Nothing here knows what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_LARGEST = 1e200
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """A straight line from values to pixels.

    Attributes:
        least: value at the first pixel.
        most: value at the last one.
        first: pixel of `least`.
        last: pixel of `most`; smaller than `first` where values rise upwards.
    """

    least: float
    most: float
    first: float
    last: float

    def at(self, value: float) -> float:
        """The pixel of a value; of one beyond the ends, that of the end."""
        inside = min(max(value, self.least), self.most)
        share = (inside - self.least) / (self.most - self.least)
        return round(self.first + share * (self.last - self.first), 2)

    @property
    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Pixel and text of round values."""
        return tuple((self.at(v), f"{v:g}") for v in round_values(self.least, self.most))


def scale_of(values: Sequence[float], first: float, last: float) -> Scale:
    """A scale that has 0 and all values that can be drawn, and ends at round ones.

    Args:
        values: shown; of one that is infinite, or nearly so, only that it is beyond the end.
        first: pixel of the least.
        last: pixel of the most.
    """
    shown = [0.0, *(value for value in values if abs(value) <= _LARGEST)]
    least, most = min(shown), max(shown)
    if most - least < 1 / _LARGEST:
        least, most = 0.0, 1.0
    step = _step(most - least)
    return Scale(math.floor(least / step) * step, math.ceil(most / step) * step, first, last)


def scale_between(values: Sequence[float], first: float, last: float) -> Scale:
    """A scale of these values alone, with some room at both ends; 0 need not be on it.

    Args:
        values: shown; those that cannot be drawn are left out.
        first: pixel of the least.
        last: pixel of the most.
    """
    shown = [value for value in values if abs(value) <= _LARGEST]
    least, most = min(shown, default=0.0), max(shown, default=1.0)
    room = _ROOM * (most - least)
    if room < _LEAST_ROOM * max(abs(least), abs(most)) or not room:
        room = max(abs(most) * _ROOM, 1 / _LARGEST if most else 1.0)
    return Scale(least - room, most + room, first, last)


_ROOM, _LEAST_ROOM = 0.1, 1e-6


def round_values(least: float, most: float) -> tuple[float, ...]:
    """Round values from `least` to `most`, about five."""
    step = _step(most - least)
    first, last = math.ceil(least / step - 1e-9), math.floor(most / step + 1e-9)
    return tuple(round(k * step, 12) for k in range(first, last + 1))


def _step(width: float) -> float:
    power = 10.0 ** math.floor(math.log10(width / 5))
    return power * next(step for step in _STEPS if step * power >= width / 5 * 0.999)


@dataclass(frozen=True)
class Bar:
    """A bar from 0 to a value, and how far that may be off.

    Attributes:
        left: its left end.
        width: of it, 0 or more.
        whisker: both ends of the error; None without one.
        value: in words.
    """

    left: float
    width: float
    whisker: tuple[float, float] | None
    value: str


def bar(scale: Scale, value: float, error: float | None, text: str) -> Bar:
    """A horizontal bar."""
    ends = sorted((scale.at(0.0), scale.at(value)))
    known = error is not None and math.isfinite(value)
    whisker = (scale.at(value - (error or 0.0)), scale.at(value + (error or 0.0)))
    return Bar(ends[0], round(ends[1] - ends[0], 2), whisker if known else None, text)


@dataclass(frozen=True)
class Point:
    """A point, and its name where that is written beside it.

    Attributes:
        x: from the left.
        y: from the top.
        name: of it.
        text: what is known of it.
        label: place of the name: x, y, and "start" or "end"; None where it is not written.
    """

    x: float
    y: float
    name: str
    text: str
    label: tuple[float, float, str] | None


def ending(name: str, letters: int) -> str:
    """The end of a long name, which tells more than its begin: from a dot on, if one is near."""
    if len(name) <= letters:
        return name
    end = name[3 - letters :]
    parts = end.split(".", 1)
    return f"...{parts[1] if len(parts) == 2 and len(parts[0]) < _NEAR else end}"


_NEAR = 10
_PARTS = "/.;:"


def last_parts(name: str, letters: int) -> str:
    """As many of the last parts of a long name as there is room for: of a path, or of modules."""
    if len(name) <= letters:
        return name
    end = name[1 - letters :]
    starts = [k + 1 for k, letter in enumerate(end) if letter in _PARTS]
    whole = next((end[k:] for k in starts if len(end) - k >= letters // 3), end)
    return f"\u2026\u2060{whole}"


_LINE, _GLYPH = 13.0, 6.2  # height of a label, width of a letter


def place_labels(
    points: Sequence[tuple[float, float, str, str]], labelled: int, right: float
) -> list[Point]:
    """Writes the names of the first points beside them, none over another.

    Args:
        points: x, y, name and text, the most important first.
        labelled: how many names to write at most; one without room is left out.
        right: end of the drawing; a name that would cross it is written to the left.
    """
    taken: list[tuple[float, float, float]] = []
    found = []
    for index, (x, y, name, text) in enumerate(points):
        place = _place(x, y, name, right, taken) if index < labelled else None
        found.append(Point(x, y, name, text, place))
    return found


def _place(
    x: float, y: float, name: str, right: float, taken: list[tuple[float, float, float]]
) -> tuple[float, float, str] | None:
    width = _GLYPH * len(name)
    to_left = x + 8 + width > right
    start = x - 8 - width if to_left else x + 8
    for shift in (0.0, -_LINE, _LINE):
        line = y + 4 + shift
        free = all(
            start + width < left or end < start or abs(line - other) >= _LINE
            for left, end, other in taken
        )
        if free and line > _LINE:
            taken.append((start, start + width, line))
            return (x - 8, line, "end") if to_left else (x + 8, line, "start")
    return None
