"""Writes a PyTorch model as an ONNX file that speaks the model's own names, and is still sparse.

The exporter is the one built on `torch.export` (`dynamo=True`): it folds BatchNorm into the
convolution before it, which scales rows of the weight and so keeps every zero. Its node names
(`node_Conv_371`) are replaced: a node is called like the module it came from (`layer1.0.conv1`), or
module and operator where a module's forward makes several (`layer1.0/Relu`). Its notes, which hold
paths of source files, are dropped. The metadata promises the patterns (`core/promises.py`), so that
whoever changes the file later can be held to them.
"""

from __future__ import annotations

import ast
import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from twofour.core import patterns
from twofour.core.errors import GateError, InputError
from twofour.core.promises import KEY, strongest, to_text
from twofour.train.export_constants import Array, Rounded, constant, cut_constants
from twofour.train.export_functions import attach_functions, expert_weights, stack_experts
from twofour.train.export_quantized import (
    WeightForm,
    fold_batchnorm,
    free_name,
    is_mark,
    set_marks,
    take_weights,
    write_activations,
    write_weights,
)
from twofour.train.fake_quant import MARK, FakeQuant
from twofour.train.holding import why_stray
from twofour.train.layers import find_weights

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
    *,
    weights: WeightForm = "int8",
) -> dict[str, str]:
    """Writes the model, as it is in eval mode, to an ONNX file (opset 18).

    Quantizers that are on (`FakeQuant`) become QuantizeLinear and DequantizeLinear, quantized
    weights int8; the file computes what the fake-quantized model does, but for values that lie
    between two steps.

    Each weight that has a pattern in the model (2:4, 4:8 or another N:M, as a pair or both ways) is
    looked for in the file, read back and checked: those of linear layers, convolutions, and the
    projections of `nn.MultiheadAttention`, which may be packed or apart. If one does not have its
    pattern there, no file is left behind. The file's metadata promises the patterns.

    Args:
        model: left in the mode it was in, on any device.
        example_inputs: one tensor, or one for each input; axis 0 is the batch.
        path: of the file; replaced if it exists.
        input_names: one for each input.
        output_names: one for each output.
        dynamic: names of sizes that stay open in the file, those of the first axes of every
            input: ("batch",), ("batch", "length"), or () for the sizes of the example.
        weights: how quantized weights are stored: `int8`, or `float` with QuantizeLinear too.

    Returns:
        Name of the weight, as of `WeightRef`, -> its pattern, for each that was checked.

    Raises:
        InputError: names and inputs do not match, PyTorch cannot export the model, or a quantizer
            has no scale yet.
        GateError: a weight is not zero where its mask is, or lost its pattern on the way.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if len(inputs) != len(input_names):
        raise InputError(
            f"cannot export {type(model).__name__}",
            [f"expected one name for each input; got {len(input_names)} and {len(inputs)}"],
        )
    _require_masks_held(model)
    graph_model, quants = _exported(model, inputs, (input_names, output_names), dynamic)
    graph = graph_model.graph
    cut_constants(graph, {})
    rounded = take_weights(graph, quants)
    sparse = _sparse_weights(model, {str(v.name): each for v, each in rounded.items()})
    cut_constants(graph, rounded)
    stack_experts(graph, quantized=any(quant.mode == "on" for quant in quants.values()))
    fold_batchnorm(graph, rounded)
    modules = _name_nodes(model, graph)
    _drop_notes(graph_model)
    write_weights(graph, rounded, weights)
    write_activations(graph, quants)
    attach_functions(graph_model, OPSET)
    graph_model.opset_imports.pop(MARK.split("::")[0], None)
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    if promised := _verify(graph_model, modules, sparse):
        graph_model.metadata_props[KEY] = to_text(promised)
    try:
        onnx_ir.save(graph_model, temporary)
        _verify(onnx_ir.load(temporary), modules, sparse)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {weight.name: weight.pattern for weight in sparse}


def _require_masks_held(model: nn.Module) -> None:
    """Refuses weights that are not zero where a mask of theirs removes them."""
    strays = {
        w.name: why_stray(w.parameter, w.mask) for w in find_weights(model) if w.mask is not None
    }
    if broken := [f"{name}: {why}" for name, why in strays.items() if why is not None]:
        raise GateError(
            f"cannot export: {len(broken)} pruned weights left their masks",
            broken,
            "call Sparsifier.attach(optimizer) before training, or Sparsifier.apply() now",
        )


@dataclass(frozen=True)
class _Sparse:
    """A weight of the model that has a pattern.

    Attributes:
        name: as of its `WeightRef`.
        names: all it goes by.
        pattern: the strongest it has.
        values: float32 [N, C, ...].
    """

    name: str
    names: tuple[str, ...]
    pattern: str
    values: NDArray[np.float32]

    def rows_of(self, part: NDArray[np.float32], module: str) -> slice | None:
        """Which of its output channels a weight of the file holds; None if it is another's.

        BatchNorm may have scaled the rows of a whole weight: it is known by its module.
        """
        rows = len(part)
        if part.shape[1:] != self.values.shape[1:] or not 0 < rows <= len(self.values):
            return None
        if module in self.names and rows == len(self.values):
            return slice(0, rows)
        flat, wanted = self.values.reshape(len(self.values), -1), part.reshape(rows, -1)
        for first in np.flatnonzero((flat[: len(flat) - rows + 1] == wanted[0]).all(axis=1)):
            if np.array_equal(flat[first : first + rows], wanted):
                return slice(int(first), int(first) + rows)
        return None


def _sparse_weights(model: nn.Module, rounded: Mapping[str, Rounded]) -> list[_Sparse]:
    """The weights that have a pattern; those that were rounded, by parameter, as such."""
    found = []
    for ref in find_weights(model):
        values = ref.parameter.detach().to("cpu", torch.float32).numpy()
        pattern = strongest(values)
        if pattern is not None:
            names = [n if n.endswith(ref.attribute) else f"{n}.{ref.attribute}" for n in ref.names]
            values = next((rounded[n].floats for n in names if n in rounded), values)
            found.append(_Sparse(ref.name, ref.names, pattern, values))
    return found


def _exported(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    names: tuple[Sequence[str], Sequence[str]],
    dynamic: Sequence[str],
) -> tuple[onnx_ir.Model, dict[str, FakeQuant]]:
    """The exporter's graph, with marks where the quantizers are."""
    for axis in range(len(dynamic)):  # torch.export takes a size of 1 for a constant
        inputs = tuple(torch.cat([x, x], axis) if x.shape[axis] == 1 else x for x in inputs)
    # Names, not `Dim`: those bounds that a network itself has need not be spelled out then.
    shapes = tuple(dict(enumerate(dynamic)) for _ in inputs) if dynamic else None
    # Channels-last memory would be written out as gathers and reshapes by some decompositions.
    inputs = tuple(x.cpu().contiguous() for x in inputs)
    model = copy.deepcopy(model).cpu()  # an exported file is the same from each device
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.contiguous()
    quants = set_marks(model)
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
        lines = [line.strip(" -") for line in str(e).strip().splitlines()]
        static = [line for line in lines if "inferred a static shape" in line][:1]
        raise InputError(
            f"PyTorch cannot export {type(model).__name__} to ONNX",
            [lines[0], *static],
            "see whether torch.export.export accepts the model; if only an open size is the "
            "problem, use dynamic=(), or x.shape[0] where forward() has len(x)",
        ) from e
    finally:
        notices.setLevel(level)
    if program is None:
        raise InputError(f"PyTorch exported nothing for {type(model).__name__}")
    return onnx_ir.from_proto(program.model_proto), quants


