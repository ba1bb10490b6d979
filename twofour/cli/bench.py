"""twofour bench: how fast an engine is, and others on the same model, measured in one run.

One engine: `bench_engine.py` beside this file. With --suite, whole networks: `suite.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twofour.cli.bench_engine import Request, Stored, Wanted, bench_engine
from twofour.cli.options import Inputs, Shapes, Threads, parse_percent, parse_shapes, read_arrays
from twofour.cli.output import Json, Output, Quiet
from twofour.cli.suite import SuiteRequest, bench_suite


def bench(
    source: Annotated[
        Path | None, typer.Argument(help="An .engine file, or an .onnx file to build.")
    ] = None,
    vs: Annotated[str, typer.Option(help="Peers: onnxruntime,openvino,torch.")] = "",
    model: Annotated[
        Path | None,
        typer.Option(help="The peers' ONNX file, if it does not lie beside the engine."),
    ] = None,
    torch: Annotated[Path | None, typer.Option(help="PyTorch's .pt2 program.")] = None,
    threads: Threads = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=1024, help="So many callers at once, not one.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Of an .onnx with open batch.")] = None,
    shapes: Shapes = None,
    inputs: Inputs = None,
    duration: Annotated[float, typer.Option(help="Timed seconds, shared by all.")] = 5.0,
    save: Annotated[Path | None, typer.Option(help="Store the result, as a baseline.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="A stored result; exit code 1 if it is slower now.")
    ] = None,
    max_slowdown: Annotated[str, typer.Option(help="Slower by more is a regression.")] = "3%",
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
    """Measure latency and throughput, beside others if asked for.

    They run the same input, taking turns.

    Example: twofour bench resnet20.engine --vs onnxruntime,openvino
    Example: twofour bench resnet20.engine --concurrency 4 --duration 10
    Example: twofour bench resnet20.engine --save before.json
    Example: twofour bench resnet20.engine --baseline before.json --max-slowdown 3%
    Example: twofour bench --suite cpu --vs onnxruntime,openvino --threads 1
    """
    out = Output(as_json, quiet)
    names = tuple(name.strip() for name in vs.split(",") if name.strip())
    asked = SuiteRequest(suite, only, cache, write, fresh)
    if source is None or suite:
        one = {"model": model, "torch": torch, "batch": batch, "shapes": shapes, "input": inputs}
        more = {"concurrency": concurrency, "save": save, "baseline": baseline}
        asked.refuse_beside(SOURCE=source, **one, **more)
        bench_suite(asked, names, threads or 1, duration, out)
        return
    asked.refuse_without_suite()
    bench_engine(
        source,
        Request(names, model, torch, threads, concurrency or 1, duration),
        Wanted(batch, parse_shapes(shapes), read_arrays(inputs)),
        Stored(save, baseline, parse_percent(max_slowdown)),
        out,
    )
