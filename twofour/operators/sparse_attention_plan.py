"""How the work of sparse attention is cut, and where its intermediate results lie.

Units of 4 bytes as in kernels/cpu/attention_plan.py: one float32 channel, 2 of bfloat16, 4 of int8;
likewise keys of the second product. The workspace holds each head packed,

    keys     for block of 16 keys: for unit of d: for key in 16: 4 bytes of k[key]
    starts   for block: for key in 16: what sums begin with                             (int8)
    values   for block of 16 keys: for unit of its keys: for channel: 4 bytes of v[keys of the unit]

then, where there is a mask of keys, for each sequence: for key: 0 or -inf. The scratch memory of a
thread is on its stack:

    queries  for query in tile: its channels, in float32 times the scale
    scores   for query in tile: for key of its list: float32
    steps    for query in tile: for key of its list: rounded exponentials        (bfloat16 and int8)
    tops     for query in tile: the highest score by lane, in int8 one
    sums     for query in tile: the exponentials' sum by lane
"""

from __future__ import annotations

from dataclasses import dataclass

from twofour.kernels.cpu.attention_plan import VECTOR_BYTES
from twofour.kernels.cpu.attention_plan import Plan as Numbers
from twofour.kernels.cpu.problem import ELEMENT_BYTES, LANES

GROUP = 4  # blocks of 16 keys whose int8 exponentials become one vector of bytes
STACK_BYTES = 1 << 20  # threads have 8 MiB as a rule, and 2 at least


@dataclass(frozen=True)
class Tile:
    """A tile of the two products, in registers.

    Attributes:
        rows: queries.
        keys: blocks of 16 keys at once, in the first product.
        values: blocks of 16 channels at once, in the second.
    """

    rows: int
    keys: int
    values: int

    def __str__(self) -> str:
        """As a configuration spells it."""
        return f"{self.rows}x{self.keys}x{self.values}"

    @staticmethod
    def parse(text: str) -> Tile:
        """The inverse of `str`."""
        return Tile(*map(int, text.split("x")))


@dataclass(frozen=True)
class Operand:
    """Where one of q, k, v and y lies: bytes.

    Attributes:
        image: from one sequence to the next.
        pixel: from one token to the next.
        biased: int8 values are stored plus 128, as uint8.
    """

    image: int
    pixel: int
    biased: bool = True


@dataclass(frozen=True)
class Plan:
    """All sizes of one sparse attention.

    Attributes:
        isa: instruction set.
        dtype: that q, k and v are multiplied in: "int8", "bfloat16" or "float32".
        stored: their type in memory; "float32" is rounded to bfloat16 where that is `dtype`.
        out: of y, likewise.
        batch: sequences.
        length: tokens.
        heads: of q, k, v and y.
        d: channels of a head.
        tile: of the products.
        longest: blocks of the longest list.
        masked: whether there is a mask of keys.
        q: where q lies.
        k: where k lies.
        v: where v lies.
        y: where y lies.
        keep: bytes of the mask of keys from one sequence to the next, and from one key to the next.
    """

    isa: str
    dtype: str
    stored: str
    out: str
    batch: int
    length: int
    heads: int
    d: int
    tile: Tile
    longest: int
    masked: bool
    q: Operand
    k: Operand
    v: Operand
    y: Operand
    keep: Operand = Operand(0, 0)

    @property
    def numbers(self) -> Numbers:
        """What the emitters of dense attention want to know."""
        return Numbers.of(self.isa, self.dtype, LANES, self.d, self.d)

    @property
    def int8(self) -> bool:
        """Whether q, k and v are bytes."""
        return self.dtype == "int8"

    @property
    def size(self) -> int:
        """Bytes of an element of q, k and v as they are multiplied."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def rounds(self) -> bool:
        """Whether q, k and v are rounded to bfloat16 where they are read."""
        return self.stored != self.dtype

    @property
    def head_width(self) -> int:
        """Bytes from one head of q, k or v to the next."""
        return self.d * ELEMENT_BYTES[self.stored]

    @property
    def blocks(self) -> int:
        """Blocks of 16 keys."""
        return -(-self.length // LANES)

    @property
    def score_units(self) -> int:
        """Units of d."""
        return -(-self.d * self.size // 4)

    @property
    def value_units(self) -> int:
        """Units of the keys of a block."""
        return LANES * self.size // 4

    @property
    def channel_blocks(self) -> int:
        """Blocks of 16 channels."""
        return -(-self.d // LANES)

    @property
    def key_bytes(self) -> int:
        """Of a block of packed keys."""
        return self.score_units * VECTOR_BYTES

    @property
    def value_bytes(self) -> int:
        """Of a block of packed values."""
        return self.value_units * self.channel_blocks * VECTOR_BYTES

    @property
    def starts_at(self) -> int:
        """Where the starts of a head begin."""
        return self.blocks * self.key_bytes

    @property
    def values_at(self) -> int:
        """Where the values of a head begin."""
        return self.starts_at + (self.blocks * VECTOR_BYTES if self.int8 else 0)

    @property
    def head_bytes(self) -> int:
        """Of a packed head."""
        return self.values_at + self.blocks * self.value_bytes

    @property
    def keep_at(self) -> int:
        """Where the masks of keys begin in the workspace."""
        return self.batch * self.heads * self.head_bytes

    @property
    def workspace_bytes(self) -> int:
        """Of all heads and masks."""
        return self.keep_at + (self.batch * self.blocks * VECTOR_BYTES if self.masked else 0)

    @property
    def row_bytes(self) -> int:
        """Of one query's scores; odd lines, so that the rows of a tile lie in different sets."""
        lines = -(-self.longest // GROUP) * GROUP
        return (lines + 1) * VECTOR_BYTES

    @property
    def step_bytes(self) -> int:
        """Of one query's rounded exponentials."""
        lines = -(-self.longest // GROUP) * self.size
        return (lines | 1) * VECTOR_BYTES

    @property
    def query_bytes(self) -> int:
        """Of a query's channels in the scratch memory."""
        return self.score_units * 4

    @property
    def areas(self) -> dict[str, int]:
        """Bytes of each part of the scratch memory, in order."""
        rows = self.tile.rows
        return {
            "scores": rows * self.row_bytes,
            "steps": 0 if self.dtype == "float32" else rows * self.step_bytes,
            "tops": rows * VECTOR_BYTES,
            "sums": rows * VECTOR_BYTES,
            "queries": -(-rows * self.query_bytes // VECTOR_BYTES) * VECTOR_BYTES,
        }

    @property
    def scratch_bytes(self) -> int:
        """Of all areas."""
        return sum(self.areas.values())

    def area(self, name: str) -> int:
        """Where a part of the scratch memory begins."""
        names = list(self.areas)
        return sum(self.areas[before] for before in names[: names.index(name)])
