"""The ONNX functions: ONNX Runtime computes by them what the definition says."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.operators.experts_harness import Case, make
from twofour.core.experts import DOMAIN, MASKED
from twofour.core.experts_text import NAMES, function_text


def model_of(case: Case, opset: int = 18) -> onnx.ModelProto:
    """One node, its weights and its function."""
    base, activation = case.base, case.experts.activation
    text = function_text(base, activation, quantized=case.quantized, opset=opset)
    values = list(case.values.items())
    kinds = {"x": TensorProto.FLOAT, "logits": TensorProto.FLOAT, "mask": TensorProto.BOOL}
    attributes = {} if base == MASKED else {"k": case.k, "normalize": int(case.normalize)}
    node = helper.make_node(
        case.operator.name, [n for n, _ in values], ["y"], domain=DOMAIN, **attributes
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, kinds[n], v.shape) for n, v in values[:2]],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, case.x.shape)],
        [numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in values[2:]],
    )
    made = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
        functions=[onnx.parser.parse_function(text)],
        ir_version=10,
    )
    onnx.checker.check_model(made, full_check=True)
    return made


def in_onnxruntime(case: Case, opset: int = 18) -> np.ndarray:
    session = onnxruntime.InferenceSession(model_of(case, opset).SerializeToString())
    names = list(case.values)[:2]
    return session.run(None, dict(zip(names, (case.x, case.chooser), strict=True)))[0]


@pytest.mark.parametrize(("name", "base", "activation", "quantized"), NAMES)
def test_onnxruntime_agrees(name, base, activation, quantized) -> None:
    random = np.random.default_rng(0)
    case = make(random, base=base, activation=activation, quantized=quantized, shape=(3, 7))
    assert case.operator.name == name
    want = case.expected()
    np.testing.assert_allclose(in_onnxruntime(case), want, atol=4e-6 * np.abs(want).max())


@pytest.mark.parametrize("opset", [18, 20, 21])
def test_other_opsets(opset) -> None:
    case = make(np.random.default_rng(1))
    want = case.expected()
    got = in_onnxruntime(case, opset)
    np.testing.assert_allclose(got, want, atol=4e-6 * np.abs(want).max())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gates(k, normalize) -> None:
    case = make(np.random.default_rng(2), k=k, normalize=normalize, quantized=False)
    want = case.expected()
    np.testing.assert_allclose(in_onnxruntime(case), want, atol=4e-6 * np.abs(want).max())


def test_equal_logits_go_to_the_first_experts() -> None:
    case = make(np.random.default_rng(3), quantized=False)
    case.chooser[...] = 1
    want = case.expected()
    np.testing.assert_allclose(in_onnxruntime(case), want, atol=4e-6 * np.abs(want).max())


def test_logits_of_minus_infinity() -> None:
    """How a router bars an expert."""
    case = make(np.random.default_rng(4), quantized=False, normalize=False)
    case.chooser[:, 1] = -np.inf
    want = case.expected()
    np.testing.assert_allclose(in_onnxruntime(case), want, atol=4e-6 * np.abs(want).max())


@pytest.mark.parametrize(("name", "base", "activation", "quantized"), NAMES)
def test_every_value_of_a_function_is_used(name, base, activation, quantized) -> None:
    """Tools that drop what nobody reads would make another function of it."""
    function = onnx.parser.parse_function(function_text(base, activation, quantized=quantized))
    assert function.name == name
    made = {value for node in function.node for value in node.output}
    read = {value for node in function.node for value in node.input} | set(function.output)
    assert made <= read
    assert set(function.input) <= read
