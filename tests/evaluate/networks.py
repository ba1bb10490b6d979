"""A small classifier, its data, and ways to spoil one of its layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from twofour.core.masks import magnitude_mask
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.quantize import quantize

CHANNELS, SIZE, CLASSES = 16, 6, 5
LAYERS = ("c0", "c1", "c2", "fc")


def weights(seed: int = 8) -> dict[str, np.ndarray]:
    """Dense, and all but 2:4: pruning by magnitude takes next to nothing."""
    random = np.random.default_rng(seed)
    shapes = {name: (CHANNELS, CHANNELS, 3, 3) for name in LAYERS[:-1]}
    shapes["fc"] = (CLASSES, CHANNELS * SIZE * SIZE)
    found = {}
    for name, shape in shapes.items():
        w = random.standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape[1:]))
        large = magnitude_mask(w, "2:4")
        found[name] = np.where(large, w + np.sign(w) * np.abs(w).max() / 4, 0.01 * w)
    return {name: w.astype(np.float32) for name, w in found.items()}


def network(arrays: dict[str, np.ndarray], batch: int | str = "batch") -> onnx.ModelProto:
    """Three convolutions with Relu, and a Gemm; input x, output y."""
    nodes, value = [], "x"
    for name in LAYERS[:-1]:
        pads = {"kernel_shape": [3, 3], "pads": [1] * 4}
        nodes.append(helper.make_node("Conv", [value, f"{name}.w"], [f"{name}.y"], name, **pads))
        nodes.append(helper.make_node("Relu", [f"{name}.y"], [f"{name}.relu"], f"{name}.act"))
        value = f"{name}.relu"
    nodes.append(helper.make_node("Flatten", [value], ["flat"], "flatten"))
    nodes.append(helper.make_node("Gemm", ["flat", "fc.w"], ["y"], "fc", transB=1))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, CHANNELS, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(array, f"{name}.w") for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples(count: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, CHANNELS, SIZE, SIZE), np.float32)


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def quantized(path: Path, out: Path, coarse: str = "") -> Path:
    """The INT8 file; the scale of the tensor `coarse` is made 20 times too large."""
    model = quantize(load_model(path), {"x": samples(32)})
    if coarse:
        value = model.graph.initializers[f"{coarse}_scale"]
        assert value.const_value is not None
        value.const_value = ir.tensor(20 * value.const_value.numpy(), name=value.name)
    return save_model(model, out)


def pruned(arrays: dict[str, np.ndarray], spoiled: str = "") -> dict[str, np.ndarray]:
    """2:4 by magnitude; the mask of the layer `spoiled` keeps what is small instead."""
    found = {}
    for name, w in arrays.items():
        keep = magnitude_mask(w, "2:4")
        found[name] = np.where(keep != (name == spoiled), w, np.float32(0))
    return found
