"""Engine: a compiled network as plain data, and its file.

An engine is packed weights, object code and a plan. The file is one safetensors container
(docs/engine_format.md): the byte strings are tensors, so they are bounds-checked; the plan is JSON
in the header. Nothing in it is executed or unpickled on reading: what is read is
data until a `Session` maps the code, and that happens only after every hash was compared and the
target was found to run here. The hashes tell damage, not malice: a stranger's file is a stranger's
program.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from twofour.core import cuda_check, plan_check
from twofour.core.abi import SLACK_BYTES
from twofour.core.errors import EngineError, InputError
from twofour.core.memory import allocate
from twofour.core.plan import (
    REBUILD,
    Candidate,
    Fill,
    Layer,
    Plan,
    Profile,
    Read,
    Step,
    Strided,
    TensorInfo,
    Work,
    Write,
)
from twofour.core.plan_check import DTYPES

__all__ = [
    "DTYPES",
    "Candidate",
    "Engine",
    "Fill",
    "Layer",
    "Plan",
    "Profile",
    "Read",
    "Step",
    "Strided",
    "TensorInfo",
    "Work",
    "Write",
    "check",
    "read_plan",
]

FORMAT = 6
_MAX_PLAN_BYTES = 64 << 20

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Engine:
    """A compiled network: plan, packed weights, object code, fallback subgraphs.

    Attributes:
        plan: the plan.
        weights: uint8 [bytes], every packed weight and constant.
        code: object name -> object file, uint8.
        subgraphs: key -> uint8: a serialised ONNX model for a fallback step, the constants of a
            step in Python, the program of a step on a GPU.
    """

    plan: Plan
    weights: Bytes
    code: dict[str, Bytes]
    subgraphs: dict[str, Bytes]

    @property
    def size_bytes(self) -> int:
        """Bytes of weights, code and subgraphs."""
        parts = [self.weights, *self.code.values(), *self.subgraphs.values()]
        return sum(part.nbytes for part in parts)

    def save(self, path: str | Path) -> Path:
        """Writes the file under a temporary name, then renames it.

        Raises:
            InputError: the folder does not exist or cannot be written.
        """
        path = Path(path)
        if path.is_dir():
            expected = "expected the name of a file, got a folder"
            raise InputError(f"cannot write {path}", [expected], "name a file, such as E.engine")
        tensors = {"weights": self.weights}
        tensors |= {f"code.{name}": data for name, data in self.code.items()}
        tensors |= {f"subgraph.{name}": data for name, data in self.subgraphs.items()}
        hashes = {name: _sha256(data) for name, data in tensors.items()}
        text = json.dumps(
            {"plan": self.plan.to_json(), "sha256": hashes}, separators=(",", ":"), allow_nan=False
        )
        meta = {
            "format": str(FORMAT),
            "twofour": text,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode  # as the umask has it; safetensors would write 0600
            save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary, meta)
            _sort_header(temporary)
            temporary.chmod(mode)
            temporary.replace(path)
        except (OSError, SafetensorError) as e:
            raise InputError(
                f"cannot write {path}", [str(e)], "choose an existing, writable folder"
            ) from e
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @staticmethod
    def load(path: str | Path) -> Engine:
        """Reads and checks an engine file; runs nothing from it.

        Raises:
            InputError: there is no such file.
            EngineError: truncated, altered, or not an engine of this format.
        """
        path = Path(path)
        with _reading(path):
            return _read(path)


def read_plan(path: str | Path) -> Plan:
    """The plan of an engine file alone: what it is for, without its weights and code.

    Raises:
        InputError: there is no such file.
        EngineError: no engine of this format, or its plan was altered or contradicts itself.
    """
    path = Path(path)
    with _reading(path), safe_open(path, framework="numpy") as file:
        plan, _ = _read_plan(path, file.metadata() or {})
    _refuse(plan_check.wrong(plan))
    return plan


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of a file that is not there, or is no engine.

    Raises:
        InputError, EngineError: see `Engine.load`.
    """
    if not path.is_file():
        raise InputError(
            f"no engine at {path}",
            ["expected a .engine file"],
            "build one: twofour build MODEL.onnx -o E.engine",
        )
    try:
        yield
    except (SafetensorError, OSError, ValueError, RecursionError) as e:
        raise EngineError(
            f"{path} is not a readable engine",
            [f"{type(e).__name__}: {e}"],
            "the file is damaged or of another kind: copy it again, or rebuild it",
        ) from e


