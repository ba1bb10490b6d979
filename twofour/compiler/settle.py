"""Constants and shapes of a model, as far as they can be known before running.

what depends on no input        -> folded, except QuantizeLinear and DequantizeLinear
operators of ONNX Runtime       -> standard ones, where a pass of `UNFUSE` knows how
shapes that onnx cannot infer   -> as ONNX Runtime infers them
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from twofour.compiler.bounds import lists_numbers
from twofour.compiler.passes import rewrite
from twofour.compiler.passes.pipeline import UNFUSE
from twofour.compiler.second_opinion import told
from twofour.onnx_tools.folding import fold_constants

_MAX_FILLED_ELEMENTS = 1 << 12
_MAX_READ_ELEMENTS = 1 << 10  # of constants that tell a shape


def settle(model: ir.Model) -> None:
    """Folds, and spells operators of ONNX Runtime as standard ones, until nothing changes.

    Each may need what the other finds: shapes of what stands behind, constants.
    """
    before: list[tuple[str, int]] = []
    while (now := [(node.op_type, len(node.inputs)) for node in model.graph]) != before:
        before = now
        for entry in UNFUSE:
            rewrite.apply(entry.name, entry.rule, model.graph)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        fold_constants(model, _should_fold)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _ask(model)


def infer(model: ir.Model) -> None:
    """Infers the types and shapes of all values, in place.

    A model that contradicts itself is left as it is.
    """
    follow = not lists_numbers(model.graph)
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


def _ask(model: ir.Model) -> None:
    """Lets ONNX Runtime infer what stands behind operators that onnx does not know."""
    if all(node.domain == "" for node in model.graph):
        return
    values = [value for node in model.graph for value in node.outputs if value.name]
    unknown = [v for v in values if v.dtype is None or v.shape is None or not v.shape.is_static()]
    if not unknown:
        return
    found = told(ir.to_proto(model), [value.name or "" for value in unknown])
    for value in unknown:
        opinion = found.get(value.name or "")
        if opinion is not None and opinion.dtype is not None:
            value.type = ir.TensorType(opinion.dtype)
            value.shape = ir.Shape(opinion.shape) if opinion.shape is not None else value.shape


def _should_fold(node: ir.Node) -> bool | None:
    """False for quantizers, True for a small ConstantOfShape, else None: as folding decides."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return False
    if node.op_type == "ConstantOfShape":
        shape = node.inputs[0].const_value if node.inputs[0] is not None else None
        return shape is not None and int(np.prod(shape.numpy())) <= _MAX_FILLED_ELEMENTS
    return None
