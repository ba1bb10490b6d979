"""What kernels on a GPU compute: sizes, types and strides as plain data, and what it means.

Activations lie channels-last. Strides count elements, not bytes; the stride of the channels is 1
unless a problem says otherwise. Quantized tensors hold int8 (or float8e4m3fn) as such: zero points
are those of int8. Everything is known when a kernel is compiled, so every number of a problem is a
constant in its kernel and only addresses are passed.

An operand is called by its role: x, w, y, r (residual), scale, bias, ... The kernel files say which
roles a problem has.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from twofour.core.functions import NO_ACTIVATION, Activation
from twofour.core.numerics import Window
from twofour.kernels.cpu.nd_scalar import Expression

POINT = Window((1, 1))
QUANTIZED = ("int8", "float8e4m3fn")
REAL = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class View:
    """How the pixels of a channels-last tensor lie; of rows of channels each row is an image.

    Attributes:
        dtype: of its elements, a key of `cuda_program.DTYPES`.
        image: elements from one image to the next.
        row: elements from one row of pixels to the next.
        pixel: elements from one pixel to the next.
    """

    dtype: str
    image: int
    row: int
    pixel: int

    @staticmethod
    def dense(dtype: str, height: int, width: int, channels: int) -> View:
        """Without gaps."""
        return View(dtype, height * width * channels, width * channels, channels)

    def is_flat(self, height: int, width: int) -> bool:
        """Whether all pixels of all images lie `pixel` elements apart."""
        row = height == 1 or self.row == width * self.pixel
        return row and self.image == height * width * self.pixel


@dataclass(frozen=True)
class Finish:
    """What happens to float32 (or int32) sums before they are stored.

        v = float(sum) * scale[n] * row_scale[m] + bias[n]         (row_scale where x has one)
        v = v + float(r) * residual_scale                       (where there is a residual)
        v = activation(v)
        v = v + (float(r) - residual_zero) * residual_scale     (where `add_last`, not before)
        y = v rounded to y's type, or, quantized,
        y = saturate(round_half_even(v * y_factor) + y_zero)    int8
        y = saturate(v * y_factor)                              float8e4m3fn (448 at most)

    `low` and `high` bound v * y_factor + y_zero before it is rounded, whatever the type: they hold
    what an activation that clamps asks for.

    Attributes:
        residual_scale: 1 for a real residual.
        activation: see core/functions.py; "Clip" and "Relu" are done by `low` and `high` instead.
        y_factor: 1 / y_scale where the scale of y is not in scale and bias already.
        y_zero: zero point of a quantized y; 0 for a real one.
        low: least value, -inf for none.
        high: greatest value, inf for none.
        scaled: sums are multiplied by scale[n].
        by_rows: sums are multiplied by row_scale[m] too.
        add_last: the residual is added behind the activation, not before it.
        residual_zero: zero point of a residual that is added last; one added before is in the bias.
    """

    residual_scale: float = 1.0
    activation: Activation = NO_ACTIVATION
    y_factor: float = 1.0
    y_zero: int = 0
    low: float = -float("inf")
    high: float = float("inf")
    scaled: bool = True
    by_rows: bool = False
    add_last: bool = False
    residual_zero: int = 0


@dataclass(frozen=True)
class ConvProblem:
    """A convolution, or a matrix product as one with a 1x1 window over one pixel an image.

        sum[b, i, j, n] = sum over kh, kw, c of (x[b, ...kh, ...kw, c] - x_zero) * w[n, kh, kw, c]

    Sums are int32 for int8, float32 for all other types. Padding counts as x_zero. x_zero * w of
    the taps inside is in the bias already: kernels add up x * w, with x_zero read as padding.

    Roles: x, w, scale [N] float32 (where finish.scaled), row_scale [rows] float32 (where
    finish.by_rows), bias [N] float32, r (where there is one), y.

    Attributes:
        batch: images.
        height: of x.
        width: of x.
        channels: of x, of all groups.
        out_channels: of y, of all groups.
        window: where it looks.
        groups: of channels.
        x: input.
        y: output.
        r: residual, of y's pixels, or None.
        finish: what happens to sums.
        x_zero: zero point of x; also the value of the padding.
        pattern: of the weight: "2:4" if it has one that a sparse kernel can take, else "".
    """

    batch: int
    height: int
    width: int
    channels: int
    out_channels: int
    x: View
    y: View
    window: Window = POINT
    groups: int = 1
    r: View | None = None
    finish: Finish = Finish()
    x_zero: int = 0
    pattern: str = ""

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of y."""
        return self.window.output_size(self.height, self.width)

    @property
    def rows(self) -> int:
        """M of the product: pixels of y."""
        out_h, out_w = self.out_size
        return self.batch * out_h * out_w

    @property
    def k(self) -> int:
        """K of the product."""
        kernel_h, kernel_w = self.window.kernel
        return kernel_h * kernel_w * self.channels // self.groups

    @property
    def is_product(self) -> bool:
        """Whether it is a plain matrix product x [M, K] times w [N, K]: no window, even rows."""
        point = self.window.kernel == (1, 1) and self.window.stride == (1, 1)
        flat = self.x.is_flat(self.height, self.width) and self.y.is_flat(*self.out_size)
        even = self.r is None or self.r.is_flat(*self.out_size)
        return point and not any(self.window.pads) and flat and even and self.groups == 1


