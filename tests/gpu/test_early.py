"""Kernels started before those in front of them have ended give the same bytes, again and again."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import triton

from tests.compiler.cuda.test_interpreted import CASES, feeds_of, model_of
from twofour.compiler.build import build
from twofour.compiler.cuda.early import EARLY, EVEN, with_ways
from twofour.core.cuda_program import CudaProgram
from twofour.core.gpus import read_capabilities
from twofour.engine import Engine
from twofour.kernels.cuda.kernel import EARLY_LEAST
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize
from twofour.runtime.cuda.device import open_device
from twofour.runtime.cuda.network import CudaNetwork
from twofour.runtime.shapes import Bound

RUNS = 100

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not any(10 * major + minor >= EARLY_LEAST for major, minor in read_capabilities()),
        reason="there is no NVIDIA GPU that starts kernels early",
    ),
]


def all_early(engine: Engine, way: str) -> tuple[Engine, int]:
    """The engine with every kernel that may be started early started so, and how many."""
    held, count = {}, 0
    for step in engine.plan.steps:
        program = CudaProgram.from_bytes(engine.subgraphs[step.symbol].tobytes())
        codes = {launch.code for launch in program.launches} if way else ()
        program = with_ways(program, dict.fromkeys(codes, way), open_device(0).room)
        held[step.symbol] = np.frombuffer(program.to_bytes(), np.uint8)
        count += sum(launch.early for launch in program.launches)
    return replace(engine, subgraphs=engine.subgraphs | held), count


def runs(engine: Engine, feeds: dict[str, Any], times: int) -> list[dict[str, bytes]]:
    """What each of so many runs writes, on an arena that held nothing of the run before."""
    (profile,), found = engine.plan.profiles, []
    (step,) = profile.steps
    with closing(CudaNetwork(engine)) as network:
        ready = network.step(step, profile)
        for _ in range(times):
            network.wipe()
            network.enter(profile)
            tensors = dict(feeds)
            ready.run(tensors, Bound(0, (), {}))
            found.append({name: tensors[name].tobytes() for name in step.outputs})
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_same_bytes(case: str) -> None:
    text, types, quantized, _ = CASES[case]
    model = prune(model_of(text))[0]
    feeds = feeds_of(model)
    options: dict[str, Any] = {"fp16": types.real == "float16"}
    if quantized:
        model = quantize(model, [feeds], QuantizeOptions(activation="int8"))
        options["fp8"] = types.quantized != "int8"
    engine = build(model, target="cuda", tuning_effort=0, **options)
    if not hasattr(triton.knobs.runtime, "add_stages_inspection_hook"):
        pytest.skip("kernels of this Triton do not wait")
    if len(engine.plan.steps) != 1:
        pytest.skip(f"{len(engine.plan.steps)} steps")
    plain, none = all_early(engine, "")
    assert none == 0
    (wanted,) = runs(plain, feeds, 1)
    for way in (EARLY, EVEN):
        early, count = all_early(engine, way)
        assert count > 0
        wrong = [i for i, got in enumerate(runs(early, feeds, RUNS)) if got != wanted]
        assert not wrong, f"{way}: {len(wrong)} of {RUNS} runs, the first is {wrong[0]}"
