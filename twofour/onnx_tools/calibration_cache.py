"""The calibration cache: what calibration saw of each tensor, in one JSON file.

    {"format": "twofour calibration 1",
     "model": SHA-256 of the float model that was run: operators, names of values, weights
     "data": {"samples": 512, "sha256": of them}, null before the first pass over the data is done
     "running": the same of the pass that has not ended, null if none
     "tensors": {NAME: {"samples": 512, "low": ..., "high": ..., "limit": ..., "zeros": ...,
                        "average_low": ..., "average_high": ..., "counts": "16384:12,7 16388:1"}}}

Each tensor stands on a line of its own. `counts` are the bins that are not empty, in runs: the
first bin, a colon, the counts (bins and the other fields: `core/histogram.py`). So the file has
what every method of choosing ranges needs: another method, or int8 instead of uint8, needs no run.

A file is written to another name first and then renamed, and again every few seconds while
calibration runs; what was interrupted goes on at the sample where the file stands.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.core.data import Batch
from twofour.core.errors import InputError
from twofour.core.histogram import Histogram, Summary
from twofour.core.records import from_plain, to_plain
from twofour.core.writing import write_whole

FORMAT = "twofour calibration 1"
MAX_BYTES = 1 << 28
"""Of a file that is read; a tensor takes 20 to 200 kB."""


@dataclass(frozen=True)
class Seen:
    """The samples that a model was run on.

    Attributes:
        samples: how many.
        sha256: of them, in order; "" for none.
    """

    samples: int = 0
    sha256: str = ""

    def then(self, batch: Batch) -> Seen:
        """These and the batch. How samples are cut into batches makes no difference."""
        digest = self.sha256
        arrays = [(name, np.ascontiguousarray(batch.inputs[name])) for name in sorted(batch.inputs)]
        for i in range(len(batch)):
            sample = hashlib.sha256(digest.encode())
            for name, array in arrays:
                sample.update(f"{name} {array.dtype.str} {array.shape[1:]};".encode())
                sample.update(array[i : i + 1].tobytes())
            digest = sample.hexdigest()
        return Seen(self.samples + len(batch), digest)


@dataclass(frozen=True)
class _Tensor:
    samples: int
    low: float
    high: float
    limit: float
    zeros: int
    average_low: float
    average_high: float
    counts: str


@dataclass(frozen=True)
class _Document:
    format: str
    model: str
    data: Seen | None
    running: Seen | None
    tensors: dict[str, _Tensor]


@dataclass
class CalibrationCache:
    """What is known of a model's tensors.

    Attributes:
        path: of the file; None for memory only.
        model: `model_digest` of the model.
        data: the samples of the passes that are done; None before the first.
        running: those of the pass that is not.
        histograms: tensor -> what was seen of it.
        samples: tensor -> on how many samples.
    """

    path: Path | None
    model: str
    data: Seen | None = None
    running: Seen | None = None
    histograms: dict[str, Histogram] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None, model: ir.Model) -> CalibrationCache:
        """What the file holds; nothing if there is no file yet.

        Args:
            path: of the file; None for memory only.
            model: that is calibrated.

        Raises:
            InputError: the file cannot be read or is no whole cache, it is of another model, or
                there is no such folder.
        """
        cache = cls(None if path is None else Path(path), "" if path is None else digest_of(model))
        if cache.path is None or not cache.path.exists():
            cache._require_folder()
            return cache
        document = _read(cache.path)
        if document.model != cache.model:
            raise InputError(
                f"the calibration cache {path} is of another model",
                [
                    f"expected model {cache.model[:16]}, that of this graph and its weights",
                    f"got {document.model[:16]}",
                ],
                "name another file for this model, or delete this one to calibrate anew",
            )
        cache.data, cache.running = document.data, document.running
        for name, tensor in document.tensors.items():
            cache.histograms[name] = _histogram(cache.path, name, tensor)
            cache.samples[name] = tensor.samples
        return cache

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those that no pass over all samples has seen."""
        done = -1 if self.data is None else self.data.samples
        return [name for name in names if self.samples.get(name, -2) != done]

    def begin(self, names: Iterable[str]) -> Seen:
        """Where to go on with tensors that are missing: their histograms are there afterwards.

        Returns:
            The samples that need not be run again: none if the pass that was interrupted was one
            for other tensors.
        """
        names, running = set(names), self.running or Seen()
        done = 0 if self.data is None else self.data.samples
        left = {name for name, samples in self.samples.items() if samples != done}
        if left != names or any(self.samples[name] != running.samples for name in left):
            for name in left | names:
                self.samples.pop(name, None)
                self.histograms.pop(name, None)
            running = Seen()
            for name in sorted(names):
                self.histograms[name] = Histogram()
        return running

    def save(self, names: Iterable[str], seen: Seen, done: bool) -> None:
        """Writes the file.

        Args:
            names: tensors that the pass is for.
            seen: samples of the pass so far.
            done: whether these are all.

        Raises:
            InputError: it cannot be written.
        """
        if not done and self.data is not None and seen.samples == self.data.samples:
            return  # a file that says so would say that the pass is done
        for name in names:
            self.samples[name] = seen.samples
        self.data, self.running = (seen, None) if done else (self.data, seen)
        if self.path is not None:
            _write(self.path, self._text())

    def _text(self) -> str:
        head = {"format": FORMAT, "model": self.model}
        head |= {"data": to_plain(self.data), "running": to_plain(self.running)}
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        tensors = []
        for name, histogram in self.histograms.items():
            plain = {"samples": self.samples[name], **to_plain(histogram.summary)}
            plain["counts"] = histogram.counts_text()
            tensors.append(f"  {json.dumps(name)}: {json.dumps(plain)}")
        body = ",\n".join(tensors)
        return "{\n" + ",\n".join(lines) + ',\n "tensors": {\n' + body + "\n }\n}\n"

    def _require_folder(self) -> None:
        """A wrong path is better found before the work."""
        if self.path is not None and not self.path.parent.is_dir():
            raise InputError(
                f"cannot write the calibration cache {self.path}",
                [f"there is no folder {self.path.parent}"],
                "name a file in an existing folder",
            )


