"""One of several processes of a job: `python two_processes_with_data.py RANK SIZE FOLDER`.

Prunes networks with calibration data, half of which each process has, and saves what came out, for
`test_data_of_ranks.py` to judge.
"""

import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from twofour.train import Sparsifier, reestimate_batchnorm

CRITERIA = ("wanda", "taylor", "sparsegpt")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 4)
    )


def batches():
    torch.manual_seed(1)
    return [torch.randn(6, 4, 4, 4) * torch.rand(1, 4, 1, 1) for _ in range(4)]


def loss(model, batch):
    return model(batch).square().mean()


def pruned(data, wrap):
    """What each criterion leaves, and BatchNorm statistics after it."""
    results = {}
    for criterion in CRITERIA:
        model = network()
        given = {"loss": loss} if criterion == "taylor" else {}
        Sparsifier(wrap(model), criterion=criterion).prune(data, **given)
        if data:
            reestimate_batchnorm(wrap(model), data)
        results[criterion] = model.state_dict()
    return results


if __name__ == "__main__":
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=size
    )
    results = pruned(batches()[rank::size], DistributedDataParallel)
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()
