"""A model's opset raised to one that the rest of the project reads."""

from __future__ import annotations

import onnx
import onnx.version_converter
import onnx_ir as ir

from twofour.core.errors import UnsupportedError
from twofour.onnx_tools.edit import constant, operand
from twofour.onnx_tools.infer import require_inferable
from twofour.onnx_tools.plugins import attach_meanings

UPGRADE_TO = 17
CONTRIB = "com.microsoft"
FOREIGN = ("LayerNormalization", "SimplifiedLayerNormalization")
"""Operators that ONNX Runtime writes into the standard domain of opsets that lack them."""
_RESIZE_HAS_WAYS = 11  # the first opset whose Resize says which pixels it reads
_IR_VERSION = 8  # of the same release; before 4, initializers have to be inputs too


def upgrade(model: ir.Model, least: int = UPGRADE_TO) -> ir.Model:
    """Converts a model older than opset `least` to opset 17; returns others as they are.

    Args:
        model: its initializers are no inputs, its functions the meanings of plugins alone; changed,
            or not used any more.
        least: at most 17.

    Raises:
        InputError: a value has a negative dimension.
        UnsupportedError: the onnx package has no conversion for an operator, or one that would
            change the inputs or outputs.
    """
    opset = model.graph.opset_imports.setdefault("", UPGRADE_TO)
    if opset >= least:
        return model
    move_foreign(model)
    model.ir_version = max(model.ir_version or 0, _IR_VERSION)
    what = f"the model cannot be converted from opset {opset} to {UPGRADE_TO}"
    fix = f"export it again with opset {UPGRADE_TO} or newer"
    model.functions.clear()  # those that are left come again, in the new opset
    proto = ir.to_proto(model)
    require_inferable(proto)  # conversion infers
    try:
        proto = onnx.version_converter.convert_version(proto, UPGRADE_TO)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rpartition("failed: ")[2]
        raise UnsupportedError(what, [reason], fix) from error
    converted = ir.from_proto(proto)
    if opset < _RESIZE_HAS_WAYS:
        _keep_resizing(converted, what, fix)
    if (found := _ends(converted)) != (wanted := _ends(model)):
        reason = f"its inputs and outputs would change from {wanted} to {found}"
        raise UnsupportedError(what, [reason], fix)
    attach_meanings(converted)
    return converted


def _keep_resizing(model: ir.Model, what: str, fix: str) -> None:
    """Says what a Resize or Upsample of old meant; the converter leaves it at today's default.

    Then a pixel came from its place divided by the scale, and the nearest one was that rounded
    down, or, as ONNX Runtime has it where the image shrinks, up.
    """
    for node in model.graph.all_nodes():
        if node.domain != "" or node.op_type != "Resize":
            continue
        scales = constant(operand(node, 2))
        node.attributes["coordinate_transformation_mode"] = ir.AttrString(
            "coordinate_transformation_mode", "asymmetric"
        )
        if node.attributes.get_string("mode", "nearest") != "nearest":
            continue
        if scales is None or (scales.min(initial=1) < 1 < scales.max(initial=1)):
            reason = f"which pixel is nearest depends on the scales of Resize {node.name!r}"
            raise UnsupportedError(what, [reason], fix)
        rounding = "ceil" if scales.min(initial=1) < 1 else "floor"
        node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", rounding)


def move_foreign(model: ir.Model) -> bool:
    """Takes operators out of the standard domain that it does not have in the model's opset.

    ONNX Runtime writes them there, whatever the opset.

    Returns:
        Whether the model has operators of ONNX Runtime, moved or its own.
    """
    opset = model.graph.opset_imports.get("", UPGRADE_TO)
    foreign = [op_type for op_type in FOREIGN if not onnx.defs.has(op_type, opset)]
    for node in model.graph.all_nodes():
        if node.domain == "" and node.op_type in foreign:
            node.domain = CONTRIB
            model.graph.opset_imports.setdefault(node.domain, 1)
    return any(node.domain == CONTRIB for node in model.graph.all_nodes())


def _ends(model: ir.Model) -> list[str]:
    """Inputs with their shapes, and outputs."""
    inputs = [f"{value.name} {value.shape}" for value in model.graph.inputs]
    return [*inputs, *(value.name or "" for value in model.graph.outputs)]
