"""explain on hand-made plans: what decided is said in words, at any width."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.graphs import graph
from tests.sample_engines import sample_engine
from twofour.cli import app
from twofour.compiler import explain, summary
from twofour.compiler.build import build
from twofour.core.errors import InputError
from twofour.core.target import host_target
from twofour.engine import Candidate, Engine, Layer, Step


def invoke(*arguments: str | Path, width: int = 160) -> Result:
    return CliRunner().invoke(
        app,
        ["explain", *map(str, arguments)],
        env={"COLUMNS": str(width)},
        catch_exceptions=False,
    )


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return sample_engine().save(tmp_path / "e.engine")


def test_rows_say_what_decided() -> None:
    stem, conv, linear, softmax = explain.explain(sample_engine().plan)
    assert conv.runs_as == "2:4 H int8 28x1"
    assert (conv.best_dense_us, conv.best_sparse_us) == (18.0, 12.5)
    assert conv.gain == pytest.approx(1.44)
    assert conv.why == ()
    assert conv.share == pytest.approx(12.5 / 19.5)
    assert stem.best_sparse_us is None
    assert stem.why == (
        "3 input channels: no group of 4",
        "no 2:4 H: w is not 2:4 along C: channel 0 holds 3 nonzeros",
    )
    assert linear.why == ("dense is faster: 1.00 us, the best sparse kernel 1.25",)
    assert softmax.fallback
    assert softmax.why == ("no kernel for Softmax",)
    assert softmax.share is None


def test_totals_are_by_tactic_longest_first() -> None:
    found = explain.totals(sample_engine().plan)
    assert [(t.tactic, t.layers, t.time_us) for t in found] == [
        ("2:4 H int8", 1, 12.5),
        ("dense int8", 2, 7.0),
        ("onnxruntime float32", 1, None),
    ]
    assert sum(t.share for t in found) == pytest.approx(1.0)


def test_verdicts_on_candidates() -> None:
    conv = sample_engine().plan.layers[1]
    verdicts = [explain.verdict(c, conv) for c in conv.candidates]
    assert verdicts == [
        "lost: 1.44 times the chosen one's time",
        "lost: 1.56 times the chosen one's time",
        "chosen",
        "lost: 1.12 times the chosen one's time",
        "refused: w is not 2:4/pair: channels 3 and 19 differ",
    ]


def test_a_plan_without_times() -> None:
    sample = sample_engine().plan
    (profile,) = sample.profiles
    profile = dataclasses.replace(profile, steps=(Step("native", "net0", (), (), (0,)),))
    layers = (Layer("a", "QConv", "dense"),)
    plan = dataclasses.replace(sample, profiles=(profile,), layers=layers)
    (row,) = explain.explain(plan)
    assert (row.time_us, row.share, row.why) == (None, None, ())
    (total,) = explain.totals(plan)
    assert (total.time_us, total.share) == (None, 0.0)


def test_layers_are_found_by_part_of_their_name() -> None:
    plan = sample_engine().plan
    assert explain.find_layer(plan, "conv1") == plan.layers[0]  # exact before part
    assert explain.find_layer(plan, "layer1") == plan.layers[1]
    with pytest.raises(InputError, match="not unique"):
        explain.find_layer(plan, "conv")
    with pytest.raises(InputError, match=r"no layer 'zz'[^$]*layer1\.0\.conv1"):
        explain.find_layer(plan, "zz")


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_table_fits_the_terminal(width: int, engine: Path) -> None:
    result = invoke(engine, width=width)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= width
    for number in ("12.5", "18.0", "64%"):
        assert number in result.stdout


def test_the_table_has_all_that_matters(engine: Path) -> None:
    text = invoke(engine, width=300).stdout
    for part in (
        "resnet20.onnx, built for cpu:vector",
        "layer1.0.conv1",
        "QConvRelu",
        "2:4 H int8 28x1",
        "1.44x",
        "dense is faster",
        "on ONNX Runtime, for want of a kernel: softmax (Softmax)",
    ):
        assert part in text


def test_one_layer_with_all_candidates(engine: Path) -> None:
    text = invoke(engine, "--layer", "layer1.0.conv1").stdout
    lines = text.splitlines()
    order = [i for i, line in enumerate(lines) if "chosen" in line or "lost" in line]
    assert "chosen" in lines[order[0]]
    assert "refused: w is not 2:4/pair: channels 3 and 19 differ" in text
    assert "2:4, 1728 bytes packed, 2359296 multiply-adds" in text


def test_json_has_plan_and_reasons(engine: Path) -> None:
    document = json.loads(invoke(engine, "--json").stdout)
    conv = document["layers"][1]
    assert conv["candidates"][2]["tactic"] == "2:4 H"
    assert conv["explained"]["best_dense_us"] == 18.0
    assert document["engine"]["target"] == "cpu:vector"
    one = json.loads(invoke(engine, "--json", "--layer", "linear").stdout)
    assert one["name"] == "linear"


def test_quiet_is_silent(engine: Path) -> None:
    assert invoke(engine, "--quiet").output == ""


def test_a_reason_that_many_layers_share_is_said_once(tmp_path: Path) -> None:
    sample = sample_engine()
    layers = tuple(Layer(name, "QConv", "dense", notes=("it rains",)) for name in "abcd")
    plan = dataclasses.replace(sample.plan, layers=layers)
    path = Engine(plan, sample.weights, sample.code, sample.subgraphs).save(tmp_path / "e.engine")
    assert "- it rains\n  a, b, c, d\n" in invoke(path).stdout


def test_names_cannot_steer_the_terminal(tmp_path: Path) -> None:
    hostile = Layer("\x1b[2Jboo", "[red]Q[/red]", "dense", candidates=(Candidate("dense", "\x07"),))
    sample = sample_engine()
    plan = dataclasses.replace(sample.plan, layers=(hostile,) * 4)
    path = Engine(plan, sample.weights, sample.code, sample.subgraphs).save(tmp_path / "e.engine")
    for arguments in ([path], [path, "--layer", "boo"]):
        text = invoke(*arguments).output
        assert "\x1b[2J" not in text
        assert "\x07" not in text
    assert "[red]Q[/red]" in invoke(path).stdout


@pytest.fixture
def own_engine(tmp_path: Path) -> Path:
    """The sample as if it had been built here."""
    return sample_engine(host_target()).save(tmp_path / "own.engine")


def shown_order(text: str) -> list[str]:
    """Names of layers in the order of a table's lines."""
    names = ("layer1.0.conv1", "conv1", "linear", "softmax")
    cells = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    return [cell for cell in cells if cell in names]


