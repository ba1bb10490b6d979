"""A request and its answer as plain data, the same for HTTP and gRPC.

Source: KServe, Open Inference Protocol (v2), https://github.com/kserve/open-inference-protocol, and
the extensions of Triton's clients: binary tensor data, classification, schedule policy, parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.serve.errors import MalformedError

Array = NDArray[Any]
Parameter = bool | int | float | str
Parameters = Mapping[str, Parameter]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
}
"""The protocol's names of those types that an engine may have; BYTES is only an answer's."""
NAMES: dict[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPES.items()}
BYTES = "BYTES"


@dataclass(frozen=True, slots=True)
class Wanted:
    """An output that a request asks for.

    Attributes:
        name: of the output.
        binary: HTTP: as raw bytes behind the JSON, not as numbers in it.
        classes: above 0: its so many largest values as texts "value:index", not the tensor.
    """

    name: str
    binary: bool = False
    classes: int = 0


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One inference as a client asks for it.

    Attributes:
        model: name.
        version: "" where the server may choose.
        id: the client's; comes back with the answer; "" for none.
        inputs: name -> array, C-contiguous; a read-only view of the message's bytes where these can
            be read as they lie.
        outputs: what is wanted; () for all outputs.
        binary: HTTP: how outputs are sent that `outputs` does not name.
        parameters: of the whole request; the schedule's are `priority` (0 for the default, 1 the
            highest) and `timeout` (microseconds).
    """

    model: str
    version: str
    id: str
    inputs: Mapping[str, Array]
    outputs: tuple[Wanted, ...] = ()
    binary: bool = False
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InferResponse:
    """The answer to one request.

    Attributes:
        model: name.
        version: that computed it.
        id: the request's.
        outputs: name -> array, C-contiguous; of classes an object array of bytes.
        parameters: of the whole answer.
    """

    model: str
    version: str
    id: str
    outputs: Mapping[str, Array]
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class TensorMetadata:
    """An input or output of a model.

    Attributes:
        name: of the tensor.
        datatype: the protocol's name of its type.
        shape: its dimensions, the batch first where the model has one; -1 where open.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelMetadata:
    """What a model's versions have in common, as the protocol shows it."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


def datatype(dtype: np.dtype[Any]) -> str:
    """The protocol's name of a numpy type."""
    return NAMES[dtype.newbyteorder("=")]


def numpy_type(name: str, tensor: str) -> np.dtype[Any]:
    """The numpy type of a datatype.

    Args:
        name: the protocol's.
        tensor: whose it is, for the message.

    Raises:
        MalformedError: there is no such datatype, or engines have none.
    """
    dtype = DTYPES.get(name)
    if dtype is None:
        expected = f"expected one of {', '.join(DTYPES)}"
        raise MalformedError(
            f"input {tensor!r} has an unusable datatype",
            [expected, f"got {name!r}"],
            "send the datatype that the model's metadata names",
        )
    return dtype
