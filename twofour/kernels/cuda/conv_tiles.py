"""Which tiles a product or convolution is cut into, the best guess first.

The guess counts what a multiprocessor of the GPU does: rounds of tiles, the steps of each, and how
well a tile of that shape uses the tensor cores. It only has to leave out what cannot win: the rest
is timed.
"""

from __future__ import annotations

from dataclasses import dataclass

from twofour.core.cuda_program import DTYPES
from twofour.kernels.cuda.kernel import SHARED_BYTES, divided, of_capability
from twofour.kernels.cuda.problem import ConvProblem

MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132}
"""How many such a GPU has at most."""
_VARIANT = 0.1
# Of one multiprocessor, roughly: products of bytes and bytes loaded per clock; clocks of a step
# beside those, of an element of y, of a program, of one more kernel; bytes of sums per clock.
_PRODUCTS = 4096.0
_LOADED = 64.0
_STEP = 100.0
_END = 0.15
_START = 1200.0
_KERNEL = 3500.0
_SUMS = 16.0
_MHZ = 1700.0
_MOST_SPLITS = 16


@dataclass(frozen=True, order=True)
class Tile:
    """How the work is cut.

    Attributes:
        m: pixels of a tile.
        n: channels of y of a tile.
        k: of a step.
        warps: of a program.
        stages: steps that are loaded ahead, and the one that is computed.
        splits: programs that share a tile's steps.
        band: rows of tiles that are made side by side.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    splits: int = 1
    band: int = 8

    @property
    def text(self) -> str:
        """In words."""
        split = f" in {self.splits}" if self.splits > 1 else ""
        return f"{self.m}x{self.n}x{self.k}{split}, {self.warps} warps, {self.stages} stages"


_SHAPES = (
    (128, 256, 8),
    (256, 128, 8),
    (128, 128, 8),
    (128, 128, 4),
    (256, 64, 8),
    (128, 64, 4),
    (64, 256, 4),
    (64, 128, 4),
    (64, 64, 4),
    (128, 32, 4),
    (64, 32, 4),
    (32, 128, 4),
    (32, 64, 4),
    (32, 32, 4),
    (16, 128, 4),
    (16, 64, 4),
    (16, 32, 4),
)
"""(m, n, warps)."""


def tiles_of(problem: ConvProblem, capability: int) -> tuple[Tile, ...]:
    """All tiles that make sense, in the order of what they are guessed to take.

    Those that differ from a better one in steps and stages alone come later than their guess says.

    Args:
        problem: the product or convolution.
        capability: of the GPU.
    """
    found = []
    for m, n, warps in _SHAPES:
        if _too_large(m, problem.rows, 16) or _too_large(n, _outs(problem), 32):
            continue
        alike: dict[int, list[Tile]] = {}
        for k in _steps(problem):
            for stages in _stages(problem, m, n, k, capability):
                for splits in _splits(problem, m, n, k, capability):
                    tile = Tile(m, n, k, warps, stages, splits)
                    alike.setdefault(splits, []).append(tile)
        for tiles in alike.values():
            guesses = sorted((guess(problem, tile, capability), tile) for tile in tiles)
            found += [(us * (1 + _VARIANT * i), tile) for i, (us, tile) in enumerate(guesses)]
    return tuple(tile for _, tile in sorted(found))


def guess(problem: ConvProblem, tile: Tile, capability: int) -> float:
    """Microseconds that a tile is guessed to take, on a GPU with full caches.

    Args:
        problem: the product or convolution.
        tile: how it is cut.
        capability: of the GPU.
    """
    processors = of_capability(MULTIPROCESSORS, capability)
    tiles = divided(problem.rows, tile.m) * divided(_outs(problem), tile.n) * problem.groups
    rounds = divided(tiles * tile.splits, processors)
    steps = divided(divided(problem.k, tile.k), tile.splits)
    k_bytes = tile.k * DTYPES[problem.x.dtype]
    multiply = tile.m * tile.n * k_bytes / (_PRODUCTS if tile.m >= 64 else _PRODUCTS / 2)
    load = (tile.m + tile.n) * k_bytes / _LOADED
    step = max(multiply, load) + min(multiply, load) / 4 + _STEP
    clocks = rounds * (steps * step + tile.m * tile.n * _END + _START)
    if tile.splits > 1:
        sums = problem.rows * problem.out_channels * tile.splits * 4
        clocks += sums / (processors * _SUMS) + _KERNEL
    return clocks / _MHZ


def _outs(problem: ConvProblem) -> int:
    """Channels of y of a group."""
    return problem.out_channels // problem.groups


def _too_large(size: int, count: int, least: int) -> bool:
    """Whether a tile half as large would hold as much."""
    return size > least and size // 2 >= count


def _steps(problem: ConvProblem) -> list[int]:
    """Elements of K in a step: 64 or 128 bytes, but a step has one tap where that can be."""
    bytes_each = DTYPES[problem.x.dtype]
    channels = problem.channels // problem.groups
    sizes = [size // bytes_each for size in (128, 64)]
    if problem.x.dtype == "float32":
        sizes = [32, 16]
    even = [size for size in sizes if channels % size == 0]
    return even or ([sizes[1]] if problem.k <= sizes[1] else sizes)


def _stages(problem: ConvProblem, m: int, n: int, k: int, capability: int) -> list[int]:
    """How deep pipelines may be in shared memory."""
    room = of_capability(SHARED_BYTES, capability)
    stage = (m + n) * k * DTYPES[problem.x.dtype]
    steps = divided(problem.k, k)
    if steps <= 2:
        return [2]
    # Three where that leaves room for one more block beside the others.
    four, three = ((room - 2048) // (stages * stage) for stages in (4, 3))
    return ([4] if four else []) + ([3] if min(three, 3) > min(four, 3) else [])


def _splits(problem: ConvProblem, m: int, n: int, k: int, capability: int) -> list[int]:
    """Programs that may share a tile: no more than fill the GPU, each with some steps."""
    processors = of_capability(MULTIPROCESSORS, capability)
    tiles = divided(problem.rows, m) * divided(_outs(problem), n) * problem.groups
    steps = divided(problem.k, k)
    found = [1]
    splits = 2
    while splits <= min(_MOST_SPLITS, steps // 2) and tiles * splits <= 2 * processors:
        if divided(steps, divided(steps, splits)) == splits:
            found.append(splits)
        splits *= 2
    return found