def _read(path: Path) -> Engine:
    """The file as data, every hash compared."""
    with safe_open(path, framework="numpy") as file:  # refuses a container that lies about sizes
        plan, hashes = _read_plan(path, file.metadata() or {})
        names = list(file.keys())
    if set(names) != set(hashes) or "weights" not in hashes:
        raise EngineError(
            f"{path}: contents differ from the plan",
            [f"expected {sorted(hashes)}", f"found {sorted(names)}"],
            REBUILD,
        )
    tensors = _read_tensors(path)
    for name, data in tensors.items():
        if _sha256(data) != hashes[name]:
            raise EngineError(
                f"{path}: {name} does not match its hash", ["the file was altered"], REBUILD
            )
    engine = Engine(plan, tensors["weights"], _part(tensors, "code."), _part(tensors, "subgraph."))
    check(engine)
    return engine


def _read_tensors(path: Path) -> dict[str, Bytes]:
    """Every tensor of a container whose header is known to be sound.

    They are read to where they will be used, so that no copy of the weights is ever made; sessions
    share them.
    """
    tensors = {}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "U8" or len(entry["shape"]) != 1:
                found = f"expected uint8 [bytes], found {entry['dtype']} {entry['shape']}"
                raise EngineError(f"{path}: {name} is no byte string", [found], REBUILD)
            count = int(entry["shape"][0])
            data = allocate(count + SLACK_BYTES, huge=True)[:count]
            file.seek(8 + size + int(entry["data_offsets"][0]))
            if file.readinto(data.data) != count:
                raise EngineError(f"{path} ends within {name}", ["the file was cut"], REBUILD)
            data.flags.writeable = False
            tensors[name] = data
    return tensors


def _read_plan(path: Path, meta: dict[str, str]) -> tuple[Plan, dict[str, str]]:
    """The plan, and the hash of each tensor, from the container's metadata."""
    if meta.get("format") != str(FORMAT) or "twofour" not in meta:
        found = f"found format {meta.get('format', 'none')!r}"
        raise EngineError(f"{path} is not a twofour engine of format {FORMAT}", [found], REBUILD)
    text = meta["twofour"]
    if len(text) > _MAX_PLAN_BYTES:
        sizes = f"{len(text)} bytes, limit {_MAX_PLAN_BYTES}"
        raise EngineError(f"{path}: the plan is too large", [sizes], REBUILD)
    if hashlib.sha256(text.encode()).hexdigest() != meta.get("sha256"):
        altered = "the file was altered"
        raise EngineError(f"{path}: the plan does not match its hash", [altered], REBUILD)
    header = json.loads(text)
    if not isinstance(header, dict) or set(header) != {"plan", "sha256"}:
        expected = "expected an object with plan and sha256"
        raise EngineError("the engine's plan is malformed", [expected], REBUILD)
    hashes = header["sha256"]
    if not isinstance(hashes, dict):
        raise EngineError("the engine's plan is malformed", ["sha256 is not an object"], REBUILD)
    return Plan.from_json(header["plan"]), hashes


def _part(tensors: dict[str, Bytes], prefix: str) -> dict[str, Bytes]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def check(engine: Engine) -> None:
    """Consistency of plan and contents, for hand-made or hostile files.

    Raises:
        EngineError: what was found wrong, the first ten of it.
    """
    problems = [*plan_check.wrong(engine.plan), *_missing(engine)]
    if not problems:  # programs mean nothing without
        weights = engine.weights.nbytes
        problems += islice(cuda_check.wrong_programs(engine.plan, weights, engine.subgraphs), 10)
    _refuse(problems)


def _refuse(problems: Iterable[str]) -> None:
    """Raises an EngineError with the first ten, if there are any."""
    if found := [*islice(problems, 10)]:
        raise EngineError("the engine contradicts itself", found, REBUILD)


def _missing(engine: Engine) -> Iterator[str]:
    """Objects and subgraphs that the plan names and the engine lacks."""
    plan = engine.plan
    yield from (f"object {name!r} is missing" for name in plan.code if name not in engine.code)
    for step in plan.steps:
        if step.kind == "onnxruntime" and step.symbol not in engine.subgraphs:
            yield f"subgraph {step.symbol!r} is missing"
    for call in plan.plugins:
        end = max((end for _, end in call.places(plan_check.ITEM_BYTES)), default=0)
        held = engine.subgraphs.get(call.step)
        if end > (0 if held is None else held.nbytes):
            yield f"constants of {call.step!r} are missing"


def _sha256(data: Bytes) -> str:
    return hashlib.sha256(np.ascontiguousarray(data).data).hexdigest()


def _sort_header(path: Path) -> None:
    """Puts the metadata in order, so that equal engines are equal files.

    The library that writes the container keeps it in an order that changes from run to run.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise EngineError("the header of the engine does not fit its place", [], REBUILD)
        file.seek(8)
        file.write(text.ljust(size))
