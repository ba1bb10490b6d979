"""Q/DQ as TensorRT reads it: symmetric, int8, and for weights and activations alone.

    uint8, zero point 128        -> int8, zero point 0: the same numbers, 128 less
    uint8, any other zero point  -> refused: no int8 has the same steps
    DequantizeLinear of int32    -> its float result: biases are float in TensorRT
    functions of the model       -> inlined
    operators of plugins         -> their meaning, inlined; whole where TensorRT has a plugin for it

What stands between a QuantizeLinear and its DequantizeLinears has to move with them, so a tensor of
uint8 that anything else reads is refused too.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from twofour.compiler.settle import settle
from twofour.core.errors import UnsupportedError
from twofour.core.plugins import Operator
from twofour.onnx_tools.edit import Array, Editor, constant, is_standard, operand
from twofour.onnx_tools.plugins import attach_meanings, plugin_of
from twofour.onnx_tools.promises import carry

_MIDDLE = 128
_KNOWN = ("", "ai.onnx", "com.microsoft")
_MOST_SHOWN = 6
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_PAIRS = "TensorRT computes in integers between Q/DQ pairs alone"
_INTEGER = {
    "DynamicQuantizeLinear": "uint8, with zero points of run time",
    "ConvInteger": _PAIRS,
    "MatMulInteger": _PAIRS,
    "QLinearConv": _PAIRS,
    "QLinearMatMul": _PAIRS,
}
FIX = (
    "quantize the float model with symmetric activations: "
    "twofour quantize MODEL.onnx -o INT8.onnx --data D --activation int8"
)


def for_tensorrt(model: ir.Model) -> tuple[ir.Model, tuple[str, ...]]:
    """The model with operators and Q/DQ that TensorRT takes; the given model is not changed.

    Args:
        model: float, or quantized.

    Returns:
        The new model, and what was changed, for people.

    Raises:
        UnsupportedError: something is quantized as TensorRT cannot have it; lists what.
    """
    source, model = model, ir.external_data.load_to_model(model.clone())
    common.RemoveInitializersFromInputsPass()(model)
    attach_meanings(model)
    has_functions = bool(model.functions)
    common.InlinePass(lambda function: not _own_plugin(function.domain, function.name))(model)
    model.functions.clear()
    if has_functions:
        settle(model)  # a meaning may say by operators that TensorRT lacks what is constant here
    graphs = [model.graph, *model.graph.subgraphs()]
    notes = []
    if biases := sum(_float_biases(graph) for graph in graphs):
        notes.append(f"{biases} biases of int32 became float32")
    nodes = [node for graph in graphs for node in graph]
    _refuse(_foreign(nodes), "operators have no form for it", "export them as standard operators")
    _refuse(_skewed(nodes), "tensors or operators are not quantized as it wants", FIX)
    if moved := sum(_to_int8(graph) for graph in graphs):
        notes.append(f"{moved} tensors of uint8 with zero point {_MIDDLE} became int8")
    if notes:
        common.RemoveUnusedNodesPass()(model)
    carry(source, model)
    return model, tuple(notes)


def is_quantized(model: ir.Model) -> bool:
    """Whether any tensor is quantized."""
    return any(is_standard(node, *_QDQ) for node in model.graph.all_nodes())


def _float_biases(graph: ir.Graph) -> int:
    """Makes constants of what DequantizeLinear gives for constants of int32; says how many."""
    editor, found = Editor(graph), 0
    for node in list(graph):
        if not is_standard(node, "DequantizeLinear"):
            continue
        stored, scale = constant(operand(node, 0)), constant(operand(node, 1))
        if stored is None or scale is None or stored.dtype != np.int32:
            continue
        result = node.outputs[0]
        value = editor.initializer(f"{result.name}_float", _dequantized(node, stored, scale))
        result.replace_all_uses_with(value, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        found += 1
    return found


def _dequantized(node: ir.Node, stored: Array, scale: Array) -> Array:
    axis = node.attributes.get_int("axis", 1) % max(stored.ndim, 1)
    shape = [-1 if i == axis else 1 for i in range(stored.ndim)]
    scales = scale.reshape(shape) if scale.ndim == 1 and scale.size > 1 else scale.reshape(())
    return np.asarray(stored.astype(np.float32) * scales.astype(np.float32), np.float32)


def plugins_in(model: ir.Model) -> tuple[Operator, ...]:
    """The operators that plugins of TensorRT compute, once each."""
    found = {
        node.op_identifier(): operator
        for node in model.graph.all_nodes()
        if (operator := plugin_of(node)) is not None and operator.tensorrt
    }
    return tuple(found.values())


def _own_plugin(domain: str, name: str) -> bool:
    """Whether an operator stays whole, as a plugin of TensorRT computes it."""
    operator = plugin_of(ir.Node(domain, name, []))
    return operator is not None and bool(operator.tensorrt)


def _foreign(nodes: Iterable[ir.Node]) -> list[str]:
    """Operators that TensorRT cannot know, or would take for others: it looks at no domain."""
    found = []
    for node in nodes:
        where = f"{node.op_type} {node.name!r} of {node.domain}"
        operator = plugin_of(node)
        if node.domain in _KNOWN or (operator is not None and operator.tensorrt):
            continue
        if operator is not None:
            found.append(f"{where}: its meaning is in numpy, and it has no plugin of TensorRT")
        elif node.domain.startswith("twofour"):
            found.append(f"{where}: only our own compiler knows it")
        elif onnx.defs.has(node.op_type):
            found.append(f"{where}: TensorRT would take it for ONNX's own {node.op_type}")
    return found


def _skewed(nodes: Iterable[ir.Node]) -> list[str]:
    """Q/DQ that is not symmetric and has no equal that is."""
    found = []
    for node in nodes:
        if node.domain == "" and node.op_type in _INTEGER:
            found.append(f"{node.op_type} {node.name!r}: {_INTEGER[node.op_type]}")
        if not is_standard(node, *_QDQ) or _ends_a_pair(node):
            continue
        kind, reason = _kind(node), ""
        point = constant(operand(node, 2))
        if kind == np.int8 and point is not None and point.any():
            reason = f"int8, zero point {_span(point)}"
        if kind == np.uint8 and (point is None or (point != _MIDDLE).any()):
            reason = f"uint8, zero point {0 if point is None else _span(point)}"
        if kind == np.uint8 and not reason:
            reason = _read_otherwise(node)
        if reason:
            found.append(f"{node.op_type} {node.name!r}: {reason}")
    return found


def _ends_a_pair(node: ir.Node) -> bool:
    """Whether it is a DequantizeLinear behind a QuantizeLinear, which speaks for both."""
    integers = operand(node, 0)
    behind = integers is not None and is_standard(integers.producer(), "QuantizeLinear")
    return behind and node.op_type == "DequantizeLinear"


def _read_otherwise(node: ir.Node) -> str:
    """Why the integers of a Q/DQ of uint8 cannot become others; "" if they can."""
    integers = node.outputs[0] if node.op_type == "QuantizeLinear" else operand(node, 0)
    if integers is None:
        return ""
    if integers.is_graph_output() or integers.is_graph_input():
        return "uint8, an input or output of the model"
    others = [use.node for use in integers.uses() if use.node.op_type != "DequantizeLinear"]
    producer = integers.producer()
    if producer is not None and not is_standard(producer, "QuantizeLinear"):
        others.append(producer)
    return f"uint8, {others[0].op_type} {others[0].name!r} has to do with it" if others else ""


def _kind(node: ir.Node) -> np.dtype[np.generic] | None:
    """The type of the integers of a Q/DQ; uint8 is what a QuantizeLinear gives by itself."""
    for value in (operand(node, 2), operand(node, 0) if "De" in node.op_type else node.outputs[0]):
        array = constant(value)
        if array is not None:
            return array.dtype
        if value is not None and value.dtype is not None and value.dtype.is_integer():
            return value.dtype.numpy()
    return np.dtype(np.uint8) if node.op_type == "QuantizeLinear" else None


def _to_int8(graph: ir.Graph) -> int:
    """Moves Q/DQ of uint8 around 128 to int8 around 0; says how many tensors that were."""
    editor, moved = Editor(graph), set()
    done: dict[str, ir.Value] = {}
    for node in list(graph):
        if not is_standard(node, *_QDQ) or _kind(node) != np.uint8:
            continue
        point = constant(operand(node, 2))
        assert point is not None  # _skewed refused it otherwise
        zeros = editor.initializer(f"{node.name}_zero_point", np.zeros(point.shape, np.int8))
        node.replace_input_with(2, zeros)
        integers = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
        assert integers is not None
        stored = constant(integers)
        if stored is not None and node.op_type == "DequantizeLinear":
            name = str(integers.name)
            if name not in done:
                shifted = (stored.astype(np.int16) - _MIDDLE).astype(np.int8)
                done[name] = editor.initializer(f"{name}_int8", shifted)
            node.replace_input_with(0, done[name])
        else:
            integers.type = ir.TensorType(ir.DataType.INT8)  # a type may be shared with the source
        moved.add(integers.name)
    return len(moved)


def _span(points: Array) -> str:
    least, most = int(points.min()), int(points.max())
    return str(least) if least == most else f"{least} to {most}"


def _refuse(found: list[str], what: str, fix: str) -> None:
    if found:
        more = [f"and {len(found) - _MOST_SHOWN} more"] if len(found) > _MOST_SHOWN else []
        shown = [*found[:_MOST_SHOWN], *more]
        raise UnsupportedError(f"TensorRT cannot take the model: {len(found)} {what}", shown, fix)
