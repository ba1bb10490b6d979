"""Forecast: what pruning 2:4 and quantizing will gain on this machine, before any is paid for.

    found = twofour.forecast("model.onnx", threads=1)
    print(found.worth, found.commands())
    for run in found.runs:
        print(run.name, run.time_us, run.vs_f32)

Every form of the model is built from the file itself (`compiler/forms.py`) and run, so a forecast
needs no data, no training and no calibration: times depend on shapes and patterns, never on values.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from twofour.compiler.build import EFFORTS, BuildOptions, Model
from twofour.compiler.forms import GPU_PRECISIONS, PATTERNS, PRECISIONS, Forms
from twofour.core.errors import InputError
from twofour.core.progress import Stage, unseen
from twofour.core.target import Target, check_runs_here, parse_target
from twofour.predict.findings import Findings
from twofour.predict.measure import measure
from twofour.predict.results import Forecast


@dataclass(frozen=True)
class ForecastOptions:
    """What to forecast.

    Attributes:
        shapes: input name -> shape; dimensions left open become 1.
        threads: to tune for and to run with.
        timing_cache: a file that keeps measured times, shared with `twofour build`.
        tuning_effort: 1 to 3, as of a build.
        precisions: of "f32", "bf16", "int8", on a GPU "fp16" and "fp8" too; by default all that the
            target has.
        patterns: of "2:4", "2:4/pair".
        target: by default this machine's CPU; "cuda" for its GPU.
    """

    shapes: Mapping[str, tuple[int, ...]] | None = None
    threads: int = 1
    timing_cache: str | PathLike[str] | None = None
    tuning_effort: int = 2
    precisions: Sequence[str] = ()
    patterns: Sequence[str] = PATTERNS
    target: Target | str = "cpu"

    def __post_init__(self) -> None:
        """Checks what can be checked before any work.

        Raises:
            InputError: an unknown precision or pattern, or an effort that times nothing.
        """
        found = self.chosen_target
        if found.cpu or found.tensorrt is not None:
            raise InputError(
                f"nothing can be forecast for {found}",
                ["a forecast is made of times, and nothing is timed for it here"],
                "forecast on that machine, for cpu or cuda",
            )
        _require_known("precision", self.precisions, self.known_precisions)
        _require_known("pattern", self.patterns, PATTERNS)
        if self.tuning_effort not in EFFORTS[1:]:
            raise InputError(
                f"cannot forecast with tuning effort {self.tuning_effort!r}",
                [f"expected {EFFORTS[1]} to {EFFORTS[-1]}: a forecast is made of times"],
            )

    @property
    def chosen_target(self) -> Target:
        """What engines are built for."""
        return parse_target(self.target) if isinstance(self.target, str) else self.target

    @property
    def known_precisions(self) -> tuple[str, ...]:
        """Those that the target may have."""
        return PRECISIONS if self.chosen_target.cuda is None else GPU_PRECISIONS


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
        UnsupportedError: the model cannot be compiled, or the target is not here.
    """
    known = {f.name for f in fields(ForecastOptions)}
    if unknown := set(options) - known:
        raise InputError(
            f"forecast has no option {min(unknown)!r}",
            [f"expected some of {', '.join(sorted(known))}"],
        )
    asked, stage = ForecastOptions(**options), stage or unseen
    with stage("reading") as report:
        report(0, None, "model")
        target = asked.chosen_target
        check_runs_here(target)
        wanted = asked.precisions or asked.known_precisions
        precisions = [each for each in asked.known_precisions if each in wanted]
        forms = Forms.of(model, asked.shapes or {}, precisions, target)
    with tempfile.TemporaryDirectory() as folder:
        cache = asked.timing_cache or Path(folder) / "times.json"
        build = BuildOptions(
            threads=asked.threads,
            timing_cache=cache,
            tuning_effort=asked.tuning_effort,
        )
        measured = measure(forms, forms.list(asked.patterns), build, stage)
    name = str(model) if isinstance(model, (str, PathLike)) else "MODEL.onnx"
    return Findings.of(forms, measured).forecast(name)


def _require_known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [each for each in given if each not in known]:
        raise InputError(f"unknown {what} {unknown[0]!r}", [f"expected some of {', '.join(known)}"])
