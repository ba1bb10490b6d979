"""The short CIFAR-10 run, as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from twofour.core import patterns

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("TWOFOUR_DATA", REPOSITORY.parent / "shared" / "data"))


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
        timeout=300,
    )


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}; set TWOFOUR_DATA")
def test_short_run_and_again(tmp_path):
    options = ("--short", "--pattern", "2:4/pair", "--out", tmp_path / "run")
    done = start(*options)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["top1_dense_f32"] > 0.85
    assert summary["top1_one_shot_f32"] < summary["top1_sparse_f32"] + 0.05
    assert summary["sparse_weights"] == 18
    graph = onnx.load(tmp_path / "run" / "model.onnx").graph
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "Conv" and node.name != "conv1":
            assert patterns.is_pattern(weights[node.input[1]], "2:4/pair"), node.name

    again = start(*options)
    assert again.returncode == 0, again.stderr
    assert "epoch 1/1" not in again.stdout, "the finished fine-tuning is not repeated"
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_missing_data_and_wrong_options(tmp_path):
    done = start("--out", tmp_path / "run", TWOFOUR_DATA=str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "set TWOFOUR_DATA" in done.stderr
    assert "Traceback" not in done.stderr
    done = start("--out", tmp_path / "run", "--pattern", "3of4")
    assert done.returncode == 2
    assert "unknown sparsity pattern '3of4'" in done.stderr
    assert not (tmp_path / "run").exists(), "nothing left behind"
