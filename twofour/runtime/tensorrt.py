"""Steps of an engine that TensorRT runs: its inputs to the GPU, the network, its outputs back.

All profiles of an engine are one network of TensorRT with as many optimization profiles, so a
session loads it once and changes from one to the other between runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import EngineError, InputError, UnsupportedError
from twofour.core.gpus import gpu_name
from twofour.core.plugins import Operator, require
from twofour.core.tensorrt import TensorRT, fits_gpu, how_to_get
from twofour.engine import Engine, Profile, Step
from twofour.runtime.cuda.memory import GpuMemory
from twofour.runtime.shapes import Bound
from twofour.runtime.tensorrt_library import Library, Log, find_library, register

Array = NDArray[Any]
_AGAIN = "build it again here: twofour build MODEL.onnx -o E.engine --target tensorrt"


@dataclass(eq=False)
class _Room:
    """Memory on the GPU for one tensor.

    Attributes:
        address: where.
        size_bytes: how much.
    """

    address: int = 0
    size_bytes: int = 0


@dataclass(eq=False)
class Network:
    """A network of TensorRT on the GPU, with memory for its inputs and outputs.

    Attributes:
        library: that runs it.
        cuda: the GPU.
        runtime: that holds the engine.
        engine: TensorRT's own.
        context: what a run of it needs.
        log: what TensorRT said.
        profile: that the context is at.
    """

    library: Library
    cuda: GpuMemory
    runtime: Any
    engine: Any
    context: Any
    log: Log
    profile: int = 0
    rooms: dict[str, _Room] = field(default_factory=dict)

    @staticmethod
    def load(wanted: TensorRT, content: bytes, operators: Sequence[Operator] = ()) -> Network:
        """Hands the network to TensorRT.

        Args:
            wanted: the TensorRT and the GPU that it was built for.
            content: as TensorRT wrote it.
            operators: whose plugins it asks for.

        Raises:
            UnsupportedError: another TensorRT or GPU is here than it was built for, or none.
            EngineError: TensorRT refuses it.
        """
        library = find_library(wanted)
        if library.version != wanted.version:
            raise UnsupportedError(
                f"the engine was built by {wanted.title}",
                [f"expected this version, as its engines fit no other; found {library.title}"],
                how_to_get(wanted),
            )
        register(library, operators)
        cuda, log = GpuMemory(), Log(library)
        try:
            if not fits_gpu(wanted.gpu, cuda.capability):
                found = f"{gpu_name(cuda.capability)} ({cuda.model})"
                raise UnsupportedError(
                    f"the engine was built for a GPU of {wanted.gpu}", [f"found {found}"], _AGAIN
                )
            with cuda.device.current():
                runtime = library.module.Runtime(log.logger)
                engine = runtime.deserialize_cuda_engine(content)
                context = None if engine is None else engine.create_execution_context()
            if context is None:
                raise EngineError(f"{library.title} refuses the engine", log.problems(), _AGAIN)
        except BaseException:
            cuda.close()
            raise
        return Network(library, cuda, runtime, engine, context, log)

    def close(self) -> None:
        """Frees the network and its memory; safe to call twice."""
        if self.engine is not None:
            self.context = None  # each lives in the next one
            self.engine = None
            self.runtime = None
            self.cuda.close()

    def enter(self, profile: int) -> None:
        """Changes to another optimization profile."""
        if profile != self.profile:
            with self.cuda.device.current():
                entered = self.context.set_optimization_profile_async(profile, self.cuda.stream)
            if not entered:
                raise self.failed(f"cannot change to profile {profile + 1}")
            self.cuda.wait()
            self.profile = profile

    def room(self, name: str, size_bytes: int) -> int:
        """The address of memory for a tensor; it grows as needed."""
        room = self.rooms.setdefault(name, _Room())
        if room.size_bytes < size_bytes or not room.address:
            if room.address:
                self.cuda.give_back(room.address)
            room.address, room.size_bytes = 0, 0
            room.address = self.cuda.take(size_bytes)
            room.size_bytes = size_bytes
        return room.address

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type that TensorRT takes or gives a tensor in."""
        found: np.dtype[Any] = np.dtype(
            self.library.module.nptype(self.engine.get_tensor_dtype(name))
        )
        return found

    def is_on_host(self, name: str) -> bool:
        """Whether TensorRT reads the tensor, a shape, from the memory of the CPU."""
        place = self.engine.get_tensor_location(name)
        return bool(place == self.library.module.TensorLocation.HOST)

    def failed(self, what: str) -> EngineError:
        """An error with what TensorRT said last."""
        return EngineError(f"{self.library.title}: {what}", self.log.problems(), _AGAIN)


