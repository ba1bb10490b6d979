"""The server's log: one line an event, JSON or text, written by a thread of its own.

Who logs never waits: a line that finds the writer's queue full is counted and dropped, and the
writer says so as soon as there is room. No line holds a secret, and no text of a client begins a
line: see `log_lines`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass
from typing import Literal, TextIO

from twofour.serve.log_lines import Line, as_json, as_text, of_record, of_request
from twofour.serve.readings import Finished

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
Entry = logging.LogRecord | tuple[Finished, float]


@dataclass(frozen=True)
class LogOptions:
    """What is logged, and how.

    Attributes:
        format: "json": an object a line; "text": for people.
        level: the lowest that is written; of libraries at least "warning".
        requests: one line for each request, at level "info"; else only those that failed by the
            server's fault.
        waiting: lines that may wait for the writer.
    """

    format: Literal["json", "text"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"
    requests: bool = False
    waiting: int = 10_000


class Logs(logging.Handler):
    """Takes the records of the package's loggers and those of libraries, and finished requests."""

    def __init__(self, options: LogOptions, stream: TextIO) -> None:
        """Starts the writer and listens to the root logger until `close`.

        Args:
            options: see there.
            stream: where lines go, usually stderr; it may be slow, or stand still.
        """
        super().__init__()
        self._options, self._stream = options, stream
        self._dropped = 0
        self._told = 0
        self._queue: queue.Queue[Entry | None] = queue.Queue(options.waiting)
        self._root = logging.getLogger()
        self._ours = logging.getLogger("twofour")
        self._levels_before = (self._root.level, self._ours.level)
        self._root.addHandler(self)
        level = LEVELS[options.level]
        self._root.setLevel(max(level, logging.WARNING))
        self._ours.setLevel(level)
        self._requests = options.requests and level <= logging.INFO
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines that found no room, or that the stream did not take."""
        return self._dropped

    def emit(self, record: logging.LogRecord) -> None:
        """Hands a record to the writer."""
        self._put(record)

    def request(self, finished: Finished) -> None:
        """Hands a finished request to the writer, where requests are logged."""
        if self._requests or finished.status == 500:
            self._put((finished, time.time()))

    def close(self, timeout_s: float = 2.0) -> None:
        """Writes what waits, for so long at most, and listens no more."""
        self._root.removeHandler(self)
        self._root.setLevel(self._levels_before[0])
        self._ours.setLevel(self._levels_before[1])
        if self._thread.is_alive():
            end = time.monotonic() + timeout_s
            try:
                self._queue.put(None, timeout=timeout_s)
            except queue.Full:
                return  # the stream stands still; its thread ends with the process
            self._thread.join(max(end - time.monotonic(), 0))
        super().close()

    def _put(self, entry: Entry) -> None:
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self._dropped += 1

    def _write(self) -> None:
        """The life of the writer."""
        write = as_json if self._options.format == "json" else as_text
        while (entry := self._queue.get()) is not None:
            line = of_record(entry) if isinstance(entry, logging.LogRecord) else of_request(*entry)
            try:
                if self._dropped > self._told:
                    self._stream.write(write(self._lost()))
                self._stream.write(write(line))
                if self._queue.empty():
                    self._stream.flush()
            except (OSError, ValueError):  # a full disk, a closed pipe, a closed file
                self._dropped += 1

    def _lost(self) -> Line:
        count, self._told = self._dropped - self._told, self._dropped
        text = f"{count} lines of this log were dropped: they came faster than they were written"
        return Line(time.time(), "warning", "twofour.serve.logs", text, {})
