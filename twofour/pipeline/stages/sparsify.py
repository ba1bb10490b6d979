"""sparsify: the weights of an ONNX file pruned in one shot, and their masks as a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from twofour.compiler.importer import standardized
from twofour.compiler.prunable import Network
from twofour.core.data import as_data
from twofour.core.errors import InputError
from twofour.core.progress import Report
from twofour.core.records import to_plain
from twofour.onnx_tools.capture import Samples
from twofour.onnx_tools.correct import Corrected, correct
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.one_shot import Calibration
from twofour.onnx_tools.prune import Pruned, prune
from twofour.onnx_tools.weights import layer_weights
from twofour.pipeline.arrays import Array, save_arrays
from twofour.pipeline.quantities import bytes_of
from twofour.pipeline.recipe import Sparsify
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.stage import From, Input, Made, Output, Source, Stage, Task

MODEL, MASKS = "sparse.onnx", "masks.npz"


def sparsify_stage(file: RecipeFile) -> Stage:
    """The stage of a recipe with an ONNX file that is pruned."""
    settings = file.recipe.sparsify
    assert settings is not None
    inputs: dict[str, Input] = {"model": From("load")}
    if (settings.method != "magnitude" or settings.correct) and file.recipe.data.calibrate:
        inputs["data"] = Source(file.place(file.recipe.data.calibrate), "data")
    plain = settings.model_dump(mode="json")
    return Stage("sparsify", "sparsify", plain, inputs, partial(_sparsify, settings))


def _sparsify(settings: Sparsify, task: Task) -> Made:
    source = standardized(load_model(Path(task.inputs["model"])))
    model, entries = prune(
        source,
        settings.pattern,
        settings.exclude,
        include=settings.include or ("*",),
        calibration=_calibration(settings, task),
    )
    done = [entry for entry in entries if not entry.reason]
    if not done:
        raise _nothing(settings, entries)
    corrected: Sequence[Corrected] = ()
    if settings.correct and settings.method != "sparsegpt" and "data" in task.inputs:
        model, corrected = _corrected(source, model, settings, task.inputs["data"], task.report)
    save_model(model, task.folder / MODEL)
    save_arrays(task.folder / MASKS, _masks(model, done))
    kept = min(entry.energy_kept for entry in done)
    text = f"{len(done)} of {len(entries)} weights {settings.pattern} by {settings.method}"
    facts = {
        "pattern": settings.pattern,
        "layers": [to_plain(entry) for entry in entries],
        "corrected": sum(bool(entry.done) for entry in corrected),
    }
    outputs = {"model": Output(MODEL, "onnx"), "masks": Output(MASKS, "masks")}
    return Made(outputs, f"{text}, {kept:.0%} of a weight's energy or more kept", facts)


def _calibration(settings: Sparsify, task: Task) -> Calibration | None:
    if settings.method == "magnitude":
        return None
    method: Literal["wanda", "sparsegpt"] = settings.method
    return Calibration(
        task.inputs["data"],
        method,
        settings.samples,
        bytes_of(settings.memory) or 0,
        progress=task.report,
    )


def _corrected(
    source: Network, model: Network, settings: Sparsify, data: str, report: Report
) -> tuple[Network, Sequence[Corrected]]:
    """Convolutions get their mean and deviation again."""
    given = as_data(data, [str(value.name) for value in source.graph.inputs])
    samples = Samples(given, settings.samples, 0)
    return correct(source, model, samples, operators=("Conv",), progress=report)


def _masks(model: Network, done: Sequence[Pruned]) -> dict[str, Array]:
    """Which weights stay, by the weight's name."""
    names = {entry.weight for entry in done}
    return {w.name: w.stored != w.zero for _, w in layer_weights(model) if w.name in names}


def _nothing(settings: Sparsify, entries: Sequence[Pruned]) -> InputError:
    counts = Counter(entry.reason for entry in entries)
    reasons = [f"{count} of {len(entries)}: {reason}" for reason, count in counts.items()]
    return InputError(
        f"no weight was pruned to {settings.pattern}",
        reasons or ["expected a Conv, Gemm or MatMul with constant weights"],
        "choose another pattern, fewer names to exclude or more to include",
    )
