"""Two real processes (gloo) recover a model together as one process with all of the batch does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train import recover_worker

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """What each process ended with: method -> state of the model."""
    folder = tmp_path_factory.mktemp("job")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    jobs = [
        subprocess.Popen(
            [sys.executable, recover_worker.__file__, str(rank), str(folder)],
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


@pytest.mark.parametrize("name", recover_worker.METHODS)
def test_two_processes_are_one(states, name):
    first, second = (state[name] for state in states)
    alone = recover_worker.recovered(name, lambda model: model, recover_worker.batches)
    assert first.keys() == second.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-5)
