"""What is in an ONNX file: its operators, and each weight's size, sparsity pattern and scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.core.errors import GateError
from twofour.core.patterns import (
    Pattern,
    held,
    ineligible,
    share_held,
    why_not,
)
from twofour.onnx_tools.edit import constant, is_standard, operand
from twofour.onnx_tools.promises import Promises, check
from twofour.onnx_tools.weights import Weight, layer_weights

NEARLY = 0.4
"""From this share of zeros on, a weight that is not 2:4 probably should have been."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of the model. A dimension that is not fixed is given by name, or `?`."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True)
class ScaleInfo:
    """Quantization of a tensor.

    Attributes:
        dtype: of the quantized tensor.
        count: scales; 1 per tensor, else one per output channel.
        low: the smallest scale.
        high: the largest scale.
        zero_point: the same for all, or None where they differ.
    """

    dtype: str
    count: int
    low: float
    high: float
    zero_point: int | None


@dataclass(frozen=True)
class WeightInfo:
    """One layer and its weight.

    Attributes:
        name: of the initializer.
        node: name of the layer.
        op_type: Conv, Gemm, MatMul or MatMulInteger.
        shape: output channels, input channels, filter taps.
        dtype: as stored in the file.
        zeros: share of zeros, 0 to 1.
        size_bytes: as stored in the file.
        patterns: those of `core.patterns.NAMED` that it has, the strongest first.
        groups_held: share of its groups of 4 input channels that are 2:4; None where it is plainly
            dense, or cannot have the pattern by its shape.
        reason: why it is not 2:4; None where it is, or where it is plainly dense.
        scale: of a quantized weight.
        input_scale: of the activations that the layer takes; None where they are float.
    """

    name: str
    node: str
    op_type: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    zeros: float
    patterns: tuple[str, ...]
    groups_held: float | None
    reason: str | None
    scale: ScaleInfo | None
    input_scale: ScaleInfo | None

    @property
    def dynamic(self) -> bool:
        """Whether it multiplies integers that are quantized at run time."""
        return self.op_type == "MatMulInteger"


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        ir_version: of the file.
        opset: of the ONNX domain; 0 where it is not used.
        producer: what the exporter calls itself.
        inputs: of the model.
        outputs: of the model.
        operators: operator type -> count, subgraphs included, the most frequent first; other
            domains than ONNX are written before a dot.
        weights: in the order of the layers.
        parameters: elements of all initializers and Constant nodes.
        parameter_bytes: their size.
        weight_zeros: share of zeros in all listed weights together.
        sparse_weights: how many of the weights are 2:4.
        quantized_layers: how many layers have a quantized weight and a quantized input.
        promises: the patterns that the file's metadata promises, and whether they are kept.
    """

    ir_version: int
    opset: int
    producer: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    operators: dict[str, int]
    weights: tuple[WeightInfo, ...]
    parameters: int
    parameter_bytes: int
    weight_zeros: float
    sparse_weights: int
    quantized_layers: int
    promises: Promises

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        return asdict(self)


def inspect(model: ir.Model) -> Inspection:
    """Looks at a model without running it.

    Args:
        model: from `load_model`.
    """
    weights = tuple(_weight_info(layer, weight) for layer, weight in layer_weights(model))
    counts = Counter(
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        for node in model.graph.all_nodes()
    )
    tensors = [
        *(value.const_value for graph in model.graphs() for value in graph.initializers.values()),
        *(
            constant(node.outputs[0])
            for node in model.graph.all_nodes()
            if is_standard(node, "Constant")
        ),
    ]
    sizes = [int(np.prod(info.shape)) for info in weights]
    zeros = sum(info.zeros * size for info, size in zip(weights, sizes, strict=True))
    return Inspection(
        ir_version=model.ir_version,
        opset=model.opset_imports.get("", 0),
        producer=f"{model.producer_name or ''} {model.producer_version or ''}".strip(),
        inputs=tuple(map(_tensor_info, model.graph.inputs)),
        outputs=tuple(map(_tensor_info, model.graph.outputs)),
        operators=dict(counts.most_common()),
        weights=weights,
        parameters=sum(tensor.size for tensor in tensors if tensor is not None),
        parameter_bytes=sum(tensor.nbytes for tensor in tensors if tensor is not None),
        weight_zeros=zeros / max(sum(sizes), 1),
        sparse_weights=sum("2:4" in info.patterns for info in weights),
        quantized_layers=sum(
            info.dynamic or (info.scale is not None and info.input_scale is not None)
            for info in weights
        ),
        promises=check(model),
    )


def verify_pattern(model: ir.Model, pattern: str | Pattern, skip: Iterable[str] = ()) -> list[str]:
    """Says where a model breaks a sparsity pattern.

    Args:
        model: float or quantized.
        pattern: such as `2:4`.
        skip: shell patterns of names of nodes or weights that are dense on purpose.

    Returns:
        One line for each weight that could have the pattern by its shape and does not; empty if the
        model keeps it.

    Raises:
        InputError: the pattern's name is unknown.
    """
    pattern, skip = Pattern.parse(pattern), tuple(skip)
    found = []
    for layer, weight in layer_weights(model):
        names = (layer.name or "", weight.name)
        skipped = any(fnmatchcase(name, glob) for name in names for glob in skip)
        if skipped or ineligible(weight.values.shape, pattern):
            continue
        reason = why_not(weight.values, pattern)
        if reason is not None:
            where = f"{layer.op_type} {layer.name!r}, weight {weight.name!r}"
            found.append(f"{where} is not {pattern}: {reason}")
    return found


def patterns_of(model: ir.Model) -> dict[str, str]:
    """Name of each layer whose weight has one of the patterns `NAMED` -> the strictest of them."""
    found = {layer.name or "": held(weight.values) for layer, weight in layer_weights(model)}
    return {name: patterns[0] for name, patterns in found.items() if patterns}


def require_patterns(model: ir.Model, expected: Mapping[str, str]) -> None:
    """Checks that layers still have their patterns, after quantization for instance.

    Args:
        model: float or quantized.
        expected: name of the layer -> pattern, as `patterns_of` gives them.

    Raises:
        GateError: a layer is gone or lost its pattern; all such are listed.
    """
    weights = {layer.name or "": weight.values for layer, weight in layer_weights(model)}
    reasons = []
    for name, pattern in expected.items():
        found = why_not(weights[name], pattern) if name in weights else "no such layer"
        if found is not None:
            reasons.append(f"{name!r} is not {pattern}: {found}")
    if reasons:
        raise GateError(
            f"{len(reasons)} of {len(expected)} weights lost their sparsity pattern",
            reasons,
            "find the step that changed them; it must scale weights or keep their zeros",
        )


def _weight_info(layer: ir.Node, weight: Weight) -> WeightInfo:
    nonzero = np.not_equal(weight.values, 0)
    zeros = 1 - np.count_nonzero(nonzero) / nonzero.size if nonzero.size else 0.0
    patterns = held(nonzero) if zeros >= NEARLY else ()
    sought = zeros >= NEARLY and "2:4" not in patterns
    share = 1.0 if "2:4" in patterns else None
    if sought and ineligible(nonzero.shape, "2:4") is None:
        share = share_held(nonzero, "2:4")
    return WeightInfo(
        name=weight.name,
        node=layer.name or "",
        op_type=layer.op_type,
        shape=nonzero.shape,
        dtype=str(weight.stored.dtype),
        size_bytes=weight.stored.nbytes,
        zeros=float(zeros),
        patterns=patterns,
        groups_held=share,
        reason=why_not(nonzero, "2:4") if sought else None,
        scale=_scale_info(operand(layer, 1)),
        input_scale=_scale_info(operand(layer, 0)),
    )


def _scale_info(value: ir.Value | None) -> ScaleInfo | None:
    """The scales of the DequantizeLinear that makes the value, if one does."""
    node = value.producer() if value is not None else None
    while is_standard(node, "Transpose", "Identity", "Reshape", "Flatten", "MaxPool"):
        source = operand(node, 0) if node is not None else None
        node = source.producer() if source is not None else None
    if node is None or not is_standard(node, "DequantizeLinear"):
        return None
    scale, zero_point = constant(operand(node, 1)), constant(operand(node, 2))
    quantized = operand(node, 0)
    if scale is None or not scale.size or quantized is None:
        return None
    points = {0} if zero_point is None else {int(point) for point in zero_point.ravel()}
    dtype = quantized.dtype if zero_point is None else ir.DataType.from_numpy(zero_point.dtype)
    return ScaleInfo(
        dtype="?" if dtype is None else dtype.name.lower(),
        count=int(scale.size),
        low=float(scale.min()),
        high=float(scale.max()),
        zero_point=points.pop() if len(points) == 1 else None,
    )


def _tensor_info(value: ir.Value) -> TensorInfo:
    shape = None
    if value.shape is not None:
        shape = tuple(dim if isinstance(dim, int) else str(dim.value or "?") for dim in value.shape)
    return TensorInfo(
        str(value.name), "?" if value.dtype is None else value.dtype.name.lower(), shape
    )
