"""The layers of a PyTorch model, each pruned alone, judged by a score of one's own.

    def score(model):
        return evaluate(model, x, labels)          # any number; more is better

    found = sensitivity(model, score, pattern=["2:4", "2:4/pair"])
    for case in found.at("2:4"):
        print(case.layer, case.drop)
    Sparsifier(model, exclude=[case.layer for case in found.at("2:4")[:3]]).prune()

Each weight is pruned in place, the model scored, and all of its state put back, bit for bit. Every
score begins with the same seed, so that what is drawn at random is the same for all.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from glob import escape
from typing import Any

import torch
from torch import nn

from twofour.core.errors import InputError
from twofour.core.patterns import Pattern
from twofour.core.processes import pickled
from twofour.core.progress import Report, silent
from twofour.core.scan import Cache, Item, Processes, Result, Spread, Work, key_of, scan
from twofour.core.sensitivity import JUDGED, Left, Sensitivity, case_of, judged
from twofour.train.calibration import Batches, Forward, Loss
from twofour.train.layers import find_weights
from twofour.train.sparsify import Sparsifier

Score = Callable[[nn.Module], float]
_FORMAT = 1  # of what a result means; part of a key


@dataclass(frozen=True)
class ScanOptions:
    """How to scan.

    Attributes:
        criterion: as of a `Sparsifier`.
        include: patterns of names; None means all.
        exclude: patterns of names that are not tried.
        batches: calibration data, where the criterion needs it; gone through once for each case.
        forward: as of `Sparsifier.prune`.
        loss: as of `Sparsifier.prune`.
        higher_is_better: whether more of the score is better; a loss is better when less.
        metric: what the score is called.
        seed: each score begins with.
        jobs: processes, each with a copy of the model; the score is then a function of a module.
        cache: file that keeps results, and that a later scan goes on from.
        key: with a cache, what the score depends on beside the model, in words: data, its number.
        spread: workers, instead of `jobs` processes: those of a cluster (`cluster.tasks`). The
            score is then a function of a module that is on every machine.
    """

    criterion: str = "magnitude"
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    batches: Batches | None = None
    forward: Forward | None = None
    loss: Loss | None = None
    higher_is_better: bool = True
    metric: str = "score"
    seed: int = 0
    jobs: int = 1
    cache: str | os.PathLike[str] | None = None
    key: str = ""
    spread: Spread | None = None


def sensitivity(
    model: nn.Module,
    score: Score,
    pattern: str | Sequence[str] = "2:4",
    *,
    report: Report = silent,
    **options: Any,
) -> Sensitivity:
    """Prunes each weight alone, and says what the score loses.

    Args:
        model: pruned and put back; without masks.
        score: of the model that it is given; evaluates, and does not train.
        pattern: one or several, such as `2:4` and `2:4/pair`.
        report: told the cases done, and how long the others will take.
        **options: the fields of `ScanOptions`, by name.

    Raises:
        InputError: no layer can be pruned, the model has masks already, an unknown pattern, name
            or option, a cache without a key, or what cannot be sent to other processes.
    """
    asked = _options(options)
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    patterns = list(dict.fromkeys(str(Pattern.parse(each)) for each in patterns))
    _require_dense(model)
    chosen = {p: _sparsifier(model, p, asked) for p in patterns}
    _require_some(chosen)
    cache = Cache.open(asked.cache, JUDGED)
    bench = _Bench(model, score, asked)
    identity = _identity(model, asked) if asked.cache is not None else ()
    tries = [(weight, p) for p, sparsifier in chosen.items() for weight in sparsifier.weights]
    left = tuple(_left(chosen))
    with _restored(model):
        dense = bench.score_now()
    items = [
        Item(
            f"{weight.name} {p}",
            key_of(_FORMAT, *identity, weight.name, p),
            (weight.name, p, dense),
        )
        for weight, p in tries
    ]
    spread = asked.spread or Processes(asked.jobs)
    results = scan(items, bench.start(spread), cache, report=report, spread=spread)
    cases = tuple(
        case_of((weight.name, weight.name, weight.parameter.numel()), p, result)
        for (weight, p), result in zip(tries, results, strict=True)
    )
    notes = tuple(cache.notes())
    name, more = type(model).__name__, asked.higher_is_better
    return Sensitivity(name, asked.metric, "", more, dense, None, cases, left, notes)


@dataclass(frozen=True, eq=False)
class _Bench:
    """The model and its score."""

    model: nn.Module
    score: Score
    options: ScanOptions

    def start(self, spread: Spread) -> Callable[[], Work]:
        """For `scan`: this model in this process, a copy in another one."""
        if self.options.spread is None and spread.jobs == 1:
            return lambda: self.work
        # As bytes: torch would share the memory of the weights, which each process prunes.
        sent = replace(self, options=replace(self.options, spread=None))
        return functools.partial(_start, pickled(sent), spread.threads)

    def work(self, argument: tuple[str, str, float]) -> Result:
        """Prunes one weight, scores, and puts everything back."""
        name, pattern, dense = argument
        began, asked = time.monotonic(), self.options
        with _restored(self.model):
            sparsifier = Sparsifier(self.model, pattern, asked.criterion, [escape(name)])
            try:
                sparsifier.prune(asked.batches, forward=asked.forward, loss=asked.loss)
                (entry,) = [each for each in sparsifier.report() if each.name == name]
                figure = self.score_now()
            finally:
                if any(weight.mask is not None for weight in sparsifier.weights):
                    sparsifier.remove()
        drop = dense - figure if asked.higher_is_better else figure - dense
        kept = 1.0 if entry.energy_kept is None else entry.energy_kept
        return judged(kept, figure, drop, None, time.monotonic() - began)

    def score_now(self) -> float:
        """The score of the model as it is; the generators of random numbers stay as they were."""
        with torch.random.fork_rng():
            torch.manual_seed(self.options.seed)
            return float(self.score(self.model))


def _start(sent: bytes, threads: int) -> Work:
    bench: _Bench = pickle.loads(sent)
    torch.set_num_threads(threads)
    return bench.work


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Puts parameters, buffers and the modes of modules back."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
        for module, training in modes:
            module.training = training


def _options(given: dict[str, Any]) -> ScanOptions:
    known = [field.name for field in fields(ScanOptions)]
    if unknown := sorted(set(given) - set(known)):
        raise InputError(
            f"sensitivity has no option {unknown[0]!r}", [f"expected some of {', '.join(known)}"]
        )
    asked = ScanOptions(**given)
    if asked.cache is not None and not asked.key:
        raise InputError(
            "a cache needs a key",
            ["results depend on the score and its data, which cannot be told from outside"],
            "name them: key='top1 of the first 1000 test images'",
        )
    return asked


def _sparsifier(model: nn.Module, pattern: str, asked: ScanOptions) -> Sparsifier:
    return Sparsifier(model, pattern, asked.criterion, asked.include, asked.exclude)


def _require_dense(model: nn.Module) -> None:
    held = [weight.name for weight in find_weights(model) if weight.mask is not None]
    if held:
        raise InputError(
            "the model is pruned already",
            [f"{len(held)} of its weights have masks, {held[0]} for one"],
            "scan the dense model; or Sparsifier.remove() forgets the masks",
        )


def _require_some(chosen: dict[str, Sparsifier]) -> None:
    if not any(sparsifier.weights for sparsifier in chosen.values()):
        reasons = [f"{each.layer}, {each.pattern}: {each.reason}" for each in _left(chosen)]
        raise InputError(
            "no layer of the model can be pruned",
            reasons or ["it has no linear layer and no convolution"],
            "check include and exclude, or choose another pattern",
        )


def _left(chosen: dict[str, Sparsifier]) -> Iterator[Left]:
    """What is not tried, and why."""
    for pattern, sparsifier in chosen.items():
        tried = {weight.name for weight in sparsifier.weights}
        for entry in sparsifier.report():
            if entry.name not in tried:
                yield Left(entry.name, pattern, entry.reason)


def _identity(model: nn.Module, asked: ScanOptions) -> tuple[str | int | bool, ...]:
    """What every result depends on."""
    return _digest(model), asked.key, asked.seed, asked.criterion, asked.higher_is_better


def _digest(model: nn.Module) -> str:
    """SHA-256 of the model: its modules in words, and all its tensors."""
    found = hashlib.sha256(str(model).encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(content.numpy().tobytes())
    return found.hexdigest()
