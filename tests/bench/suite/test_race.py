"""Small networks through a whole row: files, engines, peers, ratios, agreement, similarity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from twofour.bench.suite import files, race
from twofour.bench.suite.entries import OURS, RATIOS, Entry
from twofour.bench.suite.page import markdown_ratios, page, write
from twofour.bench.suite.rows import SuiteOptions, SuiteRow
from twofour.bench.suite.run import failures
from twofour.bench.timing import Timing
from twofour.core.errors import InputError
from twofour.core.progress import silent
from twofour.train.networks.catalog import Network
from twofour.train.networks.transformer import OUTPUT_NAMES, Bert, BertConfig


def cnn_module() -> nn.Module:
    """Three convolutions and a classifier."""
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


BERT = BertConfig(1, 32, 4, 64, vocabulary=50, positions=16)
NETWORKS = {
    "cnn": Network(cnn_module, 8),
    "text": Network(lambda: Bert(BERT), bert=BERT, outputs=OUTPUT_NAMES),
}
Measure = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Measures a row of a small network, briefly."""
    cache = tmp_path_factory.mktemp("cache")

    def measured(row: SuiteRow, *peers: str, threads: int = 1) -> dict[str, Any]:
        return race.measure_row(row, SuiteOptions(peers, threads, 0.02, cache), silent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "NETWORKS", NETWORKS)
        patch.setattr("twofour.train.networks.catalog.NETWORKS", NETWORKS)
        patch.setattr(race, "MIN_ROUNDS", 2)
        patch.setattr(race, "text_model", lambda: None)
        patch.setattr(files, "text_model", lambda: None)
        yield measured


@pytest.fixture(scope="module")
def cnn(measure: Measure) -> dict[str, Any]:
    return measure(SuiteRow("cnn_b2", "cnn", 2), "onnxruntime")


def test_a_row_has_all_figures(cnn: dict[str, Any]) -> None:
    ours = {entry.key for entry in race.our_entries()}
    assert set(cnn["engines"]) == ours
    assert {entry.key for entry in OURS if entry.precision != "bf16"} <= ours
    peers = {"onnxruntime_f32", "onnxruntime_int8_same_file", "onnxruntime_int8_uint8_file"}
    assert set(cnn["contestants"]) == ours | peers
    for each in cnn["contestants"].values():
        assert each["median_us"] > 0
        assert each["spread_us"] >= 0
    assert cnn["refused"] == {}
    assert (cnn["name"], cnn["batch"], cnn["threads"]) == ("cnn_b2", 2, 1)
    json.dumps(cnn, allow_nan=False)
    assert race.missing_figures(cnn, ["onnxruntime"]) == []


def test_ratios_refer_to_the_fastest_peer_of_the_class(cnn: dict[str, Any]) -> None:
    times = {key: each["median_us"] for key, each in cnn["contestants"].items()}
    int8 = [key for key in times if key.startswith("onnxruntime_int8")]
    assert cnn["best_peer"] == {"f32": "onnxruntime_f32", "int8": min(int8, key=times.__getitem__)}
    for name in RATIOS:
        if "bf16" in name:
            assert cnn[name] is None
        else:
            low, high = cnn[f"{name}_quartiles"]
            assert 0 < low <= cnn[name] <= high


def test_engines_agree_with_their_files_and_say_what_they_are(cnn: dict[str, Any]) -> None:
    for key, each in cnn["engines"].items():
        least = {"int8": 0.98, "bf16": 0.9999, "f32": 0.999999}[key.rpartition("_")[2]]
        assert each["cosine"] > least, key
        assert each["max_error"] <= 0.2 * each["reference_max"]
        if key.endswith("int8"):  # what its own file loses is not ours to mend, nor to worsen
            assert 0.98 < each["file_cosine_to_float"] < 1
            assert 1 - each["cosine_to_float"] < 1.5 * (1 - each["file_cosine_to_float"]) + 1e-4
        else:
            assert each["file_cosine_to_float"] == 1
            assert each["cosine_to_float"] == each["cosine"]
        assert 0 < each["roofline_share"] < 1.5
        assert each["fallback_operators"] == each["fallback_steps"] == 0
        assert each["operators"] > each["steps"] > 3
        assert min(each["arena_bytes"], each["weight_bytes"], each["macs"]) > 0
        assert not each["timings_kept"]
    sizes = {key: each["weight_bytes"] for key, each in cnn["engines"].items()}
    assert sizes["dense_f32"] > sizes["2_4_f32"] > sizes["dense_int8"]


def test_a_row_says_where_the_time_goes(cnn: dict[str, Any]) -> None:
    (lost,) = cnn["lost"].values()
    assert lost["run_us"] == cnn["contestants"]["2_4_int8"]["median_us"]
    # Which of them is larger is the machine's doing: a busy one measures a lower peak.
    assert min(lost["products_us"], lost["bytes_us"], lost["layers_us"]) > 0
    gaps = [kind["gap_us"] * len(kind["layers"]) for kind in lost["kinds"]]
    assert len(gaps) == 3
    assert gaps == sorted(gaps, reverse=True)
    assert all(kind["why"] and kind["time_us"] > 0 for kind in lost["kinds"])
    text = page(document(cnn))
    assert "| **cnn_b2**, 2_4_int8: " in text
    assert lost["kinds"][0]["why"][0] in text
    assert "threads over one" not in text


def test_a_class_that_no_row_has_is_no_column(cnn: dict[str, Any]) -> None:
    first = markdown_ratios(document(cnn)).splitlines()[0]
    assert "2:4 INT8" in first
    assert "bf16" not in first, "no peer has it here"
    assert "2:4/pair bf16" in markdown_ratios(
        document(cnn, {**cnn, "ratio_pair_bf16_over_best_peer": 1.5})
    )


