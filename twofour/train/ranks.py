"""Several processes of `torch.distributed` on one model: what each knows, all know.

Without `torch.distributed`, or before it is initialised, there is one process and nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, distributed


def several() -> bool:
    """Whether this process is one of several."""
    running = distributed.is_available() and distributed.is_initialized()
    return running and distributed.get_world_size() > 1


def sum_over_ranks(sums: Iterable[Tensor]) -> None:
    """Adds up tensors in place over all processes.

    Args:
        sums: the same number of them, of the same shapes, in each process.
    """
    if several():
        for value in sums:
            distributed.all_reduce(value)


def max_over_ranks(values: Iterable[Tensor]) -> None:
    """Takes the maximum of tensors in place over all processes.

    Args:
        values: the same number of them, of the same shapes, in each process.
    """
    if several():
        for value in values:
            distributed.all_reduce(value, distributed.ReduceOp.MAX)


def from_first_rank(values: Iterable[Tensor]) -> None:
    """Replaces tensors in place by those of the first process.

    Args:
        values: the same number of them, of the same shapes, in each process.
    """
    if several():
        for value in values:
            distributed.broadcast(value, src=0)


def over_all_ranks(names: list[str]) -> list[str]:
    """The names that any process has, each once, in one order for all of them.

    Args:
        names: of this process.
    """
    if not several():
        return names
    lists: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(lists, names)
    return list(dict.fromkeys(name for each in lists for name in each))
