"""What pruning or quantization shifts is shifted back, from calibration data, without training.

    for each layer, in the order of the data:
        run the dense network up to its output y_d, and the pruned one, all before it corrected: y_p
        scale = deviation(y_d) / deviation(y_p)          for each output channel
        w, bias = w * scale, (bias - mean(y_p)) * scale + mean(y_d)

So an output channel has the mean and the deviation again that the next layer was trained for. Rows
of the weight are scaled: zeros stay zeros. A pruned layer sees less of its input, so its deviation
is smaller; the next layer's is smaller still, and to correct the mean alone makes that worse where
a Relu follows. (That, `moments=1`, is bias correction: bias += mean(y_d) - mean(y_p).)

A quantized network is corrected likewise: its biases are floats, and in place of the rows of a
weight its scales are multiplied. Rounding leaves the deviations nearly as they were, so there the
mean alone is what to correct.

Where a BatchNormalization follows, it does this by itself if its mean and variance are those of
what it is given: they are measured again in the pruned network, and the layer is left alone.

Layers that do not depend on each other go together. The network is run up to them, and memory holds
sums, not samples.

Source: Nagel et al. 2019, arXiv:1906.04721 (bias correction, for rounded weights); Jordan et al.
2022, arXiv:2211.08403 (REPAIR, for interpolated networks: deviations that collapse, restored by a
scale and a shift for each channel); Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 2
(statistics of inference from samples); Li et al. 2020, arXiv:2007.02491 (BatchNorm measured again
after pruning).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from twofour.core.progress import Report, silent
from twofour.onnx_tools.bias import Bias, find_bias
from twofour.onnx_tools.capture import Reading, Samples, capture
from twofour.onnx_tools.edit import (
    Array,
    Editor,
    constant,
    is_standard,
    operand,
    reads,
    sole_reader,
    sole_use,
)
from twofour.onnx_tools.eligible import LAYERS
from twofour.onnx_tools.plugins import inline
from twofour.onnx_tools.weights import Weight, find_weight, layer_weights

BIAS, MOMENTS, NORM = "bias", "scale and bias", "batchnorm"
Float64 = NDArray[np.float64]
_CONSTANT = 1e-6
"""A deviation below this share of the mean is none: the sums are of float32 values."""


@dataclass(frozen=True)
class Corrected:
    """What became of one layer, or of one BatchNormalization.

    Attributes:
        node: its name.
        op: its operator.
        done: "scale and bias", "bias" or "batchnorm"; "" where nothing was.
        reason: why not.
        shift: of the mean, in deviations of the pruned output: root mean square over the channels.
        scale: of the deviation: the mean of all channels.
    """

    node: str
    op: str
    done: str
    reason: str = ""
    shift: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class _Site:
    """A place that is corrected: a layer, or the statistics of a BatchNormalization.

    Attributes:
        node: the layer or the BatchNormalization.
        reading: of the value whose statistics count.
        bias: None for a BatchNormalization.
    """

    node: ir.Node
    reading: Reading
    bias: Bias | None = None


@dataclass(frozen=True)
class _Moments:
    """Mean and variance of each channel, float64 [C], and of how many values."""

    count: float
    mean: Float64
    variance: Float64

    @classmethod
    def of(cls, sums: Mapping[Reading, Float64], reading: Reading) -> _Moments:
        """From the sums of `_powers`; all zero where nothing was seen."""
        found = sums.get(reading)
        count, total, squares = np.zeros((3, reading.features)) if found is None else found[0]
        n = max(float(count[0]), 1.0)
        mean = total / n
        spread = squares / n - np.square(mean)
        spread[spread <= np.square(_CONSTANT * mean)] = 0.0  # but for rounding
        return cls(float(count[0]), mean, spread * n / max(n - 1, 1.0))


def _powers(rows: Array) -> Float64:
    """How many, their sum and the sum of their squares: float64 [groups, 3, features]."""
    count = np.full(rows.shape[::2], rows.shape[1], np.float64)
    total = rows.sum(axis=1, dtype=np.float64)
    squares = np.einsum("grk,grk->gk", rows, rows, dtype=np.float64)
    return np.stack([count, total, squares], axis=1)


def correct(
    dense: ir.Model,
    pruned: ir.Model,
    samples: Samples,
    *,
    moments: int = 2,
    operators: Collection[str] = LAYERS,
    progress: Report = silent,
) -> tuple[ir.Model, tuple[Corrected, ...]]:
    """Corrects pruned or quantized layers, and the BatchNormalizations that come after them.

    Args:
        dense: the model before.
        pruned: the same nodes with other weights, or with Q/DQ pairs between them; stays as it is.
        samples: what the model will see, some hundred.
        moments: 2 for mean and deviation, 1 for the mean alone.
        operators: layers of these are corrected, and every BatchNormalization.
        progress: called while running, with the steps done.

    Returns:
        A new model, and what became of each pruned layer and each such BatchNormalization.

    Raises:
        InputError: the data does not fit the model's inputs, or it or a tensor is not finite.
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    dense, result = _plain(dense), _plain(pruned)
    changed = _changed(dense, result)
    levels, left = _find_sites(result, changed, operators, moments)
    layers = [site.reading for level in levels for site in level if site.bias is not None]
    steps = len(levels) + 1
    told = _Steps(progress, steps)
    before = capture(dense, layers, _powers, samples, told) if layers else {}
    editor, done = Editor(result.graph), []
    for level in levels:
        told.done += 1
        found = capture(result, [site.reading for site in level], _powers, samples, told)
        for site in level:
            now, aim = (_Moments.of(sums, site.reading) for sums in (found, before))
            done.append(
                _measured_again(editor, site, now)
                if site.bias is None
                else _corrected(editor, site.node, site.bias, (aim, now), moments)
            )
    return result, (*done, *left)


