"""Sparse float32 convolution and matrix product: one permute and one multiply-add per 2 inputs.

Of 8 consecutive inputs a channel keeps 4, wherever they lie: 2:4 and 4:8. `vpermps` (AVX-512 only)
picks one kept input for every lane out of 16, by an index of 4 bits whose higher bits it ignores:
so eight indices sit in one register and are shifted into place. Then a fused multiply-add with 16
kept weights: half the multiply-adds of dense, and as many permutes. Layout of a panel:

    for run in runs: for group in groups:                       # of at most 2 steps of 8 inputs
        for block in blocks:
            for lane in 16: u32 = sum over j of index(j) << 4 j
            for j in 4 steps: for lane in 16: w[block, lane][run][16 group + index(j)]

In bfloat16 `vpermw` picks two of 32 inputs for every lane, `vdpbf16ps` multiplies both, and three
indices of 5 bits sit in a word (conv_sparse_bf16.py):

    for run in runs: for group in groups:                       # of at most 4 steps of 8 inputs
        for block in blocks:
            for i in ceil(2 steps / 3): for lane in 16: for k in 2:
                u16 = sum over j in 3 of index(3 i + j, k) << 5 j
            for j in 2 steps: for lane in 16: for k in 2:
                w[block, lane][run][32 group + index(j, k)]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.patterns import why_not
from twofour.kernels.cpu.llvm import Value
from twofour.kernels.cpu.nest import Tiled
from twofour.kernels.cpu.problem import ELEMENT_BYTES, ConvProblem, tiles_for
from twofour.kernels.cpu.tactic import Tactic, Weights
from twofour.kernels.cpu.vector import F32S, I32S, Vector

_WIDTH = 8
_KEPT = 4  # of 8 consecutive inputs


@dataclass(frozen=True)
class Permuted:
    """Kept weights, and the indices of their inputs within 64 bytes.

    Attributes:
        dtype: of the inputs, "float32" or "bfloat16".
    """

    dtype: str = "float32"
    k_per_step: int = _WIDTH
    overlaps: bool = False

    @property
    def name(self) -> str:
        """As reports show it."""
        return "2:4" if self.dtype == "float32" else "4:8"

    @property
    def steps_per_group(self) -> int:
        """Steps whose inputs one register holds."""
        return 64 // (_WIDTH * ELEMENT_BYTES[self.dtype])

    @property
    def index_bits(self) -> int:
        """Of an index into the inputs of a register."""
        return (64 // ELEMENT_BYTES[self.dtype] - 1).bit_length()

    @property
    def indices_per_word(self) -> int:
        """That fit in as many bits as an input has."""
        return 8 * ELEMENT_BYTES[self.dtype] // self.index_bits

    def _picks(self, steps: int) -> int:
        """Permutes of so many steps."""
        return steps * _KEPT * ELEMENT_BYTES[self.dtype] // 4

    def _vectors(self, steps: int) -> int:
        """Of 64 bytes that hold the indices of so many steps."""
        return -(-self._picks(steps) // self.indices_per_word)

    def group_bytes(self, blocks: int, steps: int) -> int:
        """Bytes of `steps` steps of a panel."""
        return 64 * blocks * (self._vectors(steps) + self._picks(steps))

    def pack_group(self, w: NDArray[Any]) -> NDArray[np.uint8]:
        """[panels, blocks, 16, steps, 8] to [panels, group_bytes].

        Where fewer than 4 are nonzero, the rest is the first of them times zero: an input of this
        channel, never one beyond the run, where the bytes of a NaN may lie.

        Raises:
            ValueError: more than 4 of 8 are nonzero.
        """
        panels, blocks, lanes, steps, _ = w.shape
        used = w != 0
        if (used.sum(-1) > _KEPT).any():
            raise ValueError(f"more than {_KEPT} of {_WIDTH} consecutive weights are nonzero")
        places, filled = _kept_table()
        codes = np.packbits(used, axis=-1, bitorder="little")[..., 0]
        values = np.take_along_axis(w, places[codes], axis=-1) * filled[codes]
        index = places[codes] + _WIDTH * np.arange(steps)[:, None]
        kept, picked = (
            part.astype(kind)
            .reshape(panels, blocks, lanes, self._picks(steps), -1)
            .transpose(0, 1, 3, 2, 4)
            for part, kind in ((values, w.dtype), (index, f"u{w.itemsize}"))
        )
        vectors = [
            self._joined(picked[:, :, first : first + self.indices_per_word])
            for first in range(0, picked.shape[2], self.indices_per_word)
        ]
        both = np.concatenate([np.stack(vectors, axis=2).view(w.dtype), kept], axis=2)
        return np.ascontiguousarray(both.reshape(panels, -1)).view(np.uint8)

    def _joined(self, index: NDArray[Any]) -> NDArray[Any]:
        """[panels, blocks, at most indices_per_word, ...] to [panels, blocks, ...]."""
        word = np.zeros_like(index[:, :, 0])
        for j in range(index.shape[2]):
            word |= index[:, :, j] << index.dtype.type(self.index_bits * j)
        return word

    def emit_group(
        self, v: Vector, rows: Sequence[int], x: Value, w: Value, sums: list[Value], steps: int
    ) -> list[Value]:
        """sums[row, block] += sum over j of x[row, index[block, j]] . values[block, j]."""
        f, blocks, vectors = v.f, len(sums) // len(rows), self._vectors(steps)
        sums = list(sums)
        for block in range(blocks):
            base = block * self.group_bytes(1, steps)
            for j in range(self._picks(steps)):
                which, field = divmod(j, self.indices_per_word)
                words = f.load(I32S, w, base + 64 * which, 64)
                index = self._shifted(v, words, field)
                weights = f.load(self._kind, w, base + 64 * (vectors + j), 64)
                # Without this LLVM keeps every position's inputs in registers across j and spills
                # the sums.
                f.in_order()
                for row, offset in enumerate(rows):
                    at = row * blocks + block
                    inputs = f.load(self._kind, x, offset)
                    sums[at] = self._add(v, sums[at], (inputs, index, weights))
        return sums

    @property
    def _kind(self) -> str:
        """LLVM's type of 64 bytes of inputs or weights."""
        return F32S if self.dtype == "float32" else I32S

    def _shifted(self, v: Vector, words: Value, field: int) -> Value:
        """The indices of a field in the lowest bits."""
        bits = self.index_bits * field
        if self.dtype == "float32" or not bits:
            return v.shift_right(words, bits)
        return v.shift_right_words(words, bits)

    def _add(self, v: Vector, acc: Value, operands: tuple[Value, Value, Value]) -> Value:
        """Acc + the picked inputs times their weights."""
        inputs, index, weights = operands
        if self.dtype == "float32":
            return v.fma(acc, v.select_floats(inputs, index), weights)
        return v.dot2(acc, v.select_words(inputs, index), weights)


@cache
def _kept_table() -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """[256, 4] each: for a set of nonzeros, as bits, their places; and which of the 4 are places.

    What is left repeats the first one.
    """
    places, filled = np.zeros((256, _KEPT), np.intp), np.zeros((256, _KEPT), np.bool_)
    for code in range(256):
        found = [bit for bit in range(_WIDTH) if code >> bit & 1][:_KEPT]
        filled[code, : len(found)] = True
        places[code] = [*found, *(found[:1] or [0]) * (_KEPT - len(found))]
    return places, filled


def _refuse(problem: ConvProblem, w: Weights, isa: str) -> str:
    if isa != "avx512vnni":
        return f"needs AVX-512: picking one of 16 floats a lane has no instruction on {isa}"
    if not why_not(w, "4:8"):
        return ""
    return why_not(w, "2:4") or ""


TACTICS = (
    Tactic(
        "2:4",
        "float32",
        "2:4",
        Tiled(Permuted()),
        _refuse,
        lambda p, isa: tiles_for(p, isa, blocks=(1, 2), count=2, spare=6),
    ),
)
