"""The training stages of a pipeline: files in, files out, each in a process of its own.

    load -> sparsify -> finetune -> qat -> export

Each builds the user's model anew and loads what the stage before it left (`states.py`). What it
leaves depends on its inputs, its settings and the seed alone, however often it was killed and
started again. Here are the first two; `train_stages.py` has the next, `export_stage.py` the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twofour.core.data import Batch, load_data
from twofour.core.errors import InputError
from twofour.core.progress import Report
from twofour.core.records import to_plain
from twofour.train.batches import forward, to_device
from twofour.train.permute import permute
from twofour.train.settings import SparsifySettings
from twofour.train.sparsify import Sparsifier
from twofour.train.states import (
    Facts,
    Order,
    digest_of,
    facts_of,
    load_state,
    load_weights,
    read_facts,
    require_masks,
    save_masks,
    save_state,
)
from twofour.train.user_code import Example, build_model, example_inputs

MODEL, MASKS = "model.safetensors", "masks.safetensors"
CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class Task:
    """What a stage works on and where.

    Attributes:
        model: module:function of the model.
        example: likewise of its example inputs.
        checkpoint: of the user's weights.
        input_names: what data calls the model's inputs, in the order of forward's arguments.
        output_names: of an exported file.
        dynamic: names of the first axes of inputs, which stay open in it.
        train: module:function of training data.
        calibrate: DATA, see `core/data.py`.
        seed: of all that draws.
        inputs: files of earlier stages by name; "masks" are what a sparse model has to have.
        output: folder for what it makes.
        scratch: folder for what a killed stage goes on from.
        report: told of each piece of work.
        device: that models are pruned and trained on.
    """

    model: str
    example: str
    checkpoint: Path | None
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic: tuple[str, ...]
    train: str | None
    calibrate: str | None
    seed: int
    inputs: Mapping[str, Path]
    output: Path
    scratch: Path
    report: Report
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable


@dataclass(frozen=True)
class Done:
    """What a stage made.

    Attributes:
        files: name -> (file in the output folder, its kind).
        text: what came of it, in one line.
        notes: what the user should know.
        document: figures, as plain data.
    """

    files: dict[str, tuple[str, str]]
    text: str
    notes: tuple[str, ...] = ()
    document: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """A model that an earlier stage left.

    Attributes:
        model: in eval mode, on the task's device.
        example: its example inputs, there too.
        sparsifier: what holds its masks; None where it has none.
        facts: of its file.
    """

    model: nn.Module
    example: Example
    sparsifier: Sparsifier | None
    facts: Facts


def load(task: Task) -> Done:
    """The user's model with the user's weights, run once on its example inputs."""
    task.report(0, None, f"{task.model}()")
    model = build_model(task.model, task.seed, weights_follow=task.checkpoint is not None)
    if task.checkpoint is not None:
        load_weights(model, task.checkpoint)
    model.eval()
    example = _example(task, model)
    with torch.no_grad():
        forward(model, example)
    save_state(model.state_dict(), Facts(), task.output / MODEL)
    count = sum(p.numel() for p in model.parameters())
    text = f"{type(model).__name__}, {count:,} parameters"
    return Done({"model": (MODEL, "checkpoint")}, text, document={"parameters": count})


def sparsify(task: Task, settings: SparsifySettings) -> Done:
    """Orders channels if that is asked for, chooses masks and applies them."""
    start = loaded(task, "start")
    model, chosen = start.model, (list(settings.include) or None, list(settings.exclude) or None)
    document: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    order = None
    if settings.permute:
        found = permute(
            model, start.example, settings.pattern, *chosen, seed=task.seed, report=task.report
        )
        digest = digest_of(model)
        order = Order(settings.pattern, settings.include, settings.exclude, task.seed, digest)
        document["permutation"] = {**to_plain(found), "recovered": found.recovered}
        notes = (f"channels ordered: {found.recovered:.1%} of what masks removed is kept now",)
    sparsifier = Sparsifier(model, settings.pattern, settings.method, *chosen)
    data = None if settings.method == "magnitude" else calibration(task, start, settings.samples)
    sparsifier.prune(data, report=task.report)
    sparsifier.verify()
    save_state(model.state_dict(), facts_of(sparsifier, order), task.output / MODEL)
    save_masks(sparsifier, task.output / MASKS)
    rows = sparsifier.report()
    document["layers"] = [{**to_plain(each), "pruned": each.pruned} for each in rows]
    pruned = sum(each.pruned for each in rows)
    text = f"{pruned} of {len(rows)} weights {settings.pattern}, by {settings.method}"
    files = {"model": (MODEL, "checkpoint"), "masks": (MASKS, "masks")}
    return Done(files, text, notes, document)


def loaded(task: Task, name: str) -> Loaded:
    """The model of a file of an earlier stage, its masks and weights verified.

    Args:
        task: of this stage.
        name: of the file in its inputs.

    Raises:
        InputError: there is no such file, it is damaged, or of another model.
        GateError: its masks or weights are not what they were.
    """
    path = task.inputs.get(name)
    if path is None:
        raise InputError(f"this stage needs the model {name!r} of an earlier one, and has none")
    model = build_model(task.model, task.seed, weights_follow=True).to(task.device)
    example = to_device(_example(task, model), task.device)
    sparsifier = load_state(model, path, example)
    if sparsifier is not None and "masks" in task.inputs:
        require_masks(sparsifier, task.inputs["masks"])
    return Loaded(model.eval(), example, sparsifier, read_facts(path))


def calibration(task: Task, start: Loaded, samples: int) -> list[Any]:
    """The first samples of the calibration data, in batches as the model takes them.

    Args:
        task: names the data.
        start: the model.
        samples: at most so many.

    Raises:
        InputError: there are none, or not for each input.
    """
    if task.calibrate is None:
        raise InputError(
            "this stage needs calibration data",
            ["the recipe has no data.calibrate"],
            "add data: {calibrate: DATA}, some hundred samples as the model will see them",
        )
    data = load_data(task.calibrate, task.input_names)
    batches = data.batches(min(CALIBRATION_BATCH, samples), samples)
    return [_batch(each, task.input_names, start.example) for each in batches]


def _batch(batch: Batch, names: tuple[str, ...], example: Example) -> Any:
    """Samples by the names of inputs as a tensor, or as forward's arguments."""
    if isinstance(example, Tensor):
        return torch.tensor(batch.inputs[names[0]], dtype=example.dtype)
    return {
        argument: torch.tensor(batch.inputs[name], dtype=like.dtype)
        for name, (argument, like) in zip(names, example.items(), strict=True)
    }


def _example(task: Task, model: nn.Module) -> Example:
    """The example inputs, one for each name."""
    example = example_inputs(task.example, model, task.seed)
    count = 1 if isinstance(example, Tensor) else len(example)
    if count != len(task.input_names):
        got = f"{len(task.input_names)} names ({', '.join(task.input_names)}), {count} tensors"
        raise InputError(
            f"model.inputs and what {task.example} returns do not match",
            [f"expected a name for each tensor, got {got}"],
            "add model: {inputs: [...]} with the names in the order of forward's arguments",
        )
    return example
