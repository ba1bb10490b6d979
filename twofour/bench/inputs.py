"""The inputs of an ONNX file, and whether a benchmark's one input fits them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from twofour.bench.declared import ModelInput, static_input
from twofour.bench.timing import Feeds
from twofour.core.errors import InputError
from twofour.onnx_tools.load import load_model


def model_inputs(model: Path) -> tuple[ModelInput, ...]:
    """The inputs of an ONNX file.

    Raises:
        InputError: the file is none, or an input is no tensor of known rank.
    """
    found = []
    for value in load_model(model).graph.inputs:
        if value.shape is None or value.dtype is None:
            raise InputError(
                f"input {value.name!r} of {model} has no shape",
                ["expected a tensor of known rank"],
                "export the model with static shapes",
            )
        dims = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
        found.append(ModelInput(str(value.name), value.dtype.numpy().name, dims))
    return tuple(found)


def require_feeds(feeds: Feeds, inputs: Sequence[ModelInput], model: Path) -> None:
    """Refuses an input that a model does not take.

    Raises:
        InputError: names, dtypes or shapes differ.
    """
    declared = {each.name: each for each in inputs}
    if set(declared) != set(feeds):
        raise InputError(
            f"{model} has other inputs than the engine",
            [f"expected {', '.join(sorted(feeds))}", f"got {', '.join(sorted(declared))}"],
            "give the model that the engine was built from",
        )
    for name, array in feeds.items():
        if declared[name].dtype != array.dtype.name:
            raise InputError(
                f"input {name!r} of {model} has another type than the engine's",
                [f"expected {array.dtype.name}, got {declared[name].dtype}"],
                "give the model that the engine was built from",
            )
        static_input(declared[name], array.shape, None)
