"""Engine: a compiled network as plain data, and its file.

An engine is packed weights, object code and a plan. The file is one safetensors container
(docs/engine_format.md): the byte strings are tensors, so they are memory-mapped and bounds-checked;
the plan is JSON in the header. Nothing in it is executed or unpickled on reading: what is read is
data until a `Session` maps the code, and that happens only after every hash was compared and the
target was found to run here. The hashes tell damage, not malice: a stranger's file is a stranger's
program.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from twofour.core.abi import MAX_THREADS
from twofour.core.errors import EngineError, InputError
from twofour.core.records import from_plain, to_plain
from twofour.core.target import ISAS, Target

FORMAT = 1
_MAX_PLAN_BYTES = 64 << 20
_MAX_MEMORY_BYTES = 1 << 36
_MAX_ELEMENTS = 1 << 33
_MAX_RANK = 32
_STEP_KINDS = ("native", "onnxruntime")
_REBUILD = "rebuild it from its model: twofour build MODEL.onnx -o E.engine"
DTYPES = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()
)

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class TensorInfo:
    """Name, numpy dtype name and static shape of an input, output or boundary tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer that was considered at build.

    Attributes:
        tactic: its name, for example "conv_sparse".
        config: its tile and format, in words.
        time_us: measured median of one run in microseconds; None where it was refused.
        reason: why it was refused; "" where it was timed.
    """

    tactic: str
    config: str
    time_us: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Layer:
    """One fused operator of the engine, as `explain` shows it.

    Attributes:
        name: the source model's name of its main node.
        op: fused operator, for example "QConvAddRelu".
        tactic: the chosen one; "onnxruntime" for a fallback.
        config: of the chosen tactic.
        time_us: measured at build; None where it was not timed (fallback).
        shape: in words, for example "64x56x56 -> 64x56x56 k3".
        precision: "int8" or "float32".
        pattern: of the weight, "2:4", "2:4/pair", "4:8", "dense", or "" without a weight.
        macs: multiply-adds per run, counted as if dense.
        weight_bytes: as packed.
        candidates: all that were considered, the chosen one included.
        notes: the reasons in words: why not sparse, why not integer, why a fallback.
    """

    name: str
    op: str
    tactic: str
    config: str = ""
    time_us: float | None = None
    shape: str = ""
    precision: str = ""
    pattern: str = ""
    macs: int = 0
    weight_bytes: int = 0
    candidates: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One call at run time.

    Attributes:
        kind: "native" (a generated program) or "onnxruntime" (a subgraph).
        symbol: the program's function in the object code, or the subgraph's key.
        inputs: names of the plain tensors it reads.
        outputs: names of the plain tensors it writes.
        layers: indices into `Plan.layers` of what it runs.
    """

    kind: str
    symbol: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Fill:
    """A region of the arena set once to one byte: the halo that convolutions read as padding."""

    offset: int
    size_bytes: int
    value: int


@dataclass(frozen=True)
class Plan:
    """Everything about an engine but its bytes.

    Attributes:
        target: what it was built for.
        version: of the package that built it.
        source_sha256: of the model file (or its serialised form).
        inputs: of the model.
        outputs: of the model.
        boundary: plain tensors between steps.
        steps: in order.
        layers: for people.
        arena_bytes: activation memory of one session.
        fills: halo regions of the arena.
        threads: the thread count the tactics were timed with.
        code: names of the objects, in loading order.
        source_name: file name of the model, for people.
        graph: counts before and after the passes, for people.
    """

    target: Target
    version: str
    source_sha256: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    boundary: tuple[TensorInfo, ...]
    steps: tuple[Step, ...]
    layers: tuple[Layer, ...]
    arena_bytes: int
    fills: tuple[Fill, ...]
    threads: int
    code: tuple[str, ...]
    source_name: str = ""
    graph: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data: dicts, lists, strings, numbers."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @staticmethod
    def from_json(data: Any) -> Plan:
        """The inverse of `to_json`; unknown, missing or ill-typed fields are errors.

        Raises:
            EngineError: names the field.
        """
        try:
            return from_plain(Plan, data, "plan")
        except ValueError as e:
            raise EngineError("the engine's plan is malformed", [str(e)], _REBUILD) from e


