"""What a Sparsifier does with each matrix of a model: chosen by name and shape, told as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from twofour.core import patterns
from twofour.core.errors import InputError
from twofour.train.layers import NeverPruned, WeightRef

COLUMNS = 100
_NAME_COLUMNS = 46
_SHAPE_COLUMNS = 19


@dataclass(frozen=True)
class Selection:
    """Which weights get masks.

    Args:
        patterns: name of each weight that is pruned -> its pattern.
        reasons: name of every other matrix -> why it stays dense.
    """

    patterns: dict[str, patterns.Pattern]
    reasons: dict[str, str]


@dataclass(frozen=True)
class LayerReport:
    """What became of one matrix of the model.

    Args:
        name: of its module; of a parameter that is not called `weight`, its own.
        shape: of the weight; () if it is not known yet.
        pattern: the name of the pattern it has now, or "dense".
        reason: why it was left dense; empty if it was pruned.
        density: share of its values that is not zero; None of one that no Sparsifier prunes.
        energy_kept: share of the sum of squares that its mask kept when it was made; None if the
            mask came with a checkpoint.
        shared: the other names it goes by.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    reason: str = ""
    density: float | None = None
    energy_kept: float | None = None
    shared: tuple[str, ...] = ()

    @property
    def pruned(self) -> bool:
        """Whether a mask holds this weight."""
        return not self.reason

    @property
    def parameters(self) -> int:
        """How many values it has, zeros included."""
        return prod(self.shape) if self.shape else 0


def select(
    found: Sequence[WeightRef | NeverPruned],
    pattern: str | patterns.Pattern | Mapping[str, str | patterns.Pattern],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> Selection:
    """Decides for each matrix whether it is pruned, and to which pattern.

    Args:
        found: all matrices of the model.
        pattern: one for all, or name patterns (as in `fnmatch`) and what they get; the first that
            matches counts.
        include: name patterns; None means all.
        exclude: name patterns. A shared weight is excluded by any of its names.

    Raises:
        InputError: an unknown pattern, or a name pattern that matches nothing.
    """
    for option, value in {"include": include, "exclude": exclude}.items():
        if isinstance(value, str):
            raise InputError(f"{option} is a list of name patterns", fix=f"{option}=[{value!r}]")
    several = isinstance(pattern, Mapping)
    given = pattern.items() if isinstance(pattern, Mapping) else [("*", pattern)]
    wanted = {name: patterns.Pattern.parse(value) for name, value in given}
    _require_matches([*(wanted if several else ()), *(include or ()), *(exclude or ())], found)
    chosen: dict[str, patterns.Pattern] = {}
    reasons: dict[str, str] = {}
    for entry in found:
        excluded_by = _first_match(entry.names, exclude or ())
        first = _first_match(entry.names, wanted)
        if isinstance(entry, NeverPruned):
            reasons[entry.name] = entry.reason
        elif include is not None and _first_match(entry.names, include) is None:
            reasons[entry.name] = "not matched by include"
        elif excluded_by is not None:
            reasons[entry.name] = f"excluded by {excluded_by!r}"
        elif first is None:
            reasons[entry.name] = "no pattern is given for its name"
        else:
            too_odd = patterns.ineligible(entry.shape, wanted[first])
            if too_odd is None:
                chosen[entry.name] = wanted[first]
            else:
                reasons[entry.name] = too_odd
    return Selection(chosen, reasons)


def _require_matches(
    name_patterns: Iterable[str], found: Sequence[WeightRef | NeverPruned]
) -> None:
    names = [name for entry in found for name in entry.names]
    for name_pattern in name_patterns:
        if not any(fnmatchcase(name, name_pattern) for name in names):
            raise InputError(
                f"{name_pattern!r} matches no layer of the model",
                ["the layers are: " + ", ".join(names)],
            )


def _first_match(names: Iterable[str], name_patterns: Iterable[str]) -> str | None:
    names = tuple(names)
    return next((p for p in name_patterns if any(fnmatchcase(n, p) for n in names)), None)


def table(report: Sequence[LayerReport]) -> str:
    """The report as plain text of at most 100 columns: the pruned, the dense, and the totals.

    Args:
        report: as `Sparsifier.report()` gives it.
    """
    pruned = [entry for entry in report if entry.pruned]
    dense = [entry for entry in report if not entry.pruned]
    lines = []
    if pruned:
        lines.append(_row("pruned", "weight", ("pattern", "nonzero", "energy")))
    for entry in pruned:
        shares = (entry.pattern, _percent(entry.density), _percent(entry.energy_kept))
        lines.append(_row(entry.name, _show(entry.shape), shares))
        if entry.shared:
            lines += _wrapped(f"shared by {', '.join(entry.shared)}", "  ")
    if dense:
        lines.append("left dense")
    for entry in dense:
        label = f"{_clipped(entry.name, _NAME_COLUMNS)} {_show(entry.shape)}".rstrip()
        lines += _wrapped(f"{label}: {entry.reason}", "")
    lines.append(_totals(report))
    return "\n".join(lines)


def _row(name: str, shape: str, rest: Sequence[str]) -> str:
    pattern, density, energy = rest
    left = f"{_clipped(name, _NAME_COLUMNS):<{_NAME_COLUMNS}} {shape:<{_SHAPE_COLUMNS}}"
    return f"{left} {pattern:<10}{density:>9}{energy:>9}"


def _totals(report: Sequence[LayerReport]) -> str:
    pruned = [entry for entry in report if entry.pruned]
    total = sum(entry.parameters for entry in report)
    held = sum(entry.parameters for entry in pruned)
    nonzero = sum(entry.parameters * (entry.density or 0.0) for entry in pruned)
    share = f" ({100 * held / total:.1f}%)" if total else ""
    text = (
        f"total: {len(pruned)} of {len(report)} weights pruned, {held:,} of {total:,} values{share}"
    )
    return text + (f"; {100 * nonzero / held:.1f}% of those nonzero" if held else "")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, COLUMNS, initial_indent=indent + "  ", subsequent_indent=indent + "      "
    )


def _clipped(text: str, columns: int) -> str:
    return text if len(text) <= columns else "..." + text[3 - columns :]


def _show(shape: tuple[int, ...]) -> str:
    return "[" + ",".join(map(str, shape)) + "]" if shape else ""


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"
