"""Small recipes that run in seconds: a network of two layers, and samples that it gets right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.sample_models import conv_model
from twofour.bench.timing import Schedule
from twofour.pipeline.stages import benchmark

RECIPE = """\
name: small
model: {onnx: model.onnx}
data: {calibrate: calib.npz, evaluate: test.npz}
sparsify: {method: magnitude, correct: false}
quantize: {recipe: fast}
build: {tuning_effort: 0, race: false}
benchmark: {duration: 0.1, vs: [], memory: false}
gate: {max_drop: 100, min_speedup: 0.0001}
"""

METRIC = """\
def share(outputs, labels):
    return float((outputs["y"].argmax(1) == labels).mean())
"""

DATA = """\
import numpy as np


def calibration():
    random = np.random.default_rng(3)
    for _ in range(4):
        yield {"x": random.standard_normal((8, 4, 8, 8)).astype(np.float32)}
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    """A recipe with its model and data."""
    path = folder / "recipe.yaml"
    if not (folder / "model.onnx").exists():
        model = conv_model(folder / "model.onnx")
        write_data(folder, model)
    path.write_text(text)
    return path


def write_data(folder: Path, model: Path, seed: int = 0) -> None:
    """Samples with the labels that the model gives them."""
    random = np.random.default_rng(seed)
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    for name, count in (("calib", 32), ("test", 64)):
        x = random.standard_normal((count, 4, 8, 8)).astype(np.float32)
        labels = session.run(None, {"x": x})[0].argmax(1)
        np.savez(folder / f"{name}.npz", x=x, labels=labels)


def short_races(patch: pytest.MonkeyPatch) -> None:
    """Times mean nothing in tests: turns of a millisecond, and one race."""

    def schedule(duration_s: float) -> Schedule:
        return Schedule(duration_s, slice_s=0.001, pause_s=0.0, warm_s=0.0)

    patch.setattr(benchmark, "Schedule", schedule)
    patch.setattr(benchmark, "DUELS", 1)
    patch.setattr(benchmark, "MORE_DUELS", 1)
