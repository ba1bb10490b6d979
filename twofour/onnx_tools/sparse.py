"""Sparse constants, which hold only what is not zero, become plain ones."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from twofour.core.errors import InputError
from twofour.onnx_tools.stored import Bytes, all_graphs

_MOST_BYTES = 1 << 28  # made of a few bytes, and copied several times
_FIX = "export the model again, with plain initializers"


def make_dense(proto: onnx.ModelProto, apart: dict[int, Bytes]) -> None:
    """Replaces the sparse constants of a model, its subgraphs and functions.

    Args:
        proto: changed; its tensors are as large as they say.
        apart: gets the bytes of those of the main graph, by their index among its initializers.

    Raises:
        InputError: values and indices do not fit each other or the dense shape, or all of them
            together are more than 256 MiB.
    """
    left = _MOST_BYTES
    for graph in all_graphs(proto):
        for sparse in graph.sparse_initializer:
            name = sparse.values.name
            dense = _within(sparse, f"sparse initializer {name!r}", left)
            left -= dense.nbytes
            tensor = graph.initializer.add(
                name=name, dims=sparse.dims, data_type=sparse.values.data_type
            )
            if graph is proto.graph:
                apart[len(graph.initializer) - 1] = dense.view(np.uint8).data
            else:
                tensor.raw_data = dense.tobytes()
        del graph.sparse_initializer[:]
    nodes = [node for graph in all_graphs(proto) for node in graph.node]
    nodes += [node for function in proto.functions for node in function.node]
    for node, attribute in ((owner, held) for owner in nodes for held in owner.attribute):
        if attribute.HasField("sparse_tensor"):  # the sparse_value of a Constant
            sparse = attribute.sparse_tensor
            dense = _within(sparse, f"the sparse value of {node.op_type} {node.name!r}", left)
            left -= dense.nbytes
            tensor = numpy_helper.from_array(dense.reshape(tuple(sparse.dims)))
            attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))


def densified(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with plain initializers; itself where it has no sparse one."""
    if not proto.graph.sparse_initializer:
        return proto
    copy, apart = onnx.ModelProto(), dict[int, Bytes]()
    copy.CopyFrom(proto)
    make_dense(copy, apart)
    for index, data in apart.items():
        copy.graph.initializer[index].raw_data = bytes(data)
    return copy


def _within(
    sparse: onnx.SparseTensorProto, what: str, left: int
) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
    """All values in one row, of at most `left` bytes."""
    size_bytes = _dense_bytes(sparse, what)
    if size_bytes > left:
        reason = (
            f"expected at most {_MOST_BYTES} bytes in all, got {_MOST_BYTES - left + size_bytes}"
        )
        raise InputError(f"{what} is too large", [reason], _FIX)
    try:
        return _dense(sparse)
    except (ValueError, IndexError, TypeError) as error:
        raise InputError(f"{what} is damaged", [str(error)], _FIX) from error


def _dense_bytes(sparse: onnx.SparseTensorProto, what: str) -> int:
    reason = ""
    if any(dim < 0 for dim in sparse.dims):
        reason = f"dimensions {list(sparse.dims)} are not all at least 0"
    elif sparse.values.data_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        reason = "its values are no numbers"
    if reason:
        raise InputError(f"{what} is damaged", [reason], _FIX)
    count: int = math.prod(sparse.dims)
    return count * ir.DataType(sparse.values.data_type).bitwidth // 8


def _dense(sparse: onnx.SparseTensorProto) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
    """All values in one row; each index counts places, or names one per dimension.

    Raises:
        ValueError: numbers of values and indices, or types, that do not fit.
        IndexError: an index beyond the shape.
    """
    values = numpy_helper.to_array(sparse.values)
    indices = numpy_helper.to_array(sparse.indices)
    dims = tuple(sparse.dims)
    if values.ndim != 1 or values.dtype.hasobject or sparse.values.data_type > 16:
        raise ValueError(f"expected a row of numbers, got {values.dtype}{list(values.shape)}")
    if indices.dtype != np.int64 or indices.shape not in ((len(values),), (len(values), len(dims))):
        raise ValueError(f"expected an index for each of {len(values)} values, "
                         f"got {indices.dtype}{list(indices.shape)}")  # fmt: skip
    row = np.zeros(math.prod(dims), values.dtype)
    if len(values):
        limits = np.array([len(row)] if indices.ndim == 1 else dims)
        if (indices < 0).any() or (indices.reshape(len(values), -1) >= limits).any():
            raise IndexError(f"an index is outside of {list(dims)}")
        row[indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), dims)] = values
    return row
