"""What lies in a repository, as plain data: files -> versions -> models -> snapshot.

    REPOSITORY/MODEL/config.yaml         optional, see config.py
    REPOSITORY/MODEL/VERSION/*.engine    one or several, for several kinds of machine
    REPOSITORY/MODEL/VERSION/*.onnx      what they were made of, its external data beside it
    REPOSITORY/MODEL/VERSION/manifest.json, manifest.sig    of a published one, see manifest.py

A `Folder` is names, sizes and tags, from wherever it came; what is made of it is decided here, for
folders and object stores alike. One bad name hides nothing else: it is kept with its reason.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from twofour.serve.repository.config import ModelConfig

CONFIG = "config.yaml"
ENGINE = ".engine"
ONNX = ".onnx"
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
CLAIM = ".publishing"
"""Written first into the folder of a version that is published where nothing can be renamed: while
there is no manifest beside it, the version is not whole."""

_MODEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGITS = re.compile(r"[0-9]+")
_MOST_VERSION = 2**31 - 1
_MOST_NAME_BYTES = 255


@dataclass(frozen=True)
class Limits:
    """What a repository may hold; what goes beyond is refused by name.

    Attributes:
        models: in it.
        versions: of one model.
        files: of one version, or beside one config.yaml.
        bytes: of the files of one version together, or of those beside one config.yaml.
    """

    models: int = 10_000
    versions: int = 1_000
    files: int = 10_000
    bytes: int = 256 << 30


@dataclass(frozen=True)
class File:
    """A regular file.

    Attributes:
        name: within its folder.
        size_bytes: of it.
        tag: changes when its content does: time of change and inode, or the store's own.
    """

    name: str
    size_bytes: int
    tag: str


@dataclass(frozen=True)
class Folder:
    """What was found in a folder, before anything is made of it.

    Attributes:
        files: name -> the file, or why it cannot be used: not readable, no regular file, a link
            that leads outside.
        folders: name -> likewise.
    """

    files: dict[str, File | str] = field(default_factory=dict)
    folders: dict[str, Folder | str] = field(default_factory=dict)


@dataclass(frozen=True)
class VersionEntry:
    """A version of a model, as it lies there.

    Attributes:
        model: its name.
        number: of the version.
        files: ascending by name.
        problems: why others in its folder are not among them, one line each.
        fingerprint: changes when a file or a problem does.
    """

    model: str
    number: int
    files: tuple[File, ...]
    problems: tuple[str, ...]
    fingerprint: str

    @property
    def title(self) -> str:
        """As messages name it."""
        return f"version {self.number} of model {self.model!r}"

    @cached_property
    def engines(self) -> tuple[str, ...]:
        """Names of its engine files."""
        return tuple(file.name for file in self.files if file.name.endswith(ENGINE))

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of what an engine is built of: all its other files but the manifest."""
        others = (file.name for file in self.files if not file.name.endswith(ENGINE))
        return tuple(name for name in others if name not in (MANIFEST, SIGNATURE))


@dataclass(frozen=True)
class ModelEntry:
    """A model, as it lies there.

    Attributes:
        name: of the model.
        config: its configuration; all defaults without a file; None where `problem` says why.
        problem: why the configuration cannot be used; "" where it can.
        versions: number -> version, ascending.
        problems: what else in its folder cannot be used, one line each.
        files: beside its versions, ascending by name, config.yaml among them.
        fingerprint: of config.yaml and the files beside it; the versions have their own.
    """

    name: str
    config: ModelConfig | None
    problem: str
    versions: Mapping[int, VersionEntry]
    problems: tuple[str, ...]
    files: tuple[File, ...]
    fingerprint: str


@dataclass(frozen=True)
class Snapshot:
    """What was in the repository at one time.

    Attributes:
        models: name -> model, ascending.
        refused: name as it may be shown -> why there is no such model.
    """

    models: Mapping[str, ModelEntry]
    refused: Mapping[str, str]


EMPTY = Snapshot({}, {})


