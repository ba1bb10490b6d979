"""Two real processes (gloo), each with half of the batches, prune as one process with all."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.train.processes import two_processes

WORKER = Path(__file__).with_name("two_processes_with_data.py")


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("two_processes_with_data", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    folder = two_processes(WORKER, tmp_path_factory.mktemp("job"))
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


def test_scales_come_from_the_values_of_all_processes(of_ranks, worker):
    first, second = (results["counted"] for results in of_ranks)
    data = worker.batches()
    scaled = [data[0], data[1] * 4, data[2] * 16, data[3]]  # the second begins anew
    alone = worker.counted([batch / 4**index for index, batch in enumerate(scaled)])
    for name in ("counts", "scale", "zero_point"):
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name], alone[name]), name
    assert first["ends"] == second["ends"] == alone["ends"]
