"""What attention and its neighbours mean, in standard operators: ONNX text for ops.py."""

from __future__ import annotations

NORM = "LayerNormalization <axis = -1, epsilon: float = @epsilon> (x, gamma, beta)"
TOKENS = """t = Transpose <perm = [0, 2, 3, 1]> (x)
 keep = Shape <start = 0, end = 1> (x)
 channels = Shape <start = 1, end = 2> (x)
 rest = Constant <value_ints = [-1]> ()
 to = Concat <axis = 0> (keep, rest, channels)
 acc = Reshape (t, to)"""


def _attention(q: str, k: str, v: str, softmax: str) -> str:
    """Attention with the operands under these names and further nodes after the softmax `p`.

    MASK stands for what makes `scores` of `scaled`.
    """
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
 p = Softmax <axis = -1> (scores)
 {softmax}
 o_heads = MatMul (p_f, v_heads)
 o_split = Transpose <perm = [0, 2, 1, 3]> (o_heads)
 acc = Reshape (o_split, join)"""


MASKS = {
    "": "scores = Identity (scaled)",
    "Mask": "scores = Add (scaled, mask)",
    "Causal": """nothing = Constant <value_float = 0.0> ()
 hidden = Log (nothing)
 size = Shape (scaled)
 everywhere = Expand (hidden, size)
 next = Constant <value_int = 1> ()
 future = Trilu <upper = 1> (everywhere, next)
 scores = Add (scaled, future)""",
}

QUANTIZED_QKV = tuple(f"{name}{end}" for name in "qkv" for end in ("", "_scale", "_zero_point"))
ATTENTION = _attention("q", "k", "v", "p_f = Identity (p)")
QUANTIZED_ATTENTION = "".join(
    f"{name}_f = DequantizeLinear ({name}, {name}_scale, {name}_zero_point)\n " for name in "qkv"
) + _attention(
    "q_f",
    "k_f",
    "v_f",
    "p_q = QuantizeLinear (p, p_scale, p_zero_point)\n"
    " p_f = DequantizeLinear (p_q, p_scale, p_zero_point)",
)
