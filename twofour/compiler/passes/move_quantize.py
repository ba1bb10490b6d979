"""Moves QuantizeLinear up, so that the producer stores bytes and elements are moved as bytes.

    Q(op(x))  ->  op(Q(x))          for the operators of movers.py

    Exact: a per-tensor Q is a monotone function of single elements.

Conditions:
    1. the quantizer is per tensor, int8 or uint8, with constant parameters
    2. nobody else reads op(x)
    3. at the top of the chain of such operators, x is read by nobody else, or only by equal
       quantizers: else the producer would have to store both float and bytes
    4. the pad constant is known, and the indices of MaxPool are not read
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler.passes import movers, quantizers, reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "move_quantize"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "QuantizeLinear"):
        return None
    mover = reading.data(node).producer()
    if mover is None or not movers.is_mover(mover):
        return None
    params = quantizers.per_tensor(node)
    if isinstance(params, str):
        return Refused(params)
    if isinstance(reader := reading.sole_reader(mover.outputs[0]), str):
        return Refused(reader)
    if reason := _other_readers(mover, params):
        return Refused(reason)
    x = reading.data(mover)
    quantize = ir.node("QuantizeLinear", [x, params.scale, params.zero_point], name=node.name)
    quantize.outputs[0].shape = x.shape
    quantize.outputs[0].type = ir.TensorType(params.dtype)
    moved = movers.commuted(mover, quantize.outputs[0], params, exact=False)
    if isinstance(moved, str):
        return Refused(moved)
    return Replacement(node.outputs[0], moved.outputs[0], (quantize, moved))


def _other_readers(mover: ir.Node, params: quantizers.PerTensor) -> str:
    """Who else reads the source of a chain of movers as float; "" if nobody does."""
    x = reading.data(mover)
    above = x.producer()
    if movers.is_mover(above) and above is not None and not isinstance(reading.sole_reader(x), str):
        return _other_readers(above, params)
    if x.is_graph_output():
        return f"{x.name!r} is also an output of the model, in float"
    for use in x.uses():
        if use.node is mover:
            continue
        equal = quantizers.per_tensor(use.node) if reading.is_op(use.node, "QuantizeLinear") else ""
        if isinstance(equal, str) or not equal.same_as(params):
            other = f"{use.node.op_type} {use.node.name!r}"
            return f"{x.name!r} is also read by {other}, not with this scale"
    return ""
