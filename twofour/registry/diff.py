"""What differs between two versions: files, engines, metrics, and what they were made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from twofour.registry.places import open_place
from twofour.registry.reading import read_published, version_of, versions_of
from twofour.serve.repository.layout import MANIFEST, SIGNATURE, VersionEntry
from twofour.serve.repository.manifest import EngineRecord, Manifest

ADDED, REMOVED, CHANGED, SAME, UNKNOWN = "added", "removed", "changed", "same", "unknown"
_MOST_DEPTH = 8


@dataclass(frozen=True)
class FileChange:
    """A file of either version.

    Attributes:
        name: of it.
        change: ADDED, REMOVED, CHANGED, SAME, or UNKNOWN: of equal size, and one of the versions
            was not published, so its hash is not known.
        old_bytes, new_bytes: sizes; None where it is not there.
        old_sha256, new_sha256: hashes; None where they are not known.
    """

    name: str
    change: str
    old_bytes: int | None
    new_bytes: int | None
    old_sha256: str | None
    new_sha256: str | None


@dataclass(frozen=True)
class EngineChange:
    """An engine of either version, paired by what it was built for and its name.

    Attributes:
        target: in words.
        old, new: name of the file; None where there is none.
        metrics: name -> both values; None where one is not known.
    """

    target: str
    old: str | None
    new: str | None
    metrics: dict[str, tuple[float | None, float | None]]


@dataclass(frozen=True)
class Difference:
    """Two versions beside each other.

    Attributes:
        model: its name.
        old, new: numbers of the versions.
        files: ascending by name.
        engines: ascending by target.
        metrics: of the model: name -> both values.
        lineage: path in the lineage -> both values, as texts; those that differ alone.
    """

    model: str
    old: int
    new: int
    files: tuple[FileChange, ...]
    engines: tuple[EngineChange, ...]
    metrics: dict[str, tuple[float | None, float | None]]
    lineage: dict[str, tuple[str | None, str | None]]

    @property
    def same(self) -> bool:
        """Whether both have the same files."""
        return all(file.change == SAME for file in self.files)


def diff(
    repository: str,
    name: str,
    old: int,
    new: int,
    storage: Mapping[str, Any] | None = None,
) -> Difference:
    """Holds two versions of a model beside each other, by their manifests.

    Args:
        repository: a folder or a URL.
        name: of the model.
        old: number of a version.
        new: number of another.
        storage: options of fsspec's file system.

    Raises:
        InputError: one is not there, or the repository cannot be read.
    """
    place = open_place(repository, storage)
    versions = versions_of(place, name)
    entries = [version_of(versions, number) for number in (old, new)]
    sides = [_Side.of(entry, read_published(place, entry)) for entry in entries]
    return _compare(name, *sides)


@dataclass(frozen=True)
class _Side:
    """One of the versions.

    Attributes:
        number: of it.
        sizes: of its files, by name.
        hashes: likewise; those that are known.
        engines: of its manifest, by name.
        metrics: likewise.
        lineage: likewise, flat: path -> text.
    """

    number: int
    sizes: Mapping[str, int]
    hashes: Mapping[str, str] = field(default_factory=dict)
    engines: Mapping[str, EngineRecord] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(version: VersionEntry, manifest: Manifest | None) -> _Side:
        """From its listing alone where it has no manifest."""
        own = (MANIFEST, SIGNATURE)
        sizes = {file.name: file.size_bytes for file in version.files if file.name not in own}
        if manifest is None:
            return _Side(version.number, sizes)
        engines = {engine.file: engine for engine in manifest.engines}
        known = (manifest.hashes, engines, manifest.metrics, flat(manifest.lineage))
        return _Side(version.number, sizes, *known)


def _compare(name: str, old: _Side, new: _Side) -> Difference:
    """Two versions of a model."""
    files = tuple(_file(each, old, new) for each in sorted({*old.sizes, *new.sizes}))
    return Difference(
        name,
        old.number,
        new.number,
        files,
        _engines(old, new),
        _both(old.metrics, new.metrics),
        {k: pair for k, pair in _both(old.lineage, new.lineage).items() if pair[0] != pair[1]},
    )


def flat(value: Any, path: str = "", depth: int = 0) -> dict[str, str]:
    """Nested plain data as path -> text; lists of named objects are taken by their names.

    Args:
        value: plain data.
        path: of it.
        depth: of it; what lies deeper than eight levels is one text.
    """
    if isinstance(value, list):
        value = {_label(each, i): each for i, each in enumerate(value)}
    if not isinstance(value, dict) or depth >= _MOST_DEPTH:
        return {path: value if isinstance(value, str) else repr(value)}
    found: dict[str, str] = {}
    for key, each in value.items():
        found |= flat(each, f"{path}.{key}" if path else str(key), depth + 1)
    return found


def _label(value: Any, index: int) -> str:
    """How an element of a list is called: by its name or path if it has one."""
    if isinstance(value, dict):
        for key in ("path", "name"):
            if isinstance(value.get(key), str):
                return f"[{value[key]}]"
    return f"[{index}]"


def _file(name: str, old: _Side, new: _Side) -> FileChange:
    sizes = old.sizes.get(name), new.sizes.get(name)
    hashes = old.hashes.get(name), new.hashes.get(name)
    if sizes[0] is None:
        change = ADDED
    elif sizes[1] is None:
        change = REMOVED
    elif sizes[0] != sizes[1]:
        change = CHANGED
    elif None in hashes:
        change = UNKNOWN
    else:
        change = SAME if hashes[0] == hashes[1] else CHANGED
    return FileChange(name, change, *sizes, *hashes)


def _engines(old: _Side, new: _Side) -> tuple[EngineChange, ...]:
    """Those for the same target and of the same name are paired."""
    keys = {(e.title, name) for side in (old, new) for name, e in side.engines.items()}
    found = []
    for target, name in sorted(keys):
        pair = [side.engines.get(name) for side in (old, new)]
        pair = [each if each is not None and each.title == target else None for each in pair]
        metrics = [dict(each.metrics) if each is not None else {} for each in pair]
        names = [name if each is not None else None for each in pair]
        found.append(EngineChange(target, names[0], names[1], _both(metrics[0], metrics[1])))
    return tuple(found)


def _both(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (old.get(name), new.get(name)) for name in sorted({*old, *new})}
