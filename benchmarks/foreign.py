"""Writes `foreign.md` and `foreign.json`: files that others wrote, built and raced as they are.

    python -m benchmarks.foreign                              # all, about ten minutes
    python -m benchmarks.foreign --only fastestdet,dtln_2 --output /tmp

The files come from the folder that `TWOFOUR_DATA` names (default `../shared/data`), their inputs
from the tests: photos, speech, sheets of text where that is what they are for. Each file is built
in float32 and in INT8, as it is and with its weights pruned (`--sparsity force`: for time, not for
accuracy), and runs in turns beside ONNX Runtime on the same file.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.document import command, write
from tests.onnx_tools.any_file import feeds_of, joined
from tests.onnx_tools.foreign_inputs import FILES, samples
from twofour.bench import peers
from twofour.bench.peers.onnxruntime import reference
from twofour.bench.suite.files import INT8, UINT8
from twofour.bench.timing import Schedule, race, ratio
from twofour.bench.versus import ours
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
INDEX = "onnx_index.json"
SLOWEST = 0.95
OURS = {"f32", "int8"}
"""The kinds of files that engines are built from; the last kind is as ONNX Runtime likes it."""
Feeds = list[dict[str, np.ndarray]]
Row = dict[str, Any]


def measured(path: Path, data: Path, duration_s: float) -> Row:
    """Everything about one file."""
    calibration = samples(data, path.stem)
    model = load_model(path)
    feeds = feeds_of(model, calibration)
    shapes = {name: array.shape for name, array in feeds[0].items() if array.shape}
    found: Row = {"name": path.stem}
    with ExitStack() as stack:
        files = {"f32": path}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            files["int8"] = save_model(quantize(model, calibration, INT8), folder / "int8.onnx")
            as_it_likes = quantize(model, calibration, UINT8)
            files["uint8"] = save_model(as_it_likes, folder / "uint8.onnx")
        except Error as error:
            found["not_quantized"] = error.what
        engines = {}
        for key in OURS & files.keys():
            engines[key] = build(files[key], shapes=shapes)
            engines[f"2:4 {key}"] = build(files[key], shapes=shapes, sparsity="force")
        sessions = {key: stack.enter_context(Session(each)) for key, each in engines.items()}
        found |= timed(sessions, files, feeds[0], duration_s)
        found["cosine"] = agreement(sessions, files, feeds)
    found["engines"] = {key: described(engine) for key, engine in engines.items()}
    return found


def timed(
    sessions: dict[str, Session],
    files: dict[str, Path],
    feeds: dict[str, np.ndarray],
    duration_s: float,
) -> Row:
    """Ours and ONNX Runtime in turns."""
    contestants = {key: ours(each, feeds) for key, each in sessions.items()}
    for key, file in files.items():
        contestants[f"onnxruntime {key}"] = peers.prepare("onnxruntime", file, feeds, 1)
    results = race(list(contestants.values()), Schedule(duration_s))
    timings = dict(zip(contestants, results, strict=True))
    int8 = [timings[f"onnxruntime {key}"] for key in ("int8", "uint8") if key in files]
    rivals = {"f32": [timings["onnxruntime f32"]], "int8": int8}
    return {
        "median_us": {key: timing.median_us for key, timing in timings.items()},
        "spread_us": {key: timing.spread_us for key, timing in timings.items()},
        "ratio": {
            key: ratio(timings[key], min(rivals[key], key=lambda each: each.median_us)).median
            for key in sorted(OURS & files.keys())
        },
    }


def agreement(sessions: dict[str, Session], files: dict[str, Path], feeds: Feeds) -> Row:
    """Cosines with the float file on all samples, run by ONNX Runtime without optimisation."""
    exact = joined([reference(files["f32"], each, 1) for each in feeds])
    found = {
        key: worst(exact, joined([sessions[key].run(each) for each in feeds]))
        for key in sorted(OURS & files.keys())
    }
    if "int8" in files:
        meant = joined([reference(files["int8"], each, 1) for each in feeds])
        found["onnxruntime int8"] = worst(exact, meant)
    return found


def worst(want: list[np.ndarray], got: list[np.ndarray]) -> float:
    """The smallest cosine of all outputs."""
    return min(
        float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))
        for a, b in zip(want, got, strict=True)
    )


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
        f"# {document['title']}",
        "",
        f"    {document['command']}",
        "",
        f"Machine: {document['cpu']}, {document['target']}, one thread. twofour "
        f"{document['version']}, "
        f"ONNX Runtime {document['onnxruntime']}.",
        "",
        "Times in milliseconds, medians of single calls in turns. Speed: times as fast as ONNX "
        "Runtime; in INT8 on the same file (symmetric int8) or on one as it likes best (uint8, "
        "both inputs of an Add quantized), whichever is faster. Cosine: of the outputs for eight "
        "inputs, the worst one, with ONNX Runtime on the float file, unoptimised; in brackets that "
        "of ONNX Runtime, unoptimised, on the INT8 file.",
        "",
        "| file | operators | steps | on ONNX Runtime | f32 | ONNX Runtime | speed | cosine "
        "| 2:4 f32 | INT8 | ONNX Runtime, same file | its best file | speed | cosine | 2:4 INT8 |",
        "| --- | --: | --: | --- " + "| --: " * 11 + "|",
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
            _ms(times["int8"]), _ms(times["onnxruntime int8"]),
            _ms(times["onnxruntime uint8"]), f"{row['ratio']['int8']:.2f}x",
            f"{cosine['int8']:.4f} ({cosine['onnxruntime int8']:.4f})", _ms(times["2:4 int8"]),
        ]  # fmt: skip
    else:
        cells += [row["not_quantized"], "", "", "", ""]
    return f"| {' | '.join(cells)} |"


def _ms(us: float) -> str:
    return f"{us / 1e3:.3g}"


def main(arguments: Sequence[str]) -> int:
    """Returns 1 where a file cannot be built, or an engine is slower than ONNX Runtime by 5 %."""
    parser = argparse.ArgumentParser(description="Races engines of files that others wrote.")
    parser.add_argument("--only", default="", help="names of files, with commas between them")
    parser.add_argument("--duration", type=float, default=5.0, help="timed seconds a file")
    parser.add_argument("--output", type=Path, default=ROOT, help="folder for the two files")
    options = parser.parse_args(arguments)
    data = Path(os.environ.get("TWOFOUR_DATA", "../shared/data"))
    only = set(filter(None, options.only.split(","))) or set(FILES)
    rows: list[Row] = []
    failed: list[str] = []
    document = {
        "title": "Files that others wrote",
        "version": __version__,
        "command": command("foreign", arguments),
        "cpu": detect_host().model,
        "target": str(host_target()),
        "onnxruntime": version("onnxruntime"),
        "rows": rows,
    }
    for name in FILES:
        if name in only:
            print(name, file=sys.stderr)
            try:
                rows.append(measured(data / "onnx" / f"{name}.onnx", data, options.duration))
            except Error as error:
                failed.append(f"{name}: {error}")
            write(options.output, "foreign", document, page(document))
    slow = [
        f"{row['name']}: {key} is {each:.2f} times as fast as ONNX Runtime"
        for row in rows
        for key, each in row["ratio"].items()
        if each < SLOWEST
    ]
    for line in (*failed, *slow):
        print(line, file=sys.stderr)
    return int(bool(failed or slow))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
