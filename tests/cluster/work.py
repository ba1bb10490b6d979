"""Functions that tests run on a cluster; and one such scan as a script.

python work.py ADDRESS CACHE LOG COUNT SECONDS
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ray

from twofour.cluster.tasks import on_ray
from twofour.core.errors import GateError
from twofour.core.scan import Cache, Item, Result, Work, key_of, scan


def items(count: int) -> list[Item]:
    return [Item(f"item {k}", key_of("test", k), k) for k in range(count)]


def start_where() -> Callable[[int], tuple[str, float, int]]:
    """Who works at an item: Ray's node, the CPUs that it gives, the process."""
    return where


def where(argument: int) -> tuple[str, float, int]:
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_assigned_resources()["CPU"], os.getpid()


def start_together(folder: str, count: int) -> Callable[[int], str]:
    """Ends an item when so many have begun; tells the node."""
    return functools.partial(together, folder, count)


def together(folder: str, count: int, argument: int) -> str:
    Path(folder, str(argument)).touch()
    while len(list(Path(folder).iterdir())) < count:
        time.sleep(0.05)
    return str(ray.get_runtime_context().get_node_id())


def start_gated(log: str, gates: str) -> Callable[[int], int]:
    """Says in the log which item begins on which node, and waits for the item's gate."""
    return functools.partial(gated, log, gates)


def gated(log: str, gates: str, argument: int) -> int:
    with Path(log).open("a") as file:
        file.write(f"{argument} {ray.get_runtime_context().get_node_id()}\n")
    while not Path(gates, str(argument)).exists():
        time.sleep(0.05)
    return argument**2


def start_log(log: str, seconds: float = 0.0) -> Work:
    """Says in the log what begins; see `logged`."""
    return functools.partial(logged, log, seconds)


def logged(log: str, seconds: float, argument: int) -> Result:
    with Path(log).open("a") as file:
        file.write(f"{argument} {os.getpid()}\n")
    time.sleep(seconds)
    return {"figure": float(argument**2)}


def start_mortal(folder: str, deaths: int) -> Work:
    """Item 1 kills its worker so many times."""
    return functools.partial(mortal, folder, deaths)


def mortal(folder: str, deaths: int, argument: int) -> Result:
    if argument == 1:
        died = len(list(Path(folder).iterdir()))
        if died < deaths:
            Path(folder, str(died)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return {"figure": float(argument**2)}


def start_odd(wrong: str) -> Work:
    return functools.partial(odd, wrong)


def odd(wrong: str, argument: int) -> Result:
    """Item 1 goes wrong."""
    if argument == 1 and wrong == "error":
        raise GateError("no figure", ["expected one"], "give one")
    if argument == 1:
        raise ZeroDivisionError("a bug of the metric")
    return {"figure": float(argument**2)}


def refuse() -> Work:
    raise GateError("cannot start", ["expected more"], "give more")


def dies() -> Work:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def start_reading(data: Path, folder: Path) -> Callable[[int], tuple[float, list[str]]]:
    """Reads files as it starts: what they hold is there before the first item."""
    with np.load(data) as found:
        total = float(found["x"].sum())
    texts = [str(each.relative_to(folder)) for each in sorted(folder.rglob("*.txt"))]
    return functools.partial(read, total, texts)


def read(total: float, texts: list[str], argument: Path) -> tuple[float, list[str], str]:
    return total, texts, argument.read_text()


def unsendable() -> str:
    """What no other process can have, whatever its type is said to be."""
    return threading.Lock()  # type: ignore[return-value]


@contextmanager
def in_thread(function: Callable[[], None]) -> Iterator[None]:
    """Runs it beside the block, and raises what it raised."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(function)
        yield
        future.result()


if __name__ == "__main__":
    address, cache, log, count, seconds = sys.argv[1:]
    with on_ray(address) as spread:
        scan(
            items(int(count)),
            functools.partial(start_log, log, float(seconds)),
            Cache.open(cache, ["figure"]),
            spread=spread,
        )
