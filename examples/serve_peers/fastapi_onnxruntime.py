"""An ONNX file behind FastAPI, as a careful engineer would write it: KServe v2, no batching.

    python examples/serve_peers/fastapi_onnxruntime.py resnet20.onnx --port 8100

One process of uvicorn on uvloop. A run of the model happens in a thread, so that requests are read
meanwhile; so many at once as there are cores for. Tensors come and go as bytes (Triton's binary
extension) where the client asks for that, else as JSON by orjson.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import onnxruntime
import orjson
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response

JSON_BYTES = "inference-header-content-length"
TYPES = {
    "tensor(bool)": ("BOOL", np.bool_),
    "tensor(uint8)": ("UINT8", np.uint8),
    "tensor(int8)": ("INT8", np.int8),
    "tensor(int32)": ("INT32", np.int32),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(float16)": ("FP16", np.float16),
    "tensor(float)": ("FP32", np.float32),
    "tensor(double)": ("FP64", np.float64),
}
Feeds = dict[str, Any]


class Model:
    """A session, and what it reads and writes."""

    def __init__(self, path: Path, name: str, threads: int, parallel: int) -> None:
        """At most `parallel` runs at once, each with so many threads."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.name = name
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {each.name: TYPES[each.type] for each in self.session.get_inputs()}
        self.outputs = [each.name for each in self.session.get_outputs()]
        self.types = [TYPES[each.type][0] for each in self.session.get_outputs()]
        self.limiter = anyio.CapacityLimiter(parallel)

    async def run(self, feeds: Feeds) -> list[Any]:
        """The outputs, in order."""
        return await anyio.to_thread.run_sync(
            self.session.run, self.outputs, feeds, limiter=self.limiter
        )

    def metadata(self) -> dict[str, Any]:
        """As KServe v2 has it."""
        inputs, outputs = (
            [
                {
                    "name": each.name,
                    "datatype": TYPES[each.type][0],
                    "shape": [size if isinstance(size, int) else -1 for size in each.shape],
                }
                for each in declared
            ]
            for declared in (self.session.get_inputs(), self.session.get_outputs())
        )
        told = {"name": self.name, "versions": ["1"], "platform": "onnxruntime"}
        return told | {"inputs": inputs, "outputs": outputs}

    def feeds(self, body: bytes, size: int) -> tuple[Feeds, dict[str, Any]]:
        """The arrays of a request whose first `size` bytes are JSON, and that JSON.

        Raises:
            ValueError: it does not follow the protocol, or does not fit the model.
        """
        request = orjson.loads(memoryview(body)[:size])
        found, at = {}, size
        for each in request["inputs"]:
            if each["name"] not in self.inputs:
                raise ValueError(f"no input {each['name']!r}")
            datatype, dtype = self.inputs[each["name"]]
            if each["datatype"] != datatype:
                raise ValueError(f"expected {datatype}, got {each['datatype']}")
            nbytes = each.get("parameters", {}).get("binary_data_size")
            if nbytes is None:
                array = np.array(each["data"], dtype)
            else:
                array = np.frombuffer(memoryview(body)[at : at + nbytes], dtype)
                at += nbytes
            found[each["name"]] = array.reshape(each["shape"])
        return found, request

    def answer(self, arrays: list[Any], request: dict[str, Any]) -> Response:
        """As bytes, if the request says so; else as JSON."""
        binary = request.get("parameters", {}).get("binary_data_output", False)
        outputs = []
        for name, datatype, array in zip(self.outputs, self.types, arrays, strict=True):
            each = {"name": name, "datatype": datatype, "shape": array.shape}
            more = {"parameters": {"binary_data_size": array.nbytes}}
            outputs.append(each | (more if binary else {"data": array.ravel()}))
        told = {"model_name": self.name, "model_version": "1", "outputs": outputs}
        if "id" in request:
            told["id"] = request["id"]
        head = orjson.dumps(told, option=orjson.OPT_SERIALIZE_NUMPY)
        if not binary:
            return Response(head, media_type="application/json")
        body = b"".join([head, *(array.tobytes() for array in arrays)])
        return Response(
            body, media_type="application/octet-stream", headers={JSON_BYTES: str(len(head))}
        )


def application(model: Model) -> FastAPI:
    """The routes that clients of KServe v2 need."""
    app = FastAPI()

    @app.get("/v2")
    async def server() -> dict[str, Any]:
        told = {"name": "fastapi", "extensions": ["binary_tensor_data"]}
        return told | {"version": f"onnxruntime-{onnxruntime.__version__}"}

    @app.get("/v2/health/live")
    @app.get("/v2/health/ready")
    async def ready() -> dict[str, Any]:
        return {}

    @app.get(f"/v2/models/{model.name}")
    @app.get(f"/v2/models/{model.name}/ready")
    async def metadata() -> dict[str, Any]:
        return model.metadata()

    @app.post(f"/v2/models/{model.name}/infer")
    async def infer(request: Request) -> Response:
        body = await request.body()
        try:
            feeds, asked = model.feeds(body, int(request.headers.get(JSON_BYTES, len(body))))
            arrays = await model.run(feeds)
        except (ValueError, KeyError, TypeError) as e:
            raise HTTPException(400, f"{type(e).__name__}: {e}") from e
        except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument as e:
            raise HTTPException(400, str(e)) from e
        return model.answer(arrays, asked)

    return app


def main() -> None:
    """Serves until it is told to stop."""
    parser = argparse.ArgumentParser(description="Serve an ONNX file over HTTP.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", help="of the model; by default that of the file")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1")
    parser.add_argument("--threads", type=int, default=1, help="of each run of the model")
    parser.add_argument("--parallel", type=int, help="runs at once; by default cores / threads")
    asked = parser.parse_args()
    parallel = asked.parallel or max(len(os.sched_getaffinity(0)) // asked.threads, 1)
    model = Model(asked.model, asked.name or asked.model.stem, asked.threads, parallel)
    uvicorn.run(
        application(model),
        host="127.0.0.1",
        port=asked.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
