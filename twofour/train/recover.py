"""Recovers the accuracy that pruning took: a small fine-tuning loop that can be resumed."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from twofour.core.errors import InputError
from twofour.train.sparsify import Sparsifier


class Batches(Protocol):
    """A sized iterable of (x, labels), such as a `torch.utils.data.DataLoader`."""

    def __len__(self) -> int:
        """How many batches there are."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over them."""


@dataclass(frozen=True)
class Schedule:
    """SGD with Nesterov momentum, its rate falling along a cosine from `lr` to 0.

    Args:
        epochs: passes over the training set.
        lr: the rate of the first step.
        momentum: of SGD.
        weight_decay: on all parameters.
        seed: of the randomness inside the model (dropout); each epoch has its own.
        bf16: run the forward pass under bfloat16 autocast; weights and momentum stay float32.
            Pays on CPUs with AVX512-BF16 or AMX and on GPUs, costs elsewhere.
        temperature: both outputs are divided by it before the teacher's is copied.
        teacher_share: of the loss, 0 to 1, where there is a teacher; the labels have the rest.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983 (cosine, without restarts).
    """

    epochs: int = 10
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0
    bf16: bool = False
    temperature: float = 4.0
    teacher_share: float = 0.9

    def rate(self, step: int, steps: int) -> float:
        """The rate of step `step` of `steps`."""
        return 0.5 * self.lr * (1.0 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class Progress:
    """Where a fine-tuning run is; handed to the progress callback after each batch.

    Args:
        epoch: counted from 0.
        batch: batches done in this epoch.
        batches: batches in this epoch.
        loss: mean training loss of this epoch so far.
        accuracy: share of training samples of this epoch that were right, 0 to 1.
    """

    epoch: int
    batch: int
    batches: int
    loss: float
    accuracy: float


def finetune(
    model: nn.Module,
    batches: Callable[[int], Batches],
    schedule: Schedule | None = None,
    *,
    sparsifier: Sparsifier | None = None,
    teacher: nn.Module | None = None,
    checkpoint: Path | str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> list[Progress]:
    """Trains the model in place, and leaves it in eval mode.

    The loss is cross entropy; with a teacher, mostly the divergence from the teacher's softened
    outputs (Hinton et al. 2015, arXiv:1503.02531): a pruned model recovers faster when it copies
    its dense parent than when it learns from the labels alone.

    With a checkpoint path, each epoch ends by replacing that file, and a run that finds the file
    goes on after the epoch it holds. A resumed run gives the weights of an uninterrupted one, as
    long as `batches(epoch)` depends on the epoch alone.

    Args:
        model: maps x to logits [B, classes].
        batches: epoch number -> its batches; the same number of them for each epoch.
        schedule: default `Schedule()`.
        sparsifier: pruned already; its masks are held and verified at the end.
        teacher: maps x to logits, put in eval mode; `schedule` says how its outputs count.
        checkpoint: file to resume from and to write.
        progress: called after each batch.

    Returns:
        The last `Progress` of each epoch, resumed ones included.

    Raises:
        InputError: the checkpoint is damaged or belongs to another run, or the loss is not finite.
        GateError: a pruned weight lost its pattern.
    """
    schedule = schedule or Schedule()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=schedule.lr,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
        nesterov=schedule.momentum > 0,
    )
    if sparsifier is not None:
        sparsifier.attach(optimizer)
    path = None if checkpoint is None else Path(checkpoint)
    history: list[Progress] = []
    if path is not None and path.exists():
        history = _resume(path, model, optimizer, schedule)
    model.train()
    if teacher is not None:
        teacher.eval()
    for epoch in range(len(history), schedule.epochs):
        with torch.random.fork_rng():
            torch.manual_seed(schedule.seed * 1_000_003 + epoch)
            history.append(
                _train_epoch(
                    model, optimizer, batches(epoch), _Epoch(epoch, schedule, teacher, progress)
                )
            )
        if path is not None:
            _save(path, model, optimizer, schedule, history)
    model.eval()
    if sparsifier is not None:
        sparsifier.verify()
    return history


def load_checkpoint(path: Path | str, model: nn.Module) -> list[Progress]:
    """Loads the weights and masks that `finetune` saved.

    Args:
        path: of the checkpoint.
        model: pruned as it was before the fine-tuning, so that it has buffers for the masks.

    Returns:
        The last `Progress` of each finished epoch.

    Raises:
        InputError: the file is missing, damaged, or from another model.
    """
    path = Path(path)
    state = _read(path)
    try:
        model.load_state_dict(state["model"])
        return [Progress(**entry) for entry in state["history"]]
    except (RuntimeError, TypeError) as e:
        raise InputError(f"{path} belongs to another model", [str(e)], _fix(path)) from e


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch_size: int = 250) -> Tensor:
    """The model's outputs in eval mode, batch by batch.

    Args:
        model: left in the mode it was in.
        x: [S, ...] samples.
        batch_size: samples at a time.

    Returns:
        [S, classes].
    """
    training = model.training
    model.eval()
    outputs = [model(x[i : i + batch_size]) for i in range(0, len(x), batch_size)]
    model.train(training)
    return torch.cat(outputs)