class TensorRTStep:
    """One profile of a network."""

    def __init__(self, step: Step, index: int, profile: Profile, network: Network) -> None:
        """Notes what does not change from run to run."""
        self._inputs = step.inputs
        dtypes = {info.name: np.dtype(info.dtype) for info in profile.tensors}
        self._outputs = [(name, dtypes[name]) for name in step.outputs]
        self._index, self._network = index, network

    def run(self, tensors: dict[str, Array], bound: Bound) -> None:
        """Feeds and runs the network, and waits for its results."""
        network = self._network
        network.enter(self._index)
        held = [self._feed(name, tensors[name]) for name in self._inputs]
        places = [self._place(name) for name, _ in self._outputs]
        with network.cuda.device.current():
            started = network.context.execute_async_v3(network.cuda.stream)
        if not started:
            raise network.failed("the network did not run")
        results = [network.cuda.from_gpu(*place) for place in places]
        network.cuda.wait()
        del held  # the copies read them until here
        for (name, dtype), result in zip(self._outputs, results, strict=True):
            tensors[name] = result if result.dtype == dtype else result.astype(dtype)

    def _feed(self, name: str, array: Array) -> Array:
        """Tells the network where an input is; gives what must live until the run is over."""
        network = self._network
        wanted = network.dtype(name)
        if array.dtype != wanted:
            array = _converted(name, array, wanted)
        if network.is_on_host(name):
            ready = network.context.set_tensor_address(name, array.ctypes.data)
        else:
            address = network.room(name, array.nbytes)
            network.cuda.to_gpu(address, array)
            ready = network.context.set_input_shape(name, array.shape)
            ready = ready and network.context.set_tensor_address(name, address)
        if not ready:
            raise network.failed(f"it does not take {name!r} of shape {list(array.shape)}")
        return array

    def _place(self, name: str) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
        """Where an output will lie, its shape and type."""
        network = self._network
        shape = tuple(int(size) for size in network.context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise UnsupportedError(
                f"the shape of the output {name!r} depends on the data",
                ["engines of TensorRT give outputs whose shape follows from those of the inputs"],
                "cut the model before the operator that counts, or build for the CPU",
            )
        dtype = network.dtype(name)
        address = network.room(name, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        if not network.context.set_tensor_address(name, address):
            raise network.failed(f"it takes no memory for {name!r}")
        return address, shape, dtype


def network_of(engine: Engine) -> Network | None:
    """The network of an engine of TensorRT, loaded; None for an engine of the CPU.

    Raises:
        UnsupportedError, EngineError: as `Network.load`.
    """
    wanted, plan = engine.plan.target.tensorrt, engine.plan
    if wanted is None:
        return None
    operators = [require(c.domain, c.name, c.version, c.package) for c in plan.plugins]
    return Network.load(wanted, engine.code[plan.code[0]].tobytes(), operators)


def _converted(name: str, array: Array, dtype: np.dtype[Any]) -> Array:
    """An input in the type that TensorRT has instead, int32 for int64; refuses what changes."""
    converted = array.astype(dtype)
    if not np.array_equal(converted, array):
        raise InputError(
            f"input {name!r} has values that TensorRT cannot take",
            [f"expected numbers that fit {dtype.name}, got up to {array.max()}"],
        )
    return converted
