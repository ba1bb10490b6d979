"""Weights that are changed by what their layers read, as many at a time as fit the memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from twofour.core.progress import Report
from twofour.onnx_tools.capture import Reading
from twofour.onnx_tools.weights import Weight


@dataclass(frozen=True)
class Job:
    """A weight that is to be changed.

    Attributes:
        name: of the first layer that reads it.
        weight: what it is.
        readings: one for each layer that reads it.
    """

    name: str
    weight: Weight
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class Room:
    """For the statistics of inputs.

    Attributes:
        memory_bytes: that those of a group of layers may take.
        power: a statistic has features**power numbers: 2 of a Gram matrix, 1 of sums of squares.
    """

    memory_bytes: int
    power: int

    def groups(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Consecutive jobs whose statistics fit the memory together; one too large is alone."""
        group: list[Job] = []
        for job in jobs:
            readings = {reading for each in (*group, job) for reading in each.readings}
            if group and self._size_bytes(readings) > self.memory_bytes:
                yield group
                group = []
            group.append(job)
        if group:
            yield group

    def too_small_for(self, job: Job) -> str:
        """Why the statistics of a weight cannot be held; "" where they can."""
        size, most = self._size_bytes(set(job.readings)), self.memory_bytes
        if size <= most:
            return ""
        mib = 2**20
        return f"its statistics take {size / mib:.0f} MiB, more than the {most / mib:.0f} allowed"

    def _size_bytes(self, readings: Collection[Reading]) -> int:
        return sum(8 * reading.groups * reading.features**self.power for reading in readings)


def within(report: Report, layers_done: int, layers: int) -> Report:
    """Tells of samples while so many layers of all are done."""

    def told(done: int, total: int | None, what: str) -> None:
        report(layers_done, layers, f"{what} {done}{'' if total is None else f' of {total}'}")

    return told
