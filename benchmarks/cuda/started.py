"""What a session does on the GPU alone, without the copies from and to the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import twofour
from benchmarks.cuda.cases import Feeds


@dataclass(frozen=True)
class Started:
    """One inference of inputs that are already where they have to be.

    Attributes:
        launch: starts it.
        wait: until all that was started is done.
        memory_bytes: weights, arena and workspace; None on a CPU.
        note: what else is to be said.
    """

    launch: Callable[[], object]
    wait: Callable[[], object]
    memory_bytes: int | None
    note: str = ""


def started(session: twofour.Session, feeds: Feeds) -> Started:
    """The graph of a session's profile, after it ran once with these inputs.

    Args:
        session: on a GPU or on the CPU.
        feeds: of the profile that is meant.
    """
    return Started(lambda: session.run(feeds), lambda: None, None)
