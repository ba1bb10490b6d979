"""ONNX files in and out: everything that can be wrong with a file is one clear error here.

    path -> bytes -> protobuf -> external tensors -> onnx.checker -> type check -> onnx_ir.Model

The bytes of large weights stay where they were read and go around all of it (wire.py). Each arrow
refuses what it cannot take and says why. Later stages rely on a loaded model being valid.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from google.protobuf.message import DecodeError

from twofour.core.errors import InputError
from twofour.core.writing import write_whole
from twofour.onnx_tools import guard
from twofour.onnx_tools.dialect import set_aside
from twofour.onnx_tools.infer import inferred
from twofour.onnx_tools.sparse import make_dense
from twofour.onnx_tools.stored import (
    MAX_MODEL_BYTES,
    Bytes,
    read_external,
    tensor_problems,
    too_large,
)
from twofour.onnx_tools.typecheck import type_conflicts
from twofour.onnx_tools.wire import skeleton

_IR_OF_PLAIN_INITIALIZERS = 4
_FIX_EXPORT = "export the model again"

# What the onnx and onnx_ir packages raise on a damaged model.
_INVALID = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    ir.serde.SerdeError,
    ValueError,
    TypeError,
    KeyError,
    MemoryError,  # std::bad_alloc
)


def load_model(path: str | os.PathLike[str]) -> ir.Model:
    """Reads and checks an ONNX file.

    External tensors are read into memory, sparse initializers become plain ones. Initializers that
    are listed as graph inputs too, as files older than IR version 4 do, are taken off the inputs.
    Nodes without a name get one.

    Args:
        path: of a file with one ONNX ModelProto, at most 2 GiB with its external tensors.

    Raises:
        InputError: there is no such file; it is a directory, text, damaged or not ONNX; external
            data is missing; the graph is invalid; an operator is given types it does not take.
        UnsupportedError: it is larger than 2 GiB.
    """
    path = Path(path)
    data = _read(path)
    outline = skeleton(data)
    proto, apart = _parse(path, outline.data, data), dict[int, Bytes](outline.left_out)
    read_external(path, proto, apart)
    model = _checked(path, proto, apart)
    for index, content in apart.items():
        tensor = proto.graph.initializer[index]
        model.graph.initializers[tensor.name].const_value = _array(tensor, content)
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
        write_whole(path, data)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def model_bytes(model: ir.Model) -> bytes:
    """The model as the content of an ONNX file.

    Before IR version 4 initializers have to be inputs as well: where they are not, it becomes 4.

    Raises:
        UnsupportedError: it is larger than 2 GiB.
    """
    proto = ir.to_proto(model)
    inputs = {value.name for value in proto.graph.input}
    if any(tensor.name not in inputs for tensor in proto.graph.initializer):
        proto.ir_version = max(proto.ir_version, _IR_OF_PLAIN_INITIALIZERS)
    if proto.ByteSize() > MAX_MODEL_BYTES:
        raise too_large("the model", proto.ByteSize())
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
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is a device or a pipe", ["expected a file"], "copy it to one")
        size_bytes = path.stat().st_size
        if size_bytes > MAX_MODEL_BYTES:
            raise too_large(str(path), size_bytes)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            f"no model at {path}", ["there is no such file"], "check the path"
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot read {path}", [str(error)], "check the path and its permissions"
        ) from error


def _parse(path: Path, outline: bytes, data: bytes) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(outline)
    except DecodeError as error:
        raise _not_onnx(path, data) from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise _not_onnx(path, data)
    return proto


def _checked(path: Path, proto: onnx.ModelProto, apart: dict[int, Bytes]) -> ir.Model:
    """The model, whose initializers that lie apart have no content yet.

    The checks see those as inputs, so that a large model costs no more than a small one.
    """
    if problems := guard.problems(proto):
        raise InputError(f"{path} is not a valid ONNX model", problems, _FIX_EXPORT)
    if damaged := tensor_problems(proto, apart):
        raise InputError(f"{path} holds tensors that are damaged", damaged, _FIX_EXPORT)
    make_dense(proto, apart)
    outline = _without(proto, apart)
    set_aside(outline)
    try:
        onnx.checker.check_model(outline)
        conflicts = type_conflicts(ir.from_proto(inferred(outline)))
        ir.to_proto(ir.from_proto(outline))  # refuses texts that are no UTF-8; reading lets them
        model = ir.from_proto(proto)
    except _INVALID as error:
        raise InputError(f"{path} is not a valid ONNX model", _lines(error), _FIX_EXPORT) from error
    if conflicts:
        raise InputError(
            f"{path} gives operators types that they do not take",
            conflicts,
            "convert the model again; int8 weights need a DequantizeLinear before a float operator",
        )
    return model


def _without(proto: onnx.ModelProto, apart: Mapping[int, Bytes]) -> onnx.ModelProto:
    """A copy whose initializers that lie apart are inputs, without outputs that have no shape.

    Runtimes take those; the checker does not.
    """
    outline = onnx.ModelProto()
    outline.CopyFrom(proto)
    for info in list(outline.graph.output):
        if info.type.HasField("tensor_type") and not info.type.tensor_type.HasField("shape"):
            outline.graph.output.remove(info)
    tensors = [outline.graph.initializer[index] for index in apart]
    names = {info.name for info in outline.graph.input}
    for tensor in (tensor for tensor in tensors if tensor.name not in names):
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        outline.graph.input.append(info)
    for index in sorted(apart, reverse=True):
        del outline.graph.initializer[index]
    return outline


def _array(tensor: onnx.TensorProto, data: Bytes) -> ir.TensorProtocol:
    """The tensor with its bytes, not copied where a type takes whole bytes."""
    dtype = ir.DataType(tensor.data_type)
    if dtype.bitwidth < 8 or sys.byteorder != "little":
        tensor.raw_data = bytes(data)
        return ir.serde.TensorProtoTensor(tensor)
    array = np.frombuffer(data, dtype.numpy()).reshape(tuple(tensor.dims))
    return ir.Tensor(array, dtype=dtype, name=tensor.name)


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


def _lines(error: Exception) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()][:8]


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}", [str(error)], "choose an existing, writable folder")
