"""Writes `cuda_convolutions.md` and `.json`: where 2:4 pays in convolutions of ResNets on a GPU.

    python -m benchmarks.cuda_convolutions --output benchmarks
    python -m benchmarks.cuda_convolutions --only "int8" --batches 256 --output try

Layers of ResNet-34 and products of ResNet-50, by kernels that read x once for each tap, and by
staged ones, which read x with its halo and move y by shared memory; both for a dense weight and for
a 2:4 one. Of each the fastest of the recipes that a build of effort 2 tries. cuDNN is PyTorch's
convolution in float16, channels last, as it finds it fastest. All are recorded in CUDA graphs, 20
runs in each, and replayed; the times are medians of 7. A kernel whose results are not those of the
others is no figure: it ends the run. Half of x is zero, as behind a ReLU; weights are random and
2:4, for the dense kernels, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from benchmarks.cuda.compiled import compile_all
from benchmarks.document import about, head, noted, write
from tests.gpu.launch import capability, median_us, prepared
from tests.kernels.cuda.interpret import TORCH
from twofour.core.numerics import Window
from twofour.core.plan import is_sparse
from twofour.kernels.cuda import conv, conv_halo, conv_sparse
from twofour.kernels.cuda.kernel import REFUSALS, Recipe
from twofour.kernels.cuda.problem import QUANTIZED, ConvProblem, Finish, View

ROOT = Path(__file__).resolve().parent
BATCHES = (32, 256)
TYPES = ("int8", "float16")
# (channels, out channels, kernel, size of x, stride, whether a residual is added)
LAYERS = (
    (64, 64, 3, 56, 1, False),
    (64, 64, 3, 56, 1, True),
    (64, 128, 3, 56, 2, False),
    (128, 128, 3, 28, 1, False),
    (128, 128, 3, 28, 1, True),
    (128, 256, 3, 28, 2, False),
    (256, 256, 3, 14, 1, False),
    (256, 256, 3, 14, 1, True),
    (256, 512, 3, 14, 2, False),
    (512, 512, 3, 7, 1, False),
    (512, 512, 3, 7, 1, True),
    (64, 256, 1, 56, 1, True),
    (512, 128, 1, 28, 1, False),
    (1024, 256, 1, 14, 1, False),
    (512, 2048, 1, 7, 1, True),
)
WAYS: dict[str, Callable[..., tuple[Recipe, ...]]] = {
    "dense": conv.recipes,
    "dense staged": conv_halo.dense_recipes,
    "2:4": conv_sparse.recipes,
    "2:4 staged": conv_halo.recipes,
}
_EFFORT = 2
_KEPT = 2
_AWAY = {"int8": 1.01, "float16": 0.02, "float8e4m3fn": 0.13}
"""Steps of int8; of the others, shares of the greatest result."""


@dataclass(frozen=True)
class Case:
    """A layer at a batch, in a type of elements."""

    problem: ConvProblem
    capability: int

    @property
    def name(self) -> str:
        """Such as int8, batch 32, 64x56x56 -> 64, 3x3, residual."""
        p = self.problem
        window = "x".join(map(str, p.window.kernel))
        stride = "" if p.window.stride == (1, 1) else f" by {p.window.stride[0]}"
        added = ", residual" if p.r is not None else ""
        sizes = f"{p.channels}x{p.height}x{p.width} -> {p.out_channels}"
        return f"{p.x.dtype}, batch {p.batch}, {sizes}, {window}{stride}{added}"

    @property
    def weight(self) -> NDArray[Any]:
        """[N, C, KH, KW], two of each four along C."""
        p, rng = self.problem, np.random.default_rng(0)
        shape = (p.out_channels, *p.window.kernel, p.channels // 4, 4)
        kept = np.argsort(rng.random(shape, np.float32), axis=-1) < _KEPT
        values = rng.integers(-127, 128, shape) * kept
        w = values.reshape(p.out_channels, *p.window.kernel, p.channels).transpose(0, 3, 1, 2)
        return w.astype(np.int8) if p.x.dtype == "int8" else (w / 128).astype(np.float32)

    @cached_property
    def recipes(self) -> dict[str, tuple[Recipe, ...]]:
        """Of each way."""
        p, rng = self.problem, np.random.default_rng(1)
        n, unit = p.out_channels, 1.0 if p.x.dtype == "int8" else 1 / 128 / 64
        spread = 50 * 73 * p.k**0.5 * unit
        scale = (rng.uniform(0.5, 1, n) * 40 / spread).astype(np.float32)
        bias = rng.uniform(-9, 9, n).astype(np.float32)
        held = {"w": self.weight, "scale": scale, "bias": bias}
        return {way: offer(p, held, self.capability, effort=_EFFORT) for way, offer in WAYS.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """x, y and a residual on the GPU."""
        p, torch_seed = self.problem, torch.Generator("cuda").manual_seed(0)

        def noise(view: View, least: int) -> torch.Tensor:
            count = p.batch * view.image
            options: dict[str, Any] = {"device": "cuda", "generator": torch_seed}
            values = torch.randint(-100, 100, (count,), **options).clamp(min=least)
            small = values if view.dtype == "int8" else values / 64
            return small.to(TORCH[view.dtype])

        found = {"x": noise(p.x, 0), "y": noise(p.y, -100)}
        return found if p.r is None else found | {"r": noise(p.r, -100)}


@dataclass(frozen=True)
class Row:
    """What came out: microseconds and configuration of each way that has a kernel."""

    name: str
    us: dict[str, float]
    configs: dict[str, str]
    cudnn_us: float | None

    @property
    def group(self) -> tuple[str, str]:
        """Type and batch."""
        dtype, batch, _ = self.name.split(", ", 2)
        return dtype, batch.removeprefix("batch ")

    @property
    def layer(self) -> str:
        """Its name without these."""
        return self.name.split(", ", 2)[2]

    @property
    def gain(self) -> float | None:
        """Of the fastest 2:4 kernel over the fastest dense one."""
        sparse = [us for way, us in self.us.items() if is_sparse(way)]
        dense = [us for way, us in self.us.items() if not is_sparse(way)]
        return min(dense) / min(sparse) if sparse and dense else None

    @property
    def fastest(self) -> str:
        """The configuration of the fastest 2:4 kernel; "" where there is none."""
        ways = [way for way in self.us if is_sparse(way)]
        return self.configs[min(ways, key=self.us.__getitem__)] if ways else ""


def problem_of(dtype: str, batch: int, layer: tuple[int, int, int, int, int, bool]) -> ConvProblem:
    """A layer of LAYERS; quantized y where x is, else of its type."""
    c, n, kernel, size, stride, added = layer
    window = Window((kernel, kernel), (stride, stride), pads=(kernel // 2,) * 4)
    out_h, out_w = window.output_size(size, size)
    y = View.dense(dtype, out_h, out_w, n)
    low, high = (-128.0, 127.0) if dtype in QUANTIZED else (0.0, float("inf"))
    finish = Finish(residual_scale=0.5 if added else 1.0, low=low, high=high)
    x = View.dense(dtype, size, size, c)
    return ConvProblem(batch, size, size, c, n, x, y, window, r=y if added else None, finish=finish)


def cases(capability: int, batches: Sequence[int]) -> Iterator[Case]:
    """INT8 at every batch; float16 at the first one, where the window is 3x3 and steps by one."""
    for dtype in TYPES:
        for batch in batches if dtype == "int8" else batches[:1]:
            for layer in LAYERS:
                if dtype == "int8" or (layer[2] > 1 and layer[4] == 1):
                    yield Case(problem_of(dtype, batch, layer), capability)


def check(name: str, dtype: str, y: torch.Tensor, expected: torch.Tensor) -> None:
    """Results are those of another kernel, but for rounding.

    Raises:
        SystemExit: they are not.
    """
    away = (y.float() - expected.float()).abs().max().item()
    greatest = 1.0 if dtype == "int8" else expected.float().abs().max().item()
    if not away <= _AWAY[dtype] * greatest:
        sys.exit(f"{name}: its results are {away:.4g} away from the others")


def measured(case: Case) -> Row:
    """The fastest of each way; all compared with the first."""
    tensors, dtype = case.tensors(), case.problem.y.dtype
    us: dict[str, float] = {}
    configs: dict[str, str] = {}
    expected: torch.Tensor | None = None
    for way, recipes in case.recipes.items():
        found = []
        for recipe in recipes:
            try:
                run = prepared(recipe, tensors, case.capability)
            except REFUSALS as error:
                print(f"{case.name}: {recipe.config}: {error}", file=sys.stderr)
                continue
            run()
            expected = tensors["y"].clone() if expected is None else expected
            check(f"{case.name}: {way}, {recipe.config}", dtype, tensors["y"], expected)
            found.append((median_us(run), recipe.config))
        if found:
            us[way], configs[way] = min(found)
    return Row(case.name, us, configs, cudnn(case))


def cudnn(case: Case) -> float | None:
    """The same convolution by PyTorch, in float16; of a type once."""
    p = case.problem
    if p.x.dtype != "int8":
        return None
    torch.backends.cudnn.benchmark = True
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.float16}
    x = torch.randn(p.batch, p.channels, p.height, p.width, **options)
    w = torch.randn(p.out_channels, p.channels, *p.window.kernel, **options)
    x, w = (each.contiguous(memory_format=torch.channels_last) for each in (x, w))
    padding = p.window.pads[:2]
    with torch.no_grad():
        return median_us(lambda: functional.conv2d(x, w, None, p.window.stride, padding))


def page(document: dict[str, Any], rows: list[Row]) -> str:
    """Markdown: a table for each type and batch, the largest batch first; then configurations."""
    lines = [*head(document), *noted(document)]
    lines += [
        "Microseconds; see the head of benchmarks/cuda_convolutions.py for how they are taken.",
        "Gain: the fastest 2:4 kernel over the fastest dense one.",
        "",
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    for (dtype, batch), members in sorted(groups.items(), key=_order):
        lines += [f"{dtype}, batch {batch}:", ""]
        lines += [f"| layer | {' | '.join(WAYS)} | gain | cuDNN, float16 |"]
        lines += ["|---|" + "---:|" * (len(WAYS) + 2)]
        for row in members:
            times = [us_text(row.us.get(way)) for way in WAYS]
            gain = "" if row.gain is None else f"{row.gain:.2f}"
            cells = (row.layer, *times, gain, us_text(row.cudnn_us))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += ["| the fastest 2:4 kernel of | |", "|---|---|"]
    lines += [f"| {row.name} | {row.fastest} |" for row in rows if row.fastest]
    return "\n".join([*lines, ""])


def _order(group: tuple[tuple[str, str], list[Row]]) -> tuple[int, int]:
    (dtype, batch), _ = group
    return TYPES.index(dtype), -int(batch)


def us_text(us: float | None) -> str:
    """Microseconds, or nothing."""
    return "" if us is None else f"{us:.1f}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--output", type=Path, default=ROOT, help="folder of the tables")
    made.add_argument("--only", default="", help="words in the name of a row")
    made.add_argument("--batches", default=",".join(map(str, BATCHES)), help="of images")
    return made


def main() -> None:
    """Times all and writes the tables."""
    given = parser().parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here: expected an NVIDIA one that PyTorch can use")
    batches = [int(batch) for batch in given.batches.split(",")]
    wanted = [case for case in cases(capability(), batches) if given.only in case.name]
    if not wanted:
        sys.exit(f"no row has {given.only!r} in its name")
    found = [recipe for case in wanted for some in case.recipes.values() for recipe in some]
    print(f"{len(wanted)} layers, {len(found)} candidates are compiled", flush=True)
    compile_all(found, capability())
    device, tools = [torch.cuda.get_device_name()], ("torch", "triton", "nvidia-cudnn-cu13")
    title = "Convolutions on a GPU, 2:4 beside dense"
    document, rows = about(title, "cuda_convolutions", sys.argv[1:], device, tools), []
    for case in wanted:
        rows.append(measured(case))
        document["rows"] = [asdict(row) for row in rows]
        write(given.output, "cuda_convolutions", document, page(document, rows))
        print(f"{rows[-1].name}: {rows[-1].us}, {rows[-1].gain}", flush=True)


if __name__ == "__main__":
    main()
