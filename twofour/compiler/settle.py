"""Constants and shapes of a model, as far as they can be known before running.

what depends on no input        -> folded, except QuantizeLinear and DequantizeLinear
operators of ONNX Runtime       -> standard ones, where a pass of `UNFUSE` knows how
shapes that onnx cannot infer   -> as a plugin or ONNX Runtime infers them
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from twofour.compiler.passes import rewrite
from twofour.compiler.passes.pipeline import UNFUSE
from twofour.compiler.second_opinion import told
from twofour.onnx_tools.folding import fold_constants
from twofour.onnx_tools.plugins import infer_plugins

_MAX_FILLED_ELEMENTS = 1 << 12


def settle(model: ir.Model) -> None:
    """Folds, and spells operators of ONNX Runtime as standard ones, until nothing changes.

    Each may need what the other finds: shapes of what stands behind, constants.
    """
    before: list[tuple[str, int, int]] = []
    while (now := _state(model.graph)) != before:
        before = now
        for entry in UNFUSE:
            rewrite.apply(entry.name, entry.rule, model.graph)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        fold_constants(model, _should_fold)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        infer_plugins(model.graph)
        _ask(model)


def _state(graph: ir.Graph) -> list[tuple[str, int, int]]:
    """Of each node its operator, how much it reads, and how many of its results are known."""
    return [
        (node.op_type, len(node.inputs), sum(not _is_unknown(value) for value in node.outputs))
        for node in graph
    ]


def _is_unknown(value: ir.Value) -> bool:
    """Whether its type or its shape is not known."""
    return value.dtype is None or value.shape is None or not value.shape.is_static()


def _ask(model: ir.Model) -> None:
    """Lets ONNX Runtime infer what stands behind operators that onnx does not know."""
    if all(node.domain == "" for node in model.graph):
        return
    values = [value for node in model.graph for value in node.outputs if value.name]
    unknown = [value for value in values if _is_unknown(value)]
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
