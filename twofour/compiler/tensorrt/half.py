"""A graph of float32 as one of float16 or bfloat16: what a strongly typed network computes in.

    x float32 -> Conv -> Relu -> y float32
    x float32 -> Cast -> Conv (16 bits) -> Relu (16 bits) -> Cast -> y float32

Inputs and outputs of the model keep their types. So do

    1. operators whose results need the range or the precision: long sums, powers, exp, log
    2. operators that ONNX defines for float32 alone
    3. Q/DQ whose scale 16 bits cannot hold
    4. nodes that the user names

with a Cast wherever a value changes sides. Weights beyond the range of float16 become its largest
number. The scales of all other Q/DQ become 16 bits too (opset 19 and on): a Cast between a
DequantizeLinear and its convolution would keep TensorRT from computing in integers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir

from twofour.core.errors import UnsupportedError
from twofour.onnx_tools.edit import Array, Editor, constant, is_standard, operand
from twofour.onnx_tools.infer import infer_shapes

_QDQ_OPSET = 19
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_BODIES = ("If", "Loop", "Scan")
_WIDE = frozenset(
    "CumSum Exp Log LogSoftmax Pow Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp "
    "ReduceMean ReduceProd ReduceSum ReduceSumSquare".split()
)
_FLOAT_ONLY = frozenset(
    "Bernoulli BlackmanWindow DFT EyeLike HammingWindow HannWindow MelWeightMatrix Multinomial "
    "NonMaxSuppression RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Resize "
    "RoiAlign STFT Upsample".split()
)
_KINDS = {
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


def halved(
    model: ir.Model, kind: str, stay_float32: Collection[str] = ()
) -> tuple[ir.Model, tuple[str, ...]]:
    """The model with its float32 values in 16 bits, but for its inputs and outputs.

    Args:
        model: float, or with Q/DQ; not changed.
        kind: "float16" or "bfloat16".
        stay_float32: names of nodes that stay as they are.

    Returns:
        The new model, and what is worth saying of it.

    Raises:
        UnsupportedError: it has branches or loops, or cannot be brought to the opset that has
            scales of 16 bits.
    """
    bodies = [node for node in model.graph if node.op_type in _BODIES]
    if bodies:
        raise UnsupportedError(
            f"a model with {bodies[0].op_type} is not cast to {kind}",
            [f"{node.op_type} {node.name!r}" for node in bodies[:6]],
            f"export it in {kind}, or build without",
        )
    model = _with_scales_of_any_type(model.clone())
    infer_shapes(model)
    work = _Casting(model.graph, kind, frozenset(stay_float32))
    return model, work.run()


def _with_scales_of_any_type(model: ir.Model) -> ir.Model:
    """Q/DQ in an opset whose scales need not be float32."""
    opset = model.graph.opset_imports.get("", _QDQ_OPSET)
    if opset >= _QDQ_OPSET or not any(is_standard(node, *_QDQ) for node in model.graph):
        return model
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(model), _QDQ_OPSET)
    except (RuntimeError, ValueError) as error:
        raise UnsupportedError(
            f"the model cannot be converted from opset {opset} to {_QDQ_OPSET}",
            [str(error).strip().splitlines()[0], "scales of 16 bits need it"],
            f"export it again with opset {_QDQ_OPSET} or newer, or build without 16 bits",
        ) from error
    return ir.from_proto(proto)


@dataclass(eq=False)
class _Casting:
    """One graph on its way.

    Attributes:
        graph: that is changed.
        kind: "float16" or "bfloat16".
        stay: names of nodes that keep float32.
        narrow: value of float32 -> the same in 16 bits.
        wide: value of 16 bits -> the same in float32.
        clipped: weights that lost their largest numbers.
        coarse: Q/DQ that kept float32 for their scales.
    """

    graph: ir.Graph
    kind: str
    stay: frozenset[str]
    narrow: dict[ir.Value, ir.Value] = field(default_factory=dict)
    wide: dict[ir.Value, ir.Value] = field(default_factory=dict)
    clipped: list[str] = field(default_factory=list)
    coarse: list[str] = field(default_factory=list)

    def run(self) -> tuple[str, ...]:
        """Casts everything, in place."""
        self.editor = Editor(self.graph)
        self.type = _KINDS[self.kind]
        for node in list(self.graph):
            if self._stays(node):
                self._feed(node, self.wide)
            else:
                self._take(node)
        for index, output in enumerate(list(self.graph.outputs)):
            if output in self.wide or output.dtype == self.type:
                self._end(index, output)
        notes = []
        if self.clipped:
            notes.append(f"beyond the range of {self.kind}, cut: {', '.join(self.clipped[:6])}")
        if self.coarse:
            text = f"stays float32, its scale is too small for {self.kind}"
            notes.append(f"{text}: {', '.join(self.coarse[:6])}")
        return tuple(notes)

    def _stays(self, node: ir.Node) -> bool:
        """Whether a node goes on in float32."""
        if node.name in self.stay or node.op_type in _WIDE | _FLOAT_ONLY or node.domain != "":
            return True
        if not is_standard(node, *_QDQ):
            return False
        scale = constant(operand(node, 1))
        fits = scale is not None and bool((scale >= np.finfo(np.float16).tiny).all())
        if not fits and self.kind == "float16":
            self.coarse.append(node.name or node.op_type)
        return not fits and self.kind == "float16"

    def _feed(self, node: ir.Node, cast: dict[ir.Value, ir.Value]) -> None:
        """Gives a node the other side's form of the values that it reads from there."""
        for index, value in enumerate(node.inputs):
            if value is not None and value in cast:
                node.replace_input_with(index, cast[value])
            elif value is not None and cast is self.wide and value.dtype == self.type:
                node.replace_input_with(index, self._widened(value))

    def _take(self, node: ir.Node) -> None:
        """Makes a node one of 16 bits."""
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", self.type.value)
        for name in ("value", "value_float", "value_floats"):
            self._constant(node, name)
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.FLOAT:
                node.replace_input_with(index, self._narrowed(value))
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT:
                output.type = ir.TensorType(self.type)  # a type may be shared with the source

    def _constant(self, node: ir.Node, name: str) -> None:
        """The number of a Constant or a ConstantOfShape."""
        if node.op_type not in ("Constant", "ConstantOfShape") or name not in node.attributes:
            return
        value = node.attributes[name].value
        array = value.numpy() if isinstance(value, ir.TensorProtocol) else np.float32(value)
        if array.dtype != np.float32:
            return
        del node.attributes[name]
        node.attributes["value"] = ir.AttrTensor(
            "value", self._tensor(np.asarray(array), "", str(node.outputs[0].name))
        )

    def _narrowed(self, value: ir.Value) -> ir.Value:
        """A value of float32 in 16 bits: a constant of its own, or a Cast behind it."""
        if value not in self.narrow:
            stored = value.const_value if value.is_initializer() else None
            if stored is not None:
                name = self.editor.name(f"{value.name}_{self.kind}")
                tensor = self._tensor(stored.numpy(), name, str(value.name))
                found = ir.val(name, self.type, tuple(stored.numpy().shape), const_value=tensor)
                self.graph.register_initializer(found)
            else:
                found = self._cast(value, self.type)
            self.narrow[value] = found
        return self.narrow[value]

    def _widened(self, value: ir.Value) -> ir.Value:
        """A value of 16 bits in float32, by a Cast behind it."""
        if value not in self.wide:
            self.wide[value] = self._cast(value, ir.DataType.FLOAT)
        return self.wide[value]

    def _cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        name = self.editor.name(f"{value.name}_{kind.name.lower()}")
        node = ir.node("Cast", [value], {"to": kind.value}, name=self.editor.name(f"{name}_Cast"))
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(kind)
        node.outputs[0].shape = value.shape
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        return node.outputs[0]

    def _tensor(self, array: Array, name: str, source: str = "") -> ir.TensorProtocol:
        if self.kind == "float16":
            most = float(np.finfo(np.float16).max)
            if np.isfinite(array).all() and (abs(array) > most).any():
                self.clipped.append(source)
                array = np.clip(array, -most, most)
        return ir.Tensor(array.astype(self.type.numpy()), dtype=self.type, name=name or None)

    def _end(self, index: int, output: ir.Value) -> None:
        """An output of 16 bits gets its Cast, and its name."""
        name = output.name
        output.name = self.editor.name(f"{name}_{self.kind}")
        wide = self.wide.get(output) or self._cast(output, ir.DataType.FLOAT)
        wide.name = name
        self.graph.outputs[index] = wide
