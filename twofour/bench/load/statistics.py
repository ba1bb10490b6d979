"""What a server counts by itself: Triton's statistics extension, before and after a load.

Source: Triton Inference Server, docs/protocol/extension_statistics.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counters:
    """Sums since the server began, of the versions asked for.

    Attributes:
        requests: answered.
        rows: inferences; a request of batch n has n.
        executions: calls of the model.
        queue_ns: that requests waited.
        input_ns: spent on assembling inputs.
        infer_ns: spent on computing.
        output_ns: spent on taking results apart.
    """

    requests: int = 0
    rows: int = 0
    executions: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0

    def __add__(self, other: Counters) -> Counters:
        """Both together."""
        return Counters(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def __sub__(self, other: Counters) -> Counters:
        """What came since `other`."""
        return Counters(*(a - b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[int, ...]:
        """In the order of the attributes."""
        return (
            self.requests,
            self.rows,
            self.executions,
            self.queue_ns,
            self.input_ns,
            self.infer_ns,
            self.output_ns,
        )


@dataclass(frozen=True)
class Split:
    """Where a server spent the time of a request, by its own account, on average.

    Attributes:
        queue_us: waiting.
        input_us: assembling inputs.
        infer_us: computing.
        output_us: taking results apart.
        rows_per_execution: mean size of the batches that it made.
    """

    queue_us: float
    input_us: float
    infer_us: float
    output_us: float
    rows_per_execution: float


def split(counted: Counters) -> Split | None:
    """The averages of what was counted; None if that is nothing."""
    if counted.requests <= 0 or counted.executions <= 0:
        return None
    per_request = 1 / counted.requests / 1e3
    return Split(
        counted.queue_ns * per_request,
        counted.input_ns * per_request,
        counted.infer_ns * per_request,
        counted.output_ns * per_request,
        counted.rows / counted.executions,
    )