def evaluate(model: nn.Module, x: Tensor, labels: Tensor, batch_size: int = 250) -> float:
    """Top-1 accuracy in eval mode, 0 to 1.

    Args:
        model: maps x to logits; left in the mode it was in.
        x: [S, ...] samples.
        labels: [S] class indices.
        batch_size: samples at a time.

    Raises:
        InputError: there are no samples, or not one label for each.
    """
    if len(x) == 0 or len(x) != len(labels):
        raise InputError(
            "cannot evaluate",
            [f"expected a label for each sample; got {len(labels)} labels, {len(x)} samples"],
        )
    hits = predict(model, x, batch_size).argmax(1) == labels
    return float(hits.float().mean())


@dataclass(frozen=True)
class _Epoch:
    number: int
    schedule: Schedule
    teacher: nn.Module | None
    progress: Callable[[Progress], None] | None


def _loss(epoch: _Epoch, x: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, and with a teacher the divergence from it; a scalar."""
    hard = functional.cross_entropy(logits, labels)
    if epoch.teacher is None:
        return hard
    temperature, share = epoch.schedule.temperature, epoch.schedule.teacher_share
    with torch.no_grad():
        wanted = functional.log_softmax(epoch.teacher(x).float() / temperature, dim=1)
    got = functional.log_softmax(logits.float() / temperature, dim=1)
    soft = functional.kl_div(got, wanted, log_target=True, reduction="batchmean")
    # The gradient of the soft loss shrinks with the square of the temperature.
    return (1 - share) * hard + share * temperature**2 * soft


def _train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, epoch: _Epoch
) -> Progress:
    count = len(batches)
    steps = count * epoch.schedule.epochs
    loss_sum, hits, seen = 0.0, 0, 0
    done = Progress(epoch.number, 0, count, math.nan, math.nan)
    for i, (x, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = epoch.schedule.rate(epoch.number * count + i, steps)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=epoch.schedule.bf16):
            logits = model(x)
            loss = _loss(epoch, x, logits, labels)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise InputError(
                f"the training loss became {loss.item()} in epoch {epoch.number}, batch {i}",
                fix="lower Schedule.lr, or look for NaN in the training data",
            )
        loss_sum += loss.item() * len(x)
        hits += int((logits.argmax(1) == labels).sum())
        seen += len(x)
        done = Progress(epoch.number, i + 1, count, loss_sum / seen, hits / seen)
        if epoch.progress is not None:
            epoch.progress(done)
    return done


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    history: list[Progress],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    state = {
        "schedule": asdict(schedule),
        "history": [asdict(entry) for entry in history],
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, temporary)
    os.replace(temporary, path)


def _resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule
) -> list[Progress]:
    state = _read(path)
    differ = [
        f"{name}: {state['schedule'].get(name)} there, {value} here"
        for name, value in asdict(schedule).items()
        if state["schedule"].get(name) != value
    ]
    if differ:
        raise InputError(f"{path} belongs to a run with another schedule", differ, _fix(path))
    history = load_checkpoint(path, model)
    try:
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as e:
        raise InputError(f"{path} belongs to another model", [str(e)], _fix(path)) from e
    return history


def _read(path: Path) -> dict[str, Any]:
    """The checkpoint as plain data and tensors."""
    missing = set()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"schedule", "history", "model", "optimizer"} - set(state)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, TypeError) as e:
        raise InputError(
            f"cannot read the fine-tuning checkpoint {path}", [str(e)], _fix(path)
        ) from e
    if missing:
        raise InputError(
            f"{path} is no fine-tuning checkpoint", [f"it has no {sorted(missing)}"], _fix(path)
        )
    return dict(state)


def _fix(path: Path) -> str:
    return f"delete {path} to start over, or name another checkpoint"
