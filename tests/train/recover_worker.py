"""One of two processes: `python recover_worker.py RANK FOLDER`, for test_recover_ddp.py.

Fine-tunes a small network on this process's half of each batch and writes the weights it has then.
"""

import copy
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from twofour.train import Distiller, Gradual, Schedule, Shrink, Sparsifier, SrSte, finetune

EPOCHS, BATCHES = 3, 5
METHODS = {"sparsifier": None, "srste": SrSte, "gradual": Gradual, "shrink": Shrink}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))


def batches(epoch, part=slice(None)):
    random = torch.Generator().manual_seed(epoch)
    x = torch.randn(BATCHES, 32, 8, generator=random)
    return [(rows[part], rows[part, :3].argmax(1)) for rows in x]


def method(name, model):
    kind = METHODS[name]
    sparsifier = Sparsifier(model)
    return kind(sparsifier, EPOCHS * BATCHES) if kind else sparsifier.prune()


def recovered(name, wrap, told, checkpoint=None):
    model = network()
    teacher = copy.deepcopy(model)
    chosen = method(name, model)
    wrapped = wrap(model)
    # Weight 0: the hidden layer is seen, but its loss is no mean over samples.
    loss = Distiller(wrapped, teacher, hidden={"0": 0.0})
    schedule = Schedule(EPOCHS, 0.05, ema=0.9)
    finetune(wrapped, told, schedule, method=chosen, loss=loss, checkpoint=checkpoint)
    return model.state_dict()


def main(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), world_size=2, rank=rank)
    half = slice(rank * 16, rank * 16 + 16)
    states = {}
    for name in (*METHODS, *METHODS):  # the second time from the checkpoint
        path = folder / f"{name}.pt"
        states[name] = recovered(name, DistributedDataParallel, lambda e: batches(e, half), path)
        dist.barrier()
    torch.save(states, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
