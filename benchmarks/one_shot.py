"""What the tools of one-shot pruning take: time, memory, and the energy they keep.

    python benchmarks/one_shot.py --table benchmarks/one_shot.md    # about a quarter of an hour

Three parts, each in a process of its own, so that a peak of memory is its own: masks of 99 million
weights; the search for an order of channels, on the matrix of apex's documentation; and SparseGPT
of BERT-base's 72 linear layers, as a PyTorch model and as an ONNX file, on random tokens, since
times do not depend on what the weights are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twofour.core.masks import magnitude_mask
from twofour.core.patterns import energy_kept
from twofour.core.permutation import search
from twofour.core.target import detect_host, host_target
from twofour.core.version import __version__
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.one_shot import Calibration
from twofour.onnx_tools.prune import prune
from twofour.train import Sparsifier
from twofour.train.networks.catalog import NETWORKS, write_network
from twofour.train.networks.seeded import seeded
from twofour.train.networks.transformer import CONFIGS, INPUT_NAMES, example_inputs

LINEARS = [(768, 768)] * 48 + [(3072, 768), (768, 3072)] * 12
CONVOLUTIONS = [(512, 512, 3, 3)] * 5
PATTERNS = ("2:4", "4:8", "2:4/pair", "2:4/2d", "8:16", "16:32")
SEQUENCES, LENGTH = 32, 128
Rows = list[dict[str, Any]]


def masks() -> Rows:
    """Magnitude masks of BERT-base's linear layers and some convolutions, by one thread."""
    random = np.random.default_rng(0)
    shapes = [*LINEARS, *CONVOLUTIONS]
    weights = {shape: random.standard_normal(shape, np.float32) for shape in set(shapes)}
    million = sum(int(np.prod(shape)) for shape in shapes) / 1e6
    rows = []
    for pattern in PATTERNS:
        begin_s = time.perf_counter()
        for shape in shapes:
            mask = magnitude_mask(weights[shape], pattern)
        seconds = time.perf_counter() - begin_s
        kept = energy_kept(weights[shapes[-1]], mask)
        rows.append({"pattern": pattern, "million": million, "kept": kept, "seconds": seconds})
    return rows


def permutation() -> Rows:
    """The matrix of apex's documentation, ranked by magnitude as there."""
    matrix = np.random.RandomState(1).rand(128, 64)
    half = float(np.sort(matrix, axis=1)[:, 32:].sum())
    rows = []
    for effort in (0, 1, 2, 3):
        begin_s = time.perf_counter()
        found = search(matrix, "2:4", effort=effort)
        seconds = time.perf_counter() - begin_s
        share = (found.after - found.before) / (half - found.before)
        rows.append(
            {
                "effort": effort,
                "before": found.before,
                "after": found.after,
                "share": share,
                "seconds": seconds,
            }
        )
    return rows


def sparsegpt_torch() -> Rows:
    """Every linear layer of a PyTorch encoder, each after those before it."""
    model = seeded(NETWORKS["bert_base"].make)
    tokens = example_inputs(CONFIGS["bert_base"], SEQUENCES, LENGTH)
    batches = [
        dict(zip(INPUT_NAMES, (t[i : i + 8] for t in tokens), strict=True))
        for i in range(0, SEQUENCES, 8)
    ]
    begin_s = time.perf_counter()
    sparsifier = Sparsifier(model, "2:4", "sparsegpt").prune(batches)
    seconds = time.perf_counter() - begin_s
    sparsifier.verify()
    return [{"what": "PyTorch model", "layers": len(sparsifier.weights), "seconds": seconds}]


