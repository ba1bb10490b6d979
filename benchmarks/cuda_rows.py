"""Writes `cuda_rows.md` and `.json`: norms, attention and experts on a GPU, beside PyTorch's.

    python -m benchmarks.cuda_rows --output benchmarks
    python -m benchmarks.cuda_rows --only "sparse" --output try

Ours is the fastest of the recipes that a build of effort 2 tries. All are recorded in CUDA graphs,
20 runs in each, and replayed; the times are medians of 7. PyTorch's attention reads q, k and v as
slices of one projection, as ours does. Numbers are random.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.cuda.compiled import compile_all
from benchmarks.document import about, head, noted, write
from tests.gpu.launch import capability, median_us, prepared
from tests.kernels.cuda.attention_cases import flat
from tests.kernels.cuda.experts_cases import Layer
from tests.kernels.cuda.interpret import TORCH
from twofour.core.sparse_attention import Pattern
from twofour.kernels.cuda import attention, experts, norm, sparse_attention
from twofour.kernels.cuda.experts_route import ExpertsProblem
from twofour.kernels.cuda.kernel import REFUSALS, Recipe
from twofour.kernels.cuda.problem import QUANTIZED, AttentionProblem, NormProblem, Rows
from twofour.kernels.cuda.sparse_attention import SparseAttentionProblem

ROOT = Path(__file__).resolve().parent
EPS = 1e-5
_EFFORT = 2


@dataclass
class Case:
    """Something to be done, by our kernels and by PyTorch.

    Attributes:
        group: title of its table.
        name: sizes and type.
        recipes: ways of ours.
        tensors: of the GPU, by role; made when it is its turn.
        theirs: what PyTorch does, made likewise; None where it has nothing.
        work: floating point operations, 0 where bytes count.
    """

    group: str
    name: str
    recipes: tuple[Recipe, ...]
    tensors: Callable[[], dict[str, torch.Tensor]]
    theirs: Callable[[], Callable[[], object]] | None
    work: float = 0.0


@dataclass(frozen=True)
class Row:
    """What came out; microseconds."""

    group: str
    name: str
    ours_us: float
    torch_us: float | None
    tflops: float | None
    config: str


def norms(capability: int) -> Iterator[Case]:
    """Rows of channels."""
    for rows, channels, dtype, quantized in [
        (128, 768, "float16", False),
        (4096, 768, "float16", False),
        (4096, 768, "float16", True),
        (4096, 768, "float32", False),
        (32768, 768, "float16", False),
        (4096, 4096, "float16", False),
    ]:
        q = ("int8", channels) if quantized else None
        given = {"x": (dtype, channels), "y": (dtype, channels)}
        problem = NormProblem(rows, channels, EPS, **given, q=q, scale=0.03)
        held = {name: np.ones(channels, np.float32) for name in ("gamma", "beta")}

        def tensors(
            rows: int = rows, channels: int = channels, dtype: str = dtype
        ) -> dict[str, torch.Tensor]:
            x = torch.randn(rows, channels, device="cuda").to(TORCH[dtype])
            return {"x": x, "y": torch.empty_like(x), "q": torch.empty_like(x, dtype=torch.int8)}

        def theirs(
            tensors: Callable[[], dict[str, torch.Tensor]] = tensors,
        ) -> Callable[[], object]:
            x = tensors()["x"]
            one = torch.ones(x.shape[1], device="cuda", dtype=x.dtype)
            return lambda: functional.layer_norm(x, one.shape, one, one, EPS)

        name = f"{rows} x {channels} {dtype}{' and int8' if quantized else ''}"
        found = norm.recipes(problem, held, capability, effort=_EFFORT)
        yield Case("Layer normalization", name, found, tensors, theirs)


@dataclass(frozen=True)
class Shape:
    """Of an attention."""

    batch: int
    tokens: int
    heads: int
    d: int
    causal: bool = False

    @property
    def work(self) -> float:
        """Floating point operations of the products that have to be done."""
        full = 4.0 * self.batch * self.heads * self.tokens**2 * self.d
        return full / 2 if self.causal else full

    def problem(self, dtype: str) -> AttentionProblem:
        """q, k and v side by side."""
        out = "float16" if dtype in QUANTIZED else dtype
        wide = self.heads * self.d
        rows = Rows(dtype, self.tokens * 3 * wide, 3 * wide)
        y = Rows(out, self.tokens * wide, wide)
        scale = self.d**-0.5 / (1600 if dtype == "int8" else 1)
        lengths = (self.tokens, self.tokens, self.heads, self.d, self.d)
        return AttentionProblem(self.batch, *lengths, rows, rows, rows, y, scale, (), self.causal)

    def tensors(self, dtype: str) -> dict[str, torch.Tensor]:
        """Thirds of one tensor, and y."""
        wide = self.heads * self.d
        x = torch.randn(self.batch, self.tokens, 3 * wide, device="cuda")
        x = (x * 40).to(torch.int8) if dtype == "int8" else x.to(TORCH[dtype])
        out = TORCH["float16" if dtype in QUANTIZED else dtype]
        y = torch.empty(self.batch, self.tokens, wide, device="cuda", dtype=out)
        parts = {role: x[:, :, i * wide :] for i, role in enumerate("qkv")}
        return {**flat(parts), "y": y}

    def theirs(self, dtype: str) -> Callable[[], object]:
        """PyTorch's best kernel for it; quantized ones against float16."""
        kind = TORCH["float16" if dtype in QUANTIZED else dtype]
        wide = 3 * self.heads * self.d
        x = torch.randn(self.batch, self.tokens, wide, device="cuda", dtype=kind)
        q, k, v = (
            x.unflatten(2, (3, self.heads, self.d))[:, :, i].transpose(1, 2) for i in range(3)
        )
        return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


