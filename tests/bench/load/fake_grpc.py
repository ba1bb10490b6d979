"""The same small server over gRPC: the model `double`, made of the real client's messages."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

OK = grpc.StatusCode.OK


class FakeGrpc:
    """`status` says with what the n-th request to infer ends, `delay_s` how long it takes."""

    def __init__(
        self,
        status: Callable[[int], grpc.StatusCode] = lambda n: OK,
        delay_s: Callable[[int], float] = lambda n: 0.0,
    ) -> None:
        self.status, self.delay_s, self.calls = status, delay_s, itertools.count()
        self.metadata: list[dict[str, str]] = []

    def infer(self, request: Any, context: Any) -> Any:
        number = next(self.calls)
        status = self.status(number)
        self.metadata.append(dict(context.invocation_metadata()))
        time.sleep(self.delay_s(number))
        if status is not OK:
            context.abort(status, "on purpose")
        x = np.frombuffer(request.raw_input_contents[0], np.float32)
        response = service_pb2.ModelInferResponse(
            model_name="double", raw_output_contents=[(2 * x).tobytes()]
        )
        response.outputs.add(name="y", datatype="FP32", shape=request.inputs[0].shape)
        return response

    def model(self, request: Any, context: Any) -> Any:
        if request.name != "double":
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.name}")
        response = service_pb2.ModelMetadataResponse(name="double", versions=["1"])
        response.inputs.add(name="x", datatype="FP32", shape=[-1, 4])
        response.outputs.add(name="y", datatype="FP32", shape=[-1, 4])
        return response

    def server(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerMetadataResponse(name="fake", version="1")

    def statistics(self, request: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "none")


@contextmanager
def fake_grpc(fake: FakeGrpc | None = None) -> Iterator[str]:
    """Its URL."""
    fake = fake or FakeGrpc()
    methods = {
        "ModelInfer": (fake.infer, service_pb2.ModelInferRequest),
        "ModelMetadata": (fake.model, service_pb2.ModelMetadataRequest),
        "ServerMetadata": (fake.server, service_pb2.ServerMetadataRequest),
        "ModelStatistics": (fake.statistics, service_pb2.ModelStatisticsRequest),
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            answer, request.FromString, lambda message: message.SerializeToString()
        )
        for name, (answer, request) in methods.items()
    }
    server = grpc.server(ThreadPoolExecutor(8))
    service = "inference.GRPCInferenceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
