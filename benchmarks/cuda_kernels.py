"""Writes `cuda_kernels.md` and `.json`: products with a 2:4 weight against dense ones, on a GPU.

    python -m benchmarks.cuda_kernels --output benchmarks
    python -m benchmarks.cuda_kernels --sizes 1024,4096 --families bert-base --output try

Both are NVIDIA's: 2:4 by cuSPARSELt, dense by cuBLASLt, each by the fastest of the algorithms that
its library has for the product (cuSPARSELt's but those that break; those that cuBLASLt proposes, of
fp8 with sums of all and of fewer bits). Two rounds find it: all once, the best few several times.
Then the two winners are recorded in CUDA graphs of at least 300 us and replayed in turns; the times
are medians. Numbers are random (zeros would need less power, and so run faster): int8 even in
+-100, fp16 and fp8 normal. Both compute with the same weight, and what they wrote is compared.

y is of x's type, of fp8 bfloat16. The last column has y of int32. Rows that cuSPARSELt does
not take are filled up to 16 (8 of fp16); dense has the rows as they are. The operands of a product
stay in the L2 cache between replays where they fit, for both.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.cuda.race import racer
from twofour.core.bfloat16 import from_bf16
from twofour.core.cuda_products import CUBLASLT, CUSPARSELT, DENSE_MULTIPLE, Product
from twofour.core.cuda_program import DTYPES
from twofour.core.errors import Error, UnsupportedError
from twofour.core.float8 import to_fp8
from twofour.core.version import __version__
from twofour.kernels.cuda.im2col import rounded_up
from twofour.runtime.cuda import cublaslt, cusparselt
from twofour.runtime.cuda.device import Device, open_device
from twofour.runtime.cuda.libraries import versions
from twofour.runtime.cuda.prepared import LIBRARIES

Array = NDArray[Any]
ROOT = Path(__file__).resolve().parent
FP8 = "float8e4m3fn"
KINDS = {
    "INT8": ("int8", "int8"),
    "fp16": ("float16", "float16"),
    "fp8": (FP8, "bfloat16"),
    "INT8 to int32": ("int8", "int32"),
}
SIZES = (4096, 8192, 16384, 2048, 1024)
PUBLISHED = {4096: 1.28, 8192: 1.71, 16384: 1.79}
"""INT8 ratios on an H100, as published."""
_BASE = 4 * 1048573  # random elements; repeated, so that no two rows of a matrix are the same
_LEAST_US, _ROUNDS, _FINALISTS = 300.0, 9, 4
_CHECKED_ROWS = 256
_UNIT = "Microseconds dense / 2:4, and their ratio."


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
        dense: its algorithm, and how many were tried.
        sparse: likewise.
        difference: largest of what the two wrote, in steps of int8, or in standard deviations of y.
        problem: why there is no figure; "" where there is.
    """

    layer: Layer
    kind: str
    dense_us: float = math.nan
    sparse_us: float = math.nan
    dense: str = ""
    sparse: str = ""
    difference: float = math.nan
    problem: str = ""

    @property
    def ratio(self) -> float:
        """Dense over 2:4: above 1 the sparse one is faster."""
        return self.dense_us / self.sparse_us

    def tops(self, us: float) -> float:
        """10**12 operations a second, those with the zeros of w counted."""
        return 2e-6 * self.layer.m * self.layer.n * self.layer.k / us