def attentions(capability: int) -> Iterator[Case]:
    """BERT-base, ViT-B, long sequences, a language model's."""
    for title, shape, dtypes in [
        ("BERT-base", Shape(1, 128, 12, 64), ("float16", "int8")),
        ("BERT-base", Shape(32, 128, 12, 64), ("float16", "int8", "float8e4m3fn", "float32")),
        ("BERT-base", Shape(256, 128, 12, 64), ("float16", "int8")),
        ("ViT-B", Shape(32, 197, 12, 64), ("float16", "int8")),
        ("long", Shape(1, 4096, 12, 64), ("float16", "int8")),
        ("causal", Shape(1, 4096, 32, 128, causal=True), ("float16", "int8")),
    ]:
        for dtype in dtypes:
            sizes = f"batch {shape.batch}, {shape.tokens} tokens, {shape.heads} x {shape.d}"
            yield Case(
                "Attention",
                f"{title}, {sizes}, {dtype}",
                attention.recipes(shape.problem(dtype), {}, capability, effort=_EFFORT),
                lambda shape=shape, dtype=dtype: shape.tensors(dtype),
                lambda shape=shape, dtype=dtype: shape.theirs(dtype),
                shape.work,
            )


def sparse_attentions(capability: int) -> Iterator[Case]:
    """A window of 256 and one global token, as long_bert has it; PyTorch's is dense."""
    for tokens in (1024, 4096, 16384):
        shape = Shape(1, tokens, 12, 64)
        pattern = Pattern(tokens, window=256, global_tokens=1)
        problem = SparseAttentionProblem(shape.problem("float16"), pattern)
        yield Case(
            "Sparse attention",
            f"window 256, 1 global, {tokens} tokens, 12 x 64, float16",
            sparse_attention.recipes(problem, {}, capability, effort=_EFFORT),
            lambda shape=shape: shape.tensors("float16"),
            lambda shape=shape: shape.theirs("float16"),
        )


