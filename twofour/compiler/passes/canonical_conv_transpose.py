"""Spells a transposed convolution as a convolution whose results are dealt out.

    ConvTranspose(x, w [, b])  ->  deal(Conv(x, w', b'))

    With stride s every output u = s q + r (counted before padding is cut) is a sum over x[q - t]
    with the weights w[s t + r]: one ordinary convolution for each phase r < s, their results
    interleaved. All phases are one Conv with s (per axis) as many channels; Reshape, Transpose,
    Reshape and, where padding is cut within a phase, Slice deal them out. A bias and a
    normalization that follow become part of the weights, and a Relu stays beside the Conv.

Conditions:
    1. one or two spatial axes, and the shapes of input and result are known
    2. x is float32 and the weight a float32 constant, or a dequantized int8 one with zero point 0
       and one scale, or one for each output channel of a single group
    3. the bias is absent or a constant
    4. padding leaves no phase beyond the taps (an output_padding larger than what they reach)

Source: Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?",
    arXiv:1609.07009.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from twofour.compiler.passes import quantizers, reading
from twofour.compiler.passes.canonical_conv import bias_constant
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "canonical_conv_transpose"

Ints = tuple[int, ...]


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "ConvTranspose"):
        return None
    x, y = reading.data(node), node.outputs[0]
    if x.dtype != ir.DataType.FLOAT:
        return Refused(f"its input is {x.dtype}; expected float32")
    phases = _phases(node)
    if isinstance(phases, str):
        return Refused(phases)
    weight = _Weight.of(reading.data(node, 1), phases.group)
    if isinstance(weight, str):
        return Refused(weight)
    bias = bias_constant(node, weight.channels)
    if isinstance(bias, str) or bias.const_value is None:
        return Refused(str(bias))
    weight, b, tail = _absorbed(y, weight, bias.const_value.numpy().astype(np.float64))
    rectified = _next(tail)
    relu = reading.is_op(rectified, "Relu")
    if relu and rectified is not None:
        tail = rectified.outputs[0]
    chain = _Chain(node.name or "", x)
    w = chain.add(*weight.dequantized(phases)) if weight.scale is not None else weight.value(phases)
    shift = reading.constant(f"{node.name}_bias", phases.spread(b).astype(np.float32))
    conv = ir.node("Conv", [x, w, shift], phases.attributes, name=node.name)
    at = chain.add(conv, phases.conv_shape(weight.channels))
    if relu:
        at = chain.add(ir.node("Relu", [at]), phases.conv_shape(weight.channels))
    return Replacement(tail, _dealt(chain, at, phases, weight.channels), tuple(chain.nodes))


@dataclass(frozen=True)
class _Phases:
    """A transposed convolution as one for each phase of its stride.

    Attributes:
        batch: images.
        kernel: taps, per spatial axis; dilation is spelt out as taps of zero.
        dilations: of the given weight.
        strides: phases.
        taps: of one phase.
        first: q of the first output that is needed.
        count: outputs of a phase that are computed.
        pads: of the convolution: before, then behind.
        cut: outputs before the first one that is wanted, less than a stride.
        out: outputs.
        group: number of groups.
    """

    batch: int
    kernel: Ints
    dilations: Ints
    strides: Ints
    taps: Ints
    first: Ints
    count: Ints
    pads: Ints
    cut: Ints
    out: Ints
    group: int

    @property
    def attributes(self) -> dict[str, Ints | int]:
        """Of the Conv."""
        return {"kernel_shape": self.taps, "pads": self.pads, "group": self.group}

    def spread(self, per_channel: reading.Array) -> reading.Array:
        """What each channel has, for the channels of the Conv: of a group by phase, by channel."""
        own = per_channel.reshape(self.group, 1, -1)
        phases = math.prod(self.strides)
        return np.broadcast_to(own, (self.group, phases, own.shape[2])).reshape(-1)

    def conv_shape(self, channels: int) -> Ints:
        """Of its result, where the transposed one has so many channels."""
        return (self.batch, channels * math.prod(self.strides), *self.count)


def _phases(node: ir.Node) -> _Phases | str:
    """How the node falls apart, or why it does not."""
    x, y = reading.shape_of(reading.data(node)), reading.shape_of(node.outputs[0])
    w = reading.shape_of(reading.data(node, 1))
    if x is None or y is None or w is None:
        return "the shape of its input, weight or result is not known"
    rank = len(w) - 2
    if rank not in (1, 2):
        return f"it convolves over {rank} axes; expected 1 or 2"
    ones = (1,) * rank
    strides = reading.ints_attribute(node, "strides", ones)
    dilations = reading.ints_attribute(node, "dilations", ones)
    kernel = tuple(d * (k - 1) + 1 for d, k in zip(dilations, w[2:], strict=True))
    begins = _begins(node, x[2:], y[2:], kernel)
    taps = tuple(-(-k // s) for k, s in zip(kernel, strides, strict=True))
    first = tuple(p // s for p, s in zip(begins, strides, strict=True))
    last = tuple((p + o - 1) // s for p, o, s in zip(begins, y[2:], strides, strict=True))
    before = tuple(t - 1 - q for t, q in zip(taps, first, strict=True))
    behind = tuple(q - size + 1 for q, size in zip(last, x[2:], strict=True))
    reach = tuple(size + t - 2 for size, t in zip(x[2:], taps, strict=True))
    if min(*before, *behind) < 0 or any(q > r for q, r in zip(last, reach, strict=True)):
        return "its padding cuts whole phases, or adds more than the taps reach"
    count = tuple(b - a + 1 for a, b in zip(first, last, strict=True))
    cut = tuple(p - s * q for p, s, q in zip(begins, strides, first, strict=True))
    group = reading.int_attribute(node, "group", 1)
    pads = (*before, *behind)
    return _Phases(x[0], kernel, dilations, strides, taps, first, count, pads, cut, y[2:], group)


def _begins(node: ir.Node, size: Ints, out: Ints, kernel: Ints) -> Ints:
    """What is cut before the first output, per spatial axis.

    Source: ONNX ConvTranspose, total_padding.
    """
    rank = len(kernel)
    mode = reading.string_attribute(node, "auto_pad", "NOTSET")
    given = reading.ints_attribute(node, "output_shape", ())
    if mode == "VALID" or (mode == "NOTSET" and not given):
        pads = reading.ints_attribute(node, "pads", (0,) * 2 * rank)
        return pads[:rank] if mode == "NOTSET" else (0,) * rank
    strides = reading.ints_attribute(node, "strides", (1,) * rank)
    extra = reading.ints_attribute(node, "output_padding", (0,) * rank)
    begins = []
    for axis in range(rank):
        whole = strides[axis] * (size[axis] - 1) + extra[axis] + kernel[axis]
        total = max(0, whole - out[axis])
        begins.append(total // 2 if mode == "SAME_UPPER" else total - total // 2)
    return tuple(begins)


@dataclass(frozen=True)
class _Weight:
    """The weight of a transposed convolution.

    Attributes:
        name: of its value.
        w: [C, N / group, taps...], float32, or int8 with `scale`.
        group: number of groups.
        scale: of one element or one for each output channel; None of a float weight.
    """

    name: str
    w: reading.Array
    group: int
    scale: reading.Array | None = None

    @staticmethod
    def of(value: ir.Value, group: int) -> _Weight | str:
        """Reads a weight, or says why it is none."""
        name, contents = value.name or "", reading.array(value)
        if contents is not None and contents.dtype == np.float32:
            return _Weight(name, contents, group)
        stored = quantizers.quantized_constant(value)
        if stored is None:
            return f"its weight {name!r} is not a float32 constant"
        if stored.q.dtype != np.int8 or stored.zero_point.any():
            return f"its weight {name!r} is not int8 with zero point 0"
        if stored.scale.size > 1 and (stored.axis != 1 or group > 1):
            return f"its weight {name!r} is not quantized per output channel"
        return _Weight(name, stored.q, group, stored.scale.reshape(-1))

    @property
    def channels(self) -> int:
        """Output channels of all groups."""
        return int(self.w.shape[1]) * self.group

    def times(self, factor: reading.Array) -> _Weight | None:
        """Each output channel times a factor; None for integers, where that may round."""
        if self.scale is not None:
            return None
        own = factor.reshape(self.group, 1, -1)
        grouped = self.w.reshape(self.group, -1, *self.w.shape[1:])
        along = own.reshape(self.group, 1, own.shape[2], *[1] * (self.w.ndim - 2))
        return replace(self, w=(grouped * along).reshape(self.w.shape).astype(np.float32))

    def phased(self, phases: _Phases) -> reading.Array:
        """[s... N, C / group, taps...]: the channels of a group by phase, then by channel."""
        c, n = self.w.shape[0], self.w.shape[1]
        rank, s, t = len(phases.taps), phases.strides, phases.taps
        wide = np.zeros((c, n, *(a * b for a, b in zip(t, s, strict=True))), self.w.dtype)
        places = tuple(slice(0, k, d) for k, d in zip(phases.kernel, phases.dilations, strict=True))
        wide[(slice(None), slice(None), *places)] = self.w
        cut = wide.reshape(
            self.group, c // self.group, n, *(v for a, b in zip(t, s, strict=True) for v in (a, b))
        )
        by_tap, by_phase = range(3, 3 + 2 * rank, 2), range(4, 4 + 2 * rank, 2)
        moved = cut.transpose(0, *by_phase, 2, 1, *by_tap)
        flipped = np.flip(moved, tuple(range(-rank, 0)))
        return np.ascontiguousarray(flipped).reshape(-1, c // self.group, *t)

    def value(self, phases: _Phases) -> ir.Value:
        """As a constant."""
        return reading.constant(f"{self.name}_phases", self.phased(phases))

    def dequantized(self, phases: _Phases) -> tuple[ir.Node, Ints]:
        """A DequantizeLinear of the integers, and its shape."""
        assert self.scale is not None
        w = self.value(phases)
        scales = phases.spread(np.broadcast_to(self.scale, self.channels)).astype(np.float32)
        inputs = [
            w,
            reading.constant(f"{self.name}_phases_scale", scales),
            reading.constant(f"{self.name}_phases_zero_point", np.zeros(scales.shape, np.int8)),
        ]
        return ir.node("DequantizeLinear", inputs, {"axis": 0}), tuple(reading.shape_of(w) or ())


def _absorbed(
    value: ir.Value, weight: _Weight, bias: reading.Array
) -> tuple[_Weight, reading.Array, ir.Value]:
    """Weight and bias with what is added and scaled behind them, and where that ends."""
    while True:
        node = _next(value)
        if reading.is_op(node, "Add") and node is not None:
            other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
            c = None if other is None else quantizers.float_constant(other)
            if c is None or not _per_channel(c, weight.channels, len(value.shape or ())):
                break
            bias = bias + np.broadcast_to(c.reshape(-1), bias.shape)
        elif reading.is_op(node, "BatchNormalization") and node is not None:
            found = _normalized(node, weight, bias)
            if found is None:
                break
            weight, bias = found
        else:
            break
        value = node.outputs[0]
    return weight, bias, value


def _next(value: ir.Value) -> ir.Node | None:
    """Who alone reads the value."""
    reader = reading.sole_reader(value)
    return None if isinstance(reader, str) else reader


def _per_channel(c: reading.Array, channels: int, rank: int) -> bool:
    """Whether a constant adds one number to each channel."""
    aligned = (1,) * (rank - c.ndim) + c.shape
    return c.size == 1 or aligned == (1, channels, *[1] * (rank - 2))


def _normalized(
    node: ir.Node, weight: _Weight, bias: reading.Array
) -> tuple[_Weight, reading.Array] | None:
    """Weight and bias of what a BatchNormalization makes of them."""
    given = [reading.array(value) for value in node.inputs[1:5]]
    known = [c.astype(np.float64) for c in given if c is not None and c.dtype == np.float32]
    if len(known) < 4 or reading.int_attribute(node, "training_mode", 0):
        return None
    gamma, beta, mean, var = known
    factor = gamma / np.sqrt(var + reading.float_attribute(node, "epsilon", 1e-5))
    scaled = weight.times(factor) if factor.shape == bias.shape else None
    return None if scaled is None else (scaled, factor * (bias - mean) + beta)


class _Chain:
    """Nodes that follow each other, their results float32 of known shapes."""

    def __init__(self, name: str, x: ir.Value) -> None:
        self.name, self.nodes, self._type = name, list[ir.Node](), x.type

    def add(self, node: ir.Node, shape: Ints) -> ir.Value:
        """Appends a node; returns its result."""
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), self._type
        self.nodes.append(node)
        return node.outputs[0]

    def reshape(self, value: ir.Value, shape: Ints) -> ir.Value:
        """The value in another shape."""
        to = reading.constant(f"{self.name}_shape", np.array(shape, np.int64))
        return self.add(ir.node("Reshape", [value, to]), shape)


def _dealt(chain: _Chain, value: ir.Value, phases: _Phases, channels: int) -> ir.Value:
    """The phases interleaved, and cut to the outputs that are wanted."""
    rank, s, n = len(phases.strides), phases.strides, channels // phases.group
    apart = (phases.batch, phases.group, *s, n, *phases.count)
    value = chain.reshape(value, apart)
    perm = [0, 1, 2 + rank]
    for axis in range(rank):
        perm += [3 + rank + axis, 2 + axis]
    moved = tuple(apart[axis] for axis in perm)
    value = chain.add(ir.node("Transpose", [value], {"perm": perm}), moved)
    wide = tuple(c * f for c, f in zip(phases.count, s, strict=True))
    value = chain.reshape(value, (phases.batch, channels, *wide))
    if (phases.cut, phases.out) == ((0,) * rank, wide):
        return value
    ends = tuple(a + b for a, b in zip(phases.cut, phases.out, strict=True))
    bounds = [phases.cut, ends, tuple(range(2, 2 + rank))]
    inputs = [
        value,
        *(
            reading.constant(f"{chain.name}_{part}", np.array(numbers, np.int64))
            for part, numbers in zip(("starts", "ends", "axes"), bounds, strict=True)
        ),
    ]
    return chain.add(ir.node("Slice", inputs), (phases.batch, channels, *phases.out))
