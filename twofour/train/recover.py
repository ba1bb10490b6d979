"""Recovers the accuracy that pruning took: a small fine-tuning loop that can be resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from twofour.core.errors import InputError, UnsupportedError
from twofour.train.average import Average
from twofour.train.batches import Batches, device_of, samples_in, to_device
from twofour.train.calibration import Loss, bare, count_of, modes_kept
from twofour.train.checkpoint import Progress, Stateful, resume_run, save_run
from twofour.train.distill import Distiller
from twofour.train.half_precision import HalfPrecision
from twofour.train.method import Method
from twofour.train.objective import Objective, objective
from twofour.train.schedule import Schedule
from twofour.train.sparsify import Sparsifier

# How often a run reads its loss from the device and reports; reading waits for the device.
PROGRESS_EVERY_S = 0.1


def finetune(
    model: nn.Module,
    batches: Callable[[int], Batches],
    schedule: Schedule | None = None,
    *,
    method: Sparsifier | Method | None = None,
    loss: Loss | Distiller | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    checkpoint: Path | str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> list[Progress]:
    """Trains the model in place, and leaves it in eval mode.

    With a checkpoint path, each epoch ends by replacing that file, and a run that finds the file
    goes on after the epoch it holds. A resumed run gives the weights of an uninterrupted one, bit
    for bit, as long as `batches(epoch)` depends on the epoch alone and the device computes the same
    twice.

    Args:
        model: any; on any device, wrapped by `torch.compile` or DistributedDataParallel or not.
            With the default loss it maps x to logits [B, classes].
        batches: epoch number -> its batches; the same number of them for each epoch. Tensors that
            are not on the model's device are moved there.
        schedule: default `Schedule()`.
        method: a sparsifier that has pruned, whose masks are held; or `Gradual`, `SrSte` or
            `Shrink`. What it promises is verified at the end.
        loss: (model, batch) -> a scalar; or a `Distiller`; default: cross entropy of
            `model(x)` and labels.
        evaluate: model in eval mode -> a figure of merit, asked after each epoch.
        checkpoint: file to resume from and to write.
        progress: called about ten times a second, and after the last batch of each epoch.

    Returns:
        The last `Progress` of each epoch, resumed ones included.

    Raises:
        InputError: the checkpoint is damaged or belongs to another run, an epoch has no batches or
            not as many as its length says, the warm-up is longer than the training, or the loss or
            the weights are not finite.
        GateError: a pruned weight lost its pattern.
        UnsupportedError: a checkpoint, or float16, with weights that FSDP spreads over processes.
    """
    if not callable(batches):
        raise InputError("finetune asks for the batches of each epoch", fix="lambda epoch: loader")
    schedule = schedule or Schedule()
    run = _Run(model, schedule, objective(loss, schedule), progress)
    parts = run.prepare(method)
    path = None if checkpoint is None else Path(checkpoint)
    spread = any(isinstance(p, DTensor) for p in model.parameters())
    if spread and schedule.fp16:
        raise UnsupportedError(
            "cannot scale the gradients of weights that are spread over processes",
            ["Schedule.fp16; each process would leave out other steps"],
            "set Schedule.bf16 instead",
        )
    if path is not None and spread:
        raise UnsupportedError(
            f"cannot keep a checkpoint {path} of weights that are spread over processes",
            fix="leave checkpoint out, and save with torch.distributed.checkpoint from `evaluate`",
        )
    history = resume_run(path, schedule, parts) if path is not None and path.exists() else []
    model.train()
    for epoch in range(len(history), schedule.epochs):
        with _seeded(schedule.seed * 1_000_003 + epoch, run.device):
            entry = run.epoch(epoch, batches(epoch))
        history.append(run.settle(entry, _sparsifier(method), evaluate))
        if path is not None:
            save_run(path, schedule, history, parts)
    if run.average is not None and schedule.ema_stays:
        run.average.exchange()
    model.eval()
    _hand_over(method)
    return history


class _Run:
    """What a run holds between its steps."""

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        objective: Objective,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.model, self.schedule, self.objective = model, schedule, objective
        self.progress = progress
        self.device = device_of(model)
        self.optimizer = schedule.optimizer.build(model, schedule.lr)
        self.precision = HalfPrecision(schedule, self.optimizer, self.device)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.average = Average(model, schedule.ema) if schedule.ema else None
        self.method: Sparsifier | Method | None = None

    def prepare(self, method: Sparsifier | Method | None) -> dict[str, Stateful]:
        """Attaches the method; returns what a checkpoint holds."""
        self.method = method
        if method is not None:
            method.attach(self.optimizer)
        parts: dict[str, Stateful] = {"model": bare(self.model), "optimizer": self.optimizer}
        if self.average is not None:
            parts["average"] = self.average
        if self.precision.scaler is not None:
            parts["scaler"] = self.precision.scaler
        if method is not None and not isinstance(method, Sparsifier):
            parts[type(method).__name__] = method
        return parts

    def epoch(self, number: int, batches: Batches) -> Progress:
        """Trains on each batch once."""
        length = _length(number, batches)
        total = length * self.schedule.epochs
        if isinstance(self.method, Method) and self.method.steps != total:
            raise InputError(
                f"{type(self.method).__name__} was made for {self.method.steps} steps",
                [f"{self.schedule.epochs} epochs of {length} batches are {total}"],
                f"make it with steps={total}",
            )
        tally = _Tally(number, length, self.device)
        for i, batch in enumerate(batches):
            batch = to_device(batch, self.device)
            self._step(number * length + i, length, batch, tally)
            if tally.due() and i + 1 < length:
                self._report(tally.read())
        tally.require_all()
        entry = self._report(tally.read())
        _require_finite(self.model, number)
        return entry

    def _report(self, at: Progress) -> Progress:
        if self.progress is not None:
            self.progress(at)
        return at

    def _step(self, step: int, batches: int, batch: Any, tally: _Tally) -> None:
        rate = self.schedule.rate(step, batches * self.schedule.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.precision.forward():
            loss, hits = self.objective(self.model, batch)
        if not self.precision.step(loss, self.trained) and isinstance(self.method, Method):
            self.method.skip()
        if self.average is not None:
            self.average.update()
        tally.add(loss.detach(), hits, samples_in(batch))

    def settle(
        self,
        entry: Progress,
        sparsifier: Sparsifier | None,
        evaluate: Callable[[nn.Module], float] | None,
    ) -> Progress:
        """Masks the average, and evaluates it or else the model."""
        with nullcontext() if self.average is None else self.average.inside():
            if self.average is not None and sparsifier is not None:
                sparsifier.apply()
            if evaluate is None:
                return entry
            with modes_kept(self.model):
                self.model.eval()
                entry = replace(entry, evaluated=float(evaluate(self.model)))
        return entry


class _Tally:
    """Losses and hits of one epoch, kept on the device until someone asks.

    Asking waits until the device has done all steps so far, so it is done rarely.
    """

    def __init__(self, epoch: int, batches: int, device: torch.device) -> None:
        self.epoch, self.batches = epoch, batches
        self.losses = torch.zeros(batches, device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self.labelled = True
        self.sizes: list[int] = []
        self._known: list[float] = []
        self._read_at_s = time.monotonic()

    def add(self, loss: Tensor, hits: Tensor | None, size: int) -> None:
        """Notes one batch; waits for nothing."""
        at = len(self.sizes)
        if at == self.batches:
            raise InputError(
                f"epoch {self.epoch} has more batches than its length said",
                [f"expected {self.batches}"],
                "let `batches(epoch)` return something with the right __len__",
            )
        self.losses[at] = loss
        if hits is None:
            self.labelled = False
        else:
            self.hits += hits
        self.sizes.append(size)

    def require_all(self) -> None:
        """Refuses an epoch that ended early: its rates, and a method's steps, were for more."""
        if len(self.sizes) < self.batches:
            raise InputError(
                f"epoch {self.epoch} has fewer batches than its length said",
                [f"expected {self.batches}, got {len(self.sizes)}"],
                "let `batches(epoch)` return what can be run through from its beginning, with the "
                "right __len__",
            )

    def due(self) -> bool:
        """Whether it is time to report."""
        return time.monotonic() - self._read_at_s >= PROGRESS_EVERY_S

    def read(self) -> Progress:
        """The means so far.

        Raises:
            InputError: a loss was not finite.
        """
        known, done = len(self._known), len(self.sizes)
        fresh = self.losses[known:done].tolist()
        self._read_at_s = time.monotonic()
        for i, loss in enumerate(fresh, known):
            if not math.isfinite(loss):
                raise InputError(
                    f"the training loss became {loss} in epoch {self.epoch}, batch {i}",
                    fix="lower Schedule.lr, or look for NaN in the training data",
                )
        self._known += fresh
        seen = sum(self.sizes) or math.nan
        total = sum(loss * size for loss, size in zip(self._known, self.sizes, strict=True))
        accuracy = int(self.hits) / seen if self.labelled else math.nan
        return Progress(self.epoch, done, self.batches, total / seen, accuracy)


