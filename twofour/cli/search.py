"""twofour search: for each layer what to prune it to and what it computes in."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from twofour.cli.forecast import Precision
from twofour.cli.options import (
    Shapes,
    Threads,
    parse_shapes,
    require_packages,
    require_writable,
)
from twofour.cli.output import Json, Output, Quiet, by_reason, printable, short
from twofour.cli.prune import Method
from twofour.cli.quantize_options import Recipe
from twofour.cli.spread import OnRay, RayAddress, spread_of

if TYPE_CHECKING:
    from twofour.search.final import Unseen
    from twofour.search.options import SearchOptions
    from twofour.search.points import Point
    from twofour.search.results import Found

_UNITS_US = {"us": 1.0, "ms": 1e3, "s": 1e6}
_METRIC = 16


def search(
    model: Annotated[Path, typer.Argument(help="A float ONNX file.")],
    data: Annotated[
        str, typer.Option(help="Samples and labels: .npz, folder of .npy, module:function.")
    ],
    max_drop: Annotated[
        float | None,
        typer.Option(help="The fastest network whose metric falls by at most so much."),
    ] = None,
    max_latency: Annotated[
        str | None,
        typer.Option(
            "--max-latency", metavar="TIME", help="The best network within it: 250us, 1.5ms."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The recipe of twofour pipeline to write (YAML)."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="The HTML page to write.")] = None,
    metric: Annotated[
        str, typer.Option(help="As of twofour compare: top1, loss, f1, ... or module:function.")
    ] = "top1",
    metric_output: Annotated[
        str | None, typer.Option(help="The output that the metric reads; by default the first.")
    ] = None,
    calibration_data: Annotated[
        str | None,
        typer.Option(help="For pruning and calibrating; by default --data, better another."),
    ] = None,
    precision: Annotated[
        list[Precision] | None,
        typer.Option(help="To choose from, beside f32; repeatable. By default all."),
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="To choose from, beside dense: 2:4, 2:4/pair, 4:8; repeatable."),
    ] = None,
    prune_method: Annotated[Method, typer.Option(help="How weights are chosen.")] = (
        Method.sparsegpt
    ),
    recipe: Annotated[Recipe, typer.Option(help="Of quantization.")] = Recipe.balanced,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Engines are judged on the first so many.")
    ] = None,
    scan_samples: Annotated[
        int, typer.Option(min=1, help="Of these, for each layer alone; few are enough.")
    ] = 256,
    prune_samples: Annotated[int, typer.Option(min=1, help="That pruning reads at most.")] = 512,
    calibration_samples: Annotated[
        int, typer.Option(min=1, help="For the ranges of INT8, anew for each engine.")
    ] = 128,
    evaluations: Annotated[
        int, typer.Option(min=6, help="Engines built, run and judged at most.")
    ] = 24,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that judge each layer alone; with --ray: workers."),
    ] = None,
    ray: OnRay = False,
    ray_address: RayAddress = None,
    shapes: Shapes = None,
    threads: Threads = None,
    tuning_effort: Annotated[int, typer.Option(min=1, max=3, help="As of twofour build.")] = 2,
    cache: Annotated[
        Path | None, typer.Option(help="File that keeps all that was found: a search goes on.")
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="File with measured times; by default beside --cache."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose for each layer what to prune to and compute in.

    There are dense, 2:4, 2:4/pair and 4:8 weights, in float32, bfloat16 and INT8.
    Within a drop of the metric the fastest network, or within a latency the best one: layer times
    and what each change costs are measured, networks are built, run and judged.

    Example: twofour search resnet56.onnx --data test.npz --max-drop 1.0 -o recipe.yaml
    Example: twofour search bert.onnx --data dev.npz --metric sts:score --max-latency 4ms --cache s
    """
    from twofour.compiler.forms import PRECISIONS
    from twofour.onnx_tools.options import QuantizeOptions
    from twofour.search.apply import ApplyOptions
    from twofour.search.options import PATTERNS, SearchOptions
    from twofour.search.recipe import fields_of, write_recipe
    from twofour.search.results import document
    from twofour.search.search import Search

    out = Output(as_json, quiet)
    require_packages("twofour search", ["scipy", "yaml"], "search")
    _require_outputs(output, report)
    options = SearchOptions(
        max_drop=max_drop,
        max_latency_us=None if max_latency is None else parse_time_us(max_latency),
        metric=metric,
        output=metric_output,
        samples=samples,
        scan_samples=scan_samples,
        calibrate=calibration_data,
        apply=ApplyOptions(
            prune_method.value,
            prune_samples,
            quantize=QuantizeOptions(recipe=recipe.value, samples=calibration_samples),
        ),
        precisions=tuple(each.value for each in precision) if precision else PRECISIONS,
        patterns=tuple(pattern) if pattern else PATTERNS,
        shapes=parse_shapes(shapes),
        threads=threads or 1,
        tuning_effort=tuning_effort,
        evaluations=evaluations,
        cache=cache,
        timing_cache=timing_cache,
    )
    with spread_of(ray, ray_address, jobs, out) as spread:
        options = replace(options, spread=spread)
        with out.stage("checking"):
            looking = Search(model, data, options)
        found = looking.run(out.stage)
    everything = document(found)
    out.show(*_parts(found))
    if report is not None:
        from twofour.report.search import write_search

        write_search(everything, report)
        out.show(f"written: {report}")
    if output is not None and found.best is not None:
        write_recipe(fields_of(found, options, model, data, output.parent), found, output)
        out.show(f"written: {output}", f"make it:  twofour pipeline {output}")
    out.data("search/1", everything)
    if found.best is None:
        out.fail(_missed(found, options))


