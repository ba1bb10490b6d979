"""Small graphs from ONNX text, run on ONNX Runtime, and one rule applied to them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort

from twofour.compiler import ops
from twofour.compiler.passes import rewrite, text
from twofour.onnx_tools.infer import infer_shapes


def graph(body: str, opset: int = 18, **weights: np.ndarray) -> ir.Model:
    """A model from `(inputs) => (outputs) <constants> { nodes }`; weights are further constants.

    Operators of com.microsoft may be among the nodes.
    """
    domains = ', "com.microsoft": 1' if "com.microsoft" in body else ""
    head = f'<ir_version: 10, opset_import: ["": {opset}{domains}]>'
    proto = onnx.parser.parse_model(f"{head} g {body}")
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()
    )
    model = ir.serde.deserialize_model(proto)
    for node in model.graph:
        node.name = node.outputs[0].name
    infer_shapes(model)
    return model


def run(model: ir.Model, feeds: dict[str, np.ndarray] | None = None) -> list[np.ndarray]:
    """The outputs for these or random inputs, without optimizations: each node by itself."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options)
    random, feeds = np.random.default_rng(0), dict(feeds or {})
    for value in session.get_inputs():
        if value.name in feeds:
            continue
        if value.type == "tensor(float)":
            feeds[value.name] = random.normal(size=value.shape).astype(np.float32)
        else:
            info = np.iinfo(np.int8 if value.type == "tensor(int8)" else np.uint8)
            feeds[value.name] = random.integers(
                info.min, info.max, value.shape, dtype=info.dtype, endpoint=True
            )
    return session.run(None, feeds)


def apply(rule, model: ir.Model) -> tuple[ir.Model, list[rewrite.Refusal]]:
    """A copy of the model after one rule, still valid, and what was refused."""
    model = model.clone()
    refusals = rewrite.apply(rule.NAME, rule.rule, model.graph)
    ops.attach_functions(model)
    common.CheckerPass(full_check=True)(model)
    return model, refusals


def check(rule, golden, model: ir.Model, name: str = "", bound: float = 0.0) -> ir.Model:
    """One rule: text before and after as in the golden file, and equal results.

    Args:
        rule: module of the rule.
        golden: the fixture; None where another case shows the same text.
        model: before.
        name: of the case, where a rule has several.
        bound: largest difference of any result, derived in the test.
    """
    after, refusals = apply(rule, model)
    assert not refusals
    if golden is not None:
        both = f"before\n{text.graph_text(model)}\nafter\n{text.graph_text(after)}"
        golden("_".join(filter(None, (f"passes/{rule.NAME}", name))), both)
    for want, got in zip(run(model), run(after), strict=True):
        assert want.dtype == got.dtype
        assert want.shape == got.shape
        assert np.abs(want.astype(np.float64) - got).max() <= bound
    return after


def refusal(rule, model: ir.Model) -> str:
    """The reason for which the rule leaves the model as it is."""
    after, refusals = apply(rule, model)
    assert text.graph_text(after) == text.graph_text(model)
    assert len(refusals) == 1
    assert refusals[0].rule == rule.NAME
    return refusals[0].reason


def op_types(model: ir.Model) -> list[str]:
    """The operator types in order."""
    return [node.op_type for node in model.graph]
