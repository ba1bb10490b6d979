"""The files of the benchmark of sparse attention: one operator on q, k and v [1, length, 12 * 64].

Sparse attention with its meaning as an ONNX function; dense attention as exporters write it, a
product, a softmax and a product; and dense attention as ONNX Runtime's own operator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from twofour.core.sparse_attention import NO_BLOCKS
from twofour.onnx_tools.plugins import attach_meanings
from twofour.operators.sparse_attention import DOMAIN, NAME

HEADS, D, WINDOW = 12, 64, 256
SCALE = 4.5 / 127
"""Of int8 tensors of normal values."""


def file_of(kind: str, folder: Path, length: int) -> Path:
    """A new file: `kind` is "sparse", "all" (a window that holds all), "dense" or "fused".

    With " int8" behind it, q, k and v are bytes.
    """
    kind, _, int8 = kind.partition(" ")
    if kind in ("sparse", "all"):
        return sparse_file(folder, length, WINDOW if kind == "sparse" else length, bool(int8))
    if kind == "dense":
        return dense_file(folder, length, bool(int8))
    return fused_file(folder, length)


def sparse_file(folder: Path, length: int, window: int, int8: bool) -> Path:
    """A file of one SparseAttention."""
    names = [f"{x}_real" for x in "qkv"] if int8 else [*"qkv"]
    nodes = [
        helper.make_node("DequantizeLinear", [x, "scale", "zero"], [name])
        for x, name in zip("qkv", names, strict=True)
        if int8
    ]
    nodes.append(
        helper.make_node(
            NAME, [*names, "keep", "blocks"], ["y"], "attention", domain=DOMAIN, heads=HEADS,
            window=window,
        )
    )  # fmt: skip
    constants = [
        numpy_helper.from_array(np.float32(SCALE), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
        numpy_helper.from_array(np.ones((1, 1), bool), "keep"),
        numpy_helper.from_array(NO_BLOCKS, "blocks"),
    ]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    kind = TensorProto.INT8 if int8 else TensorProto.FLOAT
    constants = constants if int8 else constants[2:]
    model = ir.from_proto(_model(nodes, length, constants, opsets, kind))
    attach_meanings(model)
    path = folder / f"sparse_{window}_{length}_{kind}.onnx"
    ir.save(model, path)
    return path


def dense_file(folder: Path, length: int, int8: bool) -> Path:
    """Products and a softmax, as exporters write attention, quantized or not."""
    heads = numpy_helper.from_array(np.array([0, 0, HEADS, D]), "heads")
    joined = numpy_helper.from_array(np.array([0, 0, HEADS * D]), "joined")
    scale = numpy_helper.from_array(np.float32(D**-0.5), "scale")
    nodes = []
    shares = "shares_rounded" if int8 else "shares"
    for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        real = name
        if int8:
            real = f"{name}_real"
            nodes.append(helper.make_node("DequantizeLinear", [name, "step", "zero"], [real]))
        nodes.append(helper.make_node("Reshape", [real, "heads"], [f"{name}_heads"]))
        nodes.append(helper.make_node("Transpose", [f"{name}_heads"], [f"{name}_first"], perm=perm))
    nodes += [
        helper.make_node("MatMul", ["q_first", "k_first"], ["products"]),
        helper.make_node("Mul", ["products", "scale"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", [shares, "v_first"], ["y_first"]),
        helper.make_node("Transpose", ["y_first"], ["y_heads"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["y_heads", "joined"], ["y"]),
    ]
    constants, kind = [heads, joined, scale], TensorProto.FLOAT
    if int8:
        kind = TensorProto.INT8
        at = next(i for i, node in enumerate(nodes) if node.op_type == "Softmax") + 1
        nodes[at:at] = [
            helper.make_node("QuantizeLinear", ["shares", "share", "none"], ["shares_stored"]),
            helper.make_node("DequantizeLinear", ["shares_stored", "share", "none"], [shares]),
        ]
        numbers = {"step": np.float32(SCALE), "zero": np.int8(0)}
        numbers |= {"share": np.float32(1 / 255), "none": np.uint8(0)}
        constants += [numpy_helper.from_array(value, name) for name, value in numbers.items()]
    model = _model(nodes, length, constants, [helper.make_opsetid("", 18)], kind)
    path = folder / f"dense_{length}_{kind}.onnx"
    onnx.save(model, path)
    return path


def fused_file(folder: Path, length: int) -> Path:
    """ONNX Runtime's own operator."""
    node = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=HEADS
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    path = folder / f"fused_{length}.onnx"
    onnx.save(_model([node], length, [], opsets), path)
    return path


def _model(
    nodes: list[Any],
    length: int,
    constants: list[Any],
    opsets: list[Any],
    kind: int = TensorProto.FLOAT,
) -> Any:
    shape = [1, length, HEADS * D]
    inputs = [helper.make_tensor_value_info(x, kind, shape) for x in "qkv"]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def feeds_of(length: int) -> dict[str, np.ndarray]:
    """Normal q, k and v."""
    random = np.random.default_rng(0)
    return {x: random.standard_normal((1, length, HEADS * D), np.float32) for x in "qkv"}
