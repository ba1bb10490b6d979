"""All messages of the gRPC services but those of inference: bytes to requests, plain data to bytes.

The configuration and the statistics of a model are plain data with the names of the protocol's
messages; what is no field of those is a mistake of the server, not of the client.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from twofour.serve.errors import MalformedError, TooLargeError
from twofour.serve.limits import Limits
from twofour.serve.protocol.messages import ModelMetadata
from twofour.serve.protocol.schema import HEALTH, INFERENCE, Method

_STATUS = {True: "SERVING", False: "NOT_SERVING", None: "SERVICE_UNKNOWN"}


def read(method: Method, body: bytes, limits: Limits) -> Any:
    """The request to a method.

    Raises:
        TooLargeError: it is larger than such requests are.
        MalformedError: the bytes are no such message.
    """
    name = method.request.DESCRIPTOR.name
    if len(body) > limits.json_bytes:
        expected = f"expected at most {limits.json_bytes} bytes"
        raise TooLargeError(f"the {name} is too large", [expected, f"got {len(body)}"])
    try:
        return method.request.FromString(body)
    except DecodeError as e:
        reasons = [f"expected a {name}", "got bytes that are none"]
        raise MalformedError("the message is damaged", reasons, "use the service's .proto") from e


def written(method: str, **fields: Any) -> bytes:
    """The answer of a method of the inference service, from the fields of its message."""
    encoded: bytes = INFERENCE[method].response(**fields).SerializeToString()
    return encoded


def model_metadata(metadata: ModelMetadata) -> bytes:
    """The bytes of a ModelMetadataResponse."""
    inputs, outputs = (
        [{"name": t.name, "datatype": t.datatype, "shape": t.shape} for t in tensors]
        for tensors in (metadata.inputs, metadata.outputs)
    )
    return written(
        "ModelMetadata",
        name=metadata.name,
        versions=metadata.versions,
        platform=metadata.platform,
        inputs=inputs,
        outputs=outputs,
    )


def config(plain: Mapping[str, Any]) -> bytes:
    """The bytes of a ModelConfigResponse."""
    return _from_plain("ModelConfig", {"config": plain})


def statistics(plain: Iterable[Mapping[str, Any]]) -> bytes:
    """The bytes of a ModelStatisticsResponse."""
    return _from_plain("ModelStatistics", {"model_stats": list(plain)})


def health(serving: bool | None) -> bytes:
    """The bytes of a HealthCheckResponse.

    Args:
        serving: None: there is no such service.
    """
    encoded: bytes = HEALTH["Check"].response(status=_STATUS[serving]).SerializeToString()
    return encoded


def _from_plain(method: str, plain: Mapping[str, Any]) -> bytes:
    response = INFERENCE[method].response()
    json_format.ParseDict(plain, response, descriptor_pool=response.DESCRIPTOR.file.pool)
    encoded: bytes = response.SerializeToString()
    return encoded
