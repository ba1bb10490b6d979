"""Two real processes (gloo) recover a model together as one process with all of the batch does."""

import pytest
import torch

from tests.train import recover_worker
from tests.train.processes import two_processes


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """What each process ended with: method -> state of the model."""
    folder = two_processes(recover_worker.__file__, tmp_path_factory.mktemp("job"))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", recover_worker.METHODS)
def test_two_processes_are_one(states, name):
    first, second = (state[name] for state in states)
    alone = recover_worker.recovered(name, lambda model: model, recover_worker.batches)
    assert first.keys() == second.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-5)
