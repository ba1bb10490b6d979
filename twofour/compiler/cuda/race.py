"""How long each algorithm of a library takes, found out in a process of its own.

Some algorithms that a library lists for a product break on it: with an instruction that the GPU
refuses, or without an end. After that nothing runs on the GPU any more in that process. So they run
in a child, which is started again behind the one that broke it.
"""

from __future__ import annotations

import atexit
import json
import math
import queue
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from twofour.core.cuda_products import Product

_SECONDS = 30.0  # until the first answer of a child: the start of it and of the libraries is in it
_SECONDS_MORE = 6.0  # until each further one
_MOST_STARTS = 8  # for one race
_MOST_BROKEN = 2  # algorithms for some types, behind which none is tried that is not known
_MOST_BREAKS = 4  # for some types, behind which nothing is tried: each costs seconds
_MODULE = "twofour.compiler.cuda.race_child"
_Kind = tuple[str, str, str]  # library, types of x and y


@dataclass
class Result:
    """One product's race.

    Attributes:
        product: by one algorithm.
        us: microseconds of a run; infinity where there is none.
        error: why there is none.
    """

    product: Product
    us: float = math.inf
    error: str = ""


def _kind(result: Result, library: str) -> _Kind:
    return library, result.product.x, result.product.y


@dataclass
class Racer:
    """A child process on one GPU.

    Attributes:
        uuid: of the GPU.
        command: that starts the child.
        seconds: that an answer may take.
    """

    uuid: str
    command: tuple[str, ...] = (sys.executable, "-m", _MODULE)
    seconds: float = _SECONDS
    _known: dict[_Kind, dict[str, bool]] = field(default_factory=dict)
    _breaks: Counter[_Kind] = field(default_factory=Counter)
    _process: subprocess.Popen[str] | None = None
    _silent: bool = True
    _answers: queue.Queue[str] = field(default_factory=queue.Queue)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def race(self, products: list[Product], library: str, runs: int) -> list[Result]:
        """All products, the fastest first, those that cannot run last.

        Args:
            products: by different algorithms.
            library: "cublaslt" or "cusparselt".
            runs: of each behind the first.

        Returns:
            A result for each, with an error where there is no time: also of all, where the child
            does not start.
        """
        results = [Result(product) for product in products]
        with self._lock:
            left = [each for each in results if self._may_run(each, library)]
            starts = 0
            while left:
                starts += self._process is None
                if starts > _MOST_STARTS:
                    break
                left = left[self._asked(left, library, runs) :]
                left = [each for each in left if self._may_run(each, library)]
        for result in results:
            if result.us == math.inf and not result.error:
                result.error = "not tried: it, or too many others, broke the GPU's context before"
        return sorted(results, key=lambda result: result.us)

    def close(self) -> None:
        """Ends the child."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _note(self, result: Result, library: str, *, whole: bool) -> None:
        """Whether an algorithm left the context whole."""
        kind = _kind(result, library)
        self._known.setdefault(kind, {})[result.product.algorithm] = whole
        self._breaks[kind] += not whole

    def _may_run(self, result: Result, library: str) -> bool:
        """One that broke is not tried again; after some that did, none that is not known.

        What did no harm to one product may break on another: after some more, none at all.
        """
        kind = _kind(result, library)
        known = self._known.get(kind, {})
        some = list(known.values()).count(False) < _MOST_BROKEN
        return self._breaks[kind] < _MOST_BREAKS and known.get(result.product.algorithm, some)

    def _asked(self, results: list[Result], library: str, runs: int) -> int:
        """Asks for these; how many were answered or broke the child."""
        settings = [result.product.to_json() for result in results]
        request = json.dumps({"library": library, "settings": settings, "runs": runs})
        process = self._started()
        try:
            assert process.stdin is not None
            process.stdin.write(request + "\n")
            process.stdin.flush()
        except OSError:
            pass  # it has ended: its answer says so
        for index, result in enumerate(results):
            answer = self._answer(self.seconds if self._silent else _SECONDS_MORE)
            self._silent = False
            if answer is None:
                result.error = "it breaks the GPU's context, or does not end"
                self._note(result, library, whole=False)
                self.close()
                return index + 1
            result.us = float(answer.get("us", math.inf))
            self._note(result, library, whole=True)
            result.error = str(answer.get("error", ""))
        return len(results)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            answers: queue.Queue[str] = queue.Queue()
            self._answers = answers
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                [*self.command, self.uuid], stdin=pipe, stdout=pipe, text=True
            )
            threading.Thread(target=_listen, args=(process, answers), daemon=True).start()
            self._process, self._silent = process, True
        return self._process

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """The next answer; None where the child ended or says nothing for so long."""
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            return None
        return dict(json.loads(line)) if line else None


def _listen(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put("")


_racers: dict[str, Racer] = {}
_lock = threading.Lock()


def racer(uuid: str) -> Racer:
    """The one of a GPU, for the life of this process."""
    with _lock:
        if uuid not in _racers:
            _racers[uuid] = Racer(uuid)
            atexit.register(_racers[uuid].close)
        return _racers[uuid]
