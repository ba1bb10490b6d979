"""What `twofour quantize` can be told, and how it becomes `QuantizeOptions`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from twofour.core.ranges import Activation as Kind
    from twofour.onnx_tools.options import TensorChoice


class Method(StrEnum):
    """How the range of an activation is chosen, those of `core.ranges.Method`."""

    mse = "mse"
    entropy = "entropy"
    percentile = "percentile"
    minmax = "minmax"
    average = "average"


class Activation(StrEnum):
    """The type of quantized activations."""

    int8 = "int8"
    uint8 = "uint8"


class AddInputs(StrEnum):
    """Which inputs of a residual Add are quantized."""

    shortcut = "shortcut"
    both = "both"
    one_scale = "one_scale"


class Form(StrEnum):
    """Integers or floats."""

    int8 = "int8"
    float = "float"


class Recipe(StrEnum):
    """Which steps besides calibration there are."""

    fast = "fast"
    balanced = "balanced"
    best = "best"


MethodOption = Annotated[Method, typer.Option("--method", help="How ranges are chosen.")]
ActivationOption = Annotated[
    Activation | None,
    typer.Option(
        "--activation",
        help="uint8: with a zero point, the default; int8: symmetric, which TensorRT takes alone.",
        show_default=False,
    ),
]
AddInputsOption = Annotated[
    AddInputs,
    typer.Option(
        "--add-inputs",
        help="shortcut: one rounding less; both: as ONNX Runtime's integer Add wants it; "
        "one_scale: both, equally scaled.",
    ),
]
AttentionOption = Annotated[
    bool,
    typer.Option("--attention/--no-attention", help="Quantize the products within attention."),
]
SoftmaxOption = Annotated[
    bool,
    typer.Option("--softmax/--no-softmax", help="That of softmax and values among them."),
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATTERN",
        help="Quantize only these nodes: a shell pattern of names, or op:TYPE.",
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="Nodes that stay float, likewise."),
]
FirstLastOption = Annotated[
    Form, typer.Option("--first-last", help="What the first and the last layers are.")
]
TensorOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor",
        metavar="NAME=CHOICE",
        help="For tensors of this name or pattern: LOW:HIGH, scale:STEP, int8, uint8 or float.",
    ),
]
TensorsOption = Annotated[
    Path | None,
    typer.Option("--tensors", metavar="FILE", help="The same from a JSON or TOML file."),
]
WeightsOption = Annotated[
    Form, typer.Option("--weights", help="How they are stored; float: with a QuantizeLinear.")
]
RecipeOption = Annotated[
    Recipe, typer.Option("--recipe", help="Steps that make the result better; fast: none.")
]
StepOption = Annotated[
    list[str] | None, typer.Option("--step", help="A step besides those of the recipe.")
]
NoStepOption = Annotated[
    list[str] | None, typer.Option("--no-step", help="A step of the recipe that is left out.")
]
DynamicOption = Annotated[
    bool,
    typer.Option(
        "--dynamic",
        help="Quantize activations at run time, by rows: for transformers, needs no data.",
    ),
]
_OF_DYNAMIC = ("model", "output", "dynamic", "include", "exclude", "first_last", "as_json", "quiet")


def require_dynamic(context: typer.Context) -> None:
    """Refuses options that say nothing where activations are quantized at run time.

    Raises:
        InputError: names them.
    """
    from twofour.core.errors import InputError

    given = [each for each in context.command.params if _is_given(context, each.name or "")]
    others = [max(each.opts, key=len) for each in given if each.name not in _OF_DYNAMIC]
    if others:
        raise InputError(
            f"{', '.join(others)} and --dynamic exclude each other",
            ["ranges are found at run time: nothing is calibrated, and no step changes weights"],
            "leave out --dynamic to calibrate, or the others",
        )


def require_sense(context: typer.Context) -> None:
    """Refuses --softmax where attention stays float.

    Raises:
        InputError: both are asked for.
    """
    from twofour.core.errors import InputError

    values = context.params
    if values["softmax"] and not values["attention"] and _is_given(context, "softmax"):
        raise InputError(
            "--softmax and --no-attention exclude each other",
            ["the product of softmax and values is one of those within attention"],
            "leave one out",
        )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def activation_of(chosen: Activation | None, table: Path | None) -> Kind | None:
    """The type of activations; None to leave it open: a table of TensorRT holds scales of int8."""
    if chosen is None and table is not None:
        return "int8"
    return chosen.value if chosen else None


def steps_of(
    recipe: Recipe, more: Sequence[str] | None, less: Sequence[str] | None
) -> tuple[str, ...]:
    """The recipe's steps with and without those named.

    Raises:
        InputError: a step that is taken away is none of them, or is asked for, too.
    """
    from twofour.core.errors import InputError
    from twofour.onnx_tools.options import RECIPES, STEPS

    more, less = more or (), less or ()
    both = [name for name in more if name in less]
    if both:
        raise InputError(
            f"--step {both[0]} and --no-step {both[0]} exclude each other",
            ["expected one of both"],
            "leave one out",
        )
    absent = [name for name in less if name not in RECIPES[recipe.value]]
    if absent:
        has = ", ".join(RECIPES[recipe.value]) or "no steps"
        raise InputError(
            f"--no-step {absent[0]}: recipe {recipe.value} has no such step",
            [f"it has {has}"],
            "leave the option out",
        )
    chosen = {*RECIPES[recipe.value], *more} - set(less)
    return (*(name for name in STEPS if name in chosen), *sorted(chosen - set(STEPS)))


def tensors_of(
    texts: Sequence[str] | None, file: Path | None
) -> tuple[tuple[str, TensorChoice], ...]:
    """What --tensors and --tensor say; of two that match a tensor, that on the command line holds.

    Raises:
        InputError: not of their form.
    """
    from twofour.onnx_tools.overrides import parse_choices, read_choices

    return (*(read_choices(file) if file else ()), *parse_choices(texts or ()))
