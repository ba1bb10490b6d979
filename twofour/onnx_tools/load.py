"""ONNX files in and out: everything that can be wrong with a file is one clear error here.

    path -> bytes -> protobuf -> external tensors -> onnx.checker -> type check -> onnx_ir.Model

Each arrow refuses what it cannot take and says why. Later stages rely on a loaded model being
valid.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from twofour.core.errors import InputError, UnsupportedError
from twofour.onnx_tools.typecheck import type_conflicts

MAX_MODEL_BYTES = 2**31 - 1
"""The most that one protobuf message can hold."""

_FIX_EXPORT = "export the model again"

# What the onnx and onnx_ir packages raise on a damaged model.
_INVALID = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    ir.serde.SerdeError,
    ValueError,
    TypeError,
    KeyError,
)


def load_model(path: str | os.PathLike[str]) -> ir.Model:
    """Reads and checks an ONNX file.

    External tensors are read into memory. Initializers that are listed as graph inputs too, as
    files older than IR version 4 do, are taken off the inputs. Nodes without a name get one.

    Args:
        path: of a file with one ONNX ModelProto, at most 2 GiB with its external tensors.

    Raises:
        InputError: there is no such file; it is a directory, text, damaged or not ONNX; external
            data is missing; the graph is invalid; an operator is given types it does not take.
        UnsupportedError: it is larger than 2 GiB.
    """
    path = Path(path)
    proto = _parse(path, _read(path))
    _load_external_data(path, proto)
    try:
        onnx.checker.check_model(proto)
        conflicts = type_conflicts(ir.from_proto(onnx.shape_inference.infer_shapes(proto)))
        model = ir.from_proto(proto)
        ir.to_proto(model)  # refuses texts that are no UTF-8, which reading lets through
    except _INVALID as error:
        raise InputError(f"{path} is not a valid ONNX model", _lines(error), _FIX_EXPORT) from error
    if conflicts:
        raise InputError(
            f"{path} gives operators types that they do not take",
            conflicts,
            "convert the model again; int8 weights need a DequantizeLinear before a float operator",
        )
    common_passes.RemoveInitializersFromInputsPass()(model)
    common_passes.NameFixPass()(model)
    return model


def save_model(model: ir.Model, path: str | os.PathLike[str]) -> Path:
    """Writes an ONNX file under a temporary name, then renames it.

    Args:
        model: at most 2 GiB.
        path: the file; an existing one is replaced.

    Returns:
        The path.

    Raises:
        InputError: the folder does not exist or cannot be written.
        UnsupportedError: the model is larger than 2 GiB.
    """
    path = Path(path)
    data = model_bytes(model)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def model_bytes(model: ir.Model) -> bytes:
    """The model as the content of an ONNX file.

    Raises:
        UnsupportedError: it is larger than 2 GiB.
    """
    proto = ir.to_proto(model)
    if proto.ByteSize() > MAX_MODEL_BYTES:
        raise _too_large("the model", proto.ByteSize())
    data: bytes = proto.SerializeToString()
    return data


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise InputError(
                f"{path} is a directory",
                ["expected an ONNX file"],
                "name the .onnx file inside it",
            )
        size_bytes = path.stat().st_size
        if size_bytes > MAX_MODEL_BYTES:
            raise _too_large(str(path), size_bytes)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            f"no model at {path}", ["there is no such file"], "check the path"
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot read {path}", [str(error)], "check the path and its permissions"
        ) from error


def _parse(path: Path, data: bytes) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise _not_onnx(path, data) from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise _not_onnx(path, data)
    return proto


def _not_onnx(path: Path, data: bytes) -> InputError:
    head = data[:60]
    if not data:
        return InputError(f"{path} is empty", ["expected an ONNX model, got 0 bytes"], _FIX_EXPORT)
    if head.startswith(b"version https://git-lfs"):
        return InputError(
            f"{path} is a Git LFS pointer, not the model",
            ["got the pointer's text"],
            "run `git lfs pull`",
        )
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return InputError(
            f"{path} is a text file",
            [f"expected an ONNX model (protobuf), got {head.decode('ascii').splitlines()[0]!r}..."],
            "give the file that torch.onnx.export or another exporter wrote",
        )
    return InputError(
        f"{path} is not an ONNX model, or is damaged",
        [f"expected one whole ONNX protobuf message; {len(data)} bytes do not parse as one"],
        "copy or download it again and compare sizes, or export the model again",
    )


def _load_external_data(path: Path, proto: onnx.ModelProto) -> None:
    tensors = [tensor for tensor in _tensors(proto) if uses_external_data(tensor)]
    problems = [
        problem for tensor in tensors if (problem := _external_problem(path.parent, tensor))
    ]
    if problems:
        raise InputError(
            f"external data of {path} cannot be read",
            problems,
            "keep the data file that the exporter wrote beside the .onnx file",
        )
    size_bytes = sum(_tensor_bytes(tensor) for tensor in tensors) + proto.ByteSize()
    if size_bytes > MAX_MODEL_BYTES:
        raise _too_large(str(path), size_bytes)
    for tensor in tensors:
        info = ExternalDataInfo(tensor)
        with (path.parent / info.location).open("rb") as file:
            file.seek(info.offset or 0)
            tensor.raw_data = file.read(_tensor_bytes(tensor))
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _external_problem(folder: Path, tensor: onnx.TensorProto) -> str | None:
    """Why an external tensor cannot be read, or None."""
    what = f"tensor {tensor.name!r}"
    try:
        info = ExternalDataInfo(tensor)
        wanted = _tensor_bytes(tensor)
    except (ValueError, KeyError, TypeError) as error:
        return f"{what}: {error}"
    offset = info.offset or 0
    file = folder / info.location
    root = folder.resolve()
    if not info.location or Path(info.location).is_absolute() or root not in file.resolve().parents:
        return f"{what}: expected a file inside {folder}, got location {info.location!r}"
    if not file.is_file():
        return f"{what}: there is no file {file}"
    if offset < 0 or wanted < 0 or (info.length is not None and info.length != wanted):
        return f"{what}: expected {wanted} bytes, got offset {offset} and length {info.length}"
    if offset + wanted > file.stat().st_size:
        return f"{what}: expected {offset + wanted} bytes in {file}, got {file.stat().st_size}"
    return None


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Raises KeyError or ValueError for a type or a shape that is none."""
    count = 1
    for dim in tensor.dims:
        count *= dim
    return (count * ir.DataType(tensor.data_type).bitwidth + 7) // 8


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    graphs = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        for graph in graphs:
            yield from graph.initializer
            nodes.extend(graph.node)
        graphs = []
        for attribute in (attribute for node in nodes for attribute in node.attribute):
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            graphs.extend(attribute.graphs)
            if attribute.HasField("g"):
                graphs.append(attribute.g)
        nodes = []


def _lines(error: Exception) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()][:8]


def _too_large(what: str, size_bytes: int) -> UnsupportedError:
    return UnsupportedError(
        f"{what} is too large",
        [f"expected at most {MAX_MODEL_BYTES} bytes with its external data, got {size_bytes}"],
        "split the model, or store its weights as float16",
    )


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}", [str(error)], "choose an existing, writable folder")
