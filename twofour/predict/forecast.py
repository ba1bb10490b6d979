"""Forecast: what pruning 2:4 and quantizing will gain on this machine, before any is paid for.

    found = twofour.forecast("model.onnx", threads=1)
    for run in found.runs:
        print(run.name, run.time_us, run.vs_f32)

Every form of the model is built from the file itself (`compiler/forms.py`) and run, so a forecast
needs no data, no training and no calibration: times depend on shapes and patterns, never on values.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from glob import escape
from os import PathLike
from pathlib import Path
from typing import Any

from twofour.compiler.build import EFFORTS, BuildOptions, Model
from twofour.compiler.forms import F32, INT8, PATTERNS, PRECISIONS, WORDS, Form, Forms, Layer
from twofour.compiler.rates import measure_rates
from twofour.core.errors import InputError
from twofour.core.progress import Report, Stage, silent
from twofour.core.target import host_target
from twofour.core.version import __version__
from twofour.predict.layers import LayerTimes, layer_times
from twofour.predict.measure import Measured, measure
from twofour.predict.verdicts import Court, Verdict

_AS_FAST = 1.03  # a pattern that leaves more freedom is taken where it is not slower than this


@dataclass(frozen=True)
class ForecastOptions:
    """What to forecast.

    Attributes:
        shapes: input name -> shape; dimensions left open become 1.
        threads: to tune for and to run with.
        timing_cache: a file that keeps measured times, shared with `twofour build`.
        tuning_effort: 1 to 3, as of a build.
        precisions: of "f32", "bf16", "int8".
        patterns: of "2:4", "2:4/pair".
    """

    shapes: Mapping[str, tuple[int, ...]] | None = None
    threads: int = 1
    timing_cache: str | PathLike[str] | None = None
    tuning_effort: int = 2
    precisions: Sequence[str] = PRECISIONS
    patterns: Sequence[str] = PATTERNS

    def __post_init__(self) -> None:
        """Checks what can be checked before any work.

        Raises:
            InputError: an unknown precision or pattern, or an effort that times nothing.
        """
        _require_known("precision", self.precisions, PRECISIONS)
        _require_known("pattern", self.patterns, PATTERNS)
        if self.tuning_effort not in EFFORTS[1:]:
            raise InputError(
                f"cannot forecast with tuning effort {self.tuning_effort!r}",
                [f"expected {EFFORTS[1]} to {EFFORTS[-1]}: a forecast is made of times"],
            )


@dataclass(frozen=True)
class Run:
    """One run of the whole model in one form.

    Attributes:
        name: the form in words.
        precision: "f32", "bf16" or "int8".
        pattern: "", "2:4" or "2:4/pair".
        everywhere: whether all layers that can be are pruned, not only those where it pays.
        time_us: of one run.
        measured: of an engine that ran; else the layers' times added to one that did.
        vs_f32: times as fast as dense float32; None if that was not forecast.
        vs_int8: times as fast as dense INT8; None if that was not forecast.
        dense: layers whose sparse kernel is slower, so that the engine takes a dense one; where
            not everything is pruned, all layers left dense that could be pruned.
    """

    name: str
    precision: str
    pattern: str
    everywhere: bool
    time_us: float
    measured: bool
    vs_f32: float | None
    vs_int8: float | None
    dense: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forecast:
    """What was found.

    Attributes:
        model: its file's name.
        target: what kernels were made for.
        cpu: that they were timed on.
        threads: they were timed with.
        inputs: name -> shape.
        notes: what the user should know about the model.
        layers: every layer with a weight, in order.
        runs: of the whole model.
        judged: the form that verdicts are about, the fastest one; None without a pattern.
        verdicts: for each of `layers`; empty without `judged`.
        skip: names for `twofour prune --skip`: layers that could be pruned but should not.
        version: of twofour.
    """

    model: str
    target: str
    cpu: str
    threads: int
    inputs: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]
    layers: tuple[LayerTimes, ...]
    runs: tuple[Run, ...]
    judged: Form | None
    verdicts: tuple[Verdict, ...]
    skip: tuple[str, ...]
    version: str = __version__

    @property
    def worth(self) -> tuple[str, ...]:
        """Names of the layers worth pruning."""
        return tuple(verdict.layer for verdict in self.verdicts if verdict.pays)

    def commands(self) -> tuple[str, ...]:
        """How to go on; nothing where pruning does not pay."""
        if self.judged is None or not self.worth:
            return ()
        skips = "".join(f" --skip {shlex.quote(escape(name))}" for name in self.skip)
        pattern = self.judged.pattern
        return (
            f"twofour prune {shlex.quote(self.model)} -o sparse.onnx --pattern {pattern}{skips}",
            f"Sparsifier(model, pattern={pattern!r}, exclude={[escape(n) for n in self.skip]!r})",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data: dicts, lists, strings, numbers."""
        plain = asdict(self)
        for layer in plain["layers"]:
            del layer["work"]
        return {**plain, "worth": list(self.worth), "commands": list(self.commands())}


