"""Which layers can become integers, and why others stay float.

A model that computes with integers anywhere was quantized by somebody: it is taken as it is, and no
layer that was left float in it is touched. Weights that are only stored as integers do not count:
they are read as the floats they stand for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from twofour.core.errors import InputError
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
    return ""


def float_layers(model: ir.Model, exclude: Iterable[str] = ()) -> tuple[FloatLayer, ...]:
    """The layers that stay float, those in bodies of If, Loop and Scan too.

    Args:
        model: prepared, before or after it was quantized.
        exclude: patterns, as in a shell, of names of nodes that were left out on purpose.
    """
    patterns = tuple(exclude)
    found = []
    for node in model.graph.all_nodes():
        reason = why_float(node)
        if reason == "" and node.graph is not model.graph:
            reason = "it stands in a body of If, Loop or Scan"
        elif reason == "" and any(fnmatchcase(node.name or "", each) for each in patterns):
            reason = "excluded by name"
        if reason:
            found.append(FloatLayer(node.name or "", node.op_type, reason))
    return tuple(found)


def count_integer(model: ir.Model) -> int:
    """How many layers of a quantized model read a weight stored as integers."""
    weights = (operand(node, 1) for node in model.graph if is_standard(node, *LAYERS))
    makers = (weight.producer() for weight in weights if weight is not None)
    return sum(
        is_standard(maker, "DequantizeLinear") and constant(maker.inputs[0]) is not None
        for maker in makers
        if maker is not None
    )


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


def nothing_to_quantize(model: ir.Model, exclude: Iterable[str]) -> NothingToQuantizeError:
    """The error for a model without a layer that can be quantized, with all reasons."""
    why = Counter((layer.op, layer.reason) for layer in float_layers(model, exclude))
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
    if is_standard(node, *_INTEGER):
        return True
    x = operand(node, 0)
    if node.op_type == "QuantizeLinear":
        return x is not None and constant(x) is None
    names = ("QLinear", "QAttention", "QGemm", "Dynamic", "MatMulInteger")
    return node.domain == _MICROSOFT and node.op_type.startswith(names)
