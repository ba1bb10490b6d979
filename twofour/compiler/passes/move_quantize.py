"""Moves QuantizeLinear up, so that the producer stores bytes and elements are moved as bytes.

    Q(op(x))  ->  op(Q(x))          for the operators of movers.py, Concat and Split (joins.py)

    Exact: a per-tensor Q is a monotone function of single elements.

Conditions:
    1. the quantizer is per tensor, int8 or uint8, with constant parameters
    2. nobody else reads op(x)
    3. at the top of the chain of such operators, x is read by nobody else, or only by equal
       quantizers: else the producer would have to store both float and bytes; inputs of a Concat
       that are dequantized are stored as bytes already
    4. the pad constant is known, and the indices of MaxPool are not read
    5. all results of a Split that are read are read by equal quantizers alone
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler.passes import joins, movers, quantizers, reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "move_quantize"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "QuantizeLinear"):
        return None
    mover = reading.data(node).producer()
    if mover is None or not (movers.is_mover(mover) or reading.is_op(mover, "Concat", "Split")):
        return None
    params = quantizers.per_tensor(node)
    if isinstance(params, str):
        return Refused(params)
    if isinstance(reader := reading.sole_reader(reading.data(node)), str):
        return Refused(reader)
    if reason := _other_readers(mover, params):
        return Refused(reason)
    if mover.op_type == "Concat":
        return joins.quantized_concat(mover, params)
    if mover.op_type == "Split":
        return joins.quantized_split(mover, params)
    quantize = joins.quantize(reading.data(mover), params, node.name)
    moved = movers.commuted(mover, quantize.outputs[0], params, exact=False)
    if isinstance(moved, str):
        return Refused(moved)
    return Replacement(node.outputs[0], moved.outputs[0], (quantize, moved))


def _other_readers(mover: ir.Node, params: quantizers.PerTensor) -> str:
    """Who else reads the sources of a chain of movers as float; "" if nobody does."""
    if mover.op_type != "Concat":
        return _other_readers_of(reading.data(mover), mover, params)
    sources = [value for value in dict.fromkeys(mover.inputs) if value is not None]
    stored = [v for v in sources if reading.is_op(v.producer(), "DequantizeLinear")]
    reasons = [_other_readers_of(v, mover, params) for v in sources if v not in stored]
    return next(filter(None, reasons), "")


def _other_readers_of(x: ir.Value, mover: ir.Node, params: quantizers.PerTensor) -> str:
    """Who besides the mover reads one of its sources as float; "" if nobody does."""
    above = x.producer()
    moved = movers.is_mover(above) or reading.is_op(above, "Concat")
    if moved and above is not None and not isinstance(reading.sole_reader(x), str):
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
