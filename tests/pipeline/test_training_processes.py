"""Training jobs as the pipeline starts them: in processes of their own, one or two of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from twofour.core.errors import GateError, InputError, UnsupportedError
from twofour.pipeline.jobs import Job
from twofour.pipeline.torchrun import LOG, run_job

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CODE = "tests.train.recipe_code"
MODEL = "model.safetensors"
PATIENCE_S = 120


def job(folder, stage, settings=None, data=None, code="model", **inputs):
    """A job in a folder that is made."""
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Job(
        stage=stage,
        seed=3,
        threads=1,
        device="auto",
        model={
            "torch": f"{CODE}:{code}",
            "example": f"{CODE}:example",
            "checkpoint": None,
            "inputs": ["x"],
            "outputs": ["y"],
            "dynamic": ["batch"],
        },
        data={"train": f"{CODE}:train", "calibrate": None, "evaluate": None, **(data or {})},
        settings=settings or {},
        inputs={name: str(path) for name, path in inputs.items()},
        output=str(folder / "out"),
        scratch=str(folder / "scratch"),
    )


def weights(folder):
    return load_file(folder / "out" / MODEL)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A network without BatchNorm, loaded and pruned: paths of both."""
    root = tmp_path_factory.mktemp("plain")
    run_job(job(root / "load", "load", code="plain"), ROOT)
    dense = root / "load" / "out" / MODEL
    settings = {"pattern": "2:4", "exclude": ["layers.2"]}
    run_job(job(root / "sparsify", "sparsify", settings, code="plain", start=dense), ROOT)
    return {"teacher": dense, "start": root / "sparsify" / "out" / MODEL}


FINETUNE = {"epochs": 4, "lr": 0.05}


@pytest.fixture(scope="module")
def alone(plain, tmp_path_factory):
    """What one process ends with: the result, what was reported, and the folder."""
    folder, told = tmp_path_factory.mktemp("alone"), []
    made = job(folder, "finetune", FINETUNE, {"train": f"{CODE}:talks"}, "plain", **plain)
    result = run_job(made, ROOT, lambda *at: told.append(at))
    return result, told, folder


def test_a_job_reports_and_leaves_its_figures(alone):
    result, told, folder = alone
    assert result.outputs["model"].file == MODEL
    epochs = result.documents["finetune"]["epochs"]
    assert [each["epoch"] for each in epochs] == [1, 2, 3, 4]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert told[-1][:2] == (16, 16)
    assert told[-1][2].startswith("epoch 4 of 4, loss ")
    assert json.loads((folder / "out" / "result.json").read_bytes())["text"] == result.text


def test_what_the_users_code_prints_is_in_the_log(alone):
    _, told, folder = alone
    log = (folder / "scratch" / LOG).read_text()
    assert log.count("seen by nobody but the log") == 4
    assert not any("seen by" in what for _, _, what in told)


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(plain, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("KILL_ONCE", str(tmp_path / "killed"))
    made = job(tmp_path, "finetune", FINETUNE, {"train": f"{CODE}:killed"}, "plain", **plain)
    with pytest.raises(UnsupportedError, match="was killed by signal 9"):
        run_job(made, ROOT)
    assert not list((tmp_path / "out").iterdir())
    told = []
    run_job(made, ROOT, lambda *at: told.append(at[0]))
    assert min(told) > 8, "two epochs of four batches were not done again"
    straight = alone[2] / "out" / MODEL
    assert (tmp_path / "out" / MODEL).read_bytes() == straight.read_bytes()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_end_as_one(plain, alone, tmp_path, parallel):
    settings = {**FINETUNE, "processes": 2, "parallel": parallel}
    result = run_job(job(tmp_path, "finetune", settings, None, "plain", **plain), ROOT)
    one, two = weights(alone[2]), weights(tmp_path)
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-3, atol=1e-5)
    mask = two["layers.0.weight_mask"]
    assert not two["layers.0.weight"][~mask].any()
    assert len(result.documents["finetune"]["epochs"]) == 4


def test_an_error_of_the_second_process_is_told(plain, tmp_path):
    train = {"train": f"{CODE}:raises_in_the_second"}
    settings = {**FINETUNE, "processes": 2}
    with pytest.raises(InputError, match="code of the recipe failed") as caught:
        run_job(job(tmp_path, "finetune", settings, train, "plain", **plain), ROOT)
    assert "ValueError: the second process alone" in str(caught.value)


