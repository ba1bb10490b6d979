"""This package's 2:4 products on a GPU, with weights drawn at random as they are packed.

What a kernel computes is compared with its definition elsewhere (tests/gpu/test_conv_sparse.py);
here only its time counts, which the order of random records does not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.cuda.compiling import compile_all
from twofour.core.cuda_program import DTYPES
from twofour.kernels.cuda.conv_sparse import sources
from twofour.kernels.cuda.conv_sparse_text import C_TYPES
from twofour.kernels.cuda.conv_sparse_tiles import Tile, tiles
from twofour.kernels.cuda.finish import finish_constants
from twofour.kernels.cuda.kernel import Compiled, NvidiaSource
from twofour.kernels.cuda.problem import ConvProblem, View
from twofour.kernels.cuda.sparse_fragments import record_bytes
from twofour.runtime.cuda.device import Device

Array = NDArray[Any]
_TILES = 10
_FILLED = 1024
"""Random records, which are repeated."""
_PAIRS = np.array([4, 8, 9, 12, 13, 14])
"""Metadata of two kept values of four."""


class Sizes(Protocol):
    """Of a product y [m, n] = x [m, k] w [n, k]^T."""

    @property
    def m(self) -> int:
        """Rows of x."""

    @property
    def n(self) -> int:
        """Columns of y."""

    @property
    def k(self) -> int:
        """Columns of x."""


class Own:
    """One product by one kernel.

    Attributes:
        tile: its tile, in words.
    """

    def __init__(self, device: Device, source: NvidiaSource, made: Compiled, tile: Tile) -> None:
        """Loads it."""
        self.tile, self._device, self._source = str(tile), device, source
        self._module = device.load(np.frombuffer(made.cubin, np.uint8))
        self._kernel = device.kernel(self._module, source.symbol, source.shared_bytes)

    def run(self, stream: int, addresses: Mapping[str, int]) -> None:
        """Puts one run into a stream; addresses by role."""
        source = self._source
        given = [addresses[role] for role in source.roles]
        launch = self._device.launch
        launch(self._kernel, source.grid, source.threads, source.shared_bytes, given, stream)

    def close(self) -> None:
        """Unloads it."""
        self._device.unload(self._module)


class OwnProducts:
    """Products of some sizes in one type, their kernels compiled side by side."""

    def __init__(self, device: Device, x: str, y: str, wanted: Sequence[Sizes]) -> None:
        """Compiles.

        Args:
            device: the GPU.
            x: type of x and w.
            y: type of y.
            wanted: the products.
        """
        self._device, self._x, self._y = device, x, y
        found = [(each.m, each.n, each.k, tile) for each in wanted for tile in self._tiles(each)]
        calls = [sources(self.problem(m, n, k), t, biased=False)[0][0] for m, n, k, t in found]
        made = compile_all(calls, device.capability)
        self._made = dict(zip(found, zip(calls, made, strict=True), strict=True))

    def problem(self, m: int, n: int, k: int) -> ConvProblem:
        """The product; y saturates where it is quantized."""
        ends = [View.dense(dtype, 1, 1, c) for dtype, c in ((self._x, k), (self._y, n))]
        return ConvProblem(m, 1, 1, k, n, *ends, pattern="2:4")

    def _tiles(self, wanted: Sizes) -> list[Tile]:
        problem = self.problem(wanted.m, wanted.n, wanted.k)
        if self._y not in C_TYPES:
            return []
        found = [tile for tile in tiles(problem, self._device.capability) if tile.split == 1]
        return found[:_TILES]

    def of(self, wanted: Sizes) -> list[Own]:
        """Those of a product that can be compiled; to be closed."""
        found = []
        for (*sizes, tile), (source, made) in self._made.items():
            if tuple(sizes) == (wanted.m, wanted.n, wanted.k) and isinstance(made, Compiled):
                found.append(Own(self._device, source, made, tile))
        return found

    def constants(self, wanted: Sizes, alpha: float) -> dict[str, Array]:
        """What a kernel reads beside x and w, by role.

        Args:
            wanted: the product.
            alpha: what sums are multiplied by.
        """
        scale = {"scale": np.full(wanted.n, alpha, np.float32)}
        return finish_constants(self.problem(wanted.m, wanted.n, wanted.k), scale)


def weight_bytes(n: int, k: int, dtype: str) -> int:
    """Of a packed weight [n, k], at most: any tile fills its channels and steps."""
    size = DTYPES[dtype]
    return (n // 16 + 16) * (k * size // 128 + 1) * record_bytes(size)


def random_records(values: Array) -> Array:
    """Records with these values kept, at random places of each four.

    Args:
        values: of the type of the weight.

    Returns:
        uint8 [records, bytes of one].
    """
    rng = np.random.default_rng(5)
    size = values.dtype.itemsize
    kept = np.resize(values, _FILLED * 1024 // size).view(np.uint8).reshape(_FILLED, 1024)
    low, high = rng.choice(_PAIRS, (2, _FILLED, record_bytes(size) - 1024))
    return np.concatenate([kept, (low | high << 4).astype(np.uint8)], axis=1)
