"""The table: every network on every engine, its top-1, its latency in one race, its size."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cifar10.compress import THREADS
from cifar10.data import load_model
from cifar10.settings import DENSE, Network, Settings
from twofour.bench import peers
from twofour.bench.table import Row
from twofour.bench.timing import Schedule
from twofour.cli.output import Output
from twofour.demo.side_by_side import (
    Entry,
    Samples,
    engine_entry,
    measure,
    onnxruntime_entry,
    torch_entry,
)
from twofour.evaluate.accuracy import Limits, Verdict, gate

REFERENCE, FLOAT_BASELINE = "PyTorch f32", "ONNX Runtime f32"
INT8_BASELINES = ("ONNX Runtime INT8, same file", "ONNX Runtime INT8, its best")
LIMITS = Limits(max_drop_points=0.5, min_speedup=1.0)
SHORT_RACE = Schedule(duration_s=0.1, slice_s=0.002, pause_s=0.001, warm_s=0.001)
PRECISIONS = {"f32": "float32", "int8": "int8"}


def measure_stage(settings: Settings, samples: Samples, out: Output) -> list[Row]:
    """Accuracy on all test images, then the latency of all in one race."""
    entries = reference_entries(settings, samples)
    entries += openvino_entries(settings.network(settings.patterns[0]), samples, out)
    for name in (DENSE, *settings.patterns):
        entries += engine_entries(settings.network(name), samples)
    schedule = SHORT_RACE if settings.short else Schedule(settings.duration_s)
    return measure(entries, samples, out.stage, schedule)


def reference_entries(settings: Settings, samples: Samples) -> list[Entry]:
    """PyTorch and ONNX Runtime, the latter on every file it might like best."""
    dense, sparse = settings.network(DENSE), settings.network(settings.patterns[0])
    model = load_model(settings.depth)
    runs = [
        (FLOAT_BASELINE, dense, "f32"),
        (f"{FLOAT_BASELINE}, {sparse.name}", sparse, "f32"),
        (INT8_BASELINES[0], sparse, "int8"),
        (INT8_BASELINES[1], sparse, "uint8"),
    ]
    return [
        torch_entry(REFERENCE, "dense float32", model, samples, THREADS),
        *(
            onnxruntime_entry(name, weights(network, kind), network.onnx(kind), samples, THREADS)
            for name, network, kind in runs
        ),
    ]


def openvino_entries(network: Network, samples: Samples, out: Output) -> list[Entry]:
    """OpenVINO on both INT8 files; nothing, said aloud, where it is not installed."""
    if importlib.util.find_spec("openvino") is None:
        out.note("not measured: OpenVINO, which is not installed (pip install 'twofour[bench]')")
        return []
    files = {"OpenVINO INT8, same file": "int8", "OpenVINO INT8, uint8 file": "uint8"}
    return [_openvino_entry(name, network, kind, samples) for name, kind in files.items()]


def engine_entries(network: Network, samples: Samples) -> list[Entry]:
    """Our engines of one network."""
    return [
        engine_entry(
            engine_name(network.name, kind),
            weights(network, kind),
            network.engine(kind),
            samples,
            THREADS,
        )
        for kind in PRECISIONS
    ]


def engine_name(network: str, kind: str) -> str:
    """As the table shows it."""
    return f"twofour {network} {kind.upper() if kind == 'int8' else kind}"


def weights(network: Network, kind: str) -> str:
    """What runs, in words: "2:4 int8"; activations named where they have another type."""
    return f"{network.name} {'int8, uint8 activations' if kind == 'uint8' else PRECISIONS[kind]}"


def fastest(rows: Sequence[Row], names: Sequence[str]) -> Row:
    """The row with the lowest median among those of these names."""
    timed = [(row.timing.median_us, row) for row in rows if row.name in names and row.timing]
    return min(timed, key=lambda pair: pair[0])[1]


def judge(rows: Sequence[Row], patterns: Sequence[str]) -> dict[str, Verdict]:
    """The gate on our sparse engines, by name.

    In accuracy against the published network in PyTorch, in speed against ONNX Runtime: f32 on the
    dense network, INT8 on the faster of its two files.
    """
    named = {row.name: row for row in rows}
    baselines = {"f32": named[FLOAT_BASELINE], "int8": fastest(rows, INT8_BASELINES)}
    verdicts = {}
    for pattern in patterns:
        for kind, baseline in baselines.items():
            row = named[engine_name(pattern, kind)]
            verdicts[row.name] = _verdict(named[REFERENCE], baseline, row)
    return verdicts


def _verdict(reference: Row, baseline: Row, row: Row) -> Verdict:
    if reference.top1 is None or row.top1 is None:
        raise ValueError("the gate needs both accuracies")
    if baseline.timing is None or row.timing is None:
        raise ValueError("the gate needs both times")
    times = baseline.timing.median_us, row.timing.median_us
    return gate(reference.top1, row.top1, *times, LIMITS)


def _openvino_entry(name: str, network: Network, kind: str, samples: Samples) -> Entry:
    """The timed request itself predicts: its input tensor is shared with ours."""
    path = network.onnx(kind)
    feeds = {samples.name: samples.first()[samples.name].copy()}
    runner = peers.prepare("openvino", path, feeds, THREADS)

    def predict(x: NDArray[np.float32]) -> NDArray[np.float32]:
        feeds[samples.name][...] = x
        (scores,) = runner.outputs().values()
        return scores.copy()

    return Entry(name, weights(network, kind), path.stat().st_size, predict, 1, runner)