def _length(epoch: int, batches: Batches) -> int:
    """How many batches an epoch has, one or more."""
    length = count_of(batches)
    if not length:
        got = f"a {type(batches).__name__} " + ("of none" if length == 0 else "without a length")
        raise InputError(
            f"cannot train on the batches of epoch {epoch}",
            [f"expected a sized iterable of one or more; got {got}"],
            "let `batches(epoch)` return a list of batches or a DataLoader of a sized data set",
        )
    return length


def _require_finite(model: nn.Module, epoch: int) -> None:
    """Refuses what the last step of an epoch broke: no loss tells, a checkpoint would keep it."""
    values = {name: p for name, p in bare(model).named_parameters() if p.requires_grad}
    local = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in values.items()}
    broken = [name for name, value in local.items() if not bool(value.isfinite().all())]
    if broken:
        raise InputError(
            f"epoch {epoch} ended with weights that are not finite",
            [", ".join(broken)],
            "lower Schedule.lr, set Schedule.clip_norm, or look for NaN in the training data",
        )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Randomness of this seed inside, as before afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _sparsifier(method: Sparsifier | Method | None) -> Sparsifier | None:
    if method is None or isinstance(method, Sparsifier):
        return method
    return method.sparsifier


def _hand_over(method: Sparsifier | Method | None) -> None:
    """Ends the method and checks what it promised."""
    if method is not None and not isinstance(method, Sparsifier):
        method.finish()
    sparsifier = _sparsifier(method)
    if sparsifier is not None:
        sparsifier.verify()


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch_size: int = 250) -> Tensor:
    """The model's outputs in eval mode, batch by batch.

    Args:
        model: each of its modules is left in the mode it was in.
        x: [S, ...] samples; moved to the model's device, a batch at a time.
        batch_size: samples at a time.

    Returns:
        [S, classes], on the model's device.
    """
    device = device_of(model)
    with modes_kept(model):
        model.eval()
        return torch.cat([model(part.to(device)) for part in torch.split(x, batch_size)])


def evaluate(model: nn.Module, x: Tensor, labels: Tensor, batch_size: int = 250) -> float:
    """Top-1 accuracy in eval mode, 0 to 1.

    Args:
        model: maps x to logits; each of its modules is left in the mode it was in.
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
    outputs = predict(model, x, batch_size)
    hits = outputs.argmax(1) == labels.to(outputs.device)
    return float(hits.float().mean())