def _name_nodes(model: nn.Module, graph: onnx_ir.Graph) -> dict[str, str]:
    """Renames nodes and their values; returns node name -> module name for nodes with a weight."""
    outputs = set(graph.outputs)
    taken = {value.name for value in (*graph.inputs, *graph.outputs)} | set(graph.initializers)
    leaves = {name for name, m in model.named_modules() if name and not any(m.children())}
    modules = {}
    for node in graph:
        if is_mark(node):
            continue
        module = _module_of(node)
        name = module if module in leaves else f"{module}/{node.op_type}".lstrip("/")
        if name in taken:
            name = f"{module}/{node.op_type}".lstrip("/")
        name = free_name(name, taken)
        taken.add(name)
        node.name = name
        if node.op_type in _WEIGHTED:
            modules[name] = module
        if node.outputs[0] not in outputs:
            node.outputs[0].name = name
    _name_biases(graph, taken)
    _name_weights(model, graph, modules, taken)
    return modules


def _module_of(node: onnx_ir.Node) -> str:
    """The module that owns the node's weight; else the module whose forward made the node."""
    if node.op_type in _WEIGHTED:
        weight = node.inputs[1]
        if weight is not None and weight.is_initializer() and str(weight.name).endswith(".weight"):
            return str(weight.name).removesuffix(".weight")
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return str(scopes[-2]) if len(scopes) >= 2 else ""


