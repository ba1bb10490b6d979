"""A GPU: its memory, streams, code, events and graphs, by the driver.

    device = open_device(0)                  # or "GPU-..." or "MIG-..." as nvidia-smi -L shows it
    address = device.take(1024, "the arena")
    stream = device.stream()
    graph = device.capture(stream, lambda: device.fill(address, 0, 1024, stream))
    device.replay(graph, stream)
    device.wait(stream)

Handles and addresses are plain numbers. Every method may be called from any thread: the GPU's
primary context, which other libraries in the process use as well, is made current for the call and
what was current before comes back after it. Settings of the GPU are never changed.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import EngineError, UnsupportedError
from twofour.core.gpus import gpu_name
from twofour.core.memory import Bytes, address
from twofour.runtime.cuda.driver import Driver, Gpu, OutOfMemoryError

Array = NDArray[Any]
_EARLY_SINCE = (12, 3)
"""The first CUDA whose graphs know kernels that are started early."""
_MOST_USUAL_SHARED = 48 << 10
"""Bytes of shared memory that a kernel may have without having been asked for."""
_opened: dict[tuple[Any, int], Device] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Room:
    """What a GPU has for blocks.

    Attributes:
        multiprocessors: how many.
        shared_bytes: shared memory of each of them.
        reserved_bytes: what a block takes of that beside what it asks for.
    """

    multiprocessors: int
    shared_bytes: int
    reserved_bytes: int


class Device:
    """One GPU, or a slice of one; see `open_device`.

    Attributes:
        gpu: which it is.
        driver: its driver.
    """

    def __init__(self, driver: Driver, gpu: Gpu) -> None:
        """Takes hold of the primary context, until the process ends."""
        self.driver, self.gpu = driver, gpu
        self._context = driver.call(
            "cuDevicePrimaryCtxRetain", driver.call("cuDeviceGet", gpu.index)
        )

    @property
    def capability(self) -> int:
        """90 for a GPU of compute capability 9.0."""
        return int(gpu_name(self.gpu.capability).removeprefix("sm"))

    @cached_property
    def starts_early(self) -> bool:
        """Whether its driver can start kernels of a graph early."""
        return tuple(map(int, self.driver.version.split("."))) >= _EARLY_SINCE

    @cached_property
    def room(self) -> Room:
        """What it has for blocks."""
        device = self.driver.call("cuDeviceGet", self.gpu.index)
        return Room(
            self.driver.attribute(device, "MULTIPROCESSOR_COUNT"),
            self.driver.attribute(device, "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"),
            self.driver.attribute(device, "RESERVED_SHARED_MEMORY_PER_BLOCK"),
        )

    @cached_property
    def cache_bytes(self) -> int:
        """Of its L2 cache."""
        device = self.driver.call("cuDeviceGet", self.gpu.index)
        return self.driver.attribute(device, "L2_CACHE_SIZE")

    @contextmanager
    def current(self) -> Iterator[None]:
        """This GPU is the one that libraries called inside use."""
        self.driver.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.driver.call("cuCtxPopCurrent")

    def _do(self, name: str, *arguments: Any) -> Any:
        """A function of the driver on this GPU."""
        call = self.driver.call
        call("cuCtxPushCurrent", self._context)
        try:
            return call(name, *arguments)
        finally:
            call("cuCtxPopCurrent")

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and bytes that there are."""
        free, total = self._do("cuMemGetInfo")
        return int(free), int(total)

    def take(self, size_bytes: int, what: str = "memory") -> int:
        """The address of so many bytes, at least one; a multiple of 256.

        Args:
            size_bytes: how many.
            what: they are for, in messages.

        Raises:
            OutOfMemoryError: there are not so many; says how many were asked for and are free.
        """
        try:
            return int(self._do("cuMemAlloc", max(1, size_bytes)))
        except OutOfMemoryError as error:
            free, total = self.memory()
            raise OutOfMemoryError(
                f"no room for {what} on {self.gpu.name}",
                [
                    f"asked for {_mib(size_bytes)}, free are {_mib(free)} of {_mib(total)}",
                    *error.reasons,
                ],
                error.fix,
            ) from error

    def give_back(self, address: int) -> None:
        """Frees what `take` gave."""
        self._do("cuMemFree", address)

    def pinned(self, size_bytes: int) -> Bytes:
        """Memory of the CPU that the GPU copies to and from at full speed; see `unpin`."""
        size = max(1, size_bytes)
        at = int(self._do("cuMemHostAlloc", size, 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(at))

    def unpin(self, held: Bytes) -> None:
        """Frees what `pinned` gave; it must not be touched after."""
        self._do("cuMemFreeHost", address(held))

    def stream(self) -> int:
        """A new stream, which waits for no other."""
        kind = self.driver.functions.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._do("cuStreamCreate", int(kind)))

    def drop_stream(self, stream: int) -> None:
        """Ends a stream."""
        self._do("cuStreamDestroy", stream)

    def wait(self, stream: int) -> None:
        """Until all that was put into the stream is done; the GIL is free meanwhile."""
        self._do("cuStreamSynchronize", stream)

    def to_gpu(self, to: int, array: Array, stream: int) -> None:
        """Copies a C-contiguous array, which may be changed once the stream was waited for."""
        if array.nbytes:
            self._do("cuMemcpyHtoDAsync", to, address(array), array.nbytes, stream)

    def from_gpu(self, array: Array, source: int, stream: int) -> None:
        """Copies into a C-contiguous array, complete once the stream was waited for."""
        if array.nbytes:
            self._do("cuMemcpyDtoHAsync", address(array), source, array.nbytes, stream)

    def fill(self, at: int, value: int, size_bytes: int, stream: int) -> None:
        """Sets every byte."""
        if size_bytes:
            self._do("cuMemsetD8Async", at, value, size_bytes, stream)

    def load(self, cubin: Bytes) -> int:
        """Loads an object of machine code.

        Raises:
            EngineError: it is none, or for another GPU.
        """
        held = np.concatenate([cubin, np.zeros(1, np.uint8)])  # text has to end
        try:
            return int(self._do("cuModuleLoadData", address(held)))
        except OutOfMemoryError:
            raise
        except UnsupportedError as error:
            raise EngineError(
                f"{self.gpu.name} ({gpu_name(self.gpu.capability)}) refuses an object of "
                f"{cubin.nbytes} bytes",
                [error.what, *error.reasons],
                "build the engine again on this machine, or update the driver",
            ) from error

    def unload(self, module: int) -> None:
        """Frees what `load` gave."""
        self._do("cuModuleUnload", module)

    def kernel(self, module: int, symbol: str, shared_bytes: int) -> int:
        """A kernel of an object.

        Args:
            module: as `load` gave it.
            symbol: of the kernel.
            shared_bytes: dynamic shared memory that it will be started with at most.

        Raises:
            EngineError: the object has no such kernel, or the GPU not so much shared memory.
        """
        try:
            found = int(self._do("cuModuleGetFunction", module, symbol.encode()))
            if shared_bytes > _MOST_USUAL_SHARED:
                kinds = self.driver.functions.CUfunction_attribute
                most = kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._do("cuFuncSetAttribute", found, most, shared_bytes)
        except OutOfMemoryError:
            raise
        except UnsupportedError as error:
            raise EngineError(
                f"the kernel {symbol!r} with {shared_bytes} bytes of shared memory cannot be used",
                [error.what, *error.reasons],
                "build the engine again on this machine",
            ) from error
        return found

    def launch(
        self,
        kernel: int,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        addresses: Sequence[int],
        stream: int,
        *,
        early: bool = False,
    ) -> None:
        """Starts a kernel whose parameters are addresses alone, 0 for a null pointer.

        Args:
            kernel: as `kernel` gave it.
            grid: blocks along x, y and z.
            threads: of a block.
            shared_bytes: dynamic shared memory of a block.
            addresses: the parameters.
            stream: that it is put into.
            early: it may be started before the kernel in front of it in the stream has ended, if
                that and the driver allow it: programmatic dependent launch of CUDA.
        """
        values = (ctypes.c_uint64 * len(addresses))(*addresses)
        begin = ctypes.addressof(values)
        table = (ctypes.c_uint64 * max(1, len(addresses)))(
            *(begin + 8 * index for index in range(len(addresses)))
        )
        where = ctypes.addressof(table)
        if early and self.starts_early:
            config = self._early(grid, threads, shared_bytes, stream)
            self._do("cuLaunchKernelEx", config, kernel, where, 0)
            return
        self._do("cuLaunchKernel", kernel, *grid, threads, 1, 1, shared_bytes, stream, where, 0)

    def _early(self, grid: Sequence[int], threads: int, shared_bytes: int, stream: int) -> Any:
        """How a kernel is started early."""
        functions = self.driver.functions
        allowed, value = functions.CUlaunchAttribute(), functions.CUlaunchAttributeValue()
        kinds = functions.CUlaunchAttributeID
        allowed.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        value.programmaticStreamSerializationAllowed = 1
        allowed.value = value
        config = functions.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = shared_bytes, stream
        config.attrs, config.numAttrs = [allowed], 1
        return config

    def event(self) -> int:
        """A mark in a stream, with the time."""
        return int(self._do("cuEventCreate", 0))

    def drop_event(self, event: int) -> None:
        """Frees an event."""
        self._do("cuEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        """Puts the mark behind what is in the stream by now."""
        self._do("cuEventRecord", event, stream)

    def record_within(self, event: int, stream: int) -> None:
        """As `record`, while a graph is recorded: each replay marks the event anew."""
        external = self.driver.functions.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL
        self._do("cuEventRecordWithFlags", event, stream, int(external))

    def elapsed_us(self, begin: int, end: int) -> float:
        """From one mark to another, both reached."""
        return float(self._do("cuEventElapsedTime", begin, end)) * 1e3

    def capture(self, stream: int, fill: Callable[[], None]) -> int:
        """A graph, ready to be replayed, of what `fill` puts into the stream."""
        modes = self.driver.functions.CUstreamCaptureMode
        with self.current():
            # What is freed meanwhile, by the collector of garbage say, must not end the recording.
            mode = modes.CU_STREAM_CAPTURE_MODE_RELAXED
            self.driver.call("cuStreamBeginCapture", stream, mode)
            try:
                fill()
            except BaseException:
                self.driver.functions.cuStreamEndCapture(stream)  # the first error is the one told
                raise
            graph = self.driver.call("cuStreamEndCapture", stream)
            try:
                return int(self.driver.call("cuGraphInstantiate", graph, 0))
            finally:
                self.driver.call("cuGraphDestroy", graph)

    def replay(self, graph: int, stream: int) -> None:
        """Puts a graph into a stream."""
        self._do("cuGraphLaunch", graph, stream)

    def drop_graph(self, graph: int) -> None:
        """Frees a graph."""
        self._do("cuGraphExecDestroy", graph)


def open_device(which: int | str = 0) -> Device:
    """A GPU; the same one always gives the same object.

    Args:
        which: index, as CUDA counts them in this process, or UUID of a GPU or of a slice (MIG).

    Raises:
        UnsupportedError: cuda-bindings or the driver is not installed, or there is no GPU.
        InputError: there is none such.
    """
    driver = Driver()
    gpu = driver.find(which)
    with _lock:
        key = driver.functions, gpu.index
        found = _opened.get(key)
        if found is None:
            found = _opened[key] = Device(driver, gpu)
        return found


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):,.1f} MiB"
