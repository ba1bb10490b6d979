"""Whole runs of an engine and of ONNX Runtime: who is taken, and what the plan says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.compiler.engines import reference, run_twice, steps
from tests.graphs import graph
from twofour.compiler import build as building
from twofour.compiler import whole_race
from twofour.compiler.build import build
from twofour.compiler.timing_cache import TimingCache
from twofour.core.errors import UnsupportedError
from twofour.engine import Engine

RANDOM = np.random.default_rng(0)
MODEL = graph(
    "(float[1,4,6,6] x) => (float[1,8,6,6] y) { c = Conv (x, w) y = Relu (c) }",
    w=RANDOM.normal(size=(8, 4, 1, 1)).astype(np.float32),
)


def planted(
    monkeypatch: pytest.MonkeyPatch, ours_us: float, theirs_us: float
) -> Callable[[Engine, Callable[[str], Engine], TimingCache], Engine]:
    """`build` finds these times in its cache."""
    real = whole_race.faster

    def race(engine: Engine, whole: Callable[[str], Engine], cache: TimingCache) -> Engine:
        times = dict(zip(whole_race._keys(engine), (ours_us, theirs_us), strict=True))
        return real(engine, whole, TimingCache(times))

    monkeypatch.setattr(building, "faster", race)
    return race


@pytest.mark.parametrize(
    ("theirs_us", "kind"), [(50.0, "onnxruntime"), (97.0, "native"), (250.0, "native")]
)
def test_the_clearly_faster_one_is_taken(
    monkeypatch: pytest.MonkeyPatch, theirs_us: float, kind: str
) -> None:
    planted(monkeypatch, 100.0, theirs_us)
    engine = build(MODEL, tuning_effort=1)
    assert [step.kind for step in engine.plan.steps] == [kind]
    inputs = {"x": RANDOM.normal(size=(1, 4, 6, 6)).astype(np.float32)}
    for name, array in reference(MODEL, inputs).items():
        np.testing.assert_allclose(run_twice(engine, inputs)[name], array, rtol=1e-5, atol=1e-5)
    said = "; ".join([*engine.plan.notes, *engine.plan.layers[0].notes])
    assert "100 us with kernels" in said
    assert f"{theirs_us:.3g} us for the same file on ONNX Runtime" in said
    if kind == "native":
        assert f"{theirs_us / 100:.2f} times as fast" in said
    else:
        assert engine.plan.layers[0].time_us


@pytest.mark.parametrize("options", [{"tuning_effort": 0}, {"sparsity": "force"}])
def test_no_race_where_nothing_is_timed_or_kernels_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    planted(monkeypatch, 100.0, 1.0)
    engine = build(MODEL, **{"tuning_effort": 1, **options})
    assert [step.kind for step in engine.plan.steps] == ["native"]
    assert not any("ONNX Runtime" in note for note in engine.plan.notes)


def test_times_are_kept_with_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second build asks nobody: the same engine, though times are never the same twice."""
    monkeypatch.setattr(building, "faster", whole_race.faster)
    cache = tmp_path / "times.json"
    first = build(MODEL, timing_cache=cache)
    assert any(key.endswith("-whole") for key in TimingCache.load(cache).times_us)
    assert build(MODEL, timing_cache=cache).plan == first.plan


def test_a_model_that_cannot_be_raced_keeps_its_kernels() -> None:
    engine = build(MODEL, tuning_effort=0)

    def refuses(why: str) -> Engine:
        raise UnsupportedError("no", [why])

    assert whole_race.faster(engine, refuses, TimingCache()) is engine


def test_the_race_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of real runs, and of the right contestant each."""
    engine = build(MODEL, tuning_effort=1)
    ((kind, _),) = steps(engine)
    cache = TimingCache()
    whole = build(MODEL, tuning_effort=0)
    whole_race.faster(engine, lambda why: whole, cache)
    ours_us, theirs_us = (cache.times_us[key] for key in whole_race._keys(engine))
    assert 0 < ours_us < 1e5
    assert 0 < theirs_us < 1e5
    assert kind in ("native", "onnxruntime")
