"""Writes `sparse_attention.md` and `.json`: sparse attention against dense attention, by length.

    python -m benchmarks.sparse_attention                        # one operator, some minutes
    python -m benchmarks.sparse_attention --encoder              # and a whole encoder, half an hour
    python -m benchmarks.sparse_attention --lengths 512,4096 --output /tmp

One operator on q, k and v [1, length, 12 * 64]: a window of 256 tokens on each side, in float32,
with products in bfloat16, and in INT8 (q, k and v as bytes). Dense attention is that of all tokens
to all, without any mask, which is the fastest that anybody's can be: of ONNX Runtime as products
and a softmax and as its own fused operator, of OpenVINO in float32 and in bfloat16, and ours: the
same kernels with a window that holds all, and what the compiler finds in a graph of products and a
softmax. All take turns in one process. Memory is what a process of its own grows by at most, from
before it opens the file until after a run, inputs not counted.

The encoder has 12 layers of 768 channels and 4096 tokens, its linear layers 2:4 in INT8. Beside it
run, on ONNX Runtime and OpenVINO, the same weights with dense attention. The cosine is that of the
engine with ONNX Runtime, unoptimised, on the engine's own file, where the operator's function is
dense attention with a mask.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.attention_files import HEADS, SCALE, WINDOW, D, feeds_of, file_of
from benchmarks.document import about, head, write
from twofour.bench import peers
from twofour.bench.peers import openvino
from twofour.bench.peers.onnxruntime import reference
from twofour.bench.timing import Contestant, Schedule, race
from twofour.bench.versus import ours
from twofour.compiler.build import build
from twofour.core.errors import Error
from twofour.core.numerics import quantize as quantize_array
from twofour.core.target import detect_host, host_target, why_no_bf16
from twofour.engine import Engine
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize
from twofour.runtime.session import Session
from twofour.train import export_onnx
from twofour.train.networks import transformer
from twofour.train.networks.catalog import write_network
from twofour.train.networks.seeded import seeded

ROOT = Path(__file__).resolve().parent
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
WANTED = 6.0
"""Times as fast at 4096 tokens in float32."""
DENSE_UP_TO = 8192
"""Longest sequence of dense attention: one head's scores take a gigabyte beyond."""
Row = dict[str, Any]


SUBJECTS: dict[str, tuple[str, str]] = {
    "sparse f32": ("sparse", "twofour"),
    "sparse bf16": ("sparse", "twofour bf16"),
    "sparse int8": ("sparse int8", "twofour"),
    "dense f32": ("all", "twofour"),
    "dense bf16": ("all", "twofour bf16"),
    "dense int8": ("all int8", "twofour"),
    "dense f32, as found": ("dense", "twofour"),
    "dense int8, as found": ("dense int8", "twofour"),
    "ONNX Runtime": ("dense", "onnxruntime"),
    "ONNX Runtime, fused": ("fused", "onnxruntime"),
    "OpenVINO f32": ("dense", "openvino f32"),
    "OpenVINO bf16": ("dense", "openvino bf16"),
}
"""Name in tables -> which file, and who runs it."""
RIVALS = {
    "sparse f32": {
        "our dense": ("dense f32", "dense f32, as found"),
        "ONNX Runtime": ("ONNX Runtime", "ONNX Runtime, fused"),
        "OpenVINO": ("OpenVINO f32",),
    },
    "sparse bf16": {"our dense": ("dense bf16",), "OpenVINO": ("OpenVINO bf16",)},
    "sparse int8": {"our dense": ("dense int8", "dense int8, as found")},
}
"""What each is compared with, the fastest form of it."""


def engine_of(path: Path, who: str, folder: Path) -> Path:
    """An engine of a file, in a file."""
    made = folder / f"{path.stem}{'_bf16' * who.endswith('bf16')}.engine"
    if not made.exists():
        build(path, bf16=who.endswith("bf16"), race=False).save(made)
    return made


def contestant(name: str, folder: Path, length: int, feeds: dict[str, np.ndarray]) -> Contestant:
    """A subject, ready to run."""
    kind, who = SUBJECTS[name]
    path = file_of(kind, folder, length)
    who, _, precision = who.partition(" ")
    feeds = stored(name, feeds)
    if who == "twofour":
        made = engine_of(path, precision, folder)
        return ours(Session(Engine.load(made), threads=1), feeds, name)
    if who == "openvino":
        return openvino.prepare(path, feeds, 1, precision)
    return peers.prepare(who, path, feeds, 1)


