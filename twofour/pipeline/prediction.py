"""What a run will take and give, before it runs: time, size and speed, or that they are not known.

Time is what each stage took when it last ran. Sizes and times of networks are those of the last run
of the folder; where there is none, sizes follow from the weights of an ONNX file, and times are
forecast (`predict/forecast.py`: it builds and times stand-ins) where the model is small.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from twofour.core.errors import Error
from twofour.core.progress import Stage, unseen
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.weights import layer_weights
from twofour.pipeline.folder import RUN
from twofour.pipeline.networks import FLOAT32, Network, networks_of
from twofour.pipeline.quantities import size_text, time_text
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.runner import Forecast
from twofour.predict.forecast import forecast

LAST, COMPUTED, FORECAST, UNKNOWN = "the last run", "the weights", "a forecast", "unknown"
_MOST_WEIGHTS, _MOST_LAYERS = 2_000_000, 60
_BYTES = {(False, False): 4.0, (False, True): 2.125, (True, False): 1.0, (True, True): 0.625}
"""Of a weight, by whether it is int8, and whether it is 2:4: values, and two bits for each kept."""
_PATTERNS = ("2:4", "2:4/pair")


@dataclass(frozen=True)
class Expected:
    """What is expected of a network.

    Attributes:
        network: its name.
        weight_bytes: packed; None where it is not known.
        size_from: where that comes from: LAST, COMPUTED or UNKNOWN.
        latency_us: of one run; None where it is not known.
        latency_from: LAST, FORECAST or UNKNOWN.
    """

    network: str
    weight_bytes: int | None = None
    size_from: str = UNKNOWN
    latency_us: float | None = None
    latency_from: str = UNKNOWN


@dataclass(frozen=True)
class Prediction:
    """What is expected of a run.

    Attributes:
        seconds: of the stages that run and ran before.
        unknown: names of those that run and never did.
        networks: that will be made.
        notes: what could not be predicted, and why.
    """

    seconds: float
    unknown: tuple[str, ...]
    networks: tuple[Expected, ...]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people."""
        more = f", and {len(self.unknown)} stages of unknown time" if self.unknown else ""
        lines = [f"time: {time_text(self.seconds)}{more}"]
        for each in self.networks:
            size = f"weights {size_text(each.weight_bytes)} ({each.size_from})"
            time = "time unknown"
            if each.latency_us is not None:
                time = f"{each.latency_us:.4g} us ({each.latency_from})"
            lines.append(f"{each.network}: {size if each.weight_bytes else 'size unknown'}, {time}")
        return [*lines, *(f"note: {note}" for note in self.notes)]

    def document(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def predict(
    file: RecipeFile, folder: Path, found: Sequence[Forecast], stage: Stage = unseen
) -> Prediction:
    """Predicts a run.

    Args:
        file: the recipe.
        folder: of the run; it need not be there.
        found: what would become of each stage.
        stage: shows the progress of a forecast.
    """
    runs = [each for each in found if not each.reused]
    known = [each.seconds for each in runs if each.seconds is not None]
    unknown = tuple(each.stage.name for each in runs if each.seconds is None)
    networks = [each for each in networks_of(file.recipe) if each.model is not None]
    expected = {each.name: Expected(each.name) for each in networks}
    expected |= _computed(file, networks)
    expected = _with_last(expected, folder)
    notes: tuple[str, ...] = ()
    if any(each.latency_us is None for each in expected.values()):
        expected, notes = _with_forecast(file, expected, networks, stage)
    return Prediction(sum(known, 0.0), unknown, tuple(expected.values()), notes)


def _weights(file: RecipeFile) -> int:
    model = load_model(file.place(str(file.recipe.model.onnx)))
    return sum(weight.values.size for _, weight in layer_weights(model))


def _computed(file: RecipeFile, networks: Sequence[Network]) -> dict[str, Expected]:
    """Sizes that follow from the weights; of no torch model, whose weights are not known yet."""
    if file.recipe.model.onnx is None:
        return {}
    weights = _weights(file)
    found = {}
    for each in networks:
        bytes_each = _BYTES[each.precision != FLOAT32, each.weights in _PATTERNS]
        found[each.name] = Expected(each.name, round(weights * bytes_each), COMPUTED)
    return found


def _with_last(expected: Mapping[str, Expected], folder: Path) -> dict[str, Expected]:
    """What the last run of the folder measured."""
    try:
        cells = json.loads((folder / RUN).read_bytes())["cells"]
        measured = {f"{cell['weights']} {cell['precision']}": cell for cell in cells}
        found = {}
        for name, each in expected.items():
            cell = measured.get(name, {})
            if cell.get("weight_bytes") is not None:
                each = replace(each, weight_bytes=int(cell["weight_bytes"]), size_from=LAST)
            if cell.get("latency_us") is not None:
                each = replace(each, latency_us=float(cell["latency_us"]), latency_from=LAST)
            found[name] = each
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return dict(expected)
    return found


def _with_forecast(
    file: RecipeFile, expected: Mapping[str, Expected], networks: Sequence[Network], stage: Stage
) -> tuple[dict[str, Expected], tuple[str, ...]]:
    """Times of stand-ins, where making them takes no longer than a moment."""
    recipe = file.recipe
    if recipe.model.onnx is None:
        return dict(expected), ("times are not known before the model was exported once",)
    place = file.place(recipe.model.onnx)
    model = load_model(place)
    sizes = [weight.values.size for _, weight in layer_weights(model)]
    if sum(sizes) > _MOST_WEIGHTS or len(sizes) > _MOST_LAYERS:
        note = f"times are not forecast, which takes minutes: twofour forecast {recipe.model.onnx}"
        return dict(expected), (note,)
    shapes = {n: s for n, s in recipe.shapes.items() if all(isinstance(d, int) for d in s)}
    try:
        found = forecast(place, stage=stage, shapes=shapes, threads=recipe.threads, tuning_effort=1)
    except Error as e:
        return dict(expected), (f"no times could be forecast: {e.what}",)
    times = {(run.precision, run.pattern): run.time_us for run in found.runs if run.everywhere}
    times |= {(run.precision, ""): run.time_us for run in found.runs if not run.pattern}
    result = dict(expected)
    for each in networks:
        precision = "f32" if each.precision == FLOAT32 else "int8"
        time_us = times.get((precision, each.weights if each.weights in _PATTERNS else ""))
        if time_us is not None and result[each.name].latency_us is None:
            before = result[each.name]
            result[each.name] = replace(before, latency_us=time_us, latency_from=FORECAST)
    return result, ()