def parse_time_us(text: str) -> float:
    """250us, 1.5ms or 0.2s -> microseconds.

    Raises:
        InputError: not of this form, or no time.
    """
    from twofour.core.errors import InputError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|ms|s)", text)
    if match is None or float(match[1]) <= 0:
        raise InputError(
            f"bad time {text!r}", ["expected a number above 0, and us, ms or s"], "try 250us"
        )
    return float(match[1]) * _UNITS_US[match[2]]


def _require_outputs(output: Path | None, report: Path | None) -> None:
    if report is not None:
        require_packages("an HTML page", ["jinja2"], "report")
    for path in (output, report):
        if path is not None:
            require_writable(path)


def _missed(found: Found, options: SearchOptions) -> str:
    """Why there is no answer."""
    known = [point for point in found.points if point.drop is not None]
    if options.max_drop is None:
        least = min(point.latency_us for point in found.points)
        return f"no engine takes at most {options.max_latency_us:g} us; the fastest {least:.1f} us"
    least = min((p.drop for p in known if p.drop is not None), default=float("nan"))
    return f"no engine loses at most {options.max_drop:g}; the best one {least:.3g}"


def _parts(found: Found) -> list[Table | str]:
    """All that is printed."""
    less = "" if found.higher_is_better else " (less is better)"
    unit = f" {found.unit}" if found.unit else ""
    head = (
        f"{found.model}, {found.samples} samples: {found.metric}{less} {found.dense:.4g}{unit}, "
        f"{found.threads} thread{'s' * (found.threads > 1)} on {found.cpu}"
    )
    parts: list[Table | str] = [head, _points(found)]
    if found.best is not None:
        if found.unseen is not None:
            parts.append(_unseen(found, found.unseen))
        by_choice = [(text, name) for name, text in found.layers(found.best).items()]
        parts.append(f"the answer: {_words(found, found.best)}")
        parts += by_reason("layers", sorted(by_choice))
    return [*parts, *(f"note: {text}" for text in found.notes)]


def _words(found: Found, point: Point) -> str:
    unit = f" {found.unit}" if found.unit else ""
    return (
        f"{point.latency_us:.1f} us, {point.speed[0]:.2f}x float32, {found.metric} "
        f"{_figure(point.figure)}{unit}, drop {_drop(point)}"
    )


def _unseen(found: Found, last: Unseen) -> str:
    """The answer on other samples."""
    return (
        f"on {last.samples} samples that the search did not use: {found.metric} "
        f"{_figure(last.figure)} (float32 {_figure(last.dense)}), drop {_drop(last)}"
    )


def _points(found: Found) -> Table:
    """The front, what people do without a search, and the answer."""
    table = Table(
        title="engines that were built, run and judged: the front, and where all layers are alike",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        caption="*: on the front; >: the answer; \u00b1: standard error of the drop",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for head in ("us", "vs f32", "vs INT8", short(found.metric.rpartition(":")[2], _METRIC)):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("drop", justify="right", no_wrap=True)
    table.add_column("layers", overflow="fold")
    front, best = found.front, found.best
    shown = [p for p in found.points if p in front or p is best or "everything" in p.name]
    int8 = found.everything_int8
    for point in sorted(shown, key=lambda p: p.latency_us):
        table.add_row(
            (">" if point is best else "") + ("*" if point in front else ""),
            f"{point.latency_us:.1f}",
            f"{point.speed[0]:.2f}x",
            "" if int8 is None else f"{int8.latency_us / point.latency_us:.2f}x",
            _figure(point.figure),
            _drop(point),
            printable(_counts(found.counts(point))),
        )
    return table


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {text}" for text, count in counts.items())


def _figure(figure: float | None) -> str:
    return "no number" if figure is None else f"{figure:.4g}"


def _drop(point: Point | Unseen) -> str:
    if point.drop is None:
        return "?"
    error = "" if point.drop_error is None else f" \u00b1{point.drop_error:.2g}"
    return f"{point.drop:+.3g}{error}"