def _name_biases(graph: onnx_ir.Graph, taken: set[str | None]) -> None:
    """The bias that BatchNorm left becomes `conv1.bias`; the exporter says `conv1.weight_bias`."""
    for name, value in list(graph.initializers.items()):
        wanted = name.removesuffix(".weight_bias") + ".bias"
        if name.endswith(".weight_bias") and wanted not in taken:
            value.name = wanted


def _name_weights(
    model: nn.Module, graph: onnx_ir.Graph, modules: dict[str, str], taken: set[str | None]
) -> None:
    """A weight that the exporter transposed becomes `query.weight`; it says `val_18`."""
    attentions = {n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    for node in graph:
        weight = node.inputs[1] if node.name in modules else None
        module = modules.get(str(node.name), "")
        kind = "in_proj_weight" if module in attentions else "weight"
        wanted = f"{module}.{kind}".lstrip(".")
        if kind == "in_proj_weight":
            wanted = free_name(wanted, taken)
        if weight is not None and weight.is_initializer() and wanted not in taken:
            if not str(weight.name).endswith((".weight", kind)):
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


def _verify(
    model: onnx_ir.Model, modules: dict[str, str], weights: list[_Sparse]
) -> dict[str, str]:
    """Raises GateError unless the file holds each weight, whole and with its pattern.

    Returns:
        Name of the initializer -> pattern.
    """
    lost = []
    held = {weight.name: np.zeros(len(weight.values), np.bool_) for weight in weights}
    promised = {}
    for node, value, stored in _weights(model.graph):
        part, module = stored.astype(np.float32), modules.get(str(node.name), "")
        known = sorted(weights, key=lambda weight: module not in weight.names)
        found = ((weight, weight.rows_of(part, module)) for weight in known)
        weight, rows = next(((w, r) for w, r in found if r is not None), (None, None))
        if weight is None or rows is None:
            continue
        held[weight.name][rows] = True
        promised[_stored_name(value)] = weight.pattern
        reason = patterns.why_not(part, weight.pattern)
        if reason is not None:
            lost.append(f"{weight.name}: weight is not {weight.pattern} in the file: {reason}")
    for weight in weights:
        gone = int(np.count_nonzero(~held[weight.name]))
        if gone:
            some = "" if gone == len(weight.values) else f"{gone} output channels of "
            lost.append(f"{weight.name}: {some}its {weight.pattern} weight is not in the file")
    if lost:
        raise GateError(
            f"the export lost the pattern of {len(lost)} weights",
            sorted(lost),
            "remove layers that forward() does not use, and replace a layer whose weight is "
            "computed in forward() by one that holds the weight itself",
        )
    return promised


def _floats(value: onnx_ir.Value | None) -> Array | None:
    """A constant, also one that is stored as integers."""
    node = None if value is None else value.producer()
    if node is None or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return constant(value)
    stored, scale = _floats(node.inputs[0]), constant(node.inputs[1])
    if stored is None or scale is None or stored.dtype != np.int8:
        return stored
    shape = [1] * stored.ndim
    shape[node.attributes.get_int("axis", 1)] = -1
    return np.multiply(stored.astype(np.float32), scale.reshape(shape), dtype=np.float32)


def _stored_name(value: onnx_ir.Value | None) -> str:
    """The name of the initializer behind DequantizeLinear and QuantizeLinear."""
    while value is not None and (node := value.producer()) is not None:
        value = node.inputs[0]
    return str(value.name if value else "")


def _weights(
    graph: onnx_ir.Graph,
) -> Iterator[tuple[onnx_ir.Node, onnx_ir.Value | None, NDArray[np.generic]]]:
    """Each node with a constant weight, and the weight with output channels first."""
    yield from expert_weights(graph)
    for node in graph:
        if node.op_type not in _WEIGHTED:
            continue
        weight = _floats(node.inputs[1])
        if weight is None:
            continue
        transposed = node.op_type == "MatMul" or (
            node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
        )
        yield node, node.inputs[1], weight.T if transposed else weight
