"""This process as one of a `torch.distributed` job, where torchrun started several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

# Between two steps of training others may load data, or trace a model.
_PATIENCE = timedelta(minutes=30)


@contextmanager
def joined() -> Iterator[int]:
    """Joins the job that torchrun's environment names; without one there is nothing to join.

    Yields:
        The rank of this process, 0 for the first or only one.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        yield 0
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    yield dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()