def layers_of_experts(capability: int) -> Iterator[Case]:
    """2 of 8 experts; PyTorch's is one MLP on as many rows as all experts have together."""
    for tokens, weights in [
        (8, "float16"),
        (512, "float16"),
        (512, "int8"),
        (8192, "float16"),
        (8192, "int8"),
    ]:
        problem = ExpertsProblem(tokens, 8, 2, 768, 3072, "Gelu", "float16", weights)
        layer = Layer.of(problem)

        def tensors(layer: Layer = layer) -> dict[str, torch.Tensor]:
            return {role: tensor.cuda() for role, tensor in layer.tensors.items()}

        def theirs(tokens: int = tokens) -> Callable[[], object]:
            options = {"device": "cuda", "dtype": torch.float16}
            up, down = torch.nn.Linear(768, 3072, **options), torch.nn.Linear(3072, 768, **options)
            x = torch.randn(2 * tokens, 768, **options)
            return lambda: down(functional.gelu(up(x)))

        found = experts.recipes(problem, layer.constants, capability, effort=_EFFORT)
        work = 4.0 * 2 * tokens * 768 * 3072
        name = f"2 of 8 experts, 768 x 3072, {tokens} tokens, {weights}"
        yield Case("Experts", name, found, tensors, theirs, work)


def measured(case: Case) -> Row:
    """The fastest recipe of a case, and PyTorch."""
    tensors, found = case.tensors(), []
    for recipe in case.recipes:
        try:
            found.append((median_us(prepared(recipe, tensors, capability())), recipe.config))
        except REFUSALS as error:
            print(f"{case.name}: {recipe.config}: {error}", file=sys.stderr)
    us, config = min(found, default=(float("nan"), "none runs"))
    with torch.no_grad():
        other = None if case.theirs is None else median_us(case.theirs())
    tflops = case.work / us / 1e6 if case.work else None
    return Row(case.group, case.name, us, other, tflops, config)


def page(document: dict[str, Any], rows: list[Row]) -> str:
    """Markdown."""
    lines = [*head(document), *noted(document)]
    lines += ["Microseconds; see the head of benchmarks/cuda_rows.py for how they are taken.", ""]
    lines += ["| | | twofour | PyTorch | ratio | TFLOP/s | configuration |"]
    lines += ["|---|---|---:|---:|---:|---:|---|"]
    for row in rows:
        ratio = "" if row.torch_us is None else f"{row.torch_us / row.ours_us:.2f}"
        other = "" if row.torch_us is None else f"{row.torch_us:.1f}"
        speed = "" if row.tflops is None else f"{row.tflops:.0f}"
        cells = (row.group, row.name, f"{row.ours_us:.1f}", other, ratio, speed, row.config)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--output", type=Path, default=ROOT, help="folder of the tables")
    made.add_argument("--only", default="", help="word of a table's title or a row's name")
    return made


def main() -> None:
    """Times all and writes the tables."""
    given = parser().parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here: expected an NVIDIA one that PyTorch can use")
    number = capability()
    makers = (norms, attentions, sparse_attentions, layers_of_experts)
    word = given.only.lower()
    cases = [c for make in makers for c in make(number) if word in f"{c.group} {c.name}".lower()]
    if not cases:
        sys.exit(f"no row has {given.only!r} in its name")
    compile_all((recipe for case in cases for recipe in case.recipes), number)
    title = "Norms, attention and experts on a GPU"
    device, tools = [torch.cuda.get_device_name()], ("torch", "triton")
    document, rows = about(title, "cuda_rows", sys.argv[1:], device, tools), []
    for case in cases:
        rows.append(measured(case))
        document["rows"] = [asdict(row) for row in rows]
        write(given.output, "cuda_rows", document, page(document, rows))
        print(
            f"{rows[-1].name}: {rows[-1].ours_us:.1f} us, PyTorch {rows[-1].torch_us}", flush=True
        )


if __name__ == "__main__":
    main()
