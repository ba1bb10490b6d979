"""A small network that is pruned, quantized and trained in half precision, on any device."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from twofour.train import Quantizer, QuantizerOptions, Schedule, Sparsifier

SCHEDULE = Schedule(epochs=2, lr=0.05)
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Net(nn.Module):
    """Convolutions with BatchNorm and a residual, a linear layer, an embedding of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(x)))
        x = functional.relu(x + self.second(x))
        y: Tensor = self.last(x.mean((2, 3)))
        return y


def network(device: str = "cpu") -> Net:
    torch.manual_seed(0)
    return Net().to(device)


def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
    """On the CPU: `finetune` moves them."""
    random = torch.Generator().manual_seed(epoch)
    x = torch.randn(6, 16, 4, 6, 6, generator=random)
    return [(part, part.mean((2, 3)).argmax(1)) for part in x]


def schedule(precision: str, **more: Any) -> Schedule:
    return dataclasses.replace(SCHEDULE, **{precision: True}, **more)


def pruned(device: str = "cpu") -> tuple[Net, Sparsifier]:
    model = network(device)
    return model, Sparsifier(model).prune()


def quantized(model: nn.Module, learned: bool = False) -> Quantizer:
    given = [x for x, _ in batches(9)]
    return Quantizer(model, given[0], QuantizerOptions(learned_scales=learned)).calibrate(given)


def strays(model: nn.Module) -> int:
    """How many weights are not zero although a mask removes them."""
    masked = [module for module in model.modules() if "weight_mask" in module._buffers]
    assert masked
    return sum(int((m.get_parameter("weight")[~m.weight_mask] != 0).sum()) for m in masked)


def stray_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The same of what an optimizer keeps for them."""
    count = 0
    for module in model.modules():
        mask = module._buffers.get("weight_mask")
        state = {} if mask is None else optimizer.state[module.get_parameter("weight")]
        kept = [v for v in state.values() if isinstance(v, Tensor) and v.shape == mask.shape]
        count += sum(int((each[~mask] != 0).sum()) for each in kept)
    return count


OPTIMIZERS: dict[str, Any] = {
    "sgd, foreach": lambda p: torch.optim.SGD(p, 0.05, 0.9, foreach=True),
    "sgd, fused": lambda p: torch.optim.SGD(p, 0.05, 0.9, fused=True),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
}


def own_loop(device: str, make: Any, skipped: tuple[int, ...] = (1,)) -> tuple[Net, int]:
    """A loop as users write it, with a GradScaler that leaves out some steps.

    Returns:
        The model, and how many of its six steps moved a weight.
    """
    model, sparsifier = pruned(device)
    optimizer = make(model.parameters())
    sparsifier.attach(optimizer)
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    moved = 0
    for step, (x, labels) in enumerate(batches(0)):
        with torch.autocast(device, torch.float16):
            loss = functional.cross_entropy(model(x.to(device)), labels.to(device))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step in skipped:
            assert model.second.weight.grad is not None
            model.second.weight.grad[0, 0, 0, 0] = float("inf")
        before = model.second.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        moved += not torch.equal(before, model.second.weight)
        assert strays(model) == stray_states(model, optimizer) == 0, step
    sparsifier.verify()
    return model, moved
