"""The versions of a model as a table: what each is, and what is served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twofour.registry.history import Event, read_history
from twofour.registry.places import open_place
from twofour.registry.promote import served_now
from twofour.registry.reading import read_model_config, read_published, versions_of
from twofour.serve.repository.layout import MANIFEST, SIGNATURE
from twofour.serve.repository.manifest import Manifest
from twofour.serve.repository.signatures import TrustedKeys


@dataclass(frozen=True)
class Row:
    """A version.

    Attributes:
        version: its number.
        size_bytes: of its files.
        manifest: None where it was not published, or cannot be believed.
        state: "published", "signed", "not published", or "damaged"; with keys "not trusted" too.
        percent: of the requests that it gets by config.yaml.
    """

    version: int
    size_bytes: int
    manifest: Manifest | None
    state: str
    percent: float


@dataclass(frozen=True)
class Catalog:
    """A model of a registry.

    Attributes:
        place: where it lies.
        rows: ascending by version.
        events: of its history, the first one first.
    """

    place: str
    rows: tuple[Row, ...]
    events: tuple[Event, ...]


def catalog(
    repository: str,
    name: str,
    trust: TrustedKeys | None = None,
    storage: Mapping[str, Any] | None = None,
) -> Catalog:
    """The versions of a model; manifests are read, files are not.

    Args:
        repository: a folder or a URL.
        name: of the model.
        trust: keys, one of which should have signed each; None: signatures are not checked.
        storage: options of fsspec's file system.

    Raises:
        InputError: there is no such model, or it cannot be read.
    """
    place = open_place(repository, storage)
    versions = versions_of(place, name)
    serves = served_now(read_model_config(place, name)[1], versions)
    rows = []
    for number, entry in versions.items():
        names = {file.name for file in entry.files}
        manifest = read_published(place, entry, trust) if MANIFEST in names else None
        if MANIFEST not in names:
            state = "not published"
        elif manifest is None:
            state = "not trusted" if trust is not None else "damaged"
        else:
            state = "signed" if SIGNATURE in names else "published"
        size = sum(file.size_bytes for file in entry.files)
        rows.append(Row(number, size, manifest, state, serves.get(str(number), 0.0)))
    return Catalog(f"{place.shown}/{name}", tuple(rows), read_history(place, name).events)


def percent_of(
    repository: str, name: str, version: int, storage: Mapping[str, Any] | None = None
) -> float:
    """Percent of the requests that a version gets by config.yaml; manifests are not read.

    Raises:
        InputError: there is no such model, or it cannot be read.
    """
    place = open_place(repository, storage)
    versions = versions_of(place, name)
    return served_now(read_model_config(place, name)[1], versions).get(str(version), 0.0)
