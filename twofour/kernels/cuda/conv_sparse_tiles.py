"""How 2:4 products and convolutions are cut into blocks, the best guess first."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from twofour.core.cuda_program import DTYPES
from twofour.core.numerics import Window
from twofour.kernels.cuda.kernel import SHARED_BYTES, divided, of_capability
from twofour.kernels.cuda.problem import ConvProblem
from twofour.kernels.cuda.sparse_fragments import ROWS, STEP_BYTES, record_bytes, steps_of

MULTIPROCESSORS = 132
SHARED, RESERVED = 228 * 1024, 1024
"""Of an H200: shared memory of each, and what a block takes beside what it asks for."""
WGMMA_CAPABILITY = 90


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        channels: out channels of a block: 64, 128, 192 or 256.
        pixels: of a block.
        threads: of a block.
        stages: steps of 128 bytes along K that a block holds.
        warps_m: of `mma.sp`, warps that share the channels; the others share the pixels.
        wgmma: whether warp groups use Hopper's `wgmma.sp`.
        split: blocks that share a sum; a second kernel adds up their parts.
        blocks: of a multiprocessor, which the registers are shared out to.
        direct: whether the weight goes from global memory to registers, not by shared memory;
            with `wgmma` alone.
        persistent: whether blocks stay, as many as there is room for, and go from one part of y to
            the next, whose first steps they copy while they finish the one before; without split.
        held: whether the whole weight of a block's channels stays in shared memory meanwhile; in
            registers, if it is direct, too.
        dense: whether the weight is dense: `wgmma`, of which conv_halo.py makes use.
    """

    channels: int
    pixels: int
    threads: int
    stages: int
    warps_m: int = 2
    wgmma: bool = False
    split: int = 1
    blocks: int = 1
    direct: bool = False
    persistent: bool = False
    held: bool = False
    dense: bool = False

    def __str__(self) -> str:
        """Such as 128x64 channels x pixels, 4 stages."""
        cut = f"{self.channels}x{self.pixels}, {self.threads} threads, {self.stages} stages"
        if self.direct:
            cut += ", weight in registers" if self.held else ", weight direct"
        elif self.held:
            cut += ", weight held"
        cut += ", persistent" if self.persistent and not self.held else ""
        return cut + (f", split {self.split}" if self.split > 1 else "")

    def stage_bytes(self, element_bytes: int) -> int:
        """Shared memory of one step; a multiple of 1024, where the swizzle begins."""
        weight = 0 if self.direct or self.held else self.weight_bytes(element_bytes)
        whole = self.pixels * STEP_BYTES + weight
        return divided(whole, 1024) * 1024

    def weight_bytes(self, element_bytes: int) -> int:
        """Of the weight of one step."""
        return self.channels // ROWS * record_bytes(element_bytes, dense=self.dense)

    def shared_bytes(self, element_bytes: int, steps: int) -> int:
        """Shared memory of a block that goes along K in so many steps."""
        held = steps * self.weight_bytes(element_bytes) if self.held else 0
        return self.stages * self.stage_bytes(element_bytes) + held

    @property
    def tiles_m(self) -> int:
        """Tiles of 16 channels that a warp has."""
        return self.channels // ROWS // (self.threads // 32 if self.wgmma else self.warps_m)

    @property
    def order(self) -> NDArray[np.intp]:
        """Which channel of a block each row of its records is: [channels].

        A lane holds rows g and g + 8 of each of its warp's tiles: they are neighbours in y.
        """
        record, row = np.divmod(np.arange(self.channels), ROWS)
        if self.wgmma:
            warp = record // (4 * self.tiles_m) * 4 + record % 4
            tile = record // 4 % self.tiles_m
        else:
            warp, tile = np.divmod(record, self.tiles_m)
        run = 2 * self.tiles_m
        found = warp * self.tiles_m * ROWS + row % 8 * run + 2 * tile + row // 8
        return np.asarray(found, np.intp)


