"""NVIDIA's Polygraphy agrees which weights of a pruned file are 2:4.

It looks at initializers of the main graph that a Conv, Gemm or MatMul reads directly, or through
Q/DQ, Cast and Transpose, along the axis of the input channels. It does not look at int8 weights, at
constants that nodes hold, into bodies of If, Loop and Scan, nor at a MatMul's stack of matrices
along the right axis; and it passes over weights whose input channels 4 does not divide.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.graphs import graph
from twofour.onnx_tools.load import save_model
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize

RANDOM = np.random.default_rng(0)
START = "import sys; from polygraphy.tools._main import main; sys.argv[0] = 'polygraphy'; main()"
NET = """(float[n,8,6,6] x) => (float[n,4] y) <int64[2] hw = {2, 3}>
{
    c = Conv <pads = [1, 1, 1, 1]> (x, conv)
    g = Conv <group = 2> (c, grouped)
    m = ReduceMean <keepdims = 0> (g, hw)
    d = MatMul (m, matmul)
    t = Transpose <perm = [1, 0]> (transposed)
    e = MatMul (d, t)
    f = Gemm <transB = 1> (e, gemm_t)
    y = Gemm (f, gemm)
}"""
SHAPES = {
    "conv": (8, 8, 3, 3), "grouped": (16, 4, 3, 3), "matmul": (16, 8), "transposed": (12, 8),
    "gemm_t": (16, 12), "gemm": (16, 4),
}  # fmt: skip


def net() -> ir.Model:
    """Every layer and layout that Polygraphy looks at."""
    shapes = SHAPES.items()
    return graph(NET, **{n: RANDOM.standard_normal(s).astype(np.float32) for n, s in shapes})


def polygraphy(path: Path) -> tuple[set[str], set[str], str]:
    """The weights that `polygraphy inspect sparsity` calls sparse, and those it does not."""
    command = [sys.executable, "-c", START, "inspect", "sparsity", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    sparse, dense = (
        set(re.findall(rf"Found {kind} tensor: (\S+)", text)) for kind in ("sparse", "non-sparse")
    )
    return sparse, dense, text


@pytest.mark.parametrize("pattern", ["2:4", "2:4/pair", "2:4/2d"])
def test_polygraphy_agrees_that_every_weight_is_2_to_4(tmp_path: Path, pattern: str) -> None:
    dense = net()
    assert polygraphy(save_model(dense, tmp_path / "dense.onnx"))[:2] == (set(), set(SHAPES))
    pruned, report = prune(dense, pattern)
    assert [entry.reason for entry in report] == [""] * len(SHAPES)
    assert polygraphy(save_model(pruned, tmp_path / "sparse.onnx"))[:2] == (set(SHAPES), set())


def test_polygraphy_sees_a_mask_that_is_broken_in_one_group(tmp_path: Path) -> None:
    pruned, _ = prune(net())
    for name in ("conv", "gemm", "transposed"):
        value = pruned.graph.initializers[name]
        broken = value.const_value.numpy().copy()
        index = {"conv": np.s_[7, 4:8, 2, 2], "gemm": np.s_[12:, 3], "transposed": np.s_[5, 4:8]}
        broken[index[name]] = 1
        value.const_value = ir.tensor(broken, name=name)
    found = polygraphy(save_model(pruned, tmp_path / "m.onnx"))
    assert found[1] == {"conv", "gemm", "transposed"}
    assert found[0] == set(SHAPES) - found[1]


def test_polygraphy_does_not_look_at_int8_weights(tmp_path: Path) -> None:
    pruned, _ = prune(net())
    x = RANDOM.standard_normal((8, 8, 6, 6)).astype(np.float32)
    int8 = quantize(pruned, {"x": x})
    sparse, dense, text = polygraphy(save_model(int8, tmp_path / "m.onnx"))
    assert (sparse, dense) == (set(), set())
    assert "Skipping tensor: conv_quantized due to unsupported type" in text
