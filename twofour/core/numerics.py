"""The definition of the arithmetic: quantize, dequantize, matmul, convolution, requantize.

Plain numpy, slow and obvious. Every integer kernel equals it bit for bit; every float operation is
rounded to float32 once, in the order written here (a fused multiply-add where it says `fma`, and
nowhere else), so that any CPU gives the same bytes.

Source: Jacob et al. 2018, arXiv:1712.05877; ONNX QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.bfloat16 import round_bf16
from twofour.core.fma import fma
from twofour.core.functions import NO_ACTIVATION, Activation
from twofour.core.gates import Gate
from twofour.core.unfold import Windows, unfold

Array = NDArray[Any]

# With |x| <= 255 and |w| <= 128 a longer sum could leave int32.
MAX_K = (2**31 - 1) // (255 * 128)
_EXACT_K = 2**24 // (255 * 128)


def quantize(
    x: Array, scale: Array | float, zero_point: Array | int, dtype: Any = np.int8
) -> Array:
    """Quantizes: q = saturate(round_half_even(x / scale) + zero_point).

    Args:
        x: float32, any shape.
        scale: float32, broadcastable to `x`, > 0.
        zero_point: integer, broadcastable to `x`, a value of `dtype`.
        dtype: np.int8 or np.uint8.

    Returns:
        `dtype`, the shape of `x`. NaN becomes the zero point.

    Source: ONNX QuantizeLinear.
    """
    info = np.iinfo(dtype)
    scaled = np.asarray(x, np.float32) / np.asarray(scale, np.float32)
    rounded = np.rint(np.nan_to_num(scaled, nan=0.0, posinf=1e9, neginf=-1e9)).astype(np.float64)
    return np.clip(rounded + np.asarray(zero_point, np.float64), info.min, info.max).astype(dtype)


def dequantize(q: Array, scale: Array | float, zero_point: Array | int) -> Array:
    """Dequantizes: x = (q - zero_point) * scale, float32, the shape of `q`.

    Source: ONNX DequantizeLinear.
    """
    centred = q.astype(np.int32) - np.asarray(zero_point).astype(np.int32)
    return centred.astype(np.float32) * np.asarray(scale, np.float32)


def integer_matmul(x: Array, w: Array, x_zero_point: int) -> Array:
    """acc[m, n] = sum over k of (x[m, k] - x_zero_point) * w[n, k], exact.

    Args:
        x: int8 or uint8 [M, K]; K <= MAX_K.
        w: int8 [N, K].
        x_zero_point: of `x`.

    Returns:
        int32 [M, N].
    """
    # float32 holds sums of so few products exactly (they stay below 2**24), and BLAS is quick.
    left, right = x.astype(np.float32) - np.float32(x_zero_point), w.astype(np.float32).T
    acc = np.zeros((x.shape[0], w.shape[0]), np.int32)
    for k in range(0, x.shape[1], _EXACT_K):
        acc += (left[:, k : k + _EXACT_K] @ right[k : k + _EXACT_K]).astype(np.int32)
    return acc


@dataclass(frozen=True)
class Epilogue:
    """What happens to the sums before they are stored.

    An activation that only clamps works on results in steps of y, as saturation does: it costs
    nothing. So does one that a table does, in fractions of a step. Any other one needs real
    numbers, and what it gives is then divided by y_scale.

    Attributes:
        scale: float32 [N], x_scale * w_scale, divided by y_scale where the activation clamps
            (y_scale = 1 where the output is float), by gate.step where there is a gate.
        bias: float32 [N], divided likewise; less r_zero_point * residual_scale for a quantized
            residual that is added before the activation.
        residual_scale: of the residual (1 for a float one), divided likewise; of one that is added
            last, divided by y_scale.
        activation: what the results go through; the bounds of Clip are divided likewise.
        zero_point: of y; None where the output is float32.
        unsigned: y is uint8 instead of int8.
        y_factor: 1 / y_scale, rounded to float32, where the activation neither clamps nor is done
            by a gate.
        bfloat16: y is held as bfloat16; zero_point is None.
        gate: the table that does the activation, or None; y is unsigned then.
        add_last: the residual is added behind the activation, which does not clamp.
        residual_zero: zero point of a residual that is added last, as stored; 0 for a float one.
    """

    scale: Array
    bias: Array
    residual_scale: float = 0.0
    activation: Activation = NO_ACTIVATION
    zero_point: int | None = None
    unsigned: bool = False
    y_factor: float = 1.0
    bfloat16: bool = False
    gate: Gate | None = None
    add_last: bool = False
    residual_zero: int = 0

    @property
    def offset(self) -> float:
        """What is added with the last residual: zero_point - residual_scale * residual_zero."""
        if not self.add_last:
            return 0.0
        return float(np.float32((self.zero_point or 0) - self.residual_scale * self.residual_zero))

    @property
    def short(self) -> bool:
        """Whether the activation takes its short form: the result is rounded further."""
        return self.zero_point is not None or self.bfloat16

    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value, relative to the zero point, that y can hold.

        An activation that clamps is part of them.
        """
        clamp = self.activation if self.activation.clamps else NO_ACTIVATION
        if self.zero_point is None:
            return clamp.bounds()
        low, high = (0, 255) if self.unsigned else (-128, 127)
        ends = np.clip(clamp.bounds(), low - self.zero_point, high - self.zero_point)
        return float(ends[0]), float(ends[1])

    @property
    def added_zero(self) -> int:
        """What is added to a result that was rounded: nothing where the offset has it."""
        return 0 if self.add_last else self.zero_point or 0

    def rounded_bounds(self) -> tuple[float, float]:
        """`bounds`, of what is rounded."""
        low, high = self.bounds()
        zero = (self.zero_point or 0) - self.added_zero
        return low + zero, high + zero

    def in_stored_steps(self) -> Epilogue:
        """The same with the zero point of y in the bias, and in the bounds of what clamps.

        What is rounded then is what is stored, which spares kernels an addition. Sums halfway
        between two values may be rounded to the other one where the zero point is odd. An
        activation that does not clamp stays as it is: its zero point is added after rounding.
        """
        if self.zero_point is None or not self.activation.clamps:
            return self
        low, high = (bound + self.zero_point for bound in self.activation.bounds())
        bias = (self.bias + np.float32(self.zero_point)).astype(np.float32)
        return replace(self, bias=bias, activation=Activation("Clip", low, high), zero_point=0)


