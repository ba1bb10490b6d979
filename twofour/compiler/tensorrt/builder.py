"""TensorRT's builder: an ONNX model and an order to the bytes of a network, and what it said.

Nothing here decides; what is set follows from the order and the rules of the version.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twofour.compiler.tensorrt.layers import HEAD, Sparsity, read_sparsity
from twofour.compiler.tensorrt.rules import Rules
from twofour.core.errors import UnsupportedError
from twofour.core.progress import Report, silent
from twofour.core.tensorrt import AMPERE_PLUS
from twofour.runtime.cuda_memory import gpu_here
from twofour.runtime.tensorrt_library import Library, Log, implement

Shape = tuple[int, ...]
_PARTS = 1000
_MOST_ERRORS, _MOST_LINES = 6, 3


@dataclass(frozen=True)
class Order:
    """What is to be built.

    Attributes:
        model: an ONNX file's bytes.
        profiles: for each, the smallest, usual and largest shape of the inputs with open sizes;
            none where all shapes are fixed.
        flags: names of `BuilderFlag`.
        gpu: "sm89", or "ampere+".
        workspace_bytes: what a kernel may take; None for any amount.
        level: of optimization, 0 to 5.
        timing_cache: of an earlier build; b"" for a new one, None for none.
        calibration: a table of scales for implicit quantization; None for none.
    """

    model: bytes
    profiles: Sequence[Mapping[str, tuple[Shape, Shape, Shape]]]
    flags: tuple[str, ...]
    gpu: str
    workspace_bytes: int | None
    level: int
    timing_cache: bytes | None
    calibration: bytes | None


@dataclass(frozen=True)
class Built:
    """What came of it.

    Attributes:
        content: of the network, for the runtime.
        report: its layers, text or JSON; "" where TensorRT said nothing.
        sparsity: the builder's lists.
        timing_cache: to keep for the next build; None for none.
        notes: what did not go as it was ordered.
    """

    content: bytes
    report: str
    sparsity: Sparsity
    timing_cache: bytes | None
    notes: tuple[str, ...]


def build_network(library: Library, rules: Rules, order: Order, progress: Report | None) -> Built:
    """Parses and builds.

    Args:
        library: the TensorRT to build with.
        rules: of its version.
        order: what to build.
        progress: told how far it is.

    Raises:
        UnsupportedError: TensorRT cannot take the model, or cannot build for that GPU; says why.
        KeyboardInterrupt: of the user; TensorRT was stopped in good order.
    """
    module, log = library.module, Log(library)
    builder = module.Builder(log.logger)
    if builder is None:
        raise UnsupportedError(f"{library.title} does not start", log.problems())
    network = _parsed(library, rules, builder, order.model, log)
    config = builder.create_builder_config()
    monitor = Monitor(progress or silent)
    held, notes = _configure(library, rules, builder, config, network, order, monitor)
    content = builder.build_serialized_network(network, config)
    if monitor.interrupted is not None:
        raise monitor.interrupted
    if content is None:
        raise UnsupportedError(
            f"{library.title} cannot build the model", log.problems() or ["it does not say why"]
        )
    cache = config.get_timing_cache() if held["cache"] is not None else None
    text = next((line for _, line in reversed(log.lines) if line.startswith(HEAD)), "")
    return Built(
        bytes(content),
        _inspected(library, bytes(content)) or text,
        read_sparsity(line for _, line in log.lines),
        bytes(cache.serialize()) if cache is not None else None,
        notes,
    )


def _parsed(library: Library, rules: Rules, builder: Any, model: bytes, log: Log) -> Any:
    """The network of an ONNX file."""
    module, flags = library.module, 0
    known = module.NetworkDefinitionCreationFlag.__members__
    wanted = {"EXPLICIT_BATCH": rules.batch_flag, "STRONGLY_TYPED": rules.strongly_typed}
    for name, is_set in wanted.items():
        if is_set and name in known:
            flags |= 1 << int(known[name])
    network = builder.create_network(flags)
    parser = module.OnnxParser(network, log.logger)
    if not parser.parse(model):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise UnsupportedError(
            f"{library.title} cannot take the model",
            [_error_text(error) for error in errors[:_MOST_ERRORS]] or log.problems(),
            "leave the operator out of the model, or build for the CPU: --target cpu",
        )
    return network


def _error_text(error: Any) -> str:
    """Where, and what; the oldest parsers do not tell the node's name."""
    where = ""
    if hasattr(error, "node_name"):
        where = f"{error.node_operator()} {error.node_name()!r}: "
    lines = [line.strip() for line in str(error.desc()).splitlines() if line.strip()]
    return where + "; ".join(lines[:_MOST_LINES])