def squares(sizes: tuple[int, ...]) -> list[Layer]:
    """Products of three equal sizes."""
    return [Layer("square", str(size), size, size, size) for size in sizes]


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

    def __init__(self, device: Device, x: str, layers: list[Layer], y: str) -> None:
        """Takes and fills the memory.

        Args:
            device: the GPU, the current one.
            x: type of x and w.
            layers: what will be computed.
            y: type of y.
        """
        self.device, self.x, self.y = device, x, y
        self.stream = device.stream()
        self.events = (device.event(), device.event())
        size = DTYPES[x]
        rows = max(rounded_up(layer.m, 16) * layer.k for layer in layers)
        weight = max(layer.n * layer.k for layer in layers)
        result = max(rounded_up(layer.m, 16) * layer.n for layer in layers) * DTYPES[y]
        wanted = {"x": rows * size, "w": weight * size, "packed": weight * size + (1 << 20)}
        wanted |= {"buffer": weight * size + (1 << 20), "workspace": (32 << 20) + weight // 4}
        wanted |= {"dense y": result, "sparse y": result}
        self.at = {role: device.take(n, role) for role, n in wanted.items()}
        for role in ("x", "w"):
            self._fill(self.at[role], wanted[role], random_bits(x, role == "w"))

    def _fill(self, to: int, size_bytes: int, bits: Array) -> None:
        held = bits.view(np.uint8)
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
            times = self.in_turns({CUBLASLT: dense[0], CUSPARSELT: sparse[0]})
            return replace(
                cell,
                dense_us=times[CUBLASLT],
                sparse_us=times[CUSPARSELT],
                dense=dense[1],
                sparse=sparse[1],
                difference=self.difference(layer),
            )
        except Error as error:
            return replace(cell, problem=str(error).replace("\n", ";"))

    def fastest(self, layer: Layer, library: str) -> tuple[Product, str]:
        """The product by its fastest algorithm, and that in words."""
        product = self.product(layer, library)
        if library == CUSPARSELT:
            self._pack(product)
            found = cusparselt.algorithms(product, self.device.capability, 200)
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

    def _addresses(self, product: Product, library: str) -> tuple[int, ...]:
        names = {"w": "packed", "y": "sparse y"} if library == CUSPARSELT else {"y": "dense y"}
        return tuple(self.at[names.get(role, role)] for role in product.roles)

    def in_turns(self, products: dict[str, Product]) -> dict[str, float]:
        """Median microseconds of one run of each, their graphs replayed in turns."""
        device, made, graphs, repeats = self.device, {}, {}, {}
        for library, product in products.items():
            ready = LIBRARIES[library](product.to_json(), device.capability, 0)
            addresses = self._addresses(product, library)
            made[library] = ready
            ready.run(self.stream, addresses)
            device.wait(self.stream)
            once = self._captured(ready, addresses, 8)
            single = min(self._replayed(once) for _ in range(2)) / 8
            device.drop_graph(once)
            repeats[library] = max(1, math.ceil(_LEAST_US / single))
            graphs[library] = self._captured(ready, addresses, repeats[library])
        times: dict[str, list[float]] = {library: [] for library in products}
        for turn in range(_ROUNDS + 1):
            for library, graph in graphs.items():
                us = self._replayed(graph) / repeats[library]
                if turn:
                    times[library].append(us)
        for library, graph in graphs.items():
            device.drop_graph(graph)
            made[library].close()
        return {library: median(found) for library, found in times.items()}

    def _captured(self, ready: Any, addresses: tuple[int, ...], runs: int) -> int:
        def fill() -> None:
            for _ in range(runs):
                ready.run(self.stream, addresses)

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


def measure(device: Device, layers: list[Layer], kinds: list[str], end_s: float) -> Iterator[Cell]:
    """Every product in every type, until the time is over."""
    for kind in kinds:
        x, y = KINDS[kind]
        try:
            bench = Bench(device, x, layers, y)
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


def pair(cell: Cell | None) -> str:
    """Both times and their ratio."""
    if cell is None or cell.problem:
        return "-"
    mark = "**" if cell.ratio >= 1.05 else ""
    return f"{cell.dense_us:.1f} / {cell.sparse_us:.1f}, {mark}{cell.ratio:.2f}x{mark}"


def square_tables(cells: list[Cell]) -> Iterator[str]:
    """Products of equal sizes."""
    head = "| M = N = K | " + " | ".join(KINDS) + " | published INT8, H100 |"
    yield from (
        "",
        "## Products of equal sizes",
        "",
        "Microseconds dense / 2:4, and their ratio.",
        "",
    )
    yield from (head, "| --: |" + " --: |" * (len(KINDS) + 1))
    found = {(cell.layer.m, cell.kind): cell for cell in cells}
    sizes = sorted({cell.layer.m for cell in cells})
    for size in sizes:
        cols = " | ".join(pair(found.get((size, kind))) for kind in KINDS)
        published = f"{PUBLISHED[size]:.2f}x" if size in PUBLISHED else ""
        yield f"| {size} | {cols} | {published} |"
    yield from ("", "10^12 operations a second dense / 2:4, the zeros counted:", "")
    yield from ("| M = N = K | " + " | ".join(KINDS) + " |", "| --: |" + " --: |" * len(KINDS))
    for size in sizes:
        rates = []
        for kind in KINDS:
            cell = found.get((size, kind))
            good = cell is not None and not cell.problem
            rates.append(
                f"{cell.tops(cell.dense_us):.0f} / {cell.tops(cell.sparse_us):.0f}"
                if cell is not None and good
                else "-"
            )
        yield f"| {size} | {' | '.join(rates)} |"


def layer_tables(cells: list[Cell]) -> Iterator[str]:
    """Layers of networks, a table each."""
    for family in dict.fromkeys(cell.layer.family for cell in cells):
        own = [cell for cell in cells if cell.layer.family == family]
        kinds = [kind for kind in KINDS if any(cell.kind == kind for cell in own)]
        found = {(cell.layer, cell.kind): cell for cell in own}
        yield from ("", f"## {family}", "", _UNIT, "")
        yield "| layer | K | N | rows M | " + " | ".join(kinds) + " |"
        yield "| --- | --: | --: | --: |" + " --: |" * len(kinds)
        for layer in dict.fromkeys(cell.layer for cell in own):
            cols = " | ".join(pair(found.get((layer, kind))) for kind in kinds)
            yield f"| {layer.name} | {layer.k} | {layer.n} | {layer.m} | {cols} |"
        for kind in kinds:
            good = [cell for cell in own if cell.kind == kind and not cell.problem]
            pays = [cell for cell in good if cell.ratio >= 1.05]
            if good:
                mean = math.exp(sum(math.log(cell.ratio) for cell in good) / len(good))
                yield ""
                yield (
                    f"{kind}: 2:4 pays (1.05x or more) in {len(pays)} of {len(good)}; "
                    f"geometric mean {mean:.2f}x."
                )


def report(about: dict[str, str], cells: list[Cell]) -> str:
    """The page."""
    lines = ["# 2:4 against dense products on a GPU", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", (__doc__ or "").split("\n\n", 2)[2].strip()]
    lines += square_tables([cell for cell in cells if cell.layer.family == "square"])
    lines += layer_tables([cell for cell in cells if cell.layer.family != "square"])
    wrong = [cell for cell in cells if cell.problem]
    if wrong:
        lines += ["", "## Without a figure", ""]
        lines += [f"- {each.layer}, {each.kind}: {each.problem[:300]}" for each in wrong]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT, help="where the files are written")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--families", default=",".join(families()))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seconds", type=float, default=100.0, help="no new product after that")
    chosen = parser.parse_args()
    begin = time.monotonic()
    end_s = begin + chosen.seconds
    device = open_device(0)
    cells: list[Cell] = []
    kinds = [kind for kind in KINDS if kind in chosen.kinds.split(",")]
    sizes = tuple(int(size) for size in chosen.sizes.split(",") if size)
    work = [(squares(sizes), kinds, begin + 0.6 * chosen.seconds)] if sizes else []
    for family in [name for name in chosen.families.split(",") if name]:
        same = [kind for kind in kinds if kind != "INT8 to int32"]
        work.append((families()[family], same, end_s))
    chosen.output.mkdir(parents=True, exist_ok=True)
    with device.current():
        for layers, wanted, end in work:
            for cell in measure(device, layers, wanted, end):
                cells.append(cell)
                about = {
                    "GPU": f"{device.gpu.name}, compute capability {device.capability / 10}",
                    "libraries": ", ".join(f"{name} {text}" for name, text in versions().items()),
                    "twofour": __version__,
                    "time": f"{time.monotonic() - begin:.0f} s",
                    "command": f"`python -m benchmarks.cuda_kernels {shlex.join(sys.argv[1:])}`",
                }
                write(chosen.output, about, cells)
    print((chosen.output / "cuda_kernels.md").read_text())
    return 0


def write(output: Path, about: dict[str, str], cells: list[Cell]) -> None:
    """Both files, after each product: what was measured stays, whatever ends the rest."""
    plain = {**about, "cells": [asdict(cell) for cell in cells]}
    text = json.dumps(plain, indent=1).replace("NaN", "null")
    (output / "cuda_kernels.json").write_text(text + "\n")
    (output / "cuda_kernels.md").write_text(report(about, cells))


if __name__ == "__main__":
    sys.exit(main())
