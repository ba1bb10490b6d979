"""What pruning shifts is shifted back, from calibration data and without training.

Bias correction: a pruned layer's outputs have another mean than the dense layer's. The difference,
one number for each output channel, is added to the bias:

    bias += E[y_dense] - E[y_pruned]

y_dense is what the dense network computes there, y_pruned what the pruned one does, on inputs that
went through all corrected layers before. So a correction makes up for what earlier ones left, too.

BatchNorm re-estimation: where a BatchNormalization follows, it subtracts a mean and divides by a
deviation that it learned from dense weights. Both are measured again:

    mean, variance = those of what the BatchNormalization is given in the pruned network

Layers go in the order of the data; those that do not depend on each other go together. For each
such step the network is run up to there, and memory holds sums, not samples.

Source: Nagel et al. 2019, arXiv:1906.04721 (bias correction, section 4.2 and appendix D); Ioffe and
Szegedy 2015, arXiv:1502.03167, algorithm 2 (the statistics of inference, from samples).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from twofour.core.data import Data, DataLike, as_data
from twofour.core.feeds import runs
from twofour.core.progress import Report
from twofour.onnx_tools.bias import Bias, find_bias
from twofour.onnx_tools.edit import (
    Array,
    Editor,
    constant,
    is_standard,
    operand,
    reads,
    sole_reader,
)
from twofour.onnx_tools.eligible import is_quantized
from twofour.onnx_tools.infer import infer_shapes
from twofour.onnx_tools.reference import input_form
from twofour.onnx_tools.runner import Runner, batch_size, not_finite
from twofour.onnx_tools.weights import layer_weights

BIAS, NORM = "bias", "batchnorm"


@dataclass(frozen=True)
class Corrected:
    """What became of one layer, or of one BatchNormalization.

    Attributes:
        node: its name.
        op: its operator.
        done: "bias" or "batchnorm"; "" where nothing was.
        reason: why not.
        shift: root mean square, over the channels, of what was added to the bias or the mean.
    """

    node: str
    op: str
    done: str
    reason: str = ""
    shift: float = 0.0


@dataclass(frozen=True)
class _Site:
    """A place that is corrected: a bias, or the statistics of a BatchNormalization.

    Attributes:
        node: the layer or the BatchNormalization.
        tensor: name of the value whose statistics count.
        axis: of its channels.
        bias: None for a BatchNormalization.
    """

    node: ir.Node
    tensor: str
    axis: int
    bias: Bias | None


@dataclass
class _Sums:
    """Of one tensor by channels, over all that was seen; squares are those of x - origin."""

    origin: Array | float = 0.0
    count: int = 0
    total: Array | float = 0.0
    squares: Array | float = 0.0

    def add(self, x: Array, axis: int) -> None:
        axis %= x.ndim
        channels = x.shape[axis]
        flat = x.reshape(math.prod(x.shape[:axis]), channels, -1) if x.size else x[:0]
        if not x.size:
            return
        moved = flat - np.reshape(self.origin, (-1, 1)).astype(x.dtype)
        self.count += flat.shape[0] * flat.shape[2]
        self.total = self.total + moved.sum(axis=(0, 2), dtype=np.float64)
        self.squares = self.squares + np.square(moved, out=moved).sum(axis=(0, 2), dtype=np.float64)

    @property
    def mean(self) -> Array:
        """float64 [C]."""
        return np.asarray(self.origin + self.total / self.count)

    @property
    def variance(self) -> Array:
        """float64 [C], that of what the samples were drawn from: divided by count - 1."""
        spread = self.squares - np.square(self.total) / self.count
        return np.maximum(spread, 0.0) / max(self.count - 1, 1)


def correct(
    dense: ir.Model,
    pruned: ir.Model,
    data: DataLike,
    samples: int | None = None,
    progress: Report | None = None,
) -> tuple[ir.Model, tuple[Corrected, ...]]:
    """Corrects biases and BatchNormalizations for what pruning shifted.

    Changed are the biases of pruned layers, and BatchNormalizations that come after pruned layers.

    Args:
        dense: the model before.
        pruned: the same nodes with other weights; stays as it is.
        data: samples like those the model will see, some hundred. See `core/data.py`.
        samples: the most that are used; None for all.
        progress: called while running.

    Returns:
        A new model, and what became of each pruned layer and each such BatchNormalization.

    Raises:
        InputError: the data does not fit the model's inputs, or it or a tensor is not finite.
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    dense, result = _plain(dense), _plain(pruned)
    changed = _changed(dense, result)
    if is_quantized(result):
        return result, tuple(_left(node, "the model is quantized") for node in changed)
    levels, left = _find_sites(result, changed)
    source = as_data(data, [str(value.name) for value in result.graph.inputs])
    biases = [site for level in levels for site in level if site.bias is not None]
    meter = _Meter(source, samples, len(levels) + bool(biases), progress)
    before = meter.measure(dense, biases) if biases else {}
    editor, done = Editor(result.graph), []
    for level in levels:
        found = meter.measure(result, level)
        for site in level:
            done.append(_apply(editor, site, before.get(site.tensor), found[site.tensor]))
    return result, (*done, *left)


