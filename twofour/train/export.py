"""Writes a PyTorch model as an ONNX file that speaks the model's own names, and is still sparse.

The exporter is the one built on `torch.export` (`dynamo=True`): it folds BatchNorm into the
convolution before it, which scales rows of the weight and so keeps every zero. Its node names
(`node_Conv_371`) are replaced: a node is called like the module it came from (`layer1.0.conv1`), or
module and operator where a module's forward makes several (`layer1.0/Relu`). Its notes, which hold
paths of source files, are dropped.
"""

from __future__ import annotations

import ast
import copy
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from twofour.core import patterns
from twofour.core.errors import GateError, InputError
from twofour.train.layers import Prunable

OPSET = 18
_WEIGHTED = ("Conv", "Gemm", "MatMul")
_SCOPES = "pkg.torch.onnx.name_scopes"


def export_onnx(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    path: Path | str,
    input_names: Sequence[str] = ("x",),
    output_names: Sequence[str] = ("y",),
    dynamic: Sequence[str] = ("batch",),
) -> dict[str, str]:
    """Writes the model, as it is in eval mode, to an ONNX file (opset 18).

    Each weight that has a pattern (2:4/pair, 2:4/2d, 2:4 or 4:8) in the model is read back from the
    file and checked. If one does not have it there, no file is left behind.

    Args:
        model: left in the mode it was in.
        example_inputs: one tensor, or one for each input; axis 0 is the batch.
        path: of the file; replaced if it exists.
        input_names: one for each input.
        output_names: one for each output.
        dynamic: names of sizes that stay open in the file, those of the first axes of every
            input: ("batch",), ("batch", "length"), or () for the sizes of the example.

    Returns:
        Module name -> pattern, for each weight that was checked.

    Raises:
        InputError: names and inputs do not match, or PyTorch cannot export the model.
        GateError: a weight lost its pattern on the way.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if len(inputs) != len(input_names):
        raise InputError(
            f"cannot export {type(model).__name__}",
            [f"expected one name for each input; got {len(input_names)} and {len(inputs)}"],
        )
    expected = _patterns_of(model)
    graph_model = _exported(model, inputs, (input_names, output_names), dynamic)
    modules = _name_nodes(model, graph_model.graph)
    _drop_notes(graph_model)
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        onnx_ir.save(graph_model, temporary)
        _verify(onnx_ir.load(temporary).graph, modules, expected)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return expected


def _patterns_of(model: nn.Module) -> dict[str, str]:
    """Module name -> the first of `patterns.NAMED` that its weight has."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Prunable):
            weight = layer.weight.detach().to("cpu", torch.float32).numpy()
            if held := patterns.held(weight):
                found[name] = held[0]
    return found


