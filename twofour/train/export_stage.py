"""The stage that leaves PyTorch: each model as an ONNX file, and what it computes, to compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from twofour.core.errors import InputError
from twofour.train.batches import forward
from twofour.train.export import export_onnx
from twofour.train.stages import Loaded, Task, calibration, loaded

Array = NDArray[Any]

CHECKED_SAMPLES = 8


@dataclass(frozen=True)
class Exported:
    """An ONNX file, and a run of the model it was made from.

    Attributes:
        name: of the model among the stage's inputs.
        path: of the file.
        patterns: name of each weight that has a pattern in the file -> the pattern.
        quantized: whether it has Q/DQ pairs.
        inputs: of the run, by the names of the file.
        outputs: of the run, likewise.
    """

    name: str
    path: Path
    patterns: dict[str, str]
    quantized: bool
    inputs: dict[str, Array]
    outputs: dict[str, Array]


def export(task: Task, name: str) -> Exported:
    """Writes NAME.onnx into the output folder.

    Args:
        task: of the stage.
        name: of a model among its inputs.

    Raises:
        InputError: PyTorch cannot export the model, or it has not as many outputs as names.
        GateError: a weight lost its mask or its pattern.
    """
    start = loaded(task, name)
    path = task.output / f"{name}.onnx"
    example = start.example
    tensors = (example,) if isinstance(example, Tensor) else tuple(example.values())
    inputs = _samples(task, start)
    outputs = _run(start.model, inputs, task.output_names)
    patterns = export_onnx(
        start.model, tensors, path, task.input_names, task.output_names, task.dynamic
    )
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs.values())
    arrays = {n: x.cpu().numpy() for n, x in zip(task.input_names, given, strict=True)}
    quantized = start.facts.quantizer is not None
    return Exported(name, path, patterns, quantized, arrays, outputs)


def _samples(task: Task, start: Loaded) -> Any:
    """Real samples where there are some and the file's batch is open; else the example inputs."""
    if task.calibrate is None or not task.dynamic:
        return start.example
    return calibration(task, start, CHECKED_SAMPLES)[0]


def _run(model: nn.Module, inputs: Any, names: tuple[str, ...]) -> dict[str, Array]:
    """The model's outputs by name."""
    with torch.no_grad():
        found = [t for t in tree_leaves(forward(model, inputs)) if isinstance(t, Tensor)]
    if len(found) != len(names):
        raise InputError(
            f"model.outputs and what {type(model).__name__} returns do not match",
            [f"expected a name for each tensor; got {len(names)} names, {len(found)} tensors"],
            "add model: {outputs: [...]} with a name for each",
        )
    return {name: t.cpu().numpy() for name, t in zip(names, found, strict=True)}
