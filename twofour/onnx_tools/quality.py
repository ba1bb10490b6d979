"""How well each tensor of a quantized model is represented: what its scale keeps, and costs.

    activations    from the histograms that calibration kept: no further run
    weights        the float ones against what the file's integers and scales stand for

The model is read as it is, so whatever placed the Q/DQ pairs, and whichever layers were left float
afterwards, what is said is true of the file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from twofour.core.histogram import Histogram
from twofour.core.noise import coarse, decibels, levels, noise_of
from twofour.core.ranges import Affine
from twofour.onnx_tools.edit import Array, constant, is_standard, operand
from twofour.onnx_tools.moving import moved_from
from twofour.onnx_tools.weights import Weight, layer_weights

BINS = 128


@dataclass(frozen=True)
class Bins:
    """A histogram coarse enough to draw.

    Attributes:
        low: where the first bin begins.
        high: where the last one ends.
        counts: of the bins, all of one width; the values of exactly zero are among them.
    """

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class TensorQuality:
    """One tensor as its scale represents it.

    Attributes:
        name: of the value; of a weight, its initializer in the float model.
        kind: what it is.
        node: the layer that reads a weight; the node that computes an activation, "" for an input.
        dtype: "int8" or "uint8".
        scales: how many there are: one, or one for each output channel.
        scale: the largest of them.
        zero_point: of an activation.
        seen: least and largest value; None where calibration did not look.
        kept: least and largest value that can be told, those of the largest scale.
        clipped: share of the values more than half a step beyond `kept`, 0 to 1; None likewise.
        sqnr_db: energy of the values over that of their rounding errors; None likewise.
        worst_channel_db: the least of the channels of a weight; None for an activation.
        values: how many were looked at.
        bins: of the values; None likewise.
    """

    name: str
    kind: Literal["activation", "weight"]
    node: str
    dtype: str
    scales: int
    scale: float
    zero_point: int
    seen: tuple[float, float] | None
    kept: tuple[float, float]
    clipped: float | None
    sqnr_db: float | None
    worst_channel_db: float | None
    values: int
    bins: Bins | None


@dataclass(frozen=True)
class Rounded:
    """A value that the model rounds to bytes.

    Attributes:
        value: its name.
        quantized: name of the bytes.
        node: that computes the value; "" for an input.
        scheme: scale, zero point and type.
        moved: whether its bytes only come from elsewhere, with their scale.
    """

    value: str
    quantized: str
    node: str
    scheme: Affine
    moved: bool


def rounded_values(model: ir.Model) -> Iterator[Rounded]:
    """The values of the main graph that are rounded with one scale, in their order."""
    for node in model.graph:
        value = operand(node, 0)
        if not is_standard(node, "QuantizeLinear") or value is None or constant(value) is not None:
            continue
        scheme, maker = _scheme(node), value.producer()
        if scheme is not None:
            made_by = "" if maker is None else str(maker.name)
            name = str(node.outputs[0].name)
            yield Rounded(str(value.name), name, made_by, scheme, _is_moved(node))


def cut_at(model: ir.Model, names: Collection[str]) -> tuple[ir.Model, dict[str, str]]:
    """A copy in which these bytes are given from outside, and still computed from what is given.

    So each of them is what its layer makes of its own inputs, whatever earlier layers made.

    Args:
        model: with Q/DQ pairs.
        names: of bytes, see `Rounded.quantized`.

    Returns:
        The copy, and the name of the input for each name.
    """
    model = model.clone()
    inputs = {}
    for node in model.graph:
        value = node.outputs[0]
        if value.name in names and is_standard(node, "QuantizeLinear"):
            inputs[str(value.name)] = f"{value.name}_given"
            given = ir.Value(name=f"{value.name}_given", type=value.type, shape=value.shape)
            value.replace_all_uses_with(given, replace_graph_outputs=False)
            model.graph.inputs.append(given)
    return model, inputs


def tensor_quality(
    model: ir.Model, floats: ir.Model, histograms: Mapping[str, Histogram]
) -> tuple[TensorQuality, ...]:
    """Each tensor that the model rounds, the lowest SQNR first, those not looked at last.

    A tensor whose bytes were only moved from another one, with its scale, is left out.

    Args:
        model: with Q/DQ pairs.
        floats: the float model that they were put into.
        histograms: of the float model's values, by name, as far as there are any.
    """
    found = [*_activations(model, histograms), *_weights(model, floats)]
    return tuple(sorted(found, key=_order))


def _order(each: TensorQuality) -> tuple[bool, float]:
    return each.sqnr_db is None, each.sqnr_db or 0.0


def _activations(model: ir.Model, histograms: Mapping[str, Histogram]) -> Iterator[TensorQuality]:
    for each in rounded_values(model):
        histogram = histograms.get(each.value)
        if histogram is not None or not each.moved:
            yield _activation(each, histogram)


def _activation(rounded: Rounded, histogram: Histogram | None) -> TensorQuality:
    scheme = rounded.scheme
    kept = levels(scheme)
    clipped = sqnr_db = seen = bins = None
    count = 0
    if histogram is not None and not histogram.empty:
        noise = noise_of(histogram, scheme)
        span, counts = coarse(histogram, BINS)
        clipped, sqnr_db, count = noise.clipped, noise.sqnr_db, noise.count
        seen, bins = (span.low, span.high), Bins(span.low, span.high, tuple(counts.tolist()))
    return TensorQuality(
        rounded.value,
        "activation",
        rounded.node,
        scheme.dtype.name,
        1,
        scheme.scale,
        scheme.zero_point,
        seen,
        (kept.low, kept.high),
        clipped,
        sqnr_db,
        None,
        count,
        bins,
    )


def _scheme(node: ir.Node) -> Affine | None:
    """Of a QuantizeLinear with one scale; None for another one."""
    scale, point = constant(operand(node, 1)), constant(operand(node, 2))
    if scale is None or scale.size != 1:
        return None
    if point is None:
        return Affine(float(scale.reshape(())), 0, np.dtype(np.uint8))
    if point.dtype not in (np.int8, np.uint8):
        return None
    return Affine(float(scale.reshape(())), int(point.reshape(())), point.dtype)


def _is_moved(node: ir.Node) -> bool:
    """Whether what is rounded was only moved after it had been rounded with the same scale."""
    value, scheme = operand(node, 0), _scheme(node)
    for source in moved_from(None if value is None else value.producer()):
        maker = source.producer()
        if (
            maker is not None
            and is_standard(maker, "DequantizeLinear")
            and _scheme(maker) == scheme
        ):
            return True
    return False


def _weights(model: ir.Model, floats: ir.Model) -> Iterator[TensorQuality]:
    """Each once, however many layers read it."""
    before = {str(layer.name): weight for layer, weight in layer_weights(floats)}
    done = set()
    for layer, weight in layer_weights(model):
        given = before.get(str(layer.name))
        if weight.scale is None or given is None or weight.source in done:
            continue
        done.add(weight.source)
        yield _weight(str(layer.name), given, weight)


def _weight(layer: str, given: Weight, weight: Weight) -> TensorQuality:
    w = given.values.astype(np.float64)
    rounded = weight.scale if weight.scale is not None else np.ones((), np.float32)
    scale = rounded.reshape(-1, *[1] * (w.ndim - 1)).astype(np.float64)
    error = weight.values * scale - w
    channels = _sums(w * w), _sums(error * error)
    worst = min(map(decibels, *(each.tolist() for each in channels)), default=math.inf)
    counts, _ = np.histogram(w, BINS)
    low, high = float(w.min()), float(w.max())
    largest = float(scale.max())
    return TensorQuality(
        given.name,
        "weight",
        layer,
        "int8",
        scale.size,
        largest,
        0,
        (low, high),
        (-127 * largest, 127 * largest),
        float((np.abs(w) > 127.5 * scale).mean()),
        decibels(float(channels[0].sum()), float(channels[1].sum())),
        worst,
        w.size,
        Bins(low, high, tuple(counts.tolist())),
    )


def _sums(squares: Array) -> Array:
    """Of each output channel."""
    found: Array = squares.reshape(len(squares), -1).sum(axis=1)
    return found
