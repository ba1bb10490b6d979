"""Steps of an engine on a GPU: one CUDA graph each, from the inputs' copies to the outputs'.

A session has an arena and a stream of its own beside the weights, so several run side by side.
Inputs so large that copying them takes time are copied in parts, before the graph is replayed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from twofour.core.cuda import Cuda
from twofour.core.cuda_check import wrong_program
from twofour.core.cuda_program import ARENA, WEIGHTS, CudaProgram, Transfer
from twofour.core.errors import EngineError, Error, UnsupportedError
from twofour.core.gpus import gpu_name
from twofour.core.memory import Bytes
from twofour.core.plan import REBUILD
from twofour.engine import Engine, Profile, Step
from twofour.runtime.cuda.copies import LARGE_BYTES, copied, copied_parts, copy
from twofour.runtime.cuda.device import Device, open_device
from twofour.runtime.cuda.prepared import LIBRARIES, Prepare, Prepared
from twofour.runtime.cuda.ranges import named_range
from twofour.runtime.cuda.shared import Shared, acquire, is_there, release
from twofour.runtime.shapes import Bound

Array = NDArray[Any]
_MIB = 1 << 20


@dataclass(eq=False)
class _Held:
    """What a session took of a GPU, to be freed once."""

    device: Device
    shared: Shared
    arena: int = 0
    stream: int = 0
    graphs: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    pinned: list[Bytes] = field(default_factory=list)
    prepared: list[Prepared] = field(default_factory=list)
    released: bool = False

    def release(self) -> None:
        """Frees all, safe to call twice; where a kernel broke the GPU, nothing is left to free."""
        if self.released:
            return
        self.released = True
        device = self.device
        frees: list[tuple[Callable[[Any], None], Any]] = []
        frees += [(device.wait, self.stream)] if self.stream else []
        frees += [(device.drop_graph, graph) for graph in self.graphs]
        frees += [(device.drop_event, event) for event in self.events]
        frees += [(Prepared.close, prepared) for prepared in self.prepared]
        frees += [(device.unpin, held) for held in self.pinned]
        frees += [(device.drop_stream, self.stream)] if self.stream else []
        frees += [(device.give_back, self.arena)] if self.arena else []
        for free, what in (*frees, (release, self.shared)):
            with suppress(Error):
                free(what)


class CudaNetwork:
    """An engine on one GPU, with an arena and a stream of its own.

    Attributes:
        device: the GPU.
        stream: of this session.
        layer_names: those of the plan.
    """

    def __init__(
        self,
        engine: Engine,
        gpu: int | str | None = None,
        most_bytes: int | None = None,
        libraries: Mapping[str, Prepare] = LIBRARIES,
    ) -> None:
        """Copies the weights there, unless they are, and takes the arena.

        Args:
            engine: for a GPU.
            gpu: which, by index or UUID; None for the first that the engine fits.
            most_bytes: of the GPU's memory that weights and arena may take; None for no limit.
            libraries: see runtime/cuda/prepared.py.

        Raises:
            UnsupportedError: no GPU, another than the engine was built for, or no room.
            InputError: there is no such GPU.
        """
        wanted = engine.plan.target.cuda
        assert wanted is not None
        self._engine, self._libraries = engine, libraries
        self.layer_names = tuple(layer.name for layer in engine.plan.layers)
        self.device = _fitting(wanted, gpu)
        _require_room(engine, self.device, most_bytes)
        self._held = _Held(self.device, acquire(engine, self.device))
        self._finalizer = weakref.finalize(self, _Held.release, self._held)
        try:
            self.stream = self._held.stream = self.device.stream()
            size = engine.plan.arena_bytes
            self._held.arena = self.device.take(size, "the arena of a session")
            self.wipe()
        except BaseException:
            self.close()
            raise

    @property
    def arena(self) -> int:
        """Its address."""
        return self._held.arena

    def wipe(self) -> None:
        """Makes every byte of the arena zero."""
        self.device.fill(self.arena, 0, self._engine.plan.arena_bytes, self.stream)

    def enter(self, profile: Profile) -> None:
        """Writes the halos of a profile to the arena."""
        for fill in profile.fills:
            self.device.fill(self.arena + fill.offset, fill.value, fill.size_bytes, self.stream)

    def step(self, step: Step, profile: Profile, program: CudaProgram | None = None) -> CudaStep:
        """A step of a profile, captured.

        Args:
            step: of the engine.
            profile: that it belongs to.
            program: runs in place of the engine's.

        Raises:
            EngineError: its program lies, or its code cannot be loaded.
            UnsupportedError: CUDA or a library refuses.
        """
        engine = self._engine
        if program is None:
            program = CudaProgram.from_bytes(engine.subgraphs[step.symbol].tobytes())
        wrong = wrong_program(program, step, profile, engine.plan, engine.weights.nbytes)
        if reasons := [*wrong][:10]:
            raise EngineError(f"the program of step {step.symbol!r} lies", reasons, REBUILD)
        prepared = self.prepared(program)
        self._held.prepared.append(prepared)
        self.enter(profile)
        return CudaStep(step, profile, self, prepared, self._held)

    def prepared(self, program: CudaProgram) -> Prepared:
        """A program that is known to be sound, ready to run here; its owner closes it.

        Raises:
            EngineError, UnsupportedError: as of `step`.
        """
        shared = self._held.shared
        blocks = {ARENA: self.arena, WEIGHTS: shared.weights}
        return Prepared(self.device, program, shared.objects, blocks, self._libraries)

    def close(self) -> None:
        """Frees what it took; safe to call twice."""
        self._finalizer.detach()
        self._held.release()


@dataclass(eq=False)
class _Copied:
    """A plain tensor beside the GPU: in memory that it copies from or to.

    Attributes:
        name: of the tensor.
        at: its address on the GPU.
        array: the memory; of one whose rows are counted, for as many as there may be.
        count: the tensor that says how many rows there are, or "".
    """

    name: str
    at: int
    array: Array
    count: str = ""


class CudaStep:
    """One step: feeds the GPU, replays its graph, and gives what came out.

    Attributes:
        prepared: its program.
        last_groups: layer -> the last index in `prepared.layers` where it stands.
    """

    def __init__(
        self, step: Step, profile: Profile, network: CudaNetwork, prepared: Prepared, held: _Held
    ) -> None:
        """Runs it once on zeros, so that libraries load what they need, then captures it."""
        self.symbol, self.layers = step.symbol, step.layers
        self.prepared, self._network, self._held = prepared, network, held
        self.last_groups = {layer: index for index, layer in enumerate(prepared.layers)}
        infos = {info.name: info for info in profile.tensors}
        program, device, stream = prepared.program, network.device, network.stream

        def beside(transfers: tuple[Transfer, ...]) -> list[_Copied]:
            found = []
            for transfer in transfers:
                memory = device.pinned(transfer.place.size_bytes)
                held.pinned.append(memory)
                info = infos[transfer.name]
                shape = info.most if info.count else info.shape
                plain = memory[: transfer.place.size_bytes].view(info.dtype).reshape(shape)
                plain[...] = 0
                at = network.arena + transfer.place.offset
                found.append(_Copied(transfer.name, at, plain, info.count))
            return found

        self._inputs, self._outputs = beside(program.inputs), beside(program.outputs)
        self._large = [each for each in self._inputs if each.array.nbytes >= LARGE_BYTES]
        self._small = [each for each in self._inputs if each.array.nbytes < LARGE_BYTES]
        self._whole(self._inputs)
        device.wait(stream)
        self._graph = device.capture(stream, lambda: self._whole(self._small))
        held.graphs.append(self._graph)
        self._marked: int | None = None
        self._marks: list[int] = []

    def run(self, tensors: dict[str, Array], bound: Bound) -> None:
        """Copies the inputs, replays the graph, and waits for the results.

        The GPU fetches the first parts of large inputs while the CPU copies the others.
        """
        device, stream = self._network.device, self._network.stream
        for each in self._small:
            copy(each.array, tensors[each.name])
        for each in self._large:
            flat = each.array.reshape(-1)
            for part in copied_parts(each.array, tensors[each.name]):
                device.to_gpu(each.at + part.start * flat.itemsize, flat[part], stream)
        device.replay(self._graph, stream)
        device.wait(stream)
        self.fetch(tensors)

    def feed(self, tensors: Mapping[str, Array]) -> None:
        """Puts the inputs where the GPU copies them from."""
        for each in self._inputs:
            copy(each.array, tensors[each.name])

    def fetch(self, tensors: dict[str, Array]) -> None:
        """New arrays of what the GPU copied back, of counted ones as many rows as there are."""
        there = {each.name: each.array for each in self._outputs}
        for each in self._outputs:
            array = each.array
            if each.count:
                array = array[: min(max(int(there[each.count][0]), 0), len(array))]
            tensors[each.name] = copied(array)

    def groups(self, tensors: dict[str, Array]) -> Iterator[int]:
        """As `run`, but layer after layer, each in a range of its name.

        Yields:
            The index into `prepared.layers` of each that is done.
        """
        device, stream = self._network.device, self._network.stream
        names = self._network.layer_names
        self.feed(tensors)
        with named_range(f"{self.symbol}: copies to the GPU"):
            self._copy_in(self._inputs)
            device.wait(stream)
        for index, layer in enumerate(self.prepared.layers):
            with named_range(names[layer]):
                self.prepared.enqueue_group(index, stream)
                device.wait(stream)
            yield index
        with named_range(f"{self.symbol}: copies from the GPU"):
            self._copy_out()
            device.wait(stream)
        self.fetch(tensors)

    def run_marked(self, tensors: dict[str, Array]) -> list[float]:
        """As `run`, by a graph with a mark between layers.

        Returns:
            Microseconds from the beginning until the inputs were there, until each of
            `prepared.layers` was done, and until the outputs were back.
        """
        device, stream = self._network.device, self._network.stream
        self.feed(tensors)
        if self._marked is None:
            self._marks = [device.event() for _ in range(len(self.prepared.layers) + 3)]
            self._held.events += self._marks
            self._marked = device.capture(stream, self._whole_marked)
            self._held.graphs.append(self._marked)
        device.replay(self._marked, stream)
        device.wait(stream)
        self.fetch(tensors)
        return [device.elapsed_us(self._marks[0], mark) for mark in self._marks[1:]]

    def _whole_marked(self) -> None:
        device, stream = self._network.device, self._network.stream
        device.record_within(self._marks[0], stream)
        self._copy_in(self._inputs)
        device.record_within(self._marks[1], stream)
        for index in range(len(self.prepared.layers)):
            self.prepared.enqueue_group(index, stream)
            device.record_within(self._marks[index + 2], stream)
        self._copy_out()
        device.record_within(self._marks[-1], stream)

    def _whole(self, inputs: Sequence[_Copied]) -> None:
        """Everything, into the stream, but the copies of other inputs."""
        self._copy_in(inputs)
        self.prepared.enqueue(self._network.stream)
        self._copy_out()

    def _copy_in(self, inputs: Sequence[_Copied]) -> None:
        device, stream = self._network.device, self._network.stream
        for each in inputs:
            device.to_gpu(each.at, each.array, stream)

    def _copy_out(self) -> None:
        device, stream = self._network.device, self._network.stream
        for each in self._outputs:
            device.from_gpu(each.array, each.at, stream)


def _fitting(wanted: Cuda, gpu: int | str | None) -> Device:
    """The GPU to run on.

    Raises:
        UnsupportedError, InputError: see `CudaNetwork`.
    """
    if gpu is not None:
        device = open_device(gpu)
        if wanted.fits(device.gpu.capability):
            return device
        found = [device.gpu]
    else:
        found = list(open_device(0).driver.gpus())
        for each in found:
            if wanted.fits(each.capability):
                return open_device(each.index)
    has = ", ".join(f"{gpu_name(each.capability)} ({each.name})" for each in found)
    raise UnsupportedError(
        f"the engine was built for a GPU of {wanted.gpu}",
        [f"found {has or 'none'}"],
        "build it again here: twofour build MODEL.onnx -o E.engine --target cuda",
    )


def _require_room(engine: Engine, device: Device, most_bytes: int | None) -> None:
    """Refuses an engine that is larger than it may be, or than what is free, before it is copied.

    Raises:
        UnsupportedError: says what it needs, and what it may have or what is free.
    """
    weights, arena = engine.weights.nbytes, engine.plan.arena_bytes
    needs = f"weights {weights / _MIB:,.1f} MiB and arena {arena / _MIB:,.1f} MiB"
    if most_bytes is not None and weights + arena > most_bytes:
        raise UnsupportedError(
            f"the engine needs more of the memory of {device.gpu.name} than it may have",
            [f"{needs}, allowed are {most_bytes / _MIB:,.1f} MiB"],
            "allow more, or build with smaller batches",
        )
    free, total = device.memory()
    there = is_there(engine, device)
    if arena + (0 if there else weights) > free:
        raise UnsupportedError(
            f"the engine needs more memory than is free on {device.gpu.name}",
            [
                f"{needs}{', the weights are there already' if there else ''}",
                f"free are {free / _MIB:,.1f} MiB of {total / _MIB:,.1f} MiB",
            ],
            "run fewer models or instances on this GPU, or build with smaller batches",
        )
