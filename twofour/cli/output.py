"""What a command says and where: results on stdout, progress and errors on stderr, never mixed.

--json    stdout holds one JSON document and nothing else; its `schema` says which
--quiet   nothing but errors

What is no terminal gets lines of at most 100 columns without colours; COLUMNS changes the width.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from twofour.core.errors import Error, GateError, UnsupportedError
from twofour.core.progress import Report, silent

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]

PLAIN_WIDTH = 100
"""Columns of a line where the output goes to no terminal."""
_SIGINT_EXIT, _SIGPIPE_EXIT = 130, 141
_MOST_NAMES = 12


class _Terminal(Console):
    """A console that ends quietly when its reader has gone (`twofour explain E | head`)."""

    def on_broken_pipe(self) -> NoReturn:
        """Keeps Python from complaining once more at exit."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_SIGPIPE_EXIT)


def printable(text: str) -> Text:
    """Text from a file as it may be printed: no control characters, no markup."""
    return Text(_clean(text))


def _hanging(text: str, width: int) -> Text:
    """Long lines go on as far to the right as they begin, those of a list ("- ") behind it."""
    lines = []
    for line in _clean(text).split("\n"):
        indent = len(line) - len(line.lstrip(" -"))
        lines += textwrap.wrap(
            line,
            width,
            subsequent_indent=" " * min(indent, width // 2),
            break_on_hyphens=False,
            drop_whitespace=True,
        ) or [""]
    return Text("\n".join(lines))


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def by_reason(title: str, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Each reason once, with the names it holds for.

    Args:
        title: what the reasons are of.
        pairs: reason, name; of many names the first are shown.
    """
    found: dict[str, list[str]] = {}
    for reason, name in pairs:
        found.setdefault(reason, []).append(name)
    lines = []
    for reason, names in found.items():
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        lines.append(f"{title}: {reason}\n  {', '.join(names[:_MOST_NAMES])}{more}")
    return lines


def short(name: str, most: int) -> str:
    """The begin and the end of a name, which tell more than its middle."""
    if len(name) <= most:
        return name
    return f"{name[: most // 2 - 2]}...{name[len(name) - most + most // 2 + 1 :]}"


@dataclass(frozen=True)
class Output:
    """Where a command's words go.

    Attributes:
        as_json: print only `data`.
        quiet: print nothing.
    """

    as_json: bool = False
    quiet: bool = False

    @property
    def width(self) -> int:
        """Columns that a line on stdout has."""
        return _console(sys.stdout).width

    def show(self, *parts: RenderableType) -> None:
        """Prints tables and text for people; strings are printed as they are, without markup."""
        if self.quiet or self.as_json:
            return
        console = _console(sys.stdout)
        for part in parts:
            console.print(_hanging(part, console.width) if isinstance(part, str) else part)

    def data(self, schema: str, document: dict[str, Any]) -> None:
        """Prints the document for programs, if that is what was asked for.

        Args:
            schema: NAME/VERSION; the version rises when a key goes away or changes its meaning.
            document: plain data; numbers that JSON has not (infinite, or none) become null.
        """
        if self.as_json and not self.quiet:
            print_document(schema, document)

    def fail(self, *reasons: str) -> NoReturn:
        """Ends a command that has shown its results, and whose check did not hold: exit code 1.

        Args:
            reasons: a line each, on stderr.
        """
        for reason in reasons:
            print(_clean(reason), file=sys.stderr)
        raise typer.Exit(GateError.exit_code)

    def note(self, text: str) -> None:
        """A remark beside the result, on stderr."""
        if not self.quiet:
            _console(sys.stderr).print(Text(text))

    @contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        """Shows the progress of one stage while it runs, then its time.

        On a terminal a bar; in a log one line when the stage ends.
        """
        console = _console(sys.stderr)
        started = time.monotonic()
        if self.quiet:
            yield silent
            return
        if console.is_terminal:
            with _bar(console) as bar:
                yield _mover(bar, name)
        else:
            yield silent
        console.print(Text(f"{name}: {time.monotonic() - started:.1f} s"))


def print_document(schema: str, document: dict[str, Any]) -> None:
    """Writes the one JSON document of a command to stdout."""
    plain = {"schema": f"twofour.{schema}", **document}
    _console(sys.stdout).out(json.dumps(_finite(plain), indent=2), highlight=False)


def _finite(value: Any) -> Any:
    """The same plain data, with null for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _console(stream: Any) -> Console:
    """Made anew for each use, since streams may be replaced."""
    fixed = stream.isatty() or os.environ.get("COLUMNS")
    return _Terminal(file=stream, width=None if fixed else PLAIN_WIDTH, highlight=False)


def _bar(console: Console) -> Progress:
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}", markup=False),
    ]
    return Progress(*columns, console=console, transient=True)


def _mover(bar: Progress, name: str) -> Report:
    """Moves one line of a progress display."""
    task = bar.add_task(name, total=None, what="")

    def report(done: int, total: int | None, what: str) -> None:
        bar.update(task, completed=done, total=total, what=_clean(what))

    return report


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command: our errors become one message and an exit code; bugs keep their trace."""

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        try:
            function(**arguments)
        except Error as e:
            _print_error(e, as_json=arguments.get("as_json", False))
            raise typer.Exit(e.exit_code) from e
        except MemoryError as e:
            full = UnsupportedError("not enough memory", [str(e)], "give smaller inputs")
            _print_error(full, as_json=arguments.get("as_json", False))
            raise typer.Exit(full.exit_code) from e
        except KeyboardInterrupt as e:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(_SIGINT_EXIT) from e

    # \b: --help keeps the lines of a block as they are.
    run.__doc__ = inspect.cleandoc(function.__doc__ or "").replace("Example:", "\b\nExample:", 1)
    return run


def _print_error(error: Error, *, as_json: bool) -> None:
    kind = type(error).__name__
    print(_clean(f"{kind}: {error}"), file=sys.stderr)
    if as_json:
        print_error_document(kind, error.what, error.reasons, error.fix)


def print_error_document(kind: str, what: str, reasons: Sequence[str], fix: str) -> None:
    """What --json prints of a command that ended with an error, and so has no other document."""
    parts = {"type": kind, "what": what, "reasons": list(reasons), "fix": fix}
    print_document("error/1", {"error": parts})