@pytest.mark.slow
def test_several_threads_are_told_beside_one(measure: Measure, cnn: dict[str, Any]) -> None:
    found = measure(SuiteRow("cnn_b2", "cnn", 2, cold_start=True), threads=2)
    assert "cold_start" not in found
    assert set(found["engines"]) == set(cnn["engines"])
    assert found["contestants"]["2_4_int8_one_thread"]["setting"].startswith("threads 1,")
    assert found["contestants"]["2_4_int8"]["setting"].startswith("threads 2,")
    assert cnn["contestants"]["2_4_int8"]["setting"].startswith("threads 1,")
    for key in ("dense_int8", "2_4_int8", "pair_int8"):
        low, high = found[f"scaling_{key}_quartiles"]
        assert 0 < low <= found[f"scaling_{key}"] <= high
    assert not any(key.startswith("scaling") for key in cnn)
    text = page({**document(found), "threads": 2})
    assert "## 2 threads over one" in text
    assert f"{found['scaling_2_4_int8']:.2f}x" in text


def test_text_runs_on_dynamic_quantization_too(measure: Measure) -> None:
    found = measure(SuiteRow("text_b1", "text", 1, 12, similarity=True), "onnxruntime")
    assert "onnxruntime_int8_dynamic" in found["contestants"]
    assert found["calibrated_on"] == f"{files.SENTENCES} random texts"
    assert found["similarity"]["not_measured"] == "no real weights at hand"
    for each in found["engines"].values():
        assert each["cosine"] > 0.98
        assert each["fallback_steps"] <= each["fallback_operators"]


def test_a_second_run_finds_its_engines(
    measure: Measure, cnn: dict[str, Any], tmp_path: Path
) -> None:
    again = measure(SuiteRow("cnn_b2", "cnn", 2))
    assert again["best_peer"] == {}
    assert again["ratio_2_4_int8_over_best_peer"] is None
    for key, each in again["engines"].items():
        assert each["build_s"] == cnn["engines"][key]["build_s"]
    assert race.missing_figures(again, []) == []
    assert race.missing_figures(again, ["openvino"]) == ["a peer at f32", "a peer at int8"]


def test_what_one_engine_cannot_do_does_not_stop_the_others(
    measure: Measure, cnn: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = race.build_engine

    def failing(row: SuiteRow, entry: Entry, *rest: Any) -> Any:
        if entry.kind == "pair-int8":
            raise InputError("no pairs today")
        return real(row, entry, *rest)

    monkeypatch.setattr(race, "build_engine", failing)
    found = measure(SuiteRow("cnn_b2", "cnn", 2), "onnxruntime")
    assert found["refused"] == {"pair_int8": "no pairs today"}
    assert found["ratio_pair_int8_over_best_peer"] is None
    assert found["ratio_2_4_int8_over_best_peer"] > 0
    assert race.missing_figures(found, ["onnxruntime"]) == ["pair_int8"]
    text = page(document(found))
    assert "- cnn_b2, pair_int8: no pairs today" in text


def document(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": "Whole networks on the CPU",
        "suite": "cpu",
        "command": "twofour bench --suite cpu",
        "version": "1.2.3",
        "cpu": "a CPU",
        "cores": 2,
        "target": "cpu:avx2",
        "tools": {"python": "3.11", "onnxruntime": "1.0"},
        "peers": ["onnxruntime"],
        "threads": 1,
        "duration_s": 1.0,
        "rows": list(rows),
    }


def test_the_page_shows_losses_and_failures(cnn: dict[str, Any], tmp_path: Path) -> None:
    slow = {**cnn, "name": "slow", "ratio_2_4_f32_over_best_peer": 0.5}
    slow["cold_start"] = {"twofour": {"first_result_s": 0.25, "peak_bytes": None}}
    slow["similarity"] = {"spearman": {"dense_f32": 86.7}, "pairs": 9, "reference_f32": 86.72}
    found = document(slow, {"name": "broken", "error": "two\nlines"})
    assert failures(found) == ["broken: two\nlines"]
    written = write(found, tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert json.loads((tmp_path / "cpu.json").read_text()) == found
    shown = (tmp_path / "cpu.md").read_text()
    assert "- slow: 2:4 f32 0.50x" in shown
    assert "- broken: failed: two lines" in shown
    assert "| broken | failed |" in shown
    assert "| twofour | 0.250 s |  |" in shown
    assert "| dense_f32 | 86.70 |" in shown
    assert "    twofour bench --suite cpu\n" in shown
    assert markdown_ratios(found) in shown
    lengths = {line.count("|") for line in markdown_ratios(found).splitlines()}
    assert len(lengths) == 1, "every line of a table has as many cells"
    with pytest.raises(InputError, match="cannot write"):
        write(found, tmp_path / "nowhere")


def test_ratios_go_round_by_round() -> None:
    def timing(*medians: float) -> Timing:
        return Timing(sorted(medians)[len(medians) // 2], 0, 0, 0, 3, medians, 0, 0, 0)

    ours = next(entry for entry in OURS if entry.key == "dense_int8")
    slow, fast = (e for e in race.PEERS if e.key.startswith("openvino_int8"))
    found = race._ratios({ours: timing(1, 2, 3), slow: timing(9, 9, 9), fast: timing(4, 4, 4)})
    assert found["best_peer"] == {"int8": fast.key}
    assert found["ratio_dense_int8_over_best_peer"] == 2.0
