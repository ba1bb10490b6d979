"""The tensors of an ONNX file: external ones read, and every one as large as it says it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from twofour.core.errors import InputError, UnsupportedError

MAX_MODEL_BYTES = 2**31 - 1
"""The most that one protobuf message can hold."""

Bytes = bytes | memoryview
_SHOWN = 8
_FIELDS = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")
_FIELD_OF = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
    ir.DataType.STRING: "string_data",
}  # all others: int32_data
_COMPLEX = (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128)


def read_external(path: Path, proto: onnx.ModelProto, apart: dict[int, Bytes]) -> None:
    """Reads the tensors that are stored in files beside the model.

    Args:
        path: of the model.
        proto: changed: its tensors no longer refer to files.
        apart: gets the bytes of initializers of the graph, by their index; those of other tensors
            are put into the model.

    Raises:
        InputError: a file is missing, short, or outside the model's folder.
        UnsupportedError: all together are more than 2 GiB.
    """
    tensors = {i: t for i, t in enumerate(all_tensors(proto)) if uses_external_data(t)}
    found = [_external_problem(path.parent, tensor) for tensor in tensors.values()]
    problems = [problem for problem in found if problem is not None]
    if problems:
        raise InputError(
            f"external data of {path} cannot be read",
            problems[:_SHOWN],
            "keep the data file that the exporter wrote beside the .onnx file",
        )
    size_bytes = sum(_tensor_bytes(tensor) for tensor in tensors.values()) + proto.ByteSize()
    size_bytes += sum(map(len, apart.values()))
    if size_bytes > MAX_MODEL_BYTES:
        raise too_large(str(path), size_bytes)
    for index, tensor in tensors.items():
        data = _read(path.parent, tensor)
        if index < len(proto.graph.initializer):
            apart[index] = data
        else:
            tensor.raw_data = data
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def tensor_problems(proto: onnx.ModelProto, apart: Mapping[int, Bytes]) -> list[str]:
    """What is wrong with how tensors are stored, one line each.

    Args:
        proto: no tensor of it is external.
        apart: the bytes of initializers, by index, that are not in the model.
    """
    found = []
    for index, tensor in enumerate(all_tensors(proto)):
        problem = _problem(tensor, apart.get(index))
        if problem is not None:
            found.append(f"tensor {tensor.name!r}: {problem}")
    names = Counter(tensor.name for tensor in proto.graph.initializer)
    found += [f"{count} initializers are named {n!r}" for n, count in names.items() if count > 1]
    return found[:_SHOWN]


def all_graphs(proto: onnx.ModelProto) -> list[onnx.GraphProto]:
    """The graph, then its subgraphs and those of functions, however deep."""
    graphs = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    for graph in graphs:  # grows while it is walked
        nodes.extend(graph.node)
        for attribute in (attribute for node in nodes for attribute in node.attribute):
            graphs.extend(attribute.graphs)
            if attribute.HasField("g"):
                graphs.append(attribute.g)
        nodes = []
    return graphs


def all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Those of the graph, its subgraphs and functions; first the graph's initializers, in order."""
    graphs = all_graphs(proto)
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    nodes = [node for owner in (*graphs, *proto.functions) for node in owner.node]
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from _attribute_tensors(attribute)


def too_large(what: str, size_bytes: int) -> UnsupportedError:
    """The error for a model that no ONNX file can hold."""
    return UnsupportedError(
        f"{what} is too large",
        [f"expected at most {MAX_MODEL_BYTES} bytes with its external data, got {size_bytes}"],
        "split the model, or store its weights as float16",
    )


def _attribute_tensors(attribute: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    if attribute.HasField("sparse_tensor"):
        yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)


def _read(folder: Path, tensor: onnx.TensorProto) -> bytes:
    info = ExternalDataInfo(tensor)
    with (folder / info.location).open("rb") as file:
        file.seek(info.offset or 0)
        return file.read(_tensor_bytes(tensor))


def _external_problem(folder: Path, tensor: onnx.TensorProto) -> str | None:
    """Why an external tensor cannot be read, or None."""
    what = f"tensor {tensor.name!r}"
    try:
        info = ExternalDataInfo(tensor)
        wanted = _tensor_bytes(tensor)
        file = folder / info.location
        inside = (
            folder.resolve() in file.resolve().parents and not Path(info.location).is_absolute()
        )
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
        return f"{what}: {error}"
    offset = info.offset or 0
    if not info.location or not inside:
        return f"{what}: expected a file inside {folder}, got location {info.location!r}"
    if not file.is_file():
        return f"{what}: there is no file {file}"
    if offset < 0 or wanted < 0 or (info.length is not None and info.length != wanted):
        return f"{what}: expected {wanted} bytes, got offset {offset} and length {info.length}"
    if offset + wanted > file.stat().st_size:
        return f"{what}: expected {offset + wanted} bytes in {file}, got {file.stat().st_size}"
    return None


def _problem(tensor: onnx.TensorProto, apart: Bytes | None) -> str | None:
    """Why a tensor's bytes are not what its type and dimensions say, or None."""
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        return f"its type {tensor.data_type} is none that ONNX has"
    if dtype == ir.DataType.UNDEFINED:
        return "it has no type"
    if tensor.HasField("segment"):
        return "it is stored in segments, which ONNX runtimes do not read"
    dims = list(tensor.dims)
    if any(dim < 0 for dim in dims):
        return f"dimensions {dims} are not all at least 0"
    count = math.prod(dims)
    if apart is not None or tensor.HasField("raw_data"):
        size = len(tensor.raw_data) if apart is None else len(apart)
        if dtype == ir.DataType.STRING:
            return "texts cannot be stored as raw bytes"
        wanted = (count * dtype.bitwidth + 7) // 8
        return None if size == wanted else f"{_of(dtype, dims)} takes {wanted} bytes, got {size}"
    field = _FIELD_OF.get(dtype, "int32_data")
    wanted = count * 2 if dtype in _COMPLEX else count
    if field == "int32_data" and dtype.bitwidth < 8:
        wanted = (count * dtype.bitwidth + 7) // 8
    sizes = {name: len(getattr(tensor, name)) for name in _FIELDS}
    if sizes[field] == wanted == sum(sizes.values()):
        return None
    got = ", ".join(f"{size} in {name}" for name, size in sizes.items() if size) or "none"
    return f"{_of(dtype, dims)} takes {wanted} values in {field}, got {got}"


def _of(dtype: ir.DataType, dims: list[int]) -> str:
    return f"{dtype.name.lower()}[{','.join(map(str, dims))}]"


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Raises KeyError or ValueError for a type or a shape that is none."""
    count: int = math.prod(tensor.dims)
    return (count * ir.DataType(tensor.data_type).bitwidth + 7) // 8
