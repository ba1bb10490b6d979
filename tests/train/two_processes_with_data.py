"""One of several processes of a job: `python two_processes_with_data.py RANK FOLDER`.

Prunes networks with calibration data, half of which each process has, and saves what came out, for
`test_data_of_ranks.py` to judge.
"""

import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from twofour.core.ranges import RangeOptions
from twofour.train import Sparsifier, reestimate_batchnorm
from twofour.train.fake_quant import FakeQuant
from twofour.train.observe import Observer

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


def counted(data):
    """What calibration for quantization remembers of the batches, and the scale it takes."""
    observer, quant = Observer(torch.device("cpu")), FakeQuant(RangeOptions("mse"))
    quant.mode = "collect"
    for index, batch in enumerate(data):
        scaled = batch * 4**index  # so that processes end with other limits
        observer.add(scaled)
        quant(scaled)
    seen = observer.histogram()
    quant.compute()
    ends = (seen.low, seen.high, seen.limit, seen.zeros)
    return {"counts": torch.from_numpy(seen.counts), "ends": ends, **quant.state_dict()}


if __name__ == "__main__":
    rank, size, folder = int(sys.argv[1]), 2, Path(sys.argv[2])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=size
    )
    results = pruned(batches()[rank::size], DistributedDataParallel)
    results["counted"] = counted(batches()[:3] if rank == 0 else batches()[3:])
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()
