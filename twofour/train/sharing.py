"""One training in several processes of `torch.distributed`: who has which samples and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from twofour.core.errors import InputError
from twofour.train.batches import Batches, device_of, samples_in
from twofour.train.calibration import bare
from twofour.train.ranks import several


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return not several() or dist.get_rank() == 0


def spread(model: nn.Module, parallel: str) -> nn.Module:
    """The model as several processes train it together; alone, itself.

    Args:
        model: the same in each process, masks and quantizers included.
        parallel: `ddp`: each process has all weights; `fsdp2`: each has a part of each.

    Returns:
        What is to be trained; the model's own modules are in it.
    """
    if not several():
        return model
    if parallel == "ddp":
        # Masks do not change, and the statistics of BatchNorm are taken from the first process.
        return DistributedDataParallel(model, find_unused_parameters=True)
    # By default it would be that of the machine's accelerator, whatever the model is on.
    mesh = init_device_mesh(device_of(model).type, (dist.get_world_size(),))
    for child in model.children():
        runs = type(child).forward is not nn.Module.forward  # a ModuleList is not called
        if runs and any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The state of a model in one piece; every process has to call it, the first one gets it."""
    inner = bare(model)
    if not isinstance(inner, FSDPModule):
        return dict(inner.state_dict())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(inner, options=options))


def shared_batches(batches: Callable[[int], Batches]) -> Callable[[int], Batches]:
    """Of each batch this process's part: equal ones, in the order of the processes.

    The mean of the processes' losses is then that of the batch. Samples that cannot be shared
    equally, fewer than there are processes, are left out.

    Args:
        batches: epoch -> batches, the same in each process.
    """
    if not several():
        return batches
    return lambda epoch: _Parts(batches(epoch), dist.get_rank(), dist.get_world_size())


class _Parts:
    """One pass over parts of batches."""

    def __init__(self, batches: Batches, rank: int, processes: int) -> None:
        self.batches, self.rank, self.processes = batches, rank, processes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.batches):
            count = samples_in(batch)
            each = count // self.processes
            if not each:
                raise InputError(
                    f"batch {index} cannot be shared by {self.processes} processes",
                    [f"expected at least a sample for each, got {count}"],
                    "make larger batches, leave the last small one out (drop_last), or use fewer "
                    "processes",
                )
            yield _rows(batch, count, slice(self.rank * each, (self.rank + 1) * each))


def _rows(batch: Any, count: int, rows: slice) -> Any:
    """Some samples of a batch; what does not count samples stays whole."""
    if isinstance(batch, Tensor):
        return batch[rows] if batch.ndim and len(batch) == count else batch
    if isinstance(batch, Mapping):
        return {name: _rows(value, count, rows) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        cut = [_rows(value, count, rows) for value in batch]
        if hasattr(batch, "_fields"):
            return type(batch)(*cut)
        return tuple(cut) if isinstance(batch, tuple) else cut
    return batch


def wait_for_all() -> None:
    """Returns once every process has come here."""
    if several():
        flag = torch.zeros(1)
        dist.all_reduce(flag)
