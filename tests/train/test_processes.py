"""Which device a process of a training job has."""

import pytest
import torch

from twofour.core.errors import UnsupportedError
from twofour.train.processes import find_device, name_of


@pytest.fixture
def gpus(monkeypatch):
    """Says how many GPUs PyTorch has, and which of several processes this is."""

    def given(count, rank=0, processes=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    return given


@pytest.mark.parametrize(
    ("wanted", "count", "rank", "processes", "device"),
    [
        ("auto", 0, 1, 2, "cpu"),
        ("auto", 1, 0, 1, "cuda:0"),
        ("cuda", 2, 1, 2, "cuda:1"),
        ("cpu", 2, 1, 2, "cpu"),
    ],
)
def test_each_process_has_its_own(gpus, wanted, count, rank, processes, device):
    gpus(count, rank, processes)
    assert str(find_device(wanted)) == device


@pytest.mark.parametrize(("wanted", "count", "processes"), [("cuda", 0, 1), ("auto", 1, 2)])
def test_too_few_are_not_shared_in_silence(gpus, wanted, count, processes):
    gpus(count, 0, processes)
    with pytest.raises(UnsupportedError, match="a GPU for each process") as caught:
        find_device(wanted)
    assert f"expected {processes}" in str(caught.value)
    assert "set device: cpu" in caught.value.fix


def test_the_cpu_has_a_name():
    assert name_of(torch.device("cpu")) == "the CPU"
