"""Attention as one kernel: for each head softmax(q k^T * scale + mask) v, int8 or float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twofour.core.attention import AttentionScales
from twofour.kernels.cpu.problem import Strides

_HEADER_BYTES = 64


@dataclass(frozen=True)
class AttentionProblem:
    """One attention operator; head h is the channels h * d ... of a token's row.

    Of the strides `image` is that from one batch entry to the next and `pixel` that from one token
    to the next; `row` is not used.

    Attributes:
        batch: number of sequences.
        heads: heads of q and y.
        kv_heads: heads of k and v; head h of q uses h * kv_heads // heads.
        q_len: queries a sequence.
        k_len: keys a sequence.
        d: channels of a head of q and k.
        dv: channels of a head of v and y.
        dtype: of q, k and v: "int8" (stored as bytes, k and v with zero point 128) or "float32".
        q: strides of q.
        k: strides of k.
        v: strides of v.
        y: strides of the output.
        out: dtype of the output, "int8" or "float32".
        mask: what is added to the scores: "" nothing, "keys" float32 [batch, k_len], "full"
            float32 [q_len, k_len] for each batch entry and head.
        mask_batch: bytes from one batch entry's mask to the next, 0 where they share it.
        mask_head: bytes from one head's mask to the next, 0 where they share it ("full").
        mask_row: bytes from one query's mask to the next, 0 where they share it ("full").
        causal: query i sees the keys 0 ... i only.
    """

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    d: int
    dv: int
    dtype: str
    q: Strides
    k: Strides
    v: Strides
    y: Strides
    out: str
    mask: str = ""
    mask_batch: int = 0
    mask_head: int = 0
    mask_row: int = 0
    causal: bool = False

    @property
    def pieces(self) -> int:
        """Units of work that threads share: heads of all sequences."""
        return self.batch * self.heads

    @property
    def scratch_bytes(self) -> int:
        """Bytes that the kernel needs at `r`; 0 where it works on the stack."""
        return 0


@dataclass(frozen=True)
class Offsets:
    """Where the other operands lie: bytes from q, the pointer `x`."""

    k: int
    v: int
    mask: int = 0


def pack_attention(scales: AttentionScales, offsets: Offsets) -> NDArray[np.uint8]:
    """The 64-byte header.

        0 i64 k   8 i64 v   16 i64 mask   24 f32 score scale   28 f32 1 / p scale
        32 f32 output scale   36 i32 q_zero   40 i32 p_zero   44 i32 y_zero

    Args:
        scales: of a float32 attention `score` is the factor of the scores, `y` and `y_zero` those
            of a quantized output, the rest is not used.
        offsets: of k, v and the mask from q.

    Raises:
        ValueError: the scale of the probabilities is not a positive normal number.
    """
    if not np.isfinite(scales.inverse_p) or scales.p <= 0:
        raise ValueError(f"the scale of the probabilities is {scales.p}, expected > 0")
    out = np.zeros(_HEADER_BYTES // 4, np.int32)
    out[:6].view(np.int64)[:] = [offsets.k, offsets.v, offsets.mask]
    out[6:9].view(np.float32)[:] = [scales.score, scales.inverse_p, scales.epilogue.scale[0]]
    out[9:12] = [scales.q_zero, scales.p_zero, scales.y_zero or 0]
    return out.view(np.uint8)
