"""What ONNX Runtime writes into files that the checks of the onnx package do not take."""

from __future__ import annotations

import onnx

from twofour.onnx_tools.stored import all_graphs
from twofour.onnx_tools.upgrade import CONTRIB, FOREIGN

_EXPERIMENTAL = (
    *("Affine", "Crop", "DynamicSlice", "GivenTensorFill", "GRUUnit", "ImageScaler"),
    *("ParametricSoftplus", "Scale", "ScaledTanh"),
)  # of the first opsets: ONNX Runtime still has them
_WEIGHTS_ALONE = 4  # the first IR version with initializers that are no inputs


def set_aside(proto: onnx.ModelProto) -> None:
    """Moves the operators that only ONNX Runtime knows out of the standard domain, in place.

    So the checks of the onnx package pass them over, as they do with those of its own domain. Nor
    do they ask that weights are inputs, as IR version 3 does: its optimizer adds some that are not.
    """
    proto.ir_version = max(proto.ir_version, _WEIGHTS_ALONE)
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)
    foreign = {name for name in (*FOREIGN, *_EXPERIMENTAL) if not onnx.defs.has(name, opset)}
    nodes = [node for graph in all_graphs(proto) for node in graph.node]
    nodes += [node for function in proto.functions for node in function.node]
    moved = [n for n in nodes if n.domain in ("", "ai.onnx") and n.op_type in foreign]
    for node in moved:
        node.domain = CONTRIB
    if moved and all(o.domain != CONTRIB for o in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))
