"""What one line of the log looks like, from a record or a finished request.

Three things hold for every line, whatever a client or a library put into it: it is one line (as
text: further lines begin with a bar), since control characters are escaped; it has a
bounded length; and what looks like a token or a password is masked. Headers never come here.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from twofour.serve.readings import Finished, reason_of

MOST_CHARACTERS = 4096
"""Of a message or value."""
MOST_TRACE_CHARACTERS = 65_536
_MOST_MASKED = 1 << 20
_SECRETS = (
    (re.compile(r"(?i)\b(bearer|basic)(\s{1,3})[^\s'\",;]+"), r"\1\2***"),
    (re.compile(r"(?i)(://)[^/@\s'\"]+@"), r"\1***@"),
    (
        re.compile(
            r"(?i)((?:token|secret|password|passwd|signature|credential|api[_-]?key"
            r"|access[_-]?key(?:[_-]id)?)['\"]?\s{0,3}[=:]\s{0,3})['\"]?[^\s'\"&,;}]+"
        ),
        r"\1***",
    ),
)
"""What is masked, in time that is linear in the length of the text."""
_PLAIN = re.compile(r"[^\s\"=\\]+")
Value = str | int | float


@dataclass(frozen=True, slots=True)
class Line:
    """One event.

    Attributes:
        time_s: since 1970.
        level: "debug", "info", "warning", "error" or "critical".
        source: the logger's name.
        message: what happened.
        fields: more about it.
        trace: of an exception; "" for none.
    """

    time_s: float
    level: str
    source: str
    message: str
    fields: Mapping[str, Value]
    trace: str = ""


def of_record(record: logging.LogRecord) -> Line:
    """A record of a logger; `extra={"fields": {...}}` adds fields."""
    try:
        message = record.getMessage()
    except (TypeError, ValueError, KeyError) as e:  # a message that does not fit its arguments
        message = f"{record.msg} (its arguments do not fit: {e})"
    fields: dict[str, Value] = getattr(record, "fields", {})
    trace = ""
    if record.exc_info and record.exc_info[1] is not None:
        trace = _trace(record.exc_info[1])
    return Line(record.created, record.levelname.lower(), record.name, message, fields, trace)


def of_request(finished: Finished, time_s: float) -> Line:
    """A finished request; with the trace of what made the server fail.

    Args:
        finished: see there.
        time_s: when, since 1970.
    """
    error = finished.error
    fields: dict[str, Value] = {
        "request_id": finished.id,
        "model": finished.model,
        "version": finished.version,
        "protocol": finished.protocol,
        "status": finished.status,
        "rows": finished.rows,
        "batch_rows": finished.batch_rows,
        "total_ms": _ms(finished.ended_ns - finished.arrived_ns),
    }
    fields |= {f"{name}_ms": _ms(end - begin) for name, begin, end in finished.phases()}
    if error is None:
        return Line(time_s, "info", "twofour.serve", "request", fields)
    fields["reason"] = reason_of(type(error).__name__)
    fields["error"] = error.what
    if finished.status != 500:
        return Line(time_s, "info", "twofour.serve", "request", fields)
    return Line(time_s, "error", "twofour.serve", "request failed", fields, _trace(error))


def as_json(line: Line) -> str:
    """An object on one line; no character beyond ASCII, so none that a viewer acts upon."""
    plain: dict[str, Any] = {
        "time": _when(line.time_s),
        "level": line.level,
        "source": line.source,
        "message": _bounded(line.message),
    }
    for name, value in line.fields.items():
        plain.setdefault(name, _bounded(value) if isinstance(value, str) else value)
    if line.trace:
        plain["trace"] = _bounded(line.trace, MOST_TRACE_CHARACTERS)
    return json.dumps(plain, default=str) + "\n"


def as_text(line: Line) -> str:
    """Time, level, message and fields; its further lines and a trace stand behind a bar."""
    fields = "".join(
        f" {_printable(name)}={_value(value)}" for name, value in line.fields.items() if value != ""
    )
    message, *more = _bounded(line.message).splitlines() or [""]
    more += _bounded(line.trace, MOST_TRACE_CHARACTERS).splitlines()
    head = f"{_when(line.time_s)} {line.level:<7} {_printable(message)}{fields}\n"
    return head + "".join(f"  | {_printable(each)}\n" for each in more)


def _value(value: Value) -> str:
    if not isinstance(value, str):
        return str(value)
    text = _bounded(value)
    if _PLAIN.fullmatch(text) and text.isprintable():
        return text
    return '"' + _printable(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _printable(text: str) -> str:
    """Control, format and separator characters escaped, so that a line stays one line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _bounded(text: str, most: int = MOST_CHARACTERS) -> str:
    """Masked, and cut in the middle where it is too long."""
    text = text[:_MOST_MASKED]
    for pattern, mask in _SECRETS:
        text = pattern.sub(mask, text)
    if len(text) > most:
        half = most // 2
        text = f"{text[:half]} ... {len(text) - 2 * half} characters ... {text[-half:]}"
    return text


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _when(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="microseconds")[:-6] + "Z"


def _ms(ns: int) -> float:
    return round(ns / 1e6, 3)
