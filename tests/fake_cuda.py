"""A made-up driver of made-up GPUs: what is put into a stream happens when that is waited for.

It has the functions of cuda.bindings.driver that are called, with NVIDIA's names, arguments and
results. A GPU's memory is this process's. An object of machine code is the name of a function of
numpy below. Calls without a current context, outside memory that was taken, on streams or graphs
that are gone, are errors of the test.
"""

from __future__ import annotations

import ctypes
import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from twofour.core import cuda as presence
from twofour.runtime.cuda import driver as driver_module

MODULE = "cuda.bindings.driver"
TOTAL_BYTES = 1 << 20
UUIDS = (bytes(range(16)), bytes(range(16, 32)))
ERRORS = {
    1: (b"CUDA_ERROR_INVALID_VALUE", b"invalid argument"),
    2: (b"CUDA_ERROR_OUT_OF_MEMORY", b"out of memory"),
    200: (b"CUDA_ERROR_INVALID_IMAGE", b"device kernel image is invalid"),
    500: (b"CUDA_ERROR_NOT_FOUND", b"named symbol not found"),
    700: (b"CUDA_ERROR_ILLEGAL_ADDRESS", b"an illegal memory access was encountered"),
}


def _double(view: Callable[..., Any], x: int, y: int) -> None:
    view(y)[:] = 2 * view(x)


def _add(view: Callable[..., Any], x: int, w: int, y: int) -> None:
    view(y)[:] = view(x) + view(w)


KERNELS: dict[str, tuple[int, Callable[..., None]]] = {"double": (2, _double), "add": (3, _add)}
"""Object -> how many pointers its kernel takes besides the null pointers, and what it does."""


@dataclass(frozen=True)
class Kernel:
    """One start of a kernel, named as its object."""

    work: Callable[[], None]
    name: str
    early: bool
    shared_bytes: int

    def __call__(self) -> None:
        self.work()


CAPABILITY = ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR")
ROOM = {
    "MULTIPROCESSOR_COUNT": 4,
    "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR": 233472,
    "RESERVED_SHARED_MEMORY_PER_BLOCK": 1024,
    "L2_CACHE_SIZE": 1 << 20,
}
"""What each GPU has for blocks, and its cache."""