@dataclass(frozen=True, eq=False)
class Engine:
    """A compiled network: plan, packed weights, object code, fallback subgraphs.

    Attributes:
        plan: the plan.
        weights: uint8 [bytes], every packed weight and constant.
        code: object name -> object file, uint8.
        subgraphs: key -> serialised ONNX model, uint8, for the fallback steps.
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
        if not path.is_file():
            raise InputError(
                f"no engine at {path}",
                ["expected a .engine file"],
                "build one: twofour build MODEL.onnx -o E.engine",
            )
        try:
            return _read(path)
        except (SafetensorError, OSError, ValueError, RecursionError) as e:
            raise EngineError(
                f"{path} is not a readable engine",
                [f"{type(e).__name__}: {e}"],
                "the file is damaged or of another kind: copy it again, or rebuild it",
            ) from e


def _read(path: Path) -> Engine:
    """The file as data, every hash compared."""
    with safe_open(path, framework="numpy") as file:
        plan, hashes = _read_plan(path, file.metadata() or {})
        names = list(file.keys())
        if set(names) != set(hashes) or "weights" not in hashes:
            raise EngineError(
                f"{path}: contents differ from the plan",
                [f"expected {sorted(hashes)}", f"found {sorted(names)}"],
                _REBUILD,
            )
        tensors = {name: file.get_tensor(name) for name in names}
    for name, data in tensors.items():
        if data.dtype != np.uint8 or data.ndim != 1 or _sha256(data) != hashes[name]:
            raise EngineError(
                f"{path}: {name} does not match its hash", ["the file was altered"], _REBUILD
            )
    engine = Engine(plan, tensors["weights"], _part(tensors, "code."), _part(tensors, "subgraph."))
    check(engine)
    return engine


def _read_plan(path: Path, meta: dict[str, str]) -> tuple[Plan, dict[str, str]]:
    """The plan, and the hash of each tensor, from the container's metadata."""
    if meta.get("format") != str(FORMAT) or "twofour" not in meta:
        found = f"found format {meta.get('format', 'none')!r}"
        raise EngineError(f"{path} is not a twofour engine of format {FORMAT}", [found], _REBUILD)
    text = meta["twofour"]
    if len(text) > _MAX_PLAN_BYTES:
        sizes = f"{len(text)} bytes, limit {_MAX_PLAN_BYTES}"
        raise EngineError(f"{path}: the plan is too large", [sizes], _REBUILD)
    if hashlib.sha256(text.encode()).hexdigest() != meta.get("sha256"):
        altered = "the file was altered"
        raise EngineError(f"{path}: the plan does not match its hash", [altered], _REBUILD)
    header = json.loads(text)
    if not isinstance(header, dict) or set(header) != {"plan", "sha256"}:
        expected = "expected an object with plan and sha256"
        raise EngineError("the engine's plan is malformed", [expected], _REBUILD)
    hashes = header["sha256"]
    if not isinstance(hashes, dict):
        raise EngineError("the engine's plan is malformed", ["sha256 is not an object"], _REBUILD)
    return Plan.from_json(header["plan"]), hashes


def _part(tensors: dict[str, Bytes], prefix: str) -> dict[str, Bytes]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def check(engine: Engine) -> None:
    """Consistency of plan and contents, for hand-made or hostile files.

    Raises:
        EngineError: what was found wrong, the first ten of it.
    """
    plan = engine.plan
    problems = [*_wrong_plan(plan), *_wrong_memory(plan), *_wrong_steps(engine)]
    if problems:
        raise EngineError("the engine contradicts itself", problems[:10], _REBUILD)


def _wrong_plan(plan: Plan) -> Iterator[str]:
    if plan.target.isa not in ISAS:
        yield f"unknown instruction set {plan.target.isa!r}, expected one of {', '.join(ISAS)}"
    if not 1 <= plan.threads <= MAX_THREADS:
        yield f"{plan.threads} threads, expected 1 to {MAX_THREADS}"
    for tensor in _plain_tensors(plan):
        if tensor.dtype not in DTYPES:
            yield f"tensor {tensor.name!r} has unknown dtype {tensor.dtype!r}"
        shape = tensor.shape
        if len(shape) > _MAX_RANK or min(shape, default=0) < 0 or math.prod(shape) > _MAX_ELEMENTS:
            yield f"tensor {tensor.name!r} has shape {shape}"


def _wrong_memory(plan: Plan) -> Iterator[str]:
    if not 0 <= plan.arena_bytes <= _MAX_MEMORY_BYTES:
        yield f"arena of {plan.arena_bytes} bytes"
    for fill in plan.fills:
        if (
            min(fill.offset, fill.size_bytes) < 0
            or fill.offset + fill.size_bytes > plan.arena_bytes
        ):
            yield f"fill at {fill.offset}+{fill.size_bytes} outside the arena"
        if not 0 <= fill.value <= 255:
            yield f"fill at {fill.offset} with {fill.value}, not a byte"


def _wrong_steps(engine: Engine) -> Iterator[str]:
    plan = engine.plan
    names = {tensor.name for tensor in _plain_tensors(plan)}
    yield from (f"object {name!r} is missing" for name in plan.code if name not in engine.code)
    for step in plan.steps:
        for tensor in (*step.inputs, *step.outputs):
            if tensor not in names:
                yield f"step {step.symbol!r} uses unknown tensor {tensor!r}"
        for layer in step.layers:
            if not 0 <= layer < len(plan.layers):
                yield f"step {step.symbol!r} names layer {layer} of {len(plan.layers)}"
        if step.kind not in _STEP_KINDS:
            yield f"step {step.symbol!r} is of unknown kind {step.kind!r}"
        if step.kind == "onnxruntime" and step.symbol not in engine.subgraphs:
            yield f"subgraph {step.symbol!r} is missing"


def _plain_tensors(plan: Plan) -> tuple[TensorInfo, ...]:
    return (*plan.inputs, *plan.outputs, *plan.boundary)


def _sha256(data: Bytes) -> str:
    return hashlib.sha256(np.ascontiguousarray(data).data).hexdigest()
