"""Experts in a file: pruned expert by expert, quantized to the integer operator, promises kept."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.operators.experts_harness import make
from twofour.core.errors import InputError
from twofour.core.experts import DOMAIN, MASKED, MIXTURE, Experts, masked, mixture
from twofour.core.experts_text import function_text
from twofour.core.patterns import is_pattern
from twofour.onnx_tools.dynamic import quantize_dynamic, quantize_dynamic_with_report
from twofour.onnx_tools.eligible import NothingToQuantizeError, count_integer
from twofour.onnx_tools.one_shot import Calibration
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.promises import check
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.weights import layer_weights

EXPERTS, HIDDEN, INNER = 4, 32, 48


def network(base: str = MIXTURE) -> ir.Model:
    """x -> router and experts, with names; of a masked MLP the mask is an input."""
    case = make(
        np.random.default_rng(0), base=base, quantized=False, hidden=HIDDEN, inner=INNER, k=2
    )
    router = np.random.default_rng(1).standard_normal((HIDDEN, EXPERTS)).astype(np.float32)
    held = {name: value for name, value in case.values.items() if name not in ("x", "logits")}
    held.pop("mask", None)
    held = {f"moe.{name}": value for name, value in held.items()}
    nodes, inputs = [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", HIDDEN])]
    if base == MIXTURE:
        held["router.weight"] = router
        held["router.bias"] = np.zeros(EXPERTS, np.float32)
        nodes += [
            helper.make_node("MatMul", ["x", "router.weight"], ["scores"], "router"),
            helper.make_node("Add", ["scores", "router.bias"], ["logits"], "router_bias"),
        ]
    else:
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, ["n"]))
    chooser = "logits" if base == MIXTURE else "mask"
    weights = [name for name in held if name.startswith("moe.")]
    attributes = {"k": 2} if base == MIXTURE else {}
    nodes.append(
        helper.make_node(
            case.operator.name, ["x", chooser, *weights], ["y"], "moe", domain=DOMAIN, **attributes
        )
    )
    graph = helper.make_graph(
        nodes,
        "net",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", HIDDEN])],
        [numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in held.items()],
    )
    made = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)],
        functions=[onnx.parser.parse_function(function_text(base, "Relu", quantized=False))],
        ir_version=10,
    )
    return ir.from_proto(made)


def run(model: ir.Model, **inputs) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, inputs)[0]


def held(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}


def test_every_expert_is_pruned_along_its_inputs() -> None:
    pruned, report = prune(network())
    weights = held(pruned)
    for name in ("moe.w1", "moe.w2"):
        assert weights[name].shape == held(network())[name].shape
        for expert in weights[name]:
            assert is_pattern(expert, "2:4")
            assert np.count_nonzero(expert) == expert.size // 2
    assert not is_pattern(weights["router.weight"].T, "2:4")
    reasons = {(each.node, each.weight): each.reason for each in report}
    assert reasons[("router", "router.weight")] == "it decides which experts run"
    assert reasons[("moe", "moe.w1")] == reasons[("moe", "moe.w2")] == ""
    assert {each.weight for each in check(pruned).entries} == {"moe.w1", "moe.w2"}
    assert [node.op_type for node in pruned.graph][-1] == "MixtureOfExpertsRelu"


def test_the_largest_of_each_four_stay() -> None:
    before, after = held(network())["moe.w1"], held(prune(network())[0])["moe.w1"]
    groups = np.abs(before).reshape(EXPERTS, INNER, -1, 4)
    kept = (after != 0).reshape(groups.shape)
    order = np.sort(groups, axis=-1)
    np.testing.assert_array_equal(kept, groups >= order[..., 2:3])


def test_pruning_by_data_leaves_experts_and_says_so() -> None:
    data = {"x": np.random.default_rng(0).standard_normal((16, HIDDEN)).astype(np.float32)}
    pruned, report = prune(network(), calibration=Calibration(data, "wanda"))
    assert all("second run" in each.reason for each in report if each.node == "moe")
    np.testing.assert_array_equal(held(pruned)["moe.w1"], held(network())["moe.w1"])


@pytest.mark.parametrize("base", [MIXTURE, MASKED])
def test_quantized_to_the_integer_operator(base) -> None:
    source = prune(network(base))[0]
    model = quantize_dynamic(source)
    node = list(model.graph)[-1]
    assert node.op_type == f"Q{base}Relu"
    assert [key[1] for key in model.functions] == [f"Q{base}Relu"]
    weights = held(model)
    given = [weights[value.name] for value in node.inputs[2:]]
    assert [array.dtype.name for array in given] == ["int8", "float32", "float32"] * 2
    w1, w1_scale, b1, w2, w2_scale, b2 = (a if base == MIXTURE else a[None] for a in given)
    assert all(is_pattern(expert, "2:4") for expert in (*w1, *w2))
    np.testing.assert_array_equal(np.abs(w1).max(-1), 127)
    random = np.random.default_rng(2)
    x = random.standard_normal((9, HIDDEN)).astype(np.float32)
    experts = Experts(w1, b1, w2, b2, "Relu", w1_scale, w2_scale)
    if base == MIXTURE:
        logits = x @ weights["router.weight"]
        want, inputs = mixture(x, logits, experts, 2), {"x": x}
    else:
        mask = random.random(9) < 0.5
        want, inputs = masked(x, mask, experts), {"x": x, "mask": mask}
    np.testing.assert_allclose(run(model, **inputs), want, atol=1e-2 * np.abs(want).max())
    near = run(source, **inputs)
    assert np.abs(near - want).mean() < 0.02 * np.abs(near).max()
    assert count_integer(model) == 1
    entries = check(model).entries
    assert {each.weight for each in entries} == {"moe.w1_quantized", "moe.w2_quantized"}
    assert not any(each.broken for each in entries)
    assert [w.values.shape for layer, w in layer_weights(model) if layer is node] == (
        [(INNER, HIDDEN, EXPERTS), (HIDDEN, INNER, EXPERTS)]
        if base == MIXTURE
        else [(INNER, HIDDEN), (HIDDEN, INNER)]
    )


def test_the_router_stays_float_and_names_exclude_experts() -> None:
    found = quantize_dynamic_with_report(network())
    assert [(each.node, each.reason) for each in found.float_layers] == [
        ("router", "it decides which experts run")
    ]
    assert held(found.model)["router.weight"].dtype == np.float32
    with pytest.raises(NothingToQuantizeError):
        quantize_dynamic(network(), QuantizeOptions(exclude=("moe",)))
    with pytest.raises(NothingToQuantizeError, match="quantized already"):
        quantize_dynamic(found.model)


def test_weights_that_are_not_finite() -> None:
    model = network()
    value = model.graph.initializers["moe.w2"]
    array = value.const_value.numpy().copy()
    array[1, 2, 3] = np.nan
    value.const_value = ir.tensor(array, name=value.name)
    with pytest.raises(InputError, match=r"'moe\.w2' holds NaN"):
        quantize_dynamic(model)
