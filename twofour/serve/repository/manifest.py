"""`manifest.json` of a published version: what its files are, so that others are refused.

    MODEL/VERSION/manifest.json   a `Manifest` as canonical JSON
    MODEL/VERSION/manifest.sig    Ed25519 over the bytes of manifest.json, 64 bytes; of signed ones

The document has its own hash, so that damage shows without a key; malice shows with one. Nothing of
it is believed before that, and nothing of a version is used before its files were compared with it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from twofour.core.errors import InputError
from twofour.core.records import from_plain, to_plain
from twofour.core.target import Target
from twofour.serve.repository.layout import (
    ENGINE,
    MANIFEST,
    SIGNATURE,
    VersionEntry,
    is_hidden,
    why_not_file,
)

SCHEMA = "twofour.manifest/1"
MOST_MANIFEST_BYTES = 4 << 20
SIGNATURE_BYTES = 64
NOT_PUBLISHED = "it was not published: it has no manifest.json"
NOT_SIGNED = "it is not signed by one of the trusted keys"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIX = "publish it anew: twofour registry publish; a published version is never changed"

Trust = Callable[[bytes, bytes], bool]
"""Whether a signature over a content is by a key that is trusted: content, signature -> answer."""


@dataclass(frozen=True)
class FileRecord:
    """A file of a version.

    Attributes:
        name: in the version's folder.
        size_bytes: of it.
        sha256: of its content, hexadecimal.
    """

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class EngineRecord:
    """A row of the engine table.

    Attributes:
        file: its name.
        isa, arch, cpu, bf16: of the target that it was built for, see `Target`.
        threads: that it was tuned with.
        format: of the engine file.
        built_by: version of the package that built it.
        source_sha256: of the model that it was built of.
        metrics: measured of it, by name; a name ends in its unit: "latency_us".
    """

    file: str
    isa: str
    arch: str
    cpu: str
    bf16: bool
    threads: int
    format: int
    built_by: str
    source_sha256: str
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What it was built for, in words."""
        return f"{Target(self.isa, self.arch, self.cpu, self.bf16)}, {self.arch}"


@dataclass(frozen=True)
class Manifest:
    """What was published as a version of a model.

    Attributes:
        name: of the model.
        version: its number.
        created: when, ISO 8601, UTC.
        previous: the version before it; None of the first.
        files: ascending by name: all but the manifest and its signature.
        engines: those of the files that are engines, ascending by name.
        metrics: of the model, whatever engine runs it.
        message: of who published it.
        lineage: what it was made from, as plain data: hashes of artifacts, versions of packages.
    """

    name: str
    version: int
    created: str
    previous: int | None
    files: tuple[FileRecord, ...]
    engines: tuple[EngineRecord, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    message: str = ""
    lineage: dict[str, Any] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def hashes(self) -> dict[str, str]:
        """File -> SHA-256."""
        return {file.name: file.sha256 for file in self.files}


def write_manifest(manifest: Manifest) -> bytes:
    """The file's content: canonical, so that equal manifests are equal files.

    Raises:
        ValueError: the lineage or a metric has what JSON has not.
    """
    plain = {"schema": SCHEMA, **to_plain(manifest)}
    return _canonical({**plain, "sha256": _hash_of(plain)})


def read_manifest(content: bytes, version: VersionEntry) -> Manifest:
    """Reads and checks a manifest, and holds the names and sizes of a version against it.

    Args:
        content: of the file; if keys are required, its signature was checked before.
        version: as it lies there.

    Raises:
        InputError: damaged, of another version, or the version's files are not those of it.
    """
    try:
        manifest = parse_manifest(content)
    except ValueError as e:
        raise _refusal(version, [f"{MANIFEST} cannot be used: {e}"]) from e
    if (manifest.name, manifest.version) != (version.model, version.number):
        of = f"version {manifest.version} of model {manifest.name!r}"
        raise _refusal(version, [f"{MANIFEST} is that of {of}"])
    if wrong := [*_differences(manifest, version)]:
        raise _refusal(version, wrong[:10])
    return manifest


def parse_manifest(content: bytes) -> Manifest:
    """The inverse of `write_manifest`.

    Raises:
        ValueError: too large, no canonical JSON of this schema, altered, or impossible.
    """
    if len(content) > MOST_MANIFEST_BYTES:
        raise ValueError(f"it is larger than {MOST_MANIFEST_BYTES} bytes")
    try:
        plain: Any = json.loads(content)
        if not isinstance(plain, dict) or _canonical(plain) != content:
            raise ValueError("it is no canonical JSON object")
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError("it is no JSON") from e
    if plain.pop("sha256", None) != _hash_of(plain):
        raise ValueError("it was altered: its hash is another one")
    if plain.pop("schema", None) != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}")
    lineage = plain.pop("lineage", {})
    if not isinstance(lineage, dict):
        raise ValueError("its lineage is no object")
    manifest = replace(from_plain(Manifest, plain), lineage=lineage)
    for reason in _impossible(manifest):
        raise ValueError(reason)
    return manifest


def why_not_published(name: str) -> str:
    """Why a file cannot be part of a published version by its name; "" if it can."""
    if name in (MANIFEST, SIGNATURE):
        return "this name is that of the manifest; rename the file"
    if is_hidden(name):
        return "what begins with a dot is left out by servers; rename the file"
    return why_not_file(name)


def expected_of(manifest: Manifest, names: tuple[str, ...]) -> Mapping[str, str]:
    """File -> SHA-256 of some of its files."""
    hashes = manifest.hashes
    return {name: hashes[name] for name in names}


def not_trusted(version: VersionEntry, reason: str) -> InputError:
    """The error of a version that keys are required of; no word of what else is in it."""
    fix = "sign it: twofour registry publish --key KEY; or name its key in --trusted-keys"
    return InputError(f"{version.title} is refused", [reason], fix)


def _hash_of(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(plain)).hexdigest()


def _canonical(plain: Mapping[str, Any]) -> bytes:
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode() + b"\n"


def _impossible(manifest: Manifest) -> Iterator[str]:
    """What contradicts itself, or no version can have."""
    names = [file.name for file in manifest.files]
    if names != sorted(set(names)):
        yield "its files are not in order, or one is named twice"
    for file in manifest.files:
        if (
            why_not_published(file.name)
            or file.size_bytes < 0
            or not _SHA256.fullmatch(file.sha256)
        ):
            yield "the name, size or hash of a file cannot be"
    engines = [engine.file for engine in manifest.engines]
    if engines != [name for name in names if name.endswith(ENGINE)]:
        yield "its engine table is not that of its files"


def _differences(manifest: Manifest, version: VersionEntry) -> Iterator[str]:
    """Files that are missing, of another size, or were not published; without reading them."""
    found = {file.name: file.size_bytes for file in version.files}
    expected = {file.name: file.size_bytes for file in manifest.files}
    for name, size in expected.items():
        if name not in found:
            yield f"{name} is missing"
        elif found[name] != size:
            yield f"{name}: expected {size} bytes, got {found[name]}"
    for name in sorted(found.keys() - expected.keys() - {MANIFEST, SIGNATURE}):
        yield f"{name} was not published with it"


def _refusal(version: VersionEntry, reasons: list[str]) -> InputError:
    return InputError(f"{version.title} is not what was published", reasons, _FIX)
