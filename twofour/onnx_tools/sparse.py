"""Sparse initializers, which hold only what is not zero, become plain ones."""

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
    """Replaces the sparse initializers of a model and its subgraphs.

    Args:
        proto: changed; its tensors are as large as they say.
        apart: gets the bytes of those of the main graph, by their index among its initializers.

    Raises:
        InputError: values and indices do not fit each other or the dense shape, or all of them
            together are more than 256 MiB.
    """
    total = 0
    for graph in all_graphs(proto):
        for sparse in graph.sparse_initializer:
            name = sparse.values.name
            total += _dense_bytes(sparse)
            if total > _MOST_BYTES:
                reason = f"expected at most {_MOST_BYTES} bytes in all, got {total}"
                raise InputError(f"sparse initializer {name!r} is too large", [reason], _FIX)
            try:
                dense = _dense(sparse)
            except (ValueError, IndexError, TypeError) as error:
                raise InputError(
                    f"sparse initializer {name!r} is damaged", [str(error)], _FIX
                ) from error
            tensor = graph.initializer.add(
                name=name, dims=sparse.dims, data_type=sparse.values.data_type
            )
            if graph is proto.graph:
                apart[len(graph.initializer) - 1] = dense.view(np.uint8).data
            else:
                tensor.raw_data = dense.tobytes()
        del graph.sparse_initializer[:]


def _dense_bytes(sparse: onnx.SparseTensorProto) -> int:
    reason = ""
    if any(dim < 0 for dim in sparse.dims):
        reason = f"dimensions {list(sparse.dims)} are not all at least 0"
    elif sparse.values.data_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        reason = "its values are no numbers"
    if reason:
        raise InputError(f"sparse initializer {sparse.values.name!r} is damaged", [reason], _FIX)
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
