"""Sparse constants become dense; operators that only ONNX Runtime knows pass the checks."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from twofour.core.errors import InputError
from twofour.onnx_tools.load import load_model, model_bytes
from twofour.onnx_tools.sparse import densified, make_dense

W = np.zeros((4, 3), np.float32)
W[1, 2], W[3, 0] = 5, 7


def sparse(indices: list, dims=(4, 3), values=(5.0, 7.0)) -> onnx.SparseTensorProto:
    found = onnx.numpy_helper.from_array(np.array(values, np.float32), "w")
    places = onnx.numpy_helper.from_array(np.array(indices, np.int64), "w_indices")
    return onnx.helper.make_sparse_tensor(found, places, list(dims))


def net(tensor: onnx.SparseTensorProto) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2,4] x) => (float[2,3] y)'
        "{ y = MatMul (x, w) }"
    )
    proto.graph.sparse_initializer.append(tensor)
    return proto


def run(data: bytes) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    return ort.InferenceSession(data, options).run(None, {"x": x})[0]


@pytest.mark.parametrize("indices", [[5, 9], [[1, 2], [3, 0]]])
def test_sparse_initializers(indices, tmp_path) -> None:
    proto = net(sparse(indices))
    onnx.save(proto, tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx")
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), W)
    assert np.array_equal(run(model_bytes(model)), run(proto.SerializeToString()))


def test_sparse_constants_in_a_body() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (bool b) => (float[4,3] y) {'
        " y = If <then_branch = t () => (float[4,3] p) { p = Constant <value_float = 1.0> () },"
        " else_branch = e () => (float[4,3] q) { q = Constant <value_float = 1.0> () }> (b) }"
    )
    (node,) = proto.graph.node
    for attribute in node.attribute:
        (constant,) = attribute.g.node
        constant.ClearField("attribute")
        constant.attribute.append(onnx.helper.make_attribute("sparse_value", sparse([5, 9])))
    make_dense(proto, {})
    for attribute in node.attribute:
        (given,) = attribute.g.node[0].attribute
        assert given.name == "value"
        assert np.array_equal(onnx.numpy_helper.to_array(given.t), W)


@pytest.mark.parametrize(
    ("tensor", "kind", "reason"),
    [
        (sparse([5, 12]), InputError, "an index is outside"),
        (sparse([-1, 5]), InputError, "an index is outside"),
        (sparse([[1, 2], [4, 0]]), InputError, "an index is outside"),
        (sparse([5]), InputError, "an index for each of 2 values"),
        (sparse([5, 9], (1 << 20, 1 << 20)), InputError, "too large"),
    ],
)
def test_damaged_and_huge_ones(tensor, kind, reason) -> None:
    with pytest.raises(kind, match=reason):
        densified(net(tensor))


def test_layer_normalization_in_an_older_opset(tmp_path) -> None:
    """As ONNX Runtime's optimizer writes it."""
    proto = onnx.parser.parse_model(
        '<ir_version: 7, opset_import: ["": 12]> g (float[2,4] x) => (float[2,4] y)'
        "<float[4] g = {1, 2, 3, 4}, float[4] b = {0, 0, 1, 1}>"
        "{ y = LayerNormalization <axis = -1> (x, g, b) }"
    )
    with pytest.raises(onnx.checker.ValidationError, match="No Op registered"):
        onnx.checker.check_model(proto)
    onnx.save(proto, tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx")
    assert model.graph[0].domain == ""
    assert np.array_equal(run(model_bytes(model)), run(proto.SerializeToString()))


def test_an_operator_that_nobody_knows_is_refused(tmp_path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 7, opset_import: ["": 12]> g (float[2] x) => (float[2] y) { y = Magic (x) }'
    )
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(InputError, match="No Op registered for Magic"):
        load_model(tmp_path / "m.onnx")
