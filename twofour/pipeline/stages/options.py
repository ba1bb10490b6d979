"""Sections of a recipe as the options of what does the work."""

from __future__ import annotations

from twofour.onnx_tools.options import QuantizeOptions
from twofour.pipeline.recipe import Quantize


def options_of(settings: Quantize) -> QuantizeOptions:
    """How a network is quantized."""
    return QuantizeOptions(
        settings.method,
        settings.activation,
        include=settings.include,
        exclude=settings.exclude,
        recipe=settings.recipe,
        samples=settings.samples,
    )
