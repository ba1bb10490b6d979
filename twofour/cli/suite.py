"""twofour bench --suite: whole networks, our engines and the peers' best settings, in one table."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from twofour.cli.options import require_packages, require_writable
from twofour.cli.output import Output

if TYPE_CHECKING:
    from twofour.bench.suite.rows import SuiteOptions

_TITLES = {"cpu": "Whole networks on the CPU"}
_DEFAULT_CACHE = Path("~/.cache/twofour/suite")


@dataclass(frozen=True)
class SuiteRequest:
    """The options that only the suite has, as they were given.

    Attributes:
        suite: its name; "" if none was asked for.
        only: names of rows with commas between; "" for all.
        cache: folder of models and engines.
        write: folder that the page goes to; None to write none.
    """

    suite: str
    only: str
    cache: Path | None
    write: Path | None

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

        if self.only or self.cache or self.write:
            raise InputError(
                "an option needs --suite",
                ["--only, --cache and --write belong to a suite"],
                "add --suite cpu, or leave it out",
            )


def bench_suite(
    asked: SuiteRequest, peers: tuple[str, ...], threads: int, duration_s: float, out: Output
) -> None:
    """Measures, shows, and writes the page if that was asked for; exit code 1 if a row failed.

    The page is written after each row, so that one that is stopped keeps what was measured.
    """
    require_packages("the suite", ("torch", "tokenizers"), "bench")
    from twofour.bench.suite import page
    from twofour.bench.suite.rows import SuiteOptions, select
    from twofour.bench.suite.run import failures, run_suite

    only = [name.strip() for name in asked.only.split(",") if name.strip()]
    rows = select(asked.suite, only)
    if asked.write is not None:
        require_writable(asked.write / f"{asked.suite}.json")
    data = os.environ.get("TWOFOUR_DATA")
    options = SuiteOptions(
        peers,
        threads,
        duration_s,
        (asked.cache or _DEFAULT_CACHE).expanduser(),
        Path(data) if data else None,
    )
    head = {
        "title": _TITLES[asked.suite],
        "suite": asked.suite,
        "command": _command(asked, options),
    }
    document: dict[str, Any] = {}
    with out.stage("measuring") as report:
        for found in run_suite(rows, options, report):
            document = {**head, **found}
            if asked.write is not None:
                page.write(document, asked.write)
    out.show(page.rich_table(document))
    if asked.write is not None:
        out.note(f"wrote {asked.suite}.md and {asked.suite}.json in {asked.write}")
    out.data(document)
    failed = failures(document)
    for line in failed:
        out.note(f"failed: {line}")
    if failed:
        raise typer.Exit(1)


def _command(asked: SuiteRequest, options: SuiteOptions) -> str:
    """Reproduces the run, wherever its files go."""
    words = ["twofour", "bench", "--suite", asked.suite, "--threads", str(options.threads)]
    words += ["--vs", ",".join(options.peers)] if options.peers else []
    words += ["--duration", f"{options.duration_s:g}"]
    words += ["--only", asked.only] if asked.only else []
    return shlex.join(words)
