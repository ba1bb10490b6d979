"""twofour sensitivity: what pruning each layer alone costs, beside what it gains."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from twofour.cli.forecast import Precision
from twofour.cli.options import Shapes, parse_shapes, require_packages, require_writable
from twofour.cli.output import Json, Output, Quiet, by_reason, printable, short
from twofour.cli.spread import OnRay, RayAddress, spread_of

if TYPE_CHECKING:
    from twofour.core.sensitivity import Case, Sensitivity, Together, Tradeoff
    from twofour.predict.gains import Gains

_NAME, _METRIC = 40, 16
_SHARES = (0.5, 0.75, 0.9, 0.95, 1.0)
_ADVISED = 0.9
_MANY_PARAMETERS, _MANY_LAYERS = 2_000_000, 60


def sensitivity(
    model: Annotated[Path, typer.Argument(help="An ONNX file.")],
    data: Annotated[
        str, typer.Option(help="Samples and labels: .npz, folder of .npy, module:function.")
    ],
    metric: Annotated[
        str, typer.Option(help="As of twofour compare: top1, loss, f1, ... or module:function.")
    ] = "top1",
    metric_output: Annotated[
        str | None, typer.Option(help="The output that the metric reads; by default the first.")
    ] = None,
    pattern: Annotated[
        list[str] | None, typer.Option(help="Such as 2:4 (the default), 2:4/pair; repeatable.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Shell pattern of names not to try; repeatable.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="The first so many only.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes, each with a model; with --ray: workers."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="File that keeps results: a scan goes on where it ended.")
    ] = None,
    ray: OnRay = False,
    ray_address: RayAddress = None,
    forecast: Annotated[
        str | None,
        typer.Option(
            "--forecast",
            metavar="FILE|measure|none",
            help="Gains: of twofour forecast --json, or measured now. By default measured if the "
            "model is small.",
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="Gains in it: by default the forecast's fastest; int8 if measured."),
    ] = None,
    shapes: Shapes = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The HTML page to write.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="The PNG file to write.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the layers that pruning hurts.

    Each is pruned alone and judged by a metric, beside what its sparse kernel gains.

    Example: twofour sensitivity resnet20.onnx --data test.npz --samples 1000 -o layers.html
    Example: twofour sensitivity bert.onnx --data dev.npz --metric sts:spearman --cache scan.jsonl
    Example: twofour sensitivity bert.onnx --data dev.npz --ray --ray-address auto
    """
    from twofour.core.sensitivity import document
    from twofour.evaluate.sensitivity import Scanner, SensitivityOptions

    out = Output(as_json, quiet)
    _require_outputs(output, plot)
    with spread_of(ray, ray_address, jobs, out) as spread:
        options = SensitivityOptions(
            metric,
            metric_output,
            tuple(pattern or ("2:4",)),
            tuple(skip or ()),
            samples,
            cache=cache,
            spread=spread,
        )
        with out.stage("checking"):
            scanner = Scanner(model, data, options)
        wanted = _Wanted(model, parse_shapes(shapes) or scanner.shapes, forecast, precision)
        gains = wanted.gains(scanner.parameters, options.patterns, out)
        found = scanner.alone(out.stage, out.note)
        orders = _tradeoffs(found, gains, precision, scanner.parameters, out) if gains else []
        ways = scanner.together(orders, [_counts(way) for way in orders], out.stage)
    everything = document(found, ways, gains.machine if gains else None)
    out.show(*_parts(found, ways, scanner.excluded))
    _write(everything, output, plot)
    out.show(*_files(output, plot))
    out.data("sensitivity/1", everything)


def _require_outputs(output: Path | None, plot: Path | None) -> None:
    if output is not None:
        require_packages("an HTML page", ["jinja2"], "report")
        require_writable(output)
    if plot is not None:
        require_packages("a plot", ["matplotlib"], "report")
        require_writable(plot)


@dataclass(frozen=True)
class _Wanted:
    """Which gains the user wants.

    Attributes:
        model: the file.
        shapes: of a run.
        how: FILE, measure, none, or None to decide.
        precision: that gains are of, or None to decide.
    """

    model: Path
    shapes: Mapping[str, tuple[int, ...]]
    how: str | None
    precision: str | None

    def gains(
        self, parameters: Mapping[str, int], patterns: Sequence[str], out: Output
    ) -> Gains | None:
        """Reads or measures them, before the scan that they belong to."""
        from twofour.core.errors import Error
        from twofour.predict.gains import measured_gains, read_gains

        if self.how == "none":
            return None
        if self.how not in (None, "measure"):
            found = read_gains(str(self.how))
            found.require_layers(parameters)
            found.require_precision(self.precision)
            return found
        small = sum(parameters.values()) <= _MANY_PARAMETERS and len(parameters) <= _MANY_LAYERS
        if self.how is None and not small:
            out.note(
                "gains are not measured, which takes minutes: --forecast measure, or FILE of "
                "twofour forecast --json"
            )
            return None
        try:
            return measured_gains(self.model, self.shapes, self.precision, patterns, out.stage)
        except Error as e:
            if self.how is not None:
                raise
            out.note(f"no gains could be measured: {e.what}")
            return None


