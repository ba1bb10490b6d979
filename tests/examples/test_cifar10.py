"""The CIFAR-10 example: a short run as a user starts it, and its parts."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from twofour.bench.table import Row
from twofour.bench.timing import Timing
from twofour.cli.output import Output
from twofour.core import patterns
from twofour.core.errors import GateError
from twofour.engine import Engine
from twofour.train import Schedule

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("TWOFOUR_DATA", REPOSITORY.parent / "shared" / "data"))
ENGINES = ("24/f32.engine", "24/int8.engine", "dense/f32.engine", "dense/int8.engine")


def start(*arguments, **environment):
    return subprocess.run(
        [sys.executable, REPOSITORY / "examples" / "cifar10_resnet20.py", *arguments],
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def part(name):
    """A module of the example."""
    folder = str(REPOSITORY / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def settings(out, **changes):
    fields = {
        "out": out,
        "depth": 20,
        "patterns": ("2:4",),
        "schedule": Schedule(epochs=12, lr=0.05, bf16=True),
        "batch_size": 128,
        "calibration": 512,
        "duration_s": 1.0,
        "short": False,
    }
    return part("cifar10.settings").Settings(**{**fields, **changes})


def timing(median_us):
    return Timing(
        median_us,
        median_us,
        median_us,
        0.0,
        20,
        (median_us,) * 20,
        median_us,
        median_us,
        1e6 / median_us,
    )


def rows(**changes):
    """A table whose gate is open; a change is (top1, median_us)."""
    figures = {
        "PyTorch f32": (0.9173, 3000.0),
        "ONNX Runtime f32": (0.9173, 700.0),
        "ONNX Runtime INT8, same file": (0.914, 900.0),
        "ONNX Runtime INT8, its best": (0.914, 330.0),
        "twofour 2:4 f32": (0.916, 500.0),
        "twofour 2:4 INT8": (0.915, 145.0),
    }
    figures.update(changes)
    return [Row(name, "", top1, timing(us), 1000) for name, (top1, us) in figures.items()]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    if not DATA.is_dir():
        pytest.skip(f"no data in {DATA}; set TWOFOUR_DATA")
    folder = tmp_path_factory.mktemp("cifar10")
    done = start("--short", "--pattern", "2:4", "--out", folder, "--table", folder / "table.md")
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(
        folder=folder,
        done=done,
        summary=json.loads((folder / "summary.json").read_text()),
    )


def test_short_run_measures_every_engine(short_run):
    measured = {row["name"]: row for row in short_run.summary["rows"]}
    assert {*rows_expected()} <= set(measured)
    assert all(row["median_us"] > 0 and row["size_bytes"] > 1000 for row in measured.values())
    assert measured["PyTorch f32"]["top1"] > 0.85, "the published network reads its images"
    assert measured["ONNX Runtime f32"]["top1"] == pytest.approx(measured["PyTorch f32"]["top1"])
    close = pytest.approx(measured["PyTorch f32"]["top1"], abs=0.02)
    assert measured["twofour dense f32"]["top1"] == close
    assert measured["twofour dense INT8"]["top1"] == close
    sparse = pytest.approx(measured["ONNX Runtime f32, 2:4"]["top1"], abs=0.01)
    assert measured["twofour 2:4 f32"]["top1"] == sparse
    same_file = pytest.approx(measured["ONNX Runtime INT8, same file"]["top1"], abs=0.01)
    assert measured["twofour 2:4 INT8"]["top1"] == same_file


def rows_expected():
    return [
        "PyTorch f32",
        "ONNX Runtime f32",
        "ONNX Runtime f32, 2:4",
        "ONNX Runtime INT8, same file",
        "ONNX Runtime INT8, its best",
        "twofour dense f32",
        "twofour dense INT8",
        "twofour 2:4 f32",
        "twofour 2:4 INT8",
    ]


def test_short_run_leaves_what_it_says(short_run):
    training = short_run.summary["training"]["2:4"]
    assert 0.5 < training["one_shot_top1"] < training["finetuned_top1"] + 0.05
    assert "no verdict" in short_run.done.stdout
    assert short_run.summary["gate"] == {}
    page = (short_run.folder / "table.md").read_text()
    assert all(f"| {name} |" in page for name in rows_expected())
    assert str(short_run.folder) not in page, "no path of this machine"
    assert "python examples/cifar10_resnet20.py --short --pattern 2:4" in page
    assert json.loads((short_run.folder / "table.json").read_text()) == short_run.summary


def test_short_run_file_and_engine_are_2_4(short_run):
    graph = onnx.load(short_run.folder / "24" / "int8.onnx").graph
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    weights = [a for a in arrays.values() if a.dtype == np.int8 and a.ndim == 4]
    assert sum(patterns.is_pattern(w, "2:4") for w in weights if w.shape[1] > 3) == 18
    layers = Engine.load(short_run.folder / "24" / "int8.engine").plan.layers
    assert sum("2:4" in layer.tactic or "sparse" in layer.tactic for layer in layers) >= 12


def test_second_run_makes_nothing_again(short_run):
    made = [short_run.folder / name for name in (*ENGINES, "24/int8.onnx", "24/finetune.pt")]
    before = {path: path.stat().st_mtime_ns for path in made}
    again = start("--short", "--pattern", "2:4", "--out", short_run.folder)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in made} == before
    assert "epoch 1/1" not in again.stderr, "the finished fine-tuning is not repeated"
    summary = json.loads((short_run.folder / "summary.json").read_text())
    top1 = [[row["top1"] for row in each["rows"]] for each in (summary, short_run.summary)]
    assert top1[0] == top1[1]


def test_missing_data_and_wrong_options(tmp_path):
    done = start("--out", tmp_path / "run", TWOFOUR_DATA=str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "set TWOFOUR_DATA" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "nothing left behind"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "3of4"], "unknown sparsity pattern '3of4'"),
        (["--pattern", "4:8"], "no 4:8 here"),
        (["--epochs", "0"], "must be at least 1"),
        (["--duration", "0"], "cannot measure for 0.0 seconds"),
    ],
)
def test_wrong_options(options, message, tmp_path, capsys):
    assert part("cifar10_resnet20").main([*options, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "nothing left behind"


@pytest.mark.parametrize(
    ("changes", "guilty"),
    [
        ({"twofour 2:4 INT8": (0.9122, 145.0)}, "twofour 2:4 INT8"),
        ({"twofour 2:4 f32": (0.9122, 500.0)}, "twofour 2:4 f32"),
        ({"twofour 2:4 INT8": (0.915, 331.0)}, "twofour 2:4 INT8"),
        ({"ONNX Runtime INT8, same file": (0.914, 140.0)}, "twofour 2:4 INT8"),
        ({"twofour 2:4 f32": (0.916, 701.0)}, "twofour 2:4 f32"),
        ({"twofour 2:4 INT8": (0.9123, 329.0), "twofour 2:4 f32": (0.9123, 699.0)}, None),
    ],
)
def test_the_gate(changes, guilty):
    verdicts = part("cifar10.measure").judge(rows(**changes), ["2:4"])
    assert set(verdicts) == {"twofour 2:4 f32", "twofour 2:4 INT8"}
    assert [name for name, v in verdicts.items() if not v.passed] == ([guilty] if guilty else [])


@pytest.mark.parametrize("top1", [0.915, 0.912])
def test_a_shut_gate_is_exit_code_1_after_the_table(top1, tmp_path):
    table = rows(**{"twofour 2:4 INT8": (top1, 145.0)})
    verdicts = part("cifar10.measure").judge(table, ["2:4"])
    training = {"2:4": {"one_shot_top1": 0.71, "finetuned_top1": 0.916}}
    result = part("cifar10.page").Result(10000, table, training, verdicts)
    report = part("cifar10_resnet20").report
    arguments = (settings(tmp_path), result, tmp_path / "new" / "table.md", Output(quiet=True))
    if top1 > 0.9123:
        report(*arguments)
    else:
        with pytest.raises(GateError, match="the gate is shut") as raised:
            report(*arguments)
        assert raised.value.exit_code == 1
    page = (tmp_path / "new" / "table.md").read_text()
    assert page.count("| twofour 2:4 INT8 |") == 1
    assert ("BROKEN: top-1 91.20 %" in page) == (top1 < 0.9123)
    assert "10,000 test images" in page
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["baseline"] == "ONNX Runtime INT8, its best"


def test_the_command_on_the_page(tmp_path):
    command = part("cifar10.page").command
    both = ("2:4", "2:4/pair")
    start_ = "python examples/cifar10_resnet20.py"
    assert command(settings(tmp_path, patterns=both)) == f"{start_} --bf16"
    changed = settings(
        tmp_path, depth=56, calibration=64, schedule=Schedule(epochs=3, lr=0.1, seed=7)
    )
    assert command(changed) == (
        f"{start_} --depth 56 --pattern 2:4 --epochs 3 --lr 0.1 --seed 7 --calibration 64"
    )


def test_a_file_is_made_once(tmp_path):
    once = part("cifar10.resume").once
    source, path = tmp_path / "source", tmp_path / "folder" / "made"
    source.write_text("a")

    def make():
        path.write_text(f"from {source.read_text()}")

    assert once(path, [source], "x", make)
    assert not once(path, [source], "x", make)
    assert once(path, [source], "y", make), "other options"
    source.write_text("b")
    assert once(path, [source], "y", make), "another source"
    assert path.read_text() == "from b"
    path.write_text("altered")
    assert once(path, [source], "y", make), "the file itself was altered"
    path.unlink()
    assert once(path, [source], "y", make), "the file is gone"
    path.with_name("made.from.json").write_text("{")
    assert once(path, [source], "y", make), "the record was cut short"


def test_a_file_whose_making_failed_is_made_again(tmp_path):
    once = part("cifar10.resume").once
    path = tmp_path / "made"
    assert once(path, [], "x", lambda: path.write_text("good"))

    def fail():
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        once(path, [], "y", fail)
    assert once(path, [], "x", lambda: path.write_text("good"))
