"""What was measured of a model's forms, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from twofour.compiler.forms import F32, INT8, Form, Forms
from twofour.compiler.rates import measure_rates
from twofour.predict.layers import LayerTimes, layer_times
from twofour.predict.measure import Measured
from twofour.predict.results import Forecast, Run
from twofour.predict.verdicts import Court, Verdict

_AS_FAST = 1.03  # a pattern that leaves more freedom is taken where it is not slower than this


@dataclass(frozen=True)
class Findings:
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
    def of(forms: Forms, measured: tuple[Measured, ...]) -> Findings:
        """Brings the plans together."""
        plans = {each.form: each.plan for each in measured}
        layers = layer_times(plans, [layer.name for layer in forms.layers])
        on_gpu = measured[0].plan.target.cuda is not None
        copy_gbps = math.inf if on_gpu else measure_rates(measured[0].plan).copy_gbps
        us = {each.form: each.time_us for each in measured}
        courts = []
        for precision in forms.bases:
            if pattern := _best_pattern(us, precision):
                form = Form(precision, pattern)
                refusals = forms.refusals(pattern)
                dense = plans[Form(precision)]
                # On a busy machine a run takes longer than its layers, which were timed at best.
                whole_us = sum(layer.time_us or 0.0 for layer in dense.layers)
                run_us = whole_us or us[Form(precision)]
                courts.append(Court(form, run_us, refusals, copy_gbps))
        return Findings(forms, measured, layers, tuple(courts))

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
            f32, int8 = (base / time_us if base else None for base in (dense[F32], dense[INT8]))
            ways = (form.precision, form.pattern, not pays)
            return Run(name, *ways, time_us, not pays, f32, int8, left)

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
            pruned = times.to(form.pattern) if times else None
            if pruned and pruned.sparse_us and pruned.chosen_us:
                if pruned.chosen_us < pruned.sparse_us:
                    yield layer.name

    def _where_it_pays(self, court: Court, run_us: float) -> tuple[float, tuple[str, ...], int]:
        """The run where only those layers are pruned, those left dense, and how many are not."""
        left, pays = [], 0
        us = {each.form: each.time_us for each in self.measured}
        pace = us[Form(court.form.precision)] / court.run_us
        for layer, verdict in zip(self.layers, map(court.judge, self.layers), strict=True):
            times = layer.at(court.form.precision)
            pays += verdict.pays
            if verdict.pays or not times or verdict.sparse_us is None:
                continue
            left.append(layer.name)
            chosen = times.to(court.form.pattern).chosen_us
            if times.dense_us is not None and chosen is not None:
                run_us += pace * max(times.dense_us - chosen, 0.0)
        return run_us, tuple(left), pays

    def _skip(self, court: Court, verdicts: Sequence[Verdict]) -> Iterator[str]:
        """What to leave dense of what could be pruned."""
        known = {layer.name: layer for layer in self.forms.layers}
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
