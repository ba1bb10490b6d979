"""Starts a server of others on an ONNX file, set up for CPUs: to measure ours beside it.

    python examples/serve_peers/start.py fastapi  resnet20.onnx --http 8100
    python examples/serve_peers/start.py mlserver resnet20.onnx --http 8200 --grpc 8201
    python examples/serve_peers/start.py triton   resnet20.onnx --http 8300 --grpc 8301
    twofour bench --url grpc://127.0.0.1:8001 --url grpc://127.0.0.1:8301 --model resnet20

All three run the file on ONNX Runtime and speak KServe v2 on 127.0.0.1. They serve until they get
SIGTERM or Ctrl-C; what they need on disk lies in a temporary folder.

fastapi   one process of uvicorn, HTTP with binary tensors or JSON: `fastapi_onnxruntime.py`
mlserver  one process, adaptive batching, HTTP with JSON, gRPC: `mlserver_onnxruntime.py`
triton    the server that nvidia-pytriton carries, its Python backend, dynamic batching, HTTP with
          binary tensors or JSON, gRPC: `triton_model.py`

Run it by the Python of an environment that has onnxruntime, and fastapi, uvicorn[standard] and
orjson, or mlserver, or nvidia-pytriton. Those of this package need not be there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import onnxruntime

HERE = Path(__file__).resolve().parent
DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(int8)": "INT8",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
}
Command = tuple[list[str], dict[str, str]]


def fastapi(asked: argparse.Namespace, folder: Path) -> Command:
    """The command, and variables of its environment."""
    script = str(HERE / "fastapi_onnxruntime.py")
    options = ["--name", asked.name, "--port", asked.http, "--threads", asked.threads]
    parallel = ["--parallel", asked.parallel]
    return [sys.executable, script, str(asked.model), *map(str, options + parallel)], {}


def mlserver(asked: argparse.Namespace, folder: Path) -> Command:
    """One process: its own workers hand pickled requests to others, which costs more."""
    settings = {
        "host": "127.0.0.1",
        "http_port": asked.http,
        "grpc_port": asked.grpc,
        "metrics_endpoint": None,
        "parallel_workers": 0,
        "debug": False,
        "load_models_at_startup": True,
    }
    inputs, outputs = tensors(asked.model)
    extra = {"threads": asked.threads, "parallel": asked.parallel}
    model = {
        "name": asked.name,
        "implementation": "mlserver_onnxruntime.OnnxRuntime",
        "platform": "onnxruntime",
        "inputs": inputs,
        "outputs": outputs,
        "max_batch_size": asked.max_batch,
        "max_batch_time": asked.delay_us / 1e6,
        "parameters": {"uri": str(asked.model), "extra": extra},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    shutil.copy(HERE / "mlserver_onnxruntime.py", folder)
    return [str(Path(sys.executable).with_name("mlserver")), "start", str(folder)], {}


def triton(asked: argparse.Namespace, folder: Path) -> Command:
    """The server, its Python backend with the stub of this Python, and a repository."""
    found = find_spec("pytriton")
    if found is None or found.origin is None:
        raise SystemExit("triton needs nvidia-pytriton: pip install nvidia-pytriton")
    package = Path(found.origin).parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    backends, models = folder / "backends", folder / "models"
    shutil.copytree(package / "tritonserver" / "backends", backends)
    stub = package / "tritonserver" / "python_backend_stubs" / version
    shutil.copy(stub / "triton_python_backend_stub", backends / "python")
    place = models / asked.name
    (place / "1").mkdir(parents=True)
    shutil.copy(HERE / "triton_model.py", place / "1" / "model.py")
    (place / "config.pbtxt").write_text(triton_config(asked))
    libraries = (package.parent / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR"))
    environment = {
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
    }
    options = {
        "model-repository": models,
        "backend-directory": backends,
        "http-address": "127.0.0.1",
        "http-port": asked.http,
        "grpc-address": "127.0.0.1",
        "grpc-port": asked.grpc,
        "allow-metrics": "false",
        "log-info": "false",
    }
    server = str(package / "tritonserver" / "bin" / "tritonserver")
    return [server, *(f"--{name}={value}" for name, value in options.items())], environment


def triton_config(asked: argparse.Namespace) -> str:
    """config.pbtxt: batches of requests, and so many instances."""
    batched = asked.max_batch > 1
    lines = [
        f'name: "{asked.name}"',
        'backend: "python"',
        f"max_batch_size: {asked.max_batch if batched else 0}",
        f"instance_group [{{ count: {asked.parallel} kind: KIND_CPU }}]",
    ]
    for kind, declared in zip(("input", "output"), tensors(asked.model), strict=True):
        for each in declared:
            dims = ", ".join(map(str, each["shape"][batched:]))
            type_ = f"TYPE_{each['datatype']}"
            lines.append(f'{kind} [{{ name: "{each["name"]}" data_type: {type_} dims: [{dims}] }}]')
    if batched:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {asked.delay_us} }}")
    for key, value in (("model", asked.model), ("threads", asked.threads)):
        lines.append(f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}')
    return "\n".join(lines)


def tensors(model: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs and outputs as KServe's metadata has them."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    inputs, outputs = (
        [
            {
                "name": each.name,
                "datatype": DATATYPES[each.type],
                "shape": [size if isinstance(size, int) else -1 for size in each.shape],
            }
            for each in declared
        ]
        for declared in (session.get_inputs(), session.get_outputs())
    )
    return inputs, outputs


SERVERS = {"fastapi": fastapi, "mlserver": mlserver, "triton": triton}


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Serve an ONNX file on ONNX Runtime.")
    parser.add_argument("server", choices=SERVERS)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", help="of the model; by default that of the file")
    parser.add_argument("--http", type=int, default=8000, help="port on 127.0.0.1")
    parser.add_argument("--grpc", type=int, default=8001, help="port on 127.0.0.1")
    parser.add_argument("--threads", type=int, default=1, help="of each run of the model")
    parser.add_argument("--parallel", type=int, help="runs at once; by default cores / threads")
    parser.add_argument("--max-batch", type=int, default=32, help="1 for no batches")
    parser.add_argument("--delay-us", type=int, default=500, help="that a batch may wait")
    asked = parser.parse_args()
    asked.model = asked.model.resolve()
    if not asked.model.is_file():
        parser.error(f"there is no file {asked.model}")
    asked.name = asked.name or asked.model.stem
    cores = len(os.sched_getaffinity(0))
    asked.parallel = asked.parallel or max(cores // asked.threads, 1)
    return asked


def main() -> int:
    """Serves until it is told to stop; the exit code is the server's."""
    asked = parsed()
    with tempfile.TemporaryDirectory() as folder:
        command, environment = SERVERS[asked.server](asked, Path(folder))
        server = subprocess.Popen(command, env=os.environ | environment)

        def stop(number: int, frame: FrameType | None) -> None:
            server.send_signal(signal.SIGTERM)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        return server.wait()


if __name__ == "__main__":
    sys.exit(main())
