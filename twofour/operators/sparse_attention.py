"""The operator `twofour.plugins.SparseAttention`: attention where each query sees chosen keys.

    y = SparseAttention(q, k, v, keep, blocks)

    q, k, v  [batch, length, heads * d], float32 or bfloat16, or quantized
    keep     bool, broadcastable to [batch, length]: keys that are seen at all; [[true]] for all
    blocks   int32 [rows, n], which blocks of keys each block of queries sees; [[-1]] for none
    y        [batch, length, heads * d]

    heads          heads of all four
    window         tokens seen on each side of a query; -1 (default) for no band
    global_tokens  so many first tokens see all and are seen by all; default 0
    causal         1: no query sees a later key; default 0
    block          tokens of a block of the table; default 64
    scale          of the scores; default 0 stands for 1 / sqrt(d)

`core/sparse_attention.py` says which key a query sees. The meaning is dense attention with that
mask, one head after the other, so that even it needs no more memory than one head's scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from twofour.core.attention import attention, attention_int8
from twofour.core.plugins import (
    Array,
    Attribute,
    Attributes,
    CpuTactic,
    CudaTactic,
    Operator,
    Problem,
    Typed,
)
from twofour.core.sparse_attention import blockwise
from twofour.operators.sparse_attention_code import Numbers, configs, emit, scales_of, why_not

DOMAIN, NAME = "twofour.plugins", "SparseAttention"

MEANING = """
<domain: "twofour.plugins", opset_import: ["" : 18]>
SparseAttention <heads, window: int = -1, global_tokens: int = 0, causal: int = 0,
                 block: int = 64, scale: float = 0.0> (q, k, v, keep, blocks) => (y)
{
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  first_axis = Constant <value_ints: ints = [0]> ()
  second_axis = Constant <value_ints: ints = [1]> ()
  third_axis = Constant <value_ints: ints = [2]> ()
  as_they_are = Constant <value_ints: ints = [0, 0]> ()
  rest = Constant <value_ints: ints = [-1]> ()
  heads = Constant <value_int: int = @heads> ()
  window = Constant <value_int: int = @window> ()
  global_tokens = Constant <value_int: int = @global_tokens> ()
  causal = Constant <value_int: int = @causal> ()
  block = Constant <value_int: int = @block> ()
  given = Constant <value_float: float = @scale> ()

  length_1 = Shape <start: int = 1, end: int = 2> (q)
  length = Squeeze (length_1, first_axis)
  token = Range (zero, length, one)
  query = Unsqueeze (token, second_axis)
  key = Unsqueeze (token, first_axis)
  signed = Sub (query, key)
  distance = Abs (signed)
  near = LessOrEqual (distance, window)
  key_is_global = Less (key, global_tokens)
  query_is_global = Less (query, global_tokens)

  rows_1 = Shape <start: int = 0, end: int = 1> (blocks)
  rows = Squeeze (rows_1, first_axis)
  last_row = Sub (rows, one)
  token_block = Div (token, block)
  token_row = Min (token_block, last_row)
  last_token = Sub (length, one)
  last_block = Div (last_token, block)
  block_count = Add (last_block, one)
  numbers = Range (zero, block_count, one)
  table = Cast <to: int = 7> (blocks)
  table_3 = Unsqueeze (table, third_axis)
  hits = Equal (table_3, numbers)
  hits_f = Cast <to: int = 1> (hits)
  any_hit = ReduceMax <keepdims: int = 0> (hits_f, second_axis)
  hit_rows = Gather <axis: int = 0> (any_hit, token_row)
  hit_f = Gather <axis: int = 1> (hit_rows, token_block)
  chosen = Cast <to: int = 9> (hit_f)

  global_any = Or (key_is_global, query_is_global)
  near_any = Or (near, global_any)
  some = Or (near_any, chosen)
  not_later = LessOrEqual (key, query)
  is_causal = Equal (causal, one)
  not_causal = Not (is_causal)
  in_time = Or (not_causal, not_later)
  seen = And (some, in_time)
  kept = Unsqueeze (keep, second_axis)
  visible = And (seen, kept)
  visible_f = CastLike (visible, q)
  any_key = ReduceMax <keepdims: int = 1> (visible_f, rest)
  sees = Cast <to: int = 9> (any_key)

  heads_1 = Reshape (heads, rest)
  split = Concat <axis: int = 0> (as_they_are, heads_1, rest)
  q_heads = Reshape (q, split)
  k_heads = Reshape (k, split)
  v_heads = Reshape (v, split)
  q_first = Transpose <perm: ints = [2, 0, 1, 3]> (q_heads)
  k_first = Transpose <perm: ints = [2, 0, 3, 1]> (k_heads)
  v_first = Transpose <perm: ints = [2, 0, 1, 3]> (v_heads)
  d_1 = Shape <start: int = 3, end: int = 4> (q_heads)
  d = Squeeze (d_1, first_axis)
  d_f = Cast <to: int = 1> (d)
  root = Sqrt (d_f)
  usual = Reciprocal (root)
  none_f = Constant <value_float: float = 0.0> ()
  has_none = Equal (given, none_f)
  scale_f = Where (has_none, usual, given)
  scale = CastLike (scale_f, q)
  nothing = CastLike (none_f, q)
  lowest_f = Constant <value_float: float = -inf> ()
  lowest = CastLike (lowest_f, q)
  y_first = Scan <num_scan_inputs: int = 3, body: graph = each_head
    (q_head, k_head, v_head) => (y_head) {
      products = MatMul (q_head, k_head)
      scaled = Mul (products, scale)
      scores = Where (visible, scaled, lowest)
      powers = Softmax <axis: int = -1> (scores)
      shares = Where (sees, powers, nothing)
      y_head = MatMul (shares, v_head)
    }> (q_first, k_first, v_first)
  y_heads = Transpose <perm: ints = [1, 2, 0, 3]> (y_first)
  joined = Constant <value_ints: ints = [0, 0, -1]> ()
  y = Reshape (y_heads, joined)
}
"""


def shapes(inputs: Sequence[Typed], attributes: Attributes) -> list[Typed]:
    """That of y: those of q.

    Raises:
        ValueError: q, k and v do not fit together, or the heads do not share their channels.
    """
    (q, dtype), (k, _), (v, _) = inputs[:3]
    heads = attributes.get("heads", 0)
    if len(q) != 3 or q != k or q != v:
        raise ValueError(f"expected q, k and v [batch, length, channels], got {q}, {k} and {v}")
    if not isinstance(heads, int) or heads < 1 or q[2] % heads:
        raise ValueError(f"{q[2]} channels do not divide among {heads} heads")
    return [(q, dtype)]


def samples(problem: Problem, random: np.random.Generator) -> list[Array]:
    """Normal floats or bytes for q, k and v, and a mask that hides some keys."""
    found: list[Array] = []
    for each in problem.inputs:
        if each is None or each.constant is not None:
            continue
        if each.dtype == "bool":
            found.append(random.random(each.shape) < 0.9)
        elif each.dtype == "uint8":
            found.append(random.integers(0, 256, each.shape, np.uint8))
        else:
            found.append(random.standard_normal(each.shape, np.float32))
    return found


def reference(
    q: Array, k: Array, v: Array, keep: Array, blocks: Array, **attributes: Attribute
) -> Array:
    """What the meaning computes, in memory that grows with the length alone."""
    numbers = Numbers.of(attributes)
    pattern = numbers.pattern(q.shape[1], blocks)
    scale = numbers.scale or (q.shape[2] // numbers.heads) ** -0.5

    def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
        return attention(q, k, v, scale, mask)

    return blockwise((q, k, v), numbers.heads, pattern, attend, keep)


def stored(problem: Problem, arrays: Sequence[Array | None]) -> list[Array]:
    """What int8 kernels compute, to the last bit: `core.attention.attention_int8`."""
    q, k, v, keep, blocks = (np.asarray(array) for array in arrays)
    numbers, scales, y = Numbers.of(problem.attributes), scales_of(problem), problem.outputs[0]

    def bias(x: Array) -> Array:
        return x if x.dtype == np.uint8 else (x.astype(np.int16) + 128).astype(np.uint8)

    def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
        return attention_int8(q, k, v, scales, mask)

    pattern = numbers.pattern(q.shape[1], blocks)
    found = blockwise((bias(q), bias(k), bias(v)), numbers.heads, pattern, attend, keep)
    return [(found.astype(np.int16) - 128).astype(np.int8) if y.dtype == "int8" else found]


_ROUNDED = (
    CpuTactic(
        "lists bfloat16",
        partial(emit, rounds=True),
        partial(why_not, rounds=True),
        partial(configs, rounds=True),
        strided=True,
        bfloat16=True,
    ),
)

SPARSE_ATTENTION = Operator(
    DOMAIN,
    NAME,
    MEANING,
    shapes,
    tactics={
        "cpu": (*_ROUNDED, CpuTactic("lists", emit, why_not, configs, strided=True)),
        "cuda": (
            CudaTactic("sparse attention", "twofour.operators.sparse_attention_cuda", strided=True),
        ),
    },
    samples=samples,
    reference=reference,
    stored=stored,
    quantized=("q", "k", "v", "y"),
)
OPERATORS = (SPARSE_ATTENTION,)
