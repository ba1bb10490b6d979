"""What fused operators and their parts mean, in standard operators: ONNX text for ops.py."""

from __future__ import annotations

from twofour.core.activation_texts import GELU, GELU_TANH, SILU

CONV = (
    "Conv <strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations,"
    " group: int = @group>"
)
MAX_POOL = (
    "MaxPool <kernel_shape: ints = @kernel_shape, strides: ints = @strides, pads: ints = @pads>"
)
AVERAGE_POOL = (
    "AveragePool <kernel_shape: ints = @kernel_shape, strides: ints = @strides, pads: ints = @pads,"
    " count_include_pad: int = @count_include_pad>"
)
MATMUL = """w_t = Transpose <perm = [1, 0]> ({w})
 product = MatMul ({x}, w_t)
 acc = Add (product, bias)"""
SLICE_PAD = """from = Constant <value_ints = [0, 0]> ()
 to = Constant <value_ints = [2147483647, 2147483647]> ()
 axes = Constant <value_ints = [2, 3]> ()
 step = Constant <value_ints: ints = @steps> ()
 sliced = Slice (x, from, to, axes, step)
 both = Constant <value_ints: ints = @channel_pads> ()
 halves = Constant <value_ints = [1, 1]> ()
 before, after = Split <axis = 0> (both, halves)
 zero = Constant <value_ints = [0]> ()
 zeros = Constant <value_ints = [0, 0]> ()
 pads = Concat <axis = 0> (zero, before, zeros, zero, after, zeros)
 acc = Pad (sliced, pads, value)"""
REPEAT = """repeats = Constant <value_ints: ints = @factors> ()
 factors = Cast <to = 1> (repeats)
 ones = Constant <value_floats = [1.0, 1.0]> ()
 scales = Concat <axis = 0> (ones, factors)
 acc = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric",
  nearest_mode = "floor"> (x_f, , scales)"""
BY_ROWS = """sizes = Abs (x)
 HIGHEST
 least = Constant <value_float = 7.888609052210118e-31> ()
 highest = Max (peak, least)
 steps = Constant <value_float = 127.0> ()
 factor = Div (steps, highest)
 x_scale = Div (highest, steps)
 scaled = Mul (x, factor)
 rounded = Round (scaled)
 zero = Constant <value_float = 128.0> ()
 moved = Add (rounded, zero)
 q = Cast <to = 2> (moved)
 x_zero_point = Cast <to = 2> (zero)"""
"""Of x with a scale for each row; HIGHEST stands for what makes `peak` of `sizes`."""
TOGETHER = "q, x_scale, x_zero_point = DynamicQuantizeLinear (x)"
INTEGER_MATMUL = """w_t = Transpose <perm = [1, 0]> (w)
 sums = MatMulInteger (q, w_t, x_zero_point)
 real = Cast <to = 1> (sums)
 of_x = Mul (real, x_scale)
 product = Mul (of_x, w_scale)
 acc = Add (product, bias)"""
NORM = "LayerNormalization <axis = -1, epsilon: float = @epsilon> (x, gamma, beta)"
TOKENS = """t = Transpose <perm = [0, 2, 3, 1]> (x)
 keep = Shape <start = 0, end = 1> (x)
 channels = Shape <start = 1, end = 2> (x)
 rest = Constant <value_ints = [-1]> ()
 to = Concat <axis = 0> (keep, rest, channels)
 acc = Reshape (t, to)"""


def _attention(q: str, k: str, v: str) -> str:
    """Attention with the operands under these names; MASK stands for what makes `p` of `scaled`."""
    return f"""heads = Constant <value_int: int = @heads> ()
 rest = Constant <value_ints = [-1]> ()
 keep = Constant <value_ints = [0, 0]> ()
 count = Reshape (heads, rest)
 split = Concat <axis = 0> (keep, count, rest)
 join = Concat <axis = 0> (keep, rest)
 q_split = Reshape ({q}, split)
 k_split = Reshape ({k}, split)
 v_split = Reshape ({v}, split)
 q_heads = Transpose <perm = [0, 2, 1, 3]> (q_split)
 k_heads = Transpose <perm = [0, 2, 3, 1]> (k_split)
 v_heads = Transpose <perm = [0, 2, 1, 3]> (v_split)
 products = MatMul (q_heads, k_heads)
 factor = Constant <value_float: float = @scale> ()
 scaled = Mul (products, factor)
 MASK
 o_heads = MatMul (p, v_heads)
 o_split = Transpose <perm = [0, 2, 1, 3]> (o_heads)
 acc = Reshape (o_split, join)"""


MASKS = {
    "": "p = Softmax <axis = -1> (scaled)",
    # Where every key is masked by -inf, there are zeros instead of NaN.
    "Mask": """scores = Add (scaled, mask)
 shares = Softmax <axis = -1> (scores)
 unseen = IsNaN (shares)
 nothing = Constant <value_float = 0.0> ()
 p = Where (unseen, nothing, shares)""",
    "Causal": """nothing = Constant <value_float = 0.0> ()
 hidden = Log (nothing)
 size = Shape (scaled)
 everywhere = Expand (hidden, size)
 next = Constant <value_int = 1> ()
 future = Trilu <upper = 1> (everywhere, next)
 scores = Add (scaled, future)
 p = Softmax <axis = -1> (scores)""",
}

QUANTIZED_QKV = tuple(f"{name}{end}" for name in "qkv" for end in ("", "_scale", "_zero_point"))
ATTENTION = _attention("q", "k", "v")
FLOAT_ATTENTION = _attention("q_f", "k_f", "v_f")
"""Of operands that were made float32."""
QUANTIZED_ATTENTION = (
    "".join(
        f"{name}_f = DequantizeLinear ({name}, {name}_scale, {name}_zero_point)\n "
        for name in "qkv"
    )
    + FLOAT_ATTENTION
)
"""Of bytes; its kernels round exponentials to bytes, which this does not (core/attention.py)."""

ACTIVATIONS = {
    "Relu": "act = Relu (VALUE)",
    "Clip": """low = Constant <value_float: float = @low> ()
 high = Constant <value_float: float = @high> ()
 act = Clip (VALUE, low, high)""",
    "HardSwish": "act = HardSwish (VALUE)",
    "HardSigmoid": "act = HardSigmoid <alpha = 0.16666667, beta = 0.5> (VALUE)",
    "Sigmoid": "act = Sigmoid (VALUE)",
    "Silu": SILU,
    "GeluTanh": GELU_TANH,
    "Gelu": GELU,
    "Tanh": "act = Tanh (VALUE)",
}
"""What leads from VALUE to `act`, by the activation's name; Clip has attributes low and high."""


def highest(opset: int) -> str:
    """The largest number of each row; from opset 18 on its axes are an input."""
    if opset < 18:
        return "peak = ReduceMax <axes = [-1], keepdims = 1> (sizes)"
    return """last = Constant <value_ints = [-1]> ()
 peak = ReduceMax <keepdims = 1> (sizes, last)"""


def mean(opset: int) -> str:
    """The mean over height and width; from opset 18 on its axes are an input."""
    if opset < 18:
        return "acc = ReduceMean <axes = [2, 3], keepdims: int = @keepdims> (x_f)"
    return """axes = Constant <value_ints = [2, 3]> ()
 acc = ReduceMean <keepdims: int = @keepdims> (x_f, axes)"""
