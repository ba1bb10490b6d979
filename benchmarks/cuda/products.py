"""Products of NVIDIA's libraries and of this package's 2:4 kernels on a GPU, timed in turns."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cuda.own_products import OwnProducts, random_records, weight_bytes
from twofour.compiler.cuda.race import racer
from twofour.core.bfloat16 import from_bf16
from twofour.core.cuda_products import CUBLASLT, CUSPARSELT, DENSE_MULTIPLE, Product
from twofour.core.cuda_program import DTYPES
from twofour.core.errors import Error, UnsupportedError
from twofour.core.float8 import to_fp8
from twofour.kernels.cuda.im2col import rounded_up
from twofour.runtime.cuda import cublaslt, cusparselt
from twofour.runtime.cuda.device import Device
from twofour.runtime.cuda.prepared import LIBRARIES

Array = NDArray[Any]
FP8, SQUARE = "float8e4m3fn", "square"
KINDS = {
    "INT8": ("int8", "int8"),
    "fp16": ("float16", "float16"),
    "fp8": (FP8, "bfloat16"),
    "INT8 to int32": ("int8", "int32"),
}
_BASE = 4 * 1048573  # random elements; repeated, so that no two rows of a matrix are the same
_LEAST_US, _ROUNDS, _FINALISTS = 300.0, 9, 4
_CHECKED_ROWS = 256


@dataclass(frozen=True)
class Layer:
    """A product of a network: y [m, n] = x [m, k] w [n, k]^T."""

    family: str
    name: str
    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Cell:
    """One product, both ways.

    Attributes:
        layer: the product.
        kind: a key of KINDS.
        dense_us: median of cuBLASLt.
        sparse_us: median of cuSPARSELt.
        own_us: median of this package's own 2:4 kernel, of products of equal sizes.
        dense: its algorithm, and how many were tried.
        sparse: likewise.
        own: its tile.
        own_tiles: of each that was tried, before the turns with the others: microseconds.
        difference: largest of what the two wrote, in steps of int8, or in standard deviations of y.
        problem: why there is no figure; "" where there is.
    """

    layer: Layer
    kind: str
    dense_us: float = math.nan
    sparse_us: float = math.nan
    own_us: float = math.nan
    dense: str = ""
    sparse: str = ""
    own: str = ""
    own_tiles: dict[str, float] = field(default_factory=dict)
    difference: float = math.nan
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """All of it, None where there is no figure."""
        found = asdict(self)
        return {k: None if v != v else v for k, v in found.items()}

    @property
    def ratio(self) -> float:
        """Dense over cuSPARSELt's 2:4: above 1 the sparse one is faster."""
        return self.dense_us / self.sparse_us

    @property
    def own_ratio(self) -> float:
        """Dense over this package's 2:4."""
        return self.dense_us / self.own_us

    def tops(self, us: float) -> float:
        """10**12 operations a second, those with the zeros of w counted."""
        return 2e-6 * self.layer.m * self.layer.n * self.layer.k / us


@dataclass(frozen=True)
class Run:
    """Something that takes turns: a library's product or an own one, and its operands."""

    ready: Any
    addresses: Any


def squares(sizes: tuple[int, ...]) -> list[Layer]:
    """Products of three equal sizes."""
    return [Layer(SQUARE, str(size), size, size, size) for size in sizes]


def families() -> dict[str, list[Layer]]:
    """Layers of networks: name -> products."""

    def of(family: str, shapes: dict[str, tuple[int, int]], rows: tuple[int, ...]) -> list[Layer]:
        return [Layer(family, name, m, *shapes[name]) for name in shapes for m in rows]

    llama = {"attention": (4096, 4096), "gate, up": (11008, 4096), "down": (4096, 11008)}
    base = {"qkv": (2304, 768), "out": (768, 768), "up": (3072, 768), "down": (768, 3072)}
    large = {"qkv": (3072, 1024), "out": (1024, 1024), "up": (4096, 1024), "down": (1024, 4096)}
    sizes = {56: 64, 28: 128, 14: 256, 7: 512}
    resnet = [
        Layer("resnet-50", name, batch * side * side, n, k)
        for side, width in sizes.items()
        for name, n, k in (
            (f"{side}x{side} {4 * width} to {width}", width, 4 * width),
            (f"{side}x{side} {width} to {4 * width}", 4 * width, width),
        )
        for batch in (1, 32, 256)
    ]
    return {
        "llama-7b": of("llama-7b", llama, (1, 16, 128, 512, 2048, 4096)),
        "bert-base": of("bert-base", base, (128, 4096, 32768)),
        "bert-large": of("bert-large", large, (128, 4096, 32768)),
        "resnet-50": resnet,
    }


