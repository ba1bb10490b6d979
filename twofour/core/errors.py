"""The error classes and the shape of their messages.

Every message says what failed and where, what was expected, what was found, and how to mend it. All
errors derive from `Error`, so that the command line prints one message and picks the exit code from
the class.
"""

from __future__ import annotations

from collections.abc import Sequence


class Error(Exception):
    """Root of all errors raised on purpose by twofour.

    Args:
        what: one line: what failed, and where.
        reasons: one line each: what was expected and what was found; all that are known, not the
            first.
        fix: what the user can do about it.
    """

    exit_code = 2

    def __init__(self, what: str, reasons: Sequence[str] = (), fix: str = "") -> None:
        """Keeps the parts, so that `--json` output can show them apart."""
        self.what = what
        self.reasons = tuple(reasons)
        self.fix = fix
        lines = [what, *(f"  {reason}" for reason in self.reasons)]
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))


class InputError(Error):
    """The user's file, data or option is not usable as given."""


class UnsupportedError(Error):
    """The input is valid, but nothing here can do what was asked with it."""


class EngineError(Error):
    """An engine file was refused: damaged, altered, foreign, or built for another machine."""


class GateError(Error):
    """A check of the user's own (accuracy, speed, sparsity) did not hold."""

    exit_code = 1