@dataclass
class _Steps:
    """Tells of samples within the steps that are done."""

    report: Report
    steps: int
    done: int = 0

    def __call__(self, done: int, total: int | None, what: str) -> None:
        of = "" if total is None else f" of {total}"
        self.report(self.done, self.steps, f"{what} {done}{of}")


def _corrected(
    editor: Editor, layer: ir.Node, bias: Bias, moments: tuple[_Moments, _Moments], order: int
) -> Corrected:
    """Gives the output the dense one's mean, and deviation."""
    aim, now = moments
    weight = find_weight(layer)
    if weight is None or now.count < 2 or aim.count < 2:
        return _left(layer, "no sample reaches it")
    known = (now.variance > 0) & (aim.variance > 0)
    deviation = np.sqrt(np.where(known, now.variance, 1.0))
    scale = np.where(known, np.sqrt(aim.variance) / deviation, 1.0)
    scale = scale if order > 1 else np.ones_like(scale)
    bias.scale_and_shift(editor, scale, aim.mean - now.mean * scale)
    if order > 1:
        _scale_rows(editor, layer, weight, scale)
    shift = _rms((aim.mean - now.mean)[known] / deviation[known])
    done = MOMENTS if order > 1 else BIAS
    return Corrected(layer.name or "", layer.op_type, done, "", shift, float(scale.mean()))


def _scale_rows(editor: Editor, layer: ir.Node, weight: Weight, scale: Float64) -> None:
    """Multiplies the rows of a weight, or the scales of a quantized one."""
    maker = _dequantizer(layer)
    if maker is not None and weight.scale is not None:
        scales = (weight.scale * scale).astype(weight.scale.dtype)
        editor.set_constant(maker, 1, scales)
        return
    along = scale.reshape(-1, *[1] * (weight.values.ndim - 1))
    scaled = (weight.values * along).astype(weight.values.dtype)
    weight.store(weight.as_stored(scaled))


def _dequantizer(layer: ir.Node) -> ir.Node | None:
    """The DequantizeLinear that a layer reads its weight from."""
    held = operand(layer, 1)
    maker = None if held is None else held.producer()
    return maker if is_standard(maker, "DequantizeLinear") else None


def _why_not_scaled(layer: ir.Node, weight: Weight) -> str:
    """Why the rows of a quantized weight cannot be multiplied; "" where they can."""
    maker = _dequantizer(layer)
    if weight.scale is None:
        return ""
    if maker is None or weight.scale.shape != weight.values.shape[:1]:
        return "its weight has no scale for each output channel"
    axis = maker.attributes.get_int("axis", 1) % weight.values.ndim
    return "" if axis == weight.axes[0] else "its weight has scales along another axis"


def _measured_again(editor: Editor, site: _Site, now: _Moments) -> Corrected:
    """Gives a BatchNormalization the mean and variance of what it is given."""
    old = [constant(operand(site.node, index)) for index in (3, 4)]
    if now.count < 2 or old[0] is None or old[1] is None:
        return _left(site.node, "no sample reaches it")
    mean, variance = (array.astype(np.float64) for array in old if array is not None)
    editor.set_constant(site.node, 3, now.mean.astype(old[0].dtype))
    editor.set_constant(site.node, 4, now.variance.astype(old[1].dtype))
    known = (now.variance > 0) & (variance > 0)
    deviation = np.sqrt(now.variance[known])
    shift = _rms((now.mean - mean)[known] / deviation)
    scale = float(np.mean(np.sqrt(variance[known]) / deviation)) if known.any() else 1.0
    return Corrected(site.node.name or "", site.node.op_type, NORM, "", shift, scale)


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0


