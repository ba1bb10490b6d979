"""Two real processes (gloo), each with half of the batches, prune as one process with all."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("two_processes_with_data.py")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("two_processes_with_data", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    jobs = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), "2", str(folder)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [job.communicate(timeout=180)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], "\n\n".join(outputs)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("criterion", ["wanda", "taylor", "sparsegpt"])
def test_both_have_the_same_and_that_of_all_the_data(criterion, of_ranks, worker):
    first, second = (results[criterion] for results in of_ranks)
    alone = worker.pruned(worker.batches(), lambda model: model)[criterion]
    halves = [worker.pruned(worker.batches()[rank::2], lambda m: m)[criterion] for rank in (0, 1)]
    masks = [name for name in alone if name.endswith("_mask")]
    assert len(masks) == 3
    # Else the processes have nothing to agree about:
    assert any(not torch.equal(halves[0][name], halves[1][name]) for name in masks)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        if value.dtype == torch.bool:
            assert torch.equal(first[name], value), name
        else:
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