def forecast(model: Model, *, stage: Stage | None = None, **options: Any) -> Forecast:
    """Says what this machine will gain from pruning and quantizing a model.

        found = twofour.forecast("model.onnx", shapes={"x": (1, 3, 224, 224)})
        print(found.worth, found.commands())

    Args:
        model: an ONNX file, or a model in memory; not changed. One that is pruned already is
            compared with itself as if it were not; of one with Q/DQ only INT8 is forecast.
        stage: shows the progress of each build and its measurement.
        **options: the fields of `ForecastOptions`, by name.

    Raises:
        InputError: the model or an option is not usable.
        UnsupportedError: the model cannot be compiled.
    """
    known = {f.name for f in fields(ForecastOptions)}
    if unknown := set(options) - known:
        raise InputError(
            f"forecast has no option {min(unknown)!r}",
            [f"expected some of {', '.join(sorted(known))}"],
        )
    asked, stage = ForecastOptions(**options), stage or _unseen
    with stage("reading") as report:
        report(0, None, "model")
        forms = Forms.of(model, asked.shapes or {}, asked.precisions, host_target())
    with tempfile.TemporaryDirectory() as folder:
        cache = asked.timing_cache or Path(folder) / "times.json"
        build = BuildOptions(
            threads=asked.threads, timing_cache=cache, tuning_effort=asked.tuning_effort
        )
        measured = measure(forms, forms.list(asked.patterns), build, stage)
    name = Path(model).name if isinstance(model, (str, PathLike)) else "MODEL.onnx"
    return _Findings.of(forms, measured).forecast(name)


@dataclass(frozen=True)
class _Findings:
    """What was measured, and what follows.

    Attributes:
        forms: the model.
        measured: each form.
        layers: their times.
        courts: for each precision that has a pattern, what its layers are judged by.
    """

    forms: Forms
    measured: tuple[Measured, ...]
    layers: tuple[LayerTimes, ...]
    courts: tuple[Court, ...]

    @staticmethod
    def of(forms: Forms, measured: tuple[Measured, ...]) -> _Findings:
        """Brings the plans together."""
        plans = {each.form: each.plan for each in measured}
        layers = layer_times(plans, [layer.name for layer in forms.layers])
        copy_gbps = measure_rates(measured[0].plan).copy_gbps
        us = {each.form: each.time_us for each in measured}
        courts = []
        for precision in forms.bases:
            if pattern := _best_pattern(us, precision):
                form = Form(precision, pattern)
                refusals = forms.refusals(pattern)
                courts.append(Court(form, us[Form(precision)], refusals, copy_gbps))
        return _Findings(forms, measured, layers, tuple(courts))

    def forecast(self, model: str) -> Forecast:
        """All of it."""
        plan = self.measured[0].plan
        courts = {court.form.precision: court for court in self.courts}
        fastest = min(self.measured, key=lambda each: each.time_us).form.precision
        court = courts.get(fastest)
        verdicts = tuple(map(court.judge, self.layers)) if court else ()
        return Forecast(
            model,
            str(plan.target),
            plan.target.model,
            plan.threads,
            {info.name: info.shape for info in plan.inputs},
            self.forms.notes,
            self.layers,
            tuple(self._runs()),
            court.form if court else None,
            verdicts,
            tuple(self._skip(court, verdicts)) if court else (),
        )

    def _runs(self) -> Iterator[Run]:
        """Each precision: dense, pruned, pruned where it pays."""
        us = {each.form: each.time_us for each in self.measured}
        dense = {p: us.get(Form(p)) for p in (F32, INT8)}

        def run(form: Form, time_us: float, left: tuple[str, ...], pays: int = 0) -> Run:
            name = f"{form} where it pays" if pays else str(form)
            ratios = (base / time_us if base else None for base in (dense[F32], dense[INT8]))
            return Run(
                name, form.precision, form.pattern, not pays, time_us, not pays, *ratios, left
            )

        for precision in self.forms.bases:
            for form, time_us in us.items():
                if form.precision == precision:
                    yield run(form, time_us, tuple(self._slower(form)))
            for court in self.courts:
                if court.form.precision == precision:
                    time_us, left, pays = self._where_it_pays(court, us[court.form])
                    if pays and left:
                        yield run(court.form, time_us, left, pays)

    def _slower(self, form: Form) -> Iterator[str]:
        """Layers whose sparse kernel lost in the engine of a form."""
        for layer in self.layers:
            times = layer.at(form.precision)
            sparse = times.sparse_us.get(form.pattern) if times else None
            if times and sparse and times.chosen_us.get(form.pattern, sparse) < sparse:
                yield layer.name

    def _where_it_pays(self, court: Court, run_us: float) -> tuple[float, tuple[str, ...], int]:
        """The run where only those layers are pruned, those left dense, and how many are not."""
        left, pays = [], 0
        for layer, verdict in zip(self.layers, map(court.judge, self.layers), strict=True):
            times = layer.at(court.form.precision)
            pays += verdict.pays
            if verdict.pays or not times or verdict.sparse_us is None:
                continue
            left.append(layer.name)
            chosen = times.chosen_us.get(court.form.pattern)
            if times.dense_us is not None and chosen is not None:
                run_us += max(times.dense_us - chosen, 0.0)
        return run_us, tuple(left), pays

    def _skip(self, court: Court, verdicts: Sequence[Verdict]) -> Iterator[str]:
        """What to leave dense of what could be pruned."""
        known: dict[str, Layer] = {layer.name: layer for layer in self.forms.layers}
        for layer, verdict in zip(self.layers, verdicts, strict=True):
            for node in layer.nodes:
                if not verdict.pays and node not in court.refusals:
                    yield known[node].skip


def _best_pattern(us: Mapping[Form, float], precision: str) -> str:
    """The fastest pattern of a precision, or one that asks less and is as fast; "" for none."""
    times = {form.pattern: t for form, t in us.items() if form.precision == precision}
    times.pop("", None)
    best = min(times.values(), default=0.0)
    return next((pattern for pattern, t in times.items() if t <= _AS_FAST * best), "")


def _require_known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [each for each in given if each not in known]:
        raise InputError(f"unknown {what} {unknown[0]!r}", [f"expected some of {', '.join(known)}"])


@contextmanager
def _unseen(name: str) -> Iterator[Report]:
    """A stage that nobody watches."""
    yield silent
