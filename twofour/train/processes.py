"""This process as one of a `torch.distributed` job, where torchrun started several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from twofour.core.errors import UnsupportedError

# Between two steps of training others may load data, or trace a model.
_PATIENCE = timedelta(minutes=30)
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def find_device(wanted: str) -> torch.device:
    """Where this process trains: of several on one machine each has a GPU of its own.

    Args:
        wanted: cpu, cuda, or auto: cuda where PyTorch has it.

    Raises:
        UnsupportedError: PyTorch has no GPU, or fewer than there are processes.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not count):
        return torch.device("cpu")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if count < processes:
        raise UnsupportedError(
            f"device: {wanted} needs a GPU for each process",
            [f"expected {processes}, PyTorch {torch.__version__} has {count}"],
            "set device: cpu, or fewer processes",
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def name_of(device: torch.device) -> str:
    """What people call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


@contextmanager
def joined(device: torch.device) -> Iterator[int]:
    """Joins the job that torchrun's environment names; without one there is nothing to join.

    Args:
        device: that this process trains on.

    Yields:
        The rank of this process, 0 for the first or only one.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        yield 0
        return
    dist.init_process_group(_BACKENDS[device.type], timeout=_PATIENCE)
    yield dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()
