"""Types and shapes of a model's values, as the onnx package infers them."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

_OF_NO_TENSORS = ("Sequence", "Optional")


def infer_shapes(model: ir.Model) -> None:
    """Fills in what can be inferred, in place; the rest stays open.

    Sequences and optional values get their own type: onnx_ir gives them that of their elements, and
    no runtime takes such a model.
    """
    others = _types_of_no_tensors(model)
    common_passes.ShapeInferencePass()(model)
    for value in (value for node in model.graph for value in node.outputs):
        if (found := others.get(value.name or "")) is not None:
            value.type, value.shape = found, None


def _types_of_no_tensors(model: ir.Model) -> dict[str, ir.TypeProtocol]:
    """Name of each value of the main graph that is no tensor -> its type."""
    if not any(word in node.op_type for node in model.graph.all_nodes() for word in _OF_NO_TENSORS):
        return {}
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model))
    return {
        info.name: kind
        for info in inferred.graph.value_info
        if not info.type.HasField("tensor_type")
        and (kind := ir.serde.deserialize_type_proto_for_type(info.type)) is not None
    }