def stored(name: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs as a subject takes them: bytes where its file does, which may be there already."""
    if not SUBJECTS[name][0].endswith("int8"):
        return feeds
    return {
        x: quantize_array(a, np.float32(SCALE), 0, "int8") if a.dtype.kind == "f" else a
        for x, a in feeds.items()
    }


def subjects_at(length: int) -> list[str]:
    """Those that are measured at a length."""
    names = [n for n in SUBJECTS if n.startswith("sparse") or length <= DENSE_UP_TO]
    return [n for n in names if not (n.endswith("bf16") and why_no_bf16(host_target()))]


def measured(length: int, folder: Path, rounds: int) -> Row:
    """One length: times in turns, memory each in a process of its own, agreement."""
    feeds = feeds_of(length)
    names = subjects_at(length)
    contestants = [contestant(name, folder, length, feeds) for name in names]
    outputs = {n: next(iter(c.outputs().values())) for n, c in zip(names, contestants, strict=True)}
    schedule = Schedule(0.2, min_rounds=rounds)
    timings = race(contestants, schedule)
    times = {n: t.median_us / 1e3 for n, t in zip(names, timings, strict=True)}
    exact = outputs["sparse f32"]
    found: Row = {"length": length, "median_ms": times, "memory_mb": {}}
    found["spread_ms"] = {n: t.spread_us / 1e3 for n, t in zip(names, timings, strict=True)}
    found["error"] = {n: _error(outputs[n], exact) for n in names if n.startswith("sparse")}
    if length <= DENSE_UP_TO:
        dense = outputs["ONNX Runtime"]
        found["error"] |= {n: _error(outputs[n], dense) for n in names if n not in found["error"]}
    found["speed"] = {
        name: {
            rival: min(times[form] for form in forms) / times[name]
            for rival, forms in rivals.items()
            if all(form in times for form in forms)
        }
        for name, rivals in RIVALS.items()
        if name in times
    }
    del contestants
    for name in names:
        found["memory_mb"][name] = memory_of(name, folder, length)
    return found


def _error(got: np.ndarray, exact: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(abs(got - exact).max() / abs(exact).max())


def memory_of(name: str, folder: Path, length: int) -> float:
    """Megabytes that a process grows by."""
    command = [sys.executable, "-m", "benchmarks.sparse_attention"]
    command += ["--child", name, "--lengths", str(length), "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT.parent)
    return float(done.stdout.strip().splitlines()[-1])


def grown_by(run: Callable[[], object]) -> float:
    """Megabytes by which the process's peak rises above what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    held = _status_kb("VmRSS")
    run()
    return max(_status_kb("VmHWM") - held, 0) * 1024 / 1e6


def _status_kb(name: str) -> int:
    """A number of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def child(name: str, folder: Path, length: int) -> None:
    """Opens and runs one subject once; prints what that took."""
    feeds = stored(name, feeds_of(length))
    small = contestant(name, folder, 64, feeds_of(64))  # libraries are loaded by now
    small.call()
    print(grown_by(lambda: contestant(name, folder, length, feeds).call()))


def encoder(folder: Path, rounds: int, length: int) -> Row:
    """The encoder as an engine, and its dense twin on ONNX Runtime and OpenVINO."""
    path = folder / "encoder.onnx"
    write_network("long_bert", path, length, batch=1)
    quantized = integer_file(path, [ids_of(length)], QuantizeOptions())
    feeds = ids_of(length)
    twin = dense_twin(folder)
    found: Row = {"length": length, "median_ms": {}, "memory_mb": {}}
    with Session(build(quantized, race=False), threads=1) as session:
        contestants = [ours(session, feeds)]
        for name in ("onnxruntime", "openvino"):
            try:
                contestants.append(peers.prepare(name, twin, feeds, 1))
            except Error as error:
                found[f"not_{name}"] = error.what
        timings = race(contestants, Schedule(0.2, min_rounds=rounds))
        for each, timing in zip(contestants, timings, strict=True):
            found["median_ms"][each.name] = timing.median_us / 1e3
        outputs = [session.run(feeds), reference(quantized, feeds, 1)]
        a, b = (next(iter(output.values())).ravel() for output in outputs)
        found["cosine"] = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        found["layers"] = len(session.engine.plan.layers)
    return found


def dense_twin(folder: Path) -> Path:
    """The same network with dense attention, 2:4 in INT8 too, attention in float; any length."""
    config = replace(transformer.CONFIGS["long_bert"], window=None, global_tokens=0)
    path = folder / "dense.onnx"
    example = transformer.example_inputs(config, 1, 64)
    names = transformer.INPUT_NAMES, transformer.OUTPUT_NAMES
    model = seeded(partial(transformer.Bert, config))
    export_onnx(model, example, path, *names, ("batch", "length"))
    return integer_file(path, [ids_of(256)], QuantizeOptions(attention=False))


def integer_file(path: Path, data: list[dict[str, np.ndarray]], options: QuantizeOptions) -> Path:
    """A file with 2:4 weights, quantized."""
    pruned, _ = prune(load_model(path))
    return save_model(quantize(pruned, data, options), path.with_suffix(".int8.onnx"))


def ids_of(length: int) -> dict[str, np.ndarray]:
    """Tokens, none of them padding."""
    ids = np.random.default_rng(0).integers(0, 30522, (1, length))
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }


def page(document: Row) -> str:
    """The figures as markdown."""
    rows = document["rows"]
    names = list(SUBJECTS)
    columns = "| tokens | " + " | ".join(names) + " |\n| --: |" + " --: |" * len(names)
    lines = [
        *head(document),
        f"{HEADS} heads of {D}, a window of {WINDOW} tokens on each side; dense attention without a"
        " mask. Medians in milliseconds, in turns.",
        "",
        columns,
        *(_cells(row["length"], row["median_ms"], names, 1) for row in rows),
        "",
        "Peak memory in MB beyond the inputs, each in a process of its own.",
        "",
        columns,
        *(_cells(row["length"], row["memory_mb"], names, 0) for row in rows),
        "",
        "Sparse attention, times as fast as the best dense attention in the same precision.",
        "",
        "| tokens | | our dense | ONNX Runtime | OpenVINO |",
        "| --: | --- | --: | --: | --: |",
    ]
    for row in rows:
        for name, speed in row["speed"].items():
            found = [speed.get(n) for n in ("our dense", "ONNX Runtime", "OpenVINO")]
            cells = ["" if each is None else f"{each:.2f}x" for each in found]
            if any(cells):
                lines.append(f"| {row['length']} | {name} | {' | '.join(cells)} |")
    if "encoder" in document:
        lines += ["", *_encoder_lines(document["encoder"])]
    return "\n".join([*lines, ""])


def _cells(length: int, values: dict[str, float], names: list[str], digits: int) -> str:
    cells = [f"{values[n]:.{digits}f}" if n in values else "" for n in names]
    return f"| {length} | {' | '.join(cells)} |"


def _encoder_lines(found: Row) -> list[str]:
    lines = [
        f"An encoder of 12 layers and {found['length']} tokens, linear layers 2:4 in INT8: medians"
        " in milliseconds, of others with dense attention.",
        "",
        "| | ms |",
        "| --- | --: |",
    ]
    lines += [f"| {name} | {ms:.0f} |" for name, ms in found["median_ms"].items()]
    text = f"Cosine with the meaning of the same file on ONNX Runtime: {found['cosine']:.5f}."
    return [*lines, "", text]


def main(arguments: Sequence[str]) -> int:
    """Returns 1 where sparse attention is not six times as fast at 4096 tokens."""
    parser = argparse.ArgumentParser(description="Sparse attention against dense attention.")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--encoder", action="store_true", help="measure the encoder too")
    parser.add_argument("--encoder-length", type=int, default=4096, help="its tokens")
    parser.add_argument("--output", type=Path, default=ROOT, help="folder for the two files")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    lengths = [int(each) for each in options.lengths.split(",") if each]
    if options.child:
        child(options.child, options.folder, lengths[0])
        return 0
    machine = f"{detect_host().model} ({host_target()}), one thread"
    tools = ("onnxruntime", "openvino")
    title = "Sparse attention by length"
    document: Row = about(title, "sparse_attention", arguments, [machine], tools)
    document["rows"] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for length in lengths:
            row = measured(length, folder, options.rounds)
            document["rows"].append(row)
            write(options.output, "sparse_attention", document, page(document))
            print(json.dumps(row), file=sys.stderr)
        if options.encoder:
            document["encoder"] = encoder(folder, options.rounds, options.encoder_length)
    write(options.output, "sparse_attention", document, page(document))
    print(page(document))
    at_4096 = [row["speed"]["sparse f32"] for row in document["rows"] if row["length"] == 4096]
    slow = [speed for speed in at_4096 if min(speed.values()) < WANTED]
    return 1 if slow else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
