"""The JSON documents of the protocol as JSON Schema 2020-12, which OpenAPI 3.1 embeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twofour.serve.limits import Limits
from twofour.serve.protocol.messages import BYTES, DTYPES

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}


def record(
    properties: dict[str, Schema], required: Sequence[str] | None = None, about: str = ""
) -> Schema:
    """An object; all of its properties are there unless `required` names some of them."""
    schema: Schema = {"type": "object", "properties": properties}
    schema["required"] = list(properties) if required is None else list(required)
    if about:
        schema["description"] = about
    return schema


def array(items: Schema, **more: Any) -> Schema:
    """A list of something."""
    return {"type": "array", "items": items, **more}


def ref(name: str) -> Schema:
    """One of the documents below."""
    return {"$ref": f"#/components/schemas/{name}"}


def schemas(limits: Limits) -> dict[str, Schema]:
    """All documents by name."""
    return requests(limits) | replies()


def requests(limits: Limits) -> dict[str, Schema]:
    """What clients send."""
    name: Schema = {"type": "string", "minLength": 1, "maxLength": limits.name_length}
    value: Schema = {
        "type": ["boolean", "integer", "number", "string"],
        "maxLength": limits.name_length,
    }
    parameters: Schema = {
        "type": ["object", "null"],
        "additionalProperties": value,
        "propertyNames": {"maxLength": limits.name_length},
        "maxProperties": limits.parameters,
    }
    data = array({"type": ["boolean", "number", "array"]})
    data["description"] = "elements in row-major order: one flat list, or lists nested as the shape"
    input_tensor: dict[str, Schema] = {
        "name": name,
        "shape": array(COUNT, maxItems=limits.rank),
        "datatype": {"enum": list(DTYPES)},
        "data": data,
        "parameters": {"allOf": [ref("Parameters")], "description": "binary_data_size"},
    }
    wanted: dict[str, Schema] = {
        "name": name,
        "parameters": {
            "allOf": [ref("Parameters")],
            "properties": {"classification": COUNT, "binary_data": FLAG},
        },
    }
    whole: Schema = {
        "allOf": [ref("Parameters")],
        "properties": {"priority": COUNT, "timeout": COUNT, "binary_data_output": FLAG},
    }
    return {
        "Parameters": parameters,
        "InputTensor": record(input_tensor, ["name", "shape", "datatype"]),
        "RequestedOutput": record(wanted, ["name"]),
        "InferenceRequest": record(
            {
                "id": {"type": ["string", "null"], "maxLength": limits.name_length},
                "inputs": array(ref("InputTensor"), maxItems=limits.tensors),
                "outputs": {
                    "type": ["array", "null"],
                    "items": ref("RequestedOutput"),
                    "maxItems": limits.tensors,
                },
                "parameters": whole,
            },
            ["inputs"],
        ),
        "IndexRequest": record({"ready": FLAG}, []),
        "LoadRequest": record(
            {
                "parameters": {
                    "type": ["object", "null"],
                    "properties": {"config": {"type": "string", "description": "a JSON document"}},
                }
            },
            [],
        ),
        "UnloadRequest": record({"parameters": {"type": ["object", "null"]}}, []),
    }


def replies() -> dict[str, Schema]:
    """What the server sends."""
    datatype = {"enum": [*DTYPES, BYTES]}
    open_shape = array({"type": "integer", "minimum": -1})
    tensor = record({"name": TEXT, "datatype": datatype, "shape": open_shape})
    output = {
        "name": TEXT,
        "datatype": datatype,
        "shape": array(COUNT),
        "data": array({"type": ["boolean", "number", "string"]}),
        "parameters": record({"binary_data_size": COUNT}),
    }
    return {
        "Error": record({"error": TEXT}),
        "Live": record({"live": FLAG}),
        "Ready": record({"ready": FLAG}),
        "ModelReady": record({"name": TEXT, "ready": FLAG}),
        "ServerMetadata": record({"name": TEXT, "version": TEXT, "extensions": array(TEXT)}),
        "TensorMetadata": tensor,
        "ModelMetadata": record(
            {
                "name": TEXT,
                "versions": array(TEXT),
                "platform": TEXT,
                "inputs": array(ref("TensorMetadata")),
                "outputs": array(ref("TensorMetadata")),
            }
        ),
        "ModelConfig": record({"name": TEXT}, about="Triton's ModelConfig"),
        "ModelStatistics": record(
            {"model_stats": array(record({"name": TEXT, "version": TEXT}))},
            about="Triton's ModelStatistics",
        ),
        "OutputTensor": record(output, ["name", "datatype", "shape"]),
        "InferenceResponse": record(
            {
                "model_name": TEXT,
                "model_version": TEXT,
                "id": TEXT,
                "parameters": {"type": "object"},
                "outputs": array(ref("OutputTensor")),
            },
            ["model_name", "model_version", "outputs"],
        ),
        "Index": array(record({"name": TEXT, "version": TEXT, "state": TEXT, "reason": TEXT})),
        "Done": {"type": "object", "maxProperties": 0},
    }
