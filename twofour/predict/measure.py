"""Builds each form of a model and runs it beside the first one: whole runs, measured.

Only the first engine and the one at hand are in memory. What a form takes is the time of the first,
over all races, divided by how many times as fast the form was beside it: so a machine that changes
its pace in between does not favour any.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from twofour.bench.declared import random_feeds
from twofour.bench.timing import Contestant, Ratio, Schedule, Timing, race, ratio
from twofour.bench.versus import ours
from twofour.compiler.build import BuildOptions
from twofour.compiler.forms import Form, Forms
from twofour.core.progress import Report, Stage
from twofour.engine import Plan
from twofour.runtime.session import Session

SCHEDULE = Schedule(duration_s=0.6, min_rounds=9)


@dataclass(frozen=True)
class Measured:
    """A form that was built and run.

    Attributes:
        form: which.
        plan: of its engine.
        time_us: of one run.
        speed: how many times as fast as the first form, with its quartiles.
    """

    form: Form
    plan: Plan
    time_us: float
    speed: Ratio


def measure(
    forms: Forms, list_: tuple[Form, ...], options: BuildOptions, stage: Stage
) -> tuple[Measured, ...]:
    """Builds and runs forms of a model.

    Args:
        forms: the model.
        list_: which; all are compared with the first.
        options: how to build: threads, timing cache, tuning effort.
        stage: shows the progress of each.

    Raises:
        UnsupportedError: a form cannot be compiled.
    """
    found: list[Measured] = []
    paces: list[float] = []
    with ExitStack() as held:
        first: Contestant | None = None
        for form in list_:
            with stage(str(form)) as report, ExitStack() as passing:
                engine = forms.build(form, options, partial(_building, report))
                session = Session(engine, options.threads)
                (passing if first else held).enter_context(session)
                rival = ours(session, random_feeds(engine.plan.inputs), str(form))
                mine, base = _raced(rival, first, report)
                first = first or rival
            paces += base.round_medians_us
            found.append(Measured(form, engine.plan, mine.median_us, ratio(mine, base)))
    pace_us = float(np.median(paces))
    return tuple(replace(each, time_us=pace_us / each.speed.median) for each in found)


def _raced(rival: Contestant, first: Contestant | None, report: Report) -> tuple[Timing, Timing]:
    """The times of a contestant and of the first one, which may be itself."""
    every = [rival] if first is None else [rival, first]
    times = race(every, SCHEDULE, lambda done, total: report(done, total, "running"))
    return times[0], times[-1]


def _building(report: Report, done: int, total: int | None, what: str) -> None:
    report(done, total, f"building {what}")