def digest_of(model: ir.Model) -> str:
    """SHA-256 of what a model computes: operators, names of values, attributes, weights.

    Names of nodes, texts for people, and metadata are no part of it.
    """
    found = hashlib.sha256()
    versions = sorted((domain or "", version) for domain, version in model.opset_imports.items())
    found.update(repr(versions).encode())
    _digest_graph(model.graph, found)
    return found.hexdigest()


def _digest_graph(graph: ir.Graph, found: Any) -> None:
    for value in (*graph.inputs, *graph.outputs):
        found.update(f"{value.name} {value.dtype} {value.shape};".encode())
    for name in sorted(graph.initializers):
        tensor = graph.initializers[name].const_value
        if tensor is not None:
            found.update(f"{name} {tensor.dtype} {tensor.shape};".encode())
            found.update(tensor.tobytes())
    for node in graph:
        inputs = [None if value is None else value.name for value in node.inputs]
        outputs = [value.name for value in node.outputs]
        found.update(repr((node.domain, node.op_type, node.overload, inputs, outputs)).encode())
        for name in sorted(node.attributes):
            _digest_attribute(node.attributes[name], found)


def _digest_attribute(attribute: ir.Attr, found: Any) -> None:
    found.update(f"{attribute.name} {attribute.type};".encode())
    several = isinstance(attribute.value, (list, tuple))
    for value in attribute.value if several else [attribute.value]:
        if isinstance(value, ir.Graph):
            _digest_graph(value, found)
        elif isinstance(value, ir.TensorProtocol):
            found.update(f"{value.dtype} {value.shape};".encode())
            found.update(value.tobytes())
        else:
            found.update(f"{value!r};".encode())


def _read(path: Path) -> _Document:
    try:
        if not path.is_file():
            raise OSError(f"{path} is no file, but a folder, a pipe or a device")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"cannot read the calibration cache {path}", [str(error)], "name a readable file"
        ) from error
    if len(content) > MAX_BYTES:
        raise _damaged(path, f"expected at most {MAX_BYTES} bytes, got more")
    try:
        plain = json.loads(content, parse_constant=_no_number, object_pairs_hook=_each_once)
        document = from_plain(_Document, plain, "cache")
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{error}" or "nested too deep") from error
    if document.format != FORMAT:
        raise _damaged(path, f"expected format {FORMAT!r}, got {document.format[:60]!r}")
    for seen in (document.data, document.running):
        if seen is not None and seen.samples < 1:
            raise _damaged(path, f"expected 1 sample or more, got {seen.samples}")
    return document


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values for one key the second would hold without a word."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key[:60]!r} is there twice")
        found[key] = value
    return found


def _histogram(path: Path, name: str, tensor: _Tensor) -> Histogram:
    summary = Summary(
        tensor.low,
        tensor.high,
        tensor.limit,
        tensor.zeros,
        tensor.average_low,
        tensor.average_high,
    )
    try:
        return Histogram.restored(summary, tensor.counts)
    except ValueError as error:
        raise _damaged(path, f"tensor {name!r}: {error}") from error


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is no calibration cache, or a damaged one",
        [reason],
        "delete the file to calibrate anew, or name another",
    )


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise InputError(
            f"cannot write the calibration cache {path}",
            [str(error)],
            "name a file in a folder of yours",
        ) from error
