"""twofour inspect: what it prints of weights and operators, and what it must not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from tests.cuda_engines import cuda_engine
from tests.onnx_tools.networks import sparse
from twofour.cli import app

READ = """
import sys
from twofour.cli import main
try:
    main()
finally:
    heavy = {"sympy.core", "onnx.reference.ops._op_list", "torch", "openvino"}
    print(sorted(heavy & set(sys.modules)))
"""


def inspect(*arguments, width=100):
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": str(width)})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def path(tmp_path):
    """Two layers alike, one that is nearly 2:4, and a Cos that no kernel takes."""
    random = np.random.default_rng(0)
    weights = {n: sparse(random.normal(size=(32, 32, 3, 3)).astype(np.float32)) for n in "abc"}
    weights["c"][17, 20:24, 0, 2] = 1
    nodes, last = [], "x"
    for name in weights:
        nodes.append(
            helper.make_node("Conv", [last, name], [f"y{name}"], f"net.{name}", pads=[1] * 4)
        )
        last = f"y{name}"
    nodes.append(helper.make_node("Cos", [last], ["y"], "net.cos"))
    dims = [1, 32, 5, 5]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, dims) for n in "xy"]
    tensors = [numpy_helper.from_array(w, n) for n, w in weights.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "m.onnx"


def test_alike_weights_share_a_row(path):
    text = inspect(path)
    row = next(line for line in text.splitlines() if "net.a ... net.b" in line)
    assert row.split()[3:] == ["2", "Conv", "32x32x3x3", "float32", "50%", "2:4", "float"]
    assert "27,648 parameters, 110.6 kB; of 3 weights 2 are 2:4, 1 nearly" in text


def test_the_first_violation_is_named(path):
    text = inspect(path)
    assert "2:4 99.96%" in text
    where = "output channel 17, tap (0,2), channels 20-23 hold 4 nonzeros"
    assert f"- net.c is not 2:4: {where}" in text
    weight = json.loads(inspect(path, "--json"))["weights"][2]
    assert (weight["reason"], weight["patterns"]) == (where, [])
    assert weight["groups_held"] == pytest.approx(1 - 1 / (32 * 8 * 9))


def test_operators_and_where_they_run(path):
    text = inspect(path)
    assert "4 operators, 4 after folding: 3 native, 1 on ONNX Runtime" in text
    row = next(line for line in text.splitlines() if "net.cos" in line)
    assert row.split(maxsplit=3)[1:3] == ["1", "Cos"]
    assert "no native kernel for Cos" in row
    runs = json.loads(inspect(path, "--json"))["runs"]
    assert [each["runs"] for each in runs["operators"]] == [*["native"] * 3, "onnxruntime"]


def test_every_weight_has_a_row_on_request(path):
    lines = inspect(path, "--all").splitlines()
    assert all(any(f" net.{n} " in line for line in lines) for n in "abc")


@pytest.mark.parametrize("width", [60, 100])
def test_it_fits(path, width):
    assert max(map(len, inspect(path, width=width).splitlines())) <= width


def test_it_imports_nothing_heavy_that_it_does_not_use(path):
    command = [sys.executable, "-c", READ, "inspect", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_engine_for_a_gpu_says_what_it_needs(tmp_path: Path) -> None:
    path = cuda_engine().save(tmp_path / "gpu.engine")
    result = CliRunner().invoke(app, ["inspect", str(path)], catch_exceptions=False)
    assert "for cuda:sm90" in result.stdout
    assert "GPU for sm90" in result.stdout
    assert "step 0: 2 layers as a CUDA graph" in result.stdout
