"""Recipes of ONNX files, from the model to the gate, on a small network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.pipeline.runs import DATA, METRIC, RECIPE, short_races, write_data, write_recipe
from twofour.core.errors import Error, GateError, InputError
from twofour.core.outcome import Outcome
from twofour.core.processes import AnyStart
from twofour.core.scan import Arrivals, Item, Processes
from twofour.core.tensorrt import installed
from twofour.engine import Engine
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.weights import layer_weights
from twofour.pipeline.folder import RunFolder
from twofour.pipeline.identity import sha256_of
from twofour.pipeline.recipe_file import read_recipe
from twofour.pipeline.result import plain_outcome
from twofour.pipeline.run import Finished, Options, forecast, run

HAS_RTX = any(each.library == "tensorrt_rtx" for each in installed())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    short_races(monkeypatch)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A recipe that has been run once."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        short_races(patch)
        return folder, go(folder)


@pytest.fixture
def was_run(first_run: tuple[Path, Finished], tmp_path: Path) -> Path:
    """A copy of it: what is reused does not depend on where it lies."""
    shutil.copytree(first_run[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def go(folder: Path, text: str = RECIPE, again: str = "", name: str = "run") -> Finished:
    path = write_recipe(folder, text)
    return run(read_recipe(path), RunFolder(folder / name), Options("a test", again))


def statuses(finished: Finished) -> dict[str, str]:
    return {each.stage.name: each.status for each in finished.ran}


def done(finished: Finished) -> list[str]:
    return [name for name, status in statuses(finished).items() if status == "done"]


def test_a_recipe_from_model_to_gate(first_run: tuple[Path, Finished]) -> None:
    folder, finished = first_run
    outcome = finished.outcome
    assert finished.is_open
    assert outcome.verdict == "passed"
    assert [check.name for check in outcome.checks] == ["accuracy", "speed"]
    assert outcome.task is not None
    assert (outcome.task.metric, outcome.task.unit, outcome.task.samples) == ("top1", "%", 64)
    require_cells(outcome)
    require_lineage(outcome, folder)
    assert {point.kind for point in outcome.points} == {"baseline", "candidate", "variant"}
    assert [row.pattern for row in outcome.layers if row.name in ("conv", "linear")] == ["2:4"] * 2
    assert outcome.edges
    assert outcome.documents["quantize"]["int8_layers"] == 2
    assert outcome.surroundings.seed == 0
    written = json.loads((folder / "run" / "run.json").read_text())
    assert written["schema"] == "twofour.run/1"
    assert written["stages"] == plain_outcome(outcome)["stages"]
    suite = ElementTree.parse(folder / "run" / "gate.xml").getroot()
    assert len(list(suite.iter("testcase"))) == 2
    assert "passed" in (folder / "run" / "gate.md").read_text()
    assert (folder / "run" / "recipe.yaml").read_text() == RECIPE


def require_cells(outcome: Outcome) -> None:
    cells = {(cell.weights, cell.precision): cell for cell in outcome.cells}
    assert list(cells) == [(w, p) for w in ("dense", "2:4") for p in ("float32", "PTQ", "QAT")]
    for (_, precision), cell in cells.items():
        if precision == "QAT":
            assert cell.note == "an ONNX file is not trained"
            continue
        assert cell.figure is not None
        assert cell.latency_us is not None
        assert cell.latency_low_us is not None
        assert cell.latency_low_us <= cell.latency_us <= (cell.latency_high_us or 0)
    dense = cells["dense", "float32"]
    assert dense.figure is not None
    assert dense.figure.value == 100  # labels are what the model says
    sizes = [cells[key].weight_bytes or 0 for key in (("dense", "float32"), ("2:4", "PTQ"))]
    assert sizes[1] < sizes[0]


def require_lineage(outcome: Outcome, folder: Path) -> None:
    """engine <- ONNX <- calibration and masks' network <- the user's file, each with its hash."""
    artifacts = {each.path: each for each in outcome.artifacts}
    (engine,) = [a for a in outcome.artifacts if a.stage == "build 2:4 PTQ cpu"]
    assert engine.kind == "engine"
    (model,) = engine.made_from
    assert artifacts[model].stage == "quantize 2:4"
    pruned, data = artifacts[model].made_from
    assert data == "calib.npz"
    assert artifacts[pruned].stage == "sparsify"
    (loaded,) = artifacts[pruned].made_from
    assert artifacts[loaded].made_from == ("model.onnx",)
    assert {"masks", "calibration", "onnx", "data", "engine", "recipe"} <= {
        each.kind for each in outcome.artifacts
    }
    for path, each in artifacts.items():
        place = folder / "run" / path if each.stage or each.kind == "recipe" else folder / path
        assert sha256_of(place) == each.sha256
        assert place.stat().st_size == each.size_bytes


def test_a_second_run_does_nothing_again(first_run: tuple[Path, Finished], was_run: Path) -> None:
    first, second = first_run[1], go(was_run)
    assert set(statuses(second).values()) == {"reused"}
    assert second.outcome.cells == first.outcome.cells
    assert second.outcome.artifacts == first.outcome.artifacts


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (("fast", "balanced"), {"quantize", "build", "evaluate", "benchmark", "gate"}),
        (("max_drop: 100", "max_drop: 99"), {"gate"}),
        (("duration: 0.1", "duration: 0.2"), {"benchmark", "gate"}),
        (("race: false", "race: true"), {"build", "evaluate", "benchmark", "gate"}),
        (("name: small", "name: other"), set()),
        (("name: small", "evaluate: {samples: 40}\nname: small"), {"evaluate", "gate"}),
    ],
)
def test_one_setting_reruns_what_depends_on_it(
    was_run: Path, change: tuple[str, str], kinds: set[str]
) -> None:
    finished = go(was_run, RECIPE.replace(*change))
    again = [each.stage.kind for each in finished.ran if each.status == "done"]
    if "build" in kinds:  # an engine may come out the same, and then what reads it is reused
        assert set(again) <= kinds | {"benchmark"}
        assert set(again) >= {"build"}
    else:
        assert set(again) == kinds


def test_the_setting_of_pruning_leaves_the_dense_networks(was_run: Path) -> None:
    finished = go(was_run, RECIPE.replace("magnitude,", "magnitude, exclude: [linear],"))
    again = done(finished)
    assert [name for name in again if "dense" in name] == []
    assert {"sparsify", "quantize 2:4", "build 2:4 float32 cpu", "build 2:4 PTQ cpu"} <= set(again)


def test_other_samples_to_judge_rerun_no_build(was_run: Path) -> None:
    with np.load(was_run / "test.npz") as data:
        np.savez(was_run / "test.npz", x=data["x"][::-1], labels=data["labels"][::-1])
    again = go(was_run)
    assert {each.stage.kind for each in again.ran if each.status == "done"} == {
        "evaluate",
        "benchmark",
        "gate",
    }


def test_other_samples_to_calibrate_leave_the_float_networks(was_run: Path) -> None:
    with np.load(was_run / "calib.npz") as data:
        np.savez(was_run / "calib.npz", x=data["x"] * 2)
    again = done(go(was_run))
    assert "shapes" in again  # they are the same, so no float engine is built
    assert [name for name in again if name.startswith("build")] == [
        "build dense PTQ cpu",
        "build 2:4 PTQ cpu",
    ]


def test_each_layer_is_pruned_alone_for_the_heat_map(tmp_path: Path) -> None:
    text = RECIPE + "sensitivity: {patterns: [2:4, 2:4/pair]}\n"
    finished = go(tmp_path, text)
    scan = finished.outcome.documents["sensitivity"]
    assert [(case["layer"], case["pattern"]) for case in scan["cases"]] == [
        (layer, pattern) for pattern in ("2:4", "2:4/pair") for layer in ("conv", "linear")
    ]
    assert scan["dense"] == 100  # labels are what the model says
    assert all(case["drop"] >= 0 for case in scan["cases"])
    assert str(tmp_path) not in json.dumps(scan)
    assert not done(go(tmp_path, text))
    assert done(go(tmp_path, text.replace("[2:4, ", "["))) == ["sensitivity"]


def test_functions_of_the_user_are_metric_and_data(tmp_path: Path) -> None:
    (tmp_path / "judge_small.py").write_text(METRIC)
    (tmp_path / "data_small.py").write_text(DATA)
    text = RECIPE.replace("calibrate: calib.npz", "calibrate: data_small:calibration")
    text = text.replace("max_drop: 100", "max_drop: 1") + "metric: judge_small:share\n"
    finished = go(tmp_path, text)
    assert finished.outcome.task is not None
    assert finished.outcome.task.metric == "judge_small:share"
    assert finished.outcome.cells[0].figure is not None
    assert finished.outcome.cells[0].figure.value == 1
    named = {each.path for each in finished.outcome.artifacts}
    assert {"judge_small:share", "data_small:calibration"} <= named
    (tmp_path / "judge_small.py").write_text(METRIC + "\n# another\n")
    again = go(tmp_path, text)
    assert {each.stage.kind for each in again.ran if each.status == "done"} == {"evaluate"}


def test_the_gate_shuts_after_everything_was_written(tmp_path: Path) -> None:
    finished = go(tmp_path, RECIPE.replace("min_speedup: 0.0001", "min_speedup: 100000"))
    assert not finished.is_open
    assert finished.outcome.verdict == "failed"
    assert statuses(finished)["gate"] == "done"
    assert "failure" in (tmp_path / "run" / "gate.xml").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["verdict"] == "failed"
    assert go(tmp_path, RECIPE).is_open


def test_a_budget_of_accuracy_leaves_layers_float(tmp_path: Path) -> None:
    text = RECIPE.replace("recipe: fast", "recipe: fast, max_drop: 100, evaluations: 8")
    finished = go(tmp_path, text)
    mixed = finished.outcome.documents["quantize"]["mixed"]
    assert mixed["max_drop"] == 100
    assert done(go(tmp_path, text)) == []


def test_a_recipe_that_only_builds(tmp_path: Path) -> None:
    text = "name: small\nmodel: {onnx: model.onnx}\nbuild: {tuning_effort: 0, race: false}\n"
    finished = go(tmp_path, text + "benchmark: {duration: 0.1, vs: [], memory: false}\n")
    assert finished.is_open
    assert finished.outcome.verdict == ""
    assert finished.outcome.task is None
    assert "gate" not in statuses(finished)
    assert not (tmp_path / "run" / "gate.xml").exists()
    assert [c.latency_us is not None for c in finished.outcome.cells].count(True) == 2


def test_choices_for_layers_as_a_search_finds_them(tmp_path: Path) -> None:
    text = RECIPE.replace("sparsify: {method: magnitude, correct: false}\n", "")
    finished = go(tmp_path, text + "layers: {conv: 2:4 f32, linear: dense int8}\n")
    assert "sparsify" not in statuses(finished)
    (cell,) = [cell for cell in finished.outcome.cells if cell.weights == "mixed" and not cell.note]
    assert cell.figure is not None
    layers = {row.name: row for row in finished.outcome.layers}
    assert (layers["conv"].pattern, layers["conv"].precision) == ("2:4", "float32")
    assert (layers["linear"].pattern, layers["linear"].precision) == ("dense", "int8")
    with pytest.raises(InputError, match="no layer 'nothing'"):
        go(tmp_path, text + "layers: {nothing: 2:4 f32}\n")


def test_several_targets_and_a_batch(tmp_path: Path) -> None:
    text = RECIPE.replace(
        "tuning_effort: 0", "tuning_effort: 0, batch: 4, targets: [cpu, cpu:vector]"
    )
    finished = go(tmp_path, text)
    engines = {
        each.stage: Engine.load(tmp_path / "run" / each.path)
        for each in finished.outcome.artifacts
        if each.kind == "engine"
    }
    assert engines["build 2:4 PTQ cpu:vector"].plan.target.isa == "vector"
    assert engines["build 2:4 PTQ cpu"].plan.inputs[0].shape == (4, 4, 8, 8)
    figures = {each.name: each.figure for each in finished.outcome.points}
    assert figures["2:4 PTQ"] == figures["2:4 PTQ cpu:vector"]


@pytest.mark.skipif(not HAS_RTX, reason="TensorRT for RTX is not installed")
def test_an_engine_for_gpus_beside_that_of_the_cpu(tmp_path: Path) -> None:
    text = RECIPE.replace("tuning_effort: 0", "tuning_effort: 0, targets: [cpu, tensorrt-rtx]")
    text = text.replace("recipe: fast", "recipe: fast, activation: int8")
    finished = go(tmp_path, text)
    (engine,) = (tmp_path / "run").rglob("tensorrt-rtx.engine")
    plan = Engine.load(engine).plan
    assert str(plan.target) == "tensorrt-rtx:ampere+"
    assert {layer.precision for layer in plan.layers if layer.pattern} == {"int8"}
    assert finished.is_open, "the first target is judged"
    assert done(go(tmp_path, text)) == []


@dataclass
class Recorded:
    """Workers of this machine, and what they were given at once."""

    workers: Processes
    given: list[list[str]] = field(default_factory=list)

    @property
    def jobs(self) -> int:
        return self.workers.jobs

    @property
    def threads(self) -> int:
        return self.workers.threads

    def results(self, items: Sequence[Item], start: AnyStart) -> Arrivals:
        self.given.append([item.name for item in items])
        return self.workers.results(items, start)


def test_a_cluster_builds_all_engines_at_once(tmp_path: Path) -> None:
    text = RECIPE.replace("effort: 0", "effort: 0, cells: gate, targets: [cpu, cpu:vector]")
    path, spread = write_recipe(tmp_path, text), Recorded(Processes(1))
    options = Options("a test", spread=spread)
    finished = run(read_recipe(path), RunFolder(tmp_path / "run"), options)
    names = ["build dense float32 cpu", "build 2:4 PTQ cpu", "build 2:4 PTQ cpu:vector"]
    assert spread.given == [names]
    assert [name for name in done(finished) if name.startswith("build")] == names
    assert done(go(tmp_path, text)) == []  # where it was built makes no other stage of it
    run(read_recipe(path), RunFolder(tmp_path / "run"), options)
    assert len(spread.given) == 1


def test_masks_are_those_of_the_pruned_network(first_run: tuple[Path, Finished]) -> None:
    folder, finished = first_run
    files = {
        a.kind: folder / "run" / a.path for a in finished.outcome.artifacts if a.stage == "sparsify"
    }
    with np.load(files["masks"], allow_pickle=False) as masks:
        found = {name: masks[name] for name in masks.files}
    weights = {w.name: w.stored for _, w in layer_weights(load_model(files["onnx"]))}
    assert found.keys() == weights.keys()
    for name, mask in found.items():
        assert np.array_equal(mask, weights[name] != 0)


def test_what_does_not_fit_is_found_before_the_long_stages(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    np.savez(
        tmp_path / "test.npz", other=np.zeros((4, 4, 8, 8), np.float32), labels=np.zeros(4, int)
    )
    with pytest.raises(InputError, match="no array for input 'x'"):
        go(tmp_path)
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [each["status"] for each in written["stages"]][:2] == ["failed", "not reached"]
    write_data(tmp_path, tmp_path / "model.onnx")
    assert go(tmp_path).is_open


def test_a_model_that_is_none(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    (tmp_path / "model.onnx").write_text("no model")
    with pytest.raises(Error):
        go(tmp_path)
    assert not list((tmp_path / "run" / "stages").iterdir())


def test_a_forecast_writes_nothing_and_says_what_depends_on_a_change(
    was_run: Path, tmp_path: Path
) -> None:
    path = write_recipe(was_run)
    found = forecast(read_recipe(path), RunFolder(tmp_path / "new"))
    assert not any(each.reused for each in found)
    assert not (tmp_path / "new").exists()
    found = forecast(read_recipe(path), RunFolder(tmp_path / "run"))
    assert all(each.reused for each in found)
    assert all(each.seconds is not None for each in found)
    write_recipe(was_run, RECIPE.replace("max_drop: 100", "max_drop: 99"))
    found = forecast(read_recipe(path), RunFolder(tmp_path / "run"))
    assert [each.stage.name for each in found if not each.reused] == ["gate"]
    with pytest.raises(InputError, match="no stage 'qat'"):
        forecast(read_recipe(path), RunFolder(tmp_path / "run"), "qat")


def test_from_a_stage_all_after_it_run(was_run: Path) -> None:
    finished = go(was_run, again="evaluate")
    kinds = {each.stage.kind: each.status for each in finished.ran}
    assert kinds == {
        "load": "reused",
        "sparsify": "reused",
        "quantize": "reused",
        "build": "reused",
        "evaluate": "done",
        "benchmark": "done",
        "gate": "done",
    }


def test_the_record_holds_no_path_outside_the_run(first_run: tuple[Path, Finished]) -> None:
    folder = first_run[0]
    plain: Mapping[str, Any] = json.loads((folder / "run" / "run.json").read_text())
    assert str(folder) not in json.dumps(plain)


PUBLISH = RECIPE + "publish: {repository: models}\n"


def test_what_passed_is_published_once_and_served(tmp_path: Path) -> None:
    finished = go(tmp_path, PUBLISH)
    assert statuses(finished)["publish"] == "done"
    version = tmp_path / "models" / "small" / "1"
    files = {each.name for each in version.iterdir()}
    assert "model.onnx" in files
    (engine,) = [name for name in files if name.endswith(".engine")]
    (built,) = [a for a in finished.outcome.artifacts if a.stage == "build 2:4 PTQ cpu"]
    assert sha256_of(version / engine) == built.sha256
    assert statuses(go(tmp_path, PUBLISH))["publish"] == "reused"
    shutil.rmtree(tmp_path / "models")
    assert statuses(go(tmp_path, PUBLISH))["publish"] == "done"
    assert (version / engine).is_file()


def test_what_the_gate_shuts_out_is_not_published(tmp_path: Path) -> None:
    finished = go(tmp_path, PUBLISH.replace("min_speedup: 0.0001", "min_speedup: 100000"))
    assert statuses(finished)["publish"] == "left out"
    assert finished.ran[-1].text == "the gate: failed"
    assert not (tmp_path / "models").exists()
    opened = go(tmp_path, PUBLISH)
    assert statuses(opened)["publish"] == "done"


def test_a_recorded_run_is_the_baseline(was_run: Path) -> None:
    shutil.copyfile(was_run / "run" / "run.json", was_run / "before.json")
    text = RECIPE.replace("min_speedup: 0.0001", "min_speedup: 0.0001, baseline: before.json")
    finished = go(was_run, text)
    assert done(finished) == ["gate"]
    assert finished.is_open
    assert "baseline" in {each.kind for each in finished.outcome.artifacts}
    (was_run / "before.json").write_text("{}")
    with pytest.raises(InputError, match="no baseline"):
        go(was_run, text)


def test_a_metric_without_a_figure_does_not_pass_and_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "judge_none.py").write_text(
        "count = []\n\n\ndef figure(outputs, labels):\n    count.append(1)\n"
        "    return float('nan') if len(count) > 1 else 1.0\n"
    )
    text = RECIPE.replace("max_drop: 100", "max_drop: 1") + "metric: judge_none:figure\n"
    with pytest.raises(GateError, match="no number"):
        go(tmp_path, text)
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [cell["figure"] and cell["figure"]["value"] for cell in written["cells"]][:2] == [
        1,
        None,
    ]
    assert written["stages"][-1]["status"] == "failed"
