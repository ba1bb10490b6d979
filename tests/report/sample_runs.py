"""Runs to draw: the layers are those of a real engine, what a pipeline would measure is made up."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from twofour.compiler.build import build
from twofour.compiler.outline import Outline, outline
from twofour.core.outcome import (
    Artifact,
    Cell,
    Check,
    Figure,
    Outcome,
    Point,
    StageRecord,
    Surroundings,
    Task,
)
from twofour.core.records import to_plain
from twofour.core.sensitivity import Case, Left, Sensitivity, document
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quality import tensor_quality
from twofour.onnx_tools.quantize import quantize_with_report

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror='a()'>&amp;{{7*7}}\u202e\u0000\x1b"


def real_parts(path: Path, effort: int = 1) -> tuple[Outline, dict[str, Any]]:
    """The layers of a model pruned and quantized, and the documents of what was done to it."""
    random = np.random.default_rng(0)
    model = prune(load_model(path))[0]
    feeds = {
        value.name: random.normal(
            size=[d if isinstance(d, int) else 1 for d in value.shape]
        ).astype(value.dtype.numpy())
        for value in model.graph.inputs
    }
    found = quantize_with_report(model, [feeds] * 2)
    floats = build(load_model(path), tuning_effort=0, race=False)
    engine = build(found.model, tuning_effort=effort, race=False)
    tensors = tensor_quality(found.model, found.floats, found.histograms)
    quality = {"tensors": [asdict(each) for each in tensors], "layers": []}
    documents = {
        "quantize": {
            "method": "mse",
            "recipe": "balanced",
            "int8_layers": len(quality["tensors"]) // 2,
            "float_layers": [],
            "quality": quality,
        },
        "sensitivity": scanned([n.name for n in model.graph if n.op_type in ("Conv", "Gemm")]),
    }
    return outline(engine.plan, floats=floats.plan), json.loads(json.dumps(documents))


def scanned(layers: list[str]) -> dict[str, Any]:
    """A made-up scan of these layers."""
    random = np.random.default_rng(1)
    cases = []
    for strength, pattern in ((0.5, "2:4"), (0.9, "2:4/pair"), (0.2, "4:8")):
        drops = strength * random.exponential(0.6, len(layers)) - 0.1
        cases += [
            Case(name, pattern, name, 1000, 0.9, 91.5 - drop, float(drop), 0.12, 1.0)
            for name, drop in zip(layers[1:], drops, strict=False)
        ]
    left = tuple(
        Left(layers[0], pattern, "3 input channels are not a multiple of 4")
        for pattern in ("2:4", "2:4/pair", "4:8")
    )
    scan = Sensitivity("m.onnx", "top1", "%", True, 91.5, 10_000, tuple(cases), left)
    return document(scan, [], None)


def sample_run(parts: tuple[Outline, dict[str, Any]] | None = None) -> Outcome:
    """A whole run; with these layers and documents."""
    (rows, edges), documents = parts or (Outline((), ()), {})
    return Outcome(
        name="resnet20-cifar10",
        created="2026-03-02T14:07:31+00:00",
        verdict="passed",
        checks=CHECKS,
        task=Task("top1", "%", True, 10_000),
        cells=CELLS,
        points=POINTS,
        layers=rows,
        edges=edges,
        stages=STAGES,
        artifacts=ARTIFACTS,
        surroundings=SURROUNDINGS,
        notes=(
            "layer1.0.conv1 stays dense: 16 input channels are too few for 2:4 to pay.",
            "joules are not measured: this machine shows no counter (RAPL is not readable).",
        ),
        documents=documents,
    )


def plain(outcome: Outcome) -> dict[str, Any]:
    """As run.json has it."""
    return json.loads(json.dumps({"schema": "twofour.run/1", **to_plain(outcome)}))


def hostile(outcome: Outcome, text: str = HOSTILE) -> dict[str, Any]:
    """The run with every text replaced."""

    def spoiled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoiled(each) for key, each in value.items()}
        if isinstance(value, list):
            return [spoiled(each) for each in value]
        return text if isinstance(value, str) else value

    found = spoiled(plain(outcome))
    for part in ("settings",):
        for stage in found["stages"]:
            stage[part] = {text: text}
    found["surroundings"]["packages"] = {text: text}
    return found


CHECKS = (
    Check("accuracy", "passed", 0.31, -0.05, 0.68, 1.5, "points",
          "top1 91.26 %, 0.31 points worse than the baseline's 91.57 %; "
          "at most 1.5 points worse was asked for"),
    Check("speed", "passed", 3.12, 3.04, 3.19, 1.5, "x",
          "3.12 times as fast as the baseline; at least 1.5 was asked for"),
    Check("memory", "passed", 83.1e6, None, None, 200e6, "bytes",
          "peak resident memory 83 MB; at most 200 MB was asked for"),
)  # fmt: skip
CELLS = tuple(
    Cell(weights, precision, Figure(*figure), *latency_us, *size_bytes)
    for weights, precision, figure, latency_us, size_bytes in (
        ("dense", "float32", (91.57, 91.0, 92.1), (128.4, 127.9, 129.3),
         (1_130_000, 1_078_000, 96_400_000)),
        ("dense", "PTQ", (91.41, 90.85, 91.94), (58.9, 58.1, 59.7),
         (342_000, 271_500, 84_100_000)),
        ("dense", "QAT", (91.62, 91.06, 92.15), (58.7, 58.0, 59.6),
         (342_000, 271_500, 84_000_000)),
        ("2:4/pair", "float32", (91.33, 90.77, 91.87), (76.3, 75.6, 77.4),
         (724_000, 610_000, 90_200_000)),
        ("2:4/pair", "PTQ", (91.02, 90.45, 91.56), (41.4, 40.9, 42.1),
         (267_000, 183_900, 83_300_000)),
        ("2:4/pair", "QAT", (91.26, 90.7, 91.8), (41.2, 40.8, 41.8),
         (267_000, 183_900, 83_100_000)),
    )
)  # fmt: skip
POINTS = (
    Point("dense float32", "baseline", CELLS[0].figure, 128.4),
    Point("2:4/pair QAT", "candidate", CELLS[5].figure, 41.2),
    Point("dense PTQ", "variant", CELLS[1].figure, 58.9),
    Point("dense QAT", "variant", CELLS[2].figure, 58.7),
    Point("2:4/pair float32", "variant", CELLS[3].figure, 76.3),
    Point("2:4/pair PTQ", "variant", CELLS[4].figure, 41.4),
    Point("ONNX Runtime float32", "peer", Figure(91.57, 91.0, 92.1), 171.0),
    Point("ONNX Runtime INT8", "peer", Figure(91.38, 90.8, 91.9), 118.0),
    *(Point(f"front {k}", "front", Figure(91.6 - 0.02 * k * k), 62.0 - 4.2 * k) for k in range(6)),
)


def _sha(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


ARTIFACTS = (
    Artifact("recipe.yaml", "recipe", _sha("r"), 1_204, ""),
    Artifact("resnet20.pt", "checkpoint", _sha("c"), 1_097_000, ""),
    Artifact("cifar10-train.npz", "data", _sha("t"), 153_600_000, ""),
    Artifact("cifar10-test.npz", "data", _sha("e"), 30_720_000, ""),
    Artifact("stages/sparsify-1f2e3d4c5b6a/masks.npz", "masks", _sha("m"), 34_800, "sparsify",
             ("resnet20.pt",)),
    Artifact("stages/finetune-0a1b2c3d4e5f/sparse.pt", "checkpoint", _sha("s"), 1_101_000,
             "finetune", ("resnet20.pt", "stages/sparsify-1f2e3d4c5b6a/masks.npz",
                          "cifar10-train.npz")),
    Artifact("stages/qat-99aa88bb77cc/qat.pt", "checkpoint", _sha("q"), 1_103_000, "qat",
             ("stages/finetune-0a1b2c3d4e5f/sparse.pt", "cifar10-train.npz")),
    Artifact("stages/export-123456abcdef/model.onnx", "onnx", _sha("o"), 1_120_400, "export",
             ("stages/qat-99aa88bb77cc/qat.pt",)),
    Artifact("stages/build-fedcba654321/cpu.engine", "engine", _sha("g"), 267_000, "build",
             ("stages/export-123456abcdef/model.onnx",)),
    Artifact("stages/evaluate-aa11bb22cc33/evaluate.json", "figures", _sha("v"), 2_930, "evaluate",
             ("stages/build-fedcba654321/cpu.engine", "cifar10-test.npz")),
)  # fmt: skip
STAGES = (
    StageRecord("load", "done", _sha("1"), 0.8, "resnet20.pt: 269,722 parameters"),
    StageRecord("sparsify", "reused", _sha("2"), 2.1, "2:4/pair, magnitude: 18 of 20 layers",
                {"pattern": "2:4/pair", "method": "magnitude", "permute": "true"}),
    StageRecord("finetune", "reused", _sha("3"), 412.0, "10 epochs, distilled: top1 91.33 %",
                {"epochs": "10", "lr": "0.02", "distil": "true"}),
    StageRecord("qat", "done", _sha("4"), 187.5, "4 epochs: top1 91.29 %", {"epochs": "4"}),
    StageRecord("export", "done", _sha("5"), 3.9, "model.onnx, opset 18"),
    StageRecord("quantize", "left out", "", 0.0, "the model has its quantizers from QAT"),
    StageRecord("build", "done", _sha("6"), 64.2, "cpu: 24 layers, 19 of them sparse"),
    StageRecord("evaluate", "done", _sha("7"), 31.0, "top1 91.26 % on 10,000 samples"),
    StageRecord("benchmark", "done", _sha("8"), 42.7, "41.2 us, 3.12 times as fast"),
    StageRecord("gate", "done", _sha("9"), 0.1, "passed"),
    StageRecord("publish", "not reached", "", 0.0, ""),
)  # fmt: skip
SURROUNDINGS = Surroundings(
    cpu="a CPU with AVX-512 VNNI, 2.6 GHz",
    cores=8,
    memory_bytes=33_500_000_000,
    system="Linux 6.1, Debian 12",
    target="cpu avx512vnni",
    threads=1,
    seed=0,
    command="twofour pipeline recipes/resnet20.yaml --run runs/resnet20",
    packages={"twofour": "0.9.0", "torch": "2.13.0", "numpy": "2.3.1", "onnx": "1.19.0",
              "llvmlite": "0.45.0", "onnxruntime": "1.23.0"},
)  # fmt: skip


def many_layers(run: Outcome, count: int) -> Outcome:
    """The run with its layers again and again, each block reading from the one before."""
    edges = [edge for edge in run.edges if -1 not in (edge.source, edge.target)]
    size = len(run.layers)
    blocks = -(-count // size)
    rows = [
        replace(row, name=f"block{b}.{row.name}", share=(row.share or 0.0) / blocks)
        for b in range(blocks)
        for row in run.layers
    ]
    joined = [
        replace(edge, source=edge.source + b * size, target=edge.target + b * size)
        for b in range(blocks)
        for edge in edges
    ]
    joined += [replace(edges[0], source=b * size - 1, target=b * size) for b in range(1, blocks)]
    kept = [edge for edge in joined if max(edge.source, edge.target) < count]
    return replace(run, layers=tuple(rows[:count]), edges=tuple(kept))