def requantize(
    acc: Array,
    epilogue: Epilogue,
    residual: Array | None = None,
    row_scale: Array | None = None,
) -> Array:
    """Turns sums into the values that are stored.

        v = fma(r, r_scale, fma(acc, scale, bias))
        y = saturate(round_half_even(v) + zero_point), the activation part of the saturation
        y = gate(v), where a table does it (core/gates.py)
        y = saturate(round_half_even(activation(v) * y_factor) + zero_point), if it is more

    A residual that is added last:

        v = fma(acc, scale, bias)
        y = saturate(round_half_even(fma(r, r_scale, fma(activation(v), y_factor, offset)))),
            offset = zero_point - r_scale * r_zero_point
        y = gate(v, r), where a table does it
        y = fma(r, r_scale, activation(v) + offset), where y is float

    Where x was quantized at run time (core/dynamic.py), `scale` is that of w alone, and times that
    of the row of x.

    A y in bfloat16, or quantized without a gate, takes the short form of the activation
    (core/functions.py).

    Args:
        acc: int32 [..., N], exact sums (or float32 sums of a float kernel).
        epilogue: its constants.
        residual: uint8 or float32, the shape of `acc`, or None; as it is stored: the bias makes up
            for its zero point.
        row_scale: float32 [..., 1], of the rows of x, or None.

    Returns:
        int8 or uint8, or float32 where `epilogue.zero_point` is None (values of bfloat16, if it
        says so); the shape of `acc`. A NaN (of a float residual) stays one in float32, and is the
        smallest value in integers (with a gate, what the smallest float gives).

    Source: Jacob et al. 2018, arXiv:1712.05877, eq. 5.
    """
    scale = epilogue.scale if row_scale is None else row_scale * epilogue.scale
    value = fma(acc.astype(np.float32), scale, epilogue.bias)
    last = residual if epilogue.add_last else None
    if residual is not None and last is None:
        value = _plus(value, residual, epilogue)
    if epilogue.gate is not None and epilogue.zero_point is not None:
        return epilogue.gate.apply(value, epilogue.zero_point, last)
    if not epilogue.activation.clamps:
        value = epilogue.activation.apply(value, short=epilogue.short)
        if last is not None:
            factor, offset = np.array([[epilogue.y_factor], [epilogue.offset]], np.float32)
            value = _plus(fma(value, factor, offset), last, epilogue)
        elif epilogue.zero_point is not None:
            value = value * np.float32(epilogue.y_factor)
    low, high = (np.float32(bound) for bound in epilogue.rounded_bounds())
    value = np.clip(value, low, high)
    if epilogue.zero_point is None:
        return round_bf16(value) if epilogue.bfloat16 else value
    value = np.where(np.isnan(value), low, value)
    rounded = np.rint(value).astype(np.int32) + epilogue.added_zero
    return rounded.astype(np.uint8 if epilogue.unsigned else np.int8)