class Bench:
    """A GPU with memory for all operands, filled once."""

    def __init__(self, device: Device, x: str, layers: list[Layer], y: str, most: int) -> None:
        """Takes and fills the memory.

        Args:
            device: the GPU, the current one.
            x: type of x and w.
            layers: what will be computed.
            y: type of y.
            most: how many of cuSPARSELt's algorithms are tried.
        """
        self.device, self.x, self.y, self.most = device, x, y, most
        self.stream = device.stream()
        self.events = (device.event(), device.event())
        size = DTYPES[x]
        rows = max(rounded_up(layer.m, 16) * layer.k for layer in layers)
        weight = max(layer.n * layer.k for layer in layers)
        result = max(rounded_up(layer.m, 16) * layer.n for layer in layers) * DTYPES[y]
        squares = [layer for layer in layers if layer.family == SQUARE]
        self.own = OwnProducts(device, x, y, squares)
        packed = max((weight_bytes(each.n, each.k, x) for each in squares), default=1)
        wanted = {"x": rows * size, "w": weight * size, "packed": weight * size + (1 << 20)}
        wanted |= {"buffer": weight * size + (1 << 20), "workspace": (32 << 20) + weight // 4}
        wanted |= {"dense y": result, "sparse y": result, "own w": packed, "own y": result}
        wanted |= {"own scale": 4 * max(layer.n for layer in layers), "own numbers": 64}
        self.at = {role: device.take(n, role) for role, n in wanted.items()}
        for role in ("x", "w"):
            self._fill(self.at[role], wanted[role], random_bits(x, role == "w"))
        self._fill(self.at["own w"], packed, random_records(random_bits(x, False)))

    def _fill(self, to: int, size_bytes: int, bits: Array) -> None:
        held = np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
        for begin in range(0, size_bytes, held.nbytes):
            self.device.to_gpu(to + begin, held[: size_bytes - begin], self.stream)
        self.device.wait(self.stream)

    def close(self) -> None:
        """Frees the memory."""
        for address in self.at.values():
            self.device.give_back(address)
        for event in self.events:
            self.device.drop_event(event)
        self.device.drop_stream(self.stream)

    def product(self, layer: Layer, library: str) -> Product:
        """What a library is asked for, without an algorithm."""
        sparse = library == CUSPARSELT
        m = rounded_up(layer.m, DENSE_MULTIPLE[self.x]) if sparse else layer.m
        spread = 58.0**2 if self.x == "int8" else 1.0
        alpha = 30 / (spread * math.sqrt(layer.k / 2)) if self.y == "int8" else 1.0
        return Product(m, layer.n, layer.k, self.x, self.y, layer.k, layer.n, alpha=alpha)

    def cell(self, layer: Layer, kind: str) -> Cell:
        """One product, both ways."""
        cell = Cell(layer, kind)
        try:
            dense, sparse = self.fastest(layer, CUBLASLT), self.fastest(layer, CUSPARSELT)
            own, tiles = self.fastest_own(layer)
            runs = {CUBLASLT: self._library(dense[0], CUBLASLT)}
            runs |= {CUSPARSELT: self._library(sparse[0], CUSPARSELT)}
            if own is not None:
                runs["own"] = own
            times = self.in_turns(runs)
            return replace(
                cell,
                dense_us=times[CUBLASLT],
                sparse_us=times[CUSPARSELT],
                own_us=times.get("own", math.nan),
                dense=dense[1],
                sparse=sparse[1],
                own="" if own is None else own.ready.tile,
                own_tiles=tiles,
                difference=self.difference(layer),
            )
        except Error as error:
            return replace(cell, problem=str(error).replace("\n", ";"))

    def fastest_own(self, layer: Layer) -> tuple[Run | None, dict[str, float]]:
        """This package's fastest kernel for a product of equal sizes; microseconds of each tile."""
        if layer.family != SQUARE:
            return None, {}
        alpha = self.product(layer, CUBLASLT).alpha
        at = {role: self.at[f"own {role}"] for role in ("w", "y", "scale", "numbers")}
        at["x"] = self.at["x"]
        for role, array in self.own.constants(layer, alpha).items():
            self.device.to_gpu(at[role], array, self.stream)
            self.device.wait(self.stream)
        found = [Run(each, at) for each in self.own.of(layer)]
        if not found:
            return None, {}
        times = self.in_turns({each.ready.tile: each for each in found}, close=False)
        best = min(found, key=lambda each: times[each.ready.tile])
        for each in found:
            if each is not best:
                each.ready.close()
        return best, times

    def fastest(self, layer: Layer, library: str) -> tuple[Product, str]:
        """The product by its fastest algorithm, and that in words."""
        product = self.product(layer, library)
        if library == CUSPARSELT:
            self._pack(product)
            found = cusparselt.algorithms(product, self.device.capability, self.most)
        else:
            found = cublaslt.algorithms(product, self.device.capability, 16)
            if self.x == FP8:
                fast = replace(product, fast=True)
                found += cublaslt.algorithms(fast, self.device.capability, 16)
        run = racer(self.device.gpu.uuid).race
        raced = run(found, library, 1)
        broken = [each for each in raced if each.us == math.inf]
        if broken:
            names = ", ".join(each.product.algorithm[:12] for each in broken)
            print(f"  {library}, {self.x}, {layer.m} x {layer.n} x {layer.k} breaks with: {names}")
        best = run([each.product for each in raced[:_FINALISTS]], library, 5)[:1]
        if not best or best[0].us == math.inf:
            raise UnsupportedError(f"{library} has no algorithm for {product.to_json()}")
        told = f"one of {len(found)}, {len(broken)} of them broken"
        if library == CUSPARSELT:
            told = f"{best[0].product.algorithm}, {told}"
        return best[0].product, "fast sums, " * best[0].product.fast + told

    def _pack(self, product: Product) -> None:
        made = cusparselt.prepare(product.to_json(), self.device.capability)
        try:
            made.pack(self.stream, self.at["w"], self.at["packed"], self.at["buffer"])
            self.device.wait(self.stream)
        finally:
            made.close()

    def _library(self, product: Product, library: str) -> Run:
        names = {"w": "packed", "y": "sparse y"} if library == CUSPARSELT else {"y": "dense y"}
        addresses = tuple(self.at[names.get(role, role)] for role in product.roles)
        return Run(LIBRARIES[library](product.to_json(), self.device.capability, 0), addresses)

    def in_turns(self, runs: dict[str, Run], close: bool = True) -> dict[str, float]:
        """Median microseconds of one run of each, their graphs replayed in turns."""
        device, graphs, repeats = self.device, {}, {}
        for name, run in runs.items():
            run.ready.run(self.stream, run.addresses)
            device.wait(self.stream)
            once = self._captured(run, 8)
            single = min(self._replayed(once) for _ in range(2)) / 8
            device.drop_graph(once)
            repeats[name] = max(1, math.ceil(_LEAST_US / single))
            graphs[name] = self._captured(run, repeats[name])
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(_ROUNDS + 1):
            for name, graph in graphs.items():
                us = self._replayed(graph) / repeats[name]
                if turn:
                    times[name].append(us)
        for name, graph in graphs.items():
            device.drop_graph(graph)
            if close:
                runs[name].ready.close()
        return {name: median(found) for name, found in times.items()}

    def _captured(self, run: Run, times: int) -> int:
        def fill() -> None:
            for _ in range(times):
                run.ready.run(self.stream, run.addresses)

        return self.device.capture(self.stream, fill)

    def _replayed(self, graph: int) -> float:
        self.device.record(self.events[0], self.stream)
        self.device.replay(graph, self.stream)
        self.device.record(self.events[1], self.stream)
        self.device.wait(self.stream)
        return self.device.elapsed_us(*self.events)

    def difference(self, layer: Layer) -> float:
        """Of what the two wrote last.

        Raises:
            UnsupportedError: it is more than rounding can be.
        """
        found = []
        items = {"int8": "i1", "int32": "i4", "float16": "f2", "bfloat16": "u2"}
        for role in ("dense y", "sparse y"):
            held = np.empty((min(_CHECKED_ROWS, layer.m), layer.n), items[self.y])
            self.device.from_gpu(held, self.at[role], self.stream)
            self.device.wait(self.stream)
            values = from_bf16(held) if self.y == "bfloat16" else held
            found.append(values.astype(np.float64))
        away = float(np.abs(found[0] - found[1]).max())
        spread = float(found[0].std())
        if self.y != "int8":
            away /= max(spread, 1e-30)
        if not spread or away > (1 if self.y == "int8" else 0.05):
            what = f"{away} apart, spread {spread}: {found[0][0, :4]} and {found[1][0, :4]}"
            raise UnsupportedError(f"2:4 and dense differ: {what}")
        return away


def random_bits(dtype: str, sparse: bool) -> Array:
    """Random elements of a type, two zeros in each group of four where they are a weight."""
    rng = np.random.default_rng(11 + sparse)
    if dtype == "int8":
        values: Array = rng.integers(-100, 101, _BASE, np.int8)
    else:
        values = rng.standard_normal(_BASE, np.float32)
    if sparse:
        first = rng.integers(0, 6, _BASE // 4)
        pairs = np.array([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])[first]
        np.put_along_axis(values.reshape(-1, 4), pairs, 0, axis=1)
    if dtype == FP8:
        return to_fp8(values)
    return values.astype(np.float16) if dtype == "float16" else values


def measure(
    device: Device, layers: list[Layer], kinds: list[str], end_s: float, most: int
) -> Iterator[Cell]:
    """Every product in every type, until the time is over.

    Args:
        device: the GPU, the current one.
        layers: the products.
        kinds: keys of KINDS.
        end_s: of the monotonic clock.
        most: how many of cuSPARSELt's algorithms are tried.
    """
    for kind in kinds:
        x, y = KINDS[kind]
        try:
            bench = Bench(device, x, layers, y, most)
        except Error as error:
            yield from (Cell(layer, kind, problem=error.what) for layer in layers)
            continue
        for layer in layers:
            if time.monotonic() > end_s:
                yield Cell(layer, kind, problem="the time was over")
                continue
            cell = bench.cell(layer, kind)
            told = cell.problem or f"{cell.dense_us:.2f} / {cell.sparse_us:.2f} us"
            print(f"{layer} {kind}: {told}", f"{cell.ratio:.2f}x", cell.dense, cell.sparse)
            sys.stdout.flush()
            yield cell
        with suppress(UnsupportedError):  # where a kernel broke the context: the cells say so
            bench.close()
