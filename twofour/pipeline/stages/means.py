"""What stages work with beside their inputs, and what no result depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from twofour.core.progress import Report, Stage


@dataclass(frozen=True)
class Means:
    """How work is done.

    Attributes:
        spread: workers of a cluster, see `cluster/tasks.py`; None for this machine.
        document: the run so far, as run.json has it.
        built: engines that the cluster has built, by the stage that takes them.
    """

    spread: Any = None
    document: Callable[[], Mapping[str, Any]] = dict
    built: dict[str, bytes] = field(default_factory=dict)

    @property
    def spreading(self) -> dict[str, Any]:
        """As options of a scan take it."""
        return {} if self.spread is None else {"spread": self.spread}


def parts_of(report: Report) -> Stage:
    """Shows the parts of a stage within its own display."""

    @contextmanager
    def part(name: str) -> Iterator[Report]:
        def told(done: int, total: int | None, what: str) -> None:
            report(done, total, f"{name}: {what}" if what else name)

        told(0, None, "")
        yield told

    return part
