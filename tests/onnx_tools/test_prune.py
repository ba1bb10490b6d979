from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from twofour.core.errors import InputError
from twofour.core.patterns import is_pattern
from twofour.onnx_tools.load import model_bytes
from twofour.onnx_tools.prune import prune

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
net (float[1,8,4,4] x, float[2,8] z) => (y, m, g) {
  y = Conv <pads = [1, 1, 1, 1]> (x, w)
  m = MatMul (z, k)
  g = Gemm <transB = 1> (z, t)
}
"""


def model(seed: int = 0, c: int = 8) -> ir.Model:
    proto = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(seed)
    found = ir.from_proto(proto)
    for name, shape in (("w", (16, c, 3, 3)), ("k", (8, 6)), ("t", (6, 8))):
        value = next(v for n in found.graph for v in n.inputs if v.name == name)
        value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name)
        value.shape, value.dtype = ir.Shape(shape), ir.DataType.FLOAT
        found.graph.initializers[name] = value
    for node, name in zip(found.graph, ("conv", "matmul", "gemm"), strict=True):
        node.name = name
    return found


def weights(found: ir.Model) -> dict[str, np.ndarray]:
    return {k: v.const_value.numpy() for k, v in found.graph.initializers.items()}


def test_every_layer_is_pruned_along_its_inputs_and_the_source_stays() -> None:
    source = model()
    before = weights(source)
    pruned, report = prune(source)
    after = weights(pruned)
    assert is_pattern(after["w"], "2:4")
    assert is_pattern(after["k"].T, "2:4")
    assert is_pattern(after["t"], "2:4")
    assert all((weights(source)[k] == before[k]).all() for k in before)
    for key, w in after.items():
        assert ((w == 0) | (w == before[key])).all()
    assert [r.reason for r in report] == ["", "", ""]
    assert all(0.7 < r.energy_kept < 1 for r in report)
    onnxruntime.InferenceSession(model_bytes(pruned), providers=["CPUExecutionProvider"])


def test_pruning_twice_changes_nothing() -> None:
    once, _ = prune(model())
    again, report = prune(once)
    assert all((weights(once)[k] == w).all() for k, w in weights(again).items())
    assert {r.reason for r in report} == {"already 2:4"}


def test_a_weight_of_another_pattern_stays_if_asked() -> None:
    wide, _ = prune(model(), "4:8")
    kept, report = prune(wide, keep=("4:8",))
    assert report[0].reason == "already 4:8"
    assert (weights(wide)["w"] == weights(kept)["w"]).all()
    assert (weights(wide)["w"] != weights(prune(wide)[0])["w"]).any()


def test_excluded_layers_stay_dense_and_say_so() -> None:
    pruned, report = prune(model(), skip=["con*", "k"])
    assert [r.reason for r in report] == ["excluded by name", "excluded by name", ""]
    assert not is_pattern(weights(pruned)["w"], "2:4")


def test_a_shape_that_cannot_have_the_pattern_is_left_with_the_reason() -> None:
    _, report = prune(model(c=3))
    assert "3 input channels" in report[0].reason


def test_an_unknown_pattern_is_an_error() -> None:
    with pytest.raises(InputError):
        prune(model(), "4:2:1")
