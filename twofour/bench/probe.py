"""What sparsity pays on this machine: one typical convolution, dense and 2:4, timed by a build."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from twofour.compiler.build import build
from twofour.core.masks import magnitude_mask
from twofour.core.plan import is_sparse
from twofour.core.progress import Report
from twofour.core.target import host_target, why_no_bf16
from twofour.engine import Layer

CHANNELS, SIZE = 128, 28
CASES = (
    ("int8", "2:4"),
    ("int8", "2:4/pair"),
    ("bfloat16", "2:4"),
    ("bfloat16", "2:4/pair"),
    ("float32", "2:4"),
)


@dataclass(frozen=True)
class Probe:
    """Times of a 3x3 convolution of 128 to 128 channels on 28x28, batch 1, one thread.

    Attributes:
        precision: "int8", "bfloat16" or "float32".
        pattern: "2:4" or "2:4/pair".
        dense_us: the best dense kernel.
        sparse_us: the best kernel that uses the pattern.
        gain: times as fast.
        dense_gops: additions and multiplications of the dense kernel, thousand millions a second.
    """

    precision: str
    pattern: str
    dense_us: float
    sparse_us: float
    gain: float
    dense_gops: float


def probe(report: Report | None = None) -> list[Probe]:
    """Builds and times the convolution for each of `CASES`; takes some seconds.

    Args:
        report: told how far it is.
    """
    found = []
    for done, (precision, pattern) in enumerate(CASES):
        if report is not None:
            report(done, len(CASES), f"{precision}, {pattern}")
        found += _probe(precision, pattern)
    return found


def _probe(precision: str, pattern: str) -> list[Probe]:
    """Empty where no kernel takes the pattern, or the CPU has no such instructions."""
    bf16 = precision == "bfloat16"
    if bf16 and why_no_bf16(host_target()):
        return []
    x = np.random.default_rng(0).standard_normal((1, CHANNELS, SIZE, SIZE)).astype(np.float32)
    int8 = precision == "int8"
    data = {"x": x} if int8 else None

    def layer_of(sparsity: str) -> Layer:
        """Each kind is tuned alone: beside a faster one it would not be tuned to the end."""
        model = _convolution(pattern)
        engine = build(model, int8=int8, data=data, bf16=bf16, sparsity=sparsity, race=False)
        return max(engine.plan.layers, key=lambda layer: layer.macs)

    dense, sparse = layer_of("disable"), layer_of("force")
    if dense.time_us is None or sparse.time_us is None or not is_sparse(sparse.tactic):
        return []
    gain, gops = dense.time_us / sparse.time_us, 2e-3 * dense.macs / dense.time_us
    return [Probe(precision, pattern, dense.time_us, sparse.time_us, gain, gops)]


def _convolution(pattern: str) -> ModelProto:
    """One layer, [1, 128, 28, 28] to the same shape, its weight pruned by magnitude."""
    shape = (CHANNELS, CHANNELS, 3, 3)
    w = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    w *= magnitude_mask(w, pattern)
    sides = [1, CHANNELS, SIZE, SIZE]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1, 1, 1, 1])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sides)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, sides)],
        [numpy_helper.from_array(w, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
