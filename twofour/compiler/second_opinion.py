"""What ONNX Runtime says of a model: whether it takes it, and the types and shapes it infers.

It knows operators that the `onnx` package does not, such as those of com.microsoft.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state

from twofour.core.errors import InputError

_RAISED = [
    kind
    for kind in vars(onnxruntime_pybind11_state).values()
    if isinstance(kind, type) and issubclass(kind, Exception)
]
# Its own classes have no common parent.
ERRORS: tuple[type[Exception], ...] = (RuntimeError, ValueError, *_RAISED)
"""What ONNX Runtime raises where it does not take a model or its inputs."""

_NAMES = {
    "bfloat16": ir.DataType.BFLOAT16,
    "bool": ir.DataType.BOOL,
    "double": ir.DataType.DOUBLE,
    "float": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "string": ir.DataType.STRING,
    **{f"{sign}int{bits}": ir.DataType[f"{sign}int{bits}".upper()]
       for sign in ("", "u") for bits in (8, 16, 32, 64)},
}  # fmt: skip


@dataclass(frozen=True)
class Told:
    """A value as ONNX Runtime describes it.

    Attributes:
        kind: in its words, such as "tensor(float)" or "seq(tensor(float))".
        dtype: of a tensor, where it is one that is passed on; else None.
        shape: where every dimension is known; a scalar cannot be told from an unknown shape, so
            both are None.
    """

    kind: str
    dtype: ir.DataType | None
    shape: tuple[int, ...] | None


def require_taken(data: bytes, why: str) -> None:
    """Refuses a model that ONNX Runtime does not take.

    Args:
        data: the serialised model.
        why: what else was found wrong with it.

    Raises:
        InputError: with its message, which names the node.
    """
    try:
        open_session(data)
    except ERRORS as error:
        raise InputError(
            "the model is not valid: ONNX Runtime refuses it too",
            [why, *_lines(error), *_culprits(data, str(error))],
            "check the file with onnx.checker, and the shapes given for its inputs",
        ) from error


def told(proto: onnx.ModelProto, names: Sequence[str]) -> dict[str, Told]:
    """What ONNX Runtime infers of values of the main graph.

    Args:
        proto: the model; not changed.
        names: of the values; they need no type.

    Returns:
        By name; empty where it does not take the model.
    """
    asked = onnx.ModelProto()
    asked.CopyFrom(proto)
    del asked.graph.output[:]
    asked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    try:
        session = open_session(asked.SerializeToString())
    except ERRORS:
        return {}
    return {end.name: _told(end) for end in session.get_outputs()}


def _culprits(data: bytes, message: str) -> list[str]:
    """The nodes of an operator that ONNX Runtime does not know: it names the operator alone."""
    unknown = re.search(r"(\S*):(\w+)\(-?\d+\) is not a registered", message)
    if unknown is None:
        return []
    graph = ir.from_proto(onnx.load_from_string(data)).graph
    found = [node for node in graph.all_nodes() if node.op_type == unknown[2]]
    return [f"it has no operator {node.domain}.{node.op_type} {node.name!r}" for node in found[:4]]


def _told(end: ort.NodeArg) -> Told:
    dims = tuple(dim for dim in end.shape if isinstance(dim, int) and dim >= 0)
    whole = dims and len(dims) == len(end.shape)
    name = re.fullmatch(r"tensor\((\w+)\)", end.type)
    return Told(end.type, _NAMES.get(name[1]) if name else None, dims if whole else None)


def open_session(data: bytes) -> ort.InferenceSession:
    """The model, each node by itself."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised, not printed as well
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _lines(error: Exception) -> list[str]:
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : ", "", str(error)).strip()
    return [line.strip() for line in text.splitlines() if line.strip()][:4]