def test_layers_are_sorted_by_time_or_by_gap(engine: Path, own_engine: Path) -> None:
    assert shown_order(invoke(engine).stdout) == ["conv1", "layer1.0.conv1", "linear", "softmax"]
    by_time = shown_order(invoke(engine, "--sort", "time").stdout)
    assert by_time == ["layer1.0.conv1", "conv1", "linear", "softmax"]
    document = json.loads(invoke(own_engine, "--sort", "gap", "--json").stdout)
    gaps = [layer["roofline"]["gap_us"] for layer in document["layers"]]
    assert gaps == sorted(gaps, reverse=True)
    assert max(gaps) > 0
    assert document["rates"]["peak_gmacs"]["int8 dense"] > 0
    names = {layer["name"] for layer in document["layers"]}
    # Rates are measured anew, so two layers whose gaps are close may change places.
    assert set(shown_order(invoke(own_engine, "--sort", "gap").stdout)) == names
    as_run = invoke(own_engine, "--roofline").stdout
    assert shown_order(as_run) == ["conv1", "layer1.0.conv1", "linear", "softmax"]
    assert "of the roofline" in as_run
    assert "runs on ONNX Runtime" not in as_run, "a layer without a time has no gap"


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_roofline_fits_the_terminal(width: int, own_engine: Path) -> None:
    result = invoke(own_engine, "--sort", "gap", width=width)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= width
    assert "weights" in result.stdout
    assert "12.50" in result.stdout