_MMA_TILES = (
    Tile(128, 128, 256, 3, warps_m=2),
    Tile(128, 64, 256, 4, warps_m=4, blocks=2),
    Tile(64, 128, 256, 4, warps_m=2, blocks=2),
    Tile(64, 64, 128, 4, warps_m=2, blocks=3),
    Tile(64, 32, 128, 4, warps_m=2, blocks=4),
    Tile(64, 8, 128, 8, warps_m=4, blocks=4),
)
_THREE_GROUPS = Tile(192, 256, 384, 4, wgmma=True)
"""The most sums that registers hold, with no room for places in x: of flat pixels it needs one."""
_THREE_GROUPS_COST = 1.15
"""It reads the least, and was yet the fastest of hardly any product (on an H200 of none of equal
sizes, and of one of BERT's layers, in fp8, by 3 %): where nothing is timed, it is not the guess.
"""
_WGMMA_TILES = (
    _THREE_GROUPS,
    Tile(128, 256, 256, 4, wgmma=True),
    Tile(256, 128, 256, 4, wgmma=True),
    Tile(128, 128, 256, 4, wgmma=True, blocks=2),
    Tile(128, 128, 128, 4, wgmma=True, blocks=2),
    Tile(128, 64, 128, 4, wgmma=True, blocks=3),
    Tile(64, 256, 128, 4, wgmma=True),
    Tile(64, 128, 128, 4, wgmma=True, blocks=3),
    Tile(128, 64, 256, 4, wgmma=True, blocks=2),
    Tile(64, 64, 128, 4, wgmma=True, blocks=4),
    Tile(64, 32, 128, 4, wgmma=True, blocks=4),
    # Few pixels leave the tensor cores idle: the weight decides, and how much of it is on its way.
    Tile(128, 128, 256, 8, wgmma=True),
    Tile(64, 64, 128, 8, wgmma=True, blocks=2),
    Tile(64, 32, 128, 8, wgmma=True, blocks=3),
    Tile(64, 16, 128, 8, wgmma=True, blocks=3),
    Tile(64, 8, 128, 8, wgmma=True, blocks=4),
    Tile(64, 8, 128, 16, wgmma=True, blocks=2),
    Tile(128, 256, 256, 4, wgmma=True, direct=True),
    Tile(256, 128, 256, 8, wgmma=True, direct=True),
    Tile(128, 128, 256, 4, wgmma=True, blocks=2, direct=True),
    Tile(128, 128, 128, 4, wgmma=True, blocks=2, direct=True),
    Tile(128, 64, 128, 8, wgmma=True, blocks=3, direct=True),
    Tile(64, 128, 128, 4, wgmma=True, blocks=3, direct=True),
    Tile(64, 64, 128, 4, wgmma=True, blocks=4, direct=True),
)
_STAYING = (
    Tile(256, 128, 256, 4, wgmma=True, persistent=True, held=True),
    Tile(128, 256, 256, 4, wgmma=True, persistent=True, held=True),
    Tile(128, 128, 256, 4, wgmma=True, blocks=2, persistent=True, held=True),
    Tile(128, 128, 128, 3, wgmma=True, blocks=2, persistent=True, held=True),
    Tile(64, 128, 128, 4, wgmma=True, blocks=3, persistent=True, held=True),
    Tile(128, 64, 128, 4, wgmma=True, blocks=3, persistent=True, held=True),
)
"""For short sums, which are over before the next copies come: they begin earlier. Weights are held
where there is room for them."""
_SHORT_STEPS = 12
_SPLITS = (1, 2, 4, 8)
_STEP_CYCLES, _START_CYCLES, _BYTES_CYCLE = 700.0, 3000.0, 36.0


def tiles(problem: ConvProblem, capability: int) -> list[Tile]:
    """All that fit the GPU, the best guess first."""
    shared = of_capability(SHARED_BYTES, capability)
    found = [
        replace(tile, split=split)
        for tile in candidates(problem, capability)
        for split in _SPLITS
        if shared_bytes(problem, tile) <= shared and _is_split_fit(problem, tile, split)
    ]
    # A weight that goes past shared memory comes from the same cache: it gains little if anything.
    return sorted(found, key=lambda tile: (cost(problem, _plain(tile)), tile.direct))


