"""The engines of a row: built once, kept in the cache, and described by their plans."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofour.bench.declared import static_inputs
from twofour.bench.inputs import model_inputs
from twofour.bench.suite.cache import ENGINE_CODE, code_sha256, file_sha256, once
from twofour.bench.suite.entries import Entry
from twofour.bench.suite.files import Files
from twofour.bench.suite.rows import SuiteOptions, SuiteRow
from twofour.compiler.build import build
from twofour.compiler.explain import FALLBACK
from twofour.compiler.peak import Peaks, ideal_us
from twofour.core.progress import Report
from twofour.core.target import host_target
from twofour.engine import Engine, Plan


@dataclass(frozen=True)
class Built:
    """An engine in the cache.

    Attributes:
        path: its file.
        kind: of the ONNX file it was built from.
        build_s: how long building took.
        timings_kept: whether the timing cache of an earlier build of this engine was used.
    """

    path: Path
    kind: str
    build_s: float
    timings_kept: bool


def build_engine(
    row: SuiteRow, entry: Entry, files: Files, options: SuiteOptions, report: Report
) -> Built:
    """Builds an engine for a row, unless it is there.

    Args:
        row: gives the batch size.
        entry: one of ours: the ONNX file and the precision.
        files: of the row's network.
        options: `threads` and `cache` count here.
        report: told about each layer.

    Raises:
        InputError: the model is not usable.
        UnsupportedError: the model cannot be compiled.
    """
    kind, bf16 = entry.kind, entry.precision == "bf16"
    model = files.path(kind)
    stem = f"{kind}-bf16" if bf16 else kind
    threads = 1 if entry.alone else options.threads
    path = options.cache / row.name / f"{stem}-threads{threads}.engine"
    shapes = {t.name: t.shape for t in static_inputs(model_inputs(model), {}, row.batch)}
    origin = {
        "model": file_sha256(model),
        "batch": row.batch,
        "threads": threads,
        "target": host_target().to_json(),
        "code": code_sha256(ENGINE_CODE),
    }

    timings = path.with_suffix(".timings.json")

    def make() -> dict[str, float]:
        kept, started = timings.is_file(), time.monotonic()
        engine = build(
            model,
            progress=report,
            shapes=shapes,
            bf16=bf16,
            threads=threads,
            timing_cache=timings,
            race=False,  # ONNX Runtime has rows of its own
        )
        taken = time.monotonic() - started
        engine.save(path)
        return {"build_s": taken, "timings_kept": kept}

    record = once(path, origin, make)
    return Built(path, kind, float(record["build_s"]), bool(record["timings_kept"]))


def described(built: Built, engine: Engine, median_us: float, peaks: Peaks) -> dict[str, Any]:
    """What a row says about one of our engines: plain data.

    Args:
        built: where it comes from.
        engine: as loaded.
        median_us: of its runs.
        peaks: of this machine, for as many threads as it was timed with.

    Returns:
        Operators in the file and after fusion, steps (kernels and fallback operators), waves (how
        often the threads of native programs meet), calls of native programs, fallback steps and the
        operators in them, bytes, build time, and `roofline_share`: the time that its multiply-adds
        would take at the peak of the tactic that does them, over the time of a whole run.
    """
    plan = engine.plan
    ideal = ideal_us(plan.layers, peaks)
    return {
        "model": f"{built.kind}.onnx",
        **_counts(plan),
        "arena_bytes": plan.arena_bytes,
        "weight_bytes": engine.weights.nbytes,
        "size_bytes": engine.size_bytes,
        "build_s": built.build_s,
        "timings_kept": built.timings_kept,
        "macs": sum(layer.macs for layer in plan.layers),
        "gops": 2e-3 * sum(layer.macs for layer in plan.layers) / median_us,
        "ideal_us": ideal,
        "roofline_share": ideal / median_us,
    }


def _counts(plan: Plan) -> dict[str, int]:
    kinds = [step.kind for step in plan.steps]
    return {
        "operators": plan.graph.get("operators", 0),
        "fused": plan.graph.get("fused", 0),
        "steps": len(plan.layers),
        "waves": plan.graph.get("waves", 0),
        "native_calls": kinds.count("native"),
        "fallback_steps": kinds.count("onnxruntime"),
        "fallback_operators": sum(layer.tactic == FALLBACK for layer in plan.layers),
    }