class _Meter:
    """Runs models on the samples, for the sums of some of their tensors."""

    def __init__(
        self, source: Data, samples: int | None, passes: int, progress: Report | None
    ) -> None:
        self._source, self._samples, self._progress = source, samples, progress
        count = source.count
        self._each = count if count is None or samples is None else min(count, samples)
        self._total = None if self._each is None else self._each * passes
        self._done = 0

    def measure(self, model: ir.Model, sites: Sequence[_Site]) -> dict[str, _Sums]:
        """The sums of the tensors of these sites."""
        model = model.clone()
        infer_shapes(model)
        sums = {site.tensor: _Sums(_origin(site)) for site in sites}
        axes = {site.tensor: site.axis for site in sites}
        runner = Runner(model, list(sums), 0)
        forms = [input_form(value) for value in model.graph.inputs]
        before = self._done
        for run in runs(self._source, forms, batch_size(model, list(sums)), self._samples):
            for name, array in runner.run(run.feeds).items():
                sums[name].add(array, axes[name])
                if not np.isfinite(sums[name].squares).all():
                    raise not_finite(name, self._source, run.batch)
            self._done = before + run.batch.start + len(run.batch)
            if self._progress is not None:
                self._progress(self._done, self._total, "correcting")
        return sums


def _origin(site: _Site) -> Array | float:
    """Near the mean, so that squares cancel little."""
    found = constant(operand(site.node, 3)) if site.bias is None else None
    return 0.0 if found is None else found.astype(np.float64)


def _apply(editor: Editor, site: _Site, dense: _Sums | None, pruned: _Sums) -> Corrected:
    """Corrects one place."""
    name, op = site.node.name or "", site.node.op_type
    if pruned.count < 2 or (dense is not None and not dense.count):
        return Corrected(name, op, "", "the data never reaches it")
    if site.bias is not None and dense is not None:
        shift = dense.mean - pruned.mean
        site.bias.add(editor, shift)
        return Corrected(name, op, BIAS, shift=_rms(shift))
    old = constant(operand(site.node, 3))
    dtype = np.dtype(np.float32) if old is None else old.dtype
    shift = pruned.mean - (0.0 if old is None else old.astype(np.float64))
    editor.set_constant(site.node, 3, pruned.mean.astype(dtype))
    editor.set_constant(site.node, 4, pruned.variance.astype(dtype))
    return Corrected(name, op, NORM, shift=_rms(shift))


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _plain(model: ir.Model) -> ir.Model:
    """A copy without functions."""
    model = model.clone()
    if model.functions:
        common_passes.InlinePass()(model)
    return model


def _changed(dense: ir.Model, pruned: ir.Model) -> dict[ir.Node, Array]:
    """The layers whose weights are others now, with them."""
    before = {
        layer.outputs[0].name: weight.values
        for layer, weight in layer_weights(dense)
        if layer.graph is dense.graph
    }
    return {
        layer: weight.values
        for layer, weight in layer_weights(pruned)
        if not np.array_equal(weight.values, before.get(layer.outputs[0].name, np.zeros(0)))
    }


def _left(node: ir.Node, reason: str) -> Corrected:
    return Corrected(node.name or "", node.op_type, "", reason)


def _find_sites(
    model: ir.Model, changed: Mapping[ir.Node, Array]
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
        found = _site_of(node, changed.get(node), bool(before))
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


def _site_of(node: ir.Node, weight: Array | None, shifted: bool) -> _Site | str | None:
    """Where a node is corrected, in words why it is not, or None if there is nothing to correct.

    Args:
        node: of the main graph.
        weight: of a pruned layer; None for other nodes.
        shifted: whether pruned layers come before the node.
    """
    if shifted and is_standard(node, "BatchNormalization"):
        given = operand(node, 0)
        reason = _why_not_measured(node)
        return reason if reason or given is None else _Site(node, str(given.name), 1, None)
    if weight is None:
        return None
    reader = sole_reader(node.outputs[0])
    if is_standard(reader, "BatchNormalization") and reader and not _why_not_measured(reader):
        return f"BatchNormalization {reader.name!r} follows, which is measured again"
    bias = find_bias(node, weight)
    if isinstance(bias, str):
        return bias
    return _Site(node, str(bias.output.name), bias.axis, bias)


def _why_not_measured(norm: ir.Node) -> str:
    """Why the statistics of a BatchNormalization are left; "" where they can be measured."""
    if norm.attributes.get_int("training_mode", 0):
        return "it measures what it is given itself (training_mode)"
    arrays = [constant(operand(norm, index)) for index in (3, 4)]
    if any(array is None or array.ndim != 1 for array in arrays):
        return "its mean and variance are no constants, one a channel"
    return ""


def _holds(node: ir.Node, changed: Mapping[ir.Node, Array]) -> bool:
    """Whether the node is one of these, or has one in a body."""
    bodies = (a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH)
    return node in changed or any(each in changed for body in bodies for each in body.all_nodes())
