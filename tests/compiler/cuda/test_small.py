"""Small operators through the compiler for GPUs, in the interpreter, against ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.compiler.cuda.execute import run
from tests.compiler.engines import reference
from tests.compiler.test_build_detection import detector, image
from tests.compiler.test_native_nd import GROUPS, Group, feeds, model_of
from tests.graphs import graph
from twofour.compiler.build import build
from twofour.compiler.cuda.graphs import network_of
from twofour.compiler.cuda.types import Types
from twofour.core.cuda_check import wrong_program
from twofour.core.cuda_program import CudaProgram
from twofour.engine import Engine

SLACK = 6e-6
"""Functions of a GPU, and sums in another order."""


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_equal_to_onnxruntime(group: Group) -> None:
    model = model_of(group)
    want = reference(model, feeds())
    network = network_of(model, {}, Types("float32"), forced=False, dump=None)
    got = run(network, feeds())
    for i, line in enumerate(group.lines):
        a, b = got[f"y{i}"], want[f"y{i}"]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), line
        if b.dtype.kind != "f":
            np.testing.assert_array_equal(a, b, line)
            continue
        size = np.abs(b[np.isfinite(b)]).max(initial=1.0)
        assert np.allclose(a, b, rtol=SLACK, atol=SLACK * size, equal_nan=True), line


def test_a_detector_gives_as_many_rows_as_there_are() -> None:
    model = detector()
    network = network_of(model, {}, Types("float32"), forced=False, dump=None)
    counts = set()
    for seed in range(3):
        rows = run(network, image(seed))["chosen"]
        np.testing.assert_array_equal(rows, reference(model, image(seed))["chosen"])
        counts.add(len(rows))
    assert len(counts) > 1


def test_an_engine_says_how_many_rows_there_may_be(tmp_path: Path) -> None:
    engine = build(detector(), target="cuda:sm90", tuning_effort=0)
    again = Engine.load(engine.save(tmp_path / "e.engine"))
    (output,) = again.plan.outputs
    assert output.most == (60, 3)
    (step,) = again.plan.steps
    assert step.outputs == ("chosen", output.count)
    program = CudaProgram.from_bytes(again.subgraphs[step.symbol].tobytes())
    profile = again.plan.profiles[0]
    assert [*wrong_program(program, step, profile, again.plan, again.weights.nbytes)] == []
    alone = replace(step, outputs=("chosen",))
    less = replace(program, outputs=program.outputs[:1])
    reasons = [*wrong_program(less, alone, profile, again.plan, again.weights.nbytes)]
    assert any("is open" in reason for reason in reasons)


def test_images_are_resized_and_their_maxima_may_lie_apart() -> None:
    random = np.random.default_rng(0)
    model = graph(
        "(float[2,3,5,7] x) => (float[2,4,8,3] y, float[2,5,3,3] z) { a = Conv (x, u)"
        ' b = Resize <mode = "linear"> (a, , scales) y = Conv (b, v)'
        " z = MaxPool <kernel_shape = [3,3], dilations = [1,2], strides = [1,1]> (a) }",
        opset=19,
        u=random.normal(size=(5, 3, 1, 1)).astype(np.float32),
        v=random.normal(size=(4, 5, 1, 1)).astype(np.float32),
        scales=np.array([1, 1, 1.6, 0.5], np.float32),
    )
    inputs = {"x": random.normal(size=(2, 3, 5, 7)).astype(np.float32)}
    network = network_of(model, {}, Types("float32"), forced=False, dump=None)
    got = run(network, inputs)
    for name, wanted in reference(model, inputs).items():
        np.testing.assert_allclose(got[name], wanted, rtol=1e-5, atol=1e-5, err_msg=name)
