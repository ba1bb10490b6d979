"""twofour bench --url: load on a server, or on several side by side, over HTTP or gRPC."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from twofour.cli.bench_report import number, times, write_document
from twofour.cli.options import parse_shapes, read_arrays, require_packages, require_writable
from twofour.cli.output import Output, printable

if TYPE_CHECKING:
    from twofour.bench.load.client import Target
    from twofour.bench.load.race import Load
    from twofour.bench.load.requests import Wanted
    from twofour.bench.load.result import Result
    from twofour.bench.load.schedule import Arrivals

SCHEMA = "bench.url/1"
_WIDE, _LONG_US = 98, 20_000.0
_MOST_OPEN = 512


@dataclass(frozen=True)
class UrlRequest:
    """The options that only a server's load has, as they were given.

    Attributes:
        urls: of servers.
        rate: requests a second; None for a closed loop.
        arrivals: poisson, constant, or a file of seconds.
        tensors: binary or json.
        lengths: of open axes.
        warm_up_s: before the first turn.
        timeout_s: of a request.
        headers: as "name: value".
        seed: of arrivals and data.
    """

    urls: Sequence[str] = ()
    rate: float | None = None
    arrivals: str | None = None
    tensors: str | None = None
    lengths: str | None = None
    warm_up_s: float | None = None
    timeout_s: float | None = None
    headers: Sequence[str] = ()
    seed: int | None = None

    def refuse_without_url(self) -> None:
        """Refuses options of a server.

        Raises:
            InputError: one was given.
        """
        from twofour.core.errors import InputError

        given = [name for name, value in vars(self).items() if value not in (None, (), [])]
        if given:
            options = ", ".join(f"--{name.removesuffix('_s').replace('_', '-')}" for name in given)
            raise InputError(
                "an option needs --url",
                [f"{options.replace('--headers', '--header')}: of a server's load"],
                "add --url http://HOST:PORT, or leave it out",
            )

    def refuse_beside(self, **others: Any) -> None:
        """Refuses options of an engine or a suite.

        Raises:
            InputError: one was given.
        """
        from twofour.core.errors import InputError

        if given := [name for name, value in others.items() if value]:
            raise InputError(
                "a server has its own engine",
                [f"{', '.join(given)} was given beside --url"],
                "leave it out; servers are compared by giving --url or --model several times",
            )


@dataclass(frozen=True)
class Common:
    """The options that engines and servers share, as they were given."""

    models: Sequence[str]
    concurrency: int | None
    duration_s: float
    batch: int | None
    shapes: Sequence[str] | None
    inputs: Sequence[str] | None
    save: Path | None


def bench_url(request: UrlRequest, common: Common, out: Output) -> None:
    """Measures, shows and stores; exit code 1 if a target answered nothing.

    Raises:
        InputError: an option, a server or a model is not usable.
    """
    require_packages("a load on a server", ("grpc", "httptools", "orjson", "uvloop"), "load")
    from twofour.bench.load.race import measure
    from twofour.bench.noise import Watch

    if common.save is not None:
        require_writable(common.save)
    targets, load, wanted = (
        _targets(request, common),
        _load(request, common),
        _wanted(request, common),
    )
    watch = Watch.begin()
    with out.stage("measuring") as report:
        results = measure(targets, load, wanted, lambda done, all_: report(done, all_, "seconds"))
    document = document_of(results, load, wanted.seed)
    out.show(*shown(results, load, out.width))
    noted = [f"{row.name}: {each}" for row in results for each in row.notes]
    for line in (*noted, *watch.end()):
        out.note(f"note: {line}")
    if common.save is not None:
        write_document(SCHEMA, document, common.save)
    out.data(SCHEMA, document)
    if silent := [f"{row.name} answered nothing" for row in results if not row.answered]:
        out.fail(*silent)


def _targets(request: UrlRequest, common: Common) -> list[Target]:
    """Of one URL all models, of one model all URLs, else pairs."""
    from twofour.bench.load.client import parse_target
    from twofour.core.errors import InputError

    urls, models = list(request.urls), list(common.models)
    if len(urls) == 1:
        urls *= len(models)
    if len(models) == 1:
        models *= len(urls)
    if not models or len(urls) != len(models):
        raise InputError(
            "it is not clear which model to ask for",
            [f"expected one --model, or one for each --url, got {len(urls)} and {len(models)}"],
            "write it like --url http://127.0.0.1:8000 --model NAME",
        )
    headers = _headers(request.headers)
    return [parse_target(url, model, headers) for url, model in zip(urls, models, strict=True)]


def _headers(texts: Sequence[str]) -> dict[str, str]:
    """NAME: VALUE -> names in lower case, and values."""
    from twofour.core.errors import InputError

    found = {}
    for text in texts:
        name, colon, value = (part.strip() for part in text.partition(":"))
        if not colon or not name.replace("-", "").isalnum() or not f"{name}{value}".isprintable():
            raise InputError(
                f"bad --header {text!r}",
                ["expected NAME: VALUE"],
                "write it like --header 'authorization: Bearer TOKEN'",
            )
        found[name.lower()] = value
    return found


def _load(request: UrlRequest, common: Common) -> Load:
    from twofour.bench.load.race import Load
    from twofour.core.errors import InputError

    if request.tensors not in (None, "binary", "json"):
        expected = f"expected binary or json, got {request.tensors!r}"
        raise InputError("bad --tensors", [expected], "leave it out for binary")
    arrivals = _arrivals(request)
    usual = Load()
    return Load(
        common.concurrency or (_MOST_OPEN if arrivals else 1),
        arrivals,
        common.duration_s,
        usual.warm_up_s if request.warm_up_s is None else request.warm_up_s,
        usual.timeout_s if request.timeout_s is None else request.timeout_s,
        request.tensors != "json",
    )


def _arrivals(request: UrlRequest) -> Arrivals | None:
    from twofour.bench.load.schedule import KINDS, Arrivals, read_trace
    from twofour.core.errors import InputError

    kind = request.arrivals or KINDS[0]
    if kind in KINDS and (request.rate is not None or request.arrivals is None):
        return None if request.rate is None else Arrivals(request.rate, kind, request.seed or 0)
    if kind not in KINDS and request.rate is None:
        return read_trace(Path(kind))
    raise InputError(
        f"--arrivals {kind} and --rate do not go together",
        [f"expected {' or '.join(KINDS)} with --rate, or a file of seconds without it"],
        "write it like --rate 200 --arrivals constant",
    )


def _wanted(request: UrlRequest, common: Common) -> Wanted:
    from twofour.bench.load.requests import Wanted, parse_lengths

    return Wanted(
        common.batch,
        parse_shapes(common.shapes),
        read_arrays(common.inputs),
        parse_lengths(request.lengths) if request.lengths else (),
        request.seed or 0,
    )


def document_of(results: Sequence[Result], load: Load, seed: int) -> dict[str, Any]:
    """A run as plain data."""
    from twofour.core.target import detect_host
    from twofour.core.version import __version__

    host, arrivals = detect_host(), load.arrivals
    return {
        "version": __version__,
        "machine": {"cpu": host.model, "arch": host.arch, "cores": host.cores},
        "load": {
            "loop": "open" if arrivals else "closed",
            "concurrency": load.callers,
            "rate": arrivals.rate if arrivals else None,
            "arrivals": arrivals.kind if arrivals else None,
            "duration_s": load.duration_s,
            "warm_up_s": load.warm_up_s,
            "timeout_s": load.timeout_s,
            "tensors": "binary" if load.binary else "json",
            "seed": seed,
        },
        "results": [dataclasses.asdict(row) for row in results],
    }


def shown(results: Sequence[Result], load: Load, width: int) -> list[Table | str]:
    """The load, the table, and what each server said."""
    if load.arrivals is None:
        one = load.callers == 1
        callers = "1 caller, with" if one else f"{load.callers} callers, each with"
        said = f"{callers} one request open (closed loop)"
    else:
        kind = f"{load.arrivals.kind} arrivals, {load.arrivals.rate:g} requests/s due"
        said = f"{kind}, at most {load.callers} open (open loop)"
    return [said, _table(results, width), *(line for row in results for line in _lines(row))]


def _table(results: Sequence[Result], width: int) -> Table:
    """A narrow terminal shows fewer columns, never broken numbers."""
    slow = max((row.latency.p50_us for row in results if row.latency), default=0.0) >= _LONG_US
    unit, scale = ("ms", 1e-3) if slow else ("us", 1.0)
    caption = (
        f"/s: answers a second; p50 to max: latency of answered requests, {unit}; CPU: us that the "
        "client itself computes for a request"
    )
    table = Table(caption=caption, caption_justify="left")
    table.add_column("served by", overflow="fold")
    names = ["p50", "p90", "p95", "p99", "p99.9", "max"]
    if width < _WIDE:
        names = ["p50", "p99", "max"]
    for header in ("/s", *names, "errors", "CPU"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in results:
        latency = dataclasses.asdict(row.latency) if row.latency else {}
        keys = [f"{name.replace('.', '_')}_us" for name in names]
        table.add_row(
            printable(row.name.removeprefix("http://")),
            number(row.requests_per_s),
            *(number(scale * latency[key]) if latency else "-" for key in keys),
            str(sum(row.errors.values())),
            number(row.client_cpu_us),
        )
    return table


def _lines(row: Result) -> list[str]:
    """One target in words."""
    inputs = ", ".join(f"{name} {shape}" for name, shape in row.inputs.items())
    lines = [
        f"{row.name}: {row.server}, {row.model}: {inputs}; {row.rows_per_s:.1f} rows/s; "
        f"{row.sent_bytes:.0f} bytes there, {row.received_bytes:.0f} back"
    ]
    if row.split is not None:
        told = row.split
        lines.append(
            f"  by its own account a request waits {told.queue_us:.1f} us, computes "
            f"{told.infer_us:.1f} us (+ {told.input_us:.1f} inputs, {told.output_us:.1f} outputs), "
            f"{told.rows_per_execution:.2f} rows together"
        )
    if row.first_is is not None:
        lines.append(f"  the first one {_compared(row)}")
    for error, count in row.errors.items():
        words = f": {row.words[error]}" if row.words.get(error) else ""
        busy = " (busy)" if error in _busy() else ""
        lines.append(f"  {count} times {error}{busy}{words}")
    return lines


def _compared(row: Result) -> str:
    """How many times as good the first target is, median and quartiles of the turns."""
    assert row.first_is is not None
    parts: Mapping[str, Any] = {
        "answers": row.first_is.requests,
        "is at its p50": row.first_is.p50,
        "at its p99": row.first_is.p99,
    }
    said = [
        f"{words} {times(ratio.median)} ({times(ratio.low)}-{times(ratio.high)})"
        for words, ratio in parts.items()
    ]
    return f"{said[0]} times as many, {said[1]} and {said[2]} times as fast"


def _busy() -> frozenset[str]:
    from twofour.bench.load.client import BUSY

    return BUSY
