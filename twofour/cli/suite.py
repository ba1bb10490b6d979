"""twofour bench --suite: whole networks, our engines and the peers' best settings, in one table."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twofour.cli.options import require_packages, require_writable
from twofour.cli.output import Output

if TYPE_CHECKING:
    from twofour.bench.suite.rows import SuiteOptions

_TITLES = {"cpu": "Whole networks on the CPU", "detection": "Detectors on the CPU"}
_DEFAULT_CACHE = Path("~/.cache/twofour/suite")


@dataclass(frozen=True)
class SuiteRequest:
    """The options that only the suite has, as they were given.

    Attributes:
        suite: its name; "" if none was asked for.
        only: names of rows with commas between; "" for all.
        cache: folder of models and engines.
        write: folder that the page goes to; None to write none.
        fresh: begin the page anew, whatever rows it has.
    """

    suite: str
    only: str
    cache: Path | None
    write: Path | None
    fresh: bool = False

    def refuse_beside(self, **others: Any) -> None:
        """Refuses options of a single engine.

        Raises:
            InputError: one was given, or no suite.
        """
        from twofour.core.errors import InputError

        if not self.suite:
            expected = "expected an .engine or .onnx file, or --suite"
            raise InputError("nothing to measure", [expected], "give one of them")
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise InputError(
                "a suite has its own networks",
                [f"{', '.join(given)} was given beside --suite"],
                "leave it out, or leave out --suite",
            )

    def refuse_without_suite(self) -> None:
        """Refuses options of the suite.

        Raises:
            InputError: one was given.
        """
        from twofour.core.errors import InputError

        if self.only or self.cache or self.write or self.fresh:
            raise InputError(
                "an option needs --suite",
                ["--only, --cache, --write and --fresh belong to a suite"],
                "add --suite cpu, or leave it out",
            )


def bench_suite(
    asked: SuiteRequest, peers: tuple[str, ...], threads: int, duration_s: float, out: Output
) -> None:
    """Measures, shows, and writes the page if that was asked for; exit code 1 if a row failed.

    The page is written after each row, so that one that is stopped keeps what was measured; rows
    that it has from an earlier run stay, if they were measured alike.
    """
    require_packages("the suite", ("torch", "tokenizers"), "bench")
    from twofour.bench.suite import page
    from twofour.bench.suite.merge import merged
    from twofour.bench.suite.rows import SUITES, SuiteOptions, select
    from twofour.bench.suite.run import circumstances, failures, run_suite
    from twofour.bench.timing import Schedule

    Schedule(duration_s)  # refuses what cannot be measured, before anything is made for it
    only = [name.strip() for name in asked.only.split(",") if name.strip()]
    rows = select(asked.suite, only)
    data = os.environ.get("TWOFOUR_DATA")
    options = SuiteOptions(
        peers,
        threads,
        duration_s,
        (asked.cache or _DEFAULT_CACHE).expanduser(),
        Path(data) if data else None,
    )
    head = {"title": _TITLES[asked.suite], "suite": asked.suite, "command": ""}
    kept = _kept(asked, circumstances(options))
    order = [row.name for row in SUITES[asked.suite]]
    found: dict[str, Any] = {}
    document: dict[str, Any] = {}
    with out.stage("measuring") as report:
        for found in run_suite(rows, options, report):
            document = {**head, **found, "rows": merged(kept, found["rows"], order)}
            document["command"] = _command(document, options, order)
            if asked.write is not None:
                page.write(document, asked.write)
    out.show(*page.rich_tables(document, out.width))
    if asked.write is not None:
        stem = page.file_stem(asked.suite, threads)
        out.note(f"wrote {stem}.md and {stem}.json in {asked.write}")
    out.data("suite/1", document)
    failed = failures(found)
    if failed:
        out.fail(*(f"failed: {line}" for line in failed))


def _kept(asked: SuiteRequest, now: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that the page has from an earlier run.

    Raises:
        InputError: the folder cannot be written, or only some rows were asked for and the others
            were measured under other circumstances.
    """
    from twofour.bench.suite.merge import differences, read_page
    from twofour.bench.suite.page import file_stem
    from twofour.core.errors import InputError

    if asked.write is None:
        return []
    path = asked.write / f"{file_stem(asked.suite, now['threads'])}.json"
    require_writable(path)
    earlier = None if asked.fresh else read_page(path)
    if earlier is None:
        return []
    why_not = differences(earlier, now)
    if why_not and asked.only:
        raise InputError(
            f"the rows of {path.name} do not belong beside new ones",
            why_not,
            "measure all rows, write to another folder, or begin the page anew with --fresh",
        )
    return [] if why_not else list(earlier["rows"])


def _command(document: dict[str, Any], options: SuiteOptions, order: list[str]) -> str:
    """Reproduces the page, wherever its files go and in however many pieces it was measured."""
    words = ["twofour", "bench", "--suite", document["suite"], "--threads", str(options.threads)]
    words += ["--vs", ",".join(options.peers)] if options.peers else []
    words += ["--duration", f"{options.duration_s:g}"]
    names = [row["name"] for row in document["rows"]]
    words += ["--only", ",".join(names)] if names != order else []
    return shlex.join(words)
