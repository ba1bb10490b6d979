"""Engine: a compiled network as plain data, and its file.

An engine is packed weights, object code and a plan. The file is one safetensors container (docs/engine_format.md):
the byte strings are tensors, so they are memory-mapped and bounds-checked; the plan is JSON in the header.
Nothing in it is executed or unpickled on reading: what is read is data until a `Session` maps the code, and that
happens only after every hash was compared and the target was found to run here.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from twofour.core.errors import EngineError, Error, InputError
from twofour.core.target import Target

FORMAT = 1
_MAX_PLAN_BYTES = 64 << 20
_MAX_ARENA_BYTES = 1 << 36

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
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Plan:
        """The inverse of `to_json`; unknown, missing or ill-typed fields are errors.

        Raises:
            EngineError: names the field.
        """
        try:
            values = dict(data)
            values["target"] = Target.from_json(values["target"])
            for name, kind in (("inputs", TensorInfo), ("outputs", TensorInfo), ("boundary", TensorInfo),
                               ("steps", Step), ("fills", Fill)):
                values[name] = tuple(_record(kind, item) for item in values[name])
            values["layers"] = tuple(
                _record(Layer, {**item, "candidates": tuple(_record(Candidate, c) for c in item["candidates"])})
                for item in values["layers"]
            )
            return _record(Plan, values)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise EngineError("the engine's plan is malformed", [f"{type(e).__name__}: {e}"],
                              "rebuild the engine from its model") from e


def _record(kind: type[Any], data: dict[str, Any]) -> Any:
    """A frozen dataclass from its JSON form; lists become tuples."""
    known = {f.name for f in fields(kind)}
    if unknown := set(data) - known:
        raise ValueError(f"{kind.__name__} has unknown fields {sorted(unknown)}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


@dataclass(frozen=True)
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
        tensors = {"weights": self.weights}
        tensors |= {f"code.{name}": data for name, data in self.code.items()}
        tensors |= {f"subgraph.{name}": data for name, data in self.subgraphs.items()}
        hashes = {name: _sha256(data) for name, data in tensors.items()}
        plan = json.dumps({"plan": self.plan.to_json(), "sha256": hashes}, separators=(",", ":"))
        meta = {"format": str(FORMAT), "twofour": plan, "sha256": hashlib.sha256(plan.encode()).hexdigest()}
        try:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        except OSError as e:
            raise InputError(f"cannot write {path}", [str(e)], "choose an existing, writable folder") from e
        try:
            os.close(handle)
            save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary, metadata=meta)
            umask = os.umask(0)
            os.umask(umask)
            Path(temporary).chmod(0o666 & ~umask)
            Path(temporary).replace(path)
        except OSError as e:
            raise InputError(f"cannot write {path}", [str(e)], "choose an existing, writable folder") from e
        finally:
            Path(temporary).unlink(missing_ok=True)
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
            raise InputError(f"no engine at {path}", ["expected a .engine file"],
                             "build one: twofour build MODEL.onnx -o E.engine")
        try:
            return _read(path)
        except (SafetensorError, OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, RecursionError) as e:
            raise EngineError(f"{path} is not a readable engine", [f"{type(e).__name__}: {e}"],
                              "the file is damaged or of another kind: copy it again, or rebuild it") from e


def _read(path: Path) -> Engine:
    """The file as data, every hash compared."""
    with safe_open(path, framework="numpy") as file:
        meta = file.metadata() or {}
        if meta.get("format") != str(FORMAT) or "twofour" not in meta:
            raise EngineError(f"{path} is not a twofour engine of format {FORMAT}",
                              [f"found format {meta.get('format', 'none')!r}"], "rebuild it with this version")
        text = meta["twofour"]
        if len(text) > _MAX_PLAN_BYTES:
            raise EngineError(f"{path}: the plan is too large", [f"{len(text)} bytes, limit {_MAX_PLAN_BYTES}"])
        if hashlib.sha256(text.encode()).hexdigest() != meta.get("sha256"):
            raise EngineError(f"{path}: the plan does not match its hash", [], "the file was altered: rebuild it")
        header = json.loads(text)
        plan = Plan.from_json(header["plan"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    _check_hashes(path, tensors, header["sha256"])
    engine = Engine(
        plan,
        tensors["weights"],
        {k.removeprefix("code."): v for k, v in tensors.items() if k.startswith("code.")},
        {k.removeprefix("subgraph."): v for k, v in tensors.items() if k.startswith("subgraph.")},
    )
    check(engine)
    return engine


def _check_hashes(path: Path, tensors: dict[str, Bytes], expected: dict[str, str]) -> None:
    """Every tensor is listed with its hash, and nothing else is there."""
    if set(tensors) != set(expected):
        raise EngineError(f"{path}: contents differ from the plan",
                          [f"expected {sorted(expected)}", f"found {sorted(tensors)}"])
    for name, data in tensors.items():
        if data.dtype != np.uint8 or data.ndim != 1 or _sha256(data) != expected[name]:
            raise EngineError(f"{path}: {name} does not match its hash", [], "the file was altered: rebuild it")


def check(engine: Engine) -> None:
    """Consistency of plan and contents, for hand-made or hostile files.

    Raises:
        EngineError: the first thing found wrong.
    """
    plan = engine.plan
    names = {t.name for t in (*plan.inputs, *plan.outputs, *plan.boundary)}
    problems: list[str] = []
    if not 0 <= plan.arena_bytes <= _MAX_ARENA_BYTES:
        problems.append(f"arena of {plan.arena_bytes} bytes")
    problems += [f"fill at {f.offset}+{f.size_bytes} outside the arena" for f in plan.fills
                 if f.offset < 0 or f.size_bytes < 0 or f.offset + f.size_bytes > plan.arena_bytes]
    problems += [f"object {name!r} is missing" for name in plan.code if name not in engine.code]
    for step in plan.steps:
        problems += [f"step {step.symbol!r} uses unknown tensor {t!r}"
                     for t in (*step.inputs, *step.outputs) if t not in names]
        problems += [f"step {step.symbol!r} names layer {i}" for i in step.layers if not 0 <= i < len(plan.layers)]
        if step.kind not in ("native", "onnxruntime"):
            problems.append(f"step {step.symbol!r} is of unknown kind {step.kind!r}")
        if step.kind == "onnxruntime" and step.symbol not in engine.subgraphs:
            problems.append(f"subgraph {step.symbol!r} is missing")
    for tensor in (*plan.inputs, *plan.outputs, *plan.boundary):
        if any(not isinstance(d, int) or d < 0 for d in tensor.shape):
            problems.append(f"tensor {tensor.name!r} has shape {tensor.shape}")
    if problems:
        raise EngineError("the engine contradicts itself", problems[:10], "rebuild it from its model")


def _sha256(data: Bytes) -> str:
    return hashlib.sha256(np.ascontiguousarray(data)).hexdigest()


__all__ = ["FORMAT", "Candidate", "Engine", "Error", "Fill", "Layer", "Plan", "Step", "TensorInfo", "check"]
