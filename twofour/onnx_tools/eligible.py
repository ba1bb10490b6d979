"""Which layers can become integers, and why others stay float.

A model that computes with integers anywhere was quantized by somebody: it is taken as it is, and no
layer that was left float in it is touched. Weights that are only stored as integers do not count:
they are read as the floats they stand for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from twofour.core.errors import InputError
from twofour.onnx_tools import experts
from twofour.onnx_tools.edit import constant, is_standard, operand

LAYERS = ("Conv", "Gemm", "MatMul")
_OTHERS = ("ConvTranspose", "LSTM", "GRU", "RNN")
_INTEGER = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
_MICROSOFT = "com.microsoft"


class NothingToQuantizeError(InputError):
    """There is no layer that quantization could make integer: the model can be built as it is."""


@dataclass(frozen=True)
class FloatLayer:
    """A layer with weights that stays float.

    Attributes:
        node: its name.
        op: its operator.
        reason: why.
    """

    node: str
    op: str
    reason: str


def is_layer(node: ir.Node) -> bool:
    """Whether the node is a Conv, Gemm or MatMul with a constant float32 weight."""
    return is_standard(node, *LAYERS) and why_float(node) == ""


def why_float(node: ir.Node) -> str | None:
    """Why a layer with weights stays float; "" where it can be quantized, None for other nodes."""
    weight = constant(operand(node, 1))
    if weight is None or weight.dtype.kind not in "fV":
        return None
    if not is_standard(node, *LAYERS):
        fused = node.domain == _MICROSOFT and weight.ndim > 1
        known = fused or is_standard(node, *_OTHERS)
        return f"{node.op_type} is not quantized" if known else None
    if operand(node, 0) is None or constant(operand(node, 0)) is not None:
        return "its input is constant"
    if weight.dtype != np.float32:
        return f"its weight is {weight.dtype}, expected float32"
    if node.attributes.get_int("transA", 0) == 1:
        return "it reads its input transposed (transA)"
    if weight.ndim < 3 if node.op_type == "Conv" else weight.ndim != 2:
        return f"its weight has {weight.ndim} dimensions"
    if not weight.size:
        return "its weight is empty"
    if node.op_type == "Conv" and weight.shape[0] == 1 and _reads_softmax(node):
        return "it is the expectation of a softmax: chances in steps of 1/255 would move it"
    return ""


def _reads_softmax(node: ir.Node) -> bool:
    """Whether the first input is the result of a softmax."""
    value = operand(node, 0)
    producer = value.producer() if value is not None else None
    return producer is not None and is_standard(producer, "Softmax")


def float_layers(
    model: ir.Model, chosen: Mapping[str, str] | None = None
) -> tuple[FloatLayer, ...]:
    """The layers that stay float, those in bodies of If, Loop and Scan too.

    Args:
        model: prepared, before or after it was quantized.
        chosen: names of nodes of the main graph that the user leaves out -> why.
    """
    chosen = chosen or {}
    found = []
    for node in model.graph.all_nodes():
        reason = why_float(node)
        if reason == "" and node.graph is not model.graph:
            reason = "it stands in a body of If, Loop or Scan"
        elif reason == "":
            reason = chosen.get(node.name or "", "")
        if reason:
            found.append(FloatLayer(node.name or "", node.op_type, reason))
    return tuple(found)


def count_integer(model: ir.Model) -> int:
    """How many layers of a quantized model read a weight that is integers: stored, or rounded."""
    products = [node for node in model.graph if is_standard(node, "MatMulInteger")]
    dynamic = sum(constant(operand(node, 1)) is not None for node in products)
    dynamic += sum(experts.computes_integers(node) for node in model.graph)
    layers = (node for node in model.graph if is_standard(node, *LAYERS))
    return dynamic + sum(_is_integer(operand(node, 1)) for node in layers)


def _is_integer(weight: ir.Value | None) -> bool:
    """Whether the value is DequantizeLinear(w8), or that of QuantizeLinear(w), of a constant."""
    maker = None if weight is None else weight.producer()
    if maker is None or not is_standard(maker, "DequantizeLinear"):
        return False
    stored = operand(maker, 0)
    rounding = None if stored is None else stored.producer()
    if rounding is not None and is_standard(rounding, "QuantizeLinear"):
        stored = operand(rounding, 0)
    return constant(stored) is not None


def is_quantized(model: ir.Model) -> bool:
    """Whether the model computes with integers already."""
    return any(_computes_integers(node) for node in model.graph.all_nodes())


def require_float(model: ir.Model) -> None:
    """Refuses a model that computes with integers already.

    Args:
        model: prepared.

    Raises:
        NothingToQuantizeError: names what was found.
    """
    counts = Counter(node.op_type for node in model.graph.all_nodes() if _computes_integers(node))
    if counts:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise NothingToQuantizeError(
            "the model is quantized already",
            [f"it has {found}"],
            "build it as it is, or give the float model it was made from",
        )


def nothing_to_quantize(model: ir.Model, chosen: Mapping[str, str]) -> NothingToQuantizeError:
    """The error for a model without a layer that can be quantized, with all reasons."""
    why = Counter((layer.op, layer.reason) for layer in float_layers(model, chosen))
    reasons = ["expected a Conv, Gemm or MatMul with a constant float32 weight"]
    reasons += [f"{count} {op}: {reason}" for (op, reason), count in why.items()]
    if not why:
        counts = Counter(node.op_type for node in model.graph)
        every = (f"{count} {name}" for name, count in counts.most_common(8))
        reasons.append("got " + (", ".join(every) or "no nodes"))
    return NothingToQuantizeError(
        "the model has nothing to quantize", reasons, "use the float model as it is"
    )


def _computes_integers(node: ir.Node) -> bool:
    """Whether the node rounds what was computed to integers, or multiplies integers."""
    if is_standard(node, *_INTEGER) or experts.computes_integers(node):
        return True
    x = operand(node, 0)
    if node.op_type == "QuantizeLinear":
        return x is not None and constant(x) is None
    names = ("QLinear", "QAttention", "QGemm", "Dynamic", "MatMulInteger")
    return node.domain == _MICROSOFT and node.op_type.startswith(names)
