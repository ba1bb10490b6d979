"""A made-up TensorRT: it computes next to nothing, and keeps what it is told.

They stand in for what cannot be had where the tests run: a GPU, and the versions of TensorRT that
need one to build. Names, arguments and results are those of NVIDIA's documentation.
"""

from __future__ import annotations

import enum
import sys
import weakref
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.fake_cuda import FakeDriver, plant_driver
from twofour.compiler.tensorrt import build, builder
from twofour.core import tensorrt as presence
from twofour.core.tensorrt import Installed
from twofour.runtime import tensorrt_library

NAME = "fake_tensorrt_module"
GPU = ("A GPU", (8, 9))
FLAGS = {
    8: ("INT8", "FP16", "SPARSE_WEIGHTS"),
    9: ("INT8", "FP16", "BF16", "SPARSE_WEIGHTS"),
    10: ("INT8", "FP16", "BF16", "SPARSE_WEIGHTS"),
    11: ("SPARSE_WEIGHTS",),
}
NETWORKS = {8: ("EXPLICIT_BATCH",), 9: ("EXPLICIT_BATCH", "STRONGLY_TYPED")}


class _Logger:
    def log(self, severity: Any, text: str) -> None:
        raise NotImplementedError


class _Monitor:
    pass


class _Calibrator:
    pass


def fake_tensorrt(version: str, cuda: FakeDriver | None = None) -> Any:
    """The module, with what its version has; `told` holds what it was told."""
    major = int(version.partition(".")[0])
    module: Any = ModuleType(NAME)
    module.__version__, module.cuda = version, cuda
    module.told = {"flags": [], "profiles": [], "network": None}
    module.report, module.lines, module.refuses_cache = "", [], False
    module.ILogger, module.IProgressMonitor = _Logger, _Monitor
    if major < 11:
        module.IInt8EntropyCalibrator2 = _Calibrator
    module.BuilderFlag = enum.IntEnum("BuilderFlag", FLAGS[major], start=0)
    networks = NETWORKS.get(major, ("STRONGLY_TYPED",))
    module.NetworkDefinitionCreationFlag = enum.IntEnum("Creation", networks, start=0)
    module.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ("DETAILED",))
    module.MemoryPoolType = enum.Enum("MemoryPoolType", ("WORKSPACE",))
    module.LayerInformationFormat = enum.Enum("LayerInformationFormat", ("JSON", "ONELINE"))
    module.HardwareCompatibilityLevel = enum.Enum("Level", ("NONE", "AMPERE_PLUS"))
    module.TensorLocation = enum.Enum("TensorLocation", ("DEVICE", "HOST"))
    module.nptype = lambda kind: kind
    module.Builder = lambda logger: FakeBuilder(module, logger)
    module.OnnxParser = FakeParser
    module.Runtime = lambda logger: SimpleNamespace(
        deserialize_cuda_engine=lambda content: FakeEngine(module, bytes(content))
    )
    return module


class FakeParser:
    """Takes everything."""

    def __init__(self, network: Any, logger: Any) -> None:
        self.network = network
        network.parser = weakref.ref(self)

    def parse(self, content: bytes) -> bool:
        self.network.module.told["model"] = content
        return True


class FakeBuilder:
    """Keeps its orders, and builds six bytes."""

    def __init__(self, module: Any, logger: Any) -> None:
        self.module, self.logger = module, logger

    def create_network(self, flags: int) -> Any:
        known = self.module.NetworkDefinitionCreationFlag
        self.module.told["network"] = {each.name for each in known if flags >> int(each) & 1}
        return SimpleNamespace(module=self.module)

    def create_builder_config(self) -> Any:
        return FakeConfig(self.module)

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(
            shapes=shapes, set_shape=lambda name, *corners: shapes.__setitem__(name, corners)
        )

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        assert network.parser() is not None, "the weights lie in the parser's memory"
        told = self.module.told
        told |= {"level": config.builder_optimization_level}
        told["compatible"] = getattr(config, "hardware_compatibility_level", None)
        if hasattr(config, "int8_calibrator"):
            made = config.int8_calibrator
            told["batch"] = made.get_batch(["x"])
            told["table"] = made.read_calibration_cache()
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Timing", "Building", 4)
        going = all(monitor.step_complete("Timing", step) for step in range(4))
        monitor.phase_finish("Timing")
        monitor.phase_finish("Building")
        for line in self.module.lines:
            self.logger.log(SimpleNamespace(__str__=lambda: "INFO"), line)
        return b"engine" if going else None


class FakeConfig:
    """What was set."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.cache: Any = None

    def set_flag(self, flag: Any) -> None:
        self.module.told["flags"].append(flag.name)

    def set_memory_pool_limit(self, pool: Any, size_bytes: int) -> None:
        self.module.told["workspace"] = (pool.name, size_bytes)

    def add_optimization_profile(self, profile: Any) -> None:
        self.module.told["profiles"].append(profile.shapes)

    def create_timing_cache(self, content: bytes) -> Any:
        return SimpleNamespace(content=content, serialize=lambda: content + b"!")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if self.module.refuses_cache and cache.content:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.cache


class FakeEngine:
    """x -> 2 x, and int64 as int32, for whatever shape; a count stays on the host."""

    def __init__(self, module: Any, content: bytes) -> None:
        self.module, self.content = module, content

    def create_execution_context(self) -> Any:
        return None if self.content == b"broken" else FakeContext(self.module)

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda kind: self.module.report)

    def get_tensor_dtype(self, name: str) -> Any:
        return {"ids": np.int32, "count": np.int32}.get(name, np.float32)

    def get_tensor_location(self, name: str) -> Any:
        places = self.module.TensorLocation
        return places.HOST if name == "count" else places.DEVICE


class FakeContext:
    """Runs on the memory that it was shown."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.places: dict[str, int] = {}
        self.profiles: list[int] = []

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.module.told.setdefault("entered", []).append(index)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return shape[0] <= 8

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1,) if self.module.told.get("open") else self.shapes["x"]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.places[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.module.told.get("fails"):
            return False
        cuda, size = self.module.cuda, int(np.prod(self.shapes["x"]))
        x, y = self.places["x"], self.places["y"]
        assert cuda.stack, "no GPU is current"
        cuda.streams[stream].append(lambda: np.multiply(2, cuda.view(x, size), cuda.view(y, size)))
        return True


def plant(patch: pytest.MonkeyPatch, version: str, gpu: Any = GPU) -> tuple[Any, FakeDriver]:
    """Makes this TensorRT the one that is installed, beside this GPU; gives it and its driver."""
    cuda = plant_driver(patch, (gpu,) if gpu else ())
    module = fake_tensorrt(version, cuda)
    has = (Installed("tensorrt", NAME, version),)
    patch.setitem(sys.modules, NAME, module)
    for place in (presence, tensorrt_library):
        patch.setattr(place, "installed", lambda: has)
    patch.setattr(presence, "read_capabilities", lambda: (gpu[1],) if gpu else ())
    for place in (build, builder):
        patch.setattr(place, "gpu_here", lambda: gpu)
    return module, cuda