def test_batches_that_cannot_be_shared(plain, tmp_path):
    settings = {**FINETUNE, "processes": 2}
    train = {"train": f"{CODE}:small"}
    with pytest.raises(InputError, match="batch 0 cannot be shared by 2 processes"):
        run_job(job(tmp_path, "finetune", settings, train, "plain", **plain), ROOT)


def test_an_error_of_the_users_code_shows_the_users_lines(plain, tmp_path):
    train = {"train": f"{CODE}:raises"}
    with pytest.raises(InputError) as caught:
        run_job(job(tmp_path, "finetune", FINETUNE, train, "plain", **plain), ROOT)
    error = caught.value
    assert error.what == "stage finetune: code of the recipe failed"
    assert error.reasons[0] == "ValueError: no such scan"
    assert error.reasons[-1].endswith('in raises: raise ValueError("no such scan")')
    assert "recipe_code.py:" in error.reasons[-1]
    log = tmp_path / "scratch" / LOG
    assert str(log) in error.fix
    assert "Traceback (most recent call last)" in log.read_text()
    assert not list((tmp_path / "out").iterdir())


def test_an_error_of_ours_comes_as_it_is(plain, tmp_path):
    broken = tmp_path / "cut.safetensors"
    broken.write_bytes(plain["start"].read_bytes()[:100])
    with pytest.raises(InputError, match="cannot read the weights"):
        run_job(job(tmp_path, "export", code="plain", sparse=broken), ROOT)


def test_without_pytorch_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'twofour\[train\]'"):
        run_job(job(tmp_path, "load"), ROOT)


def test_export_leaves_files_that_compute_the_same(plain, tmp_path):
    made = job(tmp_path, "export", None, {"calibrate": f"{CODE}:calibrate"}, "plain")
    inputs = {"dense": str(plain["teacher"]), "sparse": str(plain["start"])}
    result = run_job(Job(**{**vars(made), "inputs": inputs}), ROOT)
    assert {name: each.file for name, each in result.outputs.items()} == {
        "dense": "dense.onnx",
        "sparse": "sparse.onnx",
    }
    models = result.documents["export"]["models"]
    assert all(each["difference"] < 1e-5 for each in models.values())
    assert models["sparse"]["patterns"] == {"layers.0": "2:4"}
    assert (tmp_path / "out" / "sparse.onnx").stat().st_size > 1000


def test_a_file_that_computes_something_else_is_found(plain, tmp_path):
    code = (tmp_path / "other.py", "import torch\n", "class Net")
    path, head, name = code
    path.write_text(
        f"{head}{name}(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(64, 4)\n"
        "    def forward(self, x):\n"
        "        y = self.linear(x.flatten(1))\n"
        "        return y if torch.compiler.is_compiling() else y + 1\n"
        "def model():\n"
        "    return Net()\n"
    )
    made = job(tmp_path, "load")
    made = Job(**{**vars(made), "model": {**made.model, "torch": "other:model"}})
    run_job(made, tmp_path)
    again = {"stage": "export", "inputs": {"dense": str(tmp_path / "out" / MODEL)}}
    with pytest.raises(GateError, match="does not compute what the PyTorch model does"):
        run_job(Job(**{**vars(made), **again}), tmp_path)


@pytest.mark.parametrize(("processes", "how"), [(1, "SIGINT"), (1, "SIGKILL"), (2, "SIGKILL")])
def test_no_process_is_left_behind(plain, tmp_path, processes, how):
    """The one who waits is ended while its workers are within the user's code."""
    pids = tmp_path / "pids"
    pids.mkdir()
    settings = {**FINETUNE, "processes": processes}
    made = job(tmp_path, "finetune", settings, {"train": f"{CODE}:stuck"}, "plain", **plain)
    made.write(tmp_path / "job.json")
    script = (
        "import sys; from pathlib import Path; from twofour.pipeline.jobs import Job\n"
        "from twofour.pipeline.torchrun import run_job\n"
        "run_job(Job.read(Path(sys.argv[1])), Path(sys.argv[2]))\n"
    )
    waiting = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "job.json"), str(ROOT)],
        env={**os.environ, "STUCK": str(pids), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    try:
        workers = wait_for(lambda: [int(p.name) for p in pids.iterdir()], processes)
        assert all(map(runs, workers))
        waiting.send_signal(signal.Signals[how])
        waiting.communicate(timeout=PATIENCE_S)
    finally:
        waiting.kill()
    wait_for(lambda: [pid for pid in workers if not runs(pid)], processes)


def wait_for(found, count):
    end_s = time.monotonic() + PATIENCE_S
    while len(found()) < count:
        assert time.monotonic() < end_s, found()
        time.sleep(0.1)
    return found()


def runs(pid):
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