def shown(name: str) -> str:
    """A name as a message may show it: one line of printable characters, not without end."""
    text = ascii(name)[1:-1] if not name.isprintable() else name
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_hidden(name: str) -> bool:
    """Whether it is left out without a word: `.git`, and what rsync and editors are writing."""
    return name.startswith(".")


def why_not_model(name: str) -> str:
    """Why a folder cannot be a model; "" if it can. Its name stands in URLs and in metrics."""
    if _MODEL.fullmatch(name):
        return ""
    return (
        "a model's name has 1 to 128 of the characters A-Z a-z 0-9 _ . - "
        "and begins with a letter, a digit or _; rename the folder"
    )


def why_not_file(name: str) -> str:
    """Why a file cannot be used by its name; "" if it can."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        return "a file's name is one name of printable characters; rename it"
    if len(name.encode()) > _MOST_NAME_BYTES:
        return f"a file's name has at most {_MOST_NAME_BYTES} bytes; rename it"
    return ""


def why_not_version(name: str) -> str:
    """Why a folder of digits cannot be a version; "" if it can."""
    if len(name) > 10 or name.startswith("0") or int(name) > _MOST_VERSION:
        return f"a version is a number from 1 to {_MOST_VERSION} without leading zeros; rename it"
    return ""


def sort_models(root: Folder, limits: Limits) -> tuple[dict[str, Folder], dict[str, str]]:
    """The models of a repository, ascending, and what is refused: name as shown -> reason.

    Args:
        root: the repository.
        limits: of it.
    """
    found: dict[str, Folder] = {}
    refused = {}
    for name, folder in sorted(root.folders.items()):
        reason = folder if isinstance(folder, str) else why_not_model(name)
        if not reason and len(found) >= limits.models:
            reason = f"the repository has more than {limits.models} models"
        if reason or isinstance(folder, str):
            refused[shown(name)] = reason
        else:
            found[name] = folder
    return found, refused


def sort_versions(
    model: str, folder: Folder, limits: Limits
) -> tuple[dict[int, VersionEntry], tuple[str, ...]]:
    """The versions of a model, ascending, and why others are refused; the highest ones count first.

    Args:
        model: its name.
        folder: its folder; others than those of digits mean nothing.
        limits: of the repository.
    """
    numbers = [name for name in folder.folders if _DIGITS.fullmatch(name)]
    found: dict[int, VersionEntry] = {}
    problems = []
    for name in sorted(numbers, key=lambda name: (len(name), name), reverse=True):
        inner = folder.folders[name]
        reason = inner if isinstance(inner, str) else why_not_version(name)
        if not reason and len(found) >= limits.versions:
            reason = f"the model has more than {limits.versions} versions"
        if reason or isinstance(inner, str):
            problems.append(f"{shown(name)}: {reason}")
        else:
            files, wrong = sort_files(inner, limits)
            tag = fingerprint(files, wrong)
            found[int(name)] = VersionEntry(model, int(name), files, wrong, tag)
    return dict(sorted(found.items())), tuple(problems)


def sort_files(folder: Folder, limits: Limits) -> tuple[tuple[File, ...], tuple[str, ...]]:
    """The files of a folder that may be used, ascending by name, and why others may not.

    Args:
        folder: of a version, or of a model.
        limits: of a version.
    """
    files: list[File] = []
    problems = []
    size_bytes = 0
    for name, file in sorted(folder.files.items()):
        reason = file if isinstance(file, str) else why_not_file(name)
        if not reason and len(files) >= limits.files:
            reason = f"the folder has more than {limits.files} files"
        if not reason and isinstance(file, File) and size_bytes + file.size_bytes > limits.bytes:
            reason = f"the folder's files are larger than {limits.bytes} bytes together"
        if reason or isinstance(file, str):
            problems.append(f"{shown(name)}: {reason}")
        else:
            files.append(file)
            size_bytes += file.size_bytes
    return tuple(files), tuple(problems)


def fingerprint(files: tuple[File, ...], problems: tuple[str, ...] = ()) -> str:
    """32 hexadecimal digits that change when a file or a problem does."""
    plain = [[[file.name, file.size_bytes, file.tag] for file in files], list(problems)]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:32]