def test_the_roofline_of_another_machine_is_refused(engine: Path) -> None:
    result = CliRunner().invoke(app, ["explain", str(engine), "--sort", "gap"])
    assert result.exit_code == 2
    assert "no roofline for an engine of another machine" in result.stderr
    assert "measured on A CPU" in result.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of kernels around one of ONNX Runtime, on two threads."""
    folder = tmp_path_factory.mktemp("built")
    model = graph(
        "(float[1,8,6,6] x) => (float[1,8,6,6] y) {"
        " a = Conv <pads = [1,1,1,1]> (x, w) d = Det (a) u = Unsqueeze (d, last)"
        " v = Unsqueeze (u, last) c = Add (a, v) b = Relu (c)"
        " y = Conv <pads = [1,1,1,1]> (b, w) }",
        last=np.array([-1]),
        w=np.ones((8, 8, 3, 3), np.float32),
    )
    np.save(folder / "x.npy", np.ones((1, 8, 6, 6), np.float32))
    return build(model, tuning_effort=1, threads=2, race=False).save(folder / "e.engine")


def test_a_summary_comes_first(engine: Path, built: Path) -> None:
    text = invoke(engine, width=300).stdout.splitlines()
    assert text[1].startswith("of the time: sparse products 64% (12.5 us, 1 layer), dense products")
    said = invoke(built, width=300).stdout
    assert "next: " in said
    plan = Engine.load(built).plan  # what is notable depends on times, so all layers get the same
    same = tuple(dataclasses.replace(layer, time_us=1.0) for layer in plan.layers)
    ideas = "\n".join(summary.advice(dataclasses.replace(plan, layers=same)))
    assert "runs on ONNX Runtime (Det" in ideas
    assert "not in INT8: twofour quantize, or build --bf16" in ideas


def test_conversions_and_who_caused_them(engine: Path, built: Path) -> None:
    assert "no conversions" in invoke(engine, "--conversions").stdout
    text = invoke(built, "--conversions", width=200).stdout
    assert "the model's input 'x' is NCHW float32; a reads float32 channels-last" in text
    assert "ONNX Runtime step with Det reads float32" in text
    found = json.loads(invoke(built, "--conversions", "--json").stdout)["conversions"]
    times = [each["time_us"] for each in found]
    assert times == sorted(times, reverse=True)


def test_one_layer_says_where_it_comes_from_and_what_it_writes(built: Path) -> None:
    text = invoke(built, "--layer", "y", width=200).stdout
    assert "computes y\n" in text
    assert "writes y: float32 1x8x6x6" in text
    text = invoke(built, "--layer", "x/native", width=200).stdout
    assert "computes nothing of the source model: a conversion" in text
    assert "caused by: the model's input" in text


@pytest.mark.parametrize("given", [True, False])
def test_a_trace_of_real_runs(given: bool, built: Path, tmp_path: Path) -> None:
    """Events of a thread do not overlap; those of thread 0 are the run; nothing is left out."""
    file = tmp_path / "t.json"
    inputs = ["--input", f"x={built.parent / 'x.npy'}"] if given else []
    result = invoke(built, "--trace", file, "--runs", "3", *inputs, "--json")
    said = json.loads(result.stdout)
    document = json.loads(file.read_text())
    events = document["traceEvents"]
    assert (said["events"], len(said["run_us"])) == (len(events), 3)
    assert {event["ph"] for event in events} == {"X", "M"}
    complete = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in complete)
    for thread in (0, 1):
        own = sorted((e for e in complete if e["tid"] == thread), key=lambda e: e["ts"])
        assert {e["cat"] for e in own} >= {"dense", "conversion"}
        for before, after in itertools.pairwise(own):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-3
    runs = [event for event in complete if event["cat"] == "run"]
    for number, (event, run_us) in enumerate(zip(runs, said["run_us"], strict=True)):
        assert event["dur"] == pytest.approx(run_us)
        own = [e for e in complete if e["tid"] == 0 and e["args"]["run"] == number]
        covered = sum(e["dur"] + e["args"].get("waits_us", 0.0) for e in own)
        assert covered == pytest.approx(run_us, rel=0.05, abs=20)  # 20 us: an interruption
    plan = Engine.load(built).plan
    names = {event["name"] for event in complete if event["tid"] == 0}
    assert {layer.name for layer in plan.layers if layer.tactic != "onnxruntime"} <= names
    first = [event for event in complete if event["tid"] == 0 and event["args"]["run"] == 0]
    (fallback,) = [event for event in first if event["cat"] == "onnxruntime"]
    assert "Det" in fallback["args"]["op"]
    (last,) = [event for event in first if event["name"] == "y"]
    assert last["args"]["source"] == ["y"]
    assert last["args"]["moved_bytes"] == 2 * 4 * 8 * 36


def test_a_model_that_takes_no_random_inputs(tmp_path: Path) -> None:
    model = graph(
        "(float[1,8] x, int64[2,2] at) => (float[2] y) { a = MatMul (x, k) y = GatherND (a, at) }",
        k=np.ones((8, 8), np.float32),
    )
    path = build(model, tuning_effort=0).save(tmp_path / "e.engine")
    arguments = ["explain", str(path), "--trace", str(tmp_path / "t.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "takes no random inputs" in result.stderr
    assert "--input NAME=FILE.npy" in result.stderr
    assert not (tmp_path / "t.json").exists()


def test_a_trace_that_cannot_be_written(built: Path, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "none" / "t.json")
    result = CliRunner().invoke(app, ["explain", str(built), "--trace", nowhere])
    assert result.exit_code == 2
    assert "cannot write" in result.stderr
    result = CliRunner().invoke(app, ["explain", str(built), "--trace", "t", "--input", "x"])
    assert result.exit_code == 2
    assert "expected NAME=FILE.npy" in result.stderr
