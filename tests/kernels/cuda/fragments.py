"""Sparse tensor cores in numpy, by the PTX ISA: what each register of each lane means.

Written from the document and not from the packing, so that each tests the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
KEPT = 32  # bytes of a row of A in one instruction


def a_places(lane: int, element: int, size: int) -> tuple[int, int, int]:
    """Row, first column, and which kept value from there on a_`element` is (mma.sp.m16n8k64/k32).

    Elements of 1 byte: four kept of the 8 columns from firstcol on; of 2 bytes: two of 4.
    """
    group, thread = lane >> 2, lane % 4
    if size == 1:
        row = group if element < 4 or 8 <= element < 12 else group + 8
        first = thread * 8 + (0 if element < 8 else 32)
        return row, first, element % 4
    row = group if element < 2 or 4 <= element < 6 else group + 8
    first = thread * 4 + (0 if element < 4 else 16)
    return row, first, element % 2


def metadata_places(lane: int, size: int, selector: int) -> list[tuple[int, int, int]]:
    """(row, first column of four, lowest of its 4 bits) for all that a lane's register says."""
    group, thread = lane >> 2, lane % 4
    if size == 1:  # all four lanes of a group take part
        row, first = group + 8 * (thread % 2), 32 * (thread // 2)
        return [(row, first + 4 * i, 4 * i) for i in range(8)]
    if thread // 2 != selector:
        return []
    first = 16 * (thread % 2)
    return [(group + 8 * (i // 4), first + 4 * (i % 4), 4 * i) for i in range(8)]


def sparse_operand(a: Array, e: Array, selector: int) -> Array:
    """A [16, K] of an instruction.

    Args:
        a: [32 lanes, elements of a lane], the type of A.
        e: uint32 [32], metadata.
        selector: of the lanes that hold it.
    """
    size = a.dtype.itemsize
    k = 2 * KEPT // size
    nibbles = np.zeros((16, k // 4), np.uint32)
    for lane in range(32):
        for row, first, shift in metadata_places(lane, size, selector):
            nibbles[row, first // 4] = (int(e[lane]) >> shift) & 15
    dense = np.zeros((16, k), a.dtype)
    for lane in range(32):
        for element in range(a.shape[1]):
            row, first, which = a_places(lane, element, size)
            four = first // 4 + which // 2
            place = (int(nibbles[row, four]) >> 2 * (which % 2)) & 3
            dense[row, 4 * four + place] = a[lane, element]
    return dense


def b_of(registers: Array, size: int) -> Array:
    """B [K, 8] as bytes [8, 64]: register r of lane 4 g + t holds bytes 16 r + 4 t ... of column g.

    Args:
        registers: uint8 [32 lanes, 4 registers, 4 bytes].
        size: bytes of an element; the same for all.
    """
    del size
    columns = np.zeros((8, 64), np.uint8)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for r in range(4):
            columns[group, 16 * r + 4 * thread : 16 * r + 4 * thread + 4] = registers[lane, r]
    return columns


def ldmatrix(shared: Array, addresses: Array) -> Array:
    """What ldmatrix.x4 gives: uint8 [32 lanes, 4 registers, 4 bytes].

    Args:
        shared: uint8, shared memory.
        addresses: [32], of the 16-byte rows: lanes 8 i ... 8 i + 7 those of matrix i.
    """
    found = np.zeros((32, 4, 4), np.uint8)
    for matrix in range(4):
        for lane in range(32):
            row = int(addresses[8 * matrix + lane // 4]) + lane % 4 * 4
            found[lane, matrix] = shared[row : row + 4]
    return found
