"""How the work on one head is cut, and where its intermediate results lie.

A unit is 4 bytes: 4 channels of an int8 query or key, 2 of a bfloat16 one, or one of a float32 one;
4 keys' int8 exponentials, 2 bfloat16 ones, or one float32 one. So all types have the same loops,
over units:

    keys     for block of 16 keys: for unit of d: for key in 16: 4 bytes of k[key]
    values   for unit of keys: for block of 16 channels: for channel in 16: v[unit's keys, channel]
    scores   for query in tile: for key: float32; twice, for a tile and the one before it
    tops     for query in tile: 16 times its highest score, in int8 once
    sums     for query in tile: its powers' sum by lane                     (float32 and bfloat16)
    lengths  see attention_lengths.py                                               (open lengths)
    steps    for query in tile: for unit of keys: rounded exponentials        (int8 and bfloat16)

The keys of a unit are neighbours. The units of int8 stand as four vectors of 16 scores pack to one
of bytes: unit 16 g + 4 l + b holds the keys 64 g + 16 b + 4 l + {0, 1, 2, 3}.
"""

from __future__ import annotations

from dataclasses import dataclass

from twofour.kernels.cpu.problem import ELEMENT_BYTES, LANES
from twofour.kernels.cpu.vector import F32S, I32S

VECTOR_BYTES = 64
OWN_BYTES = 64  # of the header, before what the rounding of results reads
GROUP = 4  # blocks of 16 keys whose exponentials become one vector of bytes

# Queries, blocks of keys and blocks of channels of the two products' tiles.
TILES = {"avx512vnni": (4, 4, 4), "dotprod": (2, 2, 2), "avx2": (2, 2, 2), "vector": (2, 1, 1)}
"""By instruction set."""


def whole_groups(keys: int) -> int:
    """That many keys or more, in whole groups of blocks."""
    return -(-keys // (LANES * GROUP)) * LANES * GROUP


@dataclass(frozen=True)
class Plan:
    """One head's sizes.

    Attributes:
        isa: instruction set.
        dtype: of q, k and v: "int8", "bfloat16" or "float32".
        k_len: keys.
        d: channels of q and k.
        dv: channels of v and y.
        tiles: of queries.
        queries: of a tile.
        key_blocks: blocks of 16 keys in a tile of scores.
        value_blocks: blocks of 16 channels in a tile of results.
        mask: "", "keys" or "full".
        causal: query i sees the keys 0 ... i only.
        out: dtype of y.
        open_keys: there are at most `k_len` keys, which are whole groups.
    """

    isa: str
    dtype: str
    k_len: int
    d: int
    dv: int
    tiles: int
    queries: int
    key_blocks: int
    value_blocks: int
    mask: str
    causal: bool
    out: str
    open_keys: bool = False

    @staticmethod
    def of(isa: str, dtype: str, k_len: int, d: int, dv: int) -> Plan:
        """Whole tiles, with a mask of keys: nothing else needs more memory."""
        queries, keys, values = TILES[isa]
        return Plan(
            *(isa, dtype, k_len, d, dv),
            tiles=2,
            queries=queries,
            key_blocks=keys,
            value_blocks=values,
            mask="keys",
            causal=False,
            out=dtype,
        )

    @property
    def int8(self) -> bool:
        """Whether q, k and v are bytes."""
        return self.dtype == "int8"

    @property
    def score(self) -> str:
        """The type of 16 scores; those of int8 are floats, read as integers."""
        return I32S if self.int8 else F32S

    @property
    def rounds(self) -> bool:
        """Whether exponentials are rounded, which the area "steps" is for."""
        return self.dtype != "float32"

    @property
    def masks_keys(self) -> bool:
        """Whether the area "mask" holds what is added to every query's scores."""
        return self.open_keys or self.mask == "keys"

    @property
    def size(self) -> int:
        """Bytes of an element of q, k or v."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def score_units(self) -> int:
        """Units of d."""
        return -(-self.d * self.size // 4)

    @property
    def blocks(self) -> int:
        """Blocks of 16 keys."""
        return -(-self.k_len // LANES)

    @property
    def groups(self) -> int:
        """Groups of blocks."""
        return -(-self.blocks // GROUP)

    @property
    def value_units(self) -> int:
        """Units of keys; the last group has fewer where it is not full."""
        if not self.int8:
            return -(-self.k_len * self.size // 4)
        before = self.groups - 1
        keys = range(self.k_len - LANES * GROUP * before)
        return LANES * before + max(key % LANES // 4 * GROUP + key // LANES for key in keys) + 1

    @property
    def channel_blocks(self) -> int:
        """Blocks of 16 channels of v."""
        return -(-self.dv // LANES)

    @property
    def row_bytes(self) -> int:
        """Bytes of one query's scores."""
        return self.blocks * VECTOR_BYTES

    @property
    def step_bytes(self) -> int:
        """Bytes of one query's rounded exponentials."""
        return self.groups * VECTOR_BYTES if self.int8 else self.blocks * VECTOR_BYTES // 2

    @property
    def whole_chunks(self) -> int:
        """Chunks of `key_blocks` blocks of keys without padding."""
        return self.k_len // LANES // self.key_blocks

    @property
    def pieces_beside(self) -> int:
        """Exponentials of as many keys as a chunk has, in pieces: blocks, or groups in int8."""
        return self.queries * self.key_blocks // (GROUP if self.int8 else 1)

    @property
    def units_beside(self) -> tuple[int, int]:
        """Units of one turn of the first product, and the pieces computed beside them."""
        pieces = self.pieces_beside
        return max(1, self.score_units // pieces), max(1, pieces // self.score_units)

    @property
    def overlaps(self) -> bool:
        """Whether exponentials of a tile are computed beside the first product of the next.

        It needs registers, another tile, and pieces that spread evenly.
        """
        if self.isa != "avx512vnni" or self.tiles == 1 or self.whole_chunks == 0:
            return False
        units, pieces = self.units_beside
        return self.score_units * pieces == self.pieces_beside * units

    @property
    def areas(self) -> dict[str, int]:
        """Bytes of each part of the scratch memory, in order."""
        return {
            "keys": self.blocks * self.score_units * VECTOR_BYTES,
            "starts": self.blocks * VECTOR_BYTES if self.int8 else 0,
            "mask": self.row_bytes if self.masks_keys else 0,
            "values": self.value_units * self.channel_blocks * VECTOR_BYTES,
            "scores": 2 * self.queries * self.row_bytes,
            "tops": self.queries * VECTOR_BYTES,
            "sums": 0 if self.int8 else self.queries * VECTOR_BYTES,
            "steps": self.queries * self.step_bytes if self.rounds else 0,
            "lengths": VECTOR_BYTES if self.open_keys else 0,
        }

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory for one head at a time."""
        return sum(self.areas.values())

    def area(self, name: str) -> int:
        """Where a part of the scratch memory begins."""
        names = list(self.areas)
        return sum(self.areas[before] for before in names[: names.index(name)])
