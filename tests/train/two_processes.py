"""One of several processes of a torch.distributed job: `python two_processes.py RANK FOLDER`.

Prunes and trains small networks, whole (DDP) and in parts (FSDP2), and writes what it saw as JSON,
for `test_distributed.py` to judge.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from twofour.core.errors import InputError
from twofour.core.masks import magnitude_mask
from twofour.train import Sparsifier
from twofour.train.holding import digest, local_part


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(8, 7, 3),  # 7 rows: 4 and 3
        nn.Flatten(),
        nn.Linear(28, 32),
        nn.ReLU(),
        nn.Linear(32, 1),  # 1 row: the second process has none
    )


def train(model, optimizer, rank, steps=3):
    for step in range(steps):
        torch.manual_seed(100 * step + rank)
        optimizer.zero_grad()
        for _ in range(2):  # gradients of two batches are added
            model(torch.randn(4, 8, 4, 4)).square().mean().backward()
        optimizer.step()


def masks(sparsifier):
    return {weight.name: digest(weight.mask) for weight in sparsifier.weights}


def whole(model):
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in full])


def ddp(rank):
    model = network(seed=rank)  # differ, until DDP makes them equal
    own = {n: digest(torch.from_numpy(m)) for n, m in numpy_masks(model).items()}
    sparsifier = Sparsifier(model).prune()
    pruned = masks(sparsifier)  # before DDP sends buffers
    wrapped = DistributedDataParallel(model)
    ema = AveragedModel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    sparsifier.attach(optimizer, ema)
    sparsifier.apply()
    train(wrapped, optimizer, rank)
    ema.update_parameters(model)
    sparsifier.verify()
    return {"own": own, "masks": pruned, "weights": whole(model).tolist()}


def numpy_masks(model):
    layers = {name: m for name, m in model.named_modules() if name in ("0", "2", "4")}
    return {n: magnitude_mask(m.weight.detach().numpy(), "2:4") for n, m in layers.items()}


def ddp_wrapped_first(rank):
    wrapped = DistributedDataParallel(network(seed=rank))
    sparsifier = Sparsifier(wrapped, exclude=["4"]).prune()
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01, momentum=0.9)
    sparsifier.attach(optimizer)
    train(wrapped, optimizer, rank)
    sparsifier.verify()
    names = [weight.name for weight in sparsifier.weights]
    return {"names": names, "masks": masks(sparsifier), "weights": whole(wrapped).tolist()}


def sharded(model):
    """Each layer by itself but the last, which stays gathered after a forward pass."""
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def fsdp(rank, prune_first):
    model = network(seed=5)
    expected = {n: digest(torch.from_numpy(m)) for n, m in numpy_masks(model).items()}
    sparsifier = Sparsifier(model)
    if prune_first:
        sparsifier.prune()
    sharded(model)
    if not prune_first:
        sparsifier.prune()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer)
    train(model, optimizer, rank)
    sparsifier.verify()
    strays = [strays_in(weight, optimizer) for weight in sparsifier.weights]
    gathered = apply_to_gathered(sparsifier)
    state = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    restored = rank != 0 or restores(state)
    return {
        "expected": expected,
        "masks": masks(sparsifier),
        "strays": strays,
        "gathered": gathered,
        "local_rows": [weight.parameter.to_local().shape[0] for weight in sparsifier.weights],
        "weights": whole(model).tolist(),
        "restored": restored,
    }


def apply_to_gathered(sparsifier):
    """Applies masks while FSDP2 has gathered weights: its parts have to be masked, not these.

    Returns how many weights were gathered.
    """
    with torch.no_grad():
        for weight in sparsifier.weights:
            weight.parameter.to_local().add_(1.0)
        sparsifier.model(torch.randn(2, 8, 4, 4))
    gathered = sum(not isinstance(weight.parameter, DTensor) for weight in sparsifier.weights)
    sparsifier.apply()
    sparsifier.model.reshard()
    sparsifier.verify()
    return gathered


def restores(state):
    """Whether a model in one piece takes up what a sharded one saved."""
    Sparsifier(network(seed=6)).restore(state).verify()
    return True


def strays_in(weight, optimizer):
    """Nonzeros where the mask is false, in the local part of the weight and of its averages."""
    tensors = [weight.parameter, *optimizer.state[weight.parameter].values()]
    tensors = [t for t in tensors if isinstance(t, DTensor) and t.shape == weight.mask.shape]
    count = 0
    for tensor in tensors:
        kept = distribute_tensor(weight.mask, tensor.device_mesh, tensor.placements).to_local()
        assert torch.equal(kept, local_part(weight.mask, tensor))
        count += int((tensor.to_local()[~kept] != 0).sum())
    return {"tensors": len(tensors), "count": count}


def resumed_in_parts(rank):
    """A sharded checkpoint goes into a sharded model that was never pruned."""
    model = sharded(network(seed=7))
    Sparsifier(model).prune()
    state = model.state_dict()
    other = sharded(network(seed=8))
    sparsifier = Sparsifier(other).restore(state)
    sparsifier.verify()
    return {"equal": bool(torch.equal(whole(model), whole(other)))}


def different_models(rank):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8 + 8 * rank))
    try:
        Sparsifier(model).prune()
    except InputError as e:
        return {"error": str(e)}
    return {"error": ""}


def main():
    rank, size, folder = int(sys.argv[1]), 2, Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    seen = {
        "ddp": ddp(rank),
        "ddp_wrapped_first": ddp_wrapped_first(rank),
        "fsdp_prune_first": fsdp(rank, True),
        "fsdp_shard_first": fsdp(rank, False),
        "resumed_in_parts": resumed_in_parts(rank),
        "different_models": different_models(rank),
    }
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    os._exit(0)  # Python's own exit sometimes aborts on threads that gloo has left


if __name__ == "__main__":
    main()
