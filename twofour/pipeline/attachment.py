"""A worker's ties to the pipeline that started it: it reports, fails in words, and never stays.

Stdout's pipe carries `jobs.progress_line` and `jobs.error_line` alone: the user's prints are sent
to stderr, which is the log. Stdin's pipe is written by nobody; once it ends the pipeline is gone,
and the worker kills itself and the processes it started.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from twofour.core.errors import Error, InputError, UnsupportedError
from twofour.pipeline.jobs import error_line, progress_line

_PACKAGE = Path(__file__).resolve().parents[1]
_EVERY_S = 0.1
_MOST_FRAMES = 6
_FIX_LOG = "the log of the stage has the whole traceback"


class Attachment:
    """The ties of this process, from now on.

    Attributes:
        stage: that runs, for messages.
    """

    def __init__(self) -> None:
        """Takes stdout for itself, and watches stdin."""
        self.stage = ""
        self._first = os.environ.get("RANK", "0") == "0"
        self._said_s = 0.0
        sys.stdout.flush()
        self._out = os.dup(1)
        os.dup2(2, 1)
        sys.excepthook = self._unexpected
        if stat.S_ISFIFO(os.fstat(0).st_mode):
            threading.Thread(target=_end_with_stdin, daemon=True).start()

    def report(self, done: int, total: int | None, what: str) -> None:
        """Tells the pipeline; of several processes the first does, ten times a second at most."""
        now_s = time.monotonic()
        if self._first and (done == total or now_s - self._said_s >= _EVERY_S):
            self._said_s = now_s
            self._say(progress_line(done, total, what))

    def fail(self, error: Error) -> NoReturn:
        """Tells the pipeline of an error, and ends the process."""
        traceback.print_exc()
        self._say(error_line(error))
        _flush()
        os._exit(error.exit_code)

    def _say(self, line: str) -> None:
        os.write(self._out, f"{line}\n".encode())

    def _unexpected(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """What nobody caught: most often an error of the user's code."""
        traceback.print_exception(kind, error, trace)
        if isinstance(error, Exception):
            found = in_words(error, self.stage)
            self._say(error_line(found))
            _flush()
            os._exit(found.exit_code)
        _flush()
        os._exit(1)


def in_words(error: Exception, stage: str) -> Error:
    """An error that nothing here raised on purpose, with the lines of the user's code it came by.

    Args:
        error: with its traceback.
        stage: where it happened.
    """
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if isinstance(error, MemoryError):
        return UnsupportedError(f"stage {stage}: not enough memory", [text], "use smaller batches")
    lines = own_lines(error)
    if lines:
        what = f"stage {stage}: code of the recipe failed"
        return InputError(what, [text, *lines], f"mend it; {_FIX_LOG}")
    if isinstance(error, OSError):
        return InputError(f"stage {stage}: cannot read or write", [text], _FIX_LOG)
    return Error(f"stage {stage} failed", [text], _FIX_LOG)


def own_lines(error: BaseException) -> list[str]:
    """The frames of a traceback that lie in the user's files, the innermost last: one line each."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [each for each in frames if _is_own(each.filename)][-_MOST_FRAMES:]
    return [f"{f.filename}:{f.lineno} in {f.name}: {(f.line or '').strip()}" for f in own]


def _is_own(name: str) -> bool:
    """Whether a file is none of this package, of installed ones, or of Python."""
    if name.startswith("<"):
        return False
    path = Path(name).resolve()
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not installed and not any(
        path.is_relative_to(each) for each in (_PACKAGE, Path(os.__file__).resolve().parent)
    )


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _end_with_stdin() -> None:
    """Waits until the pipeline's end of the pipe is closed."""
    while os.read(0, 4096):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # what loads data for it, too
    os.kill(os.getpid(), signal.SIGKILL)
