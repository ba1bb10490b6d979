"""One of two processes: `python quantize_worker.py RANK FOLDER`, for test_quantize.py.

Calibrates a small network on this process's half of the data, fine-tunes it on its half of each
batch, and writes what it is then.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from twofour.train import Quantizer, QuantizerOptions, Schedule, Sparsifier, finetune

EPOCHS, BATCHES = 2, 4


def batches(epoch, part=slice(None)):
    random = torch.Generator().manual_seed(epoch)
    x = torch.randn(BATCHES, 32, 8, generator=random)
    return [(rows[part], rows[part, :3].argmax(1)) for rows in x]


def trained(wrap, part=slice(None), learned=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    sparsifier = Sparsifier(model).prune()
    options = QuantizerOptions(learned_scales=learned)
    quantizer = Quantizer(model, torch.zeros(2, 8), options).calibrate(batches(9, part))
    schedule = Schedule(EPOCHS, 0.05)
    finetune(wrap(model), lambda epoch: batches(epoch, part), schedule, method=sparsifier)
    quantizer.verify()
    return model.state_dict()


def main(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), world_size=2, rank=rank)
    half = slice(rank * 16, rank * 16 + 16)
    states = [trained(DistributedDataParallel, half, learned) for learned in (False, True)]
    torch.save(states, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