@dataclass(frozen=True)
class PoolProblem:
    """A maximum, an average, or the mean of each channel over windows.

        y = saturate(round(scale * (pooled(x) - x_zero)) + y_zero)    quantized average or mean
        y = pooled(x)                                                 maximum, or real numbers

    The padding never wins a maximum. Roles: x, y.

    Attributes:
        op: "max", "average" or "mean" (of the whole image: window is not read, y has one pixel).
        scale: x_scale / y_scale, or x_scale where y is real; 1 for real numbers.
        include_pad: an average divides by all taps, those of the padding too.
    """

    op: str
    batch: int
    height: int
    width: int
    channels: int
    x: View
    y: View
    window: Window = POINT
    scale: float = 1.0
    x_zero: int = 0
    y_zero: int = 0
    include_pad: bool = False


@dataclass(frozen=True)
class NormProblem:
    """A layer normalization over the channels of rows, statistics in float32.

        v = (x - mean) / sqrt(variance + epsilon) * gamma + beta
        y = v rounded to its type;  q = saturate(round_half_even(v / scale) + zero)

    Roles: x, gamma [channels] float32, beta [channels] float32, y and/or q.

    Attributes:
        rows: how many.
        channels: of a row.
        x: (type, elements from one row to the next).
        y: likewise of the real result; None where only q is written.
        q: likewise of the quantized result, or None.
        scale: of q.
        zero: zero point of q.
    """

    rows: int
    channels: int
    epsilon: float
    x: tuple[str, int]
    y: tuple[str, int] | None = None
    q: tuple[str, int] | None = None
    scale: float = 1.0
    zero: int = 0


@dataclass(frozen=True)
class RowsProblem:
    """Rows quantized at run time, each by itself: core/dynamic.py's "row", as int8 without the 128.

    Roles: x, y, row_scale (float32 [rows]). For y float8e4m3fn, highest / 448 instead of / 127, and
    no rounding to whole steps.

    Attributes:
        rows: how many.
        channels: of a row.
        x: (type, elements from one row to the next).
        y: likewise.
    """

    rows: int
    channels: int
    x: tuple[str, int]
    y: tuple[str, int]


@dataclass(frozen=True)
class Rows:
    """Tokens of sequences: [batch, length, channels], the channels side by side.

    Attributes:
        dtype: of the elements.
        sequence: elements from one sequence to the next.
        token: elements from one token to the next.
    """

    dtype: str
    sequence: int
    token: int


@dataclass(frozen=True)
class AttentionProblem:
    """softmax(q k^T * score_scale + mask) v for each head, whose channels are a slice of a token's.

    Real: q, k, v and y are float32, float16 or bfloat16. Quantized: q, k and v are int8 (or
    float8e4m3fn), scores are sums of (q - q_zero) * k times `score_scale`, exponentials may be
    rounded to 1/255 of the row's highest or better, results are times v_scale, and y is real, or

        y = saturate(round_half_even(v * (1 / y_scale)) + y_zero).

    A query all of whose keys are hidden (mask -inf, causal) gives zeros. Roles: q, k, v, mask
    (float32, where mask_strides), y.

    Attributes:
        batch: sequences.
        q_len: queries of each.
        k_len: keys of each.
        heads: number of heads.
        head_dim: channels of a head of q and k.
        value_dim: channels of a head of v and y.
        mask_strides: elements of the mask from one (sequence, head, query, key) to the next, 0
            where it is the same; () without a mask.
        causal: a query sees no key after its own place.
    """

    batch: int
    q_len: int
    k_len: int
    heads: int
    head_dim: int
    value_dim: int
    q: Rows
    k: Rows
    v: Rows
    y: Rows
    score_scale: float
    mask_strides: tuple[int, ...] = ()
    causal: bool = False
    q_zero: int = 0
    v_scale: float = 1.0
    y_scale: float = 1.0
    y_zero: int = 0


@dataclass(frozen=True)
class Ref:
    """Where a walk finds an operand.

    Attributes:
        dtype: of its elements.
        strides: elements of one step along each axis of the walk; 0 repeats, negative goes back.
        offset: elements from the operand's first to that at index 0.
    """

    dtype: str
    strides: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class Walk:
    """One turn for each index of `dims`: the meaning of kernels/cpu/nd.py's Nest, on a GPU.

    Roles: in0, in1, ..., y.

    Attributes:
        op: "fill", "gather", "chain", a row operation ("softmax", ...: the last axis is the one),
            a reduction (y has stride 0 along what it reduces), or one of element.
        dims: elements along each axis.
        y: the result.
        inputs: operands.
        scalars: constants of the operation.
        rows: of "gather", how many rows inputs[0] has and the elements from one to the next;
            inputs[1] holds the row of each element (stride 0 of inputs[0] along its axes).
        steps: of "chain" what is computed of the inputs (of "gather" of what is chosen, where there
            are any), one after the other: the operations of
            kernels/cpu/nd_scalar.py, the activations of core/functions.py by name, and
            "dequantize" (x - zero) * scale and "quantize" saturate(round_half_even(x / scale) +
            zero), each with the scalars (scale, zero); to float8e4m3fn without rounding to whole
            steps, saturated at 448. A step's `kind` is the type of its result: of "cast" and
            "quantize" what y holds (float16, ...), else the type that it is computed in.
    """

    op: str
    dims: tuple[int, ...]
    y: Ref
    inputs: tuple[Ref, ...] = ()
    scalars: tuple[float, ...] = ()
    rows: tuple[int, int] = (0, 0)
    steps: tuple[Expression, ...] = field(default=())
