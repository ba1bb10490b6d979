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
from twofour.runtime.cuda.memory import gpu_here
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
    log, monitor = Log(library), Monitor(progress or silent)
    builder = library.module.Builder(log.logger)
    if builder is None:
        raise UnsupportedError(f"{library.title} does not start", log.problems())
    work = _Work(library, rules, order, log, builder, builder.create_builder_config())
    network = work.parse()
    work.configure(monitor)
    content = builder.build_serialized_network(network, work.config)
    if monitor.interrupted is not None:
        raise monitor.interrupted
    if content is None:
        raise UnsupportedError(
            f"{library.title} cannot build the model", log.problems() or ["it does not say why"]
        )
    text = next((line for _, line in reversed(log.lines) if line.startswith(HEAD)), "")
    return Built(
        bytes(content),
        _inspected(library, bytes(content)) or text,
        read_sparsity(line for _, line in log.lines),
        None if order.timing_cache is None else bytes(work.config.get_timing_cache().serialize()),
        tuple(work.notes),
    )


@dataclass(frozen=True, eq=False)
class _Work:
    """A build on its way.

    Attributes:
        library: the TensorRT.
        rules: of its version.
        order: what to build.
        log: what TensorRT says.
        builder: TensorRT's.
        config: of the builder.
        held: what TensorRT points to and does not keep: the parser, whose memory holds the
            weights, what it calls back, its cache.
        notes: what did not go as it was ordered.
    """

    library: Library
    rules: Rules
    order: Order
    log: Log
    builder: Any
    config: Any
    held: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def parse(self) -> Any:
        """The network of the model."""
        module, flags = self.library.module, 0
        known = module.NetworkDefinitionCreationFlag.__members__
        rules = self.rules
        wanted = {"EXPLICIT_BATCH": rules.batch_flag, "STRONGLY_TYPED": rules.strongly_typed}
        for name, is_set in wanted.items():
            if is_set and name in known:
                flags |= 1 << int(known[name])
        network = self.builder.create_network(flags)
        parser = module.OnnxParser(network, self.log.logger)
        self.held.append(parser)
        if not parser.parse(self.order.model):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            raise UnsupportedError(
                f"{self.library.title} cannot take the model",
                [_error_text(error) for error in errors[:_MOST_ERRORS]] or self.log.problems(),
                "leave the operator out of the model, or build for the CPU: --target cpu",
            )
        return network

    def configure(self, monitor: Monitor) -> None:
        """Tells the builder all of the order."""
        module, config, order = self.library.module, self.config, self.order
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        config.builder_optimization_level = order.level
        for name in order.flags:
            config.set_flag(module.BuilderFlag.__members__[name])
        if order.workspace_bytes is not None:
            config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, order.workspace_bytes)
        for shapes in order.profiles:
            profile = self.builder.create_optimization_profile()
            for name, corners in shapes.items():
                profile.set_shape(name, *corners)
            config.add_optimization_profile(profile)
        self._set_gpu()
        if hasattr(module, "IProgressMonitor"):
            config.progress_monitor = self._hold(monitor.made_by(self.library))
        if order.calibration is not None:
            config.int8_calibrator = self._hold(calibrator(self.library, order.calibration))
        if order.timing_cache is not None:
            self._set_cache(order.timing_cache)

    def _hold(self, made: Any) -> Any:
        self.held.append(made)
        return made

    def _set_cache(self, content: bytes) -> None:
        """The timing cache; a new one where TensorRT does not take the old."""
        cache = self._hold(self.config.create_timing_cache(content))
        if cache is None or not self.config.set_timing_cache(cache, False):
            self.notes.append("TensorRT refused the timing cache, which was begun anew")
            cache = self._hold(self.config.create_timing_cache(b""))
            self.config.set_timing_cache(cache, False)

    def _set_gpu(self) -> None:
        """Which GPU it builds for, where there is a choice."""
        module, config, gpu = self.library.module, self.config, self.order.gpu
        if not self.rules.chooses_gpu:
            if gpu == AMPERE_PLUS:
                config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS
            return
        if gpu == AMPERE_PLUS:
            return
        known, name = module.ComputeCapability.__members__, gpu.upper()
        if name in known:
            config.num_compute_capabilities = 1
        if name not in known or not config.set_compute_capability(known[name], 0):
            names = [each.lower() for each in known if each.startswith("SM")]
            raise UnsupportedError(
                f"{self.library.title} does not build for {gpu}",
                [f"expected one of {', '.join(names)}, or {AMPERE_PLUS}"],
            )


def _error_text(error: Any) -> str:
    """Where, and what; the oldest parsers do not tell the node's name."""
    where = ""
    if hasattr(error, "node_name"):
        where = f"{error.node_operator()} {error.node_name()!r}: "
    lines = [line.strip() for line in str(error.desc()).splitlines() if line.strip()]
    return where + "; ".join(lines[:_MOST_LINES])


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
    log = Log(library)
    runtime = library.module.Runtime(log.logger)
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
