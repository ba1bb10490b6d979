"""Types and shapes of a model's values, as the onnx package infers them."""

from __future__ import annotations

import onnx
import onnx_ir as ir

_MAX_READ_ELEMENTS = 1 << 10  # of constants that tell a shape


def infer_shapes(model: ir.Model, follow: bool = True) -> None:
    """Infers the types and shapes of all values, in place.

    A model that contradicts itself is left as it is.

    Args:
        model: the model.
        follow: whether shapes that are computed are followed through the operators that do it.
    """
    outline = model.clone()
    for value in list(outline.graph.initializers.values()):
        if value.const_value is not None and value.const_value.size > _MAX_READ_ELEMENTS:
            del outline.graph.initializers[value.name or ""]  # so that no weight is copied
            outline.graph.inputs.append(value)
    try:
        proto = onnx.shape_inference.infer_shapes(
            ir.to_proto(outline), check_type=True, strict_mode=True, data_prop=follow
        )
    except onnx.shape_inference.InferenceError:
        return
    for graph, inferred in zip(model.graphs(), ir.from_proto(proto).graphs(), strict=True):
        found = ir.convenience.create_value_mapping(inferred)
        for name, value in ir.convenience.create_value_mapping(graph).items():
            if name in found and found[name].type is not None:
                value.type = found[name].type
                value.shape = value.shape if found[name].shape is None else found[name].shape
