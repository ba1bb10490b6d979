"""What each lane of a warp holds of a weight, 2:4 or dense, and packing weights in that order.

A sparse tensor core takes 16 rows (each warp of `wgmma.sp`: its 16 of 64) by 64 bytes along K, of
which 32 bytes are kept. It does not matter how wide an element is, but for the metadata. With lane
= 4 g + t, four registers of a lane hold

    register i: row g + 8 (i % 2), kept bytes 16 (i // 2) + 4 t ... + 3

Two of four values are kept; their places, 2 bits each, the lower first, are 4 bits of metadata. A
register of metadata is 8 times 4 bits, the lowest for the lowest columns:

    1-byte elements: row g + 8 (t % 2), columns 32 (t // 2) ... + 31           of one step
    2-byte elements: bits 0-15 row g, bits 16-31 row g + 8,
                     columns 16 (t % 2) ... + 15                               of step t // 2

So with 2-byte elements one register serves two steps: lanes t = 0, 1 (selector 0) the first, lanes
t = 2, 3 (selector 1) the second.

A dense tensor core takes 16 rows by 32 bytes along K, all of them kept, in the same registers.

Source: PTX ISA, matrix fragments of mma.sp.m16n8k32 (.f16), m16n8k64 (.s8), of wgmma.mma_async.sp
and of wgmma.mma_async with A in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.kernels.cuda.kernel import divided

Array = NDArray[Any]
ROWS = 16
"""Out channels of a record."""
STEP_BYTES = 128
"""Bytes of x along K that a record meets: two sparse instructions, or four dense ones."""
NOTHING = 4
"""Metadata of four zeros: the first two are kept."""
_LANES = np.arange(32)
_G, _T = _LANES // 4, _LANES % 4


def record_bytes(element_bytes: int, *, dense: bool = False) -> int:
    """Of what a warp holds of 16 channels by 128 bytes: values, then metadata if it is 2:4."""
    if dense:
        return ROWS * STEP_BYTES
    return 2 * 32 * 16 + (256 if element_bytes == 1 else 128)


def steps_of(k: int, element_bytes: int) -> int:
    """How many times 128 bytes hold K elements."""
    return divided(k * element_bytes, STEP_BYTES)


def is_two_four(w: Array) -> bool:
    """Whether at most two of each four along the last axis are not zero."""
    if w.shape[-1] % 4:
        return False
    groups = (w != 0).reshape(-1, 4)
    return bool((groups.sum(1) <= 2).all())


def compress(w: Array) -> tuple[Array, Array]:
    """Keeps two of each four.

    Args:
        w: [N, K], 2:4 along K.

    Returns:
        the kept values [N, K / 2] and, for each four, 4 bits of metadata [N, K / 4] uint32: the
        place of the first kept one, plus 4 times that of the second, which lies behind it.
    """
    fours = w.reshape(w.shape[0], -1, 4)
    places = _PLACES[np.packbits(fours != 0, axis=2, bitorder="little")[..., 0]]
    kept = np.take_along_axis(fours, places, 2)
    nibbles = (places[..., 0] + 4 * places[..., 1]).astype(np.uint32)
    return kept.reshape(w.shape[0], -1), nibbles


def _places() -> Array:
    """For each set of four bits the places of two that hold all that are set, if these are two."""
    found = []
    for bits in range(16):
        order = sorted(range(4), key=lambda place: not bits >> place & 1)
        found.append(sorted(order[:2]))
    return np.array(found)


_PLACES = _places()


def padded(w: Array) -> Array:
    """The weight [N, K] with zeros up to a whole step along K."""
    columns = steps_of(w.shape[1], w.dtype.itemsize) * STEP_BYTES // w.dtype.itemsize
    return np.pad(w, ((0, 0), (0, columns - w.shape[1])))


def records(kept: Array, nibbles: Array) -> Array:
    """Compressed weights in the order in which lanes read them.

    Args:
        kept: [rows, columns], of `compress` of a `padded` weight; rows a multiple of 16.
        nibbles: likewise.

    Returns:
        uint8 [steps along K, tiles of 16 rows, record_bytes].
    """
    kept = kept.view(np.uint8)
    tiles, steps = kept.shape[0] // ROWS, kept.shape[1] // (STEP_BYTES // 2)
    values = _values(kept.reshape(tiles, ROWS, steps, 2, 32))
    metadata = _metadata(nibbles.reshape(tiles, ROWS, steps, 2, -1))
    return np.concatenate([values, metadata], axis=2)


def dense_records(w: Array) -> Array:
    """A dense weight in the order in which lanes read it.

    Args:
        w: [rows, columns], `padded`; rows a multiple of 16.

    Returns:
        uint8 [steps along K, tiles of 16 rows, record_bytes].
    """
    values = w.view(np.uint8)
    tiles, steps = values.shape[0] // ROWS, values.shape[1] // STEP_BYTES
    return _values(values.reshape(tiles, ROWS, steps, 4, 32))


def _values(kept: Array) -> Array:
    """[tiles, 16, steps, parts, 32] bytes -> [steps, tiles, 512 parts].

    The bytes of a part, which is what an instruction takes, are (lane, register, byte).
    """
    register = np.arange(4)
    row = _G[:, None] + 8 * (register % 2)
    byte = 4 * _T[:, None] + 16 * (register // 2)
    found = kept[:, row[..., None], :, :, byte[..., None] + np.arange(4)]
    # Advanced indices come first: [lane, register, byte, tiles, steps, part].
    ordered = found.transpose(4, 3, 5, 0, 1, 2)
    return np.ascontiguousarray(ordered).reshape(kept.shape[2], kept.shape[0], -1)


def _metadata(nibbles: Array) -> Array:
    """[tiles, 16, steps, 2, fours of a half] -> [steps, tiles, 256 or 128] bytes."""
    tiles, _, steps, _, fours = nibbles.shape
    if fours == 16:  # 1-byte elements: [tiles, row, steps, half, column block, 8]
        words = _word(nibbles.reshape(tiles, ROWS, steps, 2, 2, 8))
        found = words[:, _G + 8 * (_T % 2), :, :, _T // 2]  # [lane, tiles, steps, half]
        ordered = found.transpose(2, 1, 3, 0)
    else:  # 2-byte elements: [tiles, row, steps, half, column block, 4]
        words = _word(nibbles.reshape(tiles, ROWS, steps, 2, 2, 4))
        low, high = words[:, _G, :, _T // 2, _T % 2], words[:, _G + 8, :, _T // 2, _T % 2]
        ordered = (low | high << np.uint32(16)).transpose(2, 1, 0)
    return np.ascontiguousarray(ordered).view(np.uint8).reshape(steps, tiles, -1)


def _word(nibbles: Array) -> Array:
    """Joins the 4 bits along the last axis, the lowest first."""
    shifts = (4 * np.arange(nibbles.shape[-1])).astype(np.uint32)
    return np.asarray(np.bitwise_or.reduce(nibbles << shifts, axis=-1), np.uint32)
