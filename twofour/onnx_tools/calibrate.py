"""Runs a float model on sample data and chooses the range of each tensor that will be quantized.

One pass, in bounded memory: ONNX Runtime returns the tensors of one batch, each goes into its
histogram (see `histogram.py`), and the batch is forgotten. The batch size follows from the size of
the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from twofour.core.data import Batch, Data, DataLike, as_data
from twofour.core.errors import InputError
from twofour.core.feeds import runs
from twofour.core.progress import Report
from twofour.onnx_tools.histogram import Histogram, Range, choose_range
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.reference import input_form
from twofour.onnx_tools.runner import Runner, batch_size, not_finite

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
    runner = Runner(model, tensors, options.threads)
    total = source.count if source.count is None else min(source.count, options.samples or 2**62)
    for run in runs(source, forms, batch_size(model, tensors), options.samples):
        for name, array in runner.run(run.feeds).items():
            _add(histograms[name], array, name, (source, run.batch))
        if progress is not None:
            progress(run.batch.start + len(run.batch), total, "calibrating")
    _require_seen(histograms, source)
    return {name: choose_range(histogram, options) for name, histogram in histograms.items()}


def _add(histogram: Histogram, array: Array, name: str, where: tuple[Data, Batch]) -> None:
    try:
        histogram.add(array)
    except ValueError as error:
        raise not_finite(name, *where) from error


def _require_seen(histograms: dict[str, Histogram], source: Data) -> None:
    """Refuses ranges of tensors that were empty in every run: any number would be a guess."""
    unseen = [name for name, histogram in histograms.items() if histogram.empty]
    if unseen:
        raise InputError(
            f"data {source.source} never reaches {len(unseen)} tensors that need a range",
            [f"empty in every run: {', '.join(unseen[:8])}"],
            "give samples for which the model computes them, or exclude the nodes that read them",
        )
