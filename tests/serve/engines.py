"""Small engines for tests of the server, built once a run: of images, and of sequences."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
from onnx import parser

import twofour
from twofour.engine import Engine

CHANNELS, CLASSES = 4, 3


@cache
def image_engine(seed: int = 0, most: int = 8, scale: float = 1.0) -> Engine:
    """x float32 [1 to `most`, 4, 6, 6] -> y float32 [rows, 3]; another seed, other weights."""
    rng = np.random.default_rng(seed)
    shape = "4, 6, 6"
    model = parser.parse_model(f"""
        <ir_version: 9, opset_import: ["" : 17]>
        image (float[batch, {shape}] x) => (float[batch, 3] y) {{
            h = Conv <pads = [1, 1, 1, 1]> (x, w)
            r = Relu (h)
            p = GlobalAveragePool (r)
            f = Flatten (p)
            y = MatMul (f, v)
        }}""")
    _add(model, "w", scale * rng.normal(size=(8, CHANNELS, 3, 3)))
    _add(model, "v", rng.normal(size=(8, CLASSES)))
    ranges = ((1, 4, 6, 6), (2, 4, 6, 6), (most, 4, 6, 6))
    return twofour.build(model, shapes={"x": ranges}, threads=1, race=False)


def image(rows: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of `image_engine`."""
    x = np.random.default_rng(seed).normal(size=(rows, CHANNELS, 6, 6))
    return {"x": x.astype(np.float32)}


@cache
def text_engine(most: int = 8, longest: int = 16) -> Engine:
    """ids int64, mask float32 [rows, length] -> tokens [rows, length, 4], mean [rows, 4]."""
    model = parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 17]>
        text (int64[batch, length] ids, float[batch, length] mask)
            => (float[batch, length, 4] tokens, float[batch, 4] mean) {
            one = Constant <value_ints = [1]> ()
            two = Constant <value_ints = [2]> ()
            h = Gather (table, ids)
            m = Unsqueeze (mask, two)
            tokens = Mul (h, m)
            sums = ReduceSum <keepdims = 0> (tokens, one)
            counts = ReduceSum <keepdims = 1> (mask, one)
            mean = Div (sums, counts)
        }""")
    _add(model, "table", np.random.default_rng(1).normal(size=(50, 4)))
    ranges = ((1, 1), (2, 4), (most, longest))
    return twofour.build(model, shapes={"ids": ranges, "mask": ranges}, threads=1, race=False)


def text(rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of `text_engine`."""
    ids = np.random.default_rng(seed).integers(0, 50, (rows, length))
    return {"ids": ids, "mask": np.ones((rows, length), np.float32)}


def _add(model: onnx.ModelProto, name: str, values: np.ndarray) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
