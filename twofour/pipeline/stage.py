"""A stage: what it is made of, what it depends on, and what it leaves behind, as plain data.

A stage's key is the hash of its name, its settings and the hashes of what it reads. A stage whose
key has been seen before, and whose files are still what they were, is not done again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twofour.core.progress import Report
from twofour.core.version import __version__

FORMAT = 1  # of what a stage writes and means; part of every key
KINDS = (
    "load",
    "sparsify",
    "finetune",
    "qat",
    "export",
    "sensitivity",
    "quantize",
    "build",
    "evaluate",
    "benchmark",
    "gate",
    "publish",
    "report",
)
"""Of stages, in their order."""
_SHOWN = 12  # characters of a key in the name of a folder


def folder_of(name: str, key: str) -> str:
    """The name of the folder of a stage's result."""
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{key[:_SHOWN]}"


@dataclass(frozen=True)
class Source:
    """Something that the user gave.

    Attributes:
        place: path, absolute; or module:function.
        kind: "onnx", "data", "checkpoint", "code", "baseline", ...
    """

    place: str
    kind: str


@dataclass(frozen=True)
class From:
    """A file of an earlier stage.

    Attributes:
        stage: name of it.
        output: name of the file there.
    """

    stage: str
    output: str = "model"


Input = Source | From


@dataclass(frozen=True)
class Output:
    """A file that a stage wrote.

    Attributes:
        file: its name within the stage's folder.
        kind: "onnx", "engine", "masks", "calibration", "checkpoint", ...
        made_from: names of the inputs that it was made from; None for all of them.
    """

    file: str
    kind: str
    made_from: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Made:
    """What a stage did.

    Attributes:
        outputs: name -> file.
        text: what came of it, in one line.
        facts: plain data that later stages, the result and the report are made of.
        notes: what the user should know.
    """

    outputs: Mapping[str, Output]
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What a stage is given when it runs.

    Attributes:
        inputs: name -> path, or module:function.
        hashes: name of an input -> SHA-256 of it.
        facts: name of an input -> facts of the stage that wrote it.
        folder: empty; the stage writes here.
        scratch: outlives a stage that was ended early, for what it may go on from.
        cache: of the whole run: measured times, ranges.
        report: told how far it is.
    """

    inputs: Mapping[str, str]
    hashes: Mapping[str, str]
    facts: Mapping[str, Mapping[str, Any]]
    folder: Path
    scratch: Path
    cache: Path
    report: Report


@dataclass(frozen=True)
class Stage:
    """A stage, before it runs.

    Attributes:
        name: of it, unique within a run: "build 2:4-PTQ cpu".
        kind: one of `KINDS`, which --from names.
        settings: all that it depends on beside its inputs; plain data.
        inputs: by name.
        work: does it.
        holds: whether what an earlier run left outside the run's folder is still there, by facts.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Input]
    work: Callable[[Task], Made]
    holds: Callable[[Mapping[str, Any]], bool] = lambda facts: True

    def key(self, hashes: Mapping[str, str]) -> str:
        """SHA-256 of all that the result depends on.

        Args:
            hashes: name of each input -> SHA-256 of it.
        """
        parts = [FORMAT, __version__, self.name, self.settings, dict(hashes)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Kept:
    """A file of a stage that has run.

    Attributes:
        file: its name within the stage's folder.
        kind: of it.
        sha256: of its content.
        size_bytes: of it.
        made_from: names of inputs.
    """

    file: str
    kind: str
    sha256: str
    size_bytes: int
    made_from: tuple[str, ...]


@dataclass(frozen=True)
class Given:
    """An input of a stage that has run.

    Attributes:
        place: file within the run's folder; of the user's, its path or module:function.
        kind: of a source; "" of what an earlier stage wrote.
        sha256: of its content.
        size_bytes: of it.
    """

    place: str
    kind: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Result:
    """A stage that has run: the content of its stage.json.

    Attributes:
        name: of the stage.
        key: of it.
        settings: plain data.
        inputs: by name.
        outputs: by name.
        seconds: that it took.
        text: what came of it.
        facts: plain data.
        notes: what the user should know.
        version: of the package.
    """

    name: str
    key: str
    settings: dict[str, Any]
    inputs: dict[str, Given]
    outputs: dict[str, Kept]
    seconds: float
    text: str
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()
    version: str = __version__

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return folder_of(self.name, self.key)