def candidates(problem: ConvProblem, capability: int) -> tuple[Tile, ...]:
    """Tiles for a GPU. Hopper computes products of float8 with `wgmma` alone."""
    wgmma: list[Tile] = []
    if capability == WGMMA_CAPABILITY:
        room = of_capability(SHARED_BYTES, capability)
        fits = [shared_bytes(problem, tile) <= room for tile in _STAYING]
        wgmma += _WGMMA_TILES
        wgmma += (replace(t, held=fit) for t, fit in zip(_STAYING, fits, strict=True))
    if wgmma and not is_flat(problem):
        wgmma.remove(_THREE_GROUPS)
    no_mma = capability == WGMMA_CAPABILITY and problem.x.dtype == "float8e4m3fn"
    return (*wgmma, *(() if no_mma else _MMA_TILES))


def shared_bytes(problem: ConvProblem, tile: Tile) -> int:
    """Shared memory of a block."""
    size = DTYPES[problem.x.dtype]
    return tile.shared_bytes(size, steps_of(problem.k, size))


def _plain(tile: Tile) -> Tile:
    """The tile that it is like, of which the cost is known."""
    if tile.direct or tile.persistent:
        return replace(tile, direct=False, persistent=False, held=False, stages=4)
    return tile


def _is_split_fit(problem: ConvProblem, tile: Tile, split: int) -> bool:
    """Sums are split where there are too few blocks, and each part is some steps long."""
    steps, parts = steps_of(problem.k, DTYPES[problem.x.dtype]), blocks_of(problem, tile)
    if tile.persistent:
        return split == 1 and steps <= _SHORT_STEPS and 0 < workers(problem, tile) < parts
    if split == 1:
        return True
    return parts * split <= 2 * MULTIPROCESSORS and steps >= 4 * split


def workers(problem: ConvProblem, tile: Tile) -> int:
    """Blocks that are started: of a tile that stays, no more than there is room for.

    Where each holds its weight, all of its parts of y have the same channels: so many blocks that
    all channels have as many. 0 where there is no room for that.
    """
    parts = blocks_of(problem, tile)
    if not tile.persistent:
        return parts
    fit = min(tile.blocks, SHARED // (shared_bytes(problem, tile) + RESERVED))
    most = MULTIPROCESSORS * fit
    if tile.held:
        most -= most % divided(problem.out_channels, tile.channels)
    return min(parts, most)


def blocks_of(problem: ConvProblem, tile: Tile) -> int:
    """How many cover the result."""
    return divided(problem.out_channels, tile.channels) * divided(problem.rows, tile.pixels)


def cost(problem: ConvProblem, tile: Tile) -> float:
    """A guess of the time in cycles, by which candidates are put in order.

    A step is bound by the tensor cores, by what comes from the L2 cache, or, where few blocks share
    a multiprocessor, by how long that takes to come.
    """
    size = DTYPES[problem.x.dtype]
    steps = divided(steps_of(problem.k, size), tile.split)
    area = tile.channels * tile.pixels
    products = area / (64 if tile.wgmma else 32)
    wait = _STEP_CYCLES * 2 / max(tile.stages - 2, 2) / tile.blocks
    step = max(products, tile.stage_bytes(size) / _BYTES_CYCLE, wait)
    block = steps * step + area / 8
    blocks = blocks_of(problem, tile) * tile.split
    rounds = divided(blocks, MULTIPROCESSORS * tile.blocks) * tile.blocks
    held = min(rounds, divided(blocks, MULTIPROCESSORS))
    whole = block * held + _START_CYCLES * (2 if tile.split > 1 else 1)
    return whole * (_THREE_GROUPS_COST if tile.threads == _THREE_GROUPS.threads else 1)


def is_flat(problem: ConvProblem) -> bool:
    """Whether it is a product: pixels of x lie side by side, and each gives one of y."""
    return problem.window == Window((1, 1)) and problem.x.is_flat(problem.height, problem.width)
