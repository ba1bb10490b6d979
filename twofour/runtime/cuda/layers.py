"""A run on a GPU layer by layer: what each wrote, and how long each takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import UnsupportedError
from twofour.core.memory import Bytes
from twofour.core.plan_check import ITEM_BYTES
from twofour.engine import Engine, Profile, Step, Write
from twofour.runtime.cuda.network import CudaNetwork, CudaStep
from twofour.runtime.cuda.prepared import time_us
from twofour.runtime.cuda.ranges import named_range
from twofour.runtime.shapes import Bound
from twofour.runtime.taps import Tap, read
from twofour.runtime.timeline import Span, Timeline, now_ns

Array = NDArray[Any]


class Runnable(Protocol):
    """A step that is ready to run."""

    def run(self, tensors: dict[str, Array], bound: Bound) -> None:
        """Reads plain tensors, and adds those that it writes."""


def required(engine: Engine, network: CudaNetwork | None) -> CudaNetwork:
    """The network of an engine for CUDA.

    Raises:
        UnsupportedError: the engine is for something else.
    """
    if network is None:
        raise UnsupportedError(
            f"layers of an engine for {engine.plan.target} are not timed on a GPU",
            [],
            "use timeline for an engine of the CPU",
        )
    return network


def walk(
    engine: Engine,
    network: CudaNetwork,
    ready: Sequence[tuple[Step, Runnable]],
    tensors: dict[str, Array],
    bound: Bound,
) -> Iterator[Tap]:
    """What each layer wrote, read before anything takes its place.

    Args:
        engine: the engine.
        network: that the steps on the GPU are of.
        ready: the steps of a profile.
        tensors: the inputs.
        bound: what they fit.
    """
    mirror = np.zeros(engine.plan.arena_bytes, np.uint8)
    for step, runnable in ready:
        plain: list[tuple[int, Write]] = []
        if isinstance(runnable, CudaStep):
            for group in runnable.groups(tensors):
                layer = runnable.prepared.layers[group]
                for write in engine.plan.layers[layer].writes:
                    if write.at is None:
                        plain.append((layer, write))
                    elif group == runnable.last_groups[layer]:
                        _fetch(network, write, bound, mirror)
                        yield _tap(layer, write, mirror, tensors, bound)
        else:
            runnable.run(tensors, bound)
            plain += [(i, write) for i in step.layers for write in engine.plan.layers[i].writes]
        for layer, write in plain:
            if write.tensor.name in tensors:
                yield _tap(layer, write, mirror, tensors, bound)


def timeline(
    profile: Profile,
    ready: Sequence[tuple[Step, Runnable]],
    tensors: dict[str, Array],
    bound: Bound,
) -> Timeline:
    """One run with the time of every layer, from marks within the graphs.

    The GPU's clock is not the CPU's: what the GPU did is put at the end of its step.

    Args:
        profile: that is run.
        ready: its steps.
        tensors: the inputs.
        bound: what they fit.
    """
    steps, layers = [], []
    for index, (step, runnable) in enumerate(ready):
        begin = now_ns()
        until_us = []
        if isinstance(runnable, CudaStep):
            until_us = runnable.run_marked(tensors)
        else:
            runnable.run(tensors, bound)
        end = now_ns()
        whole = Span(index, step.layers, 0, begin, end, end)
        steps.append(whole)
        if not isinstance(runnable, CudaStep):
            layers.append(whole)
            continue
        first = max(begin, end - round(1e3 * until_us[-1]))
        times = [first + round(1e3 * each) for each in until_us]
        for group, layer in enumerate(runnable.prepared.layers):
            done = times[group + 1]
            layers.append(Span(index, (layer,), 0, times[group], done, done))
    return Timeline(tuple(steps), tuple(layers))


def layer_times_us(
    network: CudaNetwork,
    ready: Sequence[tuple[Step, Runnable]],
    tensors: dict[str, Array],
    bound: Bound,
    rounds: int,
) -> dict[int, float]:
    """Median time of each layer on the GPU in microseconds, on the values of one run.

    Each layer runs once in a range of its name, for profilers, then in graphs of its own. Steps
    that are not on the GPU are run and not timed.

    Args:
        network: that the steps on the GPU are of.
        ready: the steps of a profile.
        tensors: the inputs.
        bound: what they fit.
        rounds: see `time_us`.

    Returns:
        Index into `Plan.layers` -> time.
    """
    times: dict[int, float] = {}
    for step, runnable in ready:
        if isinstance(runnable, CudaStep):
            for group in runnable.groups(tensors):
                layer = runnable.prepared.layers[group]
                calls = partial(runnable.prepared.enqueue_group, group)
                took = time_us(network.device, calls, rounds)
                times[layer] = times.get(layer, 0.0) + took
        else:
            with named_range(step.symbol):
                runnable.run(tensors, bound)
    return times


def _fetch(network: CudaNetwork, write: Write, bound: Bound, mirror: Bytes) -> None:
    """Copies what was written to where it lies in the mirror of the arena."""
    assert write.at is not None
    shape = write.tensor.shape_at(bound.values)
    if not math.prod(shape):
        return
    counts = write.planes(shape)
    size = ITEM_BYTES[write.tensor.dtype]
    strides = (write.at.image, size, write.at.row, write.at.pixel)
    last = sum((n - 1) * stride for n, stride in zip(counts, strides, strict=True))
    begin = write.at.offset
    part = mirror[begin : begin + last + size]
    network.device.from_gpu(part, network.arena + begin, network.stream)
    network.device.wait(network.stream)


def _tap(layer: int, write: Write, mirror: Bytes, tensors: dict[str, Array], bound: Bound) -> Tap:
    value = read(write, mirror, tensors, bound.values)
    return Tap(layer, write.tensor.name, write.source, value)
