"""A recorded baseline is compared where that means something, and refused where not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from twofour.core.errors import InputError
from twofour.core.outcome import (
    FAILED,
    PASSED,
    UNDECIDED,
    Cell,
    Figure,
    Outcome,
    Point,
    Surroundings,
    Task,
)
from twofour.core.records import to_plain
from twofour.pipeline.gate import Limits, judge_gate
from twofour.pipeline.gate_recorded import Now, against, read_recorded

HERE = Surroundings("a CPU", 4, 1 << 34, "Linux", "cpu:avx2", 1, 0, "twofour pipeline", {})
TASK = Task("top1", "%", True, 1000)
FIGURE = Figure(92.0, 91.5, 92.5)
OUTCOME = Outcome(
    name="resnet20",
    created="2026-01-01T00:00:00Z",
    verdict="passed",
    checks=(),
    task=TASK,
    cells=(
        Cell("dense", "float32", Figure(93.0), 900.0, 890.0, 910.0, memory_bytes=90_000_000),
        Cell("2:4", "PTQ", FIGURE, 200.0, 195.0, 205.0, memory_bytes=60_000_000),
    ),
    points=(
        Point("dense", "baseline", Figure(93.0), 900.0),
        Point("x", "candidate", FIGURE, 200.0),
    ),
    layers=(),
    edges=(),
    stages=(),
    artifacts=(),
    surroundings=HERE,
    documents={"quantize": {"model": "int8.onnx", "layers": [1, None]}},
)
NOW = Now(TASK, Figure(91.8, 91.4, 92.2), Figure(100.0, 98.0, 102.0), 50_000_000, HERE)
LIMITS = Limits(1.5, 1.5, None, 1.0)


def written(folder: Path, outcome: Outcome = OUTCOME, **changed: object) -> Path:
    path = folder / "run.json"
    document = {"schema": "twofour.run/1", **to_plain(replace(outcome, **changed))}
    path.write_text(json.dumps(document))
    return path


def test_the_candidate_of_another_run_is_the_baseline(tmp_path: Path) -> None:
    recorded = read_recorded(written(tmp_path))
    assert recorded.latency_us == Figure(200.0, 195.0, 205.0)
    assert recorded.memory_bytes == 60_000_000
    checks = {check.name: check for check in judge_gate(against(recorded, NOW, LIMITS), LIMITS)}
    assert {name: check.verdict for name, check in checks.items()} == dict.fromkeys(
        ("accuracy", "speed", "memory"), PASSED
    )
    assert checks["accuracy"].value == pytest.approx(0.2)
    assert checks["accuracy"].high == pytest.approx(92.5 - 91.4)
    assert checks["speed"].low == pytest.approx(195 / 102)


def test_noise_of_both_runs_counts(tmp_path: Path) -> None:
    recorded = read_recorded(written(tmp_path))
    for drop, verdict in ((1.0, UNDECIDED), (1.2, PASSED), (-1.0, FAILED)):
        limits = Limits(drop)
        (check,) = judge_gate(against(recorded, NOW, limits), limits)
        assert check.verdict == verdict


def test_times_of_another_machine_are_refused(tmp_path: Path) -> None:
    recorded = read_recorded(written(tmp_path))
    there = replace(HERE, cpu="another CPU", threads=4)
    with pytest.raises(InputError, match="cannot be compared with the baseline") as error:
        against(recorded, replace(NOW, surroundings=there), LIMITS)
    assert "CPU: the baseline has a CPU, this run another CPU" in str(error.value)
    assert "threads: the baseline has 1, this run 4" in str(error.value)
    # Accuracy and memory are not times.
    limits = Limits(1.5, None, 100_000_000)
    measured = against(recorded, replace(NOW, surroundings=there), limits)
    assert len(judge_gate(measured, limits)) == 2


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (replace(TASK, samples=500), "samples: the baseline has 1000, this run 500"),
        (replace(TASK, metric="loss"), "metric: the baseline has top1, this run loss"),
    ],
)
def test_other_samples_and_metrics_are_refused(tmp_path: Path, task: Task, message: str) -> None:
    with pytest.raises(InputError, match=message):
        against(read_recorded(written(tmp_path)), replace(NOW, task=task), LIMITS)


def test_a_run_that_judged_nothing(tmp_path: Path) -> None:
    recorded = read_recorded(written(tmp_path, task=None))
    with pytest.raises(InputError, match="has no accuracy to compare with"):
        against(recorded, NOW, LIMITS)
    speed = Limits(None, 1.5)
    assert judge_gate(against(recorded, NOW, speed), speed)[0].verdict == PASSED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no baseline at"),
        ("{", "it is no JSON"),
        ("[1]", "expected a document of schema"),
        ('{"schema": "twofour.bench/1"}', r"got twofour\.bench/1"),
        ('{"schema": "twofour.run/1", "name": 3}', "is a damaged baseline"),
    ],
)
def test_what_is_no_run(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_recorded(path)


def test_a_run_without_a_candidate(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="measured none"):
        read_recorded(written(tmp_path, points=()))
