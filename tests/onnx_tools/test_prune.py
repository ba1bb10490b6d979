from __future__ import annotations

import json

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from twofour.core.errors import InputError
from twofour.core.patterns import is_pattern
from twofour.core.promises import KEY
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


def test_a_name_to_skip_that_matches_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="'kk' matches no layer") as refused:
        prune(model(), skip=["k", "kk"])
    assert "conv, gemm, k, matmul, t, w" in str(refused.value)


BRANCHES = """
<ir_version: 10, opset_import: ["" : 18]>
net (bool c, float[2,8] x) => (y) {
  y = If (c) <
    then_branch = then () => (a) { a = MatMul (x, w) },
    else_branch = else () => (b) { b = MatMul (x, w) }
  >
}
"""


def test_two_weights_of_one_name_promise_nothing_unless_both_have_it() -> None:
    proto = onnx.parser.parse_model(BRANCHES)
    rng = np.random.default_rng(0)
    for attribute in proto.graph.node[0].attribute:
        attribute.g.node[0].name = attribute.g.name
        w = onnx.numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), "w")
        attribute.g.initializer.append(w)
    pruned, report = prune(ir.from_proto(proto), skip=["else"])
    assert sorted(r.reason for r in report) == ["", "excluded by name"]
    assert KEY not in pruned.metadata_props
    assert prune(pruned)[0].metadata_props[KEY] == '{"w": "2:4"}'


def test_a_weight_read_along_two_axes_promises_nothing_unless_it_has_it_along_both() -> None:
    text = TEXT.replace("Conv <pads = [1, 1, 1, 1]> (x, w)", "Identity (x)")
    proto = onnx.parser.parse_model(text.replace("(z, t)", "(m, k)"))
    k = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(k, "k"))
    pruned, report = prune(ir.from_proto(proto))
    assert [r.reason for r in report] == ["", "6 input channels are not a multiple of 4"]
    assert KEY not in pruned.metadata_props


def test_a_stricter_promise_stays_as_long_as_it_is_kept() -> None:
    pairs, _ = prune(model(), "2:4/2d", include=["gemm", "conv"])
    both, _ = prune(pairs, "2:4")
    assert json.loads(both.metadata_props[KEY]) == {"k": "2:4", "t": "2:4", "w": "2:4/2d"}
    both.graph.initializers["w"].const_value = prune(model())[0].graph.initializers["w"].const_value
    assert json.loads(prune(both)[0].metadata_props[KEY]) == {
        "k": "2:4", "t": "2:4", "w": "2:4"}  # fmt: skip
