"""The real Triton server, as PyPI's nvidia-pytriton carries it, as a process on a free port.

Its Python backend starts a stub that is linked to libpython and runs this interpreter's packages.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0


@dataclass(frozen=True)
class Triton:
    """A running server.

    Attributes:
        http, grpc: host:port.
        log: what it has printed so far.
    """

    http: str
    grpc: str
    log: Path


def server_folder() -> Path:
    """The folder with the server's binary and its backends."""
    spec = find_spec("pytriton")
    assert spec is not None, "pip install --no-deps nvidia-pytriton"
    assert spec.origin is not None
    return Path(spec.origin).parent / "tritonserver"


def _backends(folder: Path) -> Path:
    """The Python backend with the stub of this Python's version beside it."""
    source, target = server_folder(), folder / "backends" / "python"
    shutil.copytree(source / "backends" / "python", target)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = source / "python_backend_stubs" / version / "triton_python_backend_stub"
    (target / stub.name).symlink_to(stub)
    (target / "twofour").symlink_to(ROOT / "twofour")  # this folder is on the stub's path
    return target.parent


def _environment() -> dict[str, str]:
    """Where the stub finds libpython, and the packages of this Python.

    The stub's Python is isolated: it ignores PYTHONPATH, and has the packages of the environment
    whose python3 comes first in PATH.
    """
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR")),
        "PATH": f"{sysconfig.get_path('scripts')}:{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def triton(repository: Path, scratch: Path, *options: str) -> Iterator[Triton]:
    """A server on a model repository, until the block ends.

    Args:
        repository: with all models.
        scratch: an empty folder for its backends and its log.
        options: further ones of tritonserver.
    """
    http, grpc = free_ports(2)
    log = scratch / "triton.log"
    command = [
        str(server_folder() / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={_backends(scratch)}",
        *("--http-address=127.0.0.1", f"--http-port={http}"),
        *("--grpc-address=127.0.0.1", f"--grpc-port={grpc}"),
        *("--allow-metrics=false", "--exit-on-error=false", "--exit-timeout-secs=2", *options),
    ]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=_environment())
    try:
        _wait(process, http, log)
        yield Triton(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until all models are loaded or have failed; the server listens from then on."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"tritonserver does not listen:\n{log.read_text()[-4000:]}")
