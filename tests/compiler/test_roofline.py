"""What kernels do is counted from real builds; gaps and their reasons follow from made-up rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.sample_engines import CONV, SOFTMAX, STEM, sample_engine
from tests.sample_models import conv_model
from twofour.compiler.build import build
from twofour.compiler.peak import Peaks
from twofour.compiler.rates import COPY_BYTES, Rates, measure_rates
from twofour.compiler.result_loop import Results
from twofour.compiler.roofline import Gap, gaps
from twofour.core.errors import InputError
from twofour.core.target import ISAS, Target, host_target, missing_features
from twofour.engine import Candidate, Layer, Plan, Work

RESULTS = Results("int8", "int8", "int8", "Relu", True, False)
RATES = Rates(
    Peaks({"int8 dense": 100.0, "int8 2:4": 200.0, "float32 dense": 10.0}),
    copy_gbps=50.0,
    weights_bytes=1 << 20,
    read_gbps=10.0,
    result_ns={RESULTS: 2.0},
)
# 1568 positions of 60 channels, K = 147: at 200 GMAC/s 69.1 us, at 100 138.3.
BUSY = Layer(
    "busy",
    "QConvAddRelu",
    "2:4 H",
    time_us=150.0,
    precision="int8",
    macs=1568 * 60 * 147,
    weight_bytes=50_000,
    candidates=(Candidate("2:4 H", "", 150.0),),
    work=Work(1000, 147, 168, 60, 64, 6272, 14.0, "int8", "int8", "Relu", True),
)


def plan_of(*layers: Layer, threads: int = 1) -> Plan:
    sample = sample_engine().plan
    (profile,) = sample.profiles
    steps = (replace(profile.steps[0], layers=tuple(range(len(layers)))),)
    profiles = (replace(profile, steps=steps),)
    return replace(sample, layers=layers, profiles=profiles, threads=threads)


def gap_of(layer: Layer, threads: int = 1) -> Gap:
    (gap,) = gaps(plan_of(layer, threads=threads), RATES)
    return gap


def test_products_bound_a_layer_and_each_loss_is_computed() -> None:
    gap = gap_of(BUSY)
    ideal = BUSY.macs / 200e3
    assert gap.bound == "products"
    assert gap.ideal_us == pytest.approx(ideal)
    assert gap.gap_us == pytest.approx(150 - ideal)
    assert gap.share == 1.0
    found = {loss.kind: loss for loss in gap.losses}
    assert found["zeros"].time_us == pytest.approx(ideal * 21 / 147)
    assert found["lanes"].time_us == pytest.approx(ideal * 4 / 60)
    assert found["results"].time_us == pytest.approx(12.544)
    assert found["results"].what == "after sums of K = 147: scale, int8 residual, Relu, to int8"
    assert found["weights"].time_us == pytest.approx(5.0)
    assert found["positions"].what == "weights are loaded for 14 positions at a time"
    times = [loss.time_us or 0.0 for loss in gap.losses]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("zeros", {"k_computed": 147}),
        ("lanes", {"lanes": 60}),
        ("results", {"vectors": 100}),
        ("positions", {"positions": 16.0}),
        ("positions", {"positions": 0.0}),
    ],
)
def test_a_loss_that_is_none_is_not_told(kind: str, change: dict[str, int]) -> None:
    work = replace(BUSY.work, **change)
    assert kind not in {loss.kind for loss in gap_of(replace(BUSY, work=work)).losses}


def test_two_threads_have_twice_the_rates_where_they_were_timed() -> None:
    assert gap_of(BUSY, threads=2).ideal_us == pytest.approx(BUSY.macs / 400e3)
    (after,) = (x for x in gap_of(BUSY, threads=2).losses if x.kind == "results")
    assert after.time_us == pytest.approx(6.272)
    alone = replace(BUSY, candidates=(Candidate("2:4 H", "", None, "refused"),))
    assert gap_of(alone, threads=2).ideal_us == pytest.approx(BUSY.macs / 200e3)


def test_a_layer_without_products_is_bound_by_its_bytes() -> None:
    moved = Layer("pool", "MaxPool", "pool", time_us=10.0, work=Work(100_000))
    gap = gap_of(moved)
    assert (gap.bound, gap.ideal_us, gap.gap_us) == ("bytes", 2.0, 8.0)
    assert [loss.what for loss in gap.losses] == ["moves 100 kB at 10 GB/s, a copy 50"]


def test_attention_says_how_long_its_softmax_can_take() -> None:
    work = Work(1000, scores=16_000)
    layer = Layer("a", "QAttention", "attention", time_us=3.0, precision="int8", macs=100_000)
    (loss,) = gap_of(replace(layer, work=work)).losses
    assert loss.what == "softmax of 16000 scores: the gap is 2 ns for 16 of them"


def test_what_is_not_known_is_all_gap_and_what_was_not_timed_is_none() -> None:
    fallback, conv, stem = gaps(
        plan_of(replace(SOFTMAX, time_us=4.0), CONV, replace(STEM, time_us=None)), RATES
    )
    assert (fallback.bound, fallback.ideal_us, fallback.gap_us) == ("", None, 4.0)
    assert [loss.kind for loss in fallback.losses] == ["fallback"]
    assert conv.gap_us == pytest.approx(12.5 - CONV.macs / 200e3)
    assert (stem.time_us, stem.gap_us, stem.losses) == (None, 0.0, ())
    assert fallback.share + conv.share == pytest.approx(1.0)


def test_builds_count_what_their_kernels_do(tmp_path: Path) -> None:
    plan = build(conv_model(tmp_path / "m.onnx")).plan
    convs = [layer for layer in plan.layers if layer.macs]
    assert convs
    for layer in convs:
        work = layer.work
        positions = layer.macs // (work.k * work.channels)
        assert positions * work.k * work.channels == layer.macs
        assert work.k <= work.k_computed < work.k + 64
        assert work.channels <= work.lanes < work.channels + 16
        assert work.vectors == positions * work.lanes // 16
        assert 0 < work.positions <= positions
        assert work.out
    assert all(layer.work.moved_bytes > 0 for layer in plan.layers)


def here() -> list[Target]:
    host = host_target()
    every = [Target(isa, host.arch, host.model) for isa in ISAS]
    return [target for target in every if not missing_features(target)]


@pytest.mark.parametrize("target", here(), ids=str)
def test_rates_of_this_machine(target: Target) -> None:
    kinds = [
        Work(1, 1, 1, 1, 16, 1, 1.0, out, add, activation)
        for out, add, activation in (
            ("int8", "", "Relu"),
            ("int8", "int8", "Relu"),
            ("int8", "", "Gelu"),
            ("float32", "float32", ""),
        )
    ]
    kinds.append(replace(kinds[2], gate=True))
    layers = [Layer("a", "QConv", "dense", precision="int8", work=work) for work in kinds]
    layers += [Layer("b", "Conv", "dense", precision="float32", work=kinds[3])]
    rates = measure_rates(replace(plan_of(*layers), target=target))
    assert len(rates.result_ns) == 6
    assert all(0.05 < ns < 1000 for ns in rates.result_ns.values())
    plain, residual, gelu, _, gate, _ = rates.result_ns.values()
    assert plain < residual < gelu
    assert plain < gate < gelu
    assert 1 < rates.copy_gbps < 2000
    assert 1 < rates.read_gbps < 2000
    assert rates.weights_bytes >= COPY_BYTES


def test_rates_are_not_those_of_another_machine() -> None:
    with pytest.raises(InputError, match="no roofline for an engine of another machine") as caught:
        measure_rates(sample_engine().plan)
    assert "its times were measured on A CPU" in str(caught.value)
