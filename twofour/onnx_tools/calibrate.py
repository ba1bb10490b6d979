"""Runs a float model on sample data and chooses the range of each tensor that will be quantized.

One pass, in bounded memory: ONNX Runtime returns the tensors of one batch, each goes into its
histogram (see `histogram.py`), and the batch is forgotten. The batch size follows from the size of
the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from twofour.core.data import Batch, Data, DataLike, as_data
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.progress import Report
from twofour.onnx_tools.histogram import Histogram, Range, choose_range
from twofour.onnx_tools.load import model_bytes
from twofour.onnx_tools.options import QuantizeOptions

BATCH_BYTES = 128 * 2**20
"""The most that the tensors of one batch should take."""
MAX_BATCH = 64
BATCH_IF_UNKNOWN = 4
"""Where the shapes do not tell."""

Array = NDArray[Any]
_ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


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
        data: what the model will see; some hundred samples. See `twofour.core.data`.
        options: method, percentile, samples and threads count here.
        progress: called after each batch with the samples done.

    Returns:
        One range for each name, in their order.

    Raises:
        InputError: the data is empty, does not fit the model's inputs, or it or a tensor is not
            finite.
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    options = options or QuantizeOptions()
    source = as_data(data, [str(value.name) for value in model.graph.inputs])
    fixed = _fixed_batch(model)
    size = fixed or _batch_size(model, tensors)
    histograms = {name: Histogram() for name in tensors}
    runner = _Runner(model, tensors, options.threads)
    total = source.count if source.count is None else min(source.count, options.samples or 2**62)
    for index, batch in enumerate(source.batches(size, options.samples)):
        _require_fit(model, source, batch)
        found = runner.run(batch.inputs if fixed is None else _filled(batch.inputs, fixed))
        for name, array in found.items():
            _add(histograms[name], array, name, (source, index, batch))
        if progress is not None:
            progress(batch.start + len(batch), total, "calibrating")
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
        except _ORT_ERRORS as error:
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
        except _ORT_ERRORS as error:
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
    values = {value.name: value for node in clone.graph for value in node.outputs}
    present = {value.name for value in clone.graph.outputs}
    for name in tensors:
        if name not in values:
            raise InputError(f"no tensor {name!r} to calibrate", [], "name one of the main graph")
        if name not in present:
            value = values[name]
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
            clone.graph.outputs.append(value)
    return model_bytes(clone)


def _fixed_batch(model: ir.Model) -> int | None:
    """The batch size that the model was exported with; None if any will do."""
    for value in model.graph.inputs:
        if value.shape is not None and len(value.shape) and isinstance(value.shape[0], int):
            return value.shape[0]
    return None


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


def _filled(inputs: dict[str, Array], size: int) -> dict[str, Array]:
    """A last, smaller batch for a model of fixed batch size: its samples repeat."""
    return {name: np.resize(array, (size, *array.shape[1:])) for name, array in inputs.items()}


def _require_fit(model: ir.Model, source: Data, batch: Batch) -> None:
    problems = []
    for value in model.graph.inputs:
        array = batch.inputs[str(value.name)]
        dims = None if value.shape is None else [str(dim) for dim in value.shape]
        expected = f"{value.dtype.numpy() if value.dtype else '?'} [{', '.join(dims or '?')}]"
        if not _fits(value, array):
            shape = ", ".join(map(str, array.shape))
            problems.append(f"{value.name}: expected {expected}, got {array.dtype} [{shape}]")
    if problems:
        raise InputError(
            f"data {source.source} does not fit the model's inputs",
            problems,
            "prepare the samples as for inference, x.astype(numpy.float32) for instance",
        )


def _fits(value: ir.Value, array: Array) -> bool:
    if value.dtype is not None and array.dtype != value.dtype.numpy():
        return False
    if value.shape is None:
        return True
    same = [
        dim == size or not isinstance(dim, int)
        for dim, size in zip(value.shape.dims[1:], array.shape[1:], strict=False)
    ]
    return len(value.shape) == array.ndim and all(same)


def _add(histogram: Histogram, array: Array, name: str, where: tuple[Data, int, Batch]) -> None:
    try:
        histogram.add(array)
    except ValueError as error:
        source, index, batch = where
        raise InputError(
            f"tensor {name!r} is not finite while calibrating",
            [
                f"batch {index} of data {source.source} (samples {batch.start} to "
                f"{batch.start + len(batch) - 1}) makes it NaN or infinite"
            ],
            "check these samples, and that the float model gives finite results for them",
        ) from error
