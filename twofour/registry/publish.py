"""A version is published: its files are checked, hashed, listed in a manifest, and put there whole.

    published = publish("s3://models/prod", "resnet20", {"avx512.engine": path}, PublishOptions())

What guards it, and what a store has to do for that: docs/registry.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from twofour.core.errors import InputError
from twofour.core.progress import Report, silent
from twofour.engine import FORMAT, Engine
from twofour.registry.history import PUBLISH, Event, add_event, now, read_history, who
from twofour.registry.keys import Signer
from twofour.registry.places import Draft, Place, hash_file, open_place
from twofour.registry.reading import model_folder, numbered, read_published
from twofour.serve.repository.layout import (
    ENGINE,
    MANIFEST,
    ONNX,
    SIGNATURE,
    Limits,
    VersionEntry,
    why_not_model,
)
from twofour.serve.repository.manifest import (
    MOST_MANIFEST_BYTES,
    EngineRecord,
    FileRecord,
    Manifest,
    why_not_published,
    write_manifest,
)


@dataclass(frozen=True)
class PublishOptions:
    """How a version is published, and what is known of it.

    Attributes:
        key: PEM file of the private key to sign with; None: it is not signed.
        metrics: of the model, by name; a name ends in its unit: "size_bytes".
        engine_metrics: file -> metrics of that engine: {"latency_us": 431.0}.
        lineage: what it was made from, as plain data; see `lineage.of_run`.
        message: why, for the history.
        by: who; "": user@machine.
        storage: options of fsspec's file system.
        report: told of what is copied.
    """

    key: Path | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    engine_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""
    by: str = ""
    storage: Mapping[str, Any] = field(default_factory=dict)
    report: Report = silent


@dataclass(frozen=True)
class Published:
    """A version that is there.

    Attributes:
        version: its number.
        place: of its folder.
        manifest: of it.
        signed_by: name of the key; "" where it is not signed.
        existed: the same files had been published before as this version; nothing was written.
    """

    version: int
    place: str
    manifest: Manifest
    signed_by: str
    existed: bool


def publish(
    repository: str, name: str, files: Mapping[str, Path], options: PublishOptions | None = None
) -> Published:
    """Publishes the next version of a model, or finds the version that has just these files.

    Args:
        repository: a folder, made if it is not there, or a URL that fsspec writes to.
        name: of the model.
        files: name in the version's folder -> the file: engines, ONNX files and their data.
        options: how.

    Raises:
        InputError: a name, a file or the key cannot be used, or the repository cannot be written;
            then nothing of the version is there.
        EngineError: an engine is damaged.
    """
    options = options or PublishOptions()
    place = open_place(repository, options.storage)
    signer = Signer(options.key) if options.key is not None else None
    _require_names(name, files, options)
    records = _hashed(files)
    engines = tuple(_engine(files[r.name], r.name, options) for r in records if _is_engine(r.name))
    versions = numbered(name, model_folder(place, name))
    if (same := _same(place, versions.values(), records, signer)) is not None:
        return Published(same.version, f"{place.shown}/{name}/{same.version}", same, *_old(signer))
    history = read_history(place, name)
    first = max([history.highest, *versions], default=0) + 1
    created, previous = now(), max(versions, default=None)

    def manifest_of(number: int) -> Manifest:
        lineage, metrics = dict(options.lineage), {k: float(v) for k, v in options.metrics.items()}
        made = (records, engines, metrics, options.message, lineage)
        return Manifest(name, number, created, previous, *made)

    last = partial(_last, manifest_of, signer)
    last(first)  # what cannot be written is found out before anything is
    number = place.publish(Draft(name, files, records, last, options.report), first)
    event = Event(PUBLISH, number, created, options.by or who(), options.message)
    add_event(place, name, event, history)
    shown = f"{place.shown}/{name}/{number}"
    return Published(number, shown, manifest_of(number), signer.name if signer else "", False)


def _old(signer: Signer | None) -> tuple[str, bool]:
    return signer.name if signer else "", True


def _last(manifest_of: Any, signer: Signer | None, number: int) -> dict[str, bytes]:
    """What is written for a number when all else is there: the manifest in the end.

    Raises:
        InputError: the metadata cannot be written, or is too large.
    """
    try:
        content = write_manifest(manifest_of(number))
    except (TypeError, ValueError, RecursionError) as e:
        expected = "expected plain data: texts, finite numbers, lists, objects"
        raise InputError("the metadata cannot be published", [expected, str(e)], "mend it") from e
    if len(content) > MOST_MANIFEST_BYTES:
        sizes = f"expected at most {MOST_MANIFEST_BYTES} bytes, got {len(content)}"
        raise InputError("the metadata is too large", [sizes], "leave some of the lineage out")
    signature = {SIGNATURE: signer.sign(content)} if signer is not None else {}
    return {**signature, MANIFEST: content}


def _require_names(name: str, files: Mapping[str, Path], options: PublishOptions) -> None:
    """Refuses names that a server would, and metrics of no file.

    Raises:
        InputError: with all reasons.
    """
    problems = [f"{name!r}: {reason}" for reason in [why_not_model(name)] if reason]
    problems += [f"{file!r}: {reason}" for file in files if (reason := why_not_published(file))]
    if len(files) > Limits.files:
        problems.append(f"expected at most {Limits.files} files, got {len(files)}")
    if not any(file.endswith((ENGINE, ONNX)) for file in files):
        problems.append(f"expected an {ENGINE} or an {ONNX} file, got {len(files)} others")
    problems += [f"{path} is no file" for path in files.values() if not path.is_file()]
    unknown = [file for file in options.engine_metrics if file not in files]
    problems += [f"metrics of {file!r}, which is not published" for file in unknown]
    if problems:
        fix = "mend the names; NAME=FILE publishes a file under another name"
        raise InputError("this cannot be published", problems, fix)


def _hashed(files: Mapping[str, Path]) -> tuple[FileRecord, ...]:
    return tuple(FileRecord(name, *hash_file(files[name])) for name in sorted(files))


def _is_engine(name: str) -> bool:
    return name.endswith(ENGINE)


def _engine(path: Path, name: str, options: PublishOptions) -> EngineRecord:
    """A row of the engine table; the whole engine is read, so that no damaged one is published."""
    plan = Engine.load(path).plan
    target = plan.target
    made = (plan.threads, FORMAT, plan.version, plan.source_sha256)
    metrics = {k: float(v) for k, v in options.engine_metrics.get(name, {}).items()}
    return EngineRecord(name, target.isa, target.arch, target.model, target.bf16, *made, metrics)


def _same(
    place: Place,
    versions: Any,
    records: Sequence[FileRecord],
    signer: Signer | None,
) -> Manifest | None:
    """The newest version that has just these files, and is signed by this key if there is one."""
    sizes = {record.name: record.size_bytes for record in records}
    for version in sorted(versions, key=lambda each: -each.number):
        if not _may_be(version, sizes):
            continue
        trust = signer.public if signer is not None else None
        found = read_published(place, version, trust)
        if found is not None and found.files == tuple(records):
            return found
    return None


def _may_be(version: VersionEntry, sizes: Mapping[str, int]) -> bool:
    """By the listing alone: a published version of files of these names and sizes."""
    found = {file.name: file.size_bytes for file in version.files}
    found.pop(SIGNATURE, None)
    return found.pop(MANIFEST, None) is not None and found == sizes