def _configure(
    library: Library,
    rules: Rules,
    builder: Any,
    config: Any,
    network: Any,
    order: Order,
    monitor: Monitor,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Sets everything; gives what must live until the build is over, and notes."""
    module = library.module
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = order.level
    for name in order.flags:
        config.set_flag(module.BuilderFlag.__members__[name])
    if order.workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, order.workspace_bytes)
    for shapes in order.profiles:
        profile = builder.create_optimization_profile()
        for name, corners in shapes.items():
            profile.set_shape(name, *corners)
        config.add_optimization_profile(profile)
    _set_gpu(library, rules, config, order.gpu)
    held: dict[str, Any] = {"monitor": None, "calibrator": None, "cache": None}
    if hasattr(module, "IProgressMonitor"):
        held["monitor"] = config.progress_monitor = monitor.made_by(library)
    if order.calibration is not None:
        held["calibrator"] = config.int8_calibrator = calibrator(library, order.calibration)
    notes: tuple[str, ...] = ()
    if order.timing_cache is not None:
        held["cache"], notes = _cache(config, order.timing_cache)
    return held, notes


def _cache(config: Any, content: bytes) -> tuple[Any, tuple[str, ...]]:
    """The timing cache; a new one where TensorRT does not take the old."""
    cache = config.create_timing_cache(content)
    if cache is not None and config.set_timing_cache(cache, False):
        return cache, ()
    cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    return cache, ("TensorRT refused the timing cache, which was begun anew",)


def _set_gpu(library: Library, rules: Rules, config: Any, gpu: str) -> None:
    """Tells the builder which GPU it builds for, where it has a choice."""
    module = library.module
    if gpu == AMPERE_PLUS:
        if not rules.chooses_gpu:
            config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS
        return
    if not rules.chooses_gpu:
        return
    known = module.ComputeCapability.__members__
    name = gpu.upper()
    if name in known:
        config.num_compute_capabilities = 1
    if name not in known or not config.set_compute_capability(known[name], 0):
        names = [each.lower() for each in known if each.startswith("SM")]
        raise UnsupportedError(
            f"{library.title} does not build for {gpu}",
            [f"expected one of {', '.join(names)}, or {AMPERE_PLUS}"],
        )


def calibrator(library: Library, table: bytes) -> Any:
    """A calibrator that has its table already, so that TensorRT asks for no data.

    Args:
        library: with `IInt8EntropyCalibrator2`.
        table: as `onnx_tools.tensorrt_table` writes it, with the number of this version.
    """
    return implement(
        library.module.IInt8EntropyCalibrator2,
        get_batch_size=lambda: 1,
        get_batch=lambda *_: None,
        read_calibration_cache=lambda: table,
        write_calibration_cache=lambda _: None,
    )


def _inspected(library: Library, content: bytes) -> str:
    """What an engine that is loaded says of its layers; "" where there is no GPU to load it on.

    Loaded, it also names kernels that are chosen only then.
    """
    if gpu_here() is None:
        return ""
    runtime = library.module.Runtime(Log(library).logger)
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        return ""  # it was built for another GPU
    inspector = engine.create_engine_inspector()
    inspector.execution_context = engine.create_execution_context()
    return str(inspector.get_engine_information(library.module.LayerInformationFormat.JSON))


@dataclass(eq=False)
class _Phase:
    """A phase of the builder, its parent's place in it, and how far it is."""

    name: str
    parent: str
    steps: int
    done: int = 0


@dataclass(eq=False)
class Monitor:
    """Tells our progress what TensorRT's phases say, from whichever thread they do.

    Attributes:
        report: told thousandths of the whole.
        interrupted: what the user wants instead of going on; the build stops at its next step.
    """

    report: Report
    interrupted: KeyboardInterrupt | None = None
    _phases: dict[str, _Phase] = field(default_factory=dict)
    _most: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def made_by(self, library: Library) -> Any:
        """As TensorRT wants it."""
        return implement(
            library.module.IProgressMonitor,
            phase_start=self.start,
            step_complete=self.step,
            phase_finish=self.finish,
        )

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            self._phases[name] = _Phase(name, parent or "", max(1, steps))

    def step(self, name: str, step: int) -> bool:
        """A step of a phase is done; whether to go on."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
            self._tell(name)
        return self.interrupted is None

    def finish(self, name: str) -> None:
        """A phase is over."""
        with self._lock:
            phase = self._phases.pop(name, None)
            if phase is not None and not phase.parent:
                self._most = _PARTS - 1
                self._tell(name)

    def _tell(self, name: str) -> None:
        """Never less than before."""
        self._most = max(self._most, int(self._whole(name) * (_PARTS - 1)))
        try:
            self.report(self._most, _PARTS, name)
        except KeyboardInterrupt as error:  # raised through TensorRT it would end the process
            self.interrupted = error

    def _whole(self, name: str) -> float:
        """The share of everything that is done, seen from a phase upwards."""
        share, phase = 0.0, self._phases.get(name)
        for _ in self._phases:
            if phase is None:
                break
            share = min(1.0, (phase.done + share) / phase.steps)
            phase = self._phases.get(phase.parent)
        return share


def without_deprecations() -> warnings.catch_warnings[None]:
    """A block in which TensorRT's own notes on its next version are not shown."""
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)