def _tradeoffs(
    found: Sensitivity,
    gains: Gains,
    precision: str | None,
    parameters: Mapping[str, int],
    out: Output,
) -> list[Tradeoff]:
    from twofour.core.sensitivity import tradeoff

    ways = []
    chosen = precision or gains.judged or gains.precisions[0]
    for pattern in found.patterns:
        us = gains.of(parameters, pattern, chosen)
        if us:
            ways.append(tradeoff(found.at(pattern), pattern, chosen, us))
        else:
            out.note(f"no gains of {pattern}: the forecast has no times of it in {chosen}")
    return ways


def _counts(way: Tradeoff) -> list[int]:
    """How many layers to prune for each share of the gain, and all of them."""
    return list(dict.fromkeys(way.step_for(share) for share in _SHARES)) if way.steps else []


def _write(everything: dict[str, Any], output: Path | None, plot: Path | None) -> None:
    if plot is not None:
        from twofour.report.plot import plot_sensitivity

        plot_sensitivity(everything, plot)
    if output is not None:
        from twofour.report.sensitivity import write_sensitivity

        write_sensitivity(everything, output)


def _files(*files: Path | None) -> list[str]:
    return [f"written: {file}" for file in files if file is not None]


def _parts(
    found: Sensitivity, ways: Sequence[Tradeoff], excluded: Sequence[str]
) -> list[Table | str]:
    """All that is printed; layers that the user excluded stay so in the command to go on."""
    less = "" if found.higher_is_better else " (less is better)"
    unit = f" {found.unit}" if found.unit else ""
    parts: list[Table | str] = [
        f"{found.model}, {found.samples} samples: {found.metric}{less} {found.dense:.4g}{unit}"
    ]
    by_pattern = {way.pattern: way for way in ways}
    for pattern in found.patterns:
        way = by_pattern.get(pattern)
        parts.append(_layers(found, pattern, way))
        if way is not None:
            parts += _advice(found, way, excluded)
    left = [(f"{each.pattern}: {each.reason}", each.layer) for each in found.left]
    parts += by_reason("not tried", left)
    return [*parts, *(f"note: {text}" for text in found.notes)]


def _layers(found: Sensitivity, pattern: str, way: Tradeoff | None) -> Table:
    precision = f", gains in {way.precision}" if way else ""
    table = Table(
        title=f"each layer alone pruned to {pattern}{precision}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        caption="\u00b1: standard error; a drop below twice of it may be chance",
        caption_justify="left",
    )
    table.add_column("layer", overflow="fold")
    heads = ["parameters", "energy kept", f"{_metric(found)} drop"]
    for head in heads + (["us gained", "drop per us"] if way else []):
        table.add_column(head, justify="right", no_wrap=True)
    rates = {step.layer: step.drop_per_us for step in way.steps} if way else {}
    for case in found.at(pattern):
        cells = [f"{case.parameters:,}", f"{case.energy_kept:.1%}", _drop(case)]
        if way is not None:
            gain_us, rate = way.gains.get(case.layer), rates.get(case.layer)
            cells.append(_microseconds(gain_us))
            cells.append("" if rate is None else f"{rate:.3g}")
        table.add_row(printable(short(case.layer, _NAME)), *cells)
    return table


def _metric(found: Sensitivity) -> str:
    """Of a function of the user's own, its name without the module's."""
    return short(found.metric.rpartition(":")[2], _METRIC)


def _drop(case: Case | Together) -> str:
    error = "" if case.drop_error is None else f" \u00b1{case.drop_error:.2g}"
    return f"{case.drop:+.3g}{error}"


def _microseconds(us: float | None) -> str:
    return "?" if us is None else "<0.01" if 0 < us < 0.005 else f"{us:.2f}"


def _advice(found: Sensitivity, way: Tradeoff, excluded: Sequence[str]) -> list[Table | str]:
    """What is left of the gain when layers stay dense, the dearest first."""
    if not way.steps:
        return [f"no layer gains anything from {way.pattern} in {way.precision}"]
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("of the gain", "us", "pruned", "left dense", "drop estimated", "measured"):
        table.add_column(head, justify="right", no_wrap=True)
    for some in way.together:
        step = way.steps[some.count - 1]
        table.add_row(
            f"{step.share:.0%}",
            f"{step.total_gain_us:.1f}",
            str(some.count),
            str(len(found.at(way.pattern)) - some.count),
            f"{step.total_drop:.3g}",
            _drop(some),
        )
    order = [short(step.layer, _NAME) for step in reversed(way.steps) if step.drop_per_us > 0]
    pruned = {step.layer for step in way.steps[: way.step_for(_ADVISED)]}
    left = sorted(case.skip for case in found.at(way.pattern) if case.layer not in pruned)
    skips = "".join(f" --skip {shlex.quote(escape(name))}" for name in (*left, *sorted(excluded)))
    return [
        table,
        "estimated: the sum of the drops of layers pruned alone, those below 0 counted as 0; "
        "measured: pruned together",
        f"leave dense first: {', '.join(order) or 'no layer costs anything'}",
        f"{_ADVISED:.0%} of the gain:  twofour prune {shlex.quote(found.model)} -o sparse.onnx "
        f"--pattern {way.pattern}{skips}",
    ]