def _exported(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    names: tuple[Sequence[str], Sequence[str]],
    dynamic: Sequence[str],
) -> onnx_ir.Model:
    for axis in range(len(dynamic)):  # torch.export takes a size of 1 for a constant
        inputs = tuple(torch.cat([x, x], axis) if x.shape[axis] == 1 else x for x in inputs)
    # Names, not `Dim`: those bounds that a network itself has need not be spelled out then.
    shapes = tuple(dict(enumerate(dynamic)) for _ in inputs) if dynamic else None
    # Channels-last memory would be written out as gathers and reshapes by some decompositions.
    inputs = tuple(x.contiguous() for x in inputs)
    model = copy.deepcopy(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.contiguous()
    notices = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = notices.level
    try:
        notices.setLevel(logging.ERROR)  # it misses torchvision, which nothing here needs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own tree specs
            warnings.filterwarnings("ignore", "# The axis name", UserWarning)  # inputs share it
            program = torch.onnx.export(
                model.eval(),
                inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(names[0]),
                output_names=list(names[1]),
                dynamic_shapes=shapes,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as e:
        raise InputError(
            f"PyTorch cannot export {type(model).__name__} to ONNX",
            [str(e).strip().splitlines()[0]],
            "see whether torch.export.export accepts the model; if only an open size is the "
            "problem, use dynamic=()",
        ) from e
    finally:
        notices.setLevel(level)
    if program is None:
        raise InputError(f"PyTorch exported nothing for {type(model).__name__}")
    return onnx_ir.from_proto(program.model_proto)


def _name_nodes(model: nn.Module, graph: onnx_ir.Graph) -> dict[str, str]:
    """Renames nodes and their values; returns node name -> module name for nodes with a weight."""
    outputs = set(graph.outputs)
    taken = {value.name for value in (*graph.inputs, *graph.outputs)} | set(graph.initializers)
    leaves = {name for name, m in model.named_modules() if name and not any(m.children())}
    modules = {}
    for node in graph:
        module = _module_of(node)
        name = module if module in leaves else f"{module}/{node.op_type}".lstrip("/")
        if name in taken:
            name = f"{module}/{node.op_type}".lstrip("/")
        name = _free(name, taken)
        taken.add(name)
        node.name = name
        if node.op_type in _WEIGHTED:
            modules[name] = module
        if node.outputs[0] not in outputs:
            node.outputs[0].name = name
    _name_biases(graph, taken)
    _name_weights(graph, modules, taken)
    return modules


def _module_of(node: onnx_ir.Node) -> str:
    """The module that owns the node's weight; else the module whose forward made the node."""
    if node.op_type in _WEIGHTED:
        weight = node.inputs[1]
        if weight is not None and weight.is_initializer() and str(weight.name).endswith(".weight"):
            return str(weight.name).removesuffix(".weight")
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return str(scopes[-2]) if len(scopes) >= 2 else ""


def _free(name: str, taken: set[str | None]) -> str:
    numbered, i = name, 0
    while numbered in taken:
        i += 1
        numbered = f"{name}_{i}"
    return numbered


def _name_biases(graph: onnx_ir.Graph, taken: set[str | None]) -> None:
    """The bias that BatchNorm left becomes `conv1.bias`; the exporter says `conv1.weight_bias`."""
    for name, value in list(graph.initializers.items()):
        wanted = name.removesuffix(".weight_bias") + ".bias"
        if name.endswith(".weight_bias") and wanted not in taken:
            value.name = wanted


def _name_weights(graph: onnx_ir.Graph, modules: dict[str, str], taken: set[str | None]) -> None:
    """A weight that the exporter transposed becomes `query.weight`; it says `val_18`."""
    for node in graph:
        weight = node.inputs[1] if node.name in modules else None
        wanted = f"{modules.get(str(node.name))}.weight"
        if weight is not None and weight.is_initializer() and wanted not in taken:
            if not str(weight.name).endswith(".weight"):
                weight.name = wanted
                taken.add(wanted)


def _drop_notes(model: onnx_ir.Model) -> None:
    """Removes the exporter's notes, which hold the paths of source files."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph:
        values.extend(node.outputs)
        node.metadata_props.clear()
    for value in values:
        value.metadata_props.clear()
    graph.metadata_props.clear()


def _verify(graph: onnx_ir.Graph, modules: dict[str, str], expected: dict[str, str]) -> None:
    """Raises GateError unless the weights have the patterns expected of their modules."""
    lost = []
    found = set()
    for node, weight in _weights(graph):
        module = modules.get(str(node.name), "")
        found.add(module)
        if module in expected:
            reason = patterns.why_not(weight, expected[module])
            if reason is not None:
                lost.append(f"{module}: weight is not {expected[module]} in the file: {reason}")
    lost += [
        f"{name}: its {expected[name]} weight is not in the file"
        for name in expected.keys() - found
    ]
    if lost:
        raise GateError(
            f"the export lost the pattern of {len(lost)} weights",
            sorted(lost),
            "remove layers that forward() does not use, and replace a layer whose weight is "
            "computed in forward() by one that holds the weight itself",
        )


def _weights(graph: onnx_ir.Graph) -> Iterator[tuple[onnx_ir.Node, NDArray[np.generic]]]:
    """Each node with a constant weight, and the weight with output channels first."""
    for node in graph:
        if node.op_type not in _WEIGHTED:
            continue
        value = node.inputs[1]
        if value is None or value.const_value is None:
            continue
        weight = value.const_value.numpy()
        transposed = node.op_type == "MatMul" or (
            node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
        )
        yield node, weight.T if transposed else weight
