"""The page /openapi.json: OpenAPI 3.1 of all routes. Source: https://spec.openapis.org/oas/v3.1.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from twofour.serve.http.messages import REASONS
from twofour.serve.http.routes import ROUTES, Route
from twofour.serve.http.schemas import Schema, ref, schemas
from twofour.serve.limits import Limits

LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Operation:
    """What the page says of an operation.

    Attributes:
        about: one line.
        answers: schema of its reply, "" where it is no JSON document.
        takes: schema of its request, "" for none.
        unready: schema of its reply with status 503, where that is no error.
        refusals: statuses of errors beside those of every route.
    """

    about: str
    answers: str = ""
    takes: str = ""
    unready: str = "Error"
    refusals: tuple[int, ...] = ()


SINCE = {
    "name": "since",
    "in": "query",
    "description": "The last point of the history that the reader has",
    "schema": {"type": "integer", "minimum": 0, "maximum": 10**15 - 1},
}
OPERATIONS = {
    "server_metadata": Operation("The server's name, version and extensions", "ServerMetadata"),
    "live": Operation("Whether the process answers", "Live", unready="Live"),
    "ready": Operation("Whether requests should be sent here", "Ready", unready="Ready"),
    "statistics": Operation("Counts and times", "ModelStatistics", refusals=(404,)),
    "metadata": Operation("A model's inputs and outputs", "ModelMetadata", refusals=(404,)),
    "model_ready": Operation(
        "Whether a model takes requests", "ModelReady", unready="ModelReady", refusals=(404,)
    ),
    "config": Operation("A model's configuration", "ModelConfig", refusals=(404,)),
    "infer": Operation(
        "Inference", "InferenceResponse", "InferenceRequest", refusals=(404, 413, 417, 504)
    ),
    "index": Operation("What the repository holds", "Index", "IndexRequest", refusals=(413, 417)),
    "load": Operation(
        "Load a model, or load it again", "Done", "LoadRequest", refusals=(403, 404, 413, 417)
    ),
    "unload": Operation("Unload a model", "Done", "UnloadRequest", refusals=(403, 404, 413, 417)),
    "status": Operation("The document of the status page"),
    "metrics": Operation("The page of Prometheus"),
    "openapi": Operation("This page"),
}


def document(version: str, limits: Limits) -> dict[str, Any]:
    """The page.

    Args:
        version: of the server.
        limits: of requests.
    """
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        path = paths.setdefault(route.path, {})
        path[route.method.lower()] = operation(route)
        if "{" in route.path:
            path["parameters"] = [
                {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string"}}
                for part in route.path.split("/")
                if part.startswith("{")
            ]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "twofour",
            "version": version,
            "description": "Open Inference Protocol, version 2, with Triton's extensions",
        },
        "paths": paths,
        "components": {
            "schemas": schemas(limits),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def operation(route: Route) -> dict[str, Any]:
    """One route."""
    told = OPERATIONS[route.operation]
    name = route.operation
    if "{version}" in route.path:
        name += "_of_version"
    elif route.operation == "statistics" and "{model}" in route.path:
        name += "_of_model"
    responses = {"200": response(200, told.answers, route.operation)}
    refusals = {400, 431, 500, *told.refusals} | ({503} if told.answers else set())
    if not route.public:
        refusals |= {401, 403}
    for status in sorted(refusals):
        schema = told.unready if status == 503 else "Error"
        responses[str(status)] = response(status, schema, "")
    found: dict[str, Any] = {"operationId": name, "summary": told.about, "responses": responses}
    # {} beside the scheme: a server without tokens asks for none.
    found["security"] = [] if route.public else [{"token": []}, {}]
    if told.takes:
        found["requestBody"] = {
            "required": route.operation == "infer",
            "content": content(told.takes, route.operation),
        }
    if route.operation == "infer":
        found["parameters"] = [header_parameter()]
    if route.operation == "status":
        found["parameters"] = [SINCE]
    return found


def response(status: int, schema: str, name: str) -> dict[str, Any]:
    """One reply of a route."""
    about = REASONS[status].decode()
    if name == "metrics":
        text = {"schema": {"type": "string"}}
        kinds = ("text/plain", "application/openmetrics-text")
        return {"description": about, "content": dict.fromkeys(kinds, text)}
    if name in ("openapi", "status"):
        return {"description": about, "content": {"application/json": {"schema": {}}}}
    found: dict[str, Any] = {"description": about, "content": content(schema, name)}
    if name == "infer":
        found["headers"] = {LENGTH: {"schema": {"type": "integer"}}}
    if status == 503 and schema == "Error":
        found["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
    return found


def content(schema: str, name: str) -> dict[str, Schema]:
    """A body: JSON, and for inference also JSON with raw bytes of tensors behind it."""
    kinds: dict[str, Schema] = {"application/json": {"schema": ref(schema)}}
    if name == "infer":
        kinds["application/octet-stream"] = {"schema": {}}
    return kinds


def header_parameter() -> dict[str, Any]:
    """The header that says where raw bytes begin."""
    return {
        "name": LENGTH,
        "in": "header",
        "required": False,
        "schema": {"type": "integer", "minimum": 1},
        "description": "bytes of the JSON, where raw bytes of tensors follow it",
    }
