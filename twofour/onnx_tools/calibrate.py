"""Runs a float model on sample data and chooses the range of each tensor that will be quantized.

One pass, in bounded memory: ONNX Runtime returns the tensors of one batch, each goes into its
histogram (see `histogram.py`), and the batch is forgotten. The batch size follows from the size of
the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from twofour.core.data import Batch, Data, DataLike, as_data
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.feeds import runs
from twofour.core.progress import Report
from twofour.onnx_tools.histogram import Histogram, Range, choose_range
from twofour.onnx_tools.load import model_bytes
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.reference import REFUSED, add_outputs, input_form

BATCH_BYTES = 128 * 2**20
"""The most that the tensors of one batch should take."""
MAX_BATCH = 64
BATCH_IF_UNKNOWN = 4
"""Where the shapes do not tell."""

Array = NDArray[Any]


def calibrate(
    model: ir.Model,
    tensors: Sequence[str],
    data: DataLike,
    options: QuantizeOptions | None = None,
    progress: Report | None = None,
) -> dict[str, Range]:
    """Chooses a range for each tensor from what it holds while the model runs on the data.

    Deterministic: the same model, data and options give the same ranges.

    Args:
        model: float, with the types of its values known; it stays as it is.
        tensors: names of float32 values of the main graph, inputs among them.
        data: what the model will see; some hundred samples. See `core/data.py` and
            `core/feeds.py`.
        options: method, percentile, samples and threads count here.
        progress: called after each batch with the samples done.

    Returns:
        One range for each name, in their order.

    Raises:
        InputError: the data is empty, does not fit the model's inputs, or it or a tensor is not
            finite; or a tensor is empty in every run.
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    options = options or QuantizeOptions()
    source = as_data(data, [str(value.name) for value in model.graph.inputs])
    forms = [input_form(value) for value in model.graph.inputs]
    histograms = {name: Histogram() for name in tensors}
    runner = _Runner(model, tensors, options.threads)
    total = source.count if source.count is None else min(source.count, options.samples or 2**62)
    for run in runs(source, forms, _batch_size(model, tensors), options.samples):
        for name, array in runner.run(run.feeds).items():
            _add(histograms[name], array, name, (source, run.batch))
        if progress is not None:
            progress(run.batch.start + len(run.batch), total, "calibrating")
    _require_seen(histograms, source)
    return {name: choose_range(histogram, options) for name, histogram in histograms.items()}


class _Runner:
    """The model in ONNX Runtime, with the wanted tensors as its outputs."""

    def __init__(self, model: ir.Model, tensors: Sequence[str], threads: int) -> None:
        inputs = {str(value.name) for value in model.graph.inputs}
        self._inner = [name for name in tensors if name not in inputs]
        self._given = [name for name in tensors if name in inputs]
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.log_severity_level = 3
        try:
            content = _with_outputs(model, self._inner)
            self._session = ort.InferenceSession(content, settings, ["CPUExecutionProvider"])
        except REFUSED as error:
            raise UnsupportedError(
                "ONNX Runtime cannot load the model for calibration",
                [str(error)],
                "check that the float model runs on ONNX Runtime",
            ) from error

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """The wanted tensors for one batch."""
        try:
            # With no name given, ONNX Runtime would return all outputs.
            found = self._session.run(self._inner, inputs) if self._inner else []
        except REFUSED as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
            raise InputError(
                "the model fails on the calibration data",
                [f"inputs: {shapes}", str(error)],
                "check that the float model runs on this data",
            ) from error
        arrays = dict(zip(self._inner, found, strict=True))
        return arrays | {name: inputs[name] for name in self._given}


def _with_outputs(model: ir.Model, tensors: Sequence[str]) -> bytes:
    clone = model.clone()
    missing = set(tensors) - set(add_outputs(clone, tensors))
    if missing:
        raise InputError(
            f"no tensor {min(missing)!r} to calibrate", [], "name one of the main graph"
        )
    return model_bytes(clone)


def _batch_size(model: ir.Model, tensors: Sequence[str]) -> int:
    """So many samples that the tensors take about `BATCH_BYTES`."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    shapes = [values[name].shape for name in tensors if name in values]
    elements = 0
    for shape in shapes:
        dims = shape.dims[1:] if shape is not None else ["unknown"]
        if not all(isinstance(dim, int) for dim in dims):
            return BATCH_IF_UNKNOWN
        elements += math.prod(dim for dim in dims if isinstance(dim, int))
    return min(max(BATCH_BYTES // max(4 * elements, 1), 1), MAX_BATCH)


def _add(histogram: Histogram, array: Array, name: str, where: tuple[Data, Batch]) -> None:
    try:
        histogram.add(array)
    except ValueError as error:
        source, batch = where
        last = batch.start + len(batch) - 1
        samples = (
            f"sample {last} makes"
            if last == batch.start
            else f"one of samples {batch.start} to {last} makes"
        )
        raise InputError(
            f"tensor {name!r} is not finite while calibrating",
            [f"data {source.source}: {samples} it NaN or infinite"],
            "check these samples, and that the float model gives finite results for them",
        ) from error


def _require_seen(histograms: dict[str, Histogram], source: Data) -> None:
    """Refuses ranges of tensors that were empty in every run: any number would be a guess."""
    unseen = [name for name, histogram in histograms.items() if histogram.empty]
    if unseen:
        raise InputError(
            f"data {source.source} never reaches {len(unseen)} tensors that need a range",
            [f"empty in every run: {', '.join(unseen[:8])}"],
            "give samples for which the model computes them, or exclude the nodes that read them",
        )
