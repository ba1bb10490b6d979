"""What twofour bench says of one engine: tables for people, a document for programs and later."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from twofour.cli.output import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from twofour.bench.regression import Judgement
    from twofour.bench.versus import Match, Outcome, Result
    from twofour.engine import Engine

_WIDE, _LONG_US = 98, 20_000.0


def document_of(
    engine: Engine, feeds: Mapping[str, NDArray[Any]], match: Match, outcome: Outcome
) -> dict[str, Any]:
    """A run as plain data: what --json prints, --save stores, and --baseline reads."""
    return {
        **circumstances(engine, feeds, match),
        "results": [dataclasses.asdict(row) for row in outcome.rows],
        "differences_from_onnxruntime": [dataclasses.asdict(each) for each in outcome.differences],
        "gauge": {
            "sha256": outcome.gauge_sha256,
            "round_medians_us": list(outcome.gauge.round_medians_us),
        },
        "energy": _energy(outcome),
        "memory": None,
        "baseline": None,
    }


def _energy(outcome: Outcome) -> dict[str, Any] | None:
    """Of each contestant, or why there is none."""
    from twofour.bench.energy import Unavailable

    if outcome.energy is None:
        return None
    if isinstance(outcome.energy, Unavailable):
        return {"unavailable": str(outcome.energy), "contestants": []}
    pairs = zip(outcome.rows, outcome.energy, strict=True)
    rows = [{"name": row.name, **dataclasses.asdict(each)} for row, each in pairs]
    return {"unavailable": "", "contestants": rows}


def memory_data(engine: Engine, feeds: Mapping[str, NDArray[Any]], threads: int) -> dict[str, Any]:
    """Peak memory of a process that loads and runs the engine, or why it is not known."""
    from twofour.bench.memory import peak_memory
    from twofour.core.errors import UnsupportedError

    with tempfile.TemporaryDirectory() as folder:
        path = engine.save(Path(folder) / "measured.engine")
        try:
            found = peak_memory(path, feeds, threads)
        except UnsupportedError as e:
            return {"unavailable": " ".join(e.reasons), "peak_bytes": None, "before_bytes": None}
    return {"unavailable": "", **dataclasses.asdict(found)}


def consumption(document: Mapping[str, Any]) -> list[str]:
    """Memory and energy in words."""
    memory, energy = document["memory"], document["energy"]
    lines = []
    if memory and memory["unavailable"]:
        lines.append(f"peak resident memory unavailable: {memory['unavailable']}")
    elif memory:
        peak, before = (memory[key] / 1e6 for key in ("peak_bytes", "before_bytes"))
        lines.append(
            f"peak resident memory of a process that only runs the engine: {peak:.1f} MB, "
            f"{before:.1f} MB of it Python and the runtime"
        )
    if energy and energy["unavailable"]:
        lines.append(f"energy {energy['unavailable']}")
    elif energy:
        rows = energy["contestants"]
        each = ", ".join(f"{row['name']} {_joules(row['joules'])}" for row in rows)
        lines.append(f"energy of one call ({rows[0]['source']}, all that it consumes): {each}")
    return lines


def _joules(joules: float) -> str:
    for unit, scale in (("J", 1.0), ("mJ", 1e3)):
        if joules * scale >= 1:
            return f"{joules * scale:.3g} {unit}"
    return f"{joules * 1e6:.3g} uJ"


def circumstances(
    engine: Engine, feeds: Mapping[str, NDArray[Any]], match: Match
) -> dict[str, Any]:
    """What is known before anything is measured."""
    from twofour.core.target import detect_host, host_target
    from twofour.core.version import __version__

    host, plan = detect_host(), engine.plan
    return {
        "version": __version__,
        "machine": {
            "cpu": host.model,
            "arch": host.arch,
            "cores": host.cores,
            "target": str(host_target()),
        },
        "engine": {
            "model": plan.source_name,
            "source_sha256": plan.source_sha256,
            "target": str(plan.target),
            "threads": plan.threads,
            "version": plan.version,
        },
        "inputs": {name: list(array.shape) for name, array in feeds.items()},
        "samples": _samples(feeds),
        "threads": match.threads,
        "concurrency": match.callers,
    }


def _samples(feeds: Mapping[str, NDArray[Any]]) -> int:
    """Of one call: the size of the first axis, if all inputs agree on it, else 1."""
    sizes = {array.shape[0] if array.ndim else 1 for array in feeds.values()}
    return sizes.pop() if len(sizes) == 1 else 1


def results(outcome: Outcome, document: Mapping[str, Any], width: int) -> list[Table | str]:
    """The table, who was set up how, and how far the outputs lie from ONNX Runtime's."""
    samples, callers = document["samples"], document["concurrency"]
    inputs = ", ".join(
        f"{name} {'x'.join(map(str, shape))}" for name, shape in (document["inputs"].items())
    )
    load = f", {callers} callers at once" if callers > 1 else ""
    return [
        f"input {inputs}; threads {document['threads']}{load}",
        _table(outcome.rows, samples, width),
        *(f"{row.name}: {row.setting}" for row in outcome.rows),
        *(
            f"output {each.name} against ONNX Runtime: cosine {each.cosine:.6f}, largest "
            f"difference {each.max_abs:.3g} of values up to {each.reference_max_abs:.3g}"
            for each in outcome.differences
        ),
    ]


