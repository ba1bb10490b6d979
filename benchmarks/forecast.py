"""Forecasts against the engines that come out later: within ten percent, or exit code 1.

    python benchmarks/forecast.py resnet50.onnx --shapes x:1x3x224x224
    python benchmarks/forecast.py bert.onnx --shapes input_ids:1x128 --shapes attention_mask:1x128

For each model: a forecast; then the model is pruned, quantized with random data as calibration
takes it, and built, each as a user does it, with times measured anew. Every engine runs in turns
with the float32 dense one, and its time, and how many times as fast it is, are compared with what
was forecast. The machine has to be quiet.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from twofour.bench.inputs import model_inputs, random_feeds, static_inputs
from twofour.bench.timing import Schedule, race, ratio
from twofour.bench.versus import ours
from twofour.cli.options import parse_shapes
from twofour.compiler.build import build
from twofour.engine import Engine
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize
from twofour.predict.forecast import forecast
from twofour.predict.results import Run
from twofour.runtime.session import Session

WITHIN = 0.10
SAMPLES = 4
Shapes = dict[str, tuple[int, ...]]


def later(model: Path, shapes: Shapes, run: Run, feeds: dict[str, np.ndarray]) -> Engine:
    """The engine of a form, as a user builds it."""
    source = load_model(model)
    if run.pattern:
        source = prune(source, run.pattern)[0]
    if run.precision == "int8":
        data = {name: np.concatenate([array] * SAMPLES) for name, array in feeds.items()}
        source = quantize(source, data, QuantizeOptions(threads=1))
    sparsity = "enable" if run.pattern else "disable"
    return build(source, shapes=shapes, bf16=run.precision == "bf16", sparsity=sparsity)


def check(model: Path, shapes: Shapes) -> bool:
    """Prints a table; returns whether all is within bounds."""
    found = forecast(model, shapes=shapes)
    feeds = random_feeds(static_inputs(model_inputs(model), shapes, None))
    feeds = {n: np.minimum(x, 1) if x.dtype.kind in "iu" else x for n, x in feeds.items()}
    fine, base = True, None
    print(f"{model.name}: forecast / later engine")
    with ExitStack() as held:
        for run in (run for run in found.runs if run.measured):
            with ExitStack() as passing:
                session = Session(later(model, shapes, run, feeds))
                (held if base is None else passing).enter_context(session)
                mine = ours(session, feeds, run.name)
                base = base or mine
                own, first = race([mine, base], Schedule(3.0, min_rounds=15))
            fast = ratio(own, first).median
            off = (run.time_us / own.median_us - 1, (run.vs_f32 or fast) / fast - 1)
            fine &= max(map(abs, off)) < WITHIN
            print(
                f"  {run.name:18} {run.time_us / 1e3:8.2f} / {own.median_us / 1e3:8.2f} ms "
                f"{off[0]:+6.1%}   {run.vs_f32 or 0:5.2f} / {fast:5.2f} x {off[1]:+6.1%}",
                flush=True,
            )
    return fine


def main() -> None:
    """Reads the arguments; exit code 1 where a forecast was off by more than the bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--shapes", action="append", default=[])
    arguments = parser.parse_args()
    shapes = parse_shapes(arguments.shapes)
    sys.exit(0 if all([check(model, shapes) for model in arguments.models]) else 1)


if __name__ == "__main__":
    main()
