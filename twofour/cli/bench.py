"""twofour bench: how fast an engine is, and others on the same model, measured in one run.

One engine: `bench_engine.py` beside this file. With --suite, whole networks: `suite.py`. With
--url, servers: `bench_url.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twofour.cli.bench_engine import Request, Stored, Wanted, bench_engine
from twofour.cli.bench_url import Common, UrlRequest, bench_url
from twofour.cli.options import Inputs, Shapes, Threads, parse_percent, parse_shapes, read_arrays
from twofour.cli.output import Json, Output, Quiet
from twofour.cli.suite import SuiteRequest, bench_suite


def bench(
    source: Annotated[
        Path | None, typer.Argument(help="An .engine file, or an .onnx file to build.")
    ] = None,
    vs: Annotated[str, typer.Option(help="Peers: onnxruntime,openvino,torch.")] = "",
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="The peers' ONNX file, if it does not lie beside the engine; of a server the "
            "model's name, or NAME:VERSION."
        ),
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
    url: Annotated[
        list[str] | None,
        typer.Option(help="A server instead of SOURCE: http, https, grpc or grpcs://HOST:PORT."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Of a server: requests a second, answered or not.")
    ] = None,
    arrivals: Annotated[
        str | None, typer.Option(help="With --rate: poisson, constant; or a file of seconds.")
    ] = None,
    tensors: Annotated[str | None, typer.Option(help="Of HTTP: binary, or json.")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Of a server: sizes of open axes, 8-128 or a file.")
    ] = None,
    warm_up: Annotated[float | None, typer.Option(help="Of a server: seconds before.")] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Of a server: seconds until a request has failed.")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option(help="Of a server: 'NAME: VALUE', with every request.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of a server: of arrivals and data.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure latency and throughput, beside others if asked for.

    They run the same input, taking turns.

    Example: twofour bench resnet20.engine --vs onnxruntime,openvino
    Example: twofour bench resnet20.engine --concurrency 4 --duration 10
    Example: twofour bench resnet20.engine --save before.json
    Example: twofour bench resnet20.engine --baseline before.json --max-slowdown 3%
    Example: twofour bench --url http://127.0.0.1:8000 --model resnet20 --concurrency 32
    Example: twofour bench --url grpc://127.0.0.1:8001 --model resnet20 --rate 500
    Example: twofour bench --suite cpu --vs onnxruntime,openvino --threads 1
    """
    out = Output(as_json, quiet)
    names = tuple(name.strip() for name in vs.split(",") if name.strip())
    asked = SuiteRequest(suite, only, cache, write, fresh)
    served = UrlRequest(
        *(url or (), rate, arrivals, tensors, lengths, warm_up, timeout, header or (), seed)
    )
    if url:
        engines = {"SOURCE": source, "--vs": vs, "--torch": torch, "--threads": threads}
        suites = {"--suite": suite, "--only": only, "--cache": cache, "--write": write}
        served.refuse_beside(**engines, **suites, **{"--fresh": fresh, "--baseline": baseline})
        common = (model or (), concurrency, duration, batch, shapes, inputs, save)
        bench_url(served, Common(*common), out)
        return
    served.refuse_without_url()
    if source is None or suite:
        one = {"model": model, "torch": torch, "batch": batch, "shapes": shapes, "input": inputs}
        more = {"concurrency": concurrency, "save": save, "baseline": baseline}
        asked.refuse_beside(SOURCE=source, **one, **more)
        bench_suite(asked, names, threads or 1, duration, out)
        return
    asked.refuse_without_suite()
    bench_engine(
        source,
        Request(names, _only_path(model), torch, threads, concurrency or 1, duration),
        Wanted(batch, parse_shapes(shapes), read_arrays(inputs)),
        Stored(save, baseline, parse_percent(max_slowdown)),
        out,
    )


def _only_path(models: list[str] | None) -> Path | None:
    """The peers' ONNX file.

    Raises:
        InputError: there are several.
    """
    from twofour.core.errors import InputError

    if models and len(models) > 1:
        given = ", ".join(models)
        raise InputError("several --model", [f"expected one ONNX file, got {given}"], "give one")
    return Path(models[0]) if models else None
