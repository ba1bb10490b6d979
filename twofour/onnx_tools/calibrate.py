"""Runs a float model on sample data and chooses the range of each tensor that will be quantized.

One pass, in bounded memory: ONNX Runtime returns the tensors of one batch, a large model's piece by
piece (`segments.py`); each goes into its histogram (`core/histogram.py`), and the batch is
forgotten.

A batch is 16 consecutive samples, counted from the first one: `average` depends on it. A run is one
batch, or as small a part of it as the tensors' memory allows, or as many samples as the model takes
at once; it belongs to the batch of its first sample. So neither the machine nor the number of
threads has a say.

With a cache (`calibration_cache.py`), what was seen is kept, and what is known is not run again. A
calibration table of TensorRT can stand in its place (`tensorrt_table.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from twofour.core.data import Batch, Data, DataLike, as_data
from twofour.core.errors import InputError
from twofour.core.feeds import runs
from twofour.core.histogram import Histogram
from twofour.core.progress import Report, silent
from twofour.core.ranges import Range, choose_range
from twofour.onnx_tools.calibration_cache import CalibrationCache, Seen
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.reference import input_form
from twofour.onnx_tools.runner import batch_size, not_finite
from twofour.onnx_tools.segments import Segments
from twofour.onnx_tools.tensorrt_table import is_table, ranges_of, read_table

SAMPLES_A_BATCH = 16
SAVE_EVERY_S = 5.0
"""Between two versions of the cache while calibration runs."""

Array = NDArray[Any]
Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Calibration:
    """What calibration found.

    Attributes:
        ranges: one for each tensor, in the order in which they were asked for.
        histograms: of those that were not taken from a table.
        note: where the ranges come from, if not from running the model now; else "".
    """

    ranges: dict[str, Range]
    histograms: dict[str, Histogram] = field(default_factory=dict)
    note: str = ""


def calibrate(
    model: ir.Model,
    tensors: Sequence[str],
    data: DataLike | None,
    options: QuantizeOptions | None = None,
    progress: Report | None = None,
    cache: Path | None = None,
) -> dict[str, Range]:
    """Chooses a range for each tensor from what it holds while the model runs on the data.

    Deterministic: the same model, data and options give the same ranges.

    Args:
        model: float, with the types of its values known; it stays as it is.
        tensors: names of float32 values of the main graph, inputs among them.
        data: what the model will see; some hundred samples. See `core/data.py` and
            `core/feeds.py`. None where the cache has all that is needed.
        options: method, activation, percentile, samples and threads count here.
        progress: called after each run with the samples done.
        cache: a file that keeps what was seen: made, gone on with, or used, as it stands; or a
            calibration table of TensorRT, which is only read.

    Returns:
        One range for each name, in their order.

    Raises:
        InputError: the data is empty, does not fit the model's inputs, or it or a tensor is not
            finite; or a tensor is empty in every run. The cache is damaged, of another model or of
            other data, or lacks tensors and there is no data.
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    return calibrate_with_report(model, tensors, data, options, progress, cache).ranges


def calibrate_with_report(
    model: ir.Model,
    tensors: Sequence[str],
    data: DataLike | None,
    options: QuantizeOptions | None = None,
    progress: Report | None = None,
    cache: Path | None = None,
) -> Calibration:
    """As `calibrate`, with the histograms and where the ranges come from."""
    options = decided(options or QuantizeOptions(), cache)
    if cache is not None and is_table(cache):
        return _with_table(model, tensors, data, options, progress or silent, cache)
    known = CalibrationCache.open(cache, model)
    note = _Collection(model, options, progress or silent, known).bring(tensors, data)
    histograms = {name: known.histograms[name] for name in tensors}
    _require_seen(histograms, "the calibration cache" if data is None else _name_of(data))
    ranges = {name: choose_range(each, options.ranges) for name, each in histograms.items()}
    return Calibration(ranges, histograms, note)


def decided(options: QuantizeOptions, cache: str | os.PathLike[str] | None) -> QuantizeOptions:
    """With the type of activations, where the user left it open: that of a table's scales."""
    if options.activation is None and cache is not None and is_table(cache):
        return replace(options, activation="int8")
    return options


def _with_table(
    model: ir.Model,
    tensors: Sequence[str],
    data: DataLike | None,
    options: QuantizeOptions,
    progress: Report,
    path: Path,
) -> Calibration:
    """Ranges of a table; of tensors that it does not have, from the data."""
    known = ranges_of(read_table(path), options.ranges.activation, path)
    left = [name for name in tensors if name not in known]
    if left and data is None:
        raise _lacking(path, left, "the names are those of the ONNX file; ")
    rest = Calibration({})
    if left:
        rest = calibrate_with_report(model, left, data, options, progress)
    ranges = {name: known[name] if name in known else rest.ranges[name] for name in tensors}
    of_data = f", those of {len(left)} others from the data" if left else ", nothing was run"
    note = f"ranges of {len(tensors) - len(left)} tensors from TensorRT's table {path}{of_data}"
    return Calibration(ranges, rest.histograms, note)


