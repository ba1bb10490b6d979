"""Walks on a GPU: equal to numpy, and how fast the usual ones move memory (printed: pytest -s)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from tests.gpu.launch import capability, launch, median_us, prepared
from tests.kernels.cuda.walk_cases import Layout, check, plain, values
from twofour.core.cuda_program import DTYPES
from twofour.kernels.cpu.nd_scalar import Expression
from twofour.kernels.cuda.kernel import Recipe
from twofour.kernels.cuda.problem import Ref, Walk
from twofour.kernels.cuda.walk import recipes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is here"),
]

QUANTIZE = (Expression("quantize", (0,), "int8", (0.02, 3.0)),)
ADD_GELU = (Expression("add", (0, 1), "float32"), Expression("Gelu", (2,), "float32"))
MIXED = (
    Expression("dequantize", (0,), "float32", (0.05, -3.0)),
    Expression("add", (2, 1), "float32"),
    Expression("Silu", (3,), "float32"),
    Expression("quantize", (4,), "int8", (0.03, 5.0)),
)
FLOAT8 = (
    Expression("dequantize", (0,), "float32", (0.25, 0.0)),
    Expression("mul", (1, 1), "float32"),
    Expression("quantize", (2,), "float8e4m3fn", (0.3, 0.0)),
)
BACK = Layout((1, 0, 2), (0, 3, 1), turned=frozenset({2}))
NHWC = Layout((0, 2, 3, 1))
ROW = Layout((0, 1), repeated=frozenset({0}))
SUMS = Layout((0, 1), repeated=frozenset({1}))
TOTAL = Layout((0, 1), repeated=frozenset({0, 1}))

# name: op, types, dims, layouts, more of Walk
CASES = {
    "copy backwards": ("copy", ["int64"] * 2, (9, 33, 70), [BACK, plain(3)], {}),
    "turn bytes": ("copy", ["int8"] * 2, (3, 65, 20, 21), [plain(4), NHWC], {}),
    "turn back": ("cast", ["float16", "float32"], (3, 65, 20, 21), [NHWC, plain(4)], {}),
    "input quantized": (
        *("chain", ["float32", "int8"], (3, 3, 61, 64), [plain(4), NHWC]),
        {"steps": QUANTIZE},
    ),
    "add and gelu": (
        *("chain", ["float16"] * 3, (77, 768), [plain(2), ROW, plain(2)]),
        {"steps": ADD_GELU},
    ),
    "mixed": (
        *("chain", ["int8", "bfloat16", "int8"], (77, 130), [plain(2), ROW, plain(2)]),
        {"steps": MIXED},
    ),
    "float8": ("chain", ["float8e4m3fn"] * 2, (5000,), [plain(1)] * 2, {"steps": FLOAT8}),
    "divide": ("div", ["int32"] * 3, (5000,), [plain(1)] * 3, {}),
    "divide reals": ("div", ["float32"] * 3, (5000,), [plain(1)] * 3, {}),
    "largest": ("max", ["float32"] * 3, (70, 70), [plain(2), ROW, plain(2)], {}),
    "cast": ("cast", ["float32", "uint8"], (5000,), [plain(1)] * 2, {}),
    "cast long": ("cast", ["float32", "int64"], (5000,), [plain(1)] * 2, {}),
    "where": ("where", ["bool", "float16", "float16", "float16"], (99, 99), [plain(2)] * 4, {}),
    "compare": ("less", ["float32", "float32", "bool"], (5000,), [plain(1)] * 3, {}),
    "fill": ("fill", ["bfloat16"], (50, 60), [Layout((1, 0), (2, 1))], {"scalars": (1.5,)}),
    "softmax": ("softmax", ["float16"] * 2, (70, 1000), [plain(2)] * 2, {}),
    "softmax across": ("softmax", ["float32"] * 2, (33, 80), [Layout((1, 0))] * 2, {}),
    "softmax of long rows": ("softmax", ["float32"] * 2, (5, 50257), [plain(2)] * 2, {}),
    "log-softmax": ("log_softmax", ["float32"] * 2, (70, 100), [plain(2)] * 2, {}),
    "expectation": (
        *("expect", ["float32"] * 2, (700, 16), [plain(2), SUMS]),
        {"scalars": (*map(float, range(16)), 0.5)},
    ),
    "mean": ("mean", ["float16", "float16"], (70, 300), [plain(2), SUMS], {}),
    "sum of all": ("sum", ["float32"] * 2, (500, 1000), [plain(2), TOTAL], {}),
    "sum of columns": ("sum", ["int64"] * 2, (99, 300), [Layout((1, 0)), SUMS], {}),
    "highest": ("reduce_max", ["float32"] * 2, (70, 300), [plain(2), SUMS], {}),
    "product": ("prod", ["int32"] * 2, (70, 30), [plain(2), SUMS], {}),
}


def run(recipe: Recipe, tensors: Mapping[str, torch.Tensor]) -> None:
    launch(recipe, tensors, capability())


@pytest.mark.parametrize("name", CASES)
def test_a_walk_equals_numpy(name: str) -> None:
    op, types, dims, lies, more = CASES[name]
    placed = [lie.ref(dtype, dims) for lie, dtype in zip(lies, types, strict=True)]
    special = op in ("max", "cast", "less", "reduce_max") and "float32" in types
    held = [
        values(ref.dtype, count, seed, special=special and seed + 1 < len(placed)).cuda()
        for seed, (ref, count) in enumerate(placed)
    ]
    refs = [ref for ref, _ in placed]
    problem = Walk(op, dims, refs[-1], tuple(refs[:-1]), **more)
    scale = math.sqrt(math.prod(dims)) * 3 if refs[-1].strides != refs[0].strides else 1.0
    check(problem, held[:-1], held[-1], run, effort=0, scale=scale if op in ("sum",) else 1.0)


@pytest.mark.parametrize("index", ["int32", "int64"])
def test_rows_by_index_are_clamped(index: str) -> None:
    x = values("float16", 50 * 768, 1).cuda()
    at = (torch.arange(300) * 7 % 131 - 66).to(getattr(torch, index)).cuda()
    refs = (Ref("float16", (0, 1)), Ref(index, (1, 0)))
    problem = Walk("gather", (300, 768), Ref("float16", (768, 1)), refs, rows=(50, 768))
    check(problem, [x, at], values("float16", 300 * 768, 2).cuda(), run, effort=1)


def dense(*dims: int) -> tuple[int, ...]:
    return tuple(math.prod(dims[i + 1 :]) for i in range(len(dims)))


IMAGES = (256, 3, 224, 224)
HIDDEN = (32 * 128, 3072)
TYPICAL = {
    "copy 100 MB": Walk("copy", (50_000_000,), Ref("float16", (1,)), (Ref("float16", (1,)),)),
    "add + gelu fp16": Walk(
        *("chain", HIDDEN, Ref("float16", (3072, 1))),
        (Ref("float16", (3072, 1)), Ref("float16", (0, 1))),
        steps=ADD_GELU,
    ),
    "NCHW f32 -> NHWC int8": Walk(
        *("chain", IMAGES, Ref("int8", (150528, 1, 672, 3))),
        (Ref("float32", dense(*IMAGES)),),
        steps=QUANTIZE,
    ),
    "NHWC -> NCHW fp16 256 channels": Walk(
        *("copy", (32, 256, 56, 56), Ref("float16", dense(32, 256, 56, 56))),
        (Ref("float16", (802816, 1, 14336, 256)),),
    ),
    "softmax 49152 x 128 fp16": Walk(
        *("softmax", (49152, 128), Ref("float16", (128, 1)), (Ref("float16", (128, 1)),))
    ),
    "embedding 4096 x 768 fp16": Walk(
        *("gather", (4096, 768), Ref("float16", (768, 1))),
        (Ref("float16", (0, 1)), Ref("int64", (1, 0))),
        rows=(30522, 768),
    ),
    "mean of 32 x 197 x 768": Walk(
        *("mean", (32, 197, 768), Ref("float16", (768, 0, 1))),
        (Ref("float16", (151296, 768, 1)),),
    ),
}


def test_how_fast_the_usual_walks_are() -> None:
    """Bytes that have to be read and written, by the median time; each recipe, the best marked."""
    for name, problem in TYPICAL.items():
        refs = (*problem.inputs, problem.y)
        counts = [
            1 + sum((n - 1) * s for n, s in zip(problem.dims, ref.strides, strict=True))
            for ref in refs
        ]
        moved = sum(n * DTYPES[ref.dtype] for n, ref in zip(counts, refs, strict=True))
        if problem.op == "gather":
            counts[0] = problem.rows[0] * problem.rows[1]
            moved = math.prod(problem.dims) * 4
        types = [values(ref.dtype, 1, 0).dtype for ref in refs]
        held = [torch.zeros(n, dtype=t, device="cuda") for n, t in zip(counts, types, strict=True)]
        if problem.op == "gather":
            held[1].random_(0, problem.rows[0])
        roles = [*(f"in{i}" for i in range(len(problem.inputs))), "y"]
        tensors = dict(zip(roles, held, strict=True))
        times = []
        for recipe in recipes(problem, {}, capability()):
            us = median_us(prepared(recipe, tensors, capability()), repeats=5, rounds=3)
            times.append((us, recipe.config))
        best = min(times)[0]
        for us, config in times:
            mark = "*" if us == best else " "
            print(f"{mark} {name:32} {config:36} {us:9.1f} us {moved / us / 1e3:8.1f} GB/s")