def sparsegpt_onnx() -> Rows:
    """The same network as an ONNX file."""
    tokens = example_inputs(CONFIGS["bert_base"], SEQUENCES, LENGTH)
    data = {name: t.numpy() for name, t in zip(INPUT_NAMES, tokens, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bert_base.onnx"
        subprocess.run([sys.executable, __file__, "--write", path], check=True)
        model = load_model(path)
        begin_s = time.perf_counter()
        _, report = prune(model, "2:4", calibration=Calibration(data, "sparsegpt"))
        seconds = time.perf_counter() - begin_s
    pruned = sum(not entry.reason for entry in report)
    return [{"what": "ONNX file", "layers": pruned, "seconds": seconds}]


PARTS: Mapping[str, Callable[[], Rows]] = {
    "masks": masks,
    "permutation": permutation,
    "sparsegpt_torch": sparsegpt_torch,
    "sparsegpt_onnx": sparsegpt_onnx,
}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(part: str) -> Rows:
    """The rows of a part, from a process of its own."""
    command = [sys.executable, __file__, "--part", part]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if part == "masks" else None
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    rows: Rows = json.loads(done.stdout)
    return rows


def document(parts: Sequence[str]) -> dict[str, Any]:
    """What is measured now."""
    host = detect_host()
    return {
        "title": "One-shot pruning: what its tools take",
        "command": "python benchmarks/one_shot.py",
        "version": __version__,
        "device": [f"{host.model}, {host.cores} cores ({host_target()})"],
        "tools": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
        },
        **{part: measured(part) for part in parts},
    }


def page(summary: Mapping[str, Any]) -> str:
    """The figures as markdown."""
    tools = ", ".join(f"{name} {version}" for name, version in summary["tools"].items())
    head = [f"# {summary['title']}", "", f"    {summary['command']}", ""]
    head += [f"Machine: {summary['device'][0]}  "]
    head += [f"Versions: twofour {summary['version']}, {tools}", ""]
    tables = (_masks_table, _sparsegpt_table, _permutation_table)
    return "\n".join([*head, *(line for table in tables for line in (*table(summary), ""))])


def _masks_table(summary: Mapping[str, Any]) -> Iterator[str]:
    rows = summary["masks"]
    yield f"Magnitude masks of {rows[0]['million']:.0f} million weights, one thread, normal noise:"
    yield ""
    yield "| pattern | time | energy kept |"
    yield "| --- | --: | --: |"
    for row in rows:
        yield f"| {row['pattern']} | {row['seconds']:.2f} s | {row['kept']:.1%} |"


def _sparsegpt_table(summary: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"SparseGPT of BERT-base's linear layers to 2:4, {SEQUENCES} sequences of {LENGTH} tokens; "
        "the peak is that of the whole process, the model and what holds it included:"
    )
    yield ""
    yield "| network | layers | time | peak memory |"
    yield "| --- | --: | --: | --: |"
    for row in (*summary["sparsegpt_torch"], *summary["sparsegpt_onnx"]):
        peak = f"{row['peak_mb'] / 1000:.1f} GB"
        yield f"| {row['what']} | {row['layers']} | {row['seconds']:.0f} s | {peak} |"


def _permutation_table(summary: Mapping[str, Any]) -> Iterator[str]:
    rows = summary["permutation"]
    yield (
        "An order of channels for 2:4, on the 128 x 64 matrix of apex's documentation "
        "(`numpy.random.seed(1)`, `rand(128, 64)`). Gained: of what the best half of a row keeps "
        "beyond plain 2:4. apex says 2919.8 (35.5 %) for its stripe groups of 8, 0.013 s on a GPU "
        "or 60.7 s on a CPU, and at best 2921.9 (36.6 %):"
    )
    yield ""
    yield "| search | magnitude kept | gained | time |"
    yield "| --- | --: | --: | --: |"
    yield f"| none | {rows[0]['before']:.1f} | | |"
    for row in rows:
        cells = f"{row['after']:.1f} | {row['share']:.1%} | {row['seconds']:.2f} s"
        yield f"| effort {row['effort']} | {cells} |"


def main() -> int:
    """Measures one part, or all; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=tuple(PARTS), help="one part, as JSON")
    parser.add_argument("--write", type=Path, help="the network as an ONNX file")
    parser.add_argument("--table", type=Path, help="write a page here, and .json beside it")
    args = parser.parse_args()
    if args.write:
        write_network("bert_base", args.write, LENGTH)
        return 0
    if args.part:
        rows = [{**row, "peak_mb": _peak_bytes() / 1e6} for row in PARTS[args.part]()]
        print(json.dumps(rows))
        return 0
    summary = document(tuple(PARTS))
    if args.table is not None:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        args.table.write_text(page(summary))
        args.table.with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n")
    print(page(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
