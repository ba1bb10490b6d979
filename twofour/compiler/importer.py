"""Any ONNX model -> a clean static graph: the form every pass expects.

    model-local functions        -> inlined, but the meanings of plugins' operators that a tactic
                                    takes: these stay nodes
    opset below 17               -> 17 (newer ones stay as they are)
    symbolic dimensions          -> numbers: the user's, or 1, then recorded in the metadata
    Constant nodes               -> initializers, which are no longer inputs as well
    Identity, Dropout            -> gone
    what depends on no input     -> folded, except QuantizeLinear and DequantizeLinear, which carry
                                    the quantization of weights
    equal nodes and initializers -> one
    notes of the exporter        -> dropped: they hold source lines and paths
    nodes without a name         -> named after their weight or their first output

    operators of ONNX Runtime    -> standard ones, where a pass of `UNFUSE` knows how

Every value that can be inferred has a static shape afterwards, by the onnx package or by ONNX
Runtime. Operators inside the bodies of If, Loop and Scan are left as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from twofour.compiler.bounds import require_fits, require_possible
from twofour.compiler.native_plugin import has_tactic, inline_refused
from twofour.compiler.settle import settle
from twofour.core import promises
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.target import Target
from twofour.onnx_tools.infer import infer_shapes, require_consistent
from twofour.onnx_tools.plugins import inline
from twofour.onnx_tools.promises import carry, require_kept
from twofour.onnx_tools.upgrade import move_foreign, upgrade
from twofour.onnx_tools.windows import require_windows

IR_VERSION = 10
ASSUMED_KEY = "twofour.assumed_dims"  # metadata: JSON, symbolic dimension -> the number it became
_INVALID = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)
_GENERATED = re.compile(r"(node(_.*)?)?")  # by torch's newer exporter, or by onnx-ir
_NAMELESS = re.compile(r"(node(_\d+)?)?")

Shapes = Mapping[str, tuple[int, ...]]


def import_graph(
    model: ir.Model, shapes: Shapes | None = None, target: Target | None = None
) -> ir.Model:
    """The model as a clean static graph; the given model is not changed.

    Args:
        model: as loaded from a file.
        shapes: shapes of inputs by name; the dimensions of inputs not named here, where symbolic,
            follow from equal symbols or become 1.
        target: operators of plugins that have a tactic for it stay whole; without one, all whose
            meaning is a function are inlined.

    Returns:
        A new model. Its metadata entry `ASSUMED_KEY` lists the dimensions that became 1 unasked,
        `INLINED_KEY` why operators of plugins were inlined.

    Raises:
        InputError: an unknown input name, a shape that contradicts the model, or one at which an
            operator has nothing to compute.
        GateError: a weight does not have the pattern that the model's metadata promises.
        UnsupportedError: the opset cannot be converted, or the model does not pass onnx's checks.
    """
    model = ir.external_data.load_to_model(model.clone())
    model.ir_version = max(model.ir_version or 0, IR_VERSION)
    common.RemoveInitializersFromInputsPass()(model)
    assumed = bind_inputs(model.graph, shapes or {})
    inline(model, lambda operator: target is not None and has_tactic(operator, target))
    require_kept(model)
    model.metadata_props.pop(promises.KEY, None)  # weights may change from here on
    move_foreign(model)
    model = upgrade(model)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props[ASSUMED_KEY] = json.dumps(assumed)
    _clean(model)
    if target is not None and inline_refused(model, target):
        _clean(model)
    name_nodes(model.graph)
    require_windows(model.graph)
    require_possible(model.graph)
    return model


def standardized(model: ir.Model) -> ir.Model:
    """The model with ONNX Runtime's operators written as standard ones, as far as a pass knows how.

    What is quantized before import has to be found first: a FusedConv becomes Conv and Relu. Open
    dimensions stay open, and the given model is not changed.

    Raises:
        UnsupportedError: the opset cannot be converted.
    """
    source, model = model, model.clone()
    if not move_foreign(model):
        return source
    model = ir.external_data.load_to_model(model)
    common.RemoveInitializersFromInputsPass()(model)
    inline(model)
    model = upgrade(model)
    settle(model)
    carry(source, model)
    return model


def bind_inputs(graph: ir.Graph, shapes: Shapes) -> dict[str, int]:
    """Makes the inputs static, in place.

    Args:
        graph: of the model.
        shapes: as for `import_graph`.

    Returns:
        The dimensions that were assumed, as "input[axis]" -> 1.

    Raises:
        InputError: an unknown input name, or a shape that contradicts the model.
    """
    inputs = {value.name or "": value for value in graph.inputs}
    if unknown := sorted(set(shapes) - set(inputs)):
        raise InputError(
            f"no input named {unknown[0]!r} in the model",
            [f"expected one of: {', '.join(inputs)}", f"got: {', '.join(unknown)}"],
            fix=f"give the shape as {next(iter(inputs), 'x')}:1x3x32x32 with a name from above",
        )
    symbols: dict[str, tuple[int, str]] = {}
    for name, shape in shapes.items():
        _bind_given(inputs[name], tuple(shape), symbols)
    assumed = {}
    for name, value in inputs.items():
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            continue  # refused by its kind, later
        if value.shape is None:
            raise InputError(
                f"input {name!r} has no shape in the model",
                ["expected a tensor whose number of dimensions is known"],
                fix=f"give its shape: --shapes {name}:1x3x32x32",
            )
        dims = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int):
                dims.append(dim)
                continue
            known = symbols.get(dim.value or "")
            dims.append(known[0] if known else 1)
            if known is None:
                assumed[f"{name}[{axis}]"] = 1
        value.shape = ir.Shape(dims)
    return assumed


def _bind_given(
    value: ir.Value, given: tuple[int, ...], symbols: dict[str, tuple[int, str]]
) -> None:
    """Applies a shape of the user to one input and remembers what its symbols stand for."""
    declared = list(value.shape) if value.shape is not None else [None] * len(given)
    reasons = []
    if len(declared) != len(given):
        reasons.append(f"expected {len(declared)} dimensions: {_dims(declared)}")
    for axis, (dim, number) in enumerate(zip(declared, given, strict=False)):
        here = f"{value.name}[{axis}]"
        symbol = dim.value if isinstance(dim, ir.SymbolicDim) else None
        known, there = symbols.setdefault(symbol, (number, here)) if symbol else (number, here)
        if number < 1:
            reasons.append(f"dimension {axis}: expected at least 1, got {number}")
        elif isinstance(dim, int) and dim != number:
            reasons.append(f"dimension {axis}: the model fixes it to {dim}, got {number}")
        elif known != number:
            reasons.append(f"dimension {axis}: {symbol} is {known} in {there}, got {number}")
    if reasons:
        raise InputError(
            f"input {value.name!r} cannot have the shape {_dims(given)}",
            reasons,
            fix="give a shape that fits the model, or export it again with dynamic dimensions",
        )
    value.shape = ir.Shape(given)


def _dims(shape: Iterable[int | ir.SymbolicDim | None]) -> str:
    """A shape as users write it: 1x3x32x32."""
    dims = (dim.value if isinstance(dim, ir.SymbolicDim) else dim for dim in shape)
    return "x".join(str(dim if dim is not None else "?") for dim in dims)


def _clean(model: ir.Model) -> None:
    """Shapes, folding and removal of what is not needed."""
    ranks = _forget_shapes(model.graph)
    settle(model)
    _drop_identities(model.graph)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.NameFixPass(),
    ):
        step(model)
    _compute_outputs(model.graph)
    for value, rank in zip(model.graph.outputs, ranks, strict=True):
        if value.shape is None and rank is not None:
            value.shape = ir.Shape([None] * rank)
    require_fits(model.graph)
    _check(model)
    infer_shapes(model)
    require_fits(model.graph)


def _drop_identities(graph: ir.Graph) -> None:
    """Lets the readers of y = Identity(x) read x; where y is an output, x takes its name."""
    for node in list(graph):
        if node.op_type != "Identity" or node.domain != "" or node.inputs[0] is None:
            continue
        x, y = node.inputs[0], node.outputs[0]
        if not y.is_graph_output():
            y.replace_all_uses_with(x)
        elif x.producer() is not None and not x.is_graph_output() and y in graph.outputs:
            y.replace_all_uses_with(x, replace_graph_outputs=True)
            x.name, y.name = y.name, None
        else:
            continue
        graph.remove(node, safe=True)


def _compute_outputs(graph: ir.Graph) -> None:
    """Gives outputs that are constants a node: y = Identity(constant)."""
    for index, value in enumerate(graph.outputs):
        if not value.is_initializer():
            continue
        node = ir.node("Identity", [value], name=value.name)
        y = node.outputs[0]
        y.name, y.shape, y.type = value.name, value.shape, value.type
        value.name = f"{y.name}_constant"
        graph.append(node)
        graph.outputs[index] = y


def _forget_shapes(graph: ir.Graph) -> list[int | None]:
    """Drops the recorded shapes: they hold old symbols, and may be wrong.

    Returns:
        The number of dimensions of each output, as recorded.
    """
    ranks = [None if value.shape is None else len(value.shape) for value in graph.outputs]
    for node in graph:
        for value in node.outputs:
            value.shape = None
    return ranks


def name_nodes(graph: ir.Graph) -> None:
    """Gives each node a name that is unique and, as far as the file tells, the model's own.

    Names that exporters number (`node_Conv_371`) say less than the weight the node reads: it is
    named `layer1.0.conv1` after `layer1.0.conv1.weight`. Other nameless ones get their output's.
    """
    taken = {node.name for node in graph if not _GENERATED.fullmatch(node.name or "")}
    for node in graph:
        given = node.name or ""
        if not _GENERATED.fullmatch(given):
            continue
        fallback = f"{node.op_type}:{node.outputs[0].name}"
        name = _module(node) or (fallback if _NAMELESS.fullmatch(given) else given)
        node.name = name if name not in taken else f"{name}:{node.outputs[0].name}"
        taken.add(node.name)


def _module(node: ir.Node) -> str:
    """The module whose weight a Conv, Gemm or MatMul reads, through Q/DQ and Transpose; or ""."""
    if node.op_type not in ("Conv", "Gemm", "MatMul", "MatMulInteger") or len(node.inputs) < 2:
        return ""
    value = node.inputs[1]
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type not in ("QuantizeLinear", "DequantizeLinear", "Transpose"):
            return ""
        value = producer.inputs[0]
    module, weight, _ = (value.name or "" if value is not None else "").partition(".weight")
    return module if weight else ""


def _check(model: ir.Model) -> None:
    """Raises UnsupportedError where the checks of the onnx package do not let the model pass."""
    try:
        common.CheckerPass()(model)
        require_consistent(model)
    except (*_INVALID, ValueError) as error:  # the last of types that are none
        raise UnsupportedError(
            "the model is not valid ONNX",
            str(error).strip().splitlines()[:3],
            fix="check the file with onnx.checker, and the shapes given for its inputs",
        ) from error