@dataclass(frozen=True)
class _Collection:
    """One calibration: the model, how it is run, who is told, and what is known."""

    model: ir.Model
    options: QuantizeOptions
    progress: Report
    cache: CalibrationCache

    def bring(self, tensors: Sequence[str], data: DataLike | None) -> str:
        """Sees to it that the cache has the tensors; returns the note if nothing had to be run."""
        left, done = self.cache.missing(tensors), self.cache.data
        if data is None:
            if left or done is None:
                raise _lacking(self.cache.path, left)
        else:
            source = as_data(data, [str(value.name) for value in self.model.graph.inputs])
            if left or done is None:
                self._run(left, source)
                return ""
            self._require_same(source, done)
        self.progress(done.samples, done.samples, "nothing to run")
        return f"ranges from {self.cache.path}, {done.samples} samples seen before: nothing was run"

    def _run(self, names: Sequence[str], source: Data) -> None:
        """One pass over the data, from where the last one was interrupted."""
        resumed, seen = self.cache.begin(names), Seen()
        size = _run_size(self.model, names)
        segments = Segments(self.model, names, self.options.threads, size)
        forms = [input_form(value) for value in self.model.graph.inputs]
        saved = time.monotonic()
        for run in runs(source, forms, size, self.options.samples):
            before, seen = seen, seen.then(run.batch)
            if seen.samples > resumed.samples:
                if before.samples <= resumed.samples and before != resumed and resumed.samples:
                    raise self._other_data(source, before)
                self._count(names, segments, run.feeds, (source, run.batch))
                if seen.samples // SAMPLES_A_BATCH > before.samples // SAMPLES_A_BATCH:
                    self._close(names)
                    if time.monotonic() - saved > SAVE_EVERY_S:
                        self.cache.save(names, seen, done=False)
                        saved = time.monotonic()
            self.progress(seen.samples, self._total(source), "calibrating")
        short = seen.samples <= resumed.samples and seen != resumed
        if short or self.cache.data not in (None, seen):
            raise self._other_data(source, seen)
        self._close(names)
        self.cache.save(names, seen, done=True)

    def _count(
        self,
        names: Sequence[str],
        segments: Segments,
        feeds: dict[str, Array],
        where: tuple[Data, Batch],
    ) -> None:
        for part in segments.parts(feeds, len(where[1])):
            for arrays in segments.run(part):
                for name, array in arrays.items():
                    try:
                        self.cache.histograms[name].add(array)
                    except ValueError as error:
                        raise not_finite(name, *where) from error

    def _close(self, names: Sequence[str]) -> None:
        for name in names:
            self.cache.histograms[name].close_batch()

    def _total(self, source: Data) -> int | None:
        if source.count is None:
            return None
        return min(source.count, self.options.samples or source.count)

    def _require_same(self, source: Data, done: Seen) -> None:
        """Reads the data, which costs little beside running the model on it, and compares."""
        seen = Seen()
        for batch in source.batches(SAMPLES_A_BATCH, self.options.samples):
            seen = seen.then(batch)
            self.progress(seen.samples, self._total(source), "comparing the data with the cache's")
        if seen != done:
            raise self._other_data(source, seen)

    def _other_data(self, source: Data, seen: Seen) -> InputError:
        known = self.cache.running or self.cache.data or Seen()
        return InputError(
            f"the calibration cache {self.cache.path} was made from other data",
            [
                f"expected {known.samples} samples, SHA-256 {known.sha256[:16]}",
                f"got {seen.samples} from {source.source}, SHA-256 {seen.sha256[:16]}",
            ],
            "leave the data out to use the cache as it is, or delete it to calibrate anew",
        )


def _run_size(model: ir.Model, tensors: Sequence[str]) -> int:
    """Samples in a run: a power of two, so that runs end where batches do."""
    most = batch_size(model, tensors, SAMPLES_A_BATCH)
    return 1 << min(most, SAMPLES_A_BATCH).bit_length() - 1


def _lacking(path: Path | None, names: Sequence[str], more: str = "") -> InputError:
    found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return InputError(
        f"{path} does not have the ranges of {len(names)} tensors" if path else "no data",
        [f"missing: {found}"] if names else ["no pass over the data has ended"],
        f"{more}give data to calibrate with",
    )


def _name_of(data: DataLike) -> str:
    return f"data {data}" if isinstance(data, (str, os.PathLike)) else "the data"


def _require_seen(histograms: dict[str, Histogram], source: str) -> None:
    """Refuses ranges of tensors that were empty in every run: any number would be a guess."""
    unseen = [name for name, histogram in histograms.items() if histogram.empty]
    if unseen:
        raise InputError(
            f"{source} never reaches {len(unseen)} tensors that need a range",
            [f"empty in every run: {', '.join(unseen[:8])}"],
            "give samples for which the model computes them, or exclude the nodes that read them",
        )