def _table(rows: list[Result], samples: int, width: int) -> Table:
    """A narrow terminal shows fewer columns, never broken numbers."""
    wide = width >= _WIDE
    slow = max(row.timing.median_us for row in rows) >= _LONG_US
    unit, scale = ("ms", 1e-3) if slow else ("us", 1.0)
    caption = (
        f"{unit} for one call; ±: distance between the quartiles of the rounds' medians; CPU: what "
        "all threads of this process compute for it. /s: "
        + (f"samples a second, {samples} in a call." if samples > 1 else "calls a second.")
    )
    if len(rows) > 1:
        caption += " ours is: how many times as fast, median and quartiles of the rounds."
    table = Table(caption=caption, caption_justify="left")
    table.add_column("runs on", overflow="fold")
    several = len(rows) > 1
    shown = ["median", "±", *(["p90"] if wide else []), "p99", *(["min"] if wide else []), "CPU"]
    for header in (*shown, "/s", *(["ours is"] if several else [])):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        timing, ratio = row.timing, row.ours_is
        cells = {
            "median": timing.median_us,
            "±": timing.spread_us,
            "p90": timing.p90_us,
            "p99": timing.p99_us,
            "min": timing.min_us,
            "CPU": timing.cpu_us,
        }
        versus = f"{times(ratio.median)} ({times(ratio.low)}-{times(ratio.high)})" if ratio else ""
        table.add_row(
            printable(f"{row.name} {row.version}"),
            *(number(scale * cells[header]) for header in shown),
            number(samples * timing.per_second),
            *([versus] if several else []),
        )
    return table


def times(ratio: float) -> str:
    """Three digits are enough."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def number(value: float) -> str:
    """Four digits are enough."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def verdict_data(judged: Judgement, allowed: float, path: str, doubts: list[str]) -> dict[str, Any]:
    """The comparison with a baseline as plain data."""
    from twofour.bench.regression import CONFIDENCE

    found = judged.slowdown
    clock = f"this machine's gauge took {found.gauge:.2f} times as long as then"
    doubts = [*doubts, *([clock] if abs(found.gauge - 1) > 0.1 else [])]
    return {
        "file": path,
        "verdict": judged.verdict,
        "slowdown": found.ratio,
        "low": found.low,
        "high": found.high,
        "confidence": CONFIDENCE,
        "max_slowdown": allowed,
        "gauge": found.gauge,
        "runs": judged.runs,
        "doubts": doubts,
    }


def verdict_lines(comparison: Mapping[str, Any]) -> list[str]:
    """The comparison in words."""
    ratio, low, high = (comparison[key] for key in ("slowdown", "low", "high"))
    allowed, runs = comparison["max_slowdown"], comparison["runs"]
    conclusions = {
        "regression": f"a regression: more than {allowed:.1%} slower in each of {runs} runs",
        "no regression": f"no regression of more than {allowed:.1%}",
        "undecided": f"undecided whether it is more than {allowed:.1%}: measure longer, --duration",
    }
    again = f", in run {runs} (those before looked like one)" if runs > 1 else ""
    return [
        f"against {comparison['file']}: {ratio:.3f} times the time, with "
        f"{comparison['confidence']:.0%} confidence above {low:.3f}, and below {high:.3f}"
        f"{'' if comparison['verdict'] == 'regression' else again}",
        f"  the machine's own speed is taken out: its gauge took {comparison['gauge']:.3f} times "
        "the time",
        f"  {conclusions[comparison['verdict']]}",
        *(f"  doubt: {doubt}" for doubt in comparison["doubts"]),
    ]


def write_document(schema: str, document: Mapping[str, Any], path: Path) -> None:
    """Stores a run, under a temporary name first.

    Raises:
        InputError: the file cannot be written.
    """
    from twofour.core.errors import InputError

    temporary = path.with_name(f"{path.name}.part")
    try:
        text = json.dumps({"schema": f"twofour.{schema}", **document}, indent=2)
        temporary.write_text(f"{text}\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}", [str(e)], "name a writable folder") from e
