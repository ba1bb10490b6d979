"""The stages of a recipe, in order."""

from __future__ import annotations

from collections.abc import Mapping

from twofour.core.errors import InputError
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.stage import KINDS, Result, Stage
from twofour.pipeline.stages import decide
from twofour.pipeline.stages.benchmark import benchmark_stage
from twofour.pipeline.stages.build import build_stages
from twofour.pipeline.stages.choose import choose_stage
from twofour.pipeline.stages.decide import gate_stage
from twofour.pipeline.stages.evaluate import evaluate_stages
from twofour.pipeline.stages.layers import layers_stage
from twofour.pipeline.stages.load import load_stage
from twofour.pipeline.stages.means import Means
from twofour.pipeline.stages.publish import publish_stage
from twofour.pipeline.stages.quantize import quantize_stages
from twofour.pipeline.stages.sensitivity import sensitivity_stage
from twofour.pipeline.stages.shapes import shapes_stage
from twofour.pipeline.stages.sparsify import sparsify_stage
from twofour.pipeline.stages.train import train_stages


def stages_of(file: RecipeFile, means: Means) -> tuple[Stage, ...]:
    """All stages; each reads only what those before it leave."""
    stages = train_stages(file)
    if file.recipe.model.onnx is not None:
        stages.append(load_stage(file))
        if file.recipe.sparsify is not None and not file.recipe.layers:
            stages.append(sparsify_stage(file))
    stages.append(shapes_stage(file))
    stages += sensitivity_stage(file, means)
    stages += [choose_stage(file)] if file.recipe.layers else []
    stages += quantize_stages(file, means)
    stages += build_stages(file, means)
    stages += evaluate_stages(file)
    stages += [layers_stage(file), benchmark_stage(file), *gate_stage(file)]
    stages += publish_stage(file, means)
    return tuple(stages)


def require_kind(kind: str, stages: tuple[Stage, ...]) -> None:
    """Refuses to begin at a stage that the recipe does not have.

    Raises:
        InputError: it does not.
    """
    known = [each for each in KINDS if each in {stage.kind for stage in stages}] + ["report"]
    if kind and kind not in known:
        raise InputError(
            f"the recipe has no stage {kind!r}",
            [f"expected one of {', '.join(known)}"],
            "choose one of them: --from STAGE",
        )


def why_not(stage: Stage, results: Mapping[str, Result]) -> str:
    """Why a stage is left out; "" if it is not."""
    if stage.kind != "publish":
        return ""
    facts = results[decide.NAME].facts
    return "" if facts["open"] else f"the gate: {facts['verdict']}"
