"""The digits recipe as a user starts it: from PyTorch to a gated engine, in one command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file

from twofour.core.patterns import is_pattern

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TRAINING = ("load", "sparsify", "finetune", "qat", "qat dense", "export")


def start(folder, *arguments):
    """Runs the recipe, shortened: of what it does nothing is left out."""
    return subprocess.run(
        [sys.executable, "-m", "twofour", "pipeline", "digits.yaml", "--run", "run", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    shutil.copy(ROOT / "recipes" / "digits.py", folder)
    text = (ROOT / "recipes" / "digits.yaml").read_text()
    for long, short in (
        ("epochs: 3", "epochs: 1"),
        ("min_speedup: 1.0", "min_speedup: 0.01"),  # no test asserts a time
    ):
        assert long in text
        text = text.replace(long, short)
    text += "build: {tuning_effort: 0, race: false}\nbenchmark: {duration: 0.5}\n"
    (folder / "digits.yaml").write_text(text)
    done = start(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads((folder / "run" / "run.json").read_text())
    return SimpleNamespace(folder=folder, run=folder / "run", done=done, outcome=outcome)


def test_all_six_networks_are_made_and_judged(ran):
    assert ran.outcome["verdict"] == "passed"
    cells = {(c["weights"], c["precision"]): c for c in ran.outcome["cells"]}
    assert set(cells) == {(w, p) for w in ("dense", "2:4") for p in ("float32", "PTQ", "QAT")}
    for name, cell in cells.items():
        assert cell["figure"]["value"] > 95, name
        assert cell["latency_us"] > 0, name
    sizes = {name: cell["weight_bytes"] for name, cell in cells.items()}
    assert sizes["2:4", "QAT"] < sizes["dense", "QAT"] < sizes["dense", "float32"]
    assert len(ran.outcome["documents"]["sensitivity"]["cases"]) == 9
    assert "What each layer costs" in (ran.run / "report.html").read_text()


def test_the_stages_follow_each_other(ran):
    stages = {each["name"]: each for each in ran.outcome["stages"]}
    assert [name for name in stages if name in TRAINING] == list(TRAINING)
    assert {each["status"] for each in stages.values()} == {"done"}
    made_from = {each["path"]: each["made_from"] for each in ran.outcome["artifacts"]}
    engines = [path for path in made_from if path.endswith(".engine")]
    assert len(engines) == 6
    (result,) = (path for path in engines if "build-2-4-QAT" in path)
    kinds = {each["path"]: each["kind"] for each in ran.outcome["artifacts"]}
    came = ancestors(made_from, result)
    assert {kinds[path] for path in came} == {"onnx", "masks", "checkpoint", "code", "data"}
    assert {"digits:model", "digits:train", "digits:calibrate"} < came
    assert [path.rpartition("/")[2] for path in came if kinds[path] == "onnx"] == ["qat.onnx"]
    (dense,) = (path for path in engines if "build-dense-float32" in path)
    assert {kinds[path] for path in ancestors(made_from, dense)} == {"onnx", "checkpoint", "code"}


def ancestors(made_from, path):
    """All that a file was made from."""
    found = set()
    for each in made_from[path]:
        found |= {each} | ancestors(made_from, each)
    return found


def test_the_masks_of_the_first_stage_hold_in_the_last(ran):
    (masks,) = ran.run.glob("stages/sparsify-*/masks.safetensors")
    (model,) = ran.run.glob("stages/qat-????????????/model.safetensors")
    weights, kept = load_file(model), load_file(masks)
    assert len(kept) == 8
    for name, mask in kept.items():
        weight = weights[f"{name}.weight"]
        assert not weight[~mask].any()
        assert is_pattern(weight, "2:4")


def test_a_second_run_does_nothing_again(ran):
    done = start(ran.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads((ran.run / "run.json").read_text())
    statuses = {each["name"]: each["status"] for each in outcome["stages"]}
    assert statuses.pop("report") == "done"  # the page is written in each run
    assert set(statuses.values()) == {"reused"}
    assert outcome["cells"] == ran.outcome["cells"]
