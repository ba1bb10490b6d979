"""The document `/v2/status`, which the status page shows: made from a reading each second.

{"server": {...}, "point": 17, "step_s": 2, "bounds_ms": [...], "row_bounds": [...],
 "models": [{"model": "resnet", "swaps": 0, "versions": [{"version": "3", ...}]}]}
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from twofour.serve.models.tally import ROWS, SECONDS
from twofour.serve.readings import ServerReading, VersionReading, reason_of
from twofour.serve.totals import Series, Totals
from twofour.serve.window import POINTS, STEP, Window

TICK_S = 1.0


@dataclass(slots=True)
class _Seen:
    """One version and its window."""

    reading: VersionReading | None
    window: Window


class Status:
    """The last minutes of a server."""

    def __init__(self, read: Callable[[], ServerReading], totals: Totals) -> None:
        """Notes when the server began.

        Args:
            read: the server as it is now.
            totals: of the server; may be shared with its metrics.
        """
        self._read, self._totals = read, totals
        self._began_s = time.monotonic()
        self._began_ms = time.time_ns() // 1_000_000
        self._ticks = 0
        self._seen: dict[tuple[str, str], _Seen] = {}

    async def watch(self) -> None:
        """Ticks each second until it is cancelled."""
        while True:
            self.tick(time.monotonic())
            await asyncio.sleep(TICK_S)

    def tick(self, now_s: float) -> None:
        """Takes a reading.

        Args:
            now_s: on the clock `time.monotonic`.
        """
        self._ticks += 1
        shown = {}
        for series in self._totals.update(self._read().versions, now_s):
            key = (series.model, series.version)
            shown[key] = self._seen.get(key) or _Seen(None, Window(now_s - TICK_S))
            self._take(shown[key], series, now_s)
        self._seen = shown

    def document(self, since: int = 0) -> bytes:
        """The document as JSON.

        Args:
            since: number of the last point that the reader has; points up to it are left out.
        """
        reading = self._read()
        by_model: dict[str, list[VersionReading]] = {}
        for each in reading.versions:
            by_model.setdefault(each.model, []).append(each)
        return orjson.dumps(
            {
                "server": self._server(reading),
                "point": self._ticks // STEP,
                "points": POINTS,
                "step_s": STEP * TICK_S,
                "bounds_ms": [float(f"{bound * 1e3:.6g}") for bound in SECONDS],
                "row_bounds": list(ROWS),
                "models": [
                    {
                        "model": model,
                        "swaps": reading.swaps.get(model, 0),
                        "versions": self._versions(versions, since),
                    }
                    for model, versions in sorted(by_model.items())
                ],
            }
        )

    def _take(self, seen: _Seen, series: Series, now_s: float) -> None:
        seen.reading = series.reading
        waiting = series.reading.queue_length if series.reading else 0
        busy = series.reading.busy if series.reading else 0
        seen.window.add(series.tally(), waiting, now_s)
        if self._ticks % STEP == 0:
            seen.window.close_point(self._ticks // STEP, busy)

    def _server(self, reading: ServerReading) -> dict[str, Any]:
        refused: dict[str, int] = {}
        for error, count in reading.refused.items():
            refused[reason_of(error)] = refused.get(reason_of(error), 0) + count
        return {
            "name": reading.name,
            "version": reading.version,
            "began_ms": self._began_ms,
            "uptime_s": round(time.monotonic() - self._began_s, 1),
            "ready": reading.ready,
            "draining": reading.draining,
            "refused": refused,
            "dropped_log_lines": reading.dropped_log_lines,
        }

    def _versions(self, versions: Sequence[VersionReading], since: int) -> list[dict[str, Any]]:
        found = []
        for each in versions:
            seen = self._seen.get((each.model, each.version))
            window = seen.window if seen else Window(0.0)
            minute = window.minute()
            failures: dict[str, int] = {}
            for error, count in minute.pop("failures").items():
                failures[reason_of(error)] = failures.get(reason_of(error), 0) + count
            plain = {
                "version": each.version,
                "state": each.state,
                "reason": each.reason,
                "share": each.share,
                "queue_length": each.queue_length,
                "instances": each.instances,
                "busy": each.busy,
                "memory_bytes": each.memory_bytes,
                "idle": each.idle,
                "failures": failures,
            }
            found.append(plain | minute | {"history": window.history(since)})
        return found
