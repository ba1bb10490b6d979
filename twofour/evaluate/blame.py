"""Which layers cost the task most: each is switched back to floats or dense weights and judged.

INT8 and 2:4 are judged apart. A cheap guess (the energy of the rounding errors of what the layer
reads and of its weight, or of the weights that pruning took) orders the layers, so that the runs
that are allowed go to the likeliest. Layers that are left over are switched back all at once; while
runs last, the group that gains most is divided. So every layer is in one row of the result, alone
or with others, and nothing is left unsaid.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from twofour.core.errors import InputError
from twofour.core.feeds import Run
from twofour.core.progress import Report, Stage
from twofour.engine import Engine
from twofour.evaluate.differences import Array
from twofour.evaluate.feeding import Predictor, engine_predictor
from twofour.evaluate.guess import guess_errors
from twofour.evaluate.judge import Judgement, Task, judge
from twofour.evaluate.variants import Origin, Workshop, time_us
from twofour.onnx_tools.revert import Switch
from twofour.runtime.session import Session

LEAST_RUNS = 8
_AGREE_DB = 30.0


@dataclass(frozen=True)
class Blamed:
    """What switching back gains.

    Attributes:
        kind: what is given up: "int8", or a pattern such as "2:4".
        layers: names of the source model's nodes; several where they were tried together.
        ops: their operators.
        gain: of the metric; positive is better; None without a metric.
        gain_error: its standard error; None without a metric, and for one of the user's own.
        sqnr_gain_db: of the judged output against the model.
        price_us: how much longer all layers take, as timed at build; negative where they take less.
        guess: the error energy that gave the layers their turn.
    """

    kind: str
    layers: tuple[str, ...]
    ops: tuple[str, ...]
    gain: float | None
    gain_error: float | None
    sqnr_gain_db: float
    price_us: float
    guess: float


@dataclass(frozen=True)
class Blame:
    """The layers by what they cost.

    Attributes:
        int8: largest gain first.
        sparse: likewise, for the patterns.
        all_int8: all INT8 layers switched back at once; None if there are none.
        all_sparse: likewise for the patterns.
        runs: engines that were built and judged.
        agreement_db: SQNR of the engine built again against the engine that was given.
        notes: what the figures do not show.
    """

    int8: tuple[Blamed, ...]
    sparse: tuple[Blamed, ...]
    all_int8: Blamed | None
    all_sparse: Blamed | None
    runs: int
    agreement_db: float
    notes: tuple[str, ...]


def blame(
    engine: Engine, origin: Origin, task: Task, expected: Predictor, runs: int, stage: Stage
) -> Blame:
    """Finds the layers that cost the metric (or, without one, the SQNR of the output) most.

    Args:
        engine: what is judged.
        origin: its files.
        task: data and metric; `output` is what the SQNR is taken of.
        expected: the model's outputs.
        runs: engines built and judged at most, at least `LEAST_RUNS`.
        stage: shows the progress.

    Raises:
        InputError: the files are not the engine's, nothing can be switched back, or an engine that
            is built from them gives other results.
    """
    with tempfile.TemporaryDirectory(prefix="twofour-") as name:
        folder = Path(name)
        with stage("reading the source") as report:
            workshop = Workshop(engine.plan, origin, folder, report)
            _require_switches(workshop)
            found = workshop.switches
            every = (*found.rounded, *found.sparse)
            guesses = guess_errors(workshop.source, every, task, report)
        trials = _Trials(workshop, task, Recorded(expected, folder), guesses)
        with stage("blaming") as report:
            return trials.blame(engine, runs, report)


class Recorded:
    """Outputs that are computed once and read from files afterwards.

    Args:
        predict: computes them.
        folder: for the files.
    """

    def __init__(self, predict: Predictor, folder: Path) -> None:
        """Records nothing yet."""
        self._predict, self._folder = predict, folder

    def __call__(self, run: Run) -> Mapping[str, Array]:
        """The outputs of a run; runs are told apart by their first sample."""
        path = self._folder / f"{run.batch.start}.npz"
        if not path.exists():
            found = self._predict(run)
            np.savez(path, np.array(list(found)), *found.values())
            return found
        with np.load(path) as file:
            names, *arrays = (file[key] for key in file.files)
        return dict(zip(names.tolist(), arrays, strict=True))


class _Trials:
    """Builds and judges variants, and counts them."""

    def __init__(
        self, workshop: Workshop, task: Task, expected: Predictor, guesses: Mapping[Switch, float]
    ) -> None:
        self._workshop, self._task, self._expected = workshop, task, expected
        self._guesses = guesses
        self._done = 0
        self._report: Report
        self._runs = 0
        self._base: Judgement
        self._base_us = 0.0

    def blame(self, engine: Engine, runs: int, report: Report) -> Blame:
        """The whole search; see the module."""
        found = self._workshop.switches
        self._report = report
        needs = _most_runs(found.rounded), _most_runs(found.sparse)
        for_int8, for_sparse = _shares(runs - 1, *needs)
        self._runs = 1 + for_int8 + for_sparse
        agreement_db = self._start(engine)
        int8, all_int8 = self._search(found.rounded, for_int8)
        sparse, all_sparse = self._search(found.sparse, for_sparse)
        notes = tuple(_notes(self._workshop))
        report(self._done, self._done, "")
        return Blame(int8, sparse, all_int8, all_sparse, self._done, agreement_db, notes)

    def _start(self, engine: Engine) -> float:
        """Builds the engine again; refuses one that computes something else."""
        self._step("the engine, built again")
        again = self._workshop.engine()
        task = replace(self._task, metric=None)
        with Session(engine) as old, Session(again) as new:
            same = judge(task, engine_predictor(old), engine_predictor(new))
            self._base = judge(self._task, self._expected, engine_predictor(new))
        agreement_db = min(output.sqnr_db for output in same.outputs)
        if agreement_db < _AGREE_DB:
            raise InputError(
                "the engine cannot be built again from these files",
                [
                    f"expected the same outputs, at least {_AGREE_DB:g} dB SQNR",
                    f"got {agreement_db:.1f} dB",
                ],
                "write the quantized or pruned file first, build from it, name it as --source",
            )
        self._base_us = time_us(again.plan)
        return agreement_db

    def _search(
        self, switches: Sequence[Switch], runs: int
    ) -> tuple[tuple[Blamed, ...], Blamed | None]:
        """Each layer alone if the runs allow it; else the likeliest alone, and groups."""
        if not switches:
            return (), None
        ordered = sorted(switches, key=lambda each: -self._guesses[each])
        whole = self._try(ordered)
        if len(ordered) == 1:
            return (whole,), whole
        left = runs - 1
        single = len(ordered) if len(ordered) <= left else max(1, left // 2)
        rows: dict[tuple[Switch, ...], Blamed]
        rows = {(each,): self._try([each]) for each in ordered[:single]}
        left -= single
        if rest := tuple(ordered[single:]):
            rows[rest] = self._try(rest)
            left -= 1
        while left >= 2 and (group := _best_group(rows)):
            del rows[group]
            for half in (group[: len(group) // 2], group[len(group) // 2 :]):
                rows[half] = self._try(half)
            left -= 2
        return tuple(sorted(rows.values(), key=_worth, reverse=True)), whole

    def _try(self, switches: Sequence[Switch]) -> Blamed:
        names = tuple(each.layer for each in switches)
        what = names[0] if len(names) == 1 else f"{len(names)} layers at once"
        self._step(f"{switches[0].kind} {what}")
        engine = self._workshop.engine(switches)
        with Session(engine) as session:
            found = judge(self._task, self._expected, engine_predictor(session))
        gain, error = None, None
        if (metric := self._task.metric) and self._base.engine and found.engine:
            gain = metric.gain(self._base.engine.figure, found.engine.figure)
            error = metric.error(self._base.engine, found.engine)
        return Blamed(
            switches[0].kind,
            names,
            tuple(each.op for each in switches),
            gain,
            error,
            _more(self._sqnr(self._base), self._sqnr(found)),
            time_us(engine.plan) - self._base_us,
            sum(self._guesses[each] for each in switches),
        )

    def _sqnr(self, found: Judgement) -> float:
        return next(each.sqnr_db for each in found.outputs if each.name == self._task.output)

    def _step(self, what: str) -> None:
        self._report(self._done, self._runs, what)
        self._done += 1


def _most_runs(switches: Sequence[Switch]) -> int:
    """All at once, then each alone."""
    return len(switches) + (len(switches) > 1)


def _shares(runs: int, one: int, other: int) -> tuple[int, int]:
    """Divides the runs: half for each, and what one does not need for the other."""
    for_one = min(one, max(runs // 2, runs - other))
    return for_one, min(other, runs - for_one)


def _worth(row: Blamed) -> tuple[float, float]:
    return (row.gain or 0.0, row.sqnr_gain_db)


def _more(before_db: float, after_db: float) -> float:
    return 0.0 if before_db == after_db else after_db - before_db


def _best_group(rows: Mapping[tuple[Switch, ...], Blamed]) -> tuple[Switch, ...] | None:
    """Of those with several layers, the one that gains most."""
    groups = [group for group in rows if len(group) > 1]
    return max(groups, key=lambda group: _worth(rows[group]), default=None)


def _require_switches(workshop: Workshop) -> None:
    found = workshop.switches
    if found.rounded or found.sparse:
        return
    reasons = ["the source has no Q/DQ pairs"]
    if found.without_dense:
        layers = f"{len(found.without_dense)} layers with a pattern"
        reasons.append(f"{layers}, and no dense weights of the same name and shape for them")
    raise InputError(
        "nothing can be switched back", reasons, "give a model with dense weights: --dense FILE"
    )


def _notes(workshop: Workshop) -> Iterable[str]:
    found = workshop.switches
    if found.weights_stay_rounded:
        yield (
            "the float model is not what the source was quantized from: weights stay rounded, "
            "only what a layer reads is switched back"
        )
    if found.without_dense:
        yield (
            f"no dense weights for {len(found.without_dense)} layers with a pattern, such as "
            f"{found.without_dense[0]}: give them with --dense FILE"
        )
