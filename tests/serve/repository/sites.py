"""Places where a repository may lie, each written to in its own way, and engines to put there."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import fsspec

from tests.sample_engines import sample_engine
from twofour.core.target import Target, host_target
from twofour.engine import Engine

KINDS = ("local", "memory", "s3")


@dataclass(frozen=True)
class Site:
    """A repository that a test writes to.

    Attributes:
        location: as `Store` takes it.
        options: likewise.
        system: to write with.
        root: in it.
    """

    location: str
    system: Any
    root: str
    options: dict[str, Any] = field(default_factory=dict)

    def put(self, place: str, content: bytes) -> None:
        path = f"{self.root}/{place}"
        self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.system.pipe_file(path, content)

    def remove(self, place: str) -> None:
        self.system.rm(f"{self.root}/{place}", recursive=True)


def site(kind: str, folder: Path, endpoint: Callable[[], str]) -> Site:
    """An empty repository of one of `KINDS`; the endpoint is that of an S3 server."""
    name = f"repository-{uuid.uuid4().hex[:8]}"
    if kind == "local":
        (folder / name).mkdir()
        return Site(str(folder / name), fsspec.filesystem("file"), str(folder / name))
    if kind == "memory":
        return Site(f"memory://{name}/models", fsspec.filesystem("memory"), f"/{name}/models")
    options = {"key": "testing", "secret": "testing", "endpoint_url": endpoint()}
    system = fsspec.filesystem("s3", skip_instance_cache=True, **options)
    system.call_s3("create_bucket", Bucket=name)
    return Site(f"s3://{name}/models", system, f"{name}/models", options)


@cache
def engine_bytes(target: Target | None = None) -> bytes:
    """A sound engine file whose code is never run; by default for this machine."""
    return saved(sample_engine(target or host_target()))


def saved(engine: Engine) -> bytes:
    """As a file has it."""
    path = Path(tempfile.mkdtemp()) / "x.engine"
    engine.save(path)
    content = path.read_bytes()
    path.unlink()
    path.parent.rmdir()
    return content


def foreign_target() -> Target:
    """Of a machine that is not this one."""
    return replace(host_target(), isa="vector", arch="riscv64")