def _plus(value: Array, residual: Array, epilogue: Epilogue) -> Array:
    """fma(r, r_scale, value)."""
    r_scale = np.asarray(epilogue.residual_scale, np.float32)
    return fma(residual.astype(np.float32), r_scale, value)


def scale_product(a: Array, b: Array, scale: float, zero_points: tuple[int, int]) -> Array:
    """Multiplies a quantized tensor by real numbers: nothing is divided.

        y = saturate(round_half_even(((a - a_zero) * scale) * b) + y_zero)

    Args:
        a: uint8 as stored, any shape.
        b: float32 that broadcasts to `a`.
        scale: a_scale / y_scale, rounded once.
        zero_points: of a and y, as stored.

    Returns:
        uint8 as stored, of the shape of `a`.

    Source: ONNX Mul between DequantizeLinear and QuantizeLinear, which divides by y_scale.
    """
    return quantize(dequantize(a, scale, zero_points[0]) * b, 1.0, zero_points[1], np.uint8)


@dataclass(frozen=True)
class Window:
    """Where a convolution looks: (height, width) pairs and padding (top, left, bottom, right)."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(OH, OW) for an input of height x width."""
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        padded = height + self.pads[0] + self.pads[2], width + self.pads[1] + self.pads[3]
        out = [(p - r) // s + 1 for p, r, s in zip(padded, reach, self.stride, strict=True)]
        return out[0], out[1]


def patches(x: Array, window: Window, fill: float) -> Array:
    """Every window of `x`, laid out for a matmul.

    Args:
        x: [batch, H, W, C], any dtype.
        window: kernel, stride, dilation and padding.
        fill: the value of the padding (the zero point of a quantized `x`).

    Returns:
        [batch, OH, OW, KH, KW, C], the dtype of `x`.
    """
    windows = Windows(window.kernel, window.stride, window.dilation, window.pads)
    found = unfold(x, windows, fill)
    return found.reshape(*found.shape[:3], *window.kernel, x.shape[3])


def convolve(x: Array, w: Array, window: Window, groups: int = 1, x_zero_point: int = 0) -> Array:
    """The sums of a convolution, exact for integers.

    Args:
        x: [batch, H, W, C]; int8, uint8 or float32.
        w: [N, C / groups, KH, KW]; int8, or float32 with a float32 `x`.
        window: kernel, stride, dilation and padding.
        groups: number of groups.
        x_zero_point: of `x`; also the value of the padding.

    Returns:
        int32 [batch, OH, OW, N]; float64 where `x` is float32.
    """
    cols = patches(x, window, x_zero_point)
    batch, out_h, out_w = cols.shape[:3]
    per_group, outs = w.shape[1], w.shape[0] // groups
    parts = []
    for g in range(groups):
        a = cols[..., g * per_group : (g + 1) * per_group].reshape(batch * out_h * out_w, -1)
        b = w[g * outs : (g + 1) * outs].transpose(0, 2, 3, 1).reshape(outs, -1)
        if x.dtype == np.float32:
            parts.append(a.astype(np.float64) @ b.astype(np.float64).T)
        else:
            parts.append(integer_matmul(a, b, x_zero_point))
    return np.concatenate(parts, axis=1).reshape(batch, out_h, out_w, w.shape[0])
