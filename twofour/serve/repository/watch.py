"""What changed in a repository between two looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from twofour.serve.repository.layout import ModelEntry, Snapshot


class Kind(StrEnum):
    """Of a change."""

    added = "added"
    removed = "removed"
    changed = "changed"


@dataclass(frozen=True, order=True)
class Change:
    """Of a model or a version.

    Attributes:
        model: its name.
        version: its number; 0: the model itself, of which `changed` means config.yaml or a file
            beside it.
        kind: what happened. A model that comes or goes does so with all its versions, each a
            change of its own.
    """

    model: str
    version: int
    kind: Kind

    def __str__(self) -> str:
        """As a log says it."""
        of = f", version {self.version}," if self.version else ""
        return f"model {self.model}{of} {self.kind}"


def compare(before: Snapshot, after: Snapshot) -> tuple[Change, ...]:
    """What changed, ascending by model and version."""
    found: list[Change] = []
    for name in sorted(before.models.keys() | after.models.keys()):
        old, new = _tags(before.models.get(name)), _tags(after.models.get(name))
        found += [Change(name, number, kind) for number, kind in _differences(old, new)]
    return tuple(found)


def _tags(model: ModelEntry | None) -> dict[int, str]:
    """Version -> fingerprint; 0 -> that of the model itself."""
    if model is None:
        return {}
    versions = {number: version.fingerprint for number, version in model.versions.items()}
    return {0: model.fingerprint} | versions


def _differences(before: dict[int, str], after: dict[int, str]) -> Iterator[tuple[int, Kind]]:
    """The numbers whose tags differ, ascending."""
    for number in sorted(before.keys() | after.keys()):
        if number not in before:
            yield number, Kind.added
        elif number not in after:
            yield number, Kind.removed
        elif before[number] != after[number]:
            yield number, Kind.changed