class FakeDriver(ModuleType):
    """The driver.

    Attributes:
        fails: function -> status that it gives instead.
        calls: names of the functions that were called.
        memory: blocks of the GPUs that are taken, by address.
        pinned: likewise of the CPU.
        takes: how many ms a kernel takes.
        most_shared: bytes that a block may have.
        races: one that is started early does not wait for the one in front of it.
        version: of CUDA, as the driver has it.
    """

    def __init__(self, gpus: tuple[tuple[str, tuple[int, int]], ...], total: int) -> None:
        super().__init__(MODULE)
        self.gpus, self.total = gpus, total
        self.fails: dict[str, int] = {}
        self.calls: list[str] = []
        self.memory: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.capturing: set[int] = set()
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.modules: dict[int, str] = {}
        self.events: dict[int, float] = {}
        self.shared: dict[int, int] = {}
        self.clock = 0.0
        self.takes: Callable[[Kernel], float] = lambda kernel: 1e-3
        self.races, self.most_shared = False, 232448
        self.version = 13020
        self._next = 1000
        self._contexts = threading.local()
        names = [f"CU_DEVICE_ATTRIBUTE_{name}" for name in (*CAPABILITY, *ROOM)]
        self.CUdevice_attribute = enum.Enum("CUdevice_attribute", names)
        self.CUstream_flags = enum.IntEnum("CUstream_flags", {"CU_STREAM_NON_BLOCKING": 1})
        external = {"CU_EVENT_RECORD_EXTERNAL": 1}
        self.CUevent_record_flags = enum.IntEnum("CUevent_record_flags", external)
        mode = {"CU_STREAM_CAPTURE_MODE_RELAXED": 2}
        self.CUstreamCaptureMode = enum.IntEnum("CUstreamCaptureMode", mode)
        self.CUlaunchConfig = self.CUlaunchAttribute = SimpleNamespace
        self.CUlaunchAttributeValue = SimpleNamespace
        early = {"CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION": 6}
        self.CUlaunchAttributeID = enum.IntEnum("CUlaunchAttributeID", early)
        most = {"CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES": 8}
        self.CUfunction_attribute = enum.IntEnum("CUfunction_attribute", most)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cu") or isinstance(found, type) or not callable(found):
            return found
        self.calls.append(name)
        if name in self.fails:
            status = self.fails[name]
            return lambda *_: (status, None)
        return found

    # What there is.

    def cuInit(self, flags: int) -> tuple[int]:
        return (0,)

    def cuGetErrorName(self, status: int) -> tuple[int, bytes | None]:
        return (0, ERRORS[status][0]) if status in ERRORS else (1, None)

    def cuGetErrorString(self, status: int) -> tuple[int, bytes | None]:
        return (0, ERRORS[status][1]) if status in ERRORS else (1, None)

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.version

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return 0, len(self.gpus)

    def cuDeviceGet(self, index: int) -> tuple[int, Any]:
        return 0, SimpleNamespace(index=index)

    def cuDeviceGetName(self, length: int, device: Any) -> tuple[int, bytes]:
        return 0, self.gpus[device.index][0].encode().ljust(length, b"\0")

    def cuDeviceGetAttribute(self, kind: enum.Enum, device: Any) -> tuple[int, int]:
        values = (*self.gpus[device.index][1], *ROOM.values())
        return 0, values[kind.value - 1]

    def cuDeviceGetUuid(self, device: Any) -> tuple[int, Any]:
        return 0, SimpleNamespace(bytes=UUIDS[device.index])

    # Contexts.

    def cuDevicePrimaryCtxRetain(self, device: Any) -> tuple[int, str]:
        return 0, f"context {device.index}"

    def cuCtxPushCurrent(self, context: str) -> tuple[int]:
        self.stack.append(context)
        return (0,)

    def cuCtxPopCurrent(self) -> tuple[int, str]:
        return 0, self.stack.pop()

    @property
    def stack(self) -> list[str]:
        """Contexts of this thread, the current one last."""
        if not hasattr(self._contexts, "stack"):
            self._contexts.stack = []
        found: list[str] = self._contexts.stack
        return found

    def _handle(self) -> int:
        assert self.stack, "no context is current in this thread"
        self._next += 8
        return self._next

    # Memory.

    def cuMemGetInfo(self) -> tuple[int, int, int]:
        assert self.stack
        return 0, self.total - sum(len(block) - 256 for block in self.memory.values()), self.total

    def cuMemAlloc(self, size: int) -> tuple[int, int | None]:
        if size > self.cuMemGetInfo()[1]:
            return 2, None
        block = ctypes.create_string_buffer(b"\xff" * (size + 255), size + 256)
        at = -(-ctypes.addressof(block) // 256) * 256
        self.memory[at] = block
        return 0, at

    def cuMemFree(self, at: int) -> tuple[int]:
        assert self.stack
        del self.memory[at]
        return (0,)

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        assert self.stack
        block = ctypes.create_string_buffer(size)
        self.pinned[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cuMemFreeHost(self, at: int) -> tuple[int]:
        del self.pinned[at]
        return (0,)

    def require(self, at: int, size: int) -> None:
        """The bytes are the GPU's, and taken."""
        inside = any(
            begin <= at and at + size <= begin + len(block) - 256
            for begin, block in self.memory.items()
        )
        assert inside, f"{size} bytes at {at} were not taken"

    def view(self, at: int, count: int = 64) -> Any:
        """float32 on the GPU."""
        self.require(at, 4 * count)
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(at))

    # Streams: what is put into them waits there.

    def _put(self, stream: int, work: Callable[[], None]) -> tuple[int]:
        assert self.stack, "no context is current in this thread"
        self.streams[stream].append(work)
        return (0,)

    def cuStreamCreate(self, flags: int) -> tuple[int, int]:
        assert flags == 1, "a stream that waits for the default one"
        handle = self._handle()
        self.streams[handle] = []
        return 0, handle

    def cuStreamDestroy(self, stream: int) -> tuple[int]:
        del self.streams[stream]
        return (0,)

    def cuStreamSynchronize(self, stream: int) -> tuple[int]:
        assert stream not in self.capturing, "waited for while it is recorded"
        work, self.streams[stream] = self.streams[stream], []
        for index, each in enumerate(work):
            if self.races and isinstance(each, Kernel) and each.early:
                work[index - 1 : index + 1] = [each, work[index - 1]]
        for each in work:
            self.clock += self.takes(each) if isinstance(each, Kernel) else 1e-3
            each()
        return (0,)

    def cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: int) -> tuple[int]:
        self.require(to, size)
        if stream in self.capturing:
            assert source in self.pinned, "a graph that copies from memory that may move"
        return self._put(stream, lambda: ctypes.memmove(to, source, size))

    def cuMemcpyDtoHAsync(self, to: int, source: int, size: int, stream: int) -> tuple[int]:
        self.require(source, size)
        if stream in self.capturing:
            assert to in self.pinned, "a graph that copies to memory that may move"
        return self._put(stream, lambda: ctypes.memmove(to, source, size))

    def cuMemcpyDtoDAsync(self, to: int, source: int, size: int, stream: int) -> tuple[int]:
        self.require(to, size)
        self.require(source, size)
        return self._put(stream, lambda: ctypes.memmove(to, source, size))

    def cuMemsetD8Async(self, at: int, value: int, size: int, stream: int) -> tuple[int]:
        self.require(at, size)
        return self._put(stream, lambda: ctypes.memset(at, value, size))

    # Events and graphs.

    def cuEventCreate(self, flags: int) -> tuple[int, int]:
        handle = self._handle()
        self.events[handle] = -1.0
        return 0, handle

    def cuEventDestroy(self, event: int) -> tuple[int]:
        del self.events[event]
        return (0,)

    def cuEventRecord(self, event: int, stream: int) -> tuple[int]:
        assert stream not in self.capturing, "a mark that is the graph's alone"
        return self._put(stream, lambda: self.events.__setitem__(event, self.clock))

    def cuEventRecordWithFlags(self, event: int, stream: int, flags: int) -> tuple[int]:
        assert flags == 1, "a mark that is the graph's alone cannot be asked for its time"
        assert stream in self.capturing
        return self._put(stream, lambda: self.events.__setitem__(event, self.clock))

    def cuEventElapsedTime(self, begin: int, end: int) -> tuple[int, float]:
        assert min(self.events[begin], self.events[end]) >= 0, "not reached"
        return 0, self.events[end] - self.events[begin]

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        assert mode == 2
        assert stream not in self.capturing
        assert not self.streams[stream], "what came before would be recorded"
        self.capturing.add(stream)
        return (0,)

    def cuStreamEndCapture(self, stream: int) -> tuple[int, list[Callable[[], None]]]:
        self.capturing.remove(stream)
        work, self.streams[stream] = self.streams[stream], []
        return 0, work

    def cuGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[int, int]:
        handle = self._handle()
        self.graphs[handle] = list(graph)
        return 0, handle

    def cuGraphDestroy(self, graph: list[Callable[[], None]]) -> tuple[int]:
        graph.clear()
        return (0,)

    def cuGraphExecDestroy(self, graph: int) -> tuple[int]:
        del self.graphs[graph]
        return (0,)

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[int]:
        for work in self.graphs[graph]:
            self._put(stream, work)
        return (0,)

    # Code.

    def cuModuleLoadData(self, at: int) -> tuple[int, int | None]:
        handle, name = self._handle(), (ctypes.string_at(at)).decode(errors="replace")
        if name not in KERNELS:
            return 200, None
        self.modules[handle] = name
        return 0, handle

    def cuModuleUnload(self, module: int) -> tuple[int]:
        del self.modules[module]
        return (0,)

    def cuModuleGetFunction(self, module: int, symbol: bytes) -> tuple[int, int | None]:
        assert self.stack
        name = self.modules[module]
        return (0, module) if symbol.decode() == f"{name}_kernel" else (500, None)

    def cuFuncSetAttribute(self, function: int, kind: int, value: int) -> tuple[int]:
        if value > self.most_shared:
            return (1,)
        self.shared[function] = value
        return (0,)

    def cuLaunchKernel(self, function: int, *rest: int) -> tuple[int]:
        *_, shared, stream, where, extra = rest
        return self._start(function, shared, stream, where, extra)

    def cuLaunchKernelEx(self, config: Any, function: int, where: int, extra: int) -> tuple[int]:
        assert min(config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX) > 0
        assert (config.blockDimY, config.blockDimZ, config.numAttrs) == (1, 1, 1)
        (attribute,) = config.attrs
        assert attribute.id == 6
        assert attribute.value.programmaticStreamSerializationAllowed == 1
        before = self.streams[config.hStream][-1:]
        assert not before or isinstance(before[0], Kernel), "not behind a kernel"
        shared = config.sharedMemBytes
        return self._start(function, shared, config.hStream, where, extra, early=True)

    def _start(
        self,
        function: int,
        shared: int,
        stream: int,
        where: int,
        extra: int,
        *,
        early: bool = False,
    ) -> tuple[int]:
        assert extra == 0
        if shared > self.shared.get(function, 48 << 10):
            return (1,)
        name = self.modules[function]
        count, work = KERNELS[name]
        table = (ctypes.c_uint64 * (count + 2)).from_address(where)
        values = [ctypes.c_uint64.from_address(each).value for each in table]
        assert values[count:] == [0, 0]
        started = Kernel(lambda: work(self.view, *values[:count]), name, early, shared)
        return self._put(stream, started)


H200 = ("A GPU", (9, 0))


def plant_driver(
    patch: pytest.MonkeyPatch,
    gpus: tuple[tuple[str, tuple[int, int]], ...] = (H200,),
    total: int = TOTAL_BYTES,
) -> FakeDriver:
    """Makes this driver and these GPUs the ones that are here."""
    fake = FakeDriver(gpus, total)
    patch.setattr(driver_module, "_bindings", lambda: fake)
    patch.setattr(presence, "read_capabilities", lambda: tuple(each for _, each in gpus))
    patch.setattr(presence, "find_spec", lambda name: name)
    patch.setattr(presence, "installed", lambda name: "1.0")
    return fake
