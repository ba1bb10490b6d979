"""The stages that train: `finetune` makes up for pruning, `qat` for int8.

A run that is killed goes on after its last whole epoch, and ends with the same bits. Several
processes of one `torch.distributed` job share each batch (`sharing.py`); the first one writes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from twofour.core.errors import InputError, UnsupportedError
from twofour.train.checkpoint import Progress
from twofour.train.permute import permute
from twofour.train.quantize import Quantizer
from twofour.train.recover import finetune as recover
from twofour.train.settings import QatSettings, TrainSettings
from twofour.train.sharing import is_first, shared_batches, spread, whole_state
from twofour.train.sparsify import Sparsifier
from twofour.train.stages import MODEL, Done, Loaded, Task, calibration, loaded
from twofour.train.states import Order, digest_of, save_state
from twofour.train.user_code import seed_all, train_batches, user_function

CHECKPOINT = "training.pt"
FSDP = "fsdp2"


def finetune(task: Task, settings: TrainSettings) -> Done:
    """Trains with the masks of `start` held, against `teacher` where it distils."""
    return _trained(task, settings, loaded(task, "start"))


def qat(task: Task, settings: QatSettings) -> Done:
    """The same, with weights and activations rounded as an int8 engine does."""
    if settings.parallel == FSDP:
        raise UnsupportedError(
            "quantization-aware training cannot spread weights over processes",
            ["parallel: fsdp2; a weight is rounded as a whole"],
            "set parallel: ddp in the section qat",
        )
    start = loaded(task, "start")
    options = settings.quantizer()
    quantizer = Quantizer(start.model, start.example, options)
    quantizer.calibrate(calibration(task, start, settings.samples), report=task.report)
    start = replace(start, facts=replace(start.facts, quantizer=options))
    done = _trained(task, settings, start)
    quantizer.verify()
    places = [each.kind for each in quantizer.report()]
    counts = {kind: places.count(kind) for kind in ("weight", "activation", "float")}
    return replace(done, document={**done.document, "places": counts})


def _trained(task: Task, settings: TrainSettings, start: Loaded) -> Done:
    """Trains, verifies, and writes the model."""
    teacher = teacher_of(task, settings, start) if settings.distil else None
    trained = spread(start.model, settings.parallel)
    history = _train(task, settings, trained, start.sparsifier, teacher)
    state = whole_state(trained)
    if is_first():
        save_state(state, start.facts, task.output / MODEL)
    document = {"epochs": [_plain(each) for each in history], "settings": asdict(settings)}
    return Done({"model": (MODEL, "checkpoint")}, _in_words(history), document=document)


def _train(
    task: Task,
    settings: TrainSettings,
    model: nn.Module,
    sparsifier: Sparsifier | None,
    teacher: nn.Module | None,
) -> list[Progress]:
    """The run itself; what `sparsifier` holds is verified at its end."""
    if task.train is None:
        raise InputError(
            "training needs data",
            ["the recipe has no data.train"],
            "add data: {train: module:function}, a function of the epoch that returns batches",
        )
    batches = shared_batches(train_batches(task.train, task.seed))
    loss: Any = None if settings.loss is None else user_function(settings.loss, "loss")
    if teacher is not None:
        loss = settings.distiller(model, teacher)
    epochs = settings.epochs

    def shown(at: Progress) -> None:
        what = f"epoch {at.epoch + 1} of {epochs}, loss {at.loss:.4f}"
        task.report(at.epoch * at.batches + at.batch, epochs * at.batches, what)

    # FSDP2 leaves no process with all weights: such a run starts over when it is killed.
    checkpoint = None if settings.parallel == FSDP else task.scratch / CHECKPOINT
    seed_all(task.seed)
    return recover(
        model,
        batches,
        settings.schedule(task.seed),
        method=sparsifier,
        loss=loss,
        checkpoint=checkpoint,
        progress=shown,
    )


def teacher_of(task: Task, settings: TrainSettings, start: Loaded) -> nn.Module:
    """The dense model; its channels in the student's order where layers inside are compared.

    Args:
        task: has the file "teacher".
        settings: of the training.
        start: the student.

    Raises:
        InputError: the student was made from another model, so that its order means nothing here.
    """
    dense = loaded(task, "teacher")
    order = start.facts.order
    if settings.hidden and order is not None and dense.facts.order != order:
        _permute(task, dense, order)
    return dense.model


def _permute(task: Task, dense: Loaded, order: Order) -> None:
    chosen = (list(order.include) or None, list(order.exclude) or None)
    permute(dense.model, dense.example, order.pattern, *chosen, seed=order.seed, report=task.report)
    if digest_of(dense.model) != order.digest:
        raise InputError(
            "the teacher's channels cannot be brought into the order of the student's",
            ["the model that was pruned is another than the teacher"],
            "distil from outputs alone (without hidden), or set permute: false",
        )


def _plain(at: Progress) -> dict[str, Any]:
    """An epoch, counted from 1; null where a figure does not exist."""
    return {
        "epoch": at.epoch + 1,
        "loss": at.loss,
        "accuracy": None if math.isnan(at.accuracy) else at.accuracy,
    }


def _in_words(history: list[Progress]) -> str:
    if not history:
        return "0 epochs"
    first, last = history[0].loss, history[-1].loss
    ending = "" if len(history) == 1 else f" -> {last:.4f}"
    return f"{len(history)} epochs, loss {first:.4f}{ending}"
