"""Quantities in words, with their units: three digits, and "" for what is not known."""

from __future__ import annotations

import math

SPACE = "\u00a0"
"""Between a number and its unit: they are not parted at the end of a line."""
_MINUS = "\u2212"

Number = float | int | None


def is_known(value: Number) -> bool:
    """Whether there is a number."""
    return value is not None and math.isfinite(value)


def digits(value: Number, count: int = 3) -> str:
    """The first digits that are not 0, no power of ten: 0.00123, 12.3, 1230."""
    if value is None or not math.isfinite(value):
        return ""
    if value == 0:
        return "0"
    power = int(f"{value:.{count - 1}e}".partition("e")[2])  # of the rounded value
    places = max(count - 1 - power, 0)
    text = f"{value:,.{min(places, 12)}f}"
    return text.replace("-", _MINUS)


def _scaled(value: Number, units: tuple[tuple[float, str], ...]) -> str:
    """In the largest unit that leaves at least 1 of it, else in the last."""
    if value is None or not math.isfinite(value):
        return ""
    size, unit = next((each for each in units if abs(value) >= 0.9995 * each[0]), units[-1])
    return f"{digits(value / size)}{SPACE}{unit}"


def time(us: Number) -> str:
    """Of microseconds: three digits, no more than two of them behind the point of a microsecond."""
    if us is not None and abs(us) < 0.9995:
        return f"{us:.2f}{SPACE}\u00b5s".replace("0.00", "0")
    return _scaled(us, _TIMES)


_TIMES = ((1e6, "s"), (1e3, "ms"), (1.0, "\u00b5s"))
_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def seconds(value: Number) -> str:
    """Of seconds that somebody waited."""
    if value is None or not math.isfinite(value):
        return ""
    if abs(value) >= 3600:
        return f"{value / 3600:.1f}{SPACE}h"
    if abs(value) >= 60:
        whole = round(value)
        return f"{whole // 60}{SPACE}min{SPACE}{whole % 60:02d}{SPACE}s"
    return f"{value:.1f}{SPACE}s"


def size(value: Number) -> str:
    """Of bytes, in powers of a thousand."""
    if value == 0:
        return f"0{SPACE}B"
    return _scaled(value, _SIZES)


def energy(joules: Number) -> str:
    """Of joules."""
    return _scaled(joules, ((1.0, "J"), (1e-3, "mJ"), (1e-6, "\u00b5J")))


def times(value: Number) -> str:
    """A ratio: 3.10x."""
    return f"{digits(value)}\u00d7" if is_known(value) else ""


def percent(share: Number) -> str:
    """Of a share from 0 to 1."""
    if share is None or not math.isfinite(share):
        return ""
    if 0 < abs(share) < 5e-4:
        return f"<0.1{SPACE}%"
    return f"{100 * share:.1f}{SPACE}%"


def amount(value: Number, unit: str) -> str:
    """Of a metric, without its unit: two decimals of percent, else four digits."""
    if value is None or not math.isfinite(value):
        return ""
    if unit in ("%", "points"):
        return f"{round(value, 2) or 0.0:,.2f}".replace("-", _MINUS)
    return digits(value, 4)


def signed(value: Number, unit: str) -> str:
    """A difference of such amounts, with its sign."""
    text = amount(value, unit)
    return f"+{text}" if text.strip("0.,") and value is not None and value > 0 else text


def with_unit(value: Number, unit: str) -> str:
    """In a unit by its name: that of a check, or of a metric."""
    if unit in _OF:
        return _OF[unit](value)
    text = amount(value, unit)
    return f"{text}{SPACE}{unit}" if text and unit else text


_OF = {"bytes": size, "x": times, "us": time}


def rounded(value: float, unit: str) -> str:
    """A round value, as a limit or on an axis: no more digits than it has, and its unit."""
    units = {"bytes": _SIZES, "us": _TIMES}.get(unit, ((1.0, unit),))
    large, name = next((each for each in units if abs(value) >= 0.9995 * each[0]), units[-1])
    text = f"{value / large:.4g}".replace("-", _MINUS)
    if unit == "x":
        return f"{text}\u00d7"
    return f"{text}{SPACE}{name}" if name else text
