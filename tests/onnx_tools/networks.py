"""Small residual networks as ONNX text with random weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tests.graphs import graph
from twofour.core.masks import magnitude_mask


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random float32 weights, scaled so that activations stay near 1."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in shapes.items():
        fan_in = max(int(np.prod(shape[1:])), 1)
        arrays[name] = (rng.standard_normal(shape) * (2 / fan_in) ** 0.5).astype(np.float32)
    return arrays


def sparse(w: np.ndarray, pattern: str = "2:4") -> np.ndarray:
    """The weight with all but the largest of each group set to zero."""
    return w * magnitude_mask(w, pattern)


INTS = """
    int64[4] no_pad = {0, 0, 0, 0}, int64[4] steps = {1, 1, 2, 2}, int64[4] ends = {99, 99, 99, 99},
    int64[4] all_axes = {0, 1, 2, 3}, int64[8] channels = {0, 4, 0, 0, 0, 4, 0, 0},
    int64[2] hw = {2, 3}"""

OPTION_A = f"""(float[n,4,8,8] x) => (float[n,5] y) <{INTS}>
{{
    c1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    r1 = Relu (c1)
    c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2, b2)
    a2 = Add (c2, r1)
    r2 = Relu (a2)
    c3 = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r2, w3, b3)
    r3 = Relu (c3)
    c4 = Conv <pads = [1, 1, 1, 1]> (r3, w4, b4)
    s4 = Slice (r2, no_pad, ends, all_axes, steps)
    p4 = Pad (s4, channels)
    a4 = Add (p4, c4)
    r4 = Relu (a4)
    m = ReduceMean <keepdims = 0> (r4, hw)
    y = Gemm <transB = 1> (m, fc, fb)
}}"""


def option_a(**replaced: np.ndarray) -> ir.Model:
    """Stem, one plain block, one block with a strided, padded shortcut, mean, linear layer."""
    arrays = weights(w1=(8, 4, 3, 3), w2=(8, 8, 3, 3), w3=(16, 8, 3, 3), w4=(16, 16, 3, 3))
    arrays |= weights(b1=(8,), b2=(8,), b3=(16,), b4=(16,), fc=(5, 16), fb=(5,))
    return graph(OPTION_A, **(arrays | replaced))


def samples(count: int = 16, shape: tuple[int, ...] = (4, 8, 8), seed: int = 0) -> np.ndarray:
    """Random inputs [count, *shape]."""
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)