def _plain(model: ir.Model) -> ir.Model:
    """A copy without functions."""
    model = model.clone()
    if model.functions:
        inline(model)
    return model


def _changed(dense: ir.Model, pruned: ir.Model) -> dict[ir.Node, Weight]:
    """The layers whose weights are others now, with them."""
    before = {
        layer.outputs[0].name: weight.values
        for layer, weight in layer_weights(dense)
        if layer.graph is dense.graph
    }
    return {
        layer: weight
        for layer, weight in layer_weights(pruned)
        if not np.array_equal(weight.values, before.get(layer.outputs[0].name, np.zeros(0)))
    }


def _left(node: ir.Node, reason: str) -> Corrected:
    return Corrected(node.name or "", node.op_type, "", reason)


def _find_sites(
    model: ir.Model, changed: Mapping[ir.Node, Weight], operators: Collection[str], order: int
) -> tuple[list[list[_Site]], list[Corrected]]:
    """The places to correct, in steps of those that do not depend on each other; and the others."""
    levels: list[list[_Site]] = []
    left = [
        _left(node, "it stands in a body of If, Loop or Scan")
        for node in changed
        if node.graph is not model.graph
    ]
    depths: dict[ir.Value, int] = {}  # of all that pruned layers come before
    pending: dict[ir.Node, _Site] = {}
    for node in model.graph:
        before = [depths[value] for value in reads(node) if value in depths]
        depth = max(before, default=0)
        found = _site_of(node, changed.get(node), bool(before), order)
        if node in changed and node.op_type not in operators:
            found = f"of layers, only {', '.join(operators)} was asked for"
        if isinstance(found, str):
            left.append(_left(node, found))
        elif found is not None:
            pending[node if found.bias is None else found.bias.node] = found
        if node in pending:
            levels += [[]] if len(levels) == depth else []
            levels[depth].append(pending[node])
            depth += 1
        if before or _holds(node, changed):
            depths |= dict.fromkeys(node.outputs, depth)
    return levels, left


def _site_of(node: ir.Node, weight: Weight | None, shifted: bool, order: int) -> _Site | str | None:
    """Where a node is corrected, in words why it is not, or None if there is nothing to correct.

    Args:
        node: of the main graph.
        weight: of a pruned layer; None for other nodes.
        shifted: whether pruned layers come before the node.
        order: of the last moment that is corrected.
    """
    if shifted and is_standard(node, "BatchNormalization"):
        return _why_not_measured(node) or _norm_site(node)
    if weight is None:
        return None
    reader = sole_reader(node.outputs[0])
    if reader is not None and is_standard(reader, "BatchNormalization"):
        if not _why_not_measured(reader):
            return f"BatchNormalization {reader.name!r} follows, which is measured again"
    held = operand(node, 1)
    if held is None or not sole_use(held) or not sole_use(weight.source):
        return "others read its weight, too"
    bias = find_bias(node, weight)
    if isinstance(bias, str):
        return bias
    if order > 1 and (reason := _why_not_scaled(node, weight)):
        return reason
    return _Site(node, Reading(str(bias.output.name), bias.channels, axis=bias.axis), bias)


def _norm_site(norm: ir.Node) -> _Site:
    mean, given = constant(operand(norm, 3)), operand(norm, 0)
    size = 0 if mean is None else mean.size
    return _Site(norm, Reading(str(given.name if given else ""), size, axis=1))


def _why_not_measured(norm: ir.Node) -> str:
    """Why the statistics of a BatchNormalization are left; "" where they can be measured."""
    if norm.attributes.get_int("training_mode", 0):
        return "it measures what it is given itself (training_mode)"
    arrays = [constant(operand(norm, index)) for index in (3, 4)]
    if any(array is None or array.ndim != 1 for array in arrays):
        return "its mean and variance are no constants, one a channel"
    return ""


def _holds(node: ir.Node, changed: Mapping[ir.Node, Weight]) -> bool:
    """Whether the node is one of these, or has one in a body."""
    bodies = (a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH)
    return node in changed or any(each in changed for body in bodies for each in body.all_nodes())
