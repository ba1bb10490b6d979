"""Engines built on the GPU: every candidate compared and timed, outputs those of ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.compiler.cuda.test_interpreted import CASES, feeds_of, model_of, reference
from tests.gpu.launch import capability
from twofour.compiler.build import build
from twofour.core.gpus import read_capabilities
from twofour.core.plan import is_sparse
from twofour.kernels.cuda.kernel import EARLY_LEAST
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize
from twofour.runtime.session import Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not read_capabilities(), reason="there is no NVIDIA GPU"),
]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_an_engine_gives_what_the_model_means(case: str, sparse: bool) -> None:
    text, types, quantized, bound = CASES[case]
    model = model_of(text)
    if sparse:
        model = prune(model)[0]
    feeds = feeds_of(model)
    wanted = reference(model, feeds)
    options: dict[str, Any] = {"fp16": types.real == "float16"}
    if quantized:
        model = quantize(model, [feeds], QuantizeOptions(activation="int8"))
        options["fp8"] = types.quantized != "int8"
    engine = build(model, target="cuda", tuning_effort=1, **options)
    wrong = [note for note in engine.plan.notes if "it is wrong" in note]
    print(case, [(layer.name, layer.tactic, layer.time_us) for layer in engine.plan.layers])
    assert not [note for note in wrong if "cusparselt" not in note], wrong
    early = [note for note in engine.plan.notes if "started early" in note]
    assert early or capability() < EARLY_LEAST
    assert not [note for note in early if "defect" in note or "refused" in note], early
    assert all(layer.time_us for layer in engine.plan.layers)
    assert sparse or not any(is_sparse(layer.tactic) for layer in engine.plan.layers)
    with Session(engine) as session:
        for _ in range(2):
            got = session.run(feeds)
            for name, expected in wanted.items():
                error = np.linalg.norm(got[name] - expected) / np.linalg.norm(expected)
                assert error <= max(bound, 0.06 if quantized else 0.0), f"{name}: {error:.3g}"
