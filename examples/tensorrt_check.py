"""Builds a model for the GPU of this machine, runs it, and holds it against ONNX Runtime.

    python examples/tensorrt_check.py model.onnx [--fp16] [--target tensorrt-rtx]

Exit code 1 where results differ by more than 16 or 8 bits explain, 2 where nothing could be run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

import twofour
from twofour.core.errors import Error
from twofour.core.target import parse_target
from twofour.engine import Engine

RUNS = 50
MOST_ERROR = 0.05
"""Of the norm of a result."""


def main() -> int:
    """Builds, runs, compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--target", default="tensorrt")
    parser.add_argument("--fp16", action="store_true")
    arguments = parser.parse_args()
    try:
        target = parse_target(arguments.target)
        engine = twofour.build(arguments.model, target=target, fp16=arguments.fp16)
        print(f"built for {engine.plan.target} by {target.tensorrt and target.tensorrt.title}")
        for layer in engine.plan.layers:
            print(
                f"  {layer.name[:60]}: {layer.op} {layer.precision} {layer.tactic} {layer.config}"
            )
        for note in engine.plan.notes:
            print(f"note: {note}")
        return compare(arguments.model, engine)
    except Error as error:
        print(error, file=sys.stderr)
        return 2


def compare(model: str, engine: Engine) -> int:
    """Runs both on the same numbers."""
    random = np.random.default_rng(0)
    feeds: dict[str, NDArray[Any]] = {
        info.name: random.random(info.usual_shape).astype(info.dtype) for info in engine.plan.inputs
    }
    reference = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [info.name for info in engine.plan.outputs]
    expected = dict(zip(names, reference.run(names, feeds), strict=True))
    with twofour.Session(engine) as session:
        found = session.run(feeds)
        times = []
        for _ in range(RUNS):
            start = time.perf_counter()
            session.run(feeds)
            times.append(time.perf_counter() - start)
    print(f"median of {RUNS} runs: {statistics.median(times) * 1e3:.3f} ms, copies included")
    worst = 0.0
    for name in names:
        size = max(float(np.linalg.norm(expected[name])), 1e-9)
        error = float(np.linalg.norm(found[name].astype(np.float64) - expected[name])) / size
        worst = max(worst, error)
        print(f"{name}: relative error {error:.2e}")
    return int(not worst < MOST_ERROR)


if __name__ == "__main__":
    sys.exit(main())
