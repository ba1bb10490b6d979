"""Native operators: what the kernels take, before it is known where it lies in memory.

Integer tensors are kept as stored bytes here: int8 values plus 128, zero points likewise, so
kernels see uint8 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from twofour.core.attention import AttentionScales
from twofour.core.errors import UnsupportedError
from twofour.core.functions import NO_ACTIVATION, Activation
from twofour.core.numerics import Epilogue, Window
from twofour.core.sizes import Count, product
from twofour.engine import DTYPES
from twofour.kernels.cpu.pointwise import MapConstants

Array = NDArray[Any]
POINT = Window((1, 1))
PLAIN = MapConstants()
FLOAT_ATTENTION = AttentionScales(1.0, 0)
QUANTIZED = (ir.DataType.INT8, ir.DataType.UINT8)
REAL = (ir.DataType.FLOAT, ir.DataType.BFLOAT16)
TYPES = (*QUANTIZED, *REAL)
"""What tensors of kernels hold; small operators take others, see native_nd.py."""


@dataclass(frozen=True)
class NativeOp:
    """One operator for a native kernel.

    Attributes:
        name: of the layer, in the source model's words.
        op_type: of the fused node.
        kind: "conv", "rows", "map", "pool", "norm", "attention", or "alias" (no kernel at all).
        x: the value it reads.
        y: the value it writes.
        r: the second value it reads, or "".
        more: further values it reads.
        also: further values it writes.
    """

    name: str
    op_type: str
    kind: str
    x: str
    y: str
    r: str = ""
    more: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """All values it reads."""
        return (self.x, *((self.r,) if self.r else ()), *self.more)

    @property
    def writes(self) -> tuple[str, ...]:
        """All values it writes."""
        return (self.y, *self.also)


@dataclass(frozen=True)
class ConvOp(NativeOp):
    """A convolution, or a matrix product as a 1x1 convolution.

    Attributes:
        w: [N, C / groups, KH, KW], int8 or float32 (values of bfloat16 where x is that).
        window: where it looks.
        groups: number of groups.
        epilogue: constants, zero points as stored.
        x_zero: zero point of x as stored.
        add: dtype of the residual, or "".
        dynamic: x is float32 and quantized at run time, by "row" or as one "tensor"; "" where it
            is what the kernel reads (core/dynamic.py).
    """

    w: Array = field(default_factory=lambda: np.empty(0))
    window: Window = POINT
    groups: int = 1
    epilogue: Epilogue = field(default_factory=lambda: Epilogue(np.empty(0), np.empty(0)))
    x_zero: int = 0
    add: str = ""
    dynamic: str = ""


@dataclass(frozen=True)
class RowsOp(NativeOp):
    """Rows of floats quantized at run time, for the products that read them.

    Attributes:
        step: "row", "range" or "tensor", see kernels/cpu/quantize_rows.py.
    """

    step: str = ""


@dataclass(frozen=True)
class MapOp(NativeOp):
    """An operator that touches each element once, see kernels/cpu/pointwise.py.

    Attributes:
        op: "copy", "convert", "add" or "mul", whose second operand may be one pixel an image.
        constants: scales and zero points.
        activation: what the results go through.
        steps: the (row, column) steps x is read with.
        channel_pads: channels of y before and after those of x.
    """

    op: str = "copy"
    constants: MapConstants = PLAIN
    activation: Activation = NO_ACTIVATION
    steps: tuple[int, int] = (1, 1)
    channel_pads: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class PoolOp(NativeOp):
    """A maximum or an average over windows, or the mean of each channel.

    Attributes:
        op: "max", "average" or "mean".
        window: of the maximum or average.
        scale: of the mean or average: x_scale / y_scale (1 for floats).
        x_zero: zero point of x as stored.
        y_zero: zero point of y as stored.
        include_pad: an average divides by all taps, those of the padding too.
    """

    op: str = "max"
    window: Window = POINT
    scale: float = 1.0
    x_zero: int = 0
    y_zero: int = 0
    include_pad: bool = False


@dataclass(frozen=True)
class ViewOp(NativeOp):
    """Parts of a tensor under names of their own: nothing is computed or moved.

    Attributes:
        channels: the first channel of each result in x.
        image: the first image (row, for rows of channels) of the result in x.
        image_step: images of x from one image of the result to the next.
        pixels: every pixel of x is an image of the result.
    """

    channels: tuple[int, ...] = (0,)
    image: int = 0
    image_step: Count = 1
    pixels: bool = False


@dataclass(frozen=True)
class NormOp(NativeOp):
    """A layer normalization over the channels, see core/norm.py.

    `y` is the float32 result; where it is quantized, `also` holds the bytes, or `y` does if nobody
    reads the floats.

    Attributes:
        gamma: float32 [channels].
        beta: float32 [channels].
        epsilon: added to the variance.
        scale: of the bytes.
        zero: zero point of the bytes as stored.
        float_out: y is float32.
        quantized_out: bytes are written, or bfloat16.
        q: kind of these: "u8" or "bfloat16".
    """

    gamma: Array = field(default_factory=lambda: np.empty(0))
    beta: Array = field(default_factory=lambda: np.empty(0))
    epsilon: float = 0.0
    scale: float = 1.0
    zero: int = 0
    float_out: bool = True
    quantized_out: bool = False
    q: str = "u8"


@dataclass(frozen=True)
class AttentionOp(NativeOp):
    """softmax(q k' scale + mask) v for each head, see core/attention.py.

    `x` is q, `more` are k, v and the mask if there is one.

    Attributes:
        batch: sequences.
        q_len: queries a sequence.
        k_len: keys a sequence.
        heads: number of heads; head h of q, k, v and y is a slice of their channels.
        scales: of the scores; and of all quantizers, zero points as stored, where q, k and v are
            quantized.
        mask_shape: [batch, heads, queries, keys], each may be 1; () without a mask.
        causal: a query sees no key after its own place.
    """

    batch: Count = 1
    q_len: Count = 1
    k_len: Count = 1
    heads: int = 1
    scales: AttentionScales = FLOAT_ATTENTION
    mask_shape: tuple[Count, ...] = ()
    causal: bool = False


def activation_map(
    name: str,
    op_type: str,
    ends: tuple[ir.Value, ir.Value],
    activation: Activation,
    constants: MapConstants = PLAIN,
) -> MapOp:
    """An activation on its own.

    Args:
        name: of the layer.
        op_type: of the node.
        ends: input and output.
        activation: what it applies.
        constants: scales and zero points where input or output are quantized.
    """
    return MapOp(
        name,
        op_type,
        "map",
        operand(ends[0]),
        name_of(ends[1]),
        op="convert",
        constants=replace(constants, low=activation.low, high=activation.high),
        activation=activation,
    )


class NotNative(Exception):
    """A node is not native; the message is the reason."""


def constant(value: ir.Value | None) -> Array:
    """The contents of an initializer; an empty value is no array."""
    if value is None or value.const_value is None:
        raise NotNative(f"{'an input' if value is None else value.name} is not a constant")
    return value.const_value.numpy()


def scalar_input(node: ir.Node, index: int) -> float | None:
    """The number in a constant input; None where it is left out."""
    if index >= len(node.inputs) or node.inputs[index] is None:
        return None
    held = constant(node.inputs[index]).reshape(-1)
    if held.size != 1:
        raise NotNative(f"input {index} has {held.size} numbers, not one")
    number: float = held[0].item()
    return number


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape, or None where a dimension is not known before running."""
    if value.shape is None:
        return None
    dims = tuple(d for d in value.shape if isinstance(d, int))
    return dims if len(dims) == len(value.shape) else None


def kind_of(value: ir.Value) -> str:
    """Numpy's name of a tensor's type; of what is no tensor, or of no known type, ONNX's words."""
    if not isinstance(value.type, ir.TensorType) or value.dtype == ir.DataType.STRING:
        return str(value.type or "of an unknown type").lower()
    return value.type.dtype.numpy().name


def plain_kind(value: ir.Value) -> str:
    """The numpy name of the type of a value that is passed on between steps.

    Raises:
        UnsupportedError: engines do not hold it.
    """
    kind = kind_of(value)
    if kind not in DTYPES:
        raise UnsupportedError(
            f"an engine does not pass on {value.name!r}, which is {kind}",
            [f"expected a tensor of {', '.join(sorted(DTYPES))}"],
            "cut the model so that this value is neither an input nor an output",
        )
    return kind


def shape(value: ir.Value) -> tuple[int, ...]:
    """The static shape; a value without one, or an empty one, is not native."""
    dims = static_shape(value)
    if dims is None:
        raise NotNative(f"the shape of {value.name} is not known")
    if 0 in dims:
        raise NotNative(f"{value.name} is empty")
    return dims


def extent(dims: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Batch, height, width, channels of a tensor: [N, C, H, W], or rows of channels [..., C]."""
    if len(dims) == 4:
        return dims[0], dims[2], dims[3], dims[1]
    return int(np.prod(dims[:-1])), 1, 1, dims[-1] if dims else 1


def images(dims: tuple[Count, ...]) -> Count:
    """The batch of `extent`, of dimensions that may be open."""
    return dims[0] if len(dims) == 4 else product(dims[:-1])


def operand(value: ir.Value | None) -> str:
    """The name of a value that is computed while running."""
    if value is None or value.const_value is not None:
        raise NotNative(f"operand {value.name if value else ''} is a constant")
    return name_of(value)


def window_of(
    kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int]
) -> Window:
    """The window of a 2-D ONNX operator.

    Args:
        kernel: (height, width), as are strides and dilations.
        strides: steps.
        dilations: distances between taps.
        pads: (top, left, bottom, right).
    """
    (kh, kw), (sh, sw), (dh, dw), (top, left, bottom, right) = kernel, strides, dilations, pads
    return Window((kh, kw), (sh, sw), (dh, dw), (top, left, bottom, right))


def stored(zero_point: Array, dtype: ir.DataType | None) -> int:
    """A zero point as stored."""
    return int(zero_point) + (128 if dtype == ir.DataType.INT8 else 0)


def name_of(value: ir.Value) -> str:
    """The name; "" without one."""
    return value.name or ""
