"""`build.arguments` of a config.yaml: which options of `twofour build` it may give.

They come from whoever owns the repository, and reach a process of the server's user. So they are
taken by name from a list, files among them are names of the version's own files, and each option
is handed on as one word: a value that begins with a dash stays a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from twofour.core.errors import InputError

_FLAGS = ("--int8", "--bf16", "--fp16", "--fp8", "--no-race")
_VALUES = ("--shapes", "--sparsity", "--tuning-effort", "--workspace", "--threads", "--isa")
_FILES = ("--data", "--calibration-cache")
_HERE = {"--target": ("cpu", "cuda")}
"""Options with the values that they may have: a build is for this machine."""
_ALL = (*_FLAGS, *_VALUES, *_FILES, *_HERE)


def options(arguments: Sequence[str], files: Sequence[str], folder: Path) -> list[str]:
    """Words for the command line, in the order given.

    Args:
        arguments: of config.yaml, "--name value" as two words or "--name=value" as one.
        files: names of the version's files, which --data and --calibration-cache may name.
        folder: where they are, absolute.

    Raises:
        InputError: an option that is not allowed, a missing value, a file that is not there.
    """
    found, problems = [], []
    for name, value, problem in _pairs(arguments):
        if not problem and name in _FILES and value not in files:
            problem = f"{name} {value!r}: expected a file of the version: {', '.join(files)}"
        if not problem and name in _HERE and value not in _HERE[name]:
            problem = f"{name} {value!r}: expected {' or '.join(_HERE[name])}"
        if problem:
            problems.append(problem)
        elif value is None:
            found.append(name)
        else:
            found.append(f"{name}={folder / value if name in _FILES else value}")
    if problems:
        fix = f"mend build.arguments in config.yaml; allowed are {', '.join(_ALL)}"
        raise InputError("build.arguments cannot be used", problems, fix)
    return found


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None, str]]:
    """Each option with its value, None for a flag, and what is wrong with it, "" for nothing."""
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if "\0" in word or name not in _ALL:
            yield name, None, f"{name!r} is no option that a configuration may give"
        elif name in _FLAGS:
            yield name, None, f"{name} takes no value, got {value!r}" if equals else ""
        else:
            given = value if equals else next(words, None)
            bad = given is None or "\0" in given
            yield name, given, f"{name} needs a value" if bad else ""
