"""What a session does on the GPU alone, without the copies from and to the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import twofour
from benchmarks.cuda.cases import Feeds


@dataclass(frozen=True)
class Started:
    """One inference of inputs that are already where they have to be.

    Attributes:
        launch: starts it.
        wait: until all that was started is done.
        memory_bytes: weights and arena, which holds what libraries work with; None on a CPU.
        note: what else is to be said.
    """

    launch: Callable[[], object]
    wait: Callable[[], object]
    memory_bytes: int | None
    note: str = ""


def started(session: twofour.Session, feeds: Feeds) -> Started:
    """The graph of a session that just ran with these inputs, of its first profile.

    Args:
        session: on a GPU or on the CPU.
        feeds: of its one profile.
    """
    network: Any = getattr(session, "_gpu", None)
    if network is None:
        return Started(lambda: session.run(feeds), lambda: None, None)
    plan = session.engine.plan
    memory = session.engine.weights.nbytes + plan.arena_bytes
    steps: list[Any] = session._steps[0]
    if len(steps) != 1 or not hasattr(steps[0], "prepared"):
        note = f"{len(steps)} steps, not all of them on the GPU: timed with all copies"
        return Started(lambda: session.run(feeds), lambda: None, memory, note)
    device, stream, step = network.device, network.stream, steps[0]
    moved = [each for each in step._inputs if _overwritten(device, stream, each)]
    resident = [(each, _resident(device, stream, each.array)) for each in moved]

    def everything() -> None:
        for each, source in resident:
            device._do("cuMemcpyDtoDAsync", each.at, source, each.array.nbytes, stream)
        step.prepared.enqueue(stream)

    graph = device.capture(stream, everything)
    # The context is this process's from here on, so that nothing but the launch is timed.
    device.driver.call("cuCtxPushCurrent", device._context)
    functions = device.driver.functions
    note = f"{len(moved)} inputs copied within the GPU in each run" if moved else ""
    return Started(
        lambda: functions.cuGraphLaunch(graph, stream),
        lambda: device.driver.call("cuStreamSynchronize", stream),
        memory + sum(each.array.nbytes for each in moved),
        note,
    )


def _overwritten(device: Any, stream: int, copied: Any) -> bool:
    """Whether a run puts something else where its input was."""
    found = np.empty_like(copied.array)
    device.from_gpu(found, copied.at, stream)
    device.wait(stream)
    return found.tobytes() != copied.array.tobytes()


def _resident(device: Any, stream: int, array: Any) -> int:
    """The address of a copy on the GPU."""
    address: int = device.take(array.nbytes, "an input")
    device.to_gpu(address, np.ascontiguousarray(array), stream)
    device.wait(stream)
    return address
