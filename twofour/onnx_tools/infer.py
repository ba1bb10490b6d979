"""Types and shapes of a model's values, as the onnx package infers them, without its crashes.

The onnx package ends the process where a Slice or a GatherND reads what has a negative dimension,
and an Expand makes as many dimensions as its shape has numbers. Such a node is set aside, in a
domain that inference passes over, until it is known what it reads:

    all set aside -> infer -> negative: refused, by the name of the node that makes it
                           -> those that read what is known by now go back; again, until none does

Most operators make no negative dimension of others, so a model takes one round more than it has
convolutions, or the like, between two such nodes. Inside of model functions they stay aside.
Nothing else in the package calls the inference of whole graphs.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_ir as ir
from onnx import numpy_helper

from twofour.core.errors import InputError
from twofour.onnx_tools.stored import all_graphs
from twofour.onnx_tools.windows import require_sizes

_MAX_READ_ELEMENTS = 1 << 10  # of constants that tell a shape
_MAX_LISTED_ELEMENTS = 1 << 20
_MAX_DIMENSIONS = 1 << 10
_MAX_STEP = 1 << 31
_STANDARD = ("", "ai.onnx")
_ASIDE = "twofour.aside"
_RISKY = ("Expand", "GatherND", "Slice")
_NEVER_NEGATIVE = frozenset(
    "Abs Add And ArgMax ArgMin BatchNormalization Cast Ceil Clip Concat Constant Cos CumSum "
    "DequantizeLinear Div Dropout Equal Erf Exp Flatten Floor Gather GatherElements GatherND Gelu "
    "Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual HardSigmoid HardSwish "
    "Identity InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax "
    "MatMul Max Mean Min Mod Mul Neg Not Or PRelu Pow QuantizeLinear Reciprocal ReduceMax "
    "ReduceMean ReduceMin ReduceProd ReduceSum Relu Round Shape Sigmoid Sign Sin Slice Softmax "
    "Softplus Sqrt Squeeze Sub Sum Tanh Transpose Trilu Unsqueeze Where Xor".split()
)  # if none of their inputs is


def infer_shapes(model: ir.Model) -> None:
    """Infers the types and shapes of all values, in place.

    A model that contradicts itself is left as it is. Shapes that are computed are followed through
    the operators that do it, unless these would list a long row of numbers.

    Raises:
        InputError: a value has a negative dimension.
    """
    try:
        proto = inferred(_outline(model), strict=True, follow=not _lists_numbers(model.graph))
    except onnx.shape_inference.InferenceError:
        return
    for graph, known in zip(model.graphs(), ir.from_proto(proto).graphs(), strict=True):
        found = ir.convenience.create_value_mapping(known)
        for name, value in ir.convenience.create_value_mapping(graph).items():
            if name in found and found[name].type is not None:
                value.type = found[name].type
                value.shape = value.shape if found[name].shape is None else found[name].shape


def is_short(shape: ir.Value | None) -> bool:
    """Whether an Expand to this shape has as many dimensions as inference should make."""
    known = None if shape is None else shape.shape
    return not known or not isinstance(known[0], int) or known[0] <= _MAX_DIMENSIONS


def require_consistent(model: ir.Model) -> None:
    """Refuses a model whose types or shapes contradict each other.

    Raises:
        onnx.shape_inference.InferenceError: they do.
        InputError: a value has a negative dimension.
    """
    inferred(_outline(model), strict=True)


def require_inferable(proto: onnx.ModelProto) -> None:
    """Refuses what the inference within another tool of the onnx package would not survive.

    Args:
        proto: without functions.

    Raises:
        InputError: a value has a negative dimension.
    """
    if any(_is_risky(node) for graph in all_graphs(proto) for node in graph.node):
        inferred(proto)


def inferred(
    proto: onnx.ModelProto, *, strict: bool = False, follow: bool = False
) -> onnx.ModelProto:
    """The model with types and shapes.

    Args:
        proto: not changed.
        strict: whether contradictions are errors.
        follow: whether shapes that are computed are followed.

    Raises:
        onnx.shape_inference.InferenceError: a contradiction, if strict.
        InputError: a value has a negative dimension; or a shape has more than 1024 numbers.
    """
    owners = [*all_graphs(proto), *proto.functions]
    if not any(_is_risky(node) for owner in owners for node in owner.node):
        return _round(proto, strict, follow)
    outline = onnx.ModelProto()
    outline.CopyFrom(proto)
    for owner in (*all_graphs(outline), *outline.functions):
        for node in filter(_is_risky, owner.node):
            node.domain = _ASIDE
    outline.opset_import.add(domain=_ASIDE, version=1)
    while True:
        found = _round(outline, strict, follow)
        ready = _Ready(found, follow).of(outline)
        if not ready:
            break
        for node in ready:
            node.domain = ""
    found.opset_import.pop()
    for owner in (*all_graphs(found), *found.functions):
        for node in owner.node:
            node.domain = "" if node.domain == _ASIDE else node.domain
    return found


def _round(proto: onnx.ModelProto, strict: bool, follow: bool) -> onnx.ModelProto:
    found = onnx.shape_inference.infer_shapes(
        proto, check_type=strict, strict_mode=strict, data_prop=follow
    )
    for graph in all_graphs(found):
        values = (*graph.value_info, *graph.output)
        if any(dim < 0 for value in values for dim in _dims(value)):
            require_sizes(ir.from_proto(found).graph.all_nodes())
    return found


class _Ready:
    """Which nodes that are aside read nothing that could be negative.

    Args:
        found: a model as inferred while they are.
        follow: whether computed shapes are followed in it.
    """

    def __init__(self, found: onnx.ModelProto, follow: bool) -> None:
        """Reads the shapes."""
        values = [v for g in all_graphs(found) for v in (*g.input, *g.value_info, *g.output)]
        self._rows: dict[str, int] = {}
        for name, dims in ((value.name, _dims(value)) for value in values):
            self._rows[name] = max(self._rows.get(name, 0), *dims, 0)
        self._steps = _numbers(found) if follow else None
        self._ready: list[onnx.NodeProto] = []

    def of(self, outline: onnx.ModelProto) -> list[onnx.NodeProto]:
        """Those of this model, which was inferred."""
        self._walk(outline.graph, _ends(outline.graph), _ends(outline.graph))
        return self._ready

    def _walk(self, graph: onnx.GraphProto, exact: set[str], sure: set[str]) -> tuple[bool, bool]:
        """Goes along the nodes.

        Args:
            graph: of the model or inside a node.
            exact: values whose shapes this round found as they are; grows.
            sure: those that cannot be negative, too; grows.

        Returns:
            Whether all in it are exact, and whether all are sure.
        """
        whole, safe = True, True
        for node in graph.node:
            reads = [name for name in node.input if name]
            is_exact, is_sure = exact.issuperset(reads), sure.issuperset(reads)
            for body in _bodies(node):
                ends = _ends(body)
                inner = self._walk(
                    body,
                    exact | (ends if is_exact else set()),
                    sure | (ends if is_sure else set()),
                )
                is_exact, is_sure = is_exact and inner[0], is_sure and inner[1]
            if node.domain == _ASIDE:
                is_exact = False
                if is_sure and self._is_small(node):
                    self._ready.append(node)
            if node.op_type not in _NEVER_NEGATIVE or node.domain not in (*_STANDARD, _ASIDE):
                is_sure = is_exact
            exact.update(node.output if is_exact else ())
            sure.update(node.output if is_sure else ())
            whole, safe = whole and is_exact, safe and is_sure
        return whole, safe

    def _is_small(self, node: onnx.NodeProto) -> bool:
        """Whether inference neither makes nor walks too many numbers for it."""
        if node.op_type == "Expand":
            count = self._rows.get(node.input[1], 0)
            if count > _MAX_DIMENSIONS:
                raise InputError(
                    f"Expand {node.name!r} makes too many dimensions",
                    [f"expected at most {_MAX_DIMENSIONS}, got a shape of {count} numbers"],
                    "export the model again",
                )
        if node.op_type != "Slice" or self._steps is None or len(node.input) < 5:
            return True
        steps = self._steps.get(node.input[4], [_MAX_STEP])
        return not node.input[4] or all(abs(step) < _MAX_STEP for step in steps)


def _numbers(proto: onnx.ModelProto) -> dict[str, list[int]]:
    """The constants that are a few integers."""
    graphs = all_graphs(proto)
    tensors = [(tensor.name, tensor) for graph in graphs for tensor in graph.initializer]
    nodes = [node for graph in graphs for node in graph.node if node.op_type == "Constant"]
    tensors += [(n.output[0], a.t) for n in nodes for a in n.attribute if a.name == "value"]
    integers = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
    found: dict[str, list[int]] = {}
    for name, tensor in tensors:
        if tensor.data_type in integers and len(tensor.dims) == 1 and tensor.dims[0] <= 8:
            found.setdefault(name, []).extend(numpy_helper.to_array(tensor).tolist())
    return found


def _bodies(node: onnx.NodeProto) -> Iterable[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def _ends(graph: onnx.GraphProto) -> set[str]:
    """Inputs and constants."""
    sparse = {tensor.values.name for tensor in graph.sparse_initializer}
    return sparse | {end.name for end in (*graph.input, *graph.initializer)}


def _is_risky(node: onnx.NodeProto) -> bool:
    return node.op_type in _RISKY and node.domain in _STANDARD


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _outline(model: ir.Model) -> onnx.ModelProto:
    """The model without the weights that tell no shape, so that none is copied."""
    outline = model.clone()
    for value in list(outline.graph.initializers.values()):
        if value.const_value is not None and value.const_value.size > _MAX_READ_ELEMENTS:
            del outline.graph.initializers[value.name or ""]
            outline.graph.inputs.append(value)
    return ir.to_proto(outline)


def _lists_numbers(graph: ir.Graph) -> bool:
    """Whether following would enumerate a long row of numbers, such as a Range."""
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    rows = [v.shape[0] for v in values if v.shape is not None and len(v.shape) == 1]
    return any(isinstance(size, int) and size > _MAX_LISTED_ELEMENTS for size in rows)
