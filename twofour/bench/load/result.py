"""What came of a load, in numbers: percentiles, rates, errors, and what the client itself took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.bench.load.client import BUSY, NO_ANSWER, Target
from twofour.bench.load.drive import Record
from twofour.bench.load.statistics import Counters, Split, split
from twofour.bench.timing import Ratio

_CLIENT_FULL, _LATE_US, _BEHIND = 0.9, 1000.0, 0.95
_QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)


@dataclass(frozen=True)
class Latency:
    """Of answered requests, in microseconds; percentiles as numpy has them (linear)."""

    mean_us: float
    p50_us: float
    p90_us: float
    p95_us: float
    p99_us: float
    p99_9_us: float
    max_us: float


@dataclass(frozen=True)
class Against:
    """The first target against this one, from turns that lay side by side; above 1: it is better.

    Attributes:
        requests: its answers a second over those of this one.
        p50: the median latency of this one over its own.
        p99: the same of the 99th percentile.
    """

    requests: Ratio
    p50: Ratio
    p99: Ratio


@dataclass(frozen=True)
class Result:
    """One target's row.

    Attributes:
        name: as the table shows it.
        url: of the server.
        model: its name there.
        server: name and version, as it tells them.
        inputs: name -> shape, or the smallest and the largest of them, for example "1x8 to 1x128".
        rounds: turns.
        answered: requests, all turns together.
        seconds: timed, all turns together.
        requests_per_s: answers within the turns' time.
        rows_per_s: rows of these.
        latency: None where nothing was answered.
        errors: how many, by HTTP status, name of gRPC status, "timeout", "connection" (refused or
            hung up) or "wrong" (no answer to what was asked).
        busy: of these, how many said that the server has too much to do.
        words: what was said to the first of each error.
        sent_bytes: of one request, on average.
        received_bytes: of one answer.
        held: requests that waited in the client because as many as may be were open.
        late_p99_us: open loop: how much later than due requests were sent.
        client_cpu_us: that this process computed for one request.
        client_cpu_share: of one core.
        split: where the server spent its time, by its own account.
        first_is: how many times as good the first target is; None for itself.
        notes: what makes the numbers doubtful, a sentence each.
    """

    name: str
    url: str
    model: str
    server: str
    inputs: dict[str, str]
    rounds: int
    answered: int
    seconds: float
    requests_per_s: float
    rows_per_s: float
    latency: Latency | None
    errors: dict[str, int]
    busy: int
    words: dict[str, str]
    sent_bytes: float
    received_bytes: float
    held: int
    late_p99_us: float | None
    client_cpu_us: float
    client_cpu_share: float
    split: Split | None
    first_is: Against | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """All that was noted of one target.

    Attributes:
        target: where the load went.
        name: as the table shows it.
        server: name and version.
        inputs: name -> shapes, in words.
        turns: in order, at least one.
        counted: the server's own counts of these; None if it keeps none.
        held: requests that waited in the client.
    """

    target: Target
    name: str
    server: str
    inputs: dict[str, str]
    turns: Sequence[Record]
    counted: Counters | None
    held: int


def latency_of(latencies_ns: NDArray[np.int64]) -> Latency | None:
    """The percentiles of latencies; None if there are none."""
    if not len(latencies_ns):
        return None
    quantiles = np.quantile(latencies_ns, _QUANTILES) / 1e3
    return Latency(float(latencies_ns.mean()) / 1e3, *(float(us) for us in quantiles))


def summarize(found: Found, first: Found | None) -> Result:
    """One target's numbers.

    Args:
        found: of this target.
        first: the target that it is compared with; None for none.
    """
    turns = found.turns
    errors: Counter[str] = sum((turn.errors for turn in turns), Counter())
    words = {error: said for turn in reversed(turns) for error, said in turn.words.items()}
    seconds = sum(turn.wall_ns for turn in turns) / 1e9
    in_time, rows = (sum(getattr(turn, name) for turn in turns) for name in ("answered", "rows"))
    answered = sum(len(turn.latencies_ns) for turn in turns)
    ended = max(answered + sum(errors.values()), 1)
    cpu_ns = sum(turn.cpu_ns for turn in turns)
    late = _joined([turn.late_ns for turn in turns])
    numbers: dict[str, Any] = {
        "answered": answered,
        "requests_per_s": in_time / seconds,
        "rows_per_s": rows / seconds,
        "latency": latency_of(_joined([turn.latencies_ns for turn in turns])),
        "errors": dict(errors.most_common()),
        "busy": sum(errors[name] for name in BUSY),
        "sent_bytes": sum(turn.sent_bytes for turn in turns) / max(answered, 1),
        "received_bytes": sum(turn.received_bytes for turn in turns) / max(answered, 1),
        "held": found.held,
        "late_p99_us": float(np.quantile(late, 0.99)) / 1e3 if len(late) else None,
        "client_cpu_us": cpu_ns / ended / 1e3,
        "client_cpu_share": cpu_ns / seconds / 1e9,
    }
    return Result(
        name=found.name,
        url=found.target.url,
        model=found.target.model,
        server=found.server,
        inputs=found.inputs,
        rounds=len(turns),
        seconds=seconds,
        words=words,
        split=split(found.counted) if found.counted else None,
        first_is=against(first.turns, turns) if first else None,
        notes=tuple(_notes(numbers, len(late) / seconds)),
        **numbers,
    )


def against(first: Sequence[Record], other: Sequence[Record]) -> Against | None:
    """Round by round; None if a round of one has no answers."""
    pairs = [*zip(first, other, strict=True)]
    if not all(turn.answered and turn.latencies_ns for pair in pairs for turn in pair):
        return None
    rates = [_rate(a) / _rate(b) for a, b in pairs]
    medians, tails = (
        [_quantile(b, level) / _quantile(a, level) for a, b in pairs] for level in (0.5, 0.99)
    )
    return Against(_ratio(rates), _ratio(medians), _ratio(tails))


def _rate(turn: Record) -> float:
    return turn.answered / turn.wall_ns


def _quantile(turn: Record, level: float) -> float:
    return float(np.quantile(_joined([turn.latencies_ns]), level))


def _ratio(values: Sequence[float]) -> Ratio:
    low, median, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return Ratio(median, low, high)


def _joined(parts: Sequence[Any]) -> NDArray[np.int64]:
    return np.concatenate([np.asarray(part, np.int64) for part in parts])


def _notes(numbers: dict[str, Any], due_per_s: float) -> list[str]:
    """What makes the numbers doubtful; in a closed loop nothing is due."""
    found, late, held = [], numbers["late_p99_us"], numbers["held"]
    if numbers["client_cpu_share"] > _CLIENT_FULL:
        found.append(
            f"the client itself was the limit: it computed {numbers['client_cpu_share']:.0%} of "
            "the time; drive the server from another machine, or with several processes"
        )
    if late is not None and late > _LATE_US:
        found.append(f"the client could not keep the rate: requests left {late:.0f} us late (p99)")
    if due_per_s and held:
        found.append(f"{held} requests waited in the client: give a larger --concurrency")
    if numbers["requests_per_s"] < _BEHIND * due_per_s:
        per_s = numbers["requests_per_s"]
        found.append(f"{per_s:.1f} requests a second were answered, {due_per_s:.1f} were due")
    if numbers["errors"].get(NO_ANSWER):
        found.append("percentiles leave out what had no answer within --timeout")
    return found
