"""What the rules share that write an operator of ONNX Runtime as standard ones.

Files that its optimizer wrote hold them. As standard operators they have shapes, fold, and run on
native kernels; the passes after these put them together again where that pays.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from twofour.compiler.passes import reading
from twofour.compiler.passes.rewrite import Replacement

_PARAMETERS = {
    "Relu": (),
    "Tanh": (),
    "Sigmoid": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": (),
}
_ROOT_TANH, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def replaced(node: ir.Node, *results: ir.Value) -> Replacement:
    """Whoever reads the node's results reads these; the last of the new nodes takes its name."""
    known = tuple(value for value in node.inputs if value is not None)
    nodes: dict[ir.Node, None] = {}
    for result in results:
        nodes |= dict.fromkeys(reading.nodes_behind(result, known))
    first = results[0].producer()
    if first is not None:
        first.name = node.name
    pairs = zip(node.outputs[1:], results[1:], strict=False)
    return Replacement(node.outputs[0], results[0], tuple(nodes), more=tuple(pairs))


def number(name: str, contents: float) -> ir.Value:
    """A float32 scalar constant."""
    return reading.constant(name, np.array(contents, np.float32))


def activated(x: ir.Value, name: str, parameters: dict[str, float]) -> ir.Value | str:
    """Puts an activation of a fused operator behind x, or says why it is not known.

    Args:
        x: before.
        name: of the activation; "" for none.
        parameters: alpha and beta; for Clip the bounds min and max, where there are any.
    """
    if not name:
        return x
    if name not in _PARAMETERS:
        return f"its activation is {name!r}; expected one of {', '.join(_PARAMETERS)}"
    if name == "Clip":
        ends = [number(end, parameters[end]) if end in parameters else None
                for end in ("min", "max")]  # fmt: skip
        return reading.made("Clip", [x, *ends])
    given = {key: parameters[key] for key in _PARAMETERS[name] if key in parameters}
    return reading.made(name, [x], **given)


def gelu(x: ir.Value) -> ir.Value:
    """Computes x / 2 * (1 + Erf(x / sqrt(2)))."""
    inner = reading.made("Erf", [reading.made("Mul", [x, number("root_half", math.sqrt(0.5))])])
    gate = reading.made("Add", [inner, number("one", 1.0)])
    half = reading.made("Mul", [x, number("half", 0.5)])
    return reading.made("Mul", [half, gate])


def gelu_tanh(x: ir.Value) -> ir.Value:
    """Computes x / 2 * (1 + Tanh(sqrt(2 / pi) (x + 0.044715 x**3)))."""
    cube = reading.made("Mul", [reading.made("Mul", [x, x]), x])
    cubic = reading.made("Mul", [cube, number("cubic", _CUBIC)])
    inner = reading.made("Mul", [reading.made("Add", [x, cubic]), number("root", _ROOT_TANH)])
    gate = reading.made("Add", [reading.made("Tanh", [inner]), number("one", 1.0)])
    half = reading.made("Mul", [x, number("half", 0.5)])
    return reading.made("Mul", [half, gate])
