"""What layers read while a model runs on samples: sums over all they see, in bounded memory.

A layer multiplies its weight with rows of features: a MatMul with the last axis of its input, a
Conv with the patches of it. Of these rows x only a sum is kept, of x x^T (the Gram matrix) or of
x^2, in float64. Products of one batch are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from twofour.core.data import Data
from twofour.core.feeds import runs
from twofour.core.progress import Report, silent
from twofour.core.unfold import Windows, pieces, same_pads
from twofour.onnx_tools.edit import constant, operand
from twofour.onnx_tools.experts import NO_DATA, form_of
from twofour.onnx_tools.infer import infer_shapes
from twofour.onnx_tools.reference import input_form
from twofour.onnx_tools.runner import Runner, batch_size, not_finite
from twofour.onnx_tools.weights import Weight

PIECE_BYTES = 64 * 2**20
"""The most that the patches of a convolution should take at a time."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Reading:
    """How a layer makes rows of features of its input; layers with equal ones see equal rows.

    Attributes:
        value: name of the input.
        features: in a row: taps times channels of one group.
        groups: of a convolution: each has rows of its own.
        windows: of a convolution; None where the features are one axis of the input.
        auto_pad: as ONNX has it; but for NOTSET and VALID, it overrides the pads of `windows`.
        axis: of the input, has the features; not of a convolution.
    """

    value: str
    features: int
    groups: int = 1
    windows: Windows | None = None
    auto_pad: str = "NOTSET"
    axis: int = -1

    def rows(self, x: Array) -> Iterator[Array]:
        """All rows of a batch, some at a time: float32 [groups, rows, features].

        The features of a convolution are in the order (tap, channel), channels fastest.

        Args:
            x: the input.
        """
        if self.windows is None:
            turned = np.moveaxis(x, self.axis, -1)
            yield turned.astype(np.float32, copy=False).reshape(1, -1, self.features)
            return
        windows = self.windows
        if self.auto_pad.startswith("SAME"):
            lower = self.auto_pad == "SAME_LOWER"
            windows = replace(windows, pads=same_pads(windows, x.shape[2:], lower=lower))
        last = np.moveaxis(x, 1, -1).astype(np.float32, copy=False)
        for piece in pieces(last, windows, PIECE_BYTES):
            patches, taps, channels = piece.shape
            split = piece.reshape(patches, taps, self.groups, channels // self.groups)
            yield split.transpose(2, 0, 1, 3).reshape(self.groups, patches, self.features)


def reading_of(layer: ir.Node, weight: Weight) -> Reading:
    """How a Conv, Gemm or MatMul of the main graph reads its input.

    Args:
        layer: for which `why_unreadable` has no reason.
        weight: of it.
    """
    value, attributes = str(layer.inputs[0].name), layer.attributes  # type: ignore[union-attr]
    size = weight.values[0].size
    if layer.op_type != "Conv":
        return Reading(value, size, axis=0 if attributes.get_int("transA", 0) else -1)
    kernel = weight.values.shape[2:]
    ones, auto_pad = [1] * len(kernel), attributes.get_string("auto_pad", "NOTSET")
    pads = attributes.get_ints("pads", [0] * 2 * len(kernel))
    windows = Windows(
        kernel,
        tuple(attributes.get_ints("strides", ones)),
        tuple(attributes.get_ints("dilations", ones)),
        tuple(pads) if auto_pad == "NOTSET" else (0,) * 2 * len(kernel),
    )
    return Reading(value, size, attributes.get_int("group", 1), windows, auto_pad)


def why_unreadable(model: ir.Model, layer: ir.Node, weight: Weight) -> str:
    """Why a layer's rows cannot be captured; "" where they can.

    Args:
        model: that the layer stands in.
        layer: a Conv, Gemm or MatMul, or experts.
        weight: of it.
    """
    x = operand(layer, 0)
    if form_of(layer) is not None:
        return NO_DATA
    if layer.graph is not model.graph:
        return "it stands in a body of If, Loop or Scan, where no inputs are captured"
    if weight.scale is not None or weight.values.dtype.kind != "f":
        return f"its weight is stored as {weight.stored.dtype}, expected floats"
    if x is None or constant(x) is not None:
        return "its input is constant"
    if layer.op_type != "Conv" and weight.values.ndim != 2:
        return f"its weight has {weight.values.ndim} dimensions, expected one matrix"
    return ""


Statistic = Callable[[Array], NDArray[np.float64]]
"""Of rows float32 [groups, rows, features]: what is added up over all rows."""


def gram(rows: Array) -> NDArray[np.float64]:
    """The sum of x x^T, [groups, features, features]."""
    with np.errstate(over="ignore", invalid="ignore"):  # `capture` refuses what is not finite
        return np.stack([group.T @ group for group in rows]).astype(np.float64)


def counted_gram(rows: Array) -> NDArray[np.float64]:
    """`gram`, and below each matrix a line with the number of rows, [groups, features + 1, ...]."""
    groups, count, features = rows.shape
    return np.concatenate([gram(rows), np.full((groups, 1, features), float(count))], axis=1)


def squares(rows: Array) -> NDArray[np.float64]:
    """The sum of x^2, [groups, features]."""
    return np.stack([np.einsum("rk,rk->k", group, group) for group in rows]).astype(np.float64)


@dataclass(frozen=True)
class Samples:
    """What a model is run on.

    Attributes:
        data: with an array for each input; gone through once for each `capture`.
        limit: stop after so many samples; None for all.
        threads: of ONNX Runtime; 0 for as many as there are cores.
    """

    data: Data
    limit: int | None = None
    threads: int = 0


def capture(
    model: ir.Model,
    readings: Iterable[Reading],
    statistic: Statistic,
    samples: Samples,
    progress: Report = silent,
) -> dict[Reading, NDArray[np.float64]]:
    """Adds up a statistic of each reading over all samples.

    Only the part of the model that computes the inputs is run.

    Args:
        model: stays as it is.
        readings: of layers of the main graph.
        statistic: what is added up of each.
        samples: to run it on.
        progress: called after each batch with the samples done.

    Returns:
        The sums; readings that had no rows at all are left out.

    Raises:
        InputError: the data is empty or does not fit the model's inputs, or it or an input of a
            layer is not finite.
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    typed = model.clone()
    infer_shapes(typed)
    readers: dict[str, list[Reading]] = {}
    for reading in dict.fromkeys(readings):
        readers.setdefault(reading.value, []).append(reading)
    data, sums = samples.data, dict[Reading, NDArray[np.float64]]()
    runner, names = Runner(typed, tuple(readers), samples.threads), tuple(readers)
    total = data.count if data.count is None else min(data.count, samples.limit or data.count)
    forms = [input_form(value) for value in model.graph.inputs]
    for run in runs(data, forms, batch_size(typed, names), samples.limit):
        found = runner.run(run.feeds)
        for name in names:
            x = found.pop(name)
            for reading in readers[name]:
                for rows in reading.rows(x):
                    _add(sums, reading, rows, statistic)
                if reading in sums and not np.isfinite(sums[reading]).all():
                    raise not_finite(name, data, run.batch)
        progress(run.batch.start + len(run.batch), total, "capturing sample")
    return sums


def _add(
    sums: dict[Reading, NDArray[np.float64]], reading: Reading, rows: Array, statistic: Statistic
) -> None:
    if not rows.shape[1]:
        return
    if reading in sums:
        sums[reading] += statistic(rows)
    else:
        sums[reading] = statistic(rows)
