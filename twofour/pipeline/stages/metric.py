"""What a stage that judges a network depends on."""

from __future__ import annotations

from typing import Any

from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.stage import Input, Source


def metric_inputs(file: RecipeFile) -> dict[str, Input]:
    """The samples, and the source of a metric of the user's own."""
    recipe = file.recipe
    found: dict[str, Input] = {}
    if recipe.data.evaluate is not None:
        found["evaluate"] = Source(file.place(recipe.data.evaluate), "data")
    if ":" in recipe.metric:
        found["metric"] = Source(recipe.metric, "code")
    return found


def metric_settings(file: RecipeFile) -> dict[str, Any]:
    """Its name, the output that it reads, and how many samples."""
    recipe = file.recipe
    return {
        "metric": recipe.metric,
        "metric_output": recipe.metric_output,
        "evaluate.samples": recipe.evaluate.samples,
    }
