"""Writes `foreign.md` and `foreign.json`: files that others wrote, built and raced as they are.

    python benchmarks/foreign.py                              # all, about ten minutes
    python benchmarks/foreign.py --only fastestdet,dtln_2 --output /tmp/out

The files, the shapes of a run and what is known of them come from the folder that `TWOFOUR_DATA`
names (default `../shared/data`). Each is built in float32 and in INT8, both as it is and with its
weights pruned for the purpose (`--sparsity force`: for time, not for accuracy), and runs in turns
beside ONNX Runtime on the same file. Inputs are random; INT8 is calibrated on eight of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from twofour.bench import peers
from twofour.bench.peers.onnxruntime import reference
from twofour.bench.timing import Schedule, race, ratio
from twofour.bench.versus import differences, ours
from twofour.compiler.build import build
from twofour.compiler.explain import FALLBACK
from twofour.core.errors import Error
from twofour.core.target import detect_host, host_target
from twofour.core.version import __version__
from twofour.engine import Engine
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.quantize import quantize
from twofour.runtime.session import Session

ROOT = Path(__file__).resolve().parent
SAMPLES, RATE = 8, 16_000
Feeds = dict[str, Any]


def random_feeds(inputs: dict[str, Any], shapes: dict[str, list[int]], seed: int) -> Feeds:
    """One input of the model: normal floats, small integers, and a sample rate where one is asked.

    Args:
        inputs: name -> what the index says of it.
        shapes: of a run.
        seed: of the numbers.
    """
    random = np.random.default_rng(seed)
    feeds: Feeds = {}
    for name, shape in shapes.items():
        if inputs[name]["type"] == "FLOAT":
            feeds[name] = random.standard_normal(shape).astype(np.float32)
        elif not shape:
            feeds[name] = np.array(RATE, np.int64)
        else:
            feeds[name] = random.integers(0, 256, shape).astype(inputs[name]["type"].lower())
    return feeds


def measured(path: Path, entry: dict[str, Any], duration_s: float) -> dict[str, Any]:
    """Everything about one file."""
    shapes = entry["random_run"]["feeds"]
    feeds = random_feeds(entry["inputs"], shapes, 0)
    fixed = {name: tuple(shape) for name, shape in shapes.items() if shape}
    samples = [random_feeds(entry["inputs"], shapes, 1 + i) for i in range(SAMPLES)]
    data = {name: np.stack([each[name] for each in samples]) for name in shapes}
    model = load_model(path)
    found: dict[str, Any] = {"name": path.stem, "exporter": entry["exporter"]}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = {
            "f32": build(path, shapes=fixed),
            "2:4 f32": build(path, shapes=fixed, sparsity="force"),
        }
        files = {"f32": path}
        try:
            files["int8"] = save_model(quantize(model, data), folder / "int8.onnx")
            engines["int8"] = build(files["int8"], shapes=fixed)
            engines["2:4 int8"] = build(files["int8"], shapes=fixed, sparsity="force")
        except Error as error:
            found["not_quantized"] = error.what
        sessions = {key: stack.enter_context(Session(each)) for key, each in engines.items()}
        contestants = {key: ours(each, feeds) for key, each in sessions.items()}
        for key, file in files.items():
            contestants[f"onnxruntime {key}"] = peers.prepare("onnxruntime", file, feeds, 1)
        timings = dict(
            zip(contestants, race(list(contestants.values()), Schedule(duration_s)), strict=True)
        )
        found["median_us"] = {key: timing.median_us for key, timing in timings.items()}
        found["spread_us"] = {key: timing.spread_us for key, timing in timings.items()}
        found["ratio"] = {
            key: ratio(timings[key], timings[f"onnxruntime {key}"]).median for key in files
        }
        exact = reference(path, feeds, 1)
        found["cosine"] = {
            key: min(each.cosine for each in differences(sessions[key].run(feeds), exact))
            for key in files
        }
        if "int8" in files:
            own = differences(reference(files["int8"], feeds, 1), exact)
            found["cosine"]["onnxruntime int8"] = min(each.cosine for each in own)
    found["engines"] = {key: described(engine) for key, engine in engines.items()}
    return found


def described(engine: Engine) -> dict[str, Any]:
    """Operators, steps, and what runs on ONNX Runtime."""
    plan = engine.plan
    outside = [layer for layer in plan.layers if layer.tactic == FALLBACK]
    return {
        "operators": plan.graph.get("operators", len(plan.layers)),
        "layers": len(plan.layers),
        "steps": len(plan.steps),
        "on_onnxruntime": sorted({layer.op for layer in outside}),
        "notes": list(plan.notes),
    }


def page(document: dict[str, Any]) -> str:
    """The figures as markdown."""
    lines = [
        "# Files that others wrote",
        "",
        f"    {document['command']}",
        "",
        f"Machine: {document['cpu']}, {document['target']}, one thread. twofour {__version__}, "
        f"ONNX Runtime {document['onnxruntime']}.",
        "",
        "Times in milliseconds, medians of single calls in turns. Speed: times as fast as ONNX "
        "Runtime on the same file. Cosine: of the outputs, the worst one, with ONNX Runtime on the "
        "float file, unoptimised; in brackets that of ONNX Runtime, unoptimised, on the INT8 file.",
        "",
        "| file | operators | steps | on ONNX Runtime | f32 | ONNX Runtime | speed | cosine "
        "| 2:4 f32 | INT8 | ONNX Runtime | speed | cosine | 2:4 INT8 |",
        "| --- | --: | --: | --- " + "| --: " * 10 + "|",
    ]
    lines += [_row(row) for row in document["rows"]]
    lines += [
        "",
        "The 2:4 columns show what the kernels would gain, on weights pruned without any "
        "fine-tuning.",
        "",
    ]
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    times, cosine, built = row["median_us"], row["cosine"], row["engines"]["f32"]
    outside = ", ".join(built["on_onnxruntime"]) or "nothing"
    cells = [
        row["name"], str(built["operators"]), str(built["steps"]), outside, _ms(times["f32"]),
        _ms(times["onnxruntime f32"]), f"{row['ratio']['f32']:.2f}x", f"{cosine['f32']:.6f}",
        _ms(times["2:4 f32"]),
    ]  # fmt: skip
    if "int8" in times:
        cells += [
            _ms(times["int8"]), _ms(times["onnxruntime int8"]), f"{row['ratio']['int8']:.2f}x",
            f"{cosine['int8']:.4f} ({cosine['onnxruntime int8']:.4f})", _ms(times["2:4 int8"]),
        ]  # fmt: skip
    else:
        cells += [row["not_quantized"], "", "", "", ""]
    return f"| {' | '.join(cells)} |"


def _ms(us: float) -> str:
    return f"{us / 1e3:.3g}"


def main(arguments: Sequence[str]) -> int:
    """Returns 1 where a file cannot be built, or an engine is slower than ONNX Runtime by 5 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names of files, with commas between them")
    parser.add_argument("--duration", type=float, default=5.0, help="timed seconds a file")
    parser.add_argument("--output", type=Path, default=ROOT, help="folder for the two files")
    options = parser.parse_args(arguments)
    folder = Path(os.environ.get("TWOFOUR_DATA", "../shared/data"))
    index = json.loads((folder / "onnx_index.json").read_text())
    only = set(filter(None, options.only.split(",")))
    rows, failed = [], []
    for name, entry in sorted(index.items()):
        path = folder / name
        if "random_run" not in entry or (only and path.stem not in only):
            continue
        print(path.stem, file=sys.stderr)
        try:
            rows.append(measured(path, entry, options.duration))
        except Error as error:
            failed.append(f"{path.stem}: {error}")
    slow = [
        f"{row['name']}: {key} {each:.2f}x"
        for row in rows
        for key, each in row["ratio"].items()
        if each < 0.95
    ]
    document = {
        "command": shlex.join(["python", "benchmarks/foreign.py", *arguments]),
        "cpu": detect_host().model,
        "target": str(host_target()),
        "onnxruntime": version("onnxruntime"),
        "rows": rows,
    }
    (options.output / "foreign.json").write_text(json.dumps(document, indent=2) + "\n")
    (options.output / "foreign.md").write_text(page(document))
    for line in [*failed, *(f"slower than ONNX Runtime: {each}" for each in slow)]:
        print(line, file=sys.stderr)
    return int(bool(failed or slow))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
