"""Small ONNX files made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def conv_model(path: Path, batch: str | int = "batch", scale: float = 1.0) -> Path:
    """x [batch, 4, 8, 8] -> Conv 3x3 -> Relu -> mean -> Gemm -> y [batch, 10]."""
    random = np.random.default_rng(0)
    w = (random.standard_normal((8, 4, 3, 3)) * scale).astype(np.float32)
    fc = (random.standard_normal((10, 8)) * scale).astype(np.float32)
    weights = [
        numpy_helper.from_array(w, "w"),
        numpy_helper.from_array(fc, "fc"),
        numpy_helper.from_array(np.array([2, 3], np.int64), "axes"),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("ReduceMean", ["r", "axes"], ["m"], "mean", keepdims=0),
        helper.make_node("Gemm", ["m", "fc"], ["y"], "linear", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10])],
        weights,
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), str(path))
    return path


def plain_model(path: Path, shape: list[int], kernel: list[int]) -> Path:
    """x -> Conv -> Conv -> y, of 8 channels and as many spatial axes as the kernel has."""
    random = np.random.default_rng(0)
    sizes = {"w1": (8, shape[1], *kernel), "w2": (8, 8, *kernel)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w1"], ["c"], "first"),
            helper.make_node("Conv", ["c", "w2"], ["y"], "second"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))],
        [
            numpy_helper.from_array(random.standard_normal(size).astype(np.float32), name)
            for name, size in sizes.items()
        ],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), str(path))
    return path
