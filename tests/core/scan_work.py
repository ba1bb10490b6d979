"""Functions that scans of the tests run in processes of their own; and one such scan as a script.

python scan_work.py CACHE LOG COUNT JOBS SECONDS
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from twofour.core.errors import InputError
from twofour.core.scan import Cache, Item, Result, Work, key_of, scan


def items(count: int) -> list[Item]:
    return [Item(f"item {k}", key_of("test", k), k) for k in range(count)]


def square(argument: int) -> Result:
    return {"figure": float(argument**2)}


def start() -> Work:
    return square


def start_process() -> Work:
    return process


def process(argument: int) -> Result:
    """Who works at it."""
    return {"figure": float(os.getpid())}


def start_bytes() -> Callable[[int], bytes]:
    return letters


def letters(argument: int) -> bytes:
    return b"x" * argument


def start_odd(wrong: str) -> Work:
    return functools.partial(odd, wrong)


def odd(wrong: str, argument: int) -> Result:
    """Item 1 goes wrong."""
    if argument == 1 and wrong == "error":
        raise InputError("no figure", ["expected one"], "give one")
    if argument == 1 and wrong == "bug":
        raise ValueError("a bug")
    if argument == 1 and wrong == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return square(argument)


def refuse() -> Work:
    raise InputError("cannot start")


def start_slow(log: str, seconds: float) -> Work:
    return functools.partial(slow, log, seconds)


def slow(log: str, seconds: float, argument: int) -> Result:
    """Says in the log that it began."""
    with Path(log).open("a") as file:
        file.write(f"{argument} {os.getpid()}\n")
    time.sleep(seconds)
    return square(argument)


if __name__ == "__main__":
    cache, log, count, jobs, seconds = sys.argv[1:]
    scan(
        items(int(count)),
        functools.partial(start_slow, log, float(seconds)),
        Cache.open(cache, ["figure"]),
        int(jobs),
    )
