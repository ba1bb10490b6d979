"""Damage to ONNX files: to their bytes, and to what the bytes mean. The same seed, the same damage.

mutate(data, seed) -> data
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import onnx
from google.protobuf.message import DecodeError
from onnx import helper

Mutation = Callable[[onnx.ModelProto, random.Random], None]

SIZES = (-(2**63), -2, -1, 0, 1, 2, 3, 7, 16, 255, 2**16, 2**20, 2**31 - 1, 2**31, 2**40, 2**63 - 1)
FLOATS = (float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 1e-45, 0.5, 3.0, 1e9, 3.4e38)
NAMES = ("", "x", "y", "\x1b[2J\x07", "../../etc/passwd", "a/b\\c", "\u202e\u0000", "n" * 5000, " ")
OPERATORS = (
    "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "ConstantOfShape",
    "Conv", "ConvTranspose", "CumSum", "DequantizeLinear", "Einsum", "Expand", "Flatten", "GRU",
    "Gather", "GatherND", "Gemm", "Identity", "If", "LSTM", "LayerNormalization", "Loop", "MatMul",
    "MaxPool", "NonZero", "OneHot", "Pad", "QLinearConv", "QuantizeLinear", "Range", "ReduceMean",
    "Relu", "Reshape", "Resize", "Scan", "SequenceConstruct", "Shape", "Slice", "Softmax",
    "SpaceToDepth", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze", "Where",
)  # fmt: skip


def mutate(data: bytes, seed: int) -> bytes:
    """Some damage; structural damage leaves a file that still parses."""
    chance = random.Random(seed)
    if chance.random() < 0.2:
        return _bytes(data, chance)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return _bytes(data, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        chance.choice(MUTATIONS)(model, chance)
    data = model.SerializeToString()
    return _bytes(data, chance) if chance.random() < 0.05 else data


def _bytes(data: bytes, chance: random.Random) -> bytes:
    """Flips, cuts, repeats."""
    if not data:
        return data
    damaged = bytearray(data)
    kind = chance.randrange(4)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    first = chance.randrange(len(data))
    if kind == 1:
        del damaged[first : first + chance.choice((1, 8, 100))]
    elif kind == 2:
        damaged[first:first] = damaged[first : first + chance.choice((1, 40, 2000))]
    else:
        for _ in range(chance.choice((1, 2, 5, 50))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
    return bytes(damaged)


def _graph(model: onnx.ModelProto, chance: random.Random) -> onnx.GraphProto:
    """The graph, or one of its subgraphs."""
    graphs = [model.graph]
    for node in model.graph.node:
        graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return chance.choice([model.graph, *graphs])


def _node(model: onnx.ModelProto, chance: random.Random) -> onnx.NodeProto:
    """One node; a new one where there is none."""
    nodes = _graph(model, chance).node or model.graph.node
    return chance.choice(nodes) if nodes else model.graph.node.add(op_type="Relu")


def _names(model: onnx.ModelProto) -> list[str]:
    names = [value.name for value in (*model.graph.input, *model.graph.output)]
    names += [tensor.name for tensor in model.graph.initializer]
    return names + [name for node in model.graph.node for name in node.output] or ["x"]


def _tensor(model: onnx.ModelProto, chance: random.Random) -> onnx.TensorProto:
    held = [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    tensors = [*model.graph.initializer, *held]
    return chance.choice(tensors) if tensors else model.graph.initializer.add(name="w")


def dims_of_a_tensor(model: onnx.ModelProto, chance: random.Random) -> None:
    tensor = _tensor(model, chance)
    dims = list(tensor.dims) or [1]
    kind = chance.randrange(4)
    if kind == 0:
        chance.shuffle(dims)
    elif kind == 1:
        dims[chance.randrange(len(dims))] = chance.choice(SIZES)
    elif kind == 2:
        dims.insert(0, chance.choice((0, 1, 1, 2)))
    else:
        del dims[-1]
    tensor.dims[:] = dims


def type_of_a_tensor(model: onnx.ModelProto, chance: random.Random) -> None:
    _tensor(model, chance).data_type = chance.choice((*range(28), -1, 99, 2**31 - 1))


def contents_of_a_tensor(model: onnx.ModelProto, chance: random.Random) -> None:
    """As many bytes as before: numbers of the wrong size, not wrong tensors."""
    tensor = _tensor(model, chance)
    kind, count = tensor.data_type, len(tensor.raw_data)
    if kind == onnx.TensorProto.INT64 and count:
        values = [int.from_bytes(tensor.raw_data[i : i + 8], "little", signed=True)
                  for i in range(0, count, 8)]  # fmt: skip
        values[chance.randrange(len(values))] = chance.choice(SIZES)
        tensor.raw_data = b"".join(v.to_bytes(8, "little", signed=True) for v in values)
    elif kind == onnx.TensorProto.FLOAT and count >= 4:
        data = bytearray(tensor.raw_data)
        struct.pack_into("<f", data, chance.randrange(count // 4) * 4, chance.choice(FLOATS))
        tensor.raw_data = bytes(data)
    elif count:
        tensor.raw_data = chance.randbytes(count)


def storage_of_a_tensor(model: onnx.ModelProto, chance: random.Random) -> None:
    tensor = _tensor(model, chance)
    kind = chance.randrange(5)
    if kind == 0:
        tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]
    elif kind == 1:
        tensor.float_data.extend([1.0] * chance.choice((1, 4, 100)))
    elif kind == 2:
        tensor.ClearField("raw_data")
    elif kind == 3:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        where = chance.choice(("w.bin", "../w.bin", "/etc/passwd", "", "m.onnx", "\x00"))
        tensor.external_data.add(key="location", value=where)
        tensor.external_data.add(key="offset", value=str(chance.choice(SIZES)))
    else:
        tensor.string_data.append(b"\xff\xfe")


def rename_a_tensor(model: onnx.ModelProto, chance: random.Random) -> None:
    _tensor(model, chance).name = chance.choice((*NAMES, chance.choice(_names(model))))


def drop_or_repeat_an_initializer(model: onnx.ModelProto, chance: random.Random) -> None:
    held = model.graph.initializer
    if held and chance.random() < 0.5:
        del held[chance.randrange(len(held))]
    elif held:
        held.add().CopyFrom(chance.choice(held))


def dims_of_a_value(model: onnx.ModelProto, chance: random.Random) -> None:
    graph = _graph(model, chance)
    values = [*graph.input, *graph.output, *graph.value_info] or [model.graph.input.add(name="x")]
    shape = chance.choice(values).type.tensor_type.shape
    kind = chance.randrange(5)
    if kind == 0 and shape.dim:
        chance.choice(shape.dim).dim_value = chance.choice(SIZES)
    elif kind == 1 and shape.dim:
        chance.choice(shape.dim).dim_param = chance.choice(("n", *NAMES))
    elif kind == 2:
        shape.dim.add(dim_value=chance.choice((0, 1, 2, 5)))
    elif kind == 3 and shape.dim:
        del shape.dim[-1]
    else:
        shape.Clear()


def type_of_a_value(model: onnx.ModelProto, chance: random.Random) -> None:
    graph = _graph(model, chance)
    values = [*graph.input, *graph.output] or [model.graph.input.add(name="x")]
    value = chance.choice(values)
    kind = chance.randrange(4)
    if kind == 0:
        value.type.Clear()
    elif kind == 1:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif kind == 2:
        value.type.optional_type.elem_type.tensor_type.elem_type = chance.choice((0, 1, 7))
    else:
        value.type.tensor_type.elem_type = chance.choice((*range(28), 99))


def rename_a_value(model: onnx.ModelProto, chance: random.Random) -> None:
    values = [*model.graph.input, *model.graph.output]
    if values:
        chance.choice(values).name = chance.choice((*NAMES, chance.choice(_names(model))))


def operator_of_a_node(model: onnx.ModelProto, chance: random.Random) -> None:
    node, kind = _node(model, chance), chance.randrange(8)
    if kind == 0:
        node.op_type = chance.choice(NAMES)
    elif kind == 1:
        node.domain = chance.choice(("ai.onnx", "ai.onnx.ml", "com.microsoft", "twofour", "local"))
    else:
        node.op_type = chance.choice(OPERATORS)


def edge_of_a_node(model: onnx.ModelProto, chance: random.Random) -> None:
    node, names = _node(model, chance), _names(model)
    ends = chance.choice((node.input, node.input, node.input, node.output))
    kind = chance.randrange(4)
    if kind == 0 or not ends:
        ends.append(chance.choice(names))
    elif kind == 1:
        del ends[chance.randrange(len(ends))]
    else:
        name = chance.choice(("", chance.choice(NAMES))) if kind == 2 else chance.choice(names)
        ends[chance.randrange(len(ends))] = name


def name_of_a_node(model: onnx.ModelProto, chance: random.Random) -> None:
    _node(model, chance).name = chance.choice(NAMES)


def drop_repeat_or_move_a_node(model: onnx.ModelProto, chance: random.Random) -> None:
    nodes = _graph(model, chance).node
    if not nodes:
        return
    copy = onnx.NodeProto()
    copy.CopyFrom(chance.choice(nodes))
    kind = chance.randrange(3)
    if kind != 0:
        nodes.remove(copy)
    if kind != 1:
        nodes.insert(chance.randrange(len(nodes) + 1), copy)


def attribute_of_a_node(model: onnx.ModelProto, chance: random.Random) -> None:
    node = _node(model, chance)
    if not node.attribute:
        value = chance.choice((1, [1, 1], 0.5, "text", [2**40]))
        name = chance.choice(("axis", "group", "pads", "strides", "kernel_shape", "to", "mode"))
        node.attribute.append(helper.make_attribute(name, value))
        return
    attribute = chance.choice(node.attribute)
    kind = chance.randrange(6)
    if kind == 0:
        node.attribute.remove(attribute)
    elif kind == 1:
        attribute.type = chance.choice((*range(15), 99)) if chance.random() < 0.5 else 7
    elif kind == 2:
        attribute.name = chance.choice((*NAMES, "axis", "pads", "group"))
    elif attribute.ints and kind == 3:
        attribute.ints.extend([1] * chance.choice((1, 3, 10000)))
    elif attribute.ints:
        attribute.ints[chance.randrange(len(attribute.ints))] = chance.choice(SIZES)
    elif attribute.HasField("i"):
        attribute.i = chance.choice(SIZES)
    elif attribute.HasField("f"):
        attribute.f = chance.choice(FLOATS)
    elif attribute.HasField("s"):
        attribute.s = chance.choice((b"", b"\xff\xfe", b"SAME_UPPER", b"reflect", b"linear"))


def versions(model: onnx.ModelProto, chance: random.Random) -> None:
    kind = chance.randrange(4)
    if kind == 0:
        model.ir_version = chance.choice((-1, 0, 1, 3, 7, 10, 99, 2**40))
    elif kind == 1 and model.opset_import:
        chance.choice(model.opset_import).version = chance.choice((-1, 0, 1, 7, 9, 11, 13, 24, 999))
    elif kind == 2:
        model.opset_import.add(domain=chance.choice(("", "ai.onnx.ml", "x")), version=1)
    elif model.opset_import:
        del model.opset_import[0]


def functions(model: onnx.ModelProto, chance: random.Random) -> None:
    """Calls, and calls of itself."""
    if not model.functions:
        inner = helper.make_node("twice", ["p"], ["q"], domain="local")
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
        function = helper.make_function("local", "twice", ["p"], ["q"], [inner], imports)
        model.functions.append(function)
        model.opset_import.add(domain="local", version=1)
    node, function = _node(model, chance), chance.choice(model.functions)
    kind = chance.randrange(4)
    if kind == 0:
        node.op_type, node.domain = function.name, function.domain
    elif kind == 1 and function.node:
        inner = chance.choice(function.node)
        inner.op_type, inner.domain = function.name, function.domain
    elif kind == 2:
        model.functions.add().CopyFrom(function)
    elif function.node:
        function.node[0].input.append(chance.choice(NAMES))


def texts(model: onnx.ModelProto, chance: random.Random) -> None:
    text = chance.choice(NAMES)
    model.producer_name, model.graph.name, model.doc_string = text, text, text
    model.metadata_props.add(key=text, value=text)


MUTATIONS: tuple[Mutation, ...] = (
    dims_of_a_tensor, type_of_a_tensor, contents_of_a_tensor, contents_of_a_tensor,
    storage_of_a_tensor, rename_a_tensor, drop_or_repeat_an_initializer, dims_of_a_value,
    dims_of_a_value, type_of_a_value, rename_a_value, operator_of_a_node, operator_of_a_node,
    edge_of_a_node, edge_of_a_node, name_of_a_node, drop_repeat_or_move_a_node,
    attribute_of_a_node, attribute_of_a_node, attribute_of_a_node, versions, functions, texts,
)  # fmt: skip
