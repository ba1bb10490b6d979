"""nginx with deploy/nginx.conf, as a process without root, on free ports."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ports import free_ports

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "nginx.conf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "twofour-tests" / "nginx"
PACKAGES = ("nginx", "libpcre2-8-0")
START_S = 10.0


def nginx() -> tuple[Path, dict[str, str]]:
    """The binary and its environment: installed, or Debian's packages unpacked into a cache."""
    if installed := shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
        return Path(installed), dict(os.environ)
    binary = CACHE / "root" / "usr" / "sbin" / "nginx"
    if not binary.exists() and (problem := _unpack(CACHE)):
        pytest.skip(f"no nginx ({problem}); sudo apt-get install nginx-light")
    libraries = ":".join(map(str, (CACHE / "root" / "usr" / "lib").glob("*-linux-gnu*")))
    return binary, {**os.environ, "LD_LIBRARY_PATH": libraries}


def _unpack(folder: Path) -> str:
    """Fetches and unpacks; says what went wrong."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        return "apt-get and dpkg would fetch it"
    packages = folder / f"packages.{os.getpid()}"
    new = folder / f"root.{os.getpid()}"
    packages.mkdir(parents=True)
    done = subprocess.run(
        ["apt-get", "download", *PACKAGES], cwd=packages, capture_output=True, text=True
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "apt-get failed"
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, new], check=True)
    if not (folder / "root").exists():  # another worker may have been faster
        new.rename(folder / "root")
    shutil.rmtree(packages)
    return ""


def with_ports(ports: Mapping[int, int]) -> str:
    """The configuration with other ports; every one of them has to be there."""
    text = CONFIG.read_text()
    for usual, other in ports.items():
        text, count = re.subn(rf"127\.0\.0\.1:{usual}\b", f"127.0.0.1:@{other}", text)
        assert count == 1, usual
    return text.replace("@", "")


@contextmanager
def balancer(folder: Path, http: tuple[int, int], grpc: tuple[int, int]) -> Iterator[str]:
    """nginx before two servers, until the block ends.

    Args:
        folder: an empty one.
        http, grpc: ports of the servers.

    Yields:
        host:port for HTTP and host:port for gRPC, with a space between.
    """
    binary, environment = nginx()
    own = free_ports(2)
    ports = dict(zip((8000, 8010, 8001, 8011, 8080, 8081), (*http, *grpc, *own), strict=True))
    (folder / "nginx.conf").write_text(with_ports(ports))
    command = [str(binary), "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        _wait(process, own, folder / "log")
        yield f"127.0.0.1:{own[0]} 127.0.0.1:{own[1]}"
    finally:
        process.terminate()
        process.wait(10)


def _wait(process: subprocess.Popen[bytes], ports: list[int], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        probes = [socket.socket() for _ in ports]
        listening = [
            probe.connect_ex(("127.0.0.1", port)) == 0
            for probe, port in zip(probes, ports, strict=True)
        ]
        for probe in probes:
            probe.close()
        if all(listening):
            return
        time.sleep(0.05)
    raise AssertionError(f"nginx does not listen: {log.read_text()}")
