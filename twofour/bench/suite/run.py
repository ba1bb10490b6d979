"""All rows of a suite, each in a process of its own.

A row's process ends with the row: its memory is free for the next, its threads are gone, and what
breaks it does not break the others.
"""

from __future__ import annotations

import multiprocessing
import platform
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from twofour.bench import peers
from twofour.bench.suite.cache import MEASURED_CODE, code_sha256
from twofour.bench.suite.entries import Plain
from twofour.bench.suite.race import measure_row, missing_figures
from twofour.bench.suite.rows import SuiteOptions, SuiteRow
from twofour.core.errors import Error
from twofour.core.progress import Report
from twofour.core.target import detect_host, host_target
from twofour.core.version import __version__

TOOLS = ("numpy", "llvmlite", "onnx", "onnxruntime", "openvino", "torch")
_POLL_S = 0.2
_messages: Any = None
"""In a row's process: where its progress goes."""


def run_suite(rows: Sequence[SuiteRow], options: SuiteOptions, report: Report) -> Iterator[Plain]:
    """Measures rows.

    Args:
        rows: in order.
        options: for all of them.
        report: told about rows, and what is done within each.

    Yields:
        After each row all that is known then, so that a run that is stopped was not in vain:
        machine, versions, and `rows`: what `measure_row` found, or `name` and `error`.

    Raises:
        InputError: a peer is unknown or not installed.
    """
    for name in options.peers:
        peers.require(name)
    options.cache.mkdir(parents=True, exist_ok=True)
    known = circumstances(options)
    found: list[Plain] = []
    for done, row in enumerate(rows):
        report(done, len(rows), row.name)
        found.append(_in_process(row, options, (done, len(rows), report)))
        yield {**known, "rows": list(found)}


def circumstances(options: SuiteOptions) -> Plain:
    """Machine, versions, options and code: what rows of one page have in common."""
    host = detect_host()
    return {
        "version": __version__,
        "cpu": host.model,
        "cores": host.cores,
        "target": str(host_target()),
        "tools": {"python": platform.python_version(), **_versions()},
        "peers": list(options.peers),
        "threads": options.threads,
        "duration_s": options.duration_s,
        "code_sha256": code_sha256(MEASURED_CODE),
    }


def failures(document: Plain) -> list[str]:
    """One line for each row that lacks something, for people; empty if all went well."""
    found = []
    for row in document["rows"]:
        if "error" in row:
            found.append(f"{row['name']}: {row['error']}")
        else:
            lacking = missing_figures(row, document["peers"])
            found += [f"{row['name']}: {key} is missing" for key in lacking]
    return found


def _in_process(row: SuiteRow, options: SuiteOptions, progress: tuple[int, int, Report]) -> Plain:
    """What the row says, or the error that ended it."""
    done, total, report = progress
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    with ProcessPoolExecutor(1, context, _listen, (messages,)) as pool:
        future = pool.submit(_measured, row, options)
        while not future.done():
            try:
                report(done, total, f"{row.name}: {messages.get(timeout=_POLL_S)}")
            except queue.Empty:
                continue
    messages.close()
    return _outcome(row, future)


def _outcome(row: SuiteRow, future: Future[Plain]) -> Plain:
    """A process that died, or a bug, is the row's error, not the suite's."""
    error = future.exception()
    if error is not None:
        trace = "" if error.__cause__ is None else str(error.__cause__)
        return {"name": row.name, "error": f"{type(error).__name__}: {error}", "trace": trace}
    return future.result()


def _listen(messages: Any) -> None:
    global _messages
    _messages = messages


def _measured(row: SuiteRow, options: SuiteOptions) -> Plain:
    """In the row's process."""
    try:
        return measure_row(row, options, _tell)
    except Error as e:
        return {"name": row.name, "error": str(e)}


def _tell(done: int, total: int | None, what: str) -> None:
    _messages.put(f"{what} {done}/{total}" if total else what)


def _versions() -> dict[str, str]:
    found = {}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
