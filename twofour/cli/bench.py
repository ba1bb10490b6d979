"""twofour bench: an engine's latency, and that of others on the same model, in one run.

With --suite, whole networks instead of one engine: see `suite.py` beside this file.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from twofour.cli.options import Shapes, Threads, is_engine, parse_shapes
from twofour.cli.output import Json, Output, Quiet, printable
from twofour.cli.suite import SuiteRequest, bench_suite

if TYPE_CHECKING:
    from twofour.bench.versus import Difference, Result
    from twofour.engine import Engine, TensorInfo


def bench(
    source: Annotated[
        Path | None, typer.Argument(help="An .engine file, or an .onnx file to build.")
    ] = None,
    vs: Annotated[str, typer.Option(help="Peers: onnxruntime,openvino,torch.")] = "",
    model: Annotated[Path | None, typer.Option(help="The peers' ONNX file.")] = None,
    torch: Annotated[Path | None, typer.Option(help="PyTorch's .pt2 program.")] = None,
    threads: Threads = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Of an .onnx with open batch.")] = None,
    shapes: Shapes = None,
    duration: Annotated[float, typer.Option(help="Timed seconds, shared by all.")] = 5.0,
    suite: Annotated[str, typer.Option(help="Whole networks instead of SOURCE: cpu.")] = "",
    only: Annotated[str, typer.Option(help="Of the suite: rows, with commas between.")] = "",
    cache: Annotated[Path | None, typer.Option(help="Of the suite: its models, engines.")] = None,
    write: Annotated[Path | None, typer.Option(help="Of the suite: folder for its page.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Of the suite: drop the rows its page has.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure latency; peers run the same input with as many threads, taking turns.

    Example: twofour bench resnet20.engine --model resnet20.onnx --vs onnxruntime,openvino
    Example: twofour bench --suite cpu --vs onnxruntime,openvino --threads 1
    """
    from twofour.bench.inputs import random_feeds
    from twofour.bench.timing import Schedule
    from twofour.bench.versus import Match, versus
    from twofour.runtime.session import Session

    out = Output(as_json, quiet)
    schedule = Schedule(duration)
    names = tuple(name.strip() for name in vs.split(",") if name.strip())
    asked = SuiteRequest(suite, only, cache, write, fresh)
    if source is None or suite:
        asked.refuse_beside(SOURCE=source, model=model, torch=torch, batch=batch, shapes=shapes)
        bench_suite(asked, names, threads or 1, duration, out)
        return
    asked.refuse_without_suite()
    if is_engine(source):
        engine = _loaded(source)
        inputs = _inputs(engine, batch, shapes)
    else:
        model = model or source
        engine = _built(source, batch, shapes, threads, out)
        inputs = list(engine.plan.inputs)
    _note_other_source(engine, model, out)
    feeds = random_feeds(inputs)
    with Session(engine, threads) as session:
        match = Match(names, model, torch, session.threads)
        with out.stage("measuring") as report:
            rows, differences = versus(
                session, feeds, match, schedule, lambda done, all_: report(done, all_, "rounds")
            )
    out.show(_table(rows), *_settings(rows), *_agreement(differences))
    out.data(
        "bench/1",
        {
            "inputs": {name: list(array.shape) for name, array in feeds.items()},
            "results": [dataclasses.asdict(row) for row in rows],
            "differences_from_onnxruntime": [dataclasses.asdict(each) for each in differences],
        },
    )


def _inputs(engine: Engine, batch: int | None, shapes: list[str] | None) -> list[TensorInfo]:
    """The engine's inputs at the shapes asked for, else at the usual ones of its first profile."""
    from twofour.core.errors import InputError
    from twofour.runtime.shapes import bind

    given = parse_shapes(shapes)
    if unknown := set(given) - {info.name for info in engine.plan.inputs}:
        names = ", ".join(info.name for info in engine.plan.inputs)
        raise InputError(f"no input {min(unknown)!r}", [f"the engine has {names}"])
    wanted = {info.name: info.usual_shape for info in engine.plan.inputs}
    if batch is not None:
        wanted = {name: (batch, *shape[1:]) for name, shape in wanted.items()}
    wanted |= given
    bind(engine.plan, wanted)
    inputs = engine.plan.inputs
    return [dataclasses.replace(info, shape=wanted[info.name], sizes=()) for info in inputs]


def _loaded(source: Path) -> Engine:
    from twofour.engine import Engine

    return Engine.load(source)


def _built(
    source: Path, batch: int | None, shapes: list[str] | None, threads: int | None, out: Output
) -> Engine:
    from twofour.bench.inputs import model_inputs, static_inputs
    from twofour.compiler.build import build

    inputs = static_inputs(model_inputs(source), parse_shapes(shapes), batch)
    static = {each.name: each.shape for each in inputs}
    with out.stage("building") as report:
        return build(source, progress=report, shapes=static, threads=threads or 1)


def _note_other_source(engine: Engine, model: Path | None, out: Output) -> None:
    """Says so when the peers run another file than the engine was built from: it may be wanted."""
    if model is None or not model.is_file() or not engine.plan.source_sha256:
        return
    if hashlib.sha256(model.read_bytes()).hexdigest() != engine.plan.source_sha256:
        built_from = engine.plan.source_name or "another model"
        out.note(f"note: the engine was built from {built_from}, the peers run {model}")


def _table(rows: list[Result]) -> Table:
    table = Table(
        caption="us for one call. ±: distance between the quartiles of the rounds' medians. "
        "ours is: how many times as fast, median of the rounds (quartiles).",
        caption_justify="left",
    )
    table.add_column("runs on")
    for header in ("median", "±", "p90", "min", "calls", "ours is"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        timing, ratio = row.timing, row.ours_is
        table.add_row(
            f"{row.name} {row.version}",
            f"{timing.median_us:.1f}",
            f"{timing.spread_us:.1f}",
            f"{timing.p90_us:.1f}",
            f"{timing.min_us:.1f}",
            str(timing.calls),
            f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else "",
        )
    return table


def _settings(rows: list[Result]) -> list[str]:
    return [f"{row.name}: {row.setting}" for row in rows]


def _agreement(differences: list[Difference]) -> list[str]:
    return [
        f"output {printable(each.name)} against ONNX Runtime: cosine {each.cosine:.6f}, largest "
        f"difference {each.max_abs:.3g} of values up to {each.reference_max_abs:.3g}"
        for each in differences
    ]
