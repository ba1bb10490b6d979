"""twofour quantize --max-drop: which layers stay float, in words and in the document."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from twofour.cli.output import Output, printable, short
from twofour.cli.spread import spread_of

if TYPE_CHECKING:
    from twofour.evaluate import Budget, Mixed
    from twofour.onnx_tools.eligible import FloatLayer

_NAME = 60

MaxDrop = Annotated[
    float | None,
    typer.Option(help="Leave the fewest layers float that keep the metric within this drop."),
]
EvalData = Annotated[
    str | None, typer.Option(help="For --max-drop: samples and labels to judge, if not --data.")
]
MetricName = Annotated[
    str | None,
    typer.Option(
        help="For --max-drop: top1 (the default), f1, loss, spearman, ... or module:function."
    ),
]
MetricOutput = Annotated[
    str | None, typer.Option(help="The output that the metric reads; by default the first.")
]
MaxEvaluations = Annotated[
    int | None, typer.Option(min=8, help="For --max-drop: networks judged at most; by default 64.")
]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="For --max-drop: processes that judge, by default 1; --ray: workers."),
]
CacheFile = Annotated[
    Path | None,
    typer.Option(help="For --max-drop: keeps what was judged; a search goes on where it ended."),
]


@dataclass(frozen=True)
class Wanted:
    """What the options of --max-drop say; None for those that were not given."""

    max_drop: float | None
    eval_data: str | None
    metric: str | None
    metric_output: str | None
    max_evaluations: int | None
    jobs: int | None
    cache: Path | None
    ray: bool | None
    ray_address: str | None

    @contextmanager
    def budget(self, model: Path, data: str | None, out: Output) -> Iterator[Budget | None]:
        """What searches; it finds here what does not fit, before any calibration.

        Raises:
            InputError: an option that is of no use without --max-drop, or what `Budget` or
                `spread_of` raises.
        """
        from twofour.core.errors import InputError
        from twofour.evaluate import Budget, BudgetOptions

        if self.max_drop is None:
            self._require_none()
            yield None
            return
        judged = self.eval_data or data
        if judged is None:
            raise InputError(
                "--max-drop needs samples and labels",
                ["expected --eval-data or --data, got none"],
                "add --eval-data test.npz",
            )
        with spread_of(bool(self.ray), self.ray_address, self.jobs, out) as spread:
            options = BudgetOptions(
                self.max_drop,
                self.metric or "top1",
                self.metric_output,
                self.max_evaluations or 64,
                cache=self.cache,
                spread=spread,
            )
            with out.stage("checking"):
                found = Budget(model, judged, options)
            yield found

    def _require_none(self) -> None:
        from twofour.core.errors import InputError

        given = [name for name, value in asdict(self).items() if value is not None]
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise InputError(
                f"{option} is of no use without --max-drop",
                ["nothing is judged while a model is only quantized"],
                "add --max-drop 0.5, or leave the option out",
            )


def require_held(found: Mixed | None) -> None:
    """Refuses a result that is beyond the budget.

    Raises:
        GateError: even all layers float lose more.
    """
    from twofour.core.errors import GateError

    if found is None or found.holds:
        return
    figures = found.figures
    raise GateError(
        f"no choice of float layers holds --max-drop {found.max_drop:g}",
        [
            f"{figures.metric} of the float model {_figure(found, figures.dense)}, "
            f"all layers int8 {_figure(found, figures.int8)}",
            f"all {found.switches} layers float {_figure(found, figures.mixed)}, "
            f"a drop of {figures.drop:.4g}",
        ],
        "nothing was written; allow a larger drop, or leave out steps that change float weights",
    )


def parts(found: Mixed | None) -> list[Table | str]:
    """What is printed: the metric, and the layers left float."""
    if found is None:
        return []
    figures = found.figures
    less = "" if figures.higher_is_better else " (less is better)"
    error = "" if figures.drop_error is None else f" (standard error {figures.drop_error:.2g})"
    judged = sum(each.gain is not None for each in found.layers)
    lines: list[Table | str] = [
        f"{figures.metric}{less} on {figures.samples} samples: float "
        f"{_figure(found, figures.dense)}, int8 {_figure(found, figures.int8)}, with "
        f"{_layers(len(found.left))} float {_figure(found, figures.mixed)}",
        f"drop {figures.drop:.4g}{error} of at most {found.max_drop:g}; "
        f"{found.evaluations} networks judged, {judged} of {found.switches} layers alone",
    ]
    if found.left:
        lines.append(_table(found))
    return [*lines, *(f"note: {text}" for text in found.notes)]


def document_of(found: Mixed | None) -> dict[str, Any] | None:
    """The same as plain data; None where there is no budget."""
    if found is None:
        return None
    return {
        **asdict(found.figures),
        "max_drop": found.max_drop,
        "evaluations": found.evaluations,
        "switches": found.switches,
        "layers": [asdict(each) for each in found.layers],
        "notes": list(found.notes),
    }


def left_layers(found: Mixed | None) -> Iterator[FloatLayer]:
    """Of the layers left float, those that have weights."""
    from twofour.onnx_tools.eligible import FloatLayer
    from twofour.onnx_tools.weights import LAYERS

    for each in () if found is None else found.left:
        if each.op in LAYERS:
            yield FloatLayer(each.layer, each.op, "left float by --max-drop")


def _table(found: Mixed) -> Table:
    table = Table(title="left float", title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("operator")
    table.add_column(f"{found.figures.metric.rpartition(':')[2]} gained alone", justify="right")
    for each in found.left:
        gain = "not judged" if each.gain is None else f"{each.gain:+.4g}"
        table.add_row(printable(short(each.layer, _NAME)), printable(each.op), gain)
    return table


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _figure(found: Mixed, value: float) -> str:
    unit = f" {found.figures.unit}" if found.figures.unit else ""
    return f"{value:.4g}{unit}"
