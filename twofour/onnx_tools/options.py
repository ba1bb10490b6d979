"""What the user chooses about quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from twofour.core.ranges import (
    Activation,
    Method,
    Range,
    RangeOptions,
    refused,
    require_choice,
)

AddInputs = Literal["shortcut", "both", "one_scale"]
FirstLast = Literal["int8", "float"]
WeightForm = Literal["int8", "float"]
Recipe = Literal["fast", "balanced", "best"]

STEPS = ("equalize", "smooth", "round", "bias")
"""What a recipe can have besides calibration, in the order in which the steps run."""
RECIPES: dict[Recipe, tuple[str, ...]] = {
    "fast": (),
    "balanced": ("equalize", "smooth"),
    "best": ("equalize", "smooth", "round", "bias"),
}
"""The steps of each recipe."""


@dataclass(frozen=True)
class TensorChoice:
    """What holds for the tensors that a pattern names.

    Attributes:
        stays_float: it is not quantized.
        span: its range; None where calibration tells.
        activation: its type; None for that of the others.
    """

    stays_float: bool = False
    span: Range | None = None
    activation: Activation | None = None


@dataclass(frozen=True)
class QuantizeOptions:
    """How a float model becomes an INT8 model.

    Attributes:
        method: how an activation's range is chosen from what calibration saw, see `RangeOptions`.
        activation: `uint8` is asymmetric, and spends all 256 steps on what a ReLU or a GELU lets
            through; `int8` is symmetric (zero point 0), which TensorRT takes alone. None: `uint8`,
            or `int8` where the scales are those of a table of TensorRT.
        add_inputs: which inputs of a residual Add are quantized. `shortcut`: all but the output of
            the convolution before it, so that convolution, Add, ReLU and rounding are one step with
            one rounding. `both`: that output too, as ONNX Runtime's integer Add wants it.
            `one_scale`: both, with one scale, for machines that add integers as they are.
        attention: the products within attention are quantized too.
        softmax: the second of them, of softmax and values, as well.
        include: patterns of nodes, see `selection.py`; of the layers, Adds, poolings and attentions
            only these are quantized. Empty: all.
        exclude: patterns of nodes that stay float.
        first_last: what the first and the last layers are, see `selection.py`.
        tensors: what is decided for single tensors, see `overrides.py`; of several patterns that
            match one, the last holds.
        weights: how they are stored: `int8`, or as `float` with a QuantizeLinear behind.
        percentile: for the method of this name, the share of values inside the range, in percent.
        recipe: which steps besides calibration make the result better: `fast` none.
        steps: exactly these, whatever the recipe says; names of `STEPS`. None for the recipe's.
        samples: calibrate with so many samples at most; None for all.
        threads: of ONNX Runtime while calibrating; 0 for as many as there are cores.
    """

    method: Method = "mse"
    activation: Activation | None = None
    add_inputs: AddInputs = "shortcut"
    attention: bool = True
    softmax: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    first_last: FirstLast = "int8"
    tensors: tuple[tuple[str, TensorChoice], ...] = ()
    weights: WeightForm = "int8"
    percentile: float = 99.99
    recipe: Recipe = "fast"
    steps: tuple[str, ...] | None = None
    samples: int | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        """Refuses values that mean nothing. Raises InputError."""
        for name, choice in _CHOICES.items():
            require_choice(name, getattr(self, name), choice)
        RangeOptions(self.method, self.activation or "uint8", self.percentile)
        for step in self.steps or ():
            if step not in STEPS:
                raise refused("steps", " or ".join(STEPS), step)
        if self.samples is not None and self.samples < 1:
            raise refused("samples", "at least 1", self.samples)
        if self.threads < 0:
            raise refused("threads", "0 or more", self.threads)

    def takes(self, step: str) -> bool:
        """Whether a step of this name is part of it."""
        return step in (RECIPES[self.recipe] if self.steps is None else self.steps)

    @property
    def ranges(self) -> RangeOptions:
        """The part of it that says how a range is chosen."""
        return RangeOptions(self.method, self.activation or "uint8", self.percentile)


_CHOICES = {
    "add_inputs": AddInputs,
    "first_last": FirstLast,
    "weights": WeightForm,
    "recipe": Recipe,
}
