"""What is published in a repository: read, verified, and listed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from twofour.core.errors import InputError
from twofour.core.progress import Report, silent
from twofour.registry.places import Place
from twofour.serve.repository.config import MOST_CONFIG_BYTES, ModelConfig, read_config
from twofour.serve.repository.layout import (
    CONFIG,
    MANIFEST,
    SIGNATURE,
    Folder,
    Limits,
    VersionEntry,
    shown,
    sort_versions,
    why_not_model,
)
from twofour.serve.repository.manifest import (
    MOST_MANIFEST_BYTES,
    NOT_PUBLISHED,
    NOT_SIGNED,
    SIGNATURE_BYTES,
    FileRecord,
    Manifest,
    read_manifest,
)
from twofour.serve.repository.signatures import TrustedKeys


class AlteredError(InputError):
    """A file is not what was published."""


@dataclass(frozen=True)
class Verified:
    """A version, every file of it read.

    Attributes:
        manifest: of it; None where it cannot be believed.
        signed_by: name of the trusted key that signed it; "" where none did, or none was given.
        problems: why it is not what was published; empty where it is.
    """

    manifest: Manifest | None
    signed_by: str
    problems: tuple[str, ...]


def model_folder(place: Place, name: str) -> Folder:
    """What lies in a model's folder; nothing of one that is not there.

    Raises:
        InputError: the name is none, the folder cannot be used, or the repository not be read.
    """
    if reason := why_not_model(name):
        raise InputError(f"there can be no model {shown(name)!r}", [reason])
    found = place.listing().folders.get(name, Folder())
    if isinstance(found, str):
        raise InputError(f"{place.shown}/{name} cannot be used", [found], "remove it")
    return found


def numbered(name: str, folder: Folder) -> Mapping[int, VersionEntry]:
    """The versions of a model, ascending."""
    versions, _ = sort_versions(name, folder, Limits())
    return versions


def versions_of(place: Place, name: str) -> Mapping[int, VersionEntry]:
    """The versions of a model that is there.

    Raises:
        InputError: there is none, or the repository cannot be read.
    """
    found = numbered(name, model_folder(place, name))
    if not found:
        fix = "publish one: twofour registry publish REPOSITORY NAME FILE"
        raise InputError(f"{place.shown} has no version of model {name!r}", [], fix)
    return found


def version_of(versions: Mapping[int, VersionEntry], number: int) -> VersionEntry:
    """One of them.

    Raises:
        InputError: it is not there.
    """
    if number not in versions:
        there = ", ".join(map(str, list(versions)[-20:])) or "none"
        what = f"there is no version {number}"
        raise InputError(what, [f"there are: {there}"], "see twofour registry versions")
    return versions[number]


def read_published(
    place: Place, version: VersionEntry, trust: TrustedKeys | None = None
) -> Manifest | None:
    """The manifest of a version; None where it cannot be believed, or a key is missing on it.

    Raises:
        InputError: the repository cannot be read.
    """
    return _believed(place, version, trust).manifest


def verify(
    place: Place,
    version: VersionEntry,
    trust: TrustedKeys | None = None,
    report: Report = silent,
) -> Verified:
    """Reads all files of a version and holds them against its manifest.

    Args:
        place: the repository.
        version: of it.
        trust: keys, one of which must have signed it; None: no signature is asked for.
        report: told of each part that is read.

    Raises:
        InputError: the repository cannot be read.
    """
    found = _believed(place, version, trust)
    if found.manifest is None:
        return found
    done, problems = 0, []
    for record in found.manifest.files:
        try:
            for part in checked_parts(place, version, record):
                done += len(part)
                report(done, found.manifest.size_bytes, record.name)
        except AlteredError as e:
            problems.append(e.what)
    return Verified(found.manifest, found.signed_by, tuple(problems))


def checked_parts(place: Place, version: VersionEntry, record: FileRecord) -> Iterator[bytes]:
    """A file's content, some megabytes at a time; in the end it is known to be what was published.

    Raises:
        AlteredError: it is not.
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    where = f"{version.model}/{version.number}/{record.name}"
    for part in place.parts(where, record.size_bytes):
        digest.update(part)
        yield part
    if digest.hexdigest() != record.sha256:
        raise AlteredError(f"{record.name}: its content is not what was published")


def read_model_config(place: Place, name: str) -> tuple[bytes, ModelConfig]:
    """The text of a model's config.yaml, and what it says; all defaults where there is none.

    Raises:
        InputError: it cannot be read or used.
    """
    where = f"{name}/{CONFIG}"
    text = place.small(where, MOST_CONFIG_BYTES) or b""
    return text, read_config(text, f"{place.shown}/{where}")


def _believed(place: Place, version: VersionEntry, trust: TrustedKeys | None) -> Verified:
    """The manifest, its signature checked before anything of it is read."""
    where = f"{version.model}/{version.number}"
    if MANIFEST not in {file.name for file in version.files}:
        return Verified(None, "", (NOT_PUBLISHED,))
    content = place.small(f"{where}/{MANIFEST}", MOST_MANIFEST_BYTES) or b""
    signer = ""
    if trust is not None:
        signature = place.small(f"{where}/{SIGNATURE}", SIGNATURE_BYTES) or b""
        signer = trust.signer(content, signature) or ""
        if not signer:
            return Verified(None, "", (NOT_SIGNED,))
    try:
        return Verified(read_manifest(content, version), signer, ())
    except InputError as e:
        return Verified(None, "", e.reasons)
